# shellcheck shell=bash
# The other scripts run or source this. It makes .venv in the repository root and installs this package with extras, at pinned versions.
# usage: source launch/install.sh EXTRAS   (e.g. '' or '[test,torch]')
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

for python in "${PYTHON:-}" python3.11 python3 python; do
  [ -n "$python" ] && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
  python=
done
if [ -z "$python" ]; then
  echo "lavit: error: Python 3.11 or newer is needed; install it, or set PYTHON to its path" >&2
  exit 2
fi

# The stamp names what is installed: a second run starts at once, and a changed pin installs again.
stamp=".venv/installed-$(cat setup.cfg launch/constraints.txt | cksum | cut -d' ' -f1)-${1//[^a-z]/_}"
if [ ! -e "$stamp" ]; then
  echo "installing lavit_jax$1 into .venv; this takes some minutes"
  trap 'kill -TERM -- "-${!:-}" 2>/dev/null && wait "$!"; exit 143' INT TERM HUP
  set -m # a process group of its own, so that a signal to this shell ends all its children
  (
    trap 'exit 143' TERM # runs when the current command has ended
    if [ ! -e .venv/bin/pip ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then # pip's script is the last file of a new .venv
      "$python" -m venv --clear .venv || {
        echo "lavit: error: $python could not make .venv; if it has no ensurepip, on Debian and Ubuntu:" \
          "apt install $("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')" >&2
        exit 2
      }
    fi
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c launch/constraints.txt --editable ".$1" || exit 1
    touch "$stamp"
  ) </dev/null &
  set +m
  wait "$!" || exit
fi
