#!/usr/bin/env bash
# Checks format, lint, import rules and types, and runs doctests and tests. tests/devices runs in
# its own pytest process, with eight devices.
#
#   ./scripts/test.sh                   the tests that need neither a process nor a run of their own
#   ./scripts/test.sh --processes       also those that start, kill or resume processes and runs, all
#                                       on eight devices, and checks of the axes of calls
#   ./scripts/test.sh --processes --slow   everything: also products of routers, shapes and kinds
#   ./scripts/test.sh tests/routing     format, lint, import rules, types, and only these tests
#   ./scripts/test.sh tests/nn -k moe   paths first; pytest gets the first option and what follows
set -euo pipefail
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install "${EXTRAS:-[test]}"
mkdir -p .cache
unset PYTHONDONTWRITEBYTECODE  # some fifty processes import the same files; one compiles them
export OMP_NUM_THREADS=1  # each core has a worker: more threads in NumPy's products only wait

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

# Each worker starts with a contiguous part of the tests, so that most files, and their module
# fixtures, run in one worker. An idle worker takes half of the remaining tests of another worker.
run_pytest() {
  pytest --quiet --numprocesses auto --dist worksteal "$@"
}

echo "== format";  ruff format --check --quiet . || stop "format: run 'ruff format'"
echo "== lint";    ruff check --quiet .
echo "== imports"; lint-imports --no-cache >.cache/imports.log 2>&1 || stop "$(cat .cache/imports.log)"
echo "== types";   pyrefly check --output-format min-text >.cache/types.log 2>&1 || stop "$(cat .cache/types.log)"
if [[ ${#on_eight[@]} -gt 0 ]]; then
  echo "== tests on eight devices"
  run_pytest "${on_eight[@]}" "$@" || [[ $? == 5 && ${#on_one[@]} -gt 0 ]]  # 5: no test selected
fi
if [[ ${#on_one[@]} -gt 0 ]]; then
  echo "== tests"
  { command -v chromium && command -v chromedriver; } >/dev/null ||
    echo "without the tests of the HTML page: they need chromium and chromedriver"
  run_pytest "${on_one[@]}" "$@"
fi
