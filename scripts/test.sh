#!/usr/bin/env bash
# Format, lint, import rules, types, doctests and tests, those of several devices in a pytest of
# their own.
#
#   ./scripts/test.sh                   everything but what takes minutes
#   ./scripts/test.sh --slow            that too
#   ./scripts/test.sh tests/routing     format, lint, import rules, types, and these tests alone
#   ./scripts/test.sh tests/nn -k moe   paths first; all from the first option on goes to pytest
set -euo pipefail
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install "[test]"
mkdir -p .cache

on_eight=() on_one=()
while [[ $# -gt 0 && $1 != -* ]]; do
  case ${1#./} in
    tests | tests/) on_eight+=(tests/devices) on_one+=(tests) ;;
    tests/devices*) on_eight+=("$1") ;;
    *) on_one+=("$1") ;;
  esac
  shift
done
[[ ${#on_eight[@]} -gt 0 || ${#on_one[@]} -gt 0 ]] || on_eight=(tests/devices) on_one=(tests vmoe)

# Each worker takes half of the tests in their order, so that most files, and with them what their
# tests share, stay with one worker; who is done takes over half of what another has left.
run_pytest() {
  pytest --quiet --numprocesses auto --dist worksteal "$@"
}

echo "== format";  ruff format --check --quiet . || stop "format: run 'ruff format'"
echo "== lint";    ruff check --quiet .
echo "== imports"; lint-imports --no-cache >.cache/imports.log 2>&1 || stop "$(cat .cache/imports.log)"
echo "== types";   pyrefly check --output-format min-text >.cache/types.log 2>&1 || stop "$(cat .cache/types.log)"
if [[ ${#on_eight[@]} -gt 0 ]]; then
  echo "== tests on eight devices"
  run_pytest "${on_eight[@]}" "$@" || [[ $? == 5 && ${#on_one[@]} -gt 0 ]]  # 5: none was meant
fi
if [[ ${#on_one[@]} -gt 0 ]]; then
  echo "== tests"
  run_pytest "${on_one[@]}" "$@"
fi
