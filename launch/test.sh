#!/usr/bin/env bash
# The checks of this repository on any machine with Python 3.11 or newer: environment, ruff, pyright, pytest.
#   bash launch/test.sh                        the fast suite
#   bash launch/test.sh --with torch,sim       all tests but those for GPUs; PyTorch and the simulator only if named
#   bash launch/test.sh --pythons=3.11,3.12    the fast suite on each with the newest versions that the requirements allow,
#                                              on the first also with the oldest; an environment each, and a table
#   bash launch/test.sh [...] -- -k sharding   arguments after -- are passed to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh

# one row of the table: run_on VERSION newest|oldest [PYTEST ARGUMENT...]
run_on() {
  local version=$1 versions=$2 log status=0
  shift 2
  export VENV=.venv-$version-$versions PYTHON
  PYTHON=$(find_python "$version") || {
    echo "error: --pythons: expected a python$version on PATH or in pyenv, found none; pyenv install $version" >&2
    return 1
  }
  if [ "$versions" = oldest ]; then
    # the lower bounds of the requirements, as pins
    export PIP_CONSTRAINT
    PIP_CONSTRAINT=$(mktemp)
    sed -nE 's/^([A-Za-z0-9_.-]+)(\[.*\])?>=([0-9.]+).*/\1==\3/p' $requirements > "$PIP_CONSTRAINT"
  fi
  use_venv $requirements >&2 || return 1
  log=$VENV/pytest.log
  pytest -n "${TEST_JOBS:-2}" --dist loadfile -m "$selection" "$@" 2>&1 | tee "$log" >&2 || status=$?
  python - "$versions" "$(tail -n 1 "$log")" << 'END'
import platform, sys
from importlib.metadata import version
found = [version(name) for name in ("jax", "flax", "numpy")]
print("|", " | ".join([platform.python_version(), sys.argv[1], *found, sys.argv[2].strip("= ")]), "|")
END
  return $status
}

# the fast suite on every Python of $pythons, and a table
on_pythons() {
  local version versions rows status=0 first=${pythons%%,*}
  rows="| Python | versions | jax | flax | numpy | result |
|---|---|---|---|---|---|"
  for version in ${pythons//,/ }; do
    for versions in newest $([ "$version" = "$first" ] && echo oldest); do
      rows+=$'\n'$(run_on "$version" "$versions" "$@") || status=1
    done
  done
  echo "$rows"
  return $status
}

extras= pythons=
while [ $# -gt 0 ]; do
  case $1 in
    --with) extras=${2:-}; shift ;;
    --with=*) extras=${1#*=} ;;
    --pythons=*) pythons=${1#*=} ;;
    --) shift; break ;;
    --help) sed -n '2,7s/^# //p' "$0"; exit 0 ;;
    *) echo "error: unknown option $1; see bash launch/test.sh --help" >&2; exit 1 ;;
  esac
  shift
done
for extra in ${extras//,/ }; do
  case $extra in
    torch | sim) ;;
    *) echo "error: --with: expected torch, sim or torch,sim, found $extra" >&2; exit 1 ;;
  esac
done

requirements="requirements.txt launch/requirements-dev.txt launch/requirements-demo.txt launch/requirements-data.txt"
selection="not gpu and not slow and not torch and not sim"
case ,$extras, in
  *,torch,*) requirements+=" launch/requirements-torch.txt" selection="not gpu" ;; # the simulator is always installed
  *,sim,*) selection="not gpu and not torch" ;;
esac
export JAX_PLATFORMS=cpu
if [ -n "$pythons" ]; then
  on_pythons "$@"
  exit
fi
use_venv $requirements

ruff check .
ruff format --check .
pyright
pytest -n "${TEST_JOBS:-2}" --dist loadfile -m "$selection" "$@"
