"""A model that answers with its inputs, and commands on many inputs that use it."""

import json
import types

import numpy as np

from lavit_jax import cli
from lavit_jax.errors import InputError
from lavit_jax.inference.outputs import DecodedImages, VisualTokens


class Stub:
  """A model that answers with its inputs: an image's first pixel, the text, the index of the row.

  It counts its calls. An image generated from a text with 'bad' is flagged.
  """

  modules = types.SimpleNamespace(image_size=8, num_patches=4)

  def __init__(self):
    self.calls = 0

  def caption(self, images, seed):
    self.calls += 1
    return [f'{image[0, 0, 0]} at {index}' for image, index in zip(images, seed.rows, strict=True)]

  def tokenize(self, images, seed):
    codes = [np.full(2, image[0, 0, 0], np.int32) for image in images]
    keep = np.tile([False, True, False, True], (len(images), 1))
    return VisualTokens(codes, keep, keep.sum(1))

  def answer(self, images, questions, seed):
    if 'bad' in questions:
      raise InputError('the text is bad')
    return [f'{image[0, 0, 0]} {text}' for image, text in zip(images, questions, strict=True)]

  def generate_outputs(self, prompts, seed, guidance_scale, **options):
    self.calls += 1
    images = []
    for text, index in zip(prompts, seed.rows, strict=True):
      color = [index, len(text), guidance_scale + seed.seed]
      images.append(np.full((8, 8, 3), color, np.uint8))
    return decoded(images, ['bad' in text for text in prompts])

  def synthesize_outputs(self, prompts, seed, **options):
    self.seen = prompts
    return decoded([np.full((8, 8, 3), index, np.uint8) for index in seed.rows])

  def reconstruct_outputs(self, images, seed, guidance_scale, **options):
    return decoded(images)


def decoded(images, flagged=None):
  return DecodedImages(np.stack(images), np.array(flagged or [False] * len(images)))


def lavit(*arguments):
  return cli.main([str(argument) for argument in arguments])


def lines(text):
  return [json.loads(line) for line in text.splitlines()]
