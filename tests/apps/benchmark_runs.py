"""A model that knows its texts for miniatures, and commands that use it."""

import json
import types

import miniatures
import numpy as np
from batch_runs import decoded, lavit


class Model:
  """Captions and answers by the gray level of the image, and keeps what it was asked.

  Attributes:
    calls: the number of batches.
    asked: index of the record -> the question.
    rows: index of the record -> the row of its random key.
    options: of the last call.
    prompts: those that it generates images of.
  """

  modules = types.SimpleNamespace(
    image_size=8, variant='stub', llama=types.SimpleNamespace(dtype='float32')
  )

  def __init__(self):
    self.calls = 0
    self.asked = {}
    self.rows = {}
    self.options = {}
    self.prompts = list(miniatures.PROMPTS)

  def answer(self, images, questions, seed, **options):
    indices = self._note(images, seed, options)
    self.asked |= dict(zip(indices, questions, strict=True))
    return [miniatures.QUESTIONS[index][1] for index in indices]

  def caption(self, images, seed, **options):
    indices = self._note(images, seed, options)
    return [miniatures.CAPTIONS[index][0] for index in indices]

  def generate_outputs(self, prompts, seed, **options):
    self.calls += 1
    self.options = options
    colors = []
    for prompt, row in zip(prompts, seed.rows, strict=True):
      colors.append((row, self.prompts.index(prompt), 0))
    return decoded([np.full((8, 8, 3), color, np.uint8) for color in colors])

  def _note(self, images, seed, options):
    self.calls += 1
    self.options = options
    indices = [round(image.mean() / 10) for image in images]
    self.rows |= dict(zip(indices, seed.rows, strict=True))
    return indices


def evaluate(root, name, *arguments, out='out', miniature=None):
  """Runs `lavit evaluate` on the miniature in root/data, made if missing; returns the status."""
  (root / 'checkpoint').mkdir(exist_ok=True)
  if not (root / 'checkpoint' / 'weights').exists():
    (root / 'checkpoint' / 'weights').write_text('1')
  data = root / 'data'
  if not data.exists():
    getattr(miniatures, miniature or name.replace('-', '_'))(data)
  command = ['evaluate', '--benchmark', name, '--data', data]
  if name != 'geneval':
    command += ['--images', data / 'images']
  command += ['--folder', root / 'checkpoint', '--out', root / out]
  return lavit(*command, *arguments)


def read(path):
  return json.loads(path.read_text())
