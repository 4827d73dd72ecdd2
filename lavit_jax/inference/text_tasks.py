"""The user's methods from images to text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lavit_jax.inference import text_generation
from lavit_jax.inference.deprecated import api_method
from lavit_jax.inference.generation_config import (
  GenerationConfig,
  GenerationOptions,
  resolve_generation_config,
)
from lavit_jax.inference.outputs import TextOutput
from lavit_jax.inference.rng import Seed
from lavit_jax.inference.runner import ModelRunner

if TYPE_CHECKING:
  from typing import Unpack


class TextTasks(ModelRunner):
  """Captions and answers."""

  @api_method(GenerationOptions, outputs='caption_outputs')
  def caption(
    self,
    images: Any,
    prompt: str | Sequence[str] = '',
    *,
    seed: Seed | None = 0,
    **generation: Unpack[GenerationOptions],
  ) -> list[str]:
    """Captions images: the text after [IMG] features [/IMG] prompt, up to its first full stop.

    By default a search by 2 beams, as published; do_sample=True samples instead, by default with
    temperature 1 and top_k 50.

    Args:
      images: B images.
      prompt: the start of all captions, or one for each; none in the published results.
      seed: of the patches that become tokens, and of sampling.
      **generation: fields of `GenerationConfig` that replace the defaults.

    Returns:
      B * num_return_sequences captions, those of the first image first.
    """
    outputs = self.caption_outputs(images, prompt, seed=seed, **generation)
    return [output.text for output in outputs]

  @api_method(GenerationOptions)
  def caption_outputs(
    self,
    images: Any,
    prompt: str | Sequence[str] = '',
    *,
    seed: Seed | None = 0,
    **generation: Unpack[GenerationOptions],
  ) -> list[TextOutput]:
    """Captions images as `caption` does, and returns ids and scores too."""
    defaults = GenerationConfig(*self.defaults.caption_tokens, num_beams=2)
    config = self._text_config(defaults, generation)
    return text_generation.caption(self, images, prompt, config, seed)

  @api_method(GenerationOptions, outputs='answer_outputs')
  def answer(
    self,
    images: Any,
    questions: Sequence[str],
    *,
    check_answerable: bool = False,
    seed: Seed | None = 0,
    **generation: Unpack[GenerationOptions],
  ) -> list[str]:
    """Answers questions about images, in lower case, up to a newline, comma or full stop.

    By default a search by 5 beams with length penalty 0 and early stopping, as published. The
    published evaluation lemmatizes the answer too.

    Args:
      images: B images.
      questions: one for each image.
      check_answerable: first ask whether the image answers the question, and answer 'unanswerable'
        if not, as published for VizWiz.
      seed: of the patches that become tokens, and of sampling.
      **generation: fields of `GenerationConfig` that replace the defaults.

    Returns:
      B * num_return_sequences answers, those to the first question first.
    """
    outputs = self.answer_outputs(
      images, questions, check_answerable=check_answerable, seed=seed, **generation
    )
    return [output.text for output in outputs]

  @api_method(GenerationOptions)
  def answer_outputs(
    self,
    images: Any,
    questions: Sequence[str],
    *,
    check_answerable: bool = False,
    seed: Seed | None = 0,
    **generation: Unpack[GenerationOptions],
  ) -> list[TextOutput]:
    """Answers questions as `answer` does, and returns ids and scores too."""
    defaults = GenerationConfig(
      *self.defaults.answer_tokens, num_beams=5, length_penalty=0.0, early_stopping=True
    )
    config = self._text_config(defaults, generation)
    return text_generation.answer(
      self, images, questions, config, seed, check_answerable=check_answerable
    )

  def _text_config(
    self, defaults: GenerationConfig, generation: GenerationOptions
  ) -> GenerationConfig:
    max_tokens = self.params.max_length - text_generation.min_image_tokens(self.modules)
    return resolve_generation_config(defaults, generation, max_tokens)
