"""What a run writes besides its log and its checkpoints: config.json, and the export at its end."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from lavit_jax.models.settings import for_modules
from lavit_jax.training import distributed
from lavit_jax.training.run import Run
from lavit_jax.training.stages import LanguageModelOptions
from lavit_jax.training.train_step import TrainState, averaged
from lavit_jax.weights.store import folder, remote
from lavit_jax.weights.store.metadata import module_digest
from lavit_jax.weights.torch import adapters
from lavit_jax.weights.torch.adapters import Adapters, ModuleAdapter


def write_config(run: Run, folder: pathlib.Path) -> None:
  """Writes config.json to `folder`, the records of the run."""
  if jax.process_index() == 0:
    (folder / 'config.json').write_text(json.dumps(run.config, indent=1) + '\n')


def _export_adapters(
  run: Run, target: str, trained: Mapping[str, Any], metadata: dict[str, Any]
) -> None:
  """Writes what was trained as a folder of adapters, with the folders that they belong to."""
  assert isinstance(run.options, LanguageModelOptions)
  options = run.options.lora
  base = {}
  for source in run.folders:
    for module in source.modules if source.frozen else ():
      base[module] = dict(folder=source.path, digest=module_digest(source.path, module))
  modules = {}
  for module, tree in trained.items():
    config = {}
    if module in base:
      fields = dict(options.peft_fields(), base_model_name_or_path=base[module]['folder'])
      config = adapters.peft_config(run.model, module, tree, fields)
    modules[module] = ModuleAdapter(tree, options.scale, config)
  info = dict(settings=run.model.settings, base=base, metadata=metadata)
  adapters.save_adapters(target, run.model, Adapters(modules, info))


def export(run: Run, train_state: TrainState) -> dict[str, Any]:
  """Writes the modules that the stage has made to WORKDIR/export, or its adapters.

  Their weights are averaged over the last steps, if there is an average.

  Returns:
    The metadata of the export.
  """
  params, state = averaged(run.stage, train_state)
  params = distributed.to_host(run.stage.export(params, state))
  metadata = dict(stage=run.stage_name, steps=int(train_state.step), config=run.config)
  if run.stage.export_metadata is not None:
    metadata |= run.stage.export_metadata(state)
  if jax.process_index() == 0:
    with remote.target(os.fspath(run.workdir / 'export')) as target:
      if run.stage.base is not None:
        _export_adapters(run, target, params, metadata)
      else:
        settings = for_modules(run.model.settings, params)
        folder.save_params(target, run.variant, params, metadata=metadata, settings=settings)
  distributed.wait_for_all('exported')
  return metadata
