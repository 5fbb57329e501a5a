#!/usr/bin/env bash
# The checks of this repository on any machine with Python 3.11 or newer: environment, ruff, pyright, pytest.
#   bash launch/test.sh                        the fast suite
#   bash launch/test.sh --with torch,sim       all tests but those for GPUs; PyTorch and the simulator only if named
#   bash launch/test.sh [...] -- -k sharding   arguments after -- are passed to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh

extras=
while [ $# -gt 0 ]; do
  case $1 in
    --with) extras=${2:-}; shift ;;
    --with=*) extras=${1#*=} ;;
    --) shift; break ;;
    --help) sed -n '2,5s/^# //p' "$0"; exit 0 ;;
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
use_venv $requirements
export JAX_PLATFORMS=cpu

ruff check .
ruff format --check .
pyright
pytest -n "${TEST_JOBS:-2}" --dist loadfile -m "$selection" "$@"
