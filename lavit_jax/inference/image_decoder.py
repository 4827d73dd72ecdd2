"""The compiled programs from codes, or from the vectors of an interface, to images.

The feature decoder turns codes into the condition of a U-Net, which denoises latents, and a VAE
decodes these. The safety checker checks the result. Vectors are the condition themselves.

Axes: B images, N patches, n vectors of an image, H and W pixels, h and w latents, Z latent
channels, D and P widths of the U-Net's conditions.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from lavit_jax.inference import faults
from lavit_jax.models import diffusion, safety_checker, vae, vit
from lavit_jax.models.decoder import null_context
from lavit_jax.models.lavit import LavitModules
from lavit_jax.models.noise_schedule import Scheduler

# Most pixels that the VAE decodes at once, in 2.5 GiB: four images of 512 x 512, or one of 1024.
MAX_PIXELS = 1024 * 1024


class ImageDecoderConfig(NamedTuple):
  """A decoder to pixels: two from codes (specification, Image decoders), one from vectors.

  Attributes:
    prefix: of the names of its modules.
    num_inference_steps: as published.
    guidance_scale: of the U-Net, as published.
    max_batch: most images at once.
    of_vectors: whether it reads vectors.
  """

  prefix: str
  num_inference_steps: int
  guidance_scale: float
  max_batch: int
  of_vectors: bool = False

  @property
  def modules(self) -> tuple[str, ...]:
    """The names of the modules whose parameters it needs."""
    if self.of_vectors:
      return ('unet', 'vae')
    names = ('codebook', self.prefix + 'decoder', self.prefix + 'unet', self.prefix + 'vae')
    return names if self.prefix else (*names, 'uncond_embeddings')


LOWRES = ImageDecoderConfig('', 50, 5.0, 16)  # Stable Diffusion 1.5
VECTORS = ImageDecoderConfig('', 50, 7.5, 16, of_vectors=True)  # Emu: section 2.3
HIGHRES = ImageDecoderConfig('highres_', 25, 7.0, 4)  # SDXL


@dataclasses.dataclass(frozen=True)
class DecodingConfig:
  """How codes are decoded to images; a change of it compiles another program.

  Attributes:
    decoder: LOWRES, HIGHRES or VECTORS.
    size: (height, width) of the images, in pixels.
    num_inference_steps: denoising steps.
    sampler: one of `sampler_plans.SAMPLERS`.
    guidance_rescale: share of rescaled guidance.
    strength: share of the steps that are done from an initial image.
    vae_tile_size: side of the tiles that the VAE decodes, in pixels; None decodes whole images.
    scheduler: how the U-Net was trained.
  """

  decoder: ImageDecoderConfig
  size: tuple[int, int]
  num_inference_steps: int
  sampler: str = 'ddim'
  guidance_rescale: float = 0.0
  strength: float = 1.0
  vae_tile_size: int | None = None
  scheduler: Scheduler = Scheduler()


class CheckedImages(NamedTuple):
  """Decoded images on the device.

  Attributes:
    images: uint8[B, H, W, 3].
    flagged: bool[B], images that the safety checker flagged; these are black.
    faults: i32[B], the first module whose result is not finite (faults.py); 0 for none.
  """

  images: Array
  flagged: Array
  faults: Array


@functools.partial(jax.jit, static_argnames=('modules', 'config'), donate_argnames='init_images')
def decode_images(
  modules: LavitModules,
  params: dict[str, Any],
  ids: Array,
  mask: Array,
  keys: Array,
  init_images: Array | None,
  *,
  guidance_scale: float | Array,
  config: DecodingConfig,
) -> CheckedImages:
  """Decodes codes to images.

  Args:
    modules: the modules.
    params: of `config.decoder.modules`; with 'safety_checker' among them, images that it flags are
      made black.
    ids: i32[B, N], the codes in a prefix.
    mask: bool[B, N], True in that prefix.
    keys: keys[B] of the initial noise.
    init_images: uint8[B, H, W, 3] to start from instead of noise, or None; donated.
    guidance_scale: of the U-Net.
    config: everything else.
  """
  prefix = config.decoder.prefix
  decoder = prefix + 'decoder'

  def apply(name: str, *args: Any, **kwargs: Any) -> Any:
    return getattr(modules, name).apply({'params': params[name]}, *args, **kwargs)

  codes = modules.tokenizer.apply({'params': params['codebook']}, ids, method='lookup')
  features = apply(decoder, codes, mask)
  context, pooled = apply(decoder, features, method='context')
  if prefix:
    condition, null_condition = highres_condition(context, pooled, config.size)
  else:
    condition = (context, jnp.ones_like(mask))
    null_condition = null_context(params['uncond_embeddings'], modules.num_patches)
  return _denoise(
    modules,
    params,
    condition,
    null_condition,
    keys,
    init_images,
    results=[(decoder, context)],
    guidance_scale=guidance_scale,
    config=config,
  )


@functools.partial(jax.jit, static_argnames=('modules', 'config'), donate_argnames='init_images')
def decode_vectors(
  modules: LavitModules,
  params: dict[str, Any],
  vectors: Array,
  keys: Array,
  init_images: Array | None,
  *,
  null_vectors: Array,
  guidance_scale: float | Array,
  config: DecodingConfig,
) -> CheckedImages:
  """Decodes the vectors of an interface to images.

  Args:
    modules: the modules.
    params: of `config.decoder.modules`, which is `VECTORS`.
    vectors: f32[B, n, D].
    keys: keys[B] of the initial noise.
    init_images: as for `decode_images`; donated.
    null_vectors: f32[n, D], from which guidance leads away.
    guidance_scale: of the U-Net.
    config: everything else.
  """
  return _denoise(
    modules,
    params,
    (vectors,),
    (null_vectors,),
    keys,
    init_images,
    results=[],
    guidance_scale=guidance_scale,
    config=config,
  )


def _denoise(
  modules: LavitModules,
  params: dict[str, Any],
  condition: diffusion.Condition,
  null_condition: diffusion.Condition,
  keys: Array,
  init_images: Array | None,
  *,
  results: list[tuple[str, Array]],
  guidance_scale: float | Array,
  config: DecodingConfig,
) -> CheckedImages:
  """Images under the condition of a U-Net; `results` are those of the modules before it."""
  unet = config.decoder.prefix + 'unet'
  pixel_vae = _PixelVAE(modules, params, config)

  def apply(name: str, *args: Any, **kwargs: Any) -> Any:
    return getattr(modules, name).apply({'params': params[name]}, *args, **kwargs)

  init_latents = None
  if init_images is not None:
    init_latents = pixel_vae.encode(init_images, jax.vmap(jax.random.fold_in, (0, None))(keys, 1))
    results.append((pixel_vae.name, init_latents))
  latents = diffusion.sample_latents(
    functools.partial(apply, unet),
    diffusion.initial_latents(keys, pixel_vae.latent_shape),
    condition,
    null_condition,
    steps=config.num_inference_steps,
    sampler=config.sampler,
    guidance_scale=guidance_scale,
    rescale=config.guidance_rescale,
    start=init_latents,
    strength=config.strength,
    scheduler=config.scheduler,
  )
  images, finite = pixel_vae.decode(latents)
  results += [(unet, latents), (pixel_vae.name, finite)]
  if 'safety_checker' not in params or modules.safety_checker is None:
    flagged = jnp.zeros(len(images), bool)
    return CheckedImages(images, flagged, faults.first_fault(*results))
  squares = safety_checker.center_square(images, modules.safety_checker.image_size)
  flagged, scores = apply('safety_checker', vit.preprocess(squares))
  results.append(('safety_checker', scores))
  images = jnp.where(flagged[:, None, None, None], 0, images)
  return CheckedImages(images, flagged, faults.first_fault(*results))


def highres_condition(
  context: Array, pooled: Array, size: tuple[int, int]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
  """Makes what SDXL's U-Net takes after the timesteps (specification, Image decoders).

  Args:
    context: [B, N, D] of the feature decoder.
    pooled: [B, P] of the feature decoder.
    size: (height, width) in pixels.

  Returns:
    The condition and the unconditional one, which is zeros. Six ids say that the image had `size`
    before it was scaled, is not cropped, and has `size`.
  """
  ids = jnp.array([*size, 0, 0, *size], jnp.float32)
  condition = (context, None, (pooled, jnp.broadcast_to(ids, (len(pooled), 6))))
  null_condition = (jnp.zeros_like(context), None, (jnp.zeros_like(pooled), ids))
  return condition, null_condition


class _PixelVAE:
  """The VAE of a decoder, with its parameters, on a few images at a time."""

  def __init__(self, modules: LavitModules, params: dict[str, Any], config: DecodingConfig):
    self.name = config.decoder.prefix + 'vae'
    self._vae = getattr(modules, self.name)
    self._params = params[self.name]
    self._tile_size = config.vae_tile_size
    self._max_batch = 1
    if not config.vae_tile_size:
      self._max_batch = max(1, MAX_PIXELS // math.prod(config.size))
    height, width = (side // self._vae.factor for side in config.size)
    self.latent_shape = (height, width, self._vae.latent_channels)

  def encode(self, images: Array, keys: Array) -> Array:
    """Images uint8[B, H, W, 3] and keys[B] -> latents f32[B, h, w, Z] for the U-Net."""
    return _map_batches(self._encode, self._max_batch, images, keys)

  def decode(self, latents: Array) -> tuple[Array, Array]:
    """Latents of the U-Net -> images uint8[B, H, W, 3], and bool[B], whether they were finite."""
    return _map_batches(self._decode, self._max_batch, latents)

  def _encode(self, images: Array, keys: Array) -> Array:
    pixels = vae.preprocess(images)
    mean, logvar = self._vae.apply({'params': self._params}, pixels, method='encode')
    sample: Callable[..., Array] = jax.vmap(vae.sample_latents)
    return self._vae.to_unet(sample(mean, logvar, keys))

  def _decode(self, latents: Array) -> tuple[Array, Array]:
    decode = functools.partial(self._vae.apply, {'params': self._params}, method='decode')
    latents = self._vae.from_unet(latents)
    if self._tile_size:
      factor = self._vae.factor
      decoded = vae.decode_tiled(decode, latents, factor, self._tile_size // factor)
    else:
      decoded = decode(latents)
    return vae.postprocess(decoded), faults.finite(decoded)


def _map_batches(function: Callable[..., Any], max_batch: int, *arrays: Array) -> Any:
  """Applies a function to at most `max_batch` rows of arrays [B, ...] at a time, in turn."""
  count = len(arrays[0])
  size = math.gcd(count, max_batch)
  if size == count:
    return function(*arrays)
  batches = [array.reshape(-1, size, *array.shape[1:]) for array in arrays]
  results = jax.lax.map(lambda batch: function(*batch), batches)
  return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), results)
