"""Combines the exports of several stages into one model."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from lavit_jax.data.text import TextTokenizer
from lavit_jax.models import lavit
from lavit_jax.models import settings as checkpoint_settings
from lavit_jax.weights.store.folder import load_params, save_params
from lavit_jax.weights.store.metadata import check_codebook, read_config, read_settings

# A language model sees images in one way: the last source decides between these modules.
ALTERNATIVES = {'interface': 'understanding', 'understanding': 'interface'}
METADATA_KEYS = ('stage', 'steps')  # kept for each module


def bundle(
  folder: str | os.PathLike,
  sources: Sequence[str | os.PathLike],
  tokenizer: str | os.PathLike,
  dtype: str = 'bfloat16',
) -> pathlib.Path:
  """Writes one model from the exports of several stages, for `Lavit.from_pretrained`.

  Args:
    folder: as in `save_params`.
    sources: the export folders, all of one variant. A module that several of them hold is taken,
      with its settings, from the last one. Of `understanding` and another interface
      (models/interfaces), the result has what the last source that holds one of them has.
    tokenizer: the tokenizer folder of the language model.
    dtype: as in `save_params`.

  Returns:
    The folder.

  Raises:
    UserError: a source is missing, damaged or of another variant, the tokenizer is another
      model's, or the folder cannot be written.
  """
  variant = read_config(sources[0])['variant']
  params: dict[str, Any] = {}
  metadata: dict[str, dict] = {}
  settings: dict[str, dict] = {}
  for source in sources:
    source_params = load_params(source, variant=variant)
    if 'tokenizer' in source_params:
      check_codebook(source)
    for module, alternative in ALTERNATIVES.items():
      if module in source_params and alternative not in source_params:
        params.pop(alternative, None)
        metadata.pop(alternative, None)
        settings.pop(alternative, None)
    params.update(source_params)
    source_metadata = read_config(source)['metadata']
    for module in source_params:
      metadata[module] = _module_metadata(source_metadata, module)
    for group in list(settings):
      if checkpoint_settings.GROUPS[group].module in source_params:
        del settings[group]
    settings.update(checkpoint_settings.for_modules(read_settings(source), list(source_params)))
  model = lavit.build(variant, settings=settings)
  # A check.
  TextTokenizer.load(tokenizer, model.vocabulary.text_size, model.has_padded_vocabulary)
  return save_params(folder, variant, params, metadata, dtype, tokenizer, settings)


def _module_metadata(metadata: Mapping[str, Any], module: str) -> dict[str, Any]:
  """The stage and steps of a module; a bundle has them under its name."""
  fields = metadata.get(module, metadata)
  return {key: fields[key] for key in METADATA_KEYS if key in fields}
