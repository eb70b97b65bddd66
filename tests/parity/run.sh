#!/usr/bin/env bash
# Compares Ferry with the real MaxText (PyPI, 0.2.5), which gets a Python 3.12 environment of its own in .parity/maxtext.
# Options go to pytest. Needs .venv (make venv) and a Python 3.12, on PATH or pyenv's.
set -euo pipefail
cd "$(dirname "$0")/../.."
echo "parity: converts small models with Ferry and with MaxText, and has MaxText load what Ferry wrote"

lock=tests/parity/requirements.lock
env=.parity/maxtext
stamp=$env/.made-from-$(sha256sum "$lock" | cut -c 1-16)

find_python() {
  local candidate
  for candidate in python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python; do
    # pyenv's shim is on PATH also where no 3.12 is chosen, and fails then
    if "$candidate" -c 'import sys; assert sys.version_info[:2] == (3, 12)' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "parity: no Python 3.12 found, neither on PATH nor under pyenv; MaxText 0.2.5 needs it" >&2
  return 1
}

if [[ ! -e $stamp ]]; then
  python=$(find_python)
  rm -rf "$env"
  "$python" -m venv "$env"
  # The lock is complete; without torch, which MaxText does not need for this.
  "$env/bin/pip" install -q --no-deps -r "$lock"
  touch "$stamp"
fi
exec .venv/bin/python -m pytest tests/parity -o addopts= -q --strict-markers --tb=short --timeout=5400 "$@"
