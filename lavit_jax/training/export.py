"""What a run writes besides its log and its checkpoints: config.json, and the export at its end."""

from __future__ import annotations

import json
from typing import Any

import jax

from lavit_jax.models.settings import for_modules
from lavit_jax.training import distributed
from lavit_jax.training.run import Run
from lavit_jax.training.train_step import TrainState, averaged
from lavit_jax.weights.store import folder


def write_config(run: Run) -> None:
  """Writes WORKDIR/config.json."""
  if jax.process_index() == 0:
    (run.workdir / 'config.json').write_text(json.dumps(run.config, indent=1) + '\n')


def export(run: Run, train_state: TrainState) -> dict[str, Any]:
  """Writes the modules that the stage has made to WORKDIR/export.

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
    settings = for_modules(run.model.settings, params)
    folder.save_params(
      run.workdir / 'export', run.variant, params, metadata=metadata, settings=settings
    )
  distributed.wait_for_all('exported')
  return metadata
