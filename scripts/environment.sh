# shellcheck shell=bash
# Sourced by the other scripts: creates .venv from requirements.txt, or reuses an up-to-date one.
#   install ""        installs the dependencies of vmoe
#   install "[docs]"  also installs the dependencies of the site of docs/
#   install "[test]"  also installs the dependencies of the tests, which build the site
# Outside the project, only pip's cache changes. PYTHON=... selects another python3, and VENV=... the
# folder of another environment.

set -o pipefail
root=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit
venv=${VENV:-.venv}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$root/.cache/jax}

stop() {
  printf '%s\n' "$@" >&2
  exit 1
}

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null; then
      "$candidate" -c 'import ensurepip, venv' 2>/dev/null || stop \
        "$candidate cannot create environments: its venv module is missing." \
        "On Debian and Ubuntu: apt install python3-venv. Then run this again."
      echo "$candidate"
      return
    fi
  done
  stop "Python 3.11 to 3.14 is required, but ${PYTHON:-python3} is missing or another version." \
    "Install one, or give its path: PYTHON=/path/to/python3 $0"
}

# A dot for each package that pip has found.
dots() {
  local line
  while read -r line; do
    [[ $line != Collecting* ]] || printf .
  done
  echo
}

# A stamp records the installation: the lock, the folder (.venv cannot be moved) and the extras. It
# is removed before an installation and written after it, so that an interrupted one is repeated.
install() {
  local python wanted stamp="$venv/installed"
  wanted="$(cat requirements.txt pyproject.toml | cksum) $root"
  if ! "$venv/bin/python" -c 'import pip' 2>/dev/null || [[ $(cat "$stamp" 2>/dev/null) != "$wanted"* ]]; then
    python=$(find_python)
    echo "creating $venv with $("$python" -V)"
    "$python" -m venv --clear "$venv"
  fi
  if [[ $(cat "$stamp" 2>/dev/null) != "$wanted"*"$1"* ]]; then
    rm -f "$stamp"
    echo "installing vmoe$1 and its locked packages into $venv (1 to 3 minutes; later runs skip this)"
    # Half a minute is saved by compiling modules when they are imported, which most never are.
    "$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off --no-compile \
      --constraint requirements.txt --editable ".$1" | dots ||
      stop "The packages could not be installed; see the error above."
    echo "$wanted ${1/"[test]"/"[test] [docs]"}" >"$stamp"
  fi
  # Last: a half-made environment, left by an interruption, must not be the Python that repeats it.
  export PATH="$root/$venv/bin:$PATH"
}
