"""How far images are from the training sprite that is nearest to them, and whether it is theirs.

The limits of the words on the demo's page ('almost the same', 'similar') come from this table:

    python benchmarks/neighbors.py --source DATA --count 200
"""

import argparse
import pathlib
import tempfile

import numpy as np

from lavit_jax.apps.demo import make_inputs
from lavit_jax.apps.demo.neighbors import find_nearest, read_sprites
from lavit_jax.data.emoji import sprites
from lavit_jax.data.emoji.scenes import Composer

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
ROWS = (  # label, split, augmented
  ('training images', 'train', False),
  ('training images, turned and stretched', 'train', True),
  ('held-out pairs of emoji and style', 'heldout/pair', False),
  ('held-out concepts', 'heldout/concept', False),
  ('the held-out style', 'heldout/style', False),
)


def measure(source: str, count: int) -> None:
  """Prints the table."""
  loaded = sprites.load(source)
  with tempfile.TemporaryDirectory() as folder:
    make_inputs(source, folder)
    trained = read_sprites(pathlib.Path(folder))
  assert trained is not None
  header = ' '.join(f'{f"{q:.0%}":>6}' for q in QUANTILES)
  print(f'{"images of one emoji":40} {"very sprite":>11} {"its name":>8}  distance at {header}')
  for label, split, augment in ROWS:
    composer = Composer(loaded, split, scene_share=0, augment=augment)
    sprite_hits = 0
    name_hits = 0
    distances = []
    for index in range(count):
      example = composer(3, index)
      nearest = find_nearest(example.image, trained)
      if nearest is None:
        continue
      name = example.facts.objects[0].name
      name_hits += nearest.name == name
      sprite_hits += (nearest.name, nearest.style) == (name, example.facts.style)
      distances.append(nearest.distance)
    values = ' '.join(f'{value:6.3f}' for value in np.quantile(distances, QUANTILES))
    print(f'{label:40} {sprite_hits / count:11.1%} {name_hits / count:8.1%}              {values}')


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
  parser.add_argument('--source', required=True, help='data_dir of the emoji data set')
  parser.add_argument('--count', type=int, default=200, help='of images in each row')
  arguments = parser.parse_args()
  measure(arguments.source, arguments.count)
