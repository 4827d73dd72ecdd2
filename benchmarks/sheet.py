"""Puts the pictures of the demo's page on one sheet for the README: a row of it for each card, cards side by side in columns.

python benchmarks/sheet.py demo_out/index.html --out lavit_jax/assets/demo/sheet.png
"""

import argparse
import base64
import io
import pathlib
import re

import numpy as np
from PIL import Image

COLUMNS, GAP = 2, 8


def cards(page: str) -> list[list[np.ndarray]]:
  """The pictures uint8[H, W, 3] of each card."""
  found = []
  for article in re.findall('<article>.*?</article>', page, re.DOTALL):
    data = re.findall('src="data:image/png;base64,([^"]+)"', article)
    found.append(
      [np.asarray(Image.open(io.BytesIO(base64.b64decode(each))).convert('RGB')) for each in data]
    )
  return found


def sheet(cards: list[list[np.ndarray]]) -> np.ndarray:
  """One picture; cards that hold fewer pictures leave white behind them."""
  side, widest = len(cards[0][0]) + GAP, max(map(len, cards))
  rows = -(-len(cards) // COLUMNS)
  out = np.full((rows * side + GAP, COLUMNS * (widest * side + 2 * GAP), 3), 255, np.uint8)
  for i, card in enumerate(cards):
    for j, picture in enumerate(card):
      top, left = (
        i // COLUMNS * side + GAP,
        i % COLUMNS * (widest * side + 2 * GAP) + GAP + j * side,
      )
      out[top : top + side - GAP, left : left + side - GAP] = picture
  return out


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('page', type=pathlib.Path)
  parser.add_argument('--out', required=True)
  args = parser.parse_args()
  Image.fromarray(sheet(cards(args.page.read_text()))).save(args.out, optimize=True)
