"""The options of a run with types, and what must hold of them.

Options have a range each (options.py); here are the rules that connect several of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from lavit_jax.data import loader
from lavit_jax.data.sources import has_codes
from lavit_jax.errors import UserError
from lavit_jax.models.interfaces.variants import LAVIT
from lavit_jax.models.lavit import LavitModules
from lavit_jax.training import interface_options, options, stages
from lavit_jax.training.config import config_leaves, read_options
from lavit_jax.training.optimizer import OptimizerConfig
from lavit_jax.training.stages import LanguageModelOptions, QFormerOptions, StageOptions, qformer


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """The section `mesh` of the config: the size of each axis, -1 for the remaining devices."""

  data: int
  fsdp: int
  tensor: int


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """The section `data` of the config, explained in `data.loader.batches`, with its own defaults."""

  task: str
  image_size: int
  source: str | None = None
  text_length: int | None = None
  max_images: int = 1
  chat_template: str | None = None
  tokenizer_folder: str | None = None
  shares: Mapping[str, float] | None = None
  question_weights: Mapping[str, float] | None = None
  max_questions: int = 1
  draw_text_weight: float | None = None
  drop_text: float | None = None
  scene_share: float | None = None
  augment: bool = False
  num_threads: int | None = None
  sources: Sequence[Mapping[str, Any]] = ()
  heldout: Sequence[Mapping[str, Any]] = ()
  shards: int = 1
  crop: str = 'none'
  max_skipped: float = 0.05

  def loader_options(self) -> dict[str, Any]:
    """The keyword arguments of `data.loader.batches`."""
    values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    return {name: value for name, value in values.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Intervals:
  """When a run reports, evaluates, draws and saves, in steps; 0: never."""

  log_every: int
  eval_every: int
  eval_batches: int  # batches of an evaluation
  picture_every: int
  checkpoint_every: int


@dataclasses.dataclass(frozen=True)
class CommonOptions:
  """The options and sections that the configs of all stages have, besides `Intervals`."""

  stage: str
  variant: str
  batch_size: int
  num_steps: int
  seed: int
  accumulate: int
  dtype: str
  remat: str
  mesh: Mapping[str, int]
  peak_tflops: float
  frozen: str
  init_from: str
  data: Mapping[str, Any]
  optim: Mapping[str, Any]
  keep: int
  skip_damaged: bool
  profile: str
  merger_capacities: tuple[int, ...] = ()


class TypedConfig(NamedTuple):
  """A config whose options have types."""

  common: CommonOptions
  mesh: MeshConfig
  data: DataConfig
  intervals: Intervals
  optimizer: OptimizerConfig
  options: StageOptions
  json: dict[str, Any]


def read_mesh(config: ConfigDict) -> MeshConfig:
  """Reads the section `mesh` of a config, after a check of all values.

  Raises:
    UserError: an option is missing, unknown or out of range.
  """
  check_values(config)
  return read_options(MeshConfig, config.to_dict()['mesh'], 'mesh')


def read_config(config: ConfigDict) -> TypedConfig:
  """Reads a config, after a check of all values and of its stage.

  Raises:
    UserError: an option is missing, unknown or out of range, or belongs to another stage.
  """
  mesh = read_mesh(config)
  values = config.to_dict()
  data = read_options(DataConfig, values['data'], 'data')
  _check_stage(values, data.task)
  return TypedConfig(
    read_options(CommonOptions, values),
    mesh,
    data,
    read_options(Intervals, values),
    OptimizerConfig.from_config(values),
    stages.stage_type(values['stage']).options.from_config(values),
    json.loads(config.to_json_best_effort()),
  )


# --- Checks --------------------------------------------------------------------------------------


def check_values(config: ConfigDict) -> None:
  """Raises UserError for options that are missing or out of range (options.py), or need others."""
  read_options(CommonOptions, config.to_dict())
  values = dict(config_leaves(config))
  options.check_values(values)
  restart = values.get('optim.rewarm_from', 0)
  num_steps = values['num_steps']
  if values.get('optim.schedule') == 'rewarm' and not 0 < restart < num_steps:
    raise UserError(
      "optim.schedule='rewarm' needs optim.rewarm_from, the step from which it warms up anew, "
      f'between 0 and num_steps={num_steps} (now {restart})'
    )


def _check_stage(values: Mapping[str, Any], task: str) -> None:
  """Raises UserError if the config is that of another stage."""
  name = values['stage']
  stage_type = stages.stage_type(name)
  if task != stage_type.task or stage_type.section not in values:
    raise UserError(
      f'stage={name!r} needs data.task={stage_type.task!r} (now {task!r}) and '
      f'{stage_type.section!r} in the config; take configs/{name}.py'
    )


def check_config(typed: TypedConfig, shards: int) -> None:
  """Raises UserError for options that contradict each other, or the `shards` of the mesh."""
  intervals = typed.intervals
  if intervals.eval_every and intervals.eval_batches < 1:
    raise UserError(
      f'eval_batches={intervals.eval_batches} with eval_every={intervals.eval_every}: give at '
      'least 1, or eval_every=0'
    )
  accumulate = typed.common.accumulate
  name = typed.common.stage
  if accumulate > 1 and not stages.stage_type(name).accumulates:
    raise UserError(
      f'accumulate={accumulate}: stage {name} learns from whole batches; use more devices or '
      'another remat policy'
    )
  _check_data(typed)
  data = typed.data
  _check_codes(typed)
  shares = data.shares or loader.DEFAULT_SHARES
  if isinstance(typed.options, QFormerOptions):
    qformer.check_captions(shares, data.sources, data.heldout)
  if isinstance(typed.options, LanguageModelOptions):
    interface_options.check_drawing(typed.options.interface, shares, data.sources, data.heldout)
    if typed.options.lora.rank and typed.options.interface == LAVIT and typed.common.init_from:
      raise UserError(
        f'init_from={typed.common.init_from} with lora.rank={typed.options.lora.rank}: adapters '
        'train beside weights that stay as they are; name the folder in frozen'
      )
  _check_pieces(typed, shards)


def _check_data(typed: TypedConfig) -> None:
  data = typed.data
  with name_data_errors():
    loader.validate_options(
      data.task,
      shares=data.shares,
      question_weights=data.question_weights,
      crop=data.crop,
      sources=data.sources,
      heldout=data.heldout,
      max_images=data.max_images,
    )
  if not data.sources:
    return
  if not data.heldout and (typed.intervals.eval_every or typed.intervals.picture_every):
    raise UserError(
      'data.sources without data.heldout: give held-out sources too, or eval_every=0 and '
      'picture_every=0'
    )
  batch_size = typed.common.batch_size
  if batch_size % data.shards:
    raise UserError(f'batch_size={batch_size} must be a multiple of data.shards={data.shards}')


def _check_codes(typed: TypedConfig) -> None:
  """Raises UserError if data with codes in place of images meets what needs images."""
  data = typed.data
  named = {}
  for key, sources in (('sources', data.sources), ('heldout', data.heldout)):
    named |= {f'data.{key}[{number}]': source for number, source in enumerate(sources)}
  first = next((name for name, source in named.items() if has_codes((source,))), None)
  if first is None:
    return
  where = f"{first} has format 'codes'"
  options = typed.options
  if not isinstance(options, LanguageModelOptions) or options.interface != LAVIT:
    other = f'stage {typed.common.stage}'
    if isinstance(options, LanguageModelOptions):
      other = f'interface={options.interface!r}'
    raise UserError(f"{where}, and {other} reads images; give the images' own files")
  if options.lora.rank:
    raise UserError(
      f'{where}, from which adapters cannot train (lora.rank={options.lora.rank}); give '
      "lora.rank=0, or the images' own files"
    )
  for name, source in named.items():
    use = source.get('use', '')
    if use == 'text':
      continue
    if not has_codes((source,)):
      raise UserError(
        f'{where}, but {name} has images: the image encoder would run for all of them; give '
        f"{name} codes too, or {first} the images' own files"
      )
    if use != 'draw':
      raise UserError(
        f"{name} has format 'codes' and use {use!r}: captions and answers are learned from "
        "continuous features, which codes do not give; give it use 'draw'"
      )


def _check_pieces(typed: TypedConfig, shards: int) -> None:
  """Raises UserError if a batch does not divide into the pieces of the mesh and of `accumulate`."""
  sizes = {'batch_size': typed.common.batch_size}
  if isinstance(typed.options, LanguageModelOptions):
    sizes['lm.num_rows'] = typed.options.num_rows
  accumulate = typed.common.accumulate
  undivided = _undivided(sizes, accumulate * shards)
  if not undivided:
    return
  counts = range(1, accumulate + 1)
  fitting = [count for count in counts if not _undivided(sizes, count * shards)]
  pieces = f'{accumulate} x {shards}' if accumulate > 1 else f'{shards}'
  hint = f'; accumulate={fitting[-1]} would do' if fitting else ''
  key = undivided[0]
  raise UserError(
    f'{key}={sizes[key]} must be a multiple of the {pieces} pieces that the mesh makes of it{hint}'
  )


def _undivided(sizes: Mapping[str, int], pieces: int) -> list[str]:
  """The options whose sizes do not divide into the pieces."""
  return [key for key, size in sizes.items() if size % pieces]


def check_image_size(typed: TypedConfig, model: LavitModules) -> None:
  """Raises UserError if the model cannot divide images of `data.image_size`."""
  name = typed.common.stage
  size = typed.data.image_size
  multiple = stages.image_multiple(name, model, bool(typed.intervals.picture_every))
  if size % multiple:
    raise UserError(
      f'data.image_size={size} must be a multiple of {multiple} for stage {name} of variant '
      f'{model.variant}'
    )


@contextlib.contextmanager
def name_data_errors() -> Iterator[None]:
  """Errors of the data, as UserErrors that name the option, or at least the section `data`."""
  try:
    yield
  except UserError as error:
    if error.option:
      raise type(error)(f'data.{error}') from error
    raise error.within('data') from error
  except (FileNotFoundError, ValueError) as error:
    raise UserError(f'data: {error}') from error
