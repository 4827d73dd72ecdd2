import errno
import json
import shutil
import types
from collections import Counter

import chex
import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import xxhash
from jax.experimental import multihost_utils
from nano import optimizer_config

from lavit_jax.data.loader import Batches
from lavit_jax.errors import UserError
from lavit_jax.models import lavit
from lavit_jax.training import checkpoint, integrity, optimizer
from lavit_jax.training.checkpoint import Checkpoints


def config(**changes):
  return {'stage': 'lm', 'variant': 'tiny', 'optim': {'learning_rate': 0.1}, **changes}


def numbers():
  return Batches(
    lambda first: iter(grain.MapDataset.range(4 * first, 1000).to_iter_dataset().batch(4))
  )


def state(value):
  return {
    'params': {'kernel': jnp.full((4, 3), value, jnp.float32)},
    'step': jnp.array(int(value), jnp.int32),
  }


def abstract(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


@pytest.fixture
def saved(tmp_path):
  """A run with checkpoints of steps 1, 2, 3, of which it keeps two."""
  checkpoints = Checkpoints(tmp_path, config(), keep=2)
  data = numbers()
  for step in (1, 2, 3):
    next(data)
    checkpoints.save(step, state(step), data)
  checkpoints.wait()
  checkpoints.close()
  return tmp_path


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


def flip(file, place=0.5):
  """One bit, in the middle of the file."""
  content = bytearray(file.read_bytes())
  content[int(place * len(content))] ^= 1
  file.write_bytes(content)


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


def noise(seed):
  return {
    'kernel': jax.random.normal(jax.random.key(seed), (64, 128)),
    'half': jnp.ones((3, 5), jnp.bfloat16) * seed,
    'on': jnp.array(True),
  }


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


@pytest.mark.parametrize('page', ['{"stage": ', '{"stage": "lm", "sum": "0"}'])
def test_a_config_that_one_process_alone_cannot_read_is_skipped_at_the_next_start(
  flipped, second_of_two, page
):
  (flipped / 'checkpoints' / '2' / 'config' / 'metadata').write_text(page)
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


def test_digests_see_one_bit_and_an_exchange():
  x = noise(0)['kernel']
  (plain,) = integrity.digests({'x': x}).values()
  bits = x.view(jnp.int32)
  changed = [
    bits.at[63, 127].set(bits[63, 127] ^ 1 << bit).view(jnp.float32) for bit in (0, 30)
  ] + [x[::-1], x.at[:2].set(x[1::-1])]
  assert len({plain, *(integrity.digests({'x': y})['x [64, 128]'] for y in changed)}) == 5


def test_a_position_of_many_processes(saved):
  """It serves any number of them; a missing file, a flipped bit and a contradiction are errors."""

  def restore():
    data = numbers()
    Checkpoints(saved, config(), keep=2).restore(3, abstract(state(0)), data)
    return next(data).tolist()

  (file,) = (saved / 'checkpoints' / '3' / 'data').glob('process_*')
  first, second = (file.with_name(f'process_{i}-of-2.json') for i in range(2))
  file.rename(first)
  with pytest.raises(UserError, match='data holds 1 of 2 positions'):
    restore()
  second.write_text(first.read_text())
  assert restore() == [12, 13, 14, 15]
  text = json.dumps({'batches': 4})
  second.write_text(json.dumps({'state': text, 'sum': xxhash.xxh3_64_hexdigest(text.encode())}))
  with pytest.raises(
    UserError, match='data: the position that one process saved contradicts that of another'
  ):
    restore()
  second.write_text(second.read_text().replace('4', '3'))
  with pytest.raises(UserError, match='process_1-of-2.json is not what was saved'):
    restore()


class Shards:
  """Data of which a process runs some shards."""

  def __init__(self, *shards):
    self.state = {
      'of': {'seed': 1},
      'shards': {str(shard): {'window': [0, shard, 7]} for shard in shards},
    }

  def get_state(self):
    return self.state

  def set_state(self, state):
    self.state = state


def test_every_shard_is_restored_whichever_process_saved_it(tmp_path, monkeypatch):
  """Two processes save, each of which has two shards; others may continue with any of them."""
  handler = integrity.PositionHandler()
  monkeypatch.setattr(integrity.jax, 'process_count', lambda: 2)
  for process, shards in enumerate([(2, 3), (0, 1)]):
    monkeypatch.setattr(integrity.jax, 'process_index', lambda process=process: process)
    handler.save(tmp_path, integrity.PositionSave(Shards(*shards)))
  for count in (1, 2, 4):
    monkeypatch.setattr(integrity.jax, 'process_count', lambda count=count: count)
    for process in range(count):
      monkeypatch.setattr(integrity.jax, 'process_index', lambda process=process: process)
      assert (
        handler.restore(tmp_path, integrity.PositionRestore(Shards())).state
        == Shards(0, 1, 2, 3).state
      )


@pytest.mark.parametrize(
  'states, error, message',
  [
    (
      [Shards(0).state, {**Shards(1).state, 'of': {'seed': 2}}],
      ValueError,
      'it that one process saved contradicts',
    ),
    (
      [Shards(0, 1).state, {'of': {'seed': 1}, 'shards': {'1': {'window': [0, 0, 0]}}}],
      ValueError,
      'it that one process saved contradicts',
    ),
    (
      [{'of': {'processes': 2}, 'tickets': {'window': [0, 0, 0], 'index': i}} for i in range(2)],
      UserError,
      '^it in data.sources was saved by an earlier version, which dealt them to processes, and '
      'cannot be read any more; begin in another --workdir',
    ),
  ],
)
def test_positions_that_are_not_of_one_data_set(states, error, message):
  with pytest.raises(error, match=message):
    integrity.merge_positions(states, 'it')


def test_the_position_of_an_earlier_version(saved):
  (file,) = (saved / 'checkpoints' / '3' / 'data').glob('process_*')
  file.write_text('{"next_index": 12}')
  data = numbers()
  Checkpoints(saved, config(), keep=2).restore(3, abstract(state(0)), data)
  np.testing.assert_array_equal(next(data), [12, 13, 14, 15])


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
      UserError, match=r'disk is full while saving to .*checkpoints; .*: it goes on from step 3'
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
    with pytest.raises(UserError, match='disk is full .* goes on from step 1'):
      checkpoints.save(2, large, data)
      checkpoints.wait()
    assert [p.name for p in (disk / 'checkpoints').iterdir()] == ['1']
    chex.assert_trees_all_equal(checkpoints.restore(1, abstract(state(0)), data), state(1))
  finally:
    subprocess.run(['umount', '-l', disk], check=False)
