"""Runs compiled programs on a model's parameters, in batches; shared by all tasks.

Axes: B rows, N patches, H hidden size of the language model, S prompt length.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax import Array

from lavit_jax.data.chat import TEMPLATES
from lavit_jax.data.text import TextTokenizer
from lavit_jax.errors import UserError
from lavit_jax.inference import batching, compiled, decode, faults, prompt_checks
from lavit_jax.inference.capabilities import Capabilities
from lavit_jax.inference.generation_config import (
  VARIANT_DEFAULTS,
  GenerationConfig,
  VariantDefaults,
)
from lavit_jax.inference.outputs import PatchSelection, VisualTokens
from lavit_jax.inference.rng import Purpose, sample_keys
from lavit_jax.models import sequence
from lavit_jax.models.lavit import LavitModules
from lavit_jax.weights.loader import LazyParams

T = TypeVar('T')


class ModelRunner(Capabilities):
  """A model with its parameters and its tokenizer.

  Attributes:
    modules: the Flax modules.
    params: {module name: parameters}, each read when it is first needed.
    mesh: the devices; None for one.
    cache_dtype: of the keys and values of the language model; None for the compute dtype.
    safety_checker: whether generated images are checked, if the checkpoint has a safety checker.
    defaults: of the variant.
    chat_template: how questions and conversations are written (data/chat.py).
  """

  def __init__(
    self,
    modules: LavitModules,
    params: LazyParams,
    tokenizer: TextTokenizer | str | os.PathLike,
    cache_dtype: str | None,
    safety_checker: bool,
  ):
    self.modules = modules
    self.params = params
    self.mesh = params.mesh
    self.cache_dtype = cache_dtype
    self.safety_checker = safety_checker
    self.defaults = VARIANT_DEFAULTS.get(modules.variant, VariantDefaults())
    self._tokenizer = tokenizer
    self.chat_template = TEMPLATES[modules.chat_template]

  @functools.cached_property
  def tokenizer(self) -> TextTokenizer:
    """The text tokenizer; UserError if its files are missing, damaged or of another model."""
    if isinstance(self._tokenizer, TextTokenizer):
      return self._tokenizer
    modules = self.modules
    return TextTokenizer.load(
      self._tokenizer, modules.vocabulary.text_size, modules.has_padded_vocabulary
    )

  # Programs.

  def run(
    self, program: Callable[..., T], module_names: Sequence[str], *args: Any, **kwargs: Any
  ) -> T:
    """Calls program(modules, params, *args, **kwargs) with the parameters of some modules.

    Args:
      program: a compiled program.
      module_names: the modules whose parameters it needs; they are read first.
      *args: arrays.
      **kwargs: further arguments of the program.
    """
    params = {name: self.params[name] for name in module_names}
    with self.on_mesh():
      return program(self.modules, params, *args, **kwargs)

  def on_mesh(self) -> contextlib.AbstractContextManager[Any]:
    """The context in which programs are called: that of the mesh, if there is one."""
    return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

  def run_batches(
    self,
    program: Callable[..., Any],
    module_names: Sequence[str],
    *arrays: Array | np.ndarray | None,
    max_batch: int | None = None,
    **kwargs: Any,
  ) -> Any:
    """Runs a program over batches of rows.

    Args:
      program: a compiled program.
      module_names: as in `run`.
      *arrays: [B, ...] with B >= 1, or None; the first is an array.
      max_batch: most rows of a batch; None for `batching.MAX_BATCH`.
      **kwargs: further arguments of the program, the same for all batches.

    Returns:
      What the program returns for all rows, as numpy arrays.
    """
    assert arrays[0] is not None
    count = len(arrays[0])

    def dispatch(rows: np.ndarray) -> Any:
      batch = [None if array is None else array[rows] for array in arrays]
      return self.run(program, module_names, *batch, **kwargs)

    ranges = batching.batch_ranges(count, max_batch or batching.MAX_BATCH)
    fetched = batching.fetch_batches(((n, dispatch(rows)) for n, rows in ranges), count, 'images')
    trimmed = []
    for n, result in fetched:
      trimmed.append(jax.tree.map(lambda array, n=n: array[:n], result))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *trimmed)

  # Images and codes.

  def tokenize_images(
    self, images: np.ndarray, keys: Array | None, rows: np.ndarray | None = None
  ) -> VisualTokens:
    """Tokenizes images uint8[B, H, W, 3].

    Args:
      images: of the size of the image encoder.
      keys: keys[B] by which patches are sampled; None keeps the most probable ones.
      rows: i32[B], the input of each image, for error messages.

    Raises:
      NotFinite: NaN or infinity came out of a module.
    """
    self.require_tokenizer()
    if not len(images):
      return VisualTokens([], np.zeros((0, self.modules.num_patches), bool), np.zeros(0, int))
    ids, keep = self.run_batches(compiled.tokenize, ('vit', 'tokenizer'), images, keys)
    faults.check(np.maximum(-ids[:, 0], 0), rows=rows)
    kept_ids = [image_ids[kept] for image_ids, kept in zip(ids, keep, strict=True)]
    return VisualTokens(kept_ids, keep, keep.sum(-1))

  def select_image_patches(self, images: np.ndarray) -> PatchSelection:
    """Runs the selector without sampling on images uint8[B, H, W, 3].

    Args:
      images: of the size of the image encoder.

    Raises:
      NotFinite: NaN or infinity came out of a module.
    """
    self.require_tokenizer()
    if not len(images):
      none = np.zeros((0, self.modules.num_patches), bool)
      return PatchSelection(none.astype(np.float32), none, np.zeros(0, int))
    probabilities, keep = self.run_batches(compiled.select, ('vit', 'tokenizer'), images)
    faults.check(np.maximum(-probabilities[:, 0], 0).astype(int))
    return PatchSelection(probabilities, keep, keep.sum(-1))

  def pad_codes(self, codes: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Pads the codes of B images to N.

    Args:
      codes: i32[n] for each image, n <= N.

    Returns:
      ids i32[B, N] and mask bool[B, N] of the codes; an image without codes has one, of id 0, for
      the decoder needs something to attend to.

    Raises:
      UserError: the codes are not such arrays.
    """
    num_patches = self.modules.num_patches
    for image_codes in codes:
      self._check_codes(np.asarray(image_codes))
    ids = np.zeros((len(codes), num_patches), np.int32)
    mask = np.zeros((len(codes), num_patches), bool)
    for i, image_codes in enumerate(codes):
      ids[i, : len(image_codes)] = image_codes
      mask[i, : max(1, len(image_codes))] = True
    return ids, mask

  def _check_codes(self, codes: np.ndarray) -> None:
    num_patches = self.modules.num_patches
    size = self.modules.vocabulary.codebook_size
    if codes.ndim != 1 or (codes.size and codes.dtype.kind not in 'iu'):
      raise UserError(
        'the codes of an image are a list of whole numbers, those of several images a list of '
        f'these; got {codes.tolist()!r}'
      )
    if len(codes) > num_patches or ((codes < 0) | (codes >= size)).any():
      raise UserError(
        f'the codes of an image are at most {num_patches} numbers in 0..{size - 1}; '
        f'got {len(codes)}: {codes[:4].tolist()} ...'
      )

  # Text.

  def encode_text(self, text: Any) -> Sequence[int]:
    """Returns the ids of a text.

    Raises:
      InputError: the text is blank, or not a text.
    """
    prompt_checks.require_text(text)
    return self.tokenizer.encode(text)

  def encode_optional_text(self, text: Any) -> Sequence[int]:
    """Returns the ids of a text, none if it is blank; InputError if it is not a text."""
    return () if prompt_checks.is_blank(text) else self.tokenizer.encode(text)

  # Prompts.

  def check_prompt_lengths(
    self, lengths: Sequence[int], config: GenerationConfig, **kwargs: Any
  ) -> None:
    """Raises InputError for a prompt that leaves no room for the new tokens.

    Args:
      lengths: number of tokens of each prompt.
      config: how the prompts are continued.
      **kwargs: of `prompt_checks.check_prompt_lengths`.
    """
    max_length = self.params.max_length - config.max_new_tokens
    prompt_checks.check_prompt_lengths(lengths, max_length, **kwargs)

  def embed_prompts(
    self, prompts: Sequence[sequence.Prompt], features: Array | None = None
  ) -> tuple[Array, Array]:
    """Embeds prompts.

    Args:
      prompts: lists of pieces (`sequence.layout_prompts`).
      features: [B', N, H], the features of images, which the pieces index.

    Returns:
      Left-padded embeddings [B, S, H] and mask bool[B, S]; S is a multiple of N, so that few shapes
      compile.
    """
    embed = functools.partial(self.run, compiled.embed, ('llama',))
    embeddings, mask, _ = sequence.embed_prompts(
      prompts, embed, features, multiple=self.modules.num_patches
    )
    return embeddings, mask

  def continue_prompts(
    self,
    config: GenerationConfig,
    embeddings: Array,
    mask: Array,
    keys: Array | None,
    **kwargs: Any,
  ) -> decode.GenerateOutput:
    """Continues prompts by search or by sampling.

    Args:
      config: how.
      embeddings: [B, S, H].
      mask: bool[B, S].
      keys: keys[B] of the rows; not needed for a search.
      **kwargs: further arguments of `decode.generate` or `beam_search`: `eos_id`, `suppress`,
        `extra`, and those of guidance.

    Returns:
      B * num_return_sequences sequences.
    """
    common = dict(
      min_new_tokens=config.min_new_tokens,
      max_new_tokens=config.max_new_tokens,
      repetition_penalty=config.repetition_penalty,
      num_return_sequences=config.num_return_sequences,
      cache_dtype=self.cache_dtype,
      **kwargs,
    )
    if not config.do_sample:
      return self.run(
        compiled.beam_search,
        ('llama',),
        embeddings,
        mask,
        num_beams=config.num_beams,
        length_penalty=config.length_penalty,
        early_stopping=config.early_stopping,
        **common,
      )
    assert keys is not None
    return self.run(
      compiled.generate,
      ('llama',),
      embeddings,
      mask,
      key=sample_keys(Purpose.TOKENS, keys, config.num_return_sequences),
      temperature=config.temperature,
      top_k=config.top_k,
      top_p=config.top_p,
      **common,
    )


def sequences_of(
  fetched: Sequence[tuple[int, decode.GenerateOutput]], config: GenerationConfig
) -> list[tuple[np.ndarray, float]]:
  """Returns the new tokens i32[length] and the score of each sequence of fetched batches.

  Args:
    fetched: (n, sequences) for each batch; those after the first n rows are padding.
    config: how they were generated.
  """
  sequences = []
  for n, batch in fetched:
    for i in range(n * config.num_return_sequences):
      sequences.append((batch.ids[i, : batch.lengths[i]], float(batch.scores[i])))
  return sequences


def score_faults(scores: Sequence[float]) -> np.ndarray:
  """Returns the fault i32[B] of each score: the language model's, where the score is not finite."""
  return np.where(np.isfinite(scores), 0, faults.number('llama')).astype(int)
