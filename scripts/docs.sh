#!/usr/bin/env bash
# Builds the site of docs/ in .cache/site, and fails if a link or a reference is broken.
#
#   ./scripts/docs.sh           builds it
#   ./scripts/docs.sh --serve   also serves it on port 8000 of this machine
set -euo pipefail
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install "[docs]"
echo "writing docs/reference/commands.md from the help texts (about 10 seconds)"
reference=$(python -m scripts.maintain.docs.reference)
echo "$reference" >docs/reference/commands.md
echo "building the site (about 10 seconds)"
python -m scripts.maintain.docs.site .cache/site
echo "built .cache/site/index.html"
if [[ ${1:-} == --serve ]]; then
  python -m http.server --directory .cache/site --bind 127.0.0.1 8000
fi
