#!/usr/bin/env bash
# Runs test.sh with another Python, and so with the other versions of the lock, in .venv-PYTHON.
# The compilers of TPUs and GPUs are there, and with --slow the tests that need them run.
#
#   ./scripts/test_python.sh python3.13                 as ./scripts/test.sh
#   ./scripts/test_python.sh python3.13 --processes     further arguments are those of test.sh
set -euo pipefail
python=${1:?"give a Python, such as python3.13"}
export PYTHON=$python VENV=.venv-${python##*/} EXTRAS='[test,compilers]'
exec "$(dirname "${BASH_SOURCE[0]}")/test.sh" "${@:2}"
