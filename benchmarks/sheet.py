"""Puts the images of the demo's page on one sheet: a row for each card, cards in columns.

python benchmarks/sheet.py demo_out/index.html --out lavit_jax/assets/demo/sheet.png
"""

import argparse
import base64
import io
import pathlib
import re

import numpy as np
from PIL import Image

COLUMNS = 2
GAP = 8  # pixels


def cards(page: str) -> list[list[np.ndarray]]:
  """The images uint8[H, W, 3] of each card of a page; cards as wide as the page are left out."""
  result = []
  for article in re.findall('<article>.*?</article>', page, re.DOTALL):
    images = []
    for data in re.findall('src="data:image/png;base64,([^"]+)"', article):
      image = Image.open(io.BytesIO(base64.b64decode(data)))
      images.append(np.asarray(image.convert('RGB')))
    result.append(images)
  return result


def sheet(cards: list[list[np.ndarray]]) -> np.ndarray:
  """All cards as one image uint8[H, W, 3]; cards with fewer images leave white space."""
  image_size = len(cards[0][0])
  pitch = image_size + GAP
  card_width = max(map(len, cards)) * pitch + 2 * GAP
  num_rows = -(-len(cards) // COLUMNS)
  out = np.full((num_rows * pitch + GAP, COLUMNS * card_width, 3), 255, np.uint8)
  for i, card in enumerate(cards):
    top = i // COLUMNS * pitch + GAP
    for j, image in enumerate(card):
      left = i % COLUMNS * card_width + GAP + j * pitch
      out[top : top + image_size, left : left + image_size] = image
  return out


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('page', type=pathlib.Path)
  parser.add_argument('--out', required=True)
  args = parser.parse_args()
  Image.fromarray(sheet(cards(args.page.read_text()))).save(args.out, optimize=True)
