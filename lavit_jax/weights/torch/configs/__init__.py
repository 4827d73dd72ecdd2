"""Settings that the descriptions of a PyTorch folder ask for: one module a kind of part, and the rules that they share (rules.py)."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping

from lavit_jax.models import lavit
from lavit_jax.models import settings as checkpoint_settings
from lavit_jax.weights.torch.configs import llama, pipeline, rules, safety, scheduler, unet, vae

FAMILIES: tuple[rules.Family, ...] = (
  *llama.FAMILIES,
  *unet.FAMILIES,
  *vae.FAMILIES,
  *scheduler.FAMILIES,
  *pipeline.FAMILIES,
  *safety.FAMILIES,
)


def read_settings(
  src: pathlib.Path, folders: Mapping[str, str], parts: Iterable[str], variant: str
) -> dict[str, dict]:
  """The settings of a PyTorch folder, where they are not the variant's own; all its descriptions are checked.

  Args:
    src: the folder; of a single file there is no description.
    folders: part -> where in `src` it lies.
    parts: which parts are there.
    variant: a row of the variants table.

  Raises:
    UserError: a description asks for what the variant does not compute (`rules.read`), or is damaged.
  """
  model, found = lavit.build(variant), {}
  for family, file in _files(src, folders, parts):
    if (
      getattr(model, family.part) is None
    ):  # the weights have no place in it, which is told of them
      continue
    fields = rules.read(family, rules.read_description(file), model, file)
    if family.settings is not None:
      found.setdefault(family.settings, {}).update(fields)
  return checkpoint_settings.validate(variant, lavit.variant_config(variant), found)


def described(
  src: pathlib.Path, folders: Mapping[str, str], parts: Iterable[str]
) -> dict[str, pathlib.Path]:
  """By the name of settings: the description in `src` that they come from, of those that are there. The arguments: as for `read_settings`."""
  return {
    family.settings: file
    for family, file in _files(src, folders, parts)
    if family.settings is not None
  }


def _files(
  src: pathlib.Path, folders: Mapping[str, str], parts: Iterable[str]
) -> Iterator[tuple[rules.Family, pathlib.Path]]:
  """The descriptions that are there; beside a single file there are none."""
  if src.is_file():
    return
  for family in FAMILIES:
    if family.part in parts and family.part in folders:
      file = pathlib.Path(os.path.normpath(src / folders[family.part] / family.file))
      if file.is_file():
        yield family, file
