"""Checkpoints of a run: train state, position in the data, config and variant, by Orbax.

    WORKDIR/checkpoints/<step>/{state, data, config}

They are written in the background, by each process what its devices hold. A step's folder appears
by a rename when it is complete, and in a store the object `commit_success.txt` appears in it, so a
run that was killed while saving finds the previous one. Restoring all of it makes the next losses
the same, bit for bit, as without the interruption; on another mesh or another number of processes
too, but for the order in which sums are made.

A digest of every array is saved and compared after reading: Orbax would take a flipped bit for a
number.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from lavit_jax.errors import Unreachable, UserError
from lavit_jax.models.lavit import variant_config
from lavit_jax.training import compatibility, integrity
from lavit_jax.training.compatibility import Settings
from lavit_jax.training.distributed import wait_for_all
from lavit_jax.training.workdir import absolute, is_store, open_workdir
from lavit_jax.weights.store.disk import disk_full

# File in a step's folder, of a process that could not read the step; it holds the reason.
DAMAGE_MARK = 'damaged'
DAMAGED = '.damaged'  # suffixes of folders that are set aside
BROKEN = '.broken'
SET_ASIDE = (DAMAGED, BROKEN)
# In errors of TensorStore and gcsfs that say nothing about the content.
NO_ANSWER = re.compile(
  'UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|PERMISSION_DENIED|UNAUTHENTICATED|'
  'aiohttp|ConnectionError|ConnectionReset|Timeout|Forbidden|HttpError'
)
MAX_REASON = 300  # characters of another library's message


class Damaged(UserError):
  """A checkpoint that cannot be used."""


class Checkpoints:
  """The checkpoints of one run.

  Args:
    workdir: holds the folder `checkpoints`.
    config: of the run, as JSON; its stage and variant must be those of earlier checkpoints.
    keep: how many of the latest to keep.
    settings: of the model (models/settings.py), which must be those of earlier checkpoints.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    config: Mapping[str, Any],
    keep: int,
    settings: Settings | None = None,
  ):
    self.folder = absolute(open_workdir(workdir)) / 'checkpoints'
    sizes = json.loads(json.dumps(variant_config(config['variant'])))
    self.identity = dict(stage=config['stage'], variant=config['variant'], sizes=sizes)
    self.settings = settings or {}
    self.config = dict(config)
    with _store_errors(self.folder, 'read'):
      self.clear_half_written()
      self.manager = _Manager(
        self.folder,
        options=ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True),
        item_names=('state', 'data', 'config'),
        item_handlers={
          'state': ocp.StandardCheckpointHandler(),
          'data': integrity.PositionHandler(),
          'config': ocp.JsonCheckpointHandler(),
        },
      )

  # --- What is there ---

  def latest(self) -> int | None:
    """The last complete step, after checking that it is this run's.

    Raises:
      UserError: it belongs to another stage or variant, or was trained with other settings.
    """
    step = self.manager.latest_step()
    if step is not None:
      metadata = self._read_metadata(step)
      compatibility.check_identity(self._path(step), metadata, self.identity)
      compatibility.check_settings(self._path(step), metadata, self.settings)
      compatibility.check_scale(self._path(step), metadata, self.config)
    return step

  def changes(self, step: int) -> tuple[list[str], list[str]]:
    """The options that differ from those with which `step` was saved.

    Returns:
      Two lists of 'key was -> is': the harmless ones, and those that change the next examples.
    """
    return compatibility.config_changes(self.saved_config(step), self.config)

  def saved_config(self, step: int) -> dict[str, Any]:
    """The config with which `step` was saved, as JSON."""
    return self._read_metadata(step)['config']

  # --- Restoring ---

  def restore_latest(
    self, abstract: Any, batches: Any, skip_damaged: bool = False
  ) -> tuple[int, Any]:
    """`restore` of the last step.

    Args:
      abstract: see `restore`.
      batches: see `restore`.
      skip_damaged: a damaged checkpoint is renamed to STEP.damaged, and the one before is taken.

    Returns:
      (step, train state); (0, None) if there never was a checkpoint.

    Raises:
      UserError: as `latest` and `restore`; or all checkpoints were damaged.
    """
    while (step := self.manager.latest_step()) is not None:
      marks = sorted(self._path(step).glob(f'{DAMAGE_MARK}-*'))
      if skip_damaged and marks:
        self._set_aside_damaged(step, marks[0].read_text())
        continue
      try:
        self.latest()
        return step, self.restore(step, abstract, batches)
      except Damaged as error:
        if not skip_damaged:
          raise
        if jax.process_count() > 1 and error.__cause__:
          # Perhaps this process alone could not read it, and the others wait elsewhere.
          mark = self._path(step) / f'{DAMAGE_MARK}-{jax.process_index()}'
          mark.write_text(str(error))
          raise UserError(f'{error}; start again: it will be skipped') from error
        self._set_aside_damaged(step, str(error))
    damaged = sorted(path.name for path in self.folder.glob(f'*{DAMAGED}'))
    if damaged:
      raise UserError(
        f'all checkpoints in {self.folder} are damaged ({", ".join(damaged)}): there is nothing to '
        'go on from; begin in another --workdir, or delete these to begin anew in this one'
      )
    return 0, None

  def restore(self, step: int, abstract: Any, batches: Any) -> Any:
    """Restores a step.

    Args:
      step: its number.
      abstract: the train state as ShapeDtypeStructs with shardings.
      batches: an iterator over the data, which is moved to its position.

    Returns:
      The train state.

    Raises:
      Damaged: it cannot be read, or is not what was saved.
      Unreachable: its store does not answer.
      UserError: it has other arrays or types than `abstract`, or its position is one in other data.
    """
    digests = self._read_metadata(step).get('digests')  # earlier versions saved none
    if digests:
      compatibility.check_names(self._path(step), set(digests), set(integrity.names(abstract)))
    self._check_types(step, integrity.types(abstract))
    items = ocp.args.Composite(
      state=ocp.args.StandardRestore(abstract), data=integrity.PositionRestore(batches)
    )
    try:
      state = self.manager.restore(step, args=items)['state']
    except (UserError, MemoryError, jax.errors.JaxRuntimeError):
      raise
    except Exception as error:  # of many kinds, depending on where Orbax meets the damage
      raise self._unreadable(step, error) from error
    if digests:
      now = integrity.digests(state)
      wrong = [name for name in now if digests[name] != now[name]]
      if wrong:
        reason = f'{len(wrong)} of {len(digests)} arrays are not what was saved'
        raise self._unreadable(step, f'{reason}: {", ".join(wrong[:3])}')
    return state

  # --- Saving ---

  def save(self, step: int, state: Any, batches: Any) -> None:
    """Begins to save; the arrays are copied before it returns, the files are written later.

    Args:
      step: its number.
      state: the train state.
      batches: the iterator over the data, whose position is saved.

    Raises:
      UserError: the disk is full, now or while the previous checkpoint was written. Nothing
        half-written stays.
    """
    metadata = {
      **self.identity,
      'settings': self.settings,
      'config': self.config,
      'digests': integrity.digests(state),
    }
    items = ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      data=integrity.PositionSave(batches),
      config=ocp.args.JsonSave({**metadata, 'sum': integrity.checksum(metadata)}),
    )
    with _SavingErrors(self):
      self.manager.save(step, args=items)

  def check(self) -> None:
    """Raises the error of writing in the background, if there was one."""
    with _SavingErrors(self):
      self.manager.check_for_errors()

  def wait(self) -> None:
    """Returns when everything is on the disk."""
    with _SavingErrors(self):
      self.manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and ends the background threads."""
    with _SavingErrors(self):
      self.manager.close()

  def clear_half_written(self) -> None:
    """Deletes what a killed or failed save left; it never became a step."""
    if jax.process_index() == 0 and self.folder.exists():
      for path in self.folder.iterdir():
        if path.suffix not in SET_ASIDE and ocp.utils.is_tmp_checkpoint(path):
          with contextlib.suppress(OSError):
            path.rmtree(missing_ok=True)

  def set_aside_broken(self, first: int) -> list[int]:
    """Renames the checkpoints from step `first` on to STEP.broken; all processes call this.

    The run then continues from the one before.

    Returns:
      Their steps.
    """
    self.wait()
    steps = [step for step in self.manager.all_steps(read=True) if step >= first]
    wait_for_all('broken checkpoints are known')
    if jax.process_index() == 0:
      for step in steps:
        self._rename(step, BROKEN)
    wait_for_all('broken checkpoints are set aside')
    self.manager.reload()
    return steps

  # --- Metadata ---

  def _path(self, step: int) -> epath.Path:
    return self.folder / str(step)

  def _read_metadata(self, step: int) -> dict[str, Any]:
    try:
      items = ocp.args.Composite(config=ocp.args.JsonRestore())
      metadata = self.manager.restore(step, args=items)['config']
      checksum = metadata.pop('sum', None)  # earlier versions saved none
      if checksum and checksum != integrity.checksum(metadata):
        raise ValueError('its config is not what was saved')
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
      raise self._unreadable(step, error) from error
    return metadata

  def _check_types(self, step: int, expected: Mapping[str, str]) -> None:
    """Raises UserError where the saved arrays have other types.

    Orbax would cast them, and the digests would then report damage.
    """
    try:
      saved = integrity.types(self.manager.item_metadata(step)['state'].tree)
    except Exception:  # of many kinds, of a damaged one; reading the arrays reports it
      return
    if any(saved.get(name, dtype) != dtype for name, dtype in expected.items()):
      before = self.saved_config(step)
      raise compatibility.types_error(self._path(step), saved, expected, before, self.config)

  # --- Damage ---

  def _unreadable(self, step: int, reason: Exception | str) -> UserError:
    """The error for a checkpoint that cannot be read: damaged, if its store answers."""
    if is_store(self.folder) and NO_ANSWER.search(f'{type(reason)} {reason}'):
      return _no_answer(self.folder, 'read', reason)
    text = ' '.join(str(reason).split())[:MAX_REASON]
    return Damaged(
      f'the checkpoint {self._path(step)} is damaged or does not fit this config ({text}); '
      '--config.skip_damaged=true goes on from the one before, or choose another --workdir'
    )

  def _set_aside_damaged(self, step: int, reason: str) -> None:
    """Renames a checkpoint while no process reads it; all processes call this."""
    wait_for_all('a damaged checkpoint was found')
    if jax.process_index() == 0:
      print(f'lavit: {reason}', flush=True)
      self._rename(step, DAMAGED)
    wait_for_all('a damaged checkpoint is set aside')
    self.manager.reload()

  def _rename(self, step: int, suffix: str) -> None:
    target = self.folder / f'{step}{suffix}'
    target.rmtree(missing_ok=True)
    self._path(step).rename(target)


def saved_settings(workdir: str | os.PathLike[str]) -> Settings:
  """The settings that the run in `workdir` was trained with, by its last checkpoint.

  {} where there is none, or none that can be read.
  """
  folder = open_workdir(workdir) / 'checkpoints'
  with _store_errors(folder, 'read'):
    steps = [path for path in folder.glob('*') if path.name.isdecimal() and _is_whole(path)]
  if not steps:
    return {}
  last = max(steps, key=lambda path: int(path.name))
  try:
    return json.loads((last / 'config' / 'metadata').read_text()).get('settings', {})
  except (OSError, ValueError, AttributeError):  # restoring it reports the damage
    return {}


class _Manager(ocp.CheckpointManager):
  """Does not ask whether the job is preempted.

  It would ask with the step, and JAX has one counter for all who ask, which `InterruptHandler`
  increments.
  """

  def reached_preemption(self, step: int) -> bool:
    return False


def _is_whole(step: epath.Path) -> bool:
  return not is_store(step) or ocp.utils.is_checkpoint_finalized(step)


@contextlib.contextmanager
def _store_errors(folder: epath.Path, done: str) -> Iterator[None]:
  """Turns errors about a folder of a store, which are of many kinds, into Unreachable."""
  try:
    yield
  except Exception as error:
    if isinstance(error, UserError) or not is_store(folder):
      raise
    raise _no_answer(folder, done, error) from error


def _no_answer(folder: epath.Path, done: str, reason: Exception | str) -> Unreachable:
  text = ' '.join(str(reason).split())[:MAX_REASON] or type(reason).__name__
  return Unreachable(
    f'{folder} cannot be {done} ({text}); see to the network and to the permissions, '
    'storage.buckets.get among them, and start the same command again: it goes on from the last '
    'checkpoint'
  )


class _SavingErrors:
  """Turns a full disk and errors of a store into UserErrors.

  What was half-written on a full disk is cleared away. TensorStore reports a full disk in its
  message, not by errno.
  """

  def __init__(self, checkpoints: Checkpoints):
    self.checkpoints = checkpoints

  def __enter__(self):
    return self

  def __exit__(self, kind, error, traceback):
    if not disk_full(error):
      if isinstance(error, Exception) and is_store(self.checkpoints.folder):
        with _store_errors(self.checkpoints.folder, 'written'):
          raise error
      return False
    self.checkpoints.clear_half_written()
    steps = self.checkpoints.manager.all_steps(read=True)
    remedy = f'it resumes from step {max(steps)}' if steps else 'it restarts from step 0'
    raise UserError(
      f'the disk is full while saving to {self.checkpoints.folder}; free some space and start the '
      f'same command again: {remedy}'
    ) from error
