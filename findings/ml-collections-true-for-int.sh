#!/usr/bin/env bash
# ml_collections 1.1.0, with numpy 2.4.6, Python 3.11.
#
# Expected: a ConfigDict whose fields keep their types refuses True for an int, as it refuses 'a' and 1.5.
# Behaviour: it takes True, after which the type of the field is bool and integers are refused. An integer
#   of numpy, on the other hand, is refused for an int.
# Output seen:
#   steps = 1.5: TypeError
#   steps = np.int64(7): TypeError
#   steps = True: taken, the type is bool
#   steps = 100: TypeError
#
# Exits with another status than 0 when this is no longer so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q ml_collections==1.1.0 numpy==2.4.6
"$work/venv/bin/python" - <<'EOF'
import numpy as np
from ml_collections import ConfigDict

config = ConfigDict({'steps': 100})


def assign(text, value):
  try:
    config.steps = value
  except TypeError:
    print(f'steps = {text}: TypeError')
    return 'refused'
  print(f'steps = {text}: taken, the type is {config.get_type("steps").__name__}')
  return config.get_type('steps')


assert assign('1.5', 1.5) == 'refused'
assert assign('np.int64(7)', np.int64(7)) == 'refused'
assert assign('True', True) is bool
assert assign('100', 100) == 'refused'
EOF
