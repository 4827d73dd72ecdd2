"""Codes or vectors to images: a user's options are checked, and they are decoded in batches.

The compiled programs are `image_decoder.decode_images` and `decode_vectors`.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np
from jax import Array

from lavit_jax.data.images import as_image_list, read_images
from lavit_jax.errors import UserError
from lavit_jax.inference import faults, image_decoder
from lavit_jax.inference.generation_config import (
  POSITIVE_INTEGER,
  Limit,
  SamplingOptions,
  VariantDefaults,
  check_value,
)
from lavit_jax.inference.image_decoder import HIGHRES, LOWRES, DecodingConfig, ImageDecoderConfig
from lavit_jax.inference.outputs import DecodedImages
from lavit_jax.inference.runner import ModelRunner
from lavit_jax.models import sampler_plans
from lavit_jax.models.noise_schedule import Scheduler

LOG = logging.getLogger(__name__)
TILE_SIZE = 1024  # pixels; of the VAE's tiles for images above a megapixel, as in diffusers

GUIDANCE_LIMIT = Limit(float, 'a number from 0 up', lambda x: x >= 0, optional=True)
_LIMITS = {
  'num_inference_steps': POSITIVE_INTEGER._replace(optional=True),
  'guidance_rescale': Limit(float, 'a number in 0..1', lambda x: 0 <= x <= 1),
  'strength': Limit(
    float,
    'a number above 0 and at most 1, which keeps almost nothing of the initial image',
    lambda x: 0 < x <= 1,
  ),
  'vae_tile_size': Limit(
    int, 'a whole number of pixels from 64 up', lambda x: x >= 64, optional=True
  ),
}


class DecodingOptions(TypedDict, total=False):
  """Keywords of `Lavit.decode_images`, except for the seed and the guidance scale."""

  size: tuple[int, int] | None
  num_inference_steps: int | None
  sampler: str
  guidance_rescale: float
  init_images: Any
  strength: float
  vae_tile_size: int | None


class ImageGenerationOptions(SamplingOptions, DecodingOptions, total=False):
  """The options of the language model and of the image decoder."""


class ImageRequest(NamedTuple):
  """How images are decoded, with every default filled in.

  Attributes:
    init_images: uint8[B, H, W, 3] to start from, or None.
    guidance_scale: of the U-Net.
    config: everything else.
  """

  init_images: np.ndarray | None
  guidance_scale: float
  config: DecodingConfig


def resolve_image_request(
  count: int,
  defaults: VariantDefaults,
  available: Container[str],
  schedulers: Callable[[str], Scheduler] = lambda prefix: Scheduler(),
  square: ImageDecoderConfig = LOWRES,
  *,
  size: tuple[int, int] | None = None,
  guidance_scale: float | None = None,
  num_inference_steps: int | None = None,
  sampler: str = 'ddim',
  guidance_rescale: float = 0.0,
  init_images: Any = None,
  strength: float = 0.8,
  vae_tile_size: int | None = None,
) -> ImageRequest:
  """Checks the options of a user, before a language model runs for minutes.

  Args:
    count: number of images.
    defaults: of the variant.
    available: names of the modules that the checkpoint has.
    schedulers: prefix of a decoder -> how its U-Net was trained.
    square: the decoder of images of the variant's own size; VECTORS decodes no other.
    size: this and the following: see `Lavit.decode_images`.
    guidance_scale: of the U-Net.
    num_inference_steps: denoising steps.
    sampler: of the denoising.
    guidance_rescale: share of rescaled guidance.
    init_images: to start from.
    strength: of the change to `init_images`.
    vae_tile_size: in pixels.

  Raises:
    UserError: an unknown size, one whose modules are missing, or a value that is not allowed.
  """
  guidance_scale = check_value('guidance_scale', guidance_scale, GUIDANCE_LIMIT)
  num_inference_steps = check_value(
    'num_inference_steps', num_inference_steps, _LIMITS['num_inference_steps']
  )
  guidance_rescale = check_value('guidance_rescale', guidance_rescale, _LIMITS['guidance_rescale'])
  strength = check_value('strength', strength, _LIMITS['strength'])
  vae_tile_size = check_value('vae_tile_size', vae_tile_size, _LIMITS['vae_tile_size'])
  checked_size = _resolve_size(size, defaults)
  decoder = HIGHRES
  if checked_size == (defaults.output_size, defaults.output_size):
    decoder = square
  elif square.of_vectors:
    side = defaults.output_size
    raise UserError(
      f'{_format_size(checked_size)} is decoded from codes, and this model draws vectors; choose '
      f'{_format_size((side, side))}'
    )
  missing = [name for name in decoder.modules if name not in available]
  if decoder is HIGHRES and missing:
    side = defaults.output_size
    raise UserError(
      f'{_format_size(checked_size)} needs {", ".join(missing)}, which this checkpoint does not '
      f'have; choose {_format_size((side, side))}, or a checkpoint with highres_pixel_decoding and '
      'highres_tokenizer_decoder'
    )
  if vae_tile_size is None and math.prod(checked_size) > image_decoder.MAX_PIXELS:
    vae_tile_size = TILE_SIZE
  config = DecodingConfig(
    decoder=decoder,
    size=checked_size,
    num_inference_steps=num_inference_steps or decoder.num_inference_steps,
    sampler=sampler,
    guidance_rescale=guidance_rescale,
    strength=1.0 if init_images is None else strength,
    vae_tile_size=vae_tile_size,
    scheduler=schedulers(decoder.prefix),
  )
  _check_plan(config)
  return ImageRequest(
    init_images=None if init_images is None else _read_init_images(init_images, count, config.size),
    guidance_scale=decoder.guidance_scale if guidance_scale is None else guidance_scale,
    config=config,
  )


def decode_codes(
  runner: ModelRunner,
  codes: Sequence[np.ndarray],
  keys: Array,
  request: ImageRequest,
) -> DecodedImages:
  """Decodes the codes of B images; see `Lavit.decode_image_outputs`.

  Args:
    runner: the model.
    codes: i32[n] for each image, n <= N.
    keys: keys[B] of the initial noise.
    request: how the images are decoded.

  Raises:
    UserError: the codes are out of range.
    NotFinite: NaN or infinity came out of a module.
  """
  return _decode(runner, image_decoder.decode_images, runner.pad_codes(codes), keys, request)


def decode_vectors(
  runner: ModelRunner,
  vectors: np.ndarray,
  null_vectors: np.ndarray,
  keys: Array,
  request: ImageRequest,
) -> DecodedImages:
  """Decodes the vectors of B images.

  Args:
    runner: the model.
    vectors: f32[B, n, H], of an interface.
    null_vectors: f32[n, H], from which guidance leads away.
    keys: keys[B] of the initial noise.
    request: how the images are decoded.

  Raises:
    NotFinite: NaN or infinity came out of a module.
  """
  program = image_decoder.decode_vectors
  return _decode(runner, program, (vectors,), keys, request, null_vectors=null_vectors)


def _decode(
  runner: ModelRunner,
  program: Callable[..., Any],
  rows: Sequence[np.ndarray],
  keys: Array,
  request: ImageRequest,
  **kwargs: Any,
) -> DecodedImages:
  """Runs a program of `image_decoder` on arrays [B, ...] with further arguments."""
  if not len(rows[0]):
    return DecodedImages(np.zeros((0, *request.config.size, 3), np.uint8), np.zeros(0, bool))
  decoder = request.config.decoder
  checked = runner.run_batches(
    program,
    decoder.modules + _safety_modules(runner),
    *rows,
    keys,
    request.init_images,
    max_batch=decoder.max_batch,
    guidance_scale=request.guidance_scale,
    config=request.config,
    **kwargs,
  )
  decoded = DecodedImages(checked.images, checked.flagged)
  faults.check(checked.faults, decoded)
  return decoded


def report_flagged(names: Iterable[str]) -> None:
  """Logs a line for each image that the safety checker flagged, by its name in the log."""
  for name in names:
    LOG.warning(
      '%s was flagged by the safety checker and is black; try another prompt or seed', name
    )


def report_flagged_rows(flagged: np.ndarray) -> None:
  """Logs a line for each flagged image of a batch, by its index; flagged is bool[B]."""
  report_flagged(f'image {i + 1} of {len(flagged)}' for i in flagged.nonzero()[0])


def _safety_modules(runner: ModelRunner) -> tuple[str, ...]:
  """The safety checker's name, if the checkpoint has it; else warns if the variant has one."""
  if not runner.safety_checker or runner.modules.safety_checker is None:
    return ()
  if 'safety_checker' in runner.params:
    return ('safety_checker',)
  warnings.warn(
    'this checkpoint has no safety checker, so generated images are not checked; put '
    'pixel_decoding/safety_checker into it, or open it with safety_checker=False',
    stacklevel=3,
  )
  return ()


def _resolve_size(size: Any, defaults: VariantDefaults) -> tuple[int, int]:
  default = (defaults.output_size, defaults.output_size)
  if size is None:
    return default
  checked = tuple(np.ravel(size).tolist())
  sizes = (default, *defaults.highres_sizes)
  if checked not in sizes:
    choices = ', '.join(map(_format_size, sizes))
    raise UserError(
      f'images of {_format_size(checked)} cannot be generated; '
      f'choose one of (height x width): {choices}'
    )
  height, width = checked
  return int(height), int(width)


def _check_plan(config: DecodingConfig) -> None:
  try:
    sampler_plans.make_plan(
      config.scheduler,
      config.num_inference_steps,
      sampler=config.sampler,
      strength=config.strength,
    )
  except ValueError as error:
    raise UserError(str(error)) from None


def _read_init_images(init_images: Any, count: int, size: tuple[int, int]) -> np.ndarray:
  """One initial image for each image, uint8[B, H, W, 3]."""
  sources = as_image_list(init_images)
  if len(sources) not in (1, count):
    raise UserError(f'{len(sources)} initial images for {count}; give one for each, or one for all')
  return np.repeat(read_images(sources, size), count // max(1, len(sources)), axis=0)


def _format_size(size: tuple[int, ...]) -> str:
  return 'x'.join(map(str, size))
