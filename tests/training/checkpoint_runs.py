"""Small runs whose checkpoints tests save and restore."""

import grain
import jax
import jax.numpy as jnp

from lavit_jax.data.loader import Batches


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


def flip(file, place=0.5):
  """One bit, in the middle of the file."""
  content = bytearray(file.read_bytes())
  content[int(place * len(content))] ^= 1
  file.write_bytes(content)


def noise(seed):
  return {
    'kernel': jax.random.normal(jax.random.key(seed), (64, 128)),
    'half': jnp.ones((3, 5), jnp.bfloat16) * seed,
    'on': jnp.array(True),
  }
