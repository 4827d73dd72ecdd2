"""Reads settings from the config files of a PyTorch folder.

There is a module for each kind of file; rules.py has what they share.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Collection, Iterator, Mapping

from lavit_jax.models import lavit
from lavit_jax.models import settings as checkpoint_settings
from lavit_jax.weights.torch.configs import llama, pipeline, rules, safety, scheduler, unet, vae

CONFIG_FILES: tuple[rules.ConfigFile, ...] = (
  *llama.CONFIG_FILES,
  *unet.CONFIG_FILES,
  *vae.CONFIG_FILES,
  *scheduler.CONFIG_FILES,
  *pipeline.CONFIG_FILES,
  *safety.CONFIG_FILES,
)


def read_settings(
  src: pathlib.Path, folders: Mapping[str, str], modules: Collection[str], variant: str
) -> dict[str, dict]:
  """Reads the settings of a PyTorch folder, and checks all its config files.

  Args:
    src: the folder, or a single file, which has no config files.
    folders: module -> its folder, relative to `src`.
    modules: the names of the modules that are there.
    variant: the name of the model variant.

  Returns:
    {group: {field: value}} of the values that differ from the variant's own.

  Raises:
    UserError: a config file is damaged, or asks for what the variant does not compute.
  """
  model = lavit.build(variant)
  settings: dict[str, dict] = {}
  for config_file, file in _existing_files(src, folders, modules):
    if getattr(model, config_file.module) is None:
      continue  # the variant has no such module, which the conversion reports
    fields = rules.apply_rules(config_file, rules.read_json_object(file), model, file)
    if config_file.settings_group is not None:
      settings.setdefault(config_file.settings_group, {}).update(fields)
  return checkpoint_settings.validate(variant, lavit.variant_config(variant), settings)


def settings_files(
  src: pathlib.Path, folders: Mapping[str, str], modules: Collection[str]
) -> dict[str, pathlib.Path]:
  """By settings group: the config file in `src` that has it, if it exists.

  Args:
    src: as in `read_settings`.
    folders: as in `read_settings`.
    modules: as in `read_settings`.
  """
  return {
    config_file.settings_group: file
    for config_file, file in _existing_files(src, folders, modules)
    if config_file.settings_group is not None
  }


def _existing_files(
  src: pathlib.Path, folders: Mapping[str, str], modules: Collection[str]
) -> Iterator[tuple[rules.ConfigFile, pathlib.Path]]:
  """The config files that exist; yields (rules, path)."""
  if src.is_file():
    return
  for config_file in CONFIG_FILES:
    module = config_file.module
    if module in modules and module in folders:
      file = pathlib.Path(os.path.normpath(src / folders[module] / config_file.file))
      if file.is_file():
        yield config_file, file
