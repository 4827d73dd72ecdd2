"""One run of training: everything that its config decides, checked and resolved in one place.

`resolve` turns a config into a `Run`. Nothing after it reads the config again.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from etils import epath
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from lavit_jax import sharding
from lavit_jax.data.transforms import CodeSizes
from lavit_jax.models import lavit
from lavit_jax.models.interfaces.variants import LAVIT
from lavit_jax.models.lavit import LavitModules
from lavit_jax.sharding import ProcessShare
from lavit_jax.training import interface_options, parameters, stages
from lavit_jax.training.optimizer import OptimizerConfig
from lavit_jax.training.parameters import ParameterFolder
from lavit_jax.training.run_config import (
  DataConfig,
  Intervals,
  TypedConfig,
  check_config,
  check_image_size,
  read_config,
)
from lavit_jax.training.stages import (
  BatchLayout,
  DetokenizerOptions,
  LanguageModelOptions,
  Stage,
  StageOptions,
)
from lavit_jax.training.workdir import open_workdir

ONE_DEVICE = AbstractMesh((1, 1, 1), sharding.AXES)


@dataclasses.dataclass(frozen=True)
class Run:
  """A run of training, resolved."""

  stage_name: str
  variant: str
  options: StageOptions  # the stage's own
  seed: int
  num_steps: int
  layout: BatchLayout
  model: LavitModules
  stage: Stage
  mesh: Mesh
  share: ProcessShare  # of a batch, that this process reads
  folders: tuple[ParameterFolder, ...]  # that the run starts from
  init_from: str  # the option, for messages
  data: DataConfig
  optimizer: OptimizerConfig
  intervals: Intervals
  keep: int  # checkpoints
  skip_damaged: bool  # whether a damaged checkpoint is passed over
  peak_tflops: float  # of all devices together; 0: by their kind
  profile: str  # 'FIRST:LAST', the steps to trace; '': none
  config: Mapping[str, Any]  # as JSON, for config.json, checkpoints and exports
  workdir: epath.Path

  @property
  def batch_size(self) -> int:
    """Examples of a step."""
    return self.layout.batch_size

  @property
  def vit_size(self) -> int | None:
    """The side of the images that the loader makes for the ViT beside those of `data.image_size`.

    None where the stage has no ViT, or the images have its size.
    """
    if not stages.stage_type(self.stage_name).reads_vit or self.code_sizes is not None:
      return None
    return None if self.data.image_size == self.model.image_size else self.model.image_size

  @property
  def code_sizes(self) -> CodeSizes | None:
    """The limits of the codes that the loader reads; None where it reads images."""
    if not isinstance(self.options, LanguageModelOptions) or not self.options.from_codes:
      return None
    return CodeSizes(self.model.num_patches, self.model.vocabulary.codebook_size)

  @property
  def tokens_per_step(self) -> int:
    """The slots of packed rows of a step of the language model; the patches of another stage."""
    if isinstance(self.options, LanguageModelOptions):
      return self.options.num_slots
    return self.batch_size * self.model.num_patches


# --- Resolution ----------------------------------------------------------------------------------


def resolve(config: ConfigDict, workdir: str | os.PathLike[str]) -> Run:
  """Checks a config, and resolves it for the devices and folders of this job.

  Args:
    config: as the files in `configs/` define it.
    workdir: of the run; its last checkpoint has the settings of the run's own modules.

  Raises:
    UserError: an option is missing, unknown, out of range or contradicts another one; a folder
      lacks a module or holds another variant's; nothing can be written to `workdir`.
  """
  path = open_workdir(workdir)
  typed = read_config(config)
  common = typed.common
  mesh = sharding.make_mesh(dataclasses.asdict(typed.mesh))
  check_config(typed, sharding.batch_shards(mesh))
  modules = stages.stage_modules(common.stage, typed.options)
  folders = parameters.find_modules(
    modules,
    parameters.split_folders(common.frozen, modules),
    parameters.split_folders(common.init_from, modules),
  )
  settings = parameters.resolve_settings(common.variant, folders, path)
  settings = _own_settings(typed, settings, folders)
  share = sharding.process_share(mesh, common.batch_size)
  run = _make_run(typed, mesh, share, folders, settings, path)
  parameters.check_complete(common.stage, modules, folders, common.frozen)
  return run


def resolve_abstract(config: ConfigDict, mesh: Mesh | AbstractMesh | None = None) -> Run:
  """Checks a config, and resolves it for devices that need not be here.

  No folder is read: the modules have the settings of the variant.

  Args:
    config: as the files in `configs/` define it.
    mesh: of the devices; None: a single one.

  Raises:
    UserError: as `resolve`, of the config itself.
  """
  typed = read_config(config)
  mesh = cast(Mesh, ONE_DEVICE if mesh is None else mesh)  # no device of it is used
  check_config(typed, sharding.batch_shards(mesh))
  share = ProcessShare(np.arange(typed.common.batch_size), 0, 1)
  settings = _own_settings(typed, {}, ())
  return _make_run(typed, mesh, share, (), settings, epath.Path())


def _own_settings(
  typed: TypedConfig, settings: parameters.Settings, folders: tuple[ParameterFolder, ...]
) -> parameters.Settings:
  """The settings of a run: those of its folders, but for what its config chooses."""
  options = typed.options
  if isinstance(options, LanguageModelOptions):
    template = {'template': typed.data.chat_template or LAVIT}
    settings = {**settings, 'chat': template}
  if interface := stages.interface_name(options):
    settings = interface_options.with_interface(settings, interface, folders)
  if isinstance(options, DetokenizerOptions):
    settings = interface_options.with_condition(settings, options.condition, folders)
  return settings


def _make_run(
  typed: TypedConfig,
  mesh: Mesh,
  share: ProcessShare,
  folders: tuple[ParameterFolder, ...],
  settings: parameters.Settings,
  workdir: epath.Path,
) -> Run:
  common = typed.common
  layout = BatchLayout(
    batch_size=common.batch_size,
    image_size=typed.data.image_size,
    text_length=typed.data.text_length or 0,
    max_images=typed.data.max_images,
    shards=sharding.batch_shards(mesh),
    accumulate=common.accumulate,
  )
  capacities = tuple(common.merger_capacities)
  model = lavit.build(common.variant, common.dtype, common.remat, settings, capacities)
  check_image_size(typed, model)
  return Run(
    stage_name=common.stage,
    variant=common.variant,
    options=typed.options,
    seed=common.seed,
    num_steps=common.num_steps,
    layout=layout,
    model=model,
    stage=stages.build_stage(common.stage, typed.options, model, layout),
    mesh=mesh,
    share=share,
    folders=folders,
    init_from=common.init_from,
    data=typed.data,
    optimizer=typed.optimizer,
    intervals=typed.intervals,
    keep=common.keep,
    skip_damaged=common.skip_damaged,
    peak_tflops=common.peak_tflops,
    profile=common.profile,
    config=typed.json,
    workdir=workdir,
  )
