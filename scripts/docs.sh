#!/usr/bin/env bash
# Builds the site of docs/ in .cache/site, and fails if a link or a reference is broken.
#
#   ./scripts/docs.sh           builds it
#   ./scripts/docs.sh --serve   also serves it on port 8000 of this machine
set -euo pipefail
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install "[test]"
reference=$(python -m scripts.docs.reference)
echo "$reference" >docs/reference/commands.md
mkdocs build --strict --quiet --clean --config-file scripts/docs/mkdocs.yml --site-dir "$root/.cache/site"
echo "built .cache/site/index.html"
if [[ ${1:-} == --serve ]]; then
  python -m http.server --directory .cache/site --bind 127.0.0.1 8000
fi
