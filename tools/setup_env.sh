#!/usr/bin/env bash
# Make the virtual environment and install this package with its dependencies into it.
#
#   tools/setup_env.sh [DIR]        DIR: .venv
#
# PYTHON      interpreter to build on; searched for when not set
# VENV_ARGS   passed on to python -m venv, such as --system-site-packages
# EXTRAS      comma-separated extras of pyproject.toml (default: dev)
#
# A torch that DIR can import already and that is new enough is kept, whatever constraints.txt says.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${1:-.venv}
venv_python=$venv/bin/python
extras=${EXTRAS:-dev}
read -ra venv_args <<<"${VENV_ARGS:-}"

say() { printf 'set-up: %s\n' "$*"; }
fail() {
  printf 'set-up: %s\n' "$*" >&2
  exit 2
}

# An interpreter counts only if it runs: a version manager may leave commands that only print an error.
# Free-threaded builds are left out because torch has few wheels for them.
usable() {
  "$1" - >/dev/null 2>&1 <<'PY'
import sys, sysconfig
sys.exit(not (3, 12) <= sys.version_info[:2] < (3, 14) or bool(sysconfig.get_config_var("Py_GIL_DISABLED")))
PY
}

from_pyenv() {
  find "${PYENV_ROOT:-$HOME/.pyenv}/versions" -mindepth 3 -maxdepth 3 -path '*/bin/python3.1[23]' 2>/dev/null | sort -rV
}

from_uv() {
  command -v uv >/dev/null || return 0
  uv python find --no-project '>=3.12,<3.14' 2>/dev/null || true
}

# The search, best first; prints nothing where there is none.
find_python() {
  local candidate
  for candidate in python3.13 python3.12 $(from_pyenv) $(from_uv); do
    if usable "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  if command -v uv >/dev/null && uv python install --quiet 3.13 2>/dev/null; then
    uv python find --no-project --managed-python 3.13
  fi
}

choose_python() {
  if [[ -n ${PYTHON:-} ]]; then
    usable "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.12 or 3.13 that starts (it says: $("$PYTHON" -V 2>&1 | head -n 1))"
    python=$(command -v "$PYTHON")
  else
    python=$(find_python)
    [[ -n $python ]] || fail "no Python 3.12 or 3.13 found; install one, or name one with PYTHON=/path/to/python3.13"
  fi
}

make_venv() {
  choose_python
  say "using $python ($("$python" -V)) for $venv"
  "$python" -m venv --clear ${venv_args[@]+"${venv_args[@]}"} "$venv" >/dev/null || {
    rm -rf "$venv" # half of one would look usable the next time
    fail "$python cannot make virtual environments (on Debian and Ubuntu: apt install python3-venv)"
  }
}

# Prints "torch==VERSION" and "triton==VERSION" for what can be imported already, nothing where torch is too old.
kept_packages() {
  "$venv_python" - <<'PY'
import importlib.metadata, re
try:
    import torch
    minimum = re.search(r'"torch>=([\d.]+)', open("pyproject.toml", encoding="utf-8").read())[1]
    numbers = lambda version: [int(n) for n in re.findall(r"\d+", version)[:2]]
    if numbers(torch.__version__) >= numbers(minimum):
        print("torch==" + importlib.metadata.version("torch"))
        print("triton==" + importlib.metadata.version("triton"))
except (ImportError, OSError):  # not there, or it does not load; triton may also be missing alone
    pass
PY
}

install_uv() {
  command -v uv >/dev/null || [[ -x $venv/bin/uv ]] ||
    "$venv_python" -m pip install --quiet --constraint constraints.txt uv >/dev/null 2>&1
}

# uv does not read pip's configuration, where a cluster names its own package index.
share_index_with_uv() {
  local index
  index=$("$venv_python" -m pip config get global.index-url 2>/dev/null || true)
  index=${PIP_INDEX_URL:-$index}
  [[ -z $index ]] || export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$index}
}

# uv links packages from its cache, which takes seconds. It does not see packages outside the environment, so those
# that are kept are taken out of the resolution by a marker that never holds. Bytecode is made as pip makes it: where
# Python writes none itself (PYTHONDONTWRITEBYTECODE, as in many containers), every rank of every run would compile
# thousands of modules.
install_with_uv() {
  local uv
  share_index_with_uv
  uv=$(command -v uv || echo "$venv/bin/uv")
  sed 's/==.*/; python_version < "0"/' "$kept" >"$work/overrides.txt"
  "$uv" pip install --quiet --python "$venv_python" --compile-bytecode \
    --constraint "$work/constraints.txt" --overrides "$work/overrides.txt" --editable ".[$extras]"
}

install_with_pip() {
  "$venv_python" -m pip install --quiet --constraint "$work/constraints.txt" --constraint "$kept" \
    --editable ".[$extras]"
}

install_packages() {
  grep -vFf <(sed 's/==.*/==/' "$kept") constraints.txt >"$work/constraints.txt"
  say "installing copus-megatron[$extras] into $venv$([[ -s $kept ]] || echo ' (with torch: minutes, the first time)')"
  if install_uv && install_with_uv; then
    return
  fi
  say "uv could not do it; going on with pip"
  install_with_pip || fail "the packages could not be installed; what pip said is above"
}

if usable "$venv_python"; then
  say "using the $venv that is there ($("$venv_python" -V))"
else
  make_venv
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
kept=$work/kept.txt
kept_packages >"$kept"
[[ ! -s $kept ]] || say "keeping $(paste -sd' ' "$kept"), which can be imported already"
install_packages
say "ready: $venv"
