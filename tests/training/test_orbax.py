"""What Orbax would lose without a target: tuples would come back as lists, NamedTuples as dicts."""

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from lavit_jax.training import optim, train_step
from lavit_jax.training.checkpoint import Checkpoints
from lavit_jax.training.codebook import create


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
  options = ConfigDict(dict(
      learning_rate=0.1, warmup_steps=0, final_fraction=1.0, weight_decay=0.1, b1=0.9, b2=0.95,
      mu_dtype='float32', nu_dtype='float32', clip_norm=1.0, freeze=(), lr_scale=()))
  tx = optim.make(options, 10, params)
  _, moments = tx.update(params, tx.init(params), params)
  book = create(jnp.asarray(rng.normal(size=(8, 4)), jnp.float32))
  return train_step.TrainState(jnp.int32(seed), params, moments, (book, ()), {})


def test_a_train_state_comes_back_with_its_types(tmp_path):
  config = ConfigDict(dict(stage='lm', variant='tiny'))
  state = train_state(1)
  checkpoints = Checkpoints(tmp_path, config, keep=1)
  checkpoints.save(1, state, Position())
  checkpoints.wait()
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), train_state(2))
  restored = checkpoints.restore(1, abstract, Position())
  checkpoints.close()
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  assert type(restored) is train_step.TrainState and type(restored.state) is tuple
  assert type(restored.state[0]) is type(state.state[0])
  for found, saved in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
    assert found.dtype == saved.dtype
    np.testing.assert_array_equal(found, saved)
