"""Opens the folders and files of other systems (interface_files.py) for their conversion."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from lavit_jax.errors import UserError
from lavit_jax.models import lavit
from lavit_jax.weights.torch import (
  configs,
  conversion_notes,
  formats,
  interface_files,
  interface_sizes,
  matching,
  name_tables,
  state_dict_names,
  weight_files,
)
from lavit_jax.weights.torch import files as torch_files
from lavit_jax.weights.torch.configs import interfaces as interface_configs
from lavit_jax.weights.torch.formats import SourceModule
from lavit_jax.weights.torch.interface_files import FIRST_STAGE, InterfaceFile
from lavit_jax.weights.torch.mapping import PortingError, make_plan
from lavit_jax.weights.torch.matching import MappedModule
from lavit_jax.weights.torch.name_rules import NameRule
from lavit_jax.weights.torch.tensors import LazyTensor

# The `model_type` of a config.json.
MODEL_TYPES = ('llava', 'llava_llama', 'blip-2', 'instructblip', 'clip', 'clip_vision_model')
STEMS = (*formats.TRANSFORMERS, 'mm_projector', 'checkpoint')
IMAGE_ENCODER = (
  '.patch_embed.proj.weight'  # the end of a name, where a file has EVA's under a prefix
)


class OpenedSource(NamedTuple):
  """A source whose modules match a model.

  Attributes:
    kind: of the source; recorded in the checkpoint.
    sources: its modules.
    model: with the settings of the checkpoint.
    settings: those, in the order of the source.
    mapped: by module: how its tensors become leaves.
    notes: of the conversion.
    origin: what the way back needs to know, for the metadata of the checkpoint.
  """

  kind: str
  sources: list[SourceModule]
  model: lavit.LavitModules
  settings: dict[str, dict[str, Any]]
  mapped: dict[str, MappedModule]
  notes: list[str]
  origin: dict[str, Any] = {}


class InterfaceSource(NamedTuple):
  """A folder or file of another system.

  Attributes:
    path: of it.
    file: its tensors by module.
    edition: the files; None for a single file.
    stem: of their names.
    state: torch name -> tensor, of all modules, and those of none.
  """

  path: pathlib.Path
  file: InterfaceFile
  edition: weight_files.Edition | None
  stem: str
  state: dict[str, LazyTensor]

  @property
  def modules(self) -> list[SourceModule]:
    """Its modules, which share their files."""
    location = formats.ModuleLocation
    return [
      SourceModule(location(module, '', (self.stem,)), self.state, {}, self.edition)
      for module in self.file.tables
    ]


def find(src: pathlib.Path, weights_variant: str | None = None) -> InterfaceSource | None:
  """Recognizes a folder or file of another system; None if it is none.

  Args:
    src: the folder or file.
    weights_variant: as for `formats.detect`.

  Raises:
    UserError: its files are damaged, or are not converted.
  """
  edition = None
  if src.is_dir():
    if formats.detect_kind(src) is not None:
      return None
    edition = weight_files.choose(src, STEMS, weights_variant)
    paths = list(edition.files) if edition is not None else _single_file(src)
  else:
    paths = [src] if src.is_file() else []
  if not paths:
    return None
  tensors = torch_files.load_files(paths)
  state = state_dict_names.normalize('interface', tensors, str(src)).state
  has_encoder = any(name.endswith(IMAGE_ENCODER) for name in state)
  try:
    recognized = interface_files.recognize(state)
    if recognized is None or (recognized[0] in FIRST_STAGE and has_encoder):
      return None
    if recognized[0] in FIRST_STAGE:
      raise PortingError(
        'a Q-Former after its first stage, without a projection into a language model; '
        'give the file of the second stage'
      )
    file = interface_files.open_interface(state)
  except PortingError as error:
    if has_encoder:
      return None
    raise UserError(f'{src} is {error}') from None
  stem = edition.stem if edition is not None else paths[0].stem
  others = {name: state[name] for name in file.others}
  state = {name: x for tensors in file.states.values() for name, x in tensors.items()} | others
  return InterfaceSource(src, file, edition, stem, state)


def _single_file(src: pathlib.Path) -> list[pathlib.Path]:
  """The one weight file of a folder that has one, whatever its name."""
  suffixes = ('.pth', '.pt', *weight_files.FORMATS)
  files = [file for file in sorted(src.iterdir()) if file.suffix in suffixes and file.is_file()]
  is_llama = files and files[0].name.startswith('consolidated.')  # in the form of Meta
  return files if len(files) == 1 and not is_llama else []


def open_source(
  source: InterfaceSource, variant: str | None, allow_missing: str, mixed: bool
) -> OpenedSource:
  """Matches the modules of a source with a model of their sizes.

  Args:
    source: of `find`.
    variant: which the settings of the checkpoint change; None chooses one.
    allow_missing: regex of torch names that may be missing.
    mixed: as for `matching.map_modules`.

  Raises:
    UserError: its `config.json` asks for what is not computed here.
    PortingError: names or shapes are wrong.
  """
  file = source.file
  config_path = source.path / 'config.json'
  config = formats.read_json(config_path)
  exported = formats.read_json(source.path / formats.EXPORT_INFO)
  variant = variant or exported.get('variant') or interface_sizes.choose_variant(file)
  try:
    settings = interface_sizes.read_sizes(file, config, variant)
  except PortingError as error:
    raise UserError(f'{source.path}: {error}') from None
  settings = exported.get('settings', settings)
  model = lavit.build(variant, settings=settings)
  if config:
    modules = set(file.tables)
    followed = interface_configs.read_settings(file.form, config, model, modules, config_path)
    for group, fields in followed.items():
      settings[group] = {**settings.get(group, {}), **fields}
    model = lavit.build(variant, settings=settings)
  return OpenedSource(
    file.form,
    source.modules,
    model,
    settings,
    _map(source, model, allow_missing, mixed),
    _notes(source, model, config),
    dict(interface=dict(options=file.options, stem=source.stem)),
  )


def open_lavit(
  src: pathlib.Path,
  variant: str | None,
  allow_missing: str,
  mixed: bool,
  weights_variant: str | None,
) -> OpenedSource:
  """Opens what formats.py recognizes; arguments as for `plan_conversion`.

  Raises:
    UserError: an unknown or damaged source.
    PortingError: it does not fit the variant.
  """
  kind, sources = formats.detect(src, weights_variant=weights_variant)
  variant = variant or matching.find_variant(sources)
  model = lavit.build(variant)
  folders = formats.module_folders(sources)
  settings = configs.read_settings(src, folders, list(folders), variant)
  mapped = matching.map_modules(model, sources, allow_missing, mixed)
  origins = conversion_notes.description_names(src, folders)
  notes = conversion_notes.settings_notes(origins, settings, variant)
  notes += conversion_notes.source_notes(src, kind, sources, model)
  model = lavit.build(variant, settings=settings)
  return OpenedSource(kind, sources, model, settings, mapped, notes)


def _map(
  source: InterfaceSource, model: lavit.LavitModules, allow_missing: str, mixed: bool
) -> dict[str, MappedModule]:
  """As `matching.map_modules`, by the tables of the form.

  Raises:
    PortingError: names or shapes are wrong.
  """
  file = source.file
  shapes = name_tables.module_shapes(model, list(file.tables))
  mapped = {}
  problems = []
  for module, rules in file.tables.items():
    like = shapes[module]
    if module == 'llama' and not _has_all_rows(rules, file.states[module], model):
      like = {**like, **matching.vocabulary_shapes(like, model.vocabulary.text_size)}
    try:
      plan = make_plan(rules, file.states[module], like, allow_missing, mixed)
    except PortingError as error:
      problems += [f'{module}: {problem}' for problem in error.problems]
    else:
      mapped[module] = MappedModule(plan, file.states[module], 0)
  if problems:
    raise PortingError(f'{source.path} and {file.form} do not fit', problems)
  return mapped


def _has_all_rows(
  rules: list[NameRule], state: Mapping[str, LazyTensor], model: lavit.LavitModules
) -> bool:
  """Whether the embedding of a language model has the rows of the visual tokens, too."""
  name = next(rule.name for rule in rules if rule.leaf == 'embedding')
  return name in state and state[name].shape[0] == model.vocabulary.size


def _notes(
  source: InterfaceSource, model: lavit.LavitModules, config: Mapping[str, Any]
) -> list[str]:
  """What the conversion follows, and what it leaves as it is."""
  origin = 'config.json' if config else 'the shapes of the weights'
  origins = dict.fromkeys(model.settings, origin)
  notes = conversion_notes.settings_notes(origins, model.settings, model.variant)
  if source.file.others:
    notes.append(conversion_notes.other_tensors(source.file.others))
  if source.path.is_dir():
    notes += conversion_notes.source_notes(source.path, source.file.form, source.modules, model)
  if 'vit' not in source.file.tables:
    notes.append(
      'vit: the file has no image encoder; convert it by itself, and lavit bundle joins the two'
    )
  return notes
