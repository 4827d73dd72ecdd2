"""The folders that a run starts from: the modules of each, their settings, their weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath
from jax.sharding import Mesh

from lavit_jax import sharding
from lavit_jax.errors import UserError
from lavit_jax.local_paths import expand_home
from lavit_jax.models.lavit import variant_config
from lavit_jax.models.settings import GROUPS, differences, for_modules, format_setting
from lavit_jax.training import codebook
from lavit_jax.training.checkpoint import saved_settings
from lavit_jax.training.lora import read_base
from lavit_jax.training.stages.base import ModuleNames, Stage, Tree
from lavit_jax.weights.store import folder, metadata, remote
from lavit_jax.weights.store.arrays import ParameterSource, flatten, read_module, unflatten

Settings = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class ParameterFolder:
  """A folder of weights, and what a run takes from it."""

  path: str
  modules: tuple[str, ...]  # whose weights are loaded
  settings_modules: tuple[str, ...]  # whose settings the run has
  frozen: bool  # from the option `frozen`; else from `init_from`


def split_folders(text: str, modules: ModuleNames) -> tuple[str, ...]:
  """'a, ~/b' -> ('a', '/home/me/b').

  Of a folder of a store, such as gs://BUCKET/model, it is the path of a copy on this machine, which
  has the modules that the stage may read.

  Raises:
    UserError: there is nothing at a URL, or its store does not answer.
  """
  paths = [path.strip() for path in text.split(',') if path.strip()]
  names = {*modules.required, *modules.takes}
  return tuple(remote.fetch(path, names) if '://' in path else expand_home(path) for path in paths)


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
  variant: str, folders: Sequence[ParameterFolder], workdir: epath.Path
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


def open_modules(variant: str, folders: Sequence[ParameterFolder]) -> dict[str, ParameterSource]:
  """Opens the modules that a run takes, whose weights it reads as float32.

  Of a module that several folders hold, the last one counts. A tokenizer from `init_from` whose
  codebook was never trained comes without it.

  Returns:
    {module name: source}.

  Raises:
    UserError: a frozen tokenizer's codebook was never trained, a folder is damaged, or has another
      variant.
  """
  sources: dict[str, ParameterSource] = {}
  for origin in folders:
    has_tokenizer = 'tokenizer' in origin.modules
    if origin.frozen and has_tokenizer:
      metadata.check_codebook(origin.path)
    sources |= folder.open_modules(origin.path, origin.modules, variant)
    if not origin.frozen and has_tokenizer and not metadata.has_codebook(origin.path):
      loaded, _ = codebook.take_out({'tokenizer': unflatten(sources['tokenizer'].structs)})
      structs = flatten(loaded['tokenizer'])
      sources['tokenizer'] = sources['tokenizer']._replace(structs=structs)
  return sources


def module_shapes(sources: Mapping[str, ParameterSource]) -> dict[str, Tree]:
  """{module name: tree of ShapeDtypeStructs}."""
  return {name: unflatten(source.structs) for name, source in sources.items()}


def read_modules(
  sources: Mapping[str, ParameterSource], names: Iterable[str], mesh: Mesh
) -> dict[str, Tree]:
  """Reads modules onto the mesh, each device its shards.

  Args:
    sources: from `open_modules`.
    names: of the modules to read.
    mesh: of the devices.

  Returns:
    {module name: tree of arrays}.

  Raises:
    UserError: a folder is damaged.
  """
  sources = {name: sources[name] for name in names}
  shardings = sharding.shardings(module_shapes(sources), mesh)
  return {name: read_module(source, shardings[name]) for name, source in sources.items()}


def read_frozen(
  sources: Mapping[str, ParameterSource],
  folders: Sequence[ParameterFolder],
  stage: Stage,
  mesh: Mesh,
) -> dict[str, Tree]:
  """Reads the modules that a stage needs, in the dtypes of `Stage.base`.

  Args:
    sources: from `open_modules`.
    folders: that the run starts from.
    stage: of the run.
    mesh: of the devices.

  Raises:
    UserError: a folder is damaged.
  """
  needs = stage.modules.needs
  base = stage.base
  if base is None:
    return read_modules(sources, needs, mesh)
  narrow = base.modules(needs)
  params = read_modules(sources, [name for name in needs if name not in narrow], mesh)
  paths: dict[str, str] = {}
  for origin in folders:
    if origin.frozen:
      paths |= dict.fromkeys(origin.modules, origin.path)
  for name in narrow:
    params[name] = read_base(base, paths[name], name, mesh)
  return params


def load_params(variant: str, folders: Sequence[ParameterFolder], mesh: Mesh) -> dict[str, Tree]:
  """Reads all modules that a run takes; see `open_modules` and `read_modules`."""
  sources = open_modules(variant, folders)
  return read_modules(sources, list(sources), mesh)
