"""Color names: those of ten backgrounds, of pixels, and of a whole sprite."""

import numpy as np

BACKGROUNDS = {  # RGB
  'white': (245, 245, 245),
  'black': (18, 18, 20),
  'gray': (135, 138, 142),
  'red': (222, 40, 48),
  'orange': (245, 140, 30),
  'yellow': (245, 215, 50),
  'green': (50, 170, 75),
  'blue': (45, 105, 225),
  'purple': (130, 60, 180),
  'pink': (245, 150, 195),
}
# The most that each channel of a background is changed: colors stay clear, but no two images have
# exactly the same one.
JITTER = 10

_MIN_BLACK_SHARE = 0.4  # of the ink; thinner, black is the outline that one style draws everywhere
_MIN_SHARE = 0.6  # of the ink without outlines


def name_pixels(rgb: np.ndarray) -> np.ndarray:
  """Names the colors of pixels by hue, saturation and value.

  Args:
    rgb: uint8[..., 3].

  Returns:
    str[...], each 'brown' or one of `BACKGROUNDS`.
  """
  rgb = rgb.astype(np.float32) / 255
  value = rgb.max(-1)
  low = rgb.min(-1)
  chroma = value - low
  red, green, blue = np.moveaxis(rgb, -1, 0)
  safe_chroma = np.where(chroma == 0, 1, chroma)
  hue = 60 * np.select(
    [value == red, value == green],
    [((green - blue) / safe_chroma) % 6, (blue - red) / safe_chroma + 2],
    (red - green) / safe_chroma + 4,
  )
  gray = (chroma < 0.12) | (chroma < 0.18 * value) | (value < 0.22)
  rules = [  # the first that holds gives the name
    ('white', gray & (value > 0.82)),
    ('black', gray & (value < 0.3)),
    ('gray', gray),
    ('brown', (hue < 45) & (hue >= 8) & (value < 0.8)),
    ('brown', (hue < 15) & (value < 0.5)),
    ('pink', (hue >= 315) & (low > 0.42)),
    ('pink', (hue < 14) & (low > 0.4)),
    ('red', (hue < 14) | (hue >= 338)),
    ('orange', hue < 38),
    ('yellow', hue < 66),
    ('green', hue < 170),
    ('blue', hue < 255),
    ('purple', hue < 300),
  ]
  return np.select([mask for _, mask in rules], [name for name, _ in rules], 'pink')


def dominant_color(rgba: np.ndarray) -> str:
  """Names the color of at least 60% of the ink of a sprite.

  Black counts only if it covers 40% of the ink, because one style outlines everything in black.

  Args:
    rgba: uint8[H, W, 4]; the ink is where alpha is above one half.

  Returns:
    The name, or '' if no color dominates.
  """
  ink = name_pixels(rgba[rgba[..., 3] > 127][:, :3])
  names, counts = np.unique(ink, return_counts=True)
  shares = dict(zip(names.tolist(), counts / max(1, len(ink)), strict=True))
  if shares.get('black', 0) < _MIN_BLACK_SHARE:
    shares.pop('black', None)
  if not shares:
    return ''
  best = max(shares, key=lambda name: shares[name])
  return best if shares[best] >= _MIN_SHARE * sum(shares.values()) else ''
