"""`lavit demo`: every task once, on held-out pictures, told on the terminal and shown on one self-contained page.

    python -m lavit_jax.apps.demo --make --source DATA     # writes the inputs anew

The inputs are a folder of PNGs with `manifest.json`:

    pictures  [{file, caption, question, answer}]   to caption, to ask about, to tokenize and reconstruct
    texts     [{text, file}]                        to draw; `file` is the held-out picture that the text is the caption of
    mixed     [[part, ...]]                         to draw; a part that names a file is a picture, any other is words
"""

from __future__ import annotations

import argparse
import base64
import collections
import html
import json
import os
import pathlib
import time

import numpy as np

from lavit_jax.data.images import read_images
from lavit_jax.errors import UserError
from lavit_jax.inference.pipeline import Lavit
from lavit_jax.output import encode_png, write_atomic, write_json

STEPS = 25  # DDIM; half of the published 50, which at 64 pixels nobody can tell apart


def run(model: Lavit, inputs, out, seed: int = 0) -> pathlib.Path:
  """Runs every task on the pictures and prompts of the folder `inputs`; returns the page, `out`/index.html.

  Raises:
    UserError: the inputs or the checkpoint are missing or damaged; the page cannot be written.
  """
  inputs = pathlib.Path(inputs)
  manifest = read_manifest(inputs)
  clock = time.monotonic()

  def say(text):
    print(f'[{time.monotonic() - clock:5.1f} s] {text}', flush=True)

  size, rows = model.model.image_size, manifest['pictures']
  pictures = read_images([inputs / row['file'] for row in rows], size)
  expected = read_images([inputs / row['file'] for row in manifest['texts']], size)
  say(f'tokenize: {len(rows)} pictures of {model.model.num_patches} patches')
  tokens = model.tokenize(pictures, seed=seed)
  say(f'  kept {", ".join(map(str, tokens.counts))} patches')

  say('caption')
  captions = model.caption(pictures, seed=seed)
  for row, caption in zip(rows, captions):
    say(f'  {caption!r}; it is {row["caption"]!r}')

  say('answer')
  answers = model.answer(pictures, [row['question'] for row in rows], seed=seed)
  for row, answer in zip(rows, answers):
    say(f'  {row["question"]} {answer!r}; it is {row["answer"]!r}')

  say('draw from text, from picture and text, from picture and picture')
  texts = [[row['text']] for row in manifest['texts']]
  mixed = [
    [inputs / part if os.path.isfile(inputs / part) else part for part in parts]
    for parts in manifest['mixed']
  ]
  codes = model.sample_codes(texts, guidance=4.0, seed=seed) + model.sample_codes(
    mixed, guidance=5.0, seed=seed
  )
  for parts, ids in zip(manifest['texts'] + manifest['mixed'], codes):
    say(f'  {" + ".join(parts) if isinstance(parts, list) else parts["text"]}: {len(ids)} tokens')
  drawn = model.draw(codes, steps=STEPS, seed=seed)

  say('reconstruct')
  rebuilt = model.draw(tokens.ids, steps=STEPS, seed=seed)

  page = Page()
  page.section(
    'Pictures in words, and again from their tokens',
    'A picture; the patches that became visual tokens; the picture drawn again from these tokens alone; '
    'what the model says of it, and what is true.',
  )
  for i, row in enumerate(rows):
    page.card(
      [
        (pictures[i], 'input'),
        (show_kept(pictures[i], tokens.keep[i]), f'{tokens.counts[i]} tokens'),
        (rebuilt[i], 'reconstructed'),
      ],
      [('caption', captions[i], row['caption']), (row['question'], answers[i], row['answer'])],
    )
  page.section(
    'Words to pictures',
    'Drawn from the text alone, beside the held-out picture that has this caption.',
  )
  for row, ids, picture, such in zip(manifest['texts'], codes, drawn, expected):
    page.card(
      [(picture, f'drawn, {len(ids)} tokens'), (such, 'such as')], [('text', row['text'], None)]
    )
  page.section(
    'Pictures and words to pictures',
    'The prompt holds the visual tokens of its pictures; the last picture is drawn.',
  )
  for parts, names, ids, picture in zip(
    mixed, manifest['mixed'], codes[len(texts) :], drawn[len(texts) :]
  ):
    given = [(read_images(part, size)[0], 'input') for part in parts if not isinstance(part, str)]
    said = [('text', name, None) for part, name in zip(parts, names) if isinstance(part, str)]
    page.card([*given, (picture, f'drawn, {len(ids)} tokens')], said)
  path = write_atomic(
    pathlib.Path(out) / 'index.html',
    page.html(
      f'LaVIT {model.model.variant}',
      f'{len(rows)} held-out pictures, seed {seed}, {time.monotonic() - clock:.0f} s',
    ),
  )
  say(f'wrote {path}')
  return path


def read_manifest(inputs: pathlib.Path) -> dict:
  """The manifest of a folder of inputs. Raises UserError naming the file that is missing or damaged."""
  path = inputs / 'manifest.json'
  try:
    manifest = json.loads(path.read_text())
    return dict(
      pictures=[
        {key: str(row[key]) for key in ('file', 'caption', 'question', 'answer')}
        for row in manifest['pictures']
      ],
      texts=[{key: str(row[key]) for key in ('text', 'file')} for row in manifest['texts']],
      mixed=[[str(part) for part in parts] for parts in manifest['mixed']],
    )
  except FileNotFoundError:
    raise UserError(
      f'{path} is missing; give --inputs a folder that `python -m lavit_jax.apps.demo --make` wrote'
    ) from None
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(
      f'{path} is damaged ({error!r}); make it again by `python -m lavit_jax.apps.demo --make`'
    ) from None


def show_kept(image: np.ndarray, keep: np.ndarray) -> np.ndarray:
  """uint8[H, W, 3] and bool[N] -> the picture with its dropped patches bleached."""
  side = round(len(keep) ** 0.5)
  mask = (
    keep.reshape(side, side).repeat(len(image) // side, 0).repeat(len(image) // side, 1)[..., None]
  )
  return np.where(mask, image, 235 + image // 16)


class Page:
  """Collects sections of cards into one HTML page that needs no other file."""

  STYLE = """
    body { font: 15px/1.45 system-ui, sans-serif; color: #222; background: #fafafa; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
    h2 { margin: 2.5rem 0 .2rem } p, small { color: #666 } figure { margin: 0; text-align: center }
    section { display: grid; grid-template-columns: repeat(auto-fill, minmax(21rem, 1fr)); gap: 1rem }
    article { background: #fff; border: 1px solid #e4e4e4; border-radius: .6rem; padding: .8rem }
    article > div { display: flex; gap: .6rem; margin-bottom: .5rem } dl { margin: 0 } dt { color: #666; font-size: .85em } dd { margin: 0 }
    img { width: 96px; height: 96px; border-radius: .3rem; image-rendering: pixelated; border: 1px solid #eee }"""

  def __init__(self):
    self.parts = []

  def section(self, title: str, text: str):
    self.parts.append([f'<h2>{html.escape(title)}</h2><p>{html.escape(text)}</p>'])

  def card(self, pictures, said):
    """pictures: (uint8[H, W, 3], caption) pairs; said: (what, text, truth or None) triples."""
    figures = ''.join(
      f'<figure><img alt="{html.escape(text)}" src="data:image/png;base64,{base64.b64encode(encode_png(picture)).decode()}">'
      f'<figcaption><small>{html.escape(text)}</small></figcaption></figure>'
      for picture, text in pictures
    )
    lines = ''.join(
      f'<dt>{html.escape(what)}</dt><dd>{html.escape(text)}{f" <small>({html.escape(truth)})</small>" if truth is not None else ""}</dd>'
      for what, text, truth in said
    )
    self.parts[-1].append(f'<article><div>{figures}</div><dl>{lines}</dl></article>')

  def html(self, title: str, text: str) -> str:
    body = '\n'.join(
      f'{head}\n<section>\n' + '\n'.join(cards) + '\n</section>' for head, *cards in self.parts
    )
    return (
      f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title><style>{self.STYLE}</style>\n'
      f'<h1>{html.escape(title)}</h1><p>{html.escape(text)}</p>\n{body}\n</html>\n'
    )


def make(source: str, out, seed: int = 7) -> pathlib.Path:
  """Writes the inputs from the held-out split of a data set: six pictures of one thing and two scenes, texts, mixed prompts."""
  from lavit_jax.data.emoji import (
    corpus,  # here, because reading the data set takes seconds that the demo need not spend
  )

  out, asked = pathlib.Path(out), collections.Counter()
  single = corpus.examples(source, 'heldout', seed, 10, 'single')
  scenes = corpus.examples(source, 'heldout', seed, 2, 'scene')
  shown = single[:6] + scenes
  rows = []
  for i, example in enumerate(shown):
    kind, question, answer = min(
      example.questions, key=lambda each: asked[each[0]]
    )  # of every type once, before any comes again
    asked[kind] += 1
    rows.append(dict(file=f'{i:02}.png', caption=example.caption, question=question, answer=answer))
    write_atomic(out / rows[-1]['file'], encode_png(example.image))
  texts = []
  for i, example in enumerate(single[6:]):
    texts.append(dict(text=example.caption, file=f'text-{i}.png'))
    write_atomic(out / texts[-1]['file'], encode_png(example.image))
  mixed = [
    ['00.png', 'on a blue background'],
    ['01.png', 'on a yellow background'],
    ['02.png', '03.png'],
    ['04.png', '05.png'],
  ]
  return write_json(out / 'manifest.json', dict(pictures=rows, texts=texts, mixed=mixed))


if __name__ == '__main__':
  parser = argparse.ArgumentParser(
    description='Write the inputs of the demo from held-out examples.'
  )
  parser.add_argument('--make', action='store_true', required=True)
  parser.add_argument(
    '--source', default='embedded', help="'embedded' or the data_dir of the emoji data set"
  )
  parser.add_argument('--out', default='lavit_jax/assets/demo')
  parser.add_argument('--seed', type=int, default=7)
  arguments = parser.parse_args()
  print(make(arguments.source, arguments.out, arguments.seed))
