"""Damaged checkpoints are reported, set aside on request, and not confused with other runs'."""

import shutil
import types
from collections import Counter

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_runs import abstract, config, flip, noise, numbers, state

from lavit_jax.errors import UserError
from lavit_jax.training import checkpoint
from lavit_jax.training.checkpoint import Checkpoints


@pytest.fixture
def noisy(tmp_path):
  """A run with checkpoints of steps 1 and 2; its numbers do not compress."""
  checkpoints = Checkpoints(tmp_path, config(), keep=2)
  data = numbers()
  for step in (1, 2):
    next(data)
    checkpoints.save(step, noise(step), data)
  checkpoints.close()
  return tmp_path


@pytest.fixture
def flipped(noisy):
  """And the last of them has lost a bit."""
  flip(
    max(
      (noisy / 'checkpoints' / '2' / 'state').rglob('*'),
      key=lambda file: file.is_file() * file.stat().st_size,
    )
  )
  return noisy


def test_a_truncated_checkpoint_is_reported(saved):
  folder = saved / 'checkpoints' / '3' / 'state'
  for file in folder.rglob('*'):
    if file.is_file() and file.stat().st_size > 100:
      file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
  checkpoints = Checkpoints(saved, config(), keep=2)
  with pytest.raises(
    UserError,
    match=r'checkpoints/3 is damaged .*; --config.skip_damaged=true goes on from the one before',
  ):
    checkpoints.restore(checkpoints.latest(), abstract(state(0)), numbers())


def test_a_flipped_bit_is_reported(flipped):
  checkpoints = Checkpoints(flipped, config(), keep=2)
  with pytest.raises(
    UserError,
    match=r'checkpoints/2 is damaged .*; --config.skip_damaged=true goes on from the one before',
  ) as error:
    checkpoints.restore_latest(abstract(noise(0)), numbers())
  assert '\n' not in str(error.value)


def test_on_request_the_checkpoint_before_a_damaged_one_is_used(flipped, capsys):
  checkpoints = Checkpoints(flipped, config(), keep=2)
  data = numbers()
  step, restored = checkpoints.restore_latest(abstract(noise(0)), data, skip_damaged=True)
  assert step == 1 and 'checkpoints/2 is damaged' in capsys.readouterr().out
  chex.assert_trees_all_equal(restored, noise(1))
  np.testing.assert_array_equal(next(data), [4, 5, 6, 7])
  assert sorted(p.name for p in (flipped / 'checkpoints').iterdir()) == ['1', '2.damaged']
  checkpoints.save(2, noise(2), data)
  checkpoints.close()
  assert (
    Checkpoints(flipped, config(), keep=2).restore_latest(
      abstract(noise(0)), numbers(), skip_damaged=True
    )[0]
    == 2
  )


def test_when_all_are_damaged_it_does_not_begin_anew(flipped):
  """Nor when it is started again, by a scheduler; but when nothing of them is left."""
  flip(
    max(
      (flipped / 'checkpoints' / '1' / 'state').rglob('*'),
      key=lambda file: file.is_file() * file.stat().st_size,
    )
  )
  for skip_damaged in (True, True, False):
    with pytest.raises(
      UserError,
      match=r'all checkpoints in .*checkpoints are damaged .1.damaged, 2.damaged.: '
      r'.* another --workdir, or delete',
    ):
      Checkpoints(flipped, config(), keep=2).restore_latest(
        abstract(noise(0)), numbers(), skip_damaged=skip_damaged
      )
  for name in ('1.damaged', '2.damaged'):
    shutil.rmtree(flipped / 'checkpoints' / name)
  data = numbers()
  assert Checkpoints(flipped, config(), keep=2).restore_latest(
    abstract(noise(0)), data, skip_damaged=True
  ) == (0, None)
  np.testing.assert_array_equal(next(data), [0, 1, 2, 3])


@pytest.fixture
def second_of_two(monkeypatch):
  """What the checkpoints' own code sees in process 1 of 2; the barriers that it comes to."""
  barriers = []
  monkeypatch.setattr(
    checkpoint,
    'jax',
    types.SimpleNamespace(process_count=lambda: 2, process_index=lambda: 1, errors=jax.errors),
  )
  monkeypatch.setattr(checkpoint, 'wait_for_all', barriers.append)
  return barriers


def test_only_the_first_process_sets_a_checkpoint_aside(flipped, second_of_two, monkeypatch):
  """The others wait before, for it may not be moved while one reads it, and after."""
  checkpoints = Checkpoints(flipped, config(), keep=2)
  steps = flipped / 'checkpoints'

  def first_process(what):
    second_of_two.append(what)
    if len(second_of_two) == 1:
      assert sorted(p.name for p in steps.iterdir()) == ['1', '2']
    else:
      (steps / '2').rename(steps / '2.damaged')

  monkeypatch.setattr(checkpoint, 'wait_for_all', first_process)
  step, restored = checkpoints.restore_latest(abstract(noise(0)), numbers(), skip_damaged=True)
  assert step == 1 and len(second_of_two) == 2 and (steps / '2.damaged' / 'state').exists()
  chex.assert_trees_all_equal(restored, noise(1))


def test_what_one_process_alone_cannot_read_is_skipped_at_the_next_start(
  saved, second_of_two, monkeypatch, capsys
):
  """The others may be anywhere, so nothing is moved."""
  steps = saved / 'checkpoints'
  file = next((saved / 'checkpoints' / '3' / 'data').glob('process_*'))
  file.write_text(file.read_text().replace('batches', 'botches'))
  with pytest.raises(
    UserError,
    match=r'checkpoints/3 is damaged .*process_0-of-1.json is not what was saved.*; '
    r'start again: it will be skipped',
  ):
    Checkpoints(saved, config(), keep=2).restore_latest(
      abstract(state(0)), numbers(), skip_damaged=True
    )
  assert not second_of_two and sorted(p.name for p in steps.iterdir()) == ['2', '3']
  monkeypatch.undo()
  # This process has no reason to complain.
  file.write_text(file.read_text().replace('botches', 'batches'))
  with monkeypatch.context() as patch:
    # Without the option the mark means nothing.
    patch.setattr(Checkpoints, '_set_aside_damaged', None)
    assert (
      Checkpoints(saved, config(), keep=2).restore_latest(abstract(state(0)), numbers())[0] == 3
    )
  assert (
    Checkpoints(saved, config(), keep=2).restore_latest(
      abstract(state(0)), numbers(), skip_damaged=True
    )[0]
    == 2
  )
  assert 'process_0-of-1.json is not what was saved' in capsys.readouterr().out


def test_a_position_in_other_data_is_no_damage(tmp_path):
  """However many checkpoints are set aside, none would fit."""

  class Other:
    def get_state(self):
      return {'of': 2}

    def set_state(self, state):
      if state != {'of': 2}:
        raise ValueError('other data')

  checkpoints = Checkpoints(tmp_path, config(), keep=2)
  data = numbers()
  checkpoints.save(1, noise(1), data)
  checkpoints.close()
  with pytest.raises(UserError, match='the position in the data is one in other data') as error:
    Checkpoints(tmp_path, config(), keep=2).restore_latest(
      abstract(noise(0)), Other(), skip_damaged=True
    )
  assert type(error.value) is UserError and (tmp_path / 'checkpoints' / '1').exists()


def test_a_damaged_config_is_skipped_too(flipped):
  (flipped / 'checkpoints' / '2' / 'config' / 'metadata').write_text('{"stage": ')
  assert (
    Checkpoints(flipped, config(), keep=2).restore_latest(
      abstract(noise(0)), numbers(), skip_damaged=True
    )[0]
    == 1
  )


def every_flip(folder, of, spare):
  """{outcome: how often} of restoring after one bit was flipped.

  In turn in every `spare`th byte of the files of the last checkpoint that match `of`.
  """
  came = Counter()
  for file in (folder / 'checkpoints' / '2').rglob(of):
    whole = file.read_bytes() if file.is_file() else b''
    for place in range(0, len(whole), spare):
      flip(file, place=place / len(whole))
      checkpoints = Checkpoints(folder, config(), keep=2)
      data = numbers()
      try:
        step, restored = checkpoints.restore_latest(abstract(noise(0)), data)
        chex.assert_trees_all_equal(restored, noise(2))
        assert step == 2 and next(data)[0] == 8
        came['as it was saved'] += 1
      except UserError as error:
        came['reported' if '--config.skip_damaged=true' in str(error) else str(error)] += 1
      checkpoints.close()
      file.write_bytes(whole)
  return came


@pytest.mark.parametrize(
  'of, spare',
  [('config/metadata', 71), ('process_0', 14), pytest.param('*', 16, marks=pytest.mark.slow)],
)
def test_a_bit_flipped_anywhere_is_reported_or_harmless(noisy, of, spare):
  came = every_flip(noisy, of, spare)
  assert set(came) <= {'as it was saved', 'reported'} and came['reported'] > 3


@pytest.mark.parametrize('saved_config', ['{"stage": ', '{"stage": "lm", "sum": "0"}'])
def test_a_config_that_one_process_alone_cannot_read_is_skipped_at_the_next_start(
  flipped, second_of_two, saved_config
):
  (flipped / 'checkpoints' / '2' / 'config' / 'metadata').write_text(saved_config)
  with pytest.raises(UserError, match='start again: it will be skipped'):
    Checkpoints(flipped, config(), keep=2).restore_latest(
      abstract(noise(0)), numbers(), skip_damaged=True
    )
  assert second_of_two == [] and (flipped / 'checkpoints' / '2' / 'damaged-1').exists()


def test_a_checkpoint_that_does_not_fit_is_not_damaged(flipped):
  with pytest.raises(UserError, match='does not fit this config'):
    Checkpoints(flipped, config(), keep=2).restore_latest(
      abstract({**noise(0), 'ema': jnp.zeros(3)}), numbers(), skip_damaged=True
    )
  assert sorted(p.name for p in (flipped / 'checkpoints').iterdir()) == ['1', '2']


@pytest.mark.parametrize('skip_damaged', [False, True])
def test_other_types_are_no_damage(tmp_path, skip_damaged):
  """Orbax would cast, after which no digest is that of what was saved."""

  def moments(dtype):
    return {
      'opt': {'mu': {'kernel': jnp.full((4, 3), 0.1, dtype)}, 'nu': {'kernel': jnp.ones((4, 3))}}
    }

  checkpoints = Checkpoints(
    tmp_path, config(optim={'mu_dtype': 'float32', 'nu_dtype': 'float32'}), keep=2
  )
  data = numbers()
  checkpoints.save(1, moments(jnp.float32), data)
  checkpoints.close()
  checkpoints = Checkpoints(
    tmp_path, config(optim={'mu_dtype': 'bfloat16', 'nu_dtype': 'float32'}), keep=2
  )
  with pytest.raises(
    UserError,
    match=r'checkpoints/1 has other types than this config '
    r'\(1 arrays differ: opt/mu/kernel \[4, 3\] float32, not bfloat16\); '
    r'give --config.optim.mu_dtype=float32, as it was made with, or choose another --workdir',
  ) as error:
    checkpoints.restore_latest(abstract(moments(jnp.bfloat16)), numbers(), skip_damaged)
  assert type(error.value) is UserError and [
    p.name for p in (tmp_path / 'checkpoints').iterdir()
  ] == ['1']
  chex.assert_trees_all_equal(
    checkpoints.restore(1, abstract(moments(jnp.float32)), numbers()),
    moments(jnp.float32),
  )
