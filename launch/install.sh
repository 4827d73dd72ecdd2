# shellcheck shell=bash
# Run or sourced by the other scripts: makes .venv in the repository root and installs this package with the named extras, at pinned versions.
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

# The stamp names what is installed, so that a second run starts at once and a changed pin installs again.
stamp=".venv/installed-$(cat setup.cfg launch/constraints.txt | cksum | cut -d' ' -f1)-${1//[^a-z]/_}"
if [ ! -e "$stamp" ]; then
  echo "installing lavit_jax$1 into .venv; this takes some minutes"
  [ -x .venv/bin/python ] || "$python" -m venv .venv || exit 1
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c launch/constraints.txt --editable ".$1" || exit 1
  touch "$stamp"
fi
