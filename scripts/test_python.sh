#!/usr/bin/env bash
# Runs test.sh with another Python, and so with the other versions of the lock, in .venv-PYTHON.
#
#   ./scripts/test_python.sh python3.13                 as ./scripts/test.sh
#   ./scripts/test_python.sh python3.13 --processes     further arguments are those of test.sh
set -euo pipefail
python=${1:?"give a Python, such as python3.13"}
export PYTHON=$python VENV=.venv-${python##*/}
exec "$(dirname "${BASH_SOURCE[0]}")/test.sh" "${@:2}"
