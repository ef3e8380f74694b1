#!/usr/bin/env bash
# Format, lint, import rules, doctests and tests, those of several devices by themselves; --slow adds
# what takes minutes. Other words go to pytest.
set -euo pipefail
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install "[test]"
mkdir -p .cache

echo "== format";  ruff format --check --quiet . || stop "format: run 'ruff format'"
echo "== lint";    ruff check --quiet .
echo "== imports"; lint-imports --no-cache >.cache/imports.log 2>&1 || stop "$(cat .cache/imports.log)"
echo "== tests on eight devices"
pytest --quiet --numprocesses auto tests/devices "$@" || [[ $? == 5 ]]  # 5: none of these was meant
echo "== tests";   pytest --quiet --numprocesses auto "$@"
