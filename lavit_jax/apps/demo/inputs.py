"""The inputs of the demo: a folder of PNGs with `manifest.json`.

    pictures  [{file, caption, question, answer}]   to caption, to ask about, to reconstruct
    texts     [{text, file}]                        to generate from; `file` is the held-out image
                                                    whose caption is the text
    mixed     [[part, ...]]                         to generate from; a part that names a file is an
                                                    image, any other part is a text
    series    [{text, images: [{label, file}]}]     images of the same thing, from nothing to much
                                                    of it, whose tokens are counted (optional)

`sprites.png` and `sprites.json`, which are optional too, have all training sprites (neighbors.py).
"""

from __future__ import annotations

import collections
import json
import os
import pathlib
from typing import TYPE_CHECKING, Any

from lavit_jax.apps.demo import neighbors
from lavit_jax.errors import UserError
from lavit_jax.output import encode_png, write_atomic, write_json

if TYPE_CHECKING:
  from lavit_jax.data.emoji.scenes import Composer

_REMAKE = '`python -m lavit_jax.apps.demo --make`'
_NUM_SERIES = 2
# The images of a series: label, and (left, top, side) of each emoji on a canvas of 64 x 64 units.
_SERIES = (
  ('plain background', ()),
  ('one, small', ((24, 24, 16),)),
  ('one', ((17, 17, 30),)),
  ('two', ((1, 17, 30), (33, 17, 30))),
  ('four', ((1, 1, 30), (33, 1, 30), (1, 33, 30), (33, 33, 30))),
  ('one, large', ((2, 2, 60),)),
)


def read_manifest(inputs: pathlib.Path) -> dict[str, Any]:
  """The manifest of a folder of inputs.

  Raises:
    UserError: it is missing or damaged; the message names the file.
  """
  path = inputs / 'manifest.json'
  try:
    manifest = json.loads(path.read_text())
    return {
      'pictures': [
        _texts(entry, 'file', 'caption', 'question', 'answer') for entry in manifest['pictures']
      ],
      'texts': [_texts(entry, 'text', 'file') for entry in manifest['texts']],
      'mixed': [list(map(str, parts)) for parts in manifest['mixed']],
      'series': [_read_series(entry) for entry in manifest.get('series', [])],
    }
  except FileNotFoundError:
    raise UserError(f'{path} is missing; give --inputs a folder that {_REMAKE} wrote') from None
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f'{path} is damaged ({error!r}); make it again by {_REMAKE}') from None


def _read_series(entry: dict[str, Any]) -> dict[str, Any]:
  images = [_texts(image, 'label', 'file') for image in entry['images']]
  return {'text': str(entry['text']), 'images': images}


def _texts(entry: dict[str, Any], *keys: str) -> dict[str, str]:
  return {key: str(entry[key]) for key in keys}


def resolve_parts(inputs: pathlib.Path, parts: list[str]) -> list[str | pathlib.Path]:
  """Returns the parts of a prompt, those that name a file as paths."""
  resolved: list[str | pathlib.Path] = []
  for part in parts:
    path = inputs / part
    resolved.append(path if os.path.isfile(path) else part)
  return resolved


def make_inputs(source: str, out: str | os.PathLike, seed: int = 7) -> pathlib.Path:
  """Writes inputs from the held-out split of a data set.

  These are six images of one object and two scenes, four texts, mixed prompts, two series of
  images to count tokens of, and thumbnails of all training sprites.

  Args:
    source: 'embedded' or the data_dir of the emoji data set.
    out: the folder to write.
    seed: of the images.

  Returns:
    The manifest.
  """
  from lavit_jax.data.emoji import corpus, sprites  # slow to import, and not needed by the demo
  from lavit_jax.data.emoji.scenes import Composer

  out = pathlib.Path(out)
  single = corpus.examples(source, 'heldout', seed, 10, 'single')
  scenes = corpus.examples(source, 'heldout', seed, 2, 'scene')
  entries = []
  uses: collections.Counter[str] = collections.Counter()  # of each type of question
  for i, example in enumerate(single[:6] + scenes):
    kind, question, answer = min(example.questions, key=lambda item: uses[item[0]])
    uses[kind] += 1
    file = f'{i:02}.png'
    write_atomic(out / file, encode_png(example.image))
    entries.append(
      {'file': file, 'caption': example.caption, 'question': question, 'answer': answer}
    )
  texts = []
  for i, example in enumerate(single[6:]):
    file = f'text-{i}.png'
    write_atomic(out / file, encode_png(example.image))
    texts.append({'text': example.caption, 'file': file})
  mixed = [
    ['00.png', 'on a blue background'],
    ['01.png', 'on a yellow background'],
    ['02.png', '03.png'],
    ['04.png', '05.png'],
  ]
  composer = Composer(sprites.load(source), 'heldout', scene_share=0)
  series = []
  for i in range(_NUM_SERIES):
    series.append(_make_series(composer, seed, len(single) + i, out, f'series-{i}'))
  _write_sprites(composer, out)
  manifest = {'pictures': entries, 'texts': texts, 'mixed': mixed, 'series': series}
  return write_json(out / 'manifest.json', manifest)


def _make_series(
  composer: Composer, seed: int, index: int, out: pathlib.Path, name: str
) -> dict[str, Any]:
  """Writes images of the emoji and the background of one example."""
  facts = composer(seed, index).facts
  emoji = facts.objects[0]
  images = []
  for number, (label, boxes) in enumerate(_SERIES):
    objects = (emoji._replace(boxes=boxes),) if boxes else ()
    image = composer.draw(facts._replace(objects=objects))
    file = f'{name}-{number}.png'
    write_atomic(out / file, encode_png(image))
    images.append({'label': label, 'file': file})
  return {'text': f'{emoji.name}, {facts.style} style', 'images': images}


def _write_sprites(composer: Composer, out: pathlib.Path) -> None:
  """Writes the thumbnails of all training sprites, in the order of their styles."""
  from lavit_jax.data.emoji.dataset import LICENCES

  metadata = composer.sprites.metadata
  # Thumbnails of one style compress better together.
  trained = sorted(composer.trained_sprites, key=lambda index: metadata[index].style)
  names = [[metadata[index].name, metadata[index].style] for index in trained]
  licences = {style: LICENCES[style] for _, style in names}
  neighbors.write_sprites(out, composer.sprites.pixels[trained], names, licences)
