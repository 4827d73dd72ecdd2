"""The user's methods by which the language model generates images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lavit_jax.errors import InputError, UserError
from lavit_jax.inference import (
  code_generation,
  image_decoder,
  image_generation,
  vector_generation,
)
from lavit_jax.inference.deprecated import api_method
from lavit_jax.inference.generation_config import (
  FIELD_NAMES,
  POSITIVE_INTEGER,
  GenerationConfig,
  SamplingOptions,
  check_names,
  check_value,
  resolve_generation_config,
)
from lavit_jax.inference.image_generation import ImageGenerationOptions
from lavit_jax.inference.outputs import CodesOutput, ImageOutput
from lavit_jax.inference.prompt_checks import as_prompts, as_texts
from lavit_jax.inference.rng import Purpose, Seed, example_keys, sample_keys
from lavit_jax.inference.token_tasks import TokenTasks

if TYPE_CHECKING:
  from typing import Unpack


class ImageTasks(TokenTasks):
  """Codes of new images, and the images."""

  @api_method(ImageGenerationOptions, outputs='generate_outputs')
  def generate(
    self,
    prompts: str | Sequence[str],
    *,
    guidance_scale: float | None = 4.0,
    decoder_guidance_scale: float | None = None,
    negative_prompt: str = '',
    seed: Seed = 0,
    **options: Unpack[ImageGenerationOptions],
  ) -> np.ndarray:
    """Generates an image from each text.

    With Emu's interface, the language model regresses vectors and samples nothing: there is no
    guidance of it, options of sampling are refused, and the U-Net's guidance is against the vectors
    of the negative prompt.

    Args:
      prompts: B texts.
      guidance_scale: of the language model; None or 1 turns guidance off, which halves the work.
      decoder_guidance_scale: of the U-Net; by default as published.
      negative_prompt: a text that guidance leads away from.
      seed: one for all images, or one for each prompt.
      **options: sampling fields of `GenerationConfig`, and keywords of `decode_images`.

    Returns:
      uint8[B * num_return_sequences, H, W, 3], those of the first prompt first.
    """
    output = self.generate_outputs(
      prompts,
      guidance_scale=guidance_scale,
      decoder_guidance_scale=decoder_guidance_scale,
      negative_prompt=negative_prompt,
      seed=seed,
      **options,
    )
    image_generation.report_flagged_rows(output.flagged)
    return output.images

  @api_method(ImageGenerationOptions)
  def generate_outputs(
    self,
    prompts: str | Sequence[str],
    *,
    guidance_scale: float | None = 4.0,
    decoder_guidance_scale: float | None = None,
    negative_prompt: str = '',
    seed: Seed = 0,
    **options: Unpack[ImageGenerationOptions],
  ) -> ImageOutput:
    """Generates images as `generate` does, and returns codes and safety flags too."""
    return self._generate(
      [[text] for text in as_texts(prompts, 'prompts')],
      guidance_scale,
      decoder_guidance_scale,
      negative_prompt,
      seed,
      **options,
    )

  @api_method(ImageGenerationOptions, outputs='synthesize_outputs')
  def synthesize(
    self,
    prompts: Sequence[Any],
    *,
    guidance_scale: float | None = 5.0,
    decoder_guidance_scale: float | None = None,
    negative_prompt: str = '',
    seed: Seed = 0,
    **options: Unpack[ImageGenerationOptions],
  ) -> np.ndarray:
    """Generates an image from each sequence of images and texts, in any order.

    Args:
      prompts: B sequences; a `str` is a text, an image file a `pathlib.Path`. One prompt with both
        images and texts needs no outer brackets: synthesize([image, 'in the snow']).
      guidance_scale: see `generate`, as the following.
      decoder_guidance_scale: of the U-Net.
      negative_prompt: a text that guidance leads away from.
      seed: one for all images, or one for each prompt.
      **options: see `generate`.

    Returns:
      uint8[B * num_return_sequences, H, W, 3], those of the first prompt first.
    """
    output = self.synthesize_outputs(
      prompts,
      guidance_scale=guidance_scale,
      decoder_guidance_scale=decoder_guidance_scale,
      negative_prompt=negative_prompt,
      seed=seed,
      **options,
    )
    image_generation.report_flagged_rows(output.flagged)
    return output.images

  @api_method(ImageGenerationOptions)
  def synthesize_outputs(
    self,
    prompts: Sequence[Any],
    *,
    guidance_scale: float | None = 5.0,
    decoder_guidance_scale: float | None = None,
    negative_prompt: str = '',
    seed: Seed = 0,
    **options: Unpack[ImageGenerationOptions],
  ) -> ImageOutput:
    """Generates images as `synthesize` does, and returns codes and safety flags too."""
    return self._generate(
      as_prompts(prompts), guidance_scale, decoder_guidance_scale, negative_prompt, seed, **options
    )

  def _generate(
    self,
    prompts: Sequence[Sequence[Any]],
    guidance_scale: float | None,
    decoder_guidance_scale: float | None,
    negative_prompt: str,
    seed: Seed,
    *,
    size: tuple[int, int] | None = None,
    num_inference_steps: int | None = None,
    sampler: str = 'ddim',
    guidance_rescale: float = 0.0,
    init_images: Any = None,
    strength: float = 0.8,
    vae_tile_size: int | None = None,
    **sampling: Unpack[SamplingOptions],
  ) -> ImageOutput:
    """Samples codes and decodes them; checks all options before anything is computed."""
    self.require_drawing()
    check_value('decoder_guidance_scale', decoder_guidance_scale, image_generation.GUIDANCE_LIMIT)
    decoding: dict[str, Any] = dict(
      size=size,
      guidance_scale=decoder_guidance_scale,
      num_inference_steps=num_inference_steps,
      sampler=sampler,
      guidance_rescale=guidance_rescale,
      init_images=init_images,
      strength=strength,
      vae_tile_size=vae_tile_size,
    )
    if self.modules.regressing_interface is not None:
      return self._generate_by_vectors(prompts, negative_prompt, seed, sampling, decoding)
    config = self._code_config(guidance_scale, sampling)
    negative = code_generation.resolve_negative_prompt(self, negative_prompt, config)
    request = self._resolve_request(len(prompts) * config.num_return_sequences, **decoding)
    keys = example_keys(seed, len(prompts))
    outputs = code_generation.sample_codes(self, prompts, config, keys, negative)
    latent_keys = sample_keys(Purpose.LATENTS, keys, config.num_return_sequences)
    codes = [output.codes for output in outputs]
    decoded = image_generation.decode_codes(self, codes, latent_keys, request)
    return ImageOutput(decoded.images, decoded.flagged, outputs)

  def _generate_by_vectors(
    self,
    prompts: Sequence[Sequence[Any]],
    negative_prompt: str,
    seed: Seed,
    sampling: SamplingOptions,
    decoding: Mapping[str, Any],
  ) -> ImageOutput:
    """Regresses vectors and decodes them; several images of a prompt differ by their noise alone.

    Raises:
      UserError: an option of sampling is given, which would have no effect.
    """
    check_names(sampling, FIELD_NAMES)
    for name, value in sampling.items():
      if name != 'num_return_sequences' and value is not None:
        raise UserError(
          f'{name} has no effect: this model regresses the vectors of an image, and samples '
          'nothing; leave it out'
        )
    copies = sampling.get('num_return_sequences', 1)
    copies = check_value('num_return_sequences', copies, POSITIVE_INTEGER)
    request = image_generation.resolve_image_request(
      len(prompts) * copies,
      self.defaults,
      self.params,
      self.params.scheduler,
      image_decoder.VECTORS,
      **decoding,
    )
    keys = example_keys(seed, len(prompts))
    if not all(map(len, prompts)):
      raise InputError('the prompt is empty; give it texts or images')
    null_vectors = vector_generation.negative_vectors(self, negative_prompt)
    vectors = vector_generation.regress_vectors(self, prompts)
    decoded = image_generation.decode_vectors(
      self,
      np.repeat(vectors, copies, axis=0),
      null_vectors,
      sample_keys(Purpose.LATENTS, keys, copies),
      request,
    )
    return ImageOutput(decoded.images, decoded.flagged, [])

  # ------------------------------------------------------------------------------------ its halves

  @api_method(SamplingOptions, outputs='sample_code_outputs')
  def sample_codes(
    self,
    prompts: Sequence[Any],
    *,
    guidance_scale: float | None = 4.0,
    negative_prompt: str = '',
    seed: Seed = 0,
    **sampling: Unpack[SamplingOptions],
  ) -> list[np.ndarray]:
    """Samples the codes of an image for each prompt.

    The language model continues the images and texts of a prompt, then [IMG]. Images stand in the
    prompt as their codes: bare, as in the published multimodal synthesis, or as [IMG] codes [/IMG]
    if the variant was trained so (`VariantDefaults.bracketed`). By default temperature 1 and
    top_k 50, as published.

    Args:
      prompts: B sequences of images and texts, as in `synthesize`.
      guidance_scale: against the prompt `negative_prompt` [IMG]; None or 1 turns guidance off,
        which halves the work.
      negative_prompt: a text that guidance leads away from.
      seed: one for all prompts, or one for each.
      **sampling: fields of `GenerationConfig` that replace the defaults.

    Returns:
      i32[n] for each of B * num_return_sequences images; the first of each prompt does not depend
      on num_return_sequences.
    """
    outputs = self.sample_code_outputs(
      prompts,
      guidance_scale=guidance_scale,
      negative_prompt=negative_prompt,
      seed=seed,
      **sampling,
    )
    return [output.codes for output in outputs]

  @api_method(SamplingOptions)
  def sample_code_outputs(
    self,
    prompts: Sequence[Any],
    *,
    guidance_scale: float | None = 4.0,
    negative_prompt: str = '',
    seed: Seed = 0,
    **sampling: Unpack[SamplingOptions],
  ) -> list[CodesOutput]:
    """Samples codes as `sample_codes` does, and returns ids and scores too."""
    self.require_codes()
    checked = as_prompts(prompts)
    config = self._code_config(guidance_scale, sampling)
    negative = code_generation.resolve_negative_prompt(self, negative_prompt, config)
    keys = example_keys(seed, len(checked))
    return code_generation.sample_codes(self, checked, config, keys, negative)

  def regress_vectors(self, prompts: Sequence[Any]) -> np.ndarray:
    """Regresses the vectors of an image for each prompt, with Emu's interface.

    The language model continues the images and texts of a prompt, then [IMG], by n vectors, each of
    which it reads before the next. Nothing is sampled.

    Args:
      prompts: B sequences of images and texts, as in `synthesize`; one without parts gives the
        vectors that guidance leads away from.

    Returns:
      f32[B, n, H], which the U-Net of such a checkpoint reads.
    """
    self.require_vectors()
    return vector_generation.regress_vectors(self, as_prompts(prompts))

  def _code_config(
    self, guidance_scale: float | None, sampling: SamplingOptions
  ) -> GenerationConfig:
    defaults = GenerationConfig(*self.defaults.image_tokens, do_sample=True, guidance_scale=4.0)
    options = {**sampling, 'guidance_scale': guidance_scale}
    return resolve_generation_config(defaults, options, self.modules.num_patches)
