"""Checkpoints: what is saved comes back, of the same run alone, and a full disk leaves nothing."""

import errno
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from checkpoint_runs import abstract, config, numbers, state
from jax.experimental import multihost_utils
from nano import optimizer_config

from lavit_jax.errors import UserError
from lavit_jax.models import lavit
from lavit_jax.training import optimizer
from lavit_jax.training.checkpoint import Checkpoints


def test_state_and_data_go_on_where_they_were(saved):
  checkpoints = Checkpoints(saved, config(), keep=2)
  data = numbers()
  assert sorted(p.name for p in (saved / 'checkpoints').iterdir()) == ['2', '3']
  assert checkpoints.latest() == 3
  restored = checkpoints.restore(3, abstract(state(0)), data)
  chex.assert_trees_all_equal(restored, state(3))
  np.testing.assert_array_equal(next(data), [12, 13, 14, 15])


def test_small_moments_come_back_as_they_were(tmp_path):
  options = optimizer_config(b2=0.95, mu_dtype='bfloat16', nu_dtype='bfloat16')
  params = {'kernel': jax.random.normal(jax.random.key(0), (8, 8))}
  tx = optimizer.make_optimizer(options, params)
  _, moments = tx.update(params, tx.init(params), params)
  checkpoints = Checkpoints(tmp_path, config(), keep=2)
  data = numbers()
  checkpoints.save(1, moments, data)
  checkpoints.wait()
  restored = checkpoints.restore(1, abstract(moments), data)
  checkpoints.close()
  assert [x.dtype for x in jax.tree.leaves(restored)].count(jnp.bfloat16) == 2
  chex.assert_trees_all_equal(restored, moments)


def test_it_keeps_the_config_and_the_sizes_of_the_variant(saved):
  about = json.loads((saved / 'checkpoints' / '3' / 'config' / 'metadata').read_text())
  assert about['config']['optim']['learning_rate'] == 0.1
  assert about['sizes']['vit']['hidden_size'] == lavit.VARIANTS['tiny']['vit']['hidden_size']


def test_it_asks_nothing_about_preemption(tmp_path, monkeypatch):
  """JAX has one counter for such questions, which `InterruptHandler` increments.

  Orbax would set it to the step, and SIGTERM would be lost.
  """
  queries = []
  monkeypatch.setattr(
    multihost_utils,
    'reached_preemption_sync_point',
    lambda counter: queries.append(counter) or False,
  )
  checkpoints = Checkpoints(tmp_path, config(), keep=2)
  data = numbers()
  next(data)
  checkpoints.save(7, state(7), data)
  checkpoints.close()
  assert not queries and checkpoints.manager.all_steps() == [7]


def test_donated_memory_does_not_reach_the_file(tmp_path):
  """Saving goes on behind the next steps, which write over the memory of the state."""
  step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  checkpoints = Checkpoints(tmp_path, config(), keep=1)
  data = numbers()
  now = {'x': jnp.zeros(1 << 20)}
  checkpoints.save(1, now, data)
  for _ in range(20):
    now = step(now)
  checkpoints.wait()
  assert not checkpoints.restore(
    1, {'x': jax.ShapeDtypeStruct((1 << 20,), jnp.float32, sharding=now['x'].sharding)}, data
  )['x'].any()


def test_half_written_checkpoints_are_ignored_and_cleared(saved):
  half = saved / 'checkpoints' / '4.orbax-checkpoint-tmp-123'
  (half / 'state').mkdir(parents=True)
  checkpoints = Checkpoints(saved, config(), keep=2)
  assert checkpoints.latest() == 3
  assert not half.exists()


@pytest.mark.parametrize(
  'change, message',
  [
    ({'variant': 'small'}, r'lm:tiny, and this run is lm:small; choose another --workdir'),
    ({'stage': 'tokenizer'}, r'lm:tiny, and this run is tokenizer:tiny; choose another --workdir'),
  ],
)
def test_a_checkpoint_of_another_run(saved, change, message):
  with pytest.raises(UserError, match=message):
    Checkpoints(saved, config(**change), keep=2).latest()


def test_a_checkpoint_of_other_sizes(saved, monkeypatch):
  monkeypatch.setitem(lavit.VARIANTS, 'tiny', {**lavit.VARIANTS['tiny'], 'text_vocab_size': 7})
  with pytest.raises(UserError, match='with other sizes than the variants table has now'):
    Checkpoints(saved, config(), keep=2).latest()


def test_a_config_that_changes_the_state_is_refused(saved):
  checkpoints = Checkpoints(saved, config(), keep=2)
  with pytest.raises(
    UserError,
    match=r'checkpoints/3 does not fit this config .1 arrays differ: ema .3..; give the options',
  ):
    checkpoints.restore(3, abstract({**state(0), 'ema': jnp.zeros(3)}), numbers())


def test_changed_options_are_reported(saved):
  """In one line; those that give it other data in another, as a warning."""
  now = config(
    optim={'learning_rate': 0.2, 'clip_norm': 1.0},
    batch_size=4,
    data={'sources': [{'path': 'x' * 80}], 'num_threads': 3},
  )
  others, inexact = Checkpoints(saved, now, keep=2).changes(3)
  assert others == [
    'optim.learning_rate 0.1 -> 0.2',
    'optim.clip_norm None -> 1.0',
    'data.num_threads None -> 3',
  ]
  assert inexact == ['batch_size None -> 4', "data.sources None -> [{'path': '" + 'x' * 46 + '...']
  assert Checkpoints(saved, config(), keep=2).changes(3) == ([], [])


@pytest.mark.parametrize(
  'error',
  [
    OSError(errno.ENOSPC, 'No space left on device'),
    ValueError('UNKNOWN: Error writing "d/1": No space left on device [errno 28]'),
  ],
)
def test_a_full_disk_leaves_nothing_half_written(saved, monkeypatch, error):
  """Whether Python reports it by errno, or TensorStore in its message."""

  async def fail(self, directory, *args, **kwargs):
    (directory / 'half').write_text('half')
    raise error

  checkpoints = Checkpoints(saved, config(), keep=2)
  data = numbers()
  with monkeypatch.context() as patch:
    patch.setattr(ocp.StandardCheckpointHandler, 'async_save', fail)
    with pytest.raises(
      UserError, match=r'disk is full while saving to .*checkpoints; .*: it resumes from step 3'
    ):
      checkpoints.save(4, state(4), data)
      checkpoints.wait()
  checkpoints.close()
  assert sorted(p.name for p in (saved / 'checkpoints').iterdir()) == ['2', '3']
  again = Checkpoints(saved, config(), keep=2)
  assert again.latest() == 3
  chex.assert_trees_all_equal(again.restore(3, abstract(state(0)), data), state(3))


def test_a_disk_that_really_is_full(tmp_path):
  """On a file system of a megabyte, where one can be mounted."""
  import subprocess

  disk = tmp_path / 'disk'
  disk.mkdir()
  if (
    not shutil.which('mount')
    or subprocess.run(
      ['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', disk], capture_output=True
    ).returncode
  ):
    pytest.skip('cannot mount a small file system here')
  try:
    checkpoints = Checkpoints(disk, config(), keep=2)
    data = numbers()
    checkpoints.save(1, state(1), data)
    checkpoints.wait()
    large = {'x': jax.random.normal(jax.random.key(0), (1 << 20,))}
    with pytest.raises(UserError, match='disk is full .* resumes from step 1'):
      checkpoints.save(2, large, data)
      checkpoints.wait()
    assert [p.name for p in (disk / 'checkpoints').iterdir()] == ['1']
    chex.assert_trees_all_equal(checkpoints.restore(1, abstract(state(0)), data), state(1))
  finally:
    subprocess.run(['umount', '-l', disk], check=False)
