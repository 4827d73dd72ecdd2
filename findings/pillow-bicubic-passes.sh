#!/usr/bin/env bash
# Pillow 12.3.0 and jax 0.10.2, with numpy 2.4.6, Python 3.11.
#
# Expected: two bicubic resizes with the same kernel (Keys, a = -1/2, widened to shrink) differ by one
#   level at most, by rounding.
# Behaviour: Pillow rounds and clips to 8 bits after its first pass, jax.image.resize does not. At hard
#   edges, where a cubic overshoots below 0 and above 255, enlarged images differ by tens of levels.
#   A computation in float64 gives the one with bytes between the passes, the other without.
# Output seen:
#   (24, 20) -> 77: Pillow and JAX differ by up to 24 levels
#   Pillow and float64 with bytes between the passes: 0
#   JAX and float64 without: 1
#
# Exits with another status than 0 when this is no longer so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q pillow==12.3.0 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'EOF'
import jax
import numpy as np
from PIL import Image


def weights(length, new_length):
  scale = length / new_length
  middle = (np.arange(new_length)[:, None] + 0.5) * scale
  x = np.abs(np.arange(length) + 0.5 - middle) / max(scale, 1)
  near, far = (1.5 * x - 2.5) * x**2 + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
  rows = np.where(x < 1, near, np.where(x < 2, far, 0))
  return rows / rows.sum(1, keepdims=True)


def rounded(x):
  return np.floor(np.clip(x, 0, 255) + 0.5)


def bicubic(image, size, between):
  x = np.einsum('hwc,nw->hnc', image.astype(np.float64), weights(image.shape[1], size))
  x = rounded(x) if between else x
  return rounded(np.einsum('hwc,nh->nwc', x, weights(image.shape[0], size)))


width, height, size = 24, 20, 77
x, y = np.meshgrid(np.arange(width), np.arange(height))
blocks = np.stack([x // 5 + y // 3, x // 2 + y // 7, x // 11 + y // 4], -1) % 2
image = (255 * blocks).astype(np.uint8)
pillow = np.float64(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
device = rounded(np.float64(jax.image.resize(image.astype(np.float32), (size, size, 3), 'cubic')))
apart = np.abs(pillow - device).max()
first = np.abs(pillow - bicubic(image, size, True)).max()
second = np.abs(device - bicubic(image, size, False)).max()
print(f'{width, height} -> {size}: Pillow and JAX differ by up to {apart:.0f} levels')
print(f'Pillow and float64 with bytes between the passes: {first:.0f}')
print(f'JAX and float64 without: {second:.0f}')
assert apart > 10 and first <= 1 and second <= 1
EOF
