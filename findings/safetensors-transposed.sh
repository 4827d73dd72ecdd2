#!/usr/bin/env bash
# safetensors 0.8.0, with numpy 2.4.6, Python 3.11.
#
# Expected: save_file of a transposed array either writes what numpy shows, or refuses it (as
#   safetensors.torch.save_file refuses a tensor that is not contiguous).
# Behaviour: it writes the memory as it lies, under the shape of the transposed array. What is loaded has
#   the right shape and type, and other numbers. 0.7.0 wrote the right ones.
# Output seen:
#   0.8.0 saved  [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
#   0.8.0 loaded [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
#   0.7.0 loaded [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
#
# Exits with another status than 0 when this is no longer so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
cat > "$work/look.py" <<'EOF'
import sys
import numpy as np
import safetensors
from safetensors.numpy import load_file, save_file

saved = np.arange(6, dtype=np.float32).reshape(2, 3).T
save_file({'x': saved}, sys.argv[1])
loaded = load_file(sys.argv[1])['x']
version = safetensors.__version__
if version == '0.8.0':
  print(version, 'saved ', saved.tolist())
print(version, 'loaded', loaded.tolist())
assert loaded.shape == saved.shape and loaded.dtype == saved.dtype
assert (loaded == saved).all() == (version == '0.7.0')
EOF
for version in 0.8.0 0.7.0; do
  "$work/venv/bin/pip" install -q "safetensors==$version" numpy==2.4.6
  "$work/venv/bin/python" "$work/look.py" "$work/x.safetensors"
done
