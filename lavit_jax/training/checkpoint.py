"""Checkpoints of a run: train state, position in the data, config and variant, by Orbax, in the background.

    WORKDIR/checkpoints/<step>/{state, data, config}

A step's folder appears by a rename when it is complete, so a run that was killed while saving finds the previous one. Restoring all
of it makes the next losses the same, bit for bit, as without the interruption; on another mesh or another number of processes too, but for
the order in which sums are made.

A digest of every array is saved beside it and compared after reading: Orbax would take a flipped bit for a number.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil

import jax
import orbax.checkpoint as ocp

from lavit_jax.errors import UserError
from lavit_jax.models import lavit
from lavit_jax.models.settings import affects_outputs, differences, format_setting
from lavit_jax.training import integrity
from lavit_jax.training.distributed import wait_for_all
from lavit_jax.weights.store.disk import disk_full

MARK = 'damaged'  # in a step's folder: a file of a process that could not read it, with the reason
INEXACT = (
  'data.',
  'batch_size',
  'seed',
)  # options after whose change a run sees other examples than it would have seen
HARMLESS = (
  'data.num_threads',
  'data.max_skipped',
  'data.heldout',
  'data.shards',
)  # of the last, PositionHandler tells


class Damaged(UserError):
  """A checkpoint that cannot be used."""


class Checkpoints:
  """The checkpoints of one run.

  Args:
    workdir: holds the folder `checkpoints`.
    config: the run's config; its stage and variant must be those of what is there already.
    keep: how many of the latest to keep.
    settings: of the model (models/settings.py), which must be those of what is there already.
  """

  def __init__(self, workdir, config, keep: int, settings: dict | None = None):
    self.folder = pathlib.Path(os.path.abspath(workdir)) / 'checkpoints'
    self.identity = dict(
      stage=config.stage,
      variant=config.variant,
      sizes=json.loads(json.dumps(lavit.variant_config(config.variant))),
    )
    self.settings = settings or {}
    self.config = json.loads(config.to_json_best_effort())
    self.clear_half_written()
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
    self.manager = _Manager(
      self.folder,
      options=options,
      item_names=('state', 'data', 'config'),
      item_handlers={
        'state': ocp.StandardCheckpointHandler(),
        'data': integrity.PositionHandler(),
        'config': ocp.JsonCheckpointHandler(),
      },
    )

  def latest(self) -> int | None:
    """The last complete step, after checking that it is of this stage and variant.

    Raises:
      UserError: it belongs to another stage or variant.
    """
    step = self.manager.latest_step()
    if step is not None:
      saved = self._about(step)
      for key in ('stage', 'variant', 'sizes'):
        if saved[key] != self.identity[key]:
          was, now = (f'{d["stage"]}:{d["variant"]}' for d in (saved, self.identity))
          difference = (
            f'{was}, and this run is {now}'
            if was != now
            else f'{was} with other sizes than the variants table has now'
          )
          raise UserError(
            f'{self.folder / str(step)} is a checkpoint of {difference}; choose another --workdir'
          )
      self._check_settings(step, saved)
    return step

  def _check_settings(self, step: int, saved: dict) -> None:
    """Raises UserError where a checkpoint was trained with another setting; runs of before there were any had the variant's own."""
    before, row = saved.get('settings', {}), lavit.variant_config(self.identity['variant'])
    for name, field in differences(before, self.settings):
      if affects_outputs(name, field, self.settings) or 'settings' in saved:
        raise UserError(
          f'{self.folder / str(step)} was trained with {format_setting(before, name, field, row)} of {name}, and the folders of this run have '
          f'{format_setting(self.settings, name, field, row)}; name the folders that it began with, or choose another --workdir'
        )

  def restore_latest(self, abstract, data, skip_damaged: bool = False):
    """`restore` of the last step -> (step, train state); (0, None) if there never was one.

    With `skip_damaged`, a damaged checkpoint is set aside, as STEP.damaged, and the one before is taken.

    Raises:
      UserError: as `latest` and `restore`; or all were set aside.
    """
    while (step := self.manager.latest_step()) is not None:
      if skip_damaged and (marks := sorted((self.folder / str(step)).glob(f'{MARK}-*'))):
        self._set_aside(step, marks[0].read_text())
        continue
      try:
        self.latest()
        return step, self.restore(step, abstract, data)
      except Damaged as error:
        if not skip_damaged:
          raise
        if (
          jax.process_count() > 1 and error.__cause__
        ):  # perhaps this process alone could not read it, and the others wait elsewhere
          (self.folder / str(step) / f'{MARK}-{jax.process_index()}').write_text(str(error))
          raise UserError(f'{error}; start again: it will be skipped') from error
        self._set_aside(step, error)
    if aside := sorted(self.folder.glob('*.damaged')):
      raise UserError(
        f'all checkpoints in {self.folder} are damaged ({", ".join(path.name for path in aside)}): there is nothing to go on from; '
        'begin in another --workdir, or delete these to begin anew in this one'
      )
    return 0, None

  def changes(self, step: int) -> tuple[list[str], list[str]]:
    """'key was -> is' of the options that differ from those `step` was saved with: the harmless ones, and those that change what data come."""
    was, now = _leaves(self._about(step)['config']), _leaves(self.config)
    keys = [key for key in {**was, **now} if was.get(key) != now.get(key)]
    inexact = [key for key in keys if key.startswith(INEXACT) and key not in HARMLESS]
    told = {key: f'{key} {_short(was.get(key))} -> {_short(now.get(key))}' for key in keys}
    return [told[key] for key in keys if key not in inexact], [told[key] for key in inexact]

  def saved_config(self, step: int) -> dict:
    """The config that `step` was saved with, as JSON has it."""
    return self._about(step)['config']

  def set_aside_broken(self, first: int) -> list[int]:
    """Renames the checkpoints of step `first` and later to STEP.broken, so that the run goes on from before; all processes call this."""
    self.wait()
    steps = [step for step in self.manager.all_steps(read=True) if step >= first]
    wait_for_all('broken checkpoints are known')
    if jax.process_index() == 0:
      for step in steps:
        aside = self.folder / f'{step}.broken'
        shutil.rmtree(aside, ignore_errors=True)
        (self.folder / str(step)).rename(aside)
    wait_for_all('broken checkpoints are set aside')
    self.manager.reload()
    return steps

  def restore(self, step: int, abstract, data):
    """The train state of `step`, placed as `abstract` (ShapeDtypeStructs with shardings) says; moves the iterator `data`.

    Raises:
      Damaged: it cannot be read, or is not what was saved.
      UserError: it has other arrays or types than `abstract`, or the position in the data is one in other data.
    """
    wanted, saved = (
      integrity.names(abstract),
      self._about(step).get('digests'),
    )  # none in runs of before there were any
    if saved and (odd := sorted(saved.keys() ^ set(wanted))):
      raise UserError(
        f'the checkpoint {self.folder / str(step)} does not fit this config ({len(odd)} arrays differ: {", ".join(odd[:3])}); '
        'give the options that it was made with, or choose another --workdir'
      )
    self._check_types(step, integrity.types(abstract))
    try:
      restored = self.manager.restore(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardRestore(abstract), data=integrity.PositionRestore(data)
        ),
      )
    except (UserError, MemoryError, jax.errors.JaxRuntimeError):
      raise
    except Exception as error:  # of many kinds, as Orbax stumbles over what it reads
      raise self._damaged(step, error) from error
    now = integrity.digests(restored['state']) if saved else {}
    if wrong := [name for name in now if saved[name] != now[name]]:
      raise self._damaged(
        step, f'{len(wrong)} of {len(saved)} arrays are not what was saved: {", ".join(wrong[:3])}'
      )
    return restored['state']

  def save(self, step: int, state, data) -> None:
    """Begins to save; the arrays are copied before it returns, the files are written behind it.

    Raises:
      UserError: the disk is full, now or while the previous checkpoint was written. Nothing half-written stays.
    """
    about = {
      **self.identity,
      'settings': self.settings,
      'config': self.config,
      'digests': integrity.digests(state),
    }
    with _DiskFull(self):
      self.manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state),
          data=integrity.PositionSave(data),
          config=ocp.args.JsonSave({**about, 'sum': integrity.checksum(about)}),
        ),
      )

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

  def _about(self, step: int) -> dict:
    try:
      about = self.manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))[
        'config'
      ]
      saved = about.pop('sum', None)  # none in runs of before there was one
      if saved and saved != integrity.checksum(about):
        raise ValueError('its config is not what was saved')
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
      raise self._damaged(step, error) from error
    return about

  def _check_types(self, step: int, wanted: dict[str, str]) -> None:
    """Raises UserError where the arrays that were saved have other types: Orbax would cast them, and the digests then tell of damage."""
    try:
      saved = integrity.types(self.manager.item_metadata(step)['state'].tree)
    except Exception:  # of many kinds, of what is damaged; reading the arrays tells
      return
    if odd := [
      f'{name} {saved[name]}, not {dtype}'
      for name, dtype in wanted.items()
      if saved.get(name, dtype) != dtype
    ]:
      was, now = _leaves(self._about(step)['config']), _leaves(self.config)
      remedy = [
        f'--config.{key}={was[key]}'
        for key in was
        if key.endswith('dtype') and key in now and was[key] != now[key]
      ]
      raise UserError(
        f'the checkpoint {self.folder / str(step)} has other types than this config ({len(odd)} arrays differ: {", ".join(odd[:3])}); '
        f'give {" ".join(remedy) or "the options"}, as it was made with, or choose another --workdir'
      )

  def _damaged(self, step: int, error) -> Damaged:
    reason = ' '.join(str(error).split())[:300]
    return Damaged(
      f'the checkpoint {self.folder / str(step)} is damaged or does not fit this config ({reason}); '
      '--config.skip_damaged=true goes on from the one before, or choose another --workdir'
    )

  def _set_aside(self, step: int, reason) -> None:
    """By process 0, while no other one reads it; all call this."""
    wait_for_all('a damaged checkpoint was found')
    if jax.process_index() == 0:
      print(f'lavit: {reason}', flush=True)
      aside = self.folder / f'{step}.damaged'
      shutil.rmtree(aside, ignore_errors=True)
      (self.folder / str(step)).rename(aside)
    wait_for_all('a damaged checkpoint is set aside')
    self.manager.reload()


def saved_settings(workdir) -> dict[str, dict]:
  """The settings that the run in `workdir` was trained with, by its last checkpoint; {} where there is none, or none that can be read."""
  steps = [
    path for path in (pathlib.Path(workdir) / 'checkpoints').glob('*') if path.name.isdecimal()
  ]
  if not steps:
    return {}
  last = max(steps, key=lambda path: int(path.name))
  try:
    return json.loads((last / 'config' / 'metadata').read_text()).get('settings', {})
  except (OSError, ValueError, AttributeError):  # damaged: reading it as a whole tells
    return {}


def _leaves(config: dict, prefix: str = '') -> dict:
  """{'optim.learning_rate': 0.1, ...}."""
  found = {}
  for key, value in config.items():
    found |= _leaves(value, f'{prefix}{key}.') if isinstance(value, dict) else {prefix + key: value}
  return found


def _short(value) -> str:
  text = repr(value)
  return text if len(text) <= 60 else f'{text[:57]}...'


class _Manager(ocp.CheckpointManager):
  """Asks nothing about preemption: it would give the step, and JAX has one counter for all who ask, which processes.Interrupt counts up."""

  def reached_preemption(self, step: int) -> bool:
    return False


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
    raise UserError(
      f'the disk is full while saving to {folder}; free some space and start the same command again: {remedy}'
    ) from error
