"""The folders that a run starts from: the modules of each, their settings, their weights."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from lavit_jax import sharding
from lavit_jax.errors import UserError
from lavit_jax.local_paths import expand_home
from lavit_jax.models.lavit import variant_config
from lavit_jax.models.settings import GROUPS, differences, for_modules, format_setting
from lavit_jax.training import codebook
from lavit_jax.training.checkpoint import saved_settings
from lavit_jax.training.lora import BaseWeights, read_base
from lavit_jax.training.stages.base import ModuleNames
from lavit_jax.weights.store import folder, metadata

Settings = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class ParameterFolder:
  """A folder of weights, and what a run takes from it."""

  path: str
  modules: tuple[str, ...]  # whose weights are loaded
  settings_modules: tuple[str, ...]  # whose settings the run has
  frozen: bool  # from the option `frozen`; else from `init_from`


def split_folders(text: str) -> tuple[str, ...]:
  """'a, ~/b' -> ('a', '/home/me/b').

  Raises:
    UserError: one is not on this machine.
  """
  paths = [path.strip() for path in text.split(',') if path.strip()]
  for path in paths:
    if '://' in path:
      raise UserError(
        f'{path} is not a local folder; mount the bucket (gcsfuse), or use a disk that all '
        'machines share'
      )
  return tuple(expand_home(path) for path in paths)


def find_modules(
  modules: ModuleNames, frozen: Sequence[str], init_from: Sequence[str]
) -> tuple[ParameterFolder, ...]:
  """Reads which modules the folders hold, and chooses those that a stage uses.

  Args:
    modules: those of the stage.
    frozen: folders of earlier stages.
    init_from: folders whose weights the stage's own modules start as.

  Raises:
    UserError: a folder is not there, or damaged.
  """
  folders = []
  for path in frozen:
    names = folder.read_config(path)['parts']
    used = tuple(name for name in names if name in modules.required)
    folders.append(ParameterFolder(path, used, used, frozen=True))
  for path in init_from:
    names = folder.read_config(path)['parts']
    taken = tuple(name for name in names if name in modules.takes)
    own = tuple(name for name in names if name not in modules.needs)
    folders.append(ParameterFolder(path, taken, own, frozen=False))
  return tuple(folders)


def check_complete(
  stage: str, modules: ModuleNames, folders: Sequence[ParameterFolder], frozen: str
) -> None:
  """Raises UserError if a module that the stage needs is in none of the folders."""
  provided = set()
  for source in folders:
    provided.update(source.modules)
  missing = [name for name in modules.required if name not in provided]
  if missing:
    raise UserError(
      f'stage {stage} needs {", ".join(missing)}: name the folders that earlier stages exported, '
      f'--config.frozen=RUN/export,RUN/export (now {frozen!r})'
    )


def resolve_settings(
  variant: str, folders: Sequence[ParameterFolder], workdir: pathlib.Path
) -> Settings:
  """The settings (models/settings.py) that a run trains with.

  They are those of the modules that it takes from its folders; of the other modules, those that
  its last checkpoint was trained with.

  Raises:
    UserError: two folders disagree about a module, or one is damaged.
  """
  settings: Settings = {}
  origins: dict[str, str] = {}
  for source in folders:
    in_folder = for_modules(folder.read_settings(source.path), source.settings_modules)
    for name, group in GROUPS.items():
      if group.module not in source.settings_modules:
        continue
      fields = in_folder.get(name, {})
      if name in settings:
        _check_agreement(variant, name, settings, origins[name], in_folder, source.path)
      settings[name] = fields
      origins.setdefault(name, source.path)
  for name, fields in saved_settings(workdir).items():
    settings.setdefault(name, fields)
  return {name: fields for name, fields in settings.items() if fields}


def _check_agreement(
  variant: str, name: str, first: Settings, first_path: str, second: Settings, second_path: str
) -> None:
  """Raises UserError if two folders have other values of the settings `name`."""
  differing = differences({name: first[name]}, {name: second.get(name, {})})
  if not differing:
    return
  _, field = differing[0]
  config = variant_config(variant)
  raise UserError(
    f'{first_path} has {format_setting(first, name, field, config)} of {name}, and {second_path} '
    f'has {format_setting(second, name, field, config)}; name one of the two alone, in frozen or '
    'init_from'
  )


def load_params(
  variant: str,
  folders: Sequence[ParameterFolder],
  mesh: Mesh,
  base: BaseWeights | None = None,
) -> dict[str, Any]:
  """Loads the weights of the modules that a run takes, sharded on the mesh.

  Of a module that several folders hold, the last one counts. Weights of `frozen` folders are
  float32; those of `init_from` keep the stored type, since the stage's own are copies of them. A
  tokenizer from `init_from` whose codebook was never trained comes without it.

  Args:
    variant: of the run.
    folders: that it starts from.
    mesh: of its devices.
    base: how the modules of `frozen` are held beside which adapters train.

  Returns:
    {module name: tree}.

  Raises:
    UserError: a frozen tokenizer's codebook was never trained, or a folder is damaged.
  """
  params = {}
  for source in folders:
    if source.frozen and 'tokenizer' in source.modules:
      metadata.check_codebook(source.path)
    narrow = base.modules(source.modules) if base is not None and source.frozen else []
    loaded = folder.load_params(
      source.path,
      [name for name in source.modules if name not in narrow],
      variant,
      lambda tree: sharding.shardings(tree, mesh),
      'float32' if source.frozen else None,
    )
    if not source.frozen and 'tokenizer' in loaded and not metadata.has_codebook(source.path):
      loaded, _ = codebook.take_out(loaded)
    for name in narrow:
      assert base is not None
      loaded[name] = read_base(base, source.path, name, mesh)
    params |= loaded
  return params
