"""Checkpoints of a run: train state, position in the data, config and variant, by Orbax, in the background.

    WORKDIR/checkpoints/<step>/{state, data, config}

A step's folder appears by a rename when it is complete, so a run that was killed while saving finds the previous one. Restoring all
of it makes the next losses the same, bit for bit, as without the interruption.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil

import grain
import grain.checkpoint
import jax
import orbax.checkpoint as ocp

from lavit_jax.errors import UserError
from lavit_jax.models import lavit
from lavit_jax.porting.leaves import disk_full


class Checkpoints:
  """The checkpoints of one run.

  Args:
    workdir: holds the folder `checkpoints`.
    config: the run's config; its stage and variant must be those of what is there already.
    keep: how many of the latest to keep.
  """

  def __init__(self, workdir, config, keep: int):
    self.folder = pathlib.Path(os.path.abspath(workdir)) / 'checkpoints'
    self.identity = dict(stage=config.stage, variant=config.variant, sizes=json.loads(json.dumps(lavit.row(config.variant))))
    self.config = json.loads(config.to_json_best_effort())
    self.clear_half_written()
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
    self.manager = ocp.CheckpointManager(self.folder, options=options, item_names=('state', 'data', 'config'), item_handlers={
        'state': ocp.StandardCheckpointHandler(), 'data': grain.checkpoint.CheckpointHandler(), 'config': ocp.JsonCheckpointHandler()})

  def latest(self) -> int | None:
    """The last complete step, after checking that it is of this stage and variant.

    Raises:
      UserError: it belongs to another stage or variant.
    """
    step = self.manager.latest_step()
    if step is not None:
      try:
        saved = self.manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))['config']
      except (OSError, ValueError, KeyError) as error:
        raise self._damaged(step, error) from error
      for key in ('stage', 'variant', 'sizes'):
        if saved[key] != self.identity[key]:
          was, now = (f'{d["stage"]}:{d["variant"]}' for d in (saved, self.identity))
          difference = f'{was}, and this run is {now}' if was != now else f'{was} with other sizes than the variants table has now'
          raise UserError(f'{self.folder / str(step)} is a checkpoint of {difference}; choose another --workdir')
    return step

  def restore(self, step: int, abstract, data):
    """The train state of `step`, placed as `abstract` (ShapeDtypeStructs with shardings) says; moves the iterator `data`."""
    try:
      restored = self.manager.restore(step, args=ocp.args.Composite(
          state=ocp.args.StandardRestore(abstract), data=grain.checkpoint.CheckpointRestore(data)))
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise self._damaged(step, error) from error
    return restored['state']

  def save(self, step: int, state, data) -> None:
    """Begins to save; the arrays are copied before it returns, the files are written behind it.

    Raises:
      UserError: the disk is full, now or while the previous checkpoint was written. Nothing half-written stays.
    """
    if step == self.manager.latest_step():
      return
    with _DiskFull(self):
      self.manager.save(step, args=ocp.args.Composite(
          state=ocp.args.StandardSave(state), data=grain.checkpoint.CheckpointSave(data),
          config=ocp.args.JsonSave({**self.identity, 'config': self.config})))

  def check(self) -> None:
    """Raises what went wrong behind us, if anything did."""
    with _DiskFull(self):
      self.manager.check_for_errors()

  def wait(self) -> None:
    """Returns when everything is on the disk."""
    with _DiskFull(self):
      self.manager.wait_until_finished()

  def close(self) -> None:
    with _DiskFull(self):
      self.manager.close()

  def clear_half_written(self) -> None:
    """Deletes what a killed or failed save left; it never became a step."""
    if jax.process_index() == 0:
      for half in self.folder.glob('*.orbax-checkpoint-tmp*'):
        shutil.rmtree(half, ignore_errors=True)

  def _damaged(self, step: int, error: Exception) -> UserError:
    reason = ' '.join(str(error).split())[:300]
    return UserError(f'the checkpoint {self.folder / str(step)} is damaged or does not fit this config ({reason}); '
                     'delete that folder to go on from the one before, or choose another --workdir')


class _DiskFull:
  """Turns a full disk into a UserError and clears away what was half-written. TensorStore reports it in words, not by errno."""

  def __init__(self, checkpoints: Checkpoints):
    self.checkpoints = checkpoints

  def __enter__(self):
    return self

  def __exit__(self, kind, error, traceback):
    if not disk_full(error):
      return False
    folder = self.checkpoints.folder
    self.checkpoints.clear_half_written()
    steps = self.checkpoints.manager.all_steps(read=True)
    remedy = f'it goes on from step {max(steps)}' if steps else 'it begins anew'
    raise UserError(f'the disk is full while saving to {folder}; free some space and start the same command again: {remedy}') from error
