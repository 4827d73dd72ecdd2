"""Ten background colours a child could name, and the name of what colour a sprite mostly is."""

import numpy as np

BACKGROUNDS = {
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
JITTER = 10  # Each channel of a background moves by at most so much: colours stay clear, pictures do not repeat.


def name_pixels(rgb: np.ndarray) -> np.ndarray:
  """Colour names of pixels uint8[..., 3] by hue, saturation and value; str[...]."""
  rgb = rgb.astype(np.float32) / 255
  value, low = rgb.max(-1), rgb.min(-1)
  chroma = value - low
  red, green, blue = np.moveaxis(rgb, -1, 0)
  safe = np.where(chroma == 0, 1, chroma)
  hue = 60 * np.select(
    [value == red, value == green],
    [((green - blue) / safe) % 6, (blue - red) / safe + 2],
    (red - green) / safe + 4,
  )
  grey = (chroma < 0.12) | (chroma < 0.18 * value) | (value < 0.22)
  return np.select(
    [
      grey & (value > 0.82),
      grey & (value < 0.3),
      grey,
      (hue < 45) & (hue >= 8) & (value < 0.8),
      (hue < 15) & (value < 0.5),
      (hue >= 315) & (low > 0.42),
      (hue < 14) & (low > 0.4),
      (hue < 14) | (hue >= 338),
      hue < 38,
      hue < 66,
      hue < 170,
      hue < 255,
      hue < 300,
    ],
    [
      'white',
      'black',
      'gray',
      'brown',
      'brown',
      'pink',
      'pink',
      'red',
      'orange',
      'yellow',
      'green',
      'blue',
      'purple',
    ],
    'pink',
  )


def dominant(rgba: np.ndarray) -> str:
  """The colour of at least 60% of the ink of a sprite uint8[H, W, 4], or '' when none is so clear.

  Black counts only when it covers 40%: thinner, it is the outline that one of the styles draws around everything.
  """
  ink = name_pixels(rgba[rgba[..., 3] > 127][:, :3])
  names, counts = np.unique(ink, return_counts=True)
  share = dict(zip(names.tolist(), counts / max(1, len(ink))))
  if share.get('black', 0) < 0.4:
    share.pop('black', None)
  best = max(share, key=share.get, default='')
  return best if best and share[best] >= 0.6 * sum(share.values()) else ''
