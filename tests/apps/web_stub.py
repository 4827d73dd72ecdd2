"""A model that answers with its inputs, for tests of the page."""

import pathlib
import time
import types

import numpy as np

import lavit_jax
from lavit_jax.inference.generation_config import VariantDefaults
from lavit_jax.inference.outputs import DecodedImages, VisualTokens
from lavit_jax.models.noise_schedule import Scheduler

ASSETS = pathlib.Path(lavit_jax.__file__).parent / 'assets'
IMAGE = str(ASSETS / 'demo' / '01.png')
KEEP = np.arange(64) % 3 == 0
IDS = np.arange(KEEP.sum()) * 7 % 50


class Params(dict):
  """Parameter trees by module."""

  scheduler = staticmethod(lambda prefix: Scheduler())


class Stub:
  """A model that answers with its inputs, and counts simultaneous calls."""

  modules = types.SimpleNamespace(
    image_size=64,
    variant='stub',
    vocabulary=types.SimpleNamespace(codebook_size=50),
    tokenizer=types.SimpleNamespace(
      apply=lambda variables, codes, method: np.random.default_rng(0).normal(size=(50, 8))
    ),
  )
  params = Params(codebook={})
  defaults = VariantDefaults()

  def __init__(self):
    self.running = 0
    self.max_running = 0
    self.seen = []

  def tokenize(self, images, seed):
    return VisualTokens(
      [IDS] * len(images), np.tile(KEEP, (len(images), 1)), np.full(len(images), KEEP.sum())
    )

  def caption(self, images):
    self.running += 1
    self.max_running = max(self.max_running, self.running)
    time.sleep(0.3)
    self.running -= 1
    return [f'red {image[0, 0, 0]}' for image in images]

  def answer(self, images, questions):
    if questions == ['fail']:
      raise ZeroDivisionError('in /home/me/secret.py')
    return [f'{text} <b>' for text in questions]

  def sample_codes(self, prompts, guidance_scale, seed):
    self.seen.append((prompts, guidance_scale, seed))
    return [IDS[:5]]

  def decode_image_outputs(self, codes, num_inference_steps, seed, size):
    self.size = size
    return DecodedImages(
      np.full((len(codes), 64, 64, 3), num_inference_steps, np.uint8),
      np.array([num_inference_steps == 66] * len(codes)),
    )

  def reconstruct_outputs(self, images, guidance_scale, num_inference_steps, seed, size):
    return DecodedImages(np.stack(images), np.array([num_inference_steps == 66]))


def upload(tmp_path, data):
  path = tmp_path / 'upload.png'
  path.write_bytes(data)
  return str(path)
