"""Codes -> pictures: the condition that the decoder makes of codes, the latents that a U-Net finds under it, their pixels, and
whether these may be shown. One compiled program, `decode_images`, and `resolve_image_request`, which makes its arguments of what a user asks for.

Axes: B images, N patches, H and W pixels, h and w latents, Z latent channels.
"""

from __future__ import annotations

import functools
import logging
import math
import warnings
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lavit_jax.data.images import as_image_list, read_images
from lavit_jax.errors import UserError
from lavit_jax.inference import faults
from lavit_jax.inference.generation_config import check_value
from lavit_jax.models import diffusion, lavit, safety_checker, vae, vit
from lavit_jax.models.decoder import null_context
from lavit_jax.models.noise_schedule import Scheduler

LOG = logging.getLogger(__name__)
WHOLE_PIXELS = (
  1024 * 1024
)  # what the VAE decodes at once, in 2.5 GiB: four pictures of 512 or one of 1024; a larger one is cut into tiles
TILE = 1024  # side of these; that of SDXL's VAE in diffusers


class ImageDecoderConfig(NamedTuple):
  """One of the two ways from codes to pixels, with its published settings (specification, Inference)."""

  prefix: str  # of the names of its parts
  steps: int
  guidance: float
  batch: int  # most pictures at a time

  @property
  def parts(self) -> tuple[str, ...]:
    own = tuple(self.prefix + name for name in ('decoder', 'unet', 'vae'))
    return ('codebook', *own, *(() if self.prefix else ('uncond_embeddings',)))


LOWRES = ImageDecoderConfig('', 50, 5.0, 16)  # Stable Diffusion 1.5
HIGHRES = ImageDecoderConfig('highres_', 25, 7.0, 4)  # SDXL


class DecodedImages(NamedTuple):
  """B pictures, and which of them the safety checker found fault with: these are black."""

  pictures: Array  # uint8[B, H, W, 3]
  flagged: Array  # bool[B]


class Checked(NamedTuple):
  """`DecodedImages`, and whether every number on the way to it was finite."""

  pictures: Array
  flagged: Array
  faults: Array  # i32[B], the first module whose result is not finite, by its number in faults.py; 0 is none


class ImageRequest(NamedTuple):
  """What to draw by, every default filled in."""

  start: np.ndarray | None  # uint8[B, H, W, 3]
  options: dict[str, Any]  # of `decode_images`, by name
  details: bool  # whether `DecodedImages` is asked for


@functools.partial(
  jax.jit,
  static_argnames=(
    'model',
    'way',
    'size',
    'steps',
    'sampler',
    'rescale',
    'strength',
    'tile',
    'scheduler',
  ),
  donate_argnames='start',
)
def decode_images(
  model: lavit.LavitModules,
  parts: dict,
  ids: Array,
  mask: Array,
  keys: Array,
  start: Array | None,
  *,
  way: ImageDecoderConfig,
  size: tuple[int, int],
  guidance: float,
  steps: int,
  sampler: str = 'ddim',
  rescale: float = 0.0,
  strength: float = 1.0,
  tile: int | None = None,
  scheduler: Scheduler = Scheduler(),
) -> Checked:
  """Codes i32[B, N] in a prefix, mask bool[B, N] of it, a key for each picture -> pictures.

  Args:
    parts: those of `way`; with 'safety_checker' among them, pictures that it flags are made black.
    start: uint8[B, H, W, 3] to begin from in place of noise; given away, for the pictures may take its place.
    size: (H, W).
    guidance, rescale, steps, sampler, strength: see `diffusion.sample_latents`.
    tile: side of the tiles in which the VAE decodes, in pixels; None decodes a picture as a whole.
    scheduler: of the U-Net.
  """
  decoder, unet, pixels = (way.prefix + name for name in ('decoder', 'unet', 'vae'))
  autoencoder, at_once = (
    getattr(model, pixels),
    1 if tile else max(1, WHOLE_PIXELS // math.prod(size)),
  )

  def apply(part: str, *args, **kwargs):
    return getattr(model, part).apply({'params': parts[part]}, *args, **kwargs)

  def encode(pictures: Array, keys: Array) -> Array:
    moments = apply(pixels, vae.preprocess(pictures), method='encode')
    return autoencoder.to_unet(jax.vmap(vae.sample_latents)(*moments, keys))

  def decode(latents: Array) -> tuple[Array, Array]:
    """Latents -> pictures uint8[B, H, W, 3], and whether their numbers were finite, bool[B]."""
    whole, latents = (
      functools.partial(apply, pixels, method='decode'),
      autoencoder.from_unet(latents),
    )
    found = (
      vae.decode_tiled(whole, latents, autoencoder.factor, tile // autoencoder.factor)
      if tile
      else whole(latents)
    )
    return vae.postprocess(found), faults.finite(found)

  features = apply(
    decoder, model.tokenizer.apply({'params': parts['codebook']}, ids, method='lookup'), mask
  )
  context, pooled = apply(decoder, features, method='context')
  if way.prefix:
    condition, null = highres_condition(context, pooled, size)
  else:
    condition, null = (
      (context, jnp.ones_like(mask)),
      null_context(parts['uncond_embeddings'], model.num_patches),
    )
  computed = [(decoder, context)]
  if start is not None:
    start = _piecewise(encode, at_once, start, jax.vmap(jax.random.fold_in, (0, None))(keys, 1))
    computed.append((pixels, start))
  shape = (*(side // autoencoder.factor for side in size), autoencoder.latent_channels)
  latents = diffusion.sample_latents(
    functools.partial(apply, unet),
    diffusion.initial_latents(keys, shape),
    condition,
    null,
    steps=steps,
    sampler=sampler,
    guidance_scale=guidance,
    rescale=rescale,
    start=start,
    strength=strength,
    scheduler=scheduler,
  )
  pictures, sound = _piecewise(decode, at_once, latents)
  computed += [(unet, latents), (pixels, sound)]
  if 'safety_checker' not in parts:
    return Checked(pictures, jnp.zeros(len(pictures), bool), faults.first_fault(*computed))
  flagged, scores = apply(
    'safety_checker',
    vit.preprocess(safety_checker.center_square(pictures, model.safety_checker.image_size)),
  )
  computed.append(('safety_checker', scores))
  return Checked(
    jnp.where(flagged[:, None, None, None], 0, pictures), flagged, faults.first_fault(*computed)
  )


def highres_condition(context: Array, pooled: Array, size: tuple[int, int]) -> tuple[tuple, tuple]:
  """What SDXL's U-Net takes after the timesteps, and the same without a condition: zeros, specification, Image decoders.

  The six ids say that the picture was of `size` before it was scaled, was cut nowhere, and is of `size`.
  """
  ids = jnp.array([*size, 0, 0, *size], jnp.float32)
  return (
    (context, None, (pooled, jnp.broadcast_to(ids, (len(pooled), 6)))),
    (jnp.zeros_like(context), None, (jnp.zeros_like(pooled), ids)),
  )


LIMITS = dict(  # as `check_value` takes them
  guidance=(float, lambda x: x >= 0, 'a number from 0 up, or None'),
  steps=(int, lambda x: x >= 1, 'a whole number from 1 up, or None'),
  rescale=(float, lambda x: 0 <= x <= 1, 'a number in 0..1'),
  strength=(
    float,
    lambda x: 0 < x <= 1,
    'a number above 0 and at most 1, which keeps almost nothing of the picture to start from',
  ),
  tile=(int, lambda x: x >= 64, 'a whole number of pixels from 64 up, or None'),
)


def resolve_image_request(
  count: int,
  drawn_size: int,
  highres_sizes: Collection[tuple[int, int]],
  held: Collection[str],
  schedulers: Callable[[str], Scheduler] = lambda prefix: Scheduler(),
  /,
  *,
  size: tuple[int, int] | None = None,
  guidance: float | None = None,
  steps: int | None = None,
  sampler: str = 'ddim',
  rescale: float = 0.0,
  start=None,
  strength: float = 0.8,
  tile: int | None = None,
  details: bool = False,
  **unknown,
) -> ImageRequest:
  """What a user asks for -> what to draw by. So that what is wrong is told before a language model has run for minutes.

  Args:
    count: of pictures.
    drawn_size, highres_sizes: of the model; `held`: names of the parts that are there; `schedulers`: of their U-Nets, by the prefix of a way.
    size, guidance, ..., details: see `Lavit.draw`.

  Raises:
    UserError: a size that is not known or whose parts are missing, or settings that cannot be or are `unknown`.
  """
  if unknown:
    known = 'size, guidance, steps, sampler, rescale, start, strength, tile, details'
    raise UserError(f'no such setting: {", ".join(sorted(unknown))}; of drawing there are {known}')
  given = dict(guidance=guidance, steps=steps, rescale=rescale, strength=strength, tile=tile)
  guidance, steps, rescale, strength, tile = (
    check_value(name, value, LIMITS[name]) for name, value in given.items()
  )
  own = (drawn_size, drawn_size)
  size = own if size is None else tuple(np.ravel(size).tolist())
  way = LOWRES if size == own else HIGHRES
  if size not in (own, *highres_sizes):
    known = ', '.join(map(_format_size, (own, *highres_sizes)))
    raise UserError(
      f'pictures of {_format_size(size)} cannot be drawn; choose one of (height x width): {known}'
    )
  size = tuple(map(int, size))
  missing = [name for name in way.parts if name not in held]
  if way is HIGHRES and missing:
    raise UserError(
      f'{_format_size(size)} is drawn by {", ".join(missing)}, which this checkpoint does not hold; draw at {_format_size(own)}, or take one '
      'with highres_pixel_decoding and highres_tokenizer_decoder'
    )
  steps = way.steps if steps is None else steps
  if start is None:
    strength = 1.0
  scheduler = schedulers(way.prefix)
  try:
    diffusion.make_plan(scheduler, steps, sampler=sampler, strength=strength)
  except ValueError as error:
    raise UserError(str(error)) from None
  if start is not None:
    start = as_image_list(start)
    if len(start) not in (1, count):
      raise UserError(
        f'{len(start)} pictures to start from, but {count} to draw; give one for each, or one for all'
      )
    start = np.repeat(read_images(start, size), count // max(1, len(start)), 0)
  if tile is None and math.prod(size) > WHOLE_PIXELS:
    tile = TILE
  return ImageRequest(
    start,
    dict(
      way=way,
      size=size,
      guidance=way.guidance if guidance is None else guidance,
      steps=steps,
      sampler=sampler,
      rescale=rescale,
      strength=strength,
      tile=tile,
      scheduler=scheduler,
    ),
    details,
  )


def safety_checker_part(model: lavit.LavitModules, held: Collection[str]) -> tuple[str, ...]:
  """The name of the safety checker among the parts, if it is there; a warning if the variant has one and it is not."""
  if model.safety_checker is None:
    return ()
  if 'safety_checker' in held:
    return ('safety_checker',)
  warnings.warn(
    'this checkpoint holds no safety checker, so what it draws is not looked at; put pixel_decoding/safety_checker into it, or '
    'open it with safety_checker=False',
    stacklevel=3,
  )
  return ()


def report_flagged(pictures: Iterable[str]) -> None:
  """A line in the log for each picture that was made black, by what it is called there."""
  for name in pictures:
    LOG.warning(
      '%s was flagged by the safety checker and is black; try another prompt or seed', name
    )


def _format_size(size: tuple[int, ...]) -> str:
  return 'x'.join(map(str, size))


def _piecewise(function: Callable, most: int, *arrays: Array) -> Any:
  """function(*arrays) over the rows of arrays [B, ...], at most so many at a time, one piece after the other."""
  size = math.gcd(len(arrays[0]), most)
  if size == len(arrays[0]):
    return function(*arrays)
  found = jax.lax.map(
    lambda piece: function(*piece), [x.reshape(-1, size, *x.shape[1:]) for x in arrays]
  )
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)
