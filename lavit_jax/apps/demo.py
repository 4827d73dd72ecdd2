"""`lavit demo`: every task once, on held-out images, on the terminal and on one HTML page.

    python -m lavit_jax.apps.demo --make --source DATA     # writes new inputs

The inputs are a folder of PNGs with `manifest.json`:

    pictures  [{file, caption, question, answer}]   to caption, to ask about, to reconstruct
    texts     [{text, file}]                        to generate from; `file` is the held-out image
                                                    whose caption is the text
    mixed     [[part, ...]]                         to generate from; a part that names a file is an
                                                    image, any other part is a text
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import time
from typing import Any, NamedTuple

import numpy as np

from lavit_jax.apps.page import Figure, Page, Statement, show_kept_patches
from lavit_jax.data.images import read_images
from lavit_jax.errors import UserError
from lavit_jax.inference.outputs import VisualTokens
from lavit_jax.inference.pipeline import Lavit
from lavit_jax.output import encode_png, write_atomic, write_json

NUM_STEPS = 25  # DDIM; half of the published 50, with no visible difference at 64 pixels


class Log:
  """Prints lines with the seconds since the start."""

  def __init__(self):
    self.start = time.monotonic()

  def __call__(self, text: str) -> None:
    """Prints a line."""
    print(f'[{self.seconds():5.1f} s] {text}', flush=True)

  def seconds(self) -> float:
    """The seconds since the start."""
    return time.monotonic() - self.start


class Descriptions(NamedTuple):
  """What the model makes of the images of the manifest.

  Attributes:
    tokens: the visual tokens of each image.
    captions: a caption of each image.
    answers: the answer to the question about each image.
    reconstructions: uint8[B, S, S, 3], the images decoded from the tokens.
  """

  tokens: VisualTokens
  captions: list[str]
  answers: list[str]
  reconstructions: np.ndarray


class Generations(NamedTuple):
  """Images that the model generates.

  Attributes:
    codes: i32[n] for each prompt, the sampled visual tokens.
    images: uint8[B, S, S, 3], the images decoded from them.
  """

  codes: list[np.ndarray]
  images: np.ndarray


def run(
  model: Lavit, inputs: str | os.PathLike, out: str | os.PathLike, seed: int = 0
) -> pathlib.Path:
  """Runs every task on a folder of inputs.

  Args:
    model: the model.
    inputs: the folder with images and `manifest.json`.
    out: the folder of the page.
    seed: of all tasks.

  Returns:
    The page, `out`/index.html.

  Raises:
    UserError: the inputs or the checkpoint are missing or damaged; the page cannot be written.
  """
  inputs = pathlib.Path(inputs)
  manifest = read_manifest(inputs)
  log = Log()
  size = model.modules.image_size
  images = read_images([inputs / entry['file'] for entry in manifest['pictures']], size)
  expected = read_images([inputs / entry['file'] for entry in manifest['texts']], size)

  tokens = _tokenize(model, images, seed, log)
  captions, answers = _describe(model, images, manifest['pictures'], seed, log)
  prompts = [_resolve_parts(inputs, parts) for parts in manifest['mixed']]
  generated = _generate(model, manifest, prompts, seed, log)
  log('reconstruct')
  reconstructions = model.decode_images(tokens.ids, num_inference_steps=NUM_STEPS, seed=seed)

  page = Page()
  described = Descriptions(tokens, captions, answers, reconstructions)
  _add_descriptions(page, manifest['pictures'], images, described)
  num_texts = len(manifest['texts'])
  from_text = Generations(generated.codes[:num_texts], generated.images[:num_texts])
  from_parts = Generations(generated.codes[num_texts:], generated.images[num_texts:])
  _add_text_generations(page, manifest['texts'], expected, from_text)
  _add_mixed_generations(page, prompts, size, from_parts)
  summary = f'{len(images)} held-out images, seed {seed}, {log.seconds():.0f} s'
  path = write_atomic(
    pathlib.Path(out) / 'index.html', page.html(f'LaVIT {model.modules.variant}', summary)
  )
  log(f'wrote {path}')
  return path


def read_manifest(inputs: pathlib.Path) -> dict[str, Any]:
  """The manifest of a folder of inputs.

  Raises:
    UserError: it is missing or damaged; the message names the file.
  """
  path = inputs / 'manifest.json'
  remake = '`python -m lavit_jax.apps.demo --make`'
  try:
    manifest = json.loads(path.read_text())
    return {
      'pictures': [
        _texts(entry, 'file', 'caption', 'question', 'answer') for entry in manifest['pictures']
      ],
      'texts': [_texts(entry, 'text', 'file') for entry in manifest['texts']],
      'mixed': [list(map(str, parts)) for parts in manifest['mixed']],
    }
  except FileNotFoundError:
    raise UserError(f'{path} is missing; give --inputs a folder that {remake} wrote') from None
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(f'{path} is damaged ({error!r}); make it again by {remake}') from None


def _texts(entry: dict[str, Any], *keys: str) -> dict[str, str]:
  return {key: str(entry[key]) for key in keys}


def _resolve_parts(inputs: pathlib.Path, parts: list[str]) -> list[str | pathlib.Path]:
  """The parts of a prompt, those that name a file as paths."""
  resolved: list[str | pathlib.Path] = []
  for part in parts:
    path = inputs / part
    resolved.append(path if os.path.isfile(path) else part)
  return resolved


def _tokenize(model: Lavit, images: np.ndarray, seed: int, log: Log) -> VisualTokens:
  log(f'tokenize: {len(images)} images of {model.modules.num_patches} patches')
  tokens = model.tokenize(images, seed=seed)
  log(f'  kept {", ".join(map(str, tokens.counts))} patches')
  return tokens


def _describe(
  model: Lavit, images: np.ndarray, entries: list[dict[str, str]], seed: int, log: Log
) -> tuple[list[str], list[str]]:
  """Captions and answers."""
  log('caption')
  captions = model.caption(images, seed=seed)
  for entry, caption in zip(entries, captions, strict=True):
    log(f'  {caption!r}; it is {entry["caption"]!r}')
  log('answer')
  answers = model.answer(images, [entry['question'] for entry in entries], seed=seed)
  for entry, answer in zip(entries, answers, strict=True):
    log(f'  {entry["question"]} {answer!r}; it is {entry["answer"]!r}')
  return captions, answers


def _generate(
  model: Lavit, manifest: dict[str, Any], prompts: list[list[Any]], seed: int, log: Log
) -> Generations:
  """Generates from the texts of the manifest, then from its mixed prompts."""
  log('generate from text, from image and text, from image and image')
  texts = [entry['text'] for entry in manifest['texts']]
  codes = model.sample_codes([[text] for text in texts], guidance_scale=4.0, seed=seed)
  codes += model.sample_codes(prompts, guidance_scale=5.0, seed=seed)
  names = texts + [' + '.join(parts) for parts in manifest['mixed']]
  for name, ids in zip(names, codes, strict=True):
    log(f'  {name}: {len(ids)} tokens')
  return Generations(codes, model.decode_images(codes, num_inference_steps=NUM_STEPS, seed=seed))


def _add_descriptions(
  page: Page, entries: list[dict[str, str]], images: np.ndarray, described: Descriptions
) -> None:
  page.add_section(
    'Captions, answers and reconstructions',
    'An image; the patches that became visual tokens; the image reconstructed from these tokens '
    'alone; the caption and the answer of the model, and the true ones.',
  )
  for i, entry in enumerate(entries):
    kept = show_kept_patches(images[i], described.tokens.keep[i])
    page.add_card(
      [
        Figure(images[i], 'input'),
        Figure(kept, f'{described.tokens.counts[i]} tokens'),
        Figure(described.reconstructions[i], 'reconstructed'),
      ],
      [
        Statement('caption', described.captions[i], entry['caption']),
        Statement(entry['question'], described.answers[i], entry['answer']),
      ],
    )


def _add_text_generations(
  page: Page, entries: list[dict[str, str]], expected: np.ndarray, generated: Generations
) -> None:
  page.add_section(
    'Text to image',
    'Generated from the text alone, beside the held-out image that has this caption.',
  )
  for entry, codes, image, example in zip(
    entries, generated.codes, generated.images, expected, strict=True
  ):
    page.add_card(
      [Figure(image, f'generated, {len(codes)} tokens'), Figure(example, 'held-out')],
      [Statement('text', entry['text'])],
    )


def _add_mixed_generations(
  page: Page,
  prompts: list[list[str | pathlib.Path]],
  size: int,
  generated: Generations,
) -> None:
  page.add_section(
    'Images and text to image',
    'The prompt contains the visual tokens of its images; the last image is generated.',
  )
  for parts, codes, image in zip(prompts, generated.codes, generated.images, strict=True):
    figures = []
    statements = []
    for part in parts:
      if isinstance(part, str):
        statements.append(Statement('text', part))
      else:
        figures.append(Figure(read_images(part, size)[0], 'input'))
    figures.append(Figure(image, f'generated, {len(codes)} tokens'))
    page.add_card(figures, statements)


def make_inputs(source: str, out: str | os.PathLike, seed: int = 7) -> pathlib.Path:
  """Writes inputs from the held-out split of a data set.

  These are six images of one object and two scenes, four texts, and mixed prompts.

  Args:
    source: 'embedded' or the data_dir of the emoji data set.
    out: the folder to write.
    seed: of the images.

  Returns:
    The manifest.
  """
  from lavit_jax.data.emoji import corpus  # slow to import, and the demo does not need it

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
  return write_json(out / 'manifest.json', {'pictures': entries, 'texts': texts, 'mixed': mixed})


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
  print(make_inputs(arguments.source, arguments.out, arguments.seed))
