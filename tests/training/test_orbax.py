"""What Orbax would lose without a target: tuples would come back as lists, NamedTuples as dicts."""

import jax
import jax.numpy as jnp
import numpy as np
from nano import optimizer_config

from lavit_jax.training import optimizer, train_step
from lavit_jax.training.checkpoint import Checkpoints
from lavit_jax.training.codebook import init_codebook


class Position:
  """The data of a run that reads none."""

  def get_state(self):
    return {}

  def set_state(self, state):
    assert state == {}


def train_state(seed: int) -> train_step.TrainState:
  """A state with all that stages carry: NamedTuples within tuples, empty ones, a codebook."""
  rng = np.random.default_rng(seed)
  params = {'w': jnp.asarray(rng.normal(size=(4, 4)), jnp.float32)}
  options = optimizer_config(weight_decay=0.1, b2=0.95, clip_norm=1.0)
  tx = optimizer.make_optimizer(options, params)
  _, moments = tx.update(params, tx.init(params), params)
  book = init_codebook(jnp.asarray(rng.normal(size=(8, 4)), jnp.float32))
  return train_step.TrainState(jnp.int32(seed), params, moments, (book, ()), {})


def test_a_train_state_comes_back_with_its_types(tmp_path):
  config = dict(stage='lm', variant='tiny')
  state = train_state(1)
  checkpoints = Checkpoints(tmp_path, config, keep=1)
  checkpoints.save(1, state, Position())
  checkpoints.wait()
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), train_state(2)
  )
  restored = checkpoints.restore(1, abstract, Position())
  checkpoints.close()
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  assert type(restored) is train_step.TrainState and type(restored.state) is tuple
  assert type(restored.state[0]) is type(state.state[0])
  for loaded, saved in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
    assert loaded.dtype == saved.dtype
    np.testing.assert_array_equal(loaded, saved)
