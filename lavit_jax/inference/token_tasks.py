"""The user's methods from images to visual tokens, and back, without the language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lavit_jax.data.images import read_images
from lavit_jax.inference import image_generation
from lavit_jax.inference.deprecated import api_method
from lavit_jax.inference.image_generation import DecodingOptions, ImageRequest
from lavit_jax.inference.outputs import DecodedImages, PatchSelection, VisualTokens
from lavit_jax.inference.rng import (
  Purpose,
  Seed,
  example_keys,
  optional_keys,
  purpose_keys,
  sample_keys,
)
from lavit_jax.inference.runner import ModelRunner

if TYPE_CHECKING:
  from typing import Unpack


class TokenTasks(ModelRunner):
  """Visual tokens of images, and images of codes."""

  @api_method(positional=('seed',))
  def tokenize(self, images: Any, *, seed: Seed | None = 0) -> VisualTokens:
    """Returns the visual tokens of images.

    Args:
      images: B images.
      seed: of the patches that become tokens; None keeps the most probable ones.
    """
    pixels = read_images(images, self.modules.image_size)
    keys = optional_keys(seed, len(pixels))
    patch_keys = None if keys is None else purpose_keys(Purpose.PATCHES, keys)
    return self.tokenize_images(pixels, patch_keys)

  def select_patches(self, images: Any) -> PatchSelection:
    """Returns how probable each patch of images is to become a visual token.

    Args:
      images: B images.

    Returns:
      The probabilities, and the patches that `tokenize` keeps with seed=None.
    """
    return self.select_image_patches(read_images(images, self.modules.image_size))

  @api_method(outputs='decode_image_outputs')
  def decode_images(
    self,
    codes: Sequence[np.ndarray],
    *,
    seed: Seed = 0,
    size: tuple[int, int] | None = None,
    guidance_scale: float | None = None,
    num_inference_steps: int | None = None,
    sampler: str = 'ddim',
    guidance_rescale: float = 0.0,
    init_images: Any = None,
    strength: float = 0.8,
    vae_tile_size: int | None = None,
  ) -> np.ndarray:
    """Decodes codes to images.

    Args:
      codes: i32[n] for each image, n <= N.
      seed: one for all images, whose noise then differs by their index; or one for each image,
        which then does not depend on its index.
      size: (height, width) in pixels: one of `defaults.highres_sizes` by SDXL; by default the
        square of `defaults.output_size` by Stable Diffusion 1.5.
      guidance_scale: of the U-Net; by default as published, 5, or 7 with SDXL.
      num_inference_steps: denoising steps; by default as published, 50, or 25 with SDXL.
      sampler: 'ddim', as published, 'euler', 'dpm++2m' or 'pndm'.
      guidance_rescale: share of rescaled guidance, against images that are too bright or too dark
        (Lin et al. 2023, who use 0.7).
      init_images: images to start from instead of noise, one for each or one for all; they are
        resized to `size`.
      strength: share of the steps that are done from `init_images`. Even 1 keeps a trace of them,
        since the first step expects an image under the noise. It has no effect without them.
      vae_tile_size: side of the tiles that the VAE decodes one at a time, in pixels; this saves
        memory, and changes the image faintly. By default, images up to a megapixel (all published
        sizes) are decoded whole, larger ones in tiles of 1024.

    Returns:
      uint8[B, H, W, 3].
    """
    output = self.decode_image_outputs(
      codes,
      seed=seed,
      size=size,
      guidance_scale=guidance_scale,
      num_inference_steps=num_inference_steps,
      sampler=sampler,
      guidance_rescale=guidance_rescale,
      init_images=init_images,
      strength=strength,
      vae_tile_size=vae_tile_size,
    )
    image_generation.report_flagged_rows(output.flagged)
    return output.images

  @api_method(DecodingOptions)
  def decode_image_outputs(
    self,
    codes: Sequence[np.ndarray],
    *,
    seed: Seed = 0,
    guidance_scale: float | None = None,
    **decoding: Unpack[DecodingOptions],
  ) -> DecodedImages:
    """Decodes codes as `decode_images` does, and returns safety flags too."""
    keys = example_keys(seed, len(codes))
    request = self._resolve_request(len(codes), guidance_scale=guidance_scale, **decoding)
    return image_generation.decode_codes(
      self, codes, sample_keys(Purpose.LATENTS, keys, 1), request
    )

  @api_method(DecodingOptions, outputs='reconstruct_outputs')
  def reconstruct(
    self,
    images: Any,
    *,
    seed: Seed = 0,
    guidance_scale: float | None = None,
    **decoding: Unpack[DecodingOptions],
  ) -> np.ndarray:
    """Reconstructs images from their visual tokens alone.

    Args:
      images: B images.
      seed: of the patches that become tokens, and of the noise.
      guidance_scale: of the U-Net; by default as published.
      **decoding: keywords of `decode_images`.

    Returns:
      uint8[B, H, W, 3].
    """
    output = self.reconstruct_outputs(images, seed=seed, guidance_scale=guidance_scale, **decoding)
    image_generation.report_flagged_rows(output.flagged)
    return output.images

  @api_method(DecodingOptions)
  def reconstruct_outputs(
    self,
    images: Any,
    *,
    seed: Seed = 0,
    guidance_scale: float | None = None,
    **decoding: Unpack[DecodingOptions],
  ) -> DecodedImages:
    """Reconstructs images as `reconstruct` does, and returns safety flags too."""
    tokens = self.tokenize(images, seed=seed)
    return self.decode_image_outputs(
      tokens.ids, seed=seed, guidance_scale=guidance_scale, **decoding
    )

  def _resolve_request(
    self, count: int, *, guidance_scale: float | None, **decoding: Unpack[DecodingOptions]
  ) -> ImageRequest:
    self.require_unet_of_codes()
    return image_generation.resolve_image_request(
      count,
      self.defaults,
      self.params,
      self.params.scheduler,
      guidance_scale=guidance_scale,
      **decoding,
    )
