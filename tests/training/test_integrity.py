"""Digests of arrays, and positions in the data of several processes."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import xxhash
from checkpoint_runs import abstract, config, noise, numbers, state

from lavit_jax.errors import UserError
from lavit_jax.training import integrity
from lavit_jax.training.checkpoint import Checkpoints


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
