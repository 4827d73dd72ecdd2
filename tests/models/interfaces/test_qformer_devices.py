"""The first stage of the Q-Former on eight devices and on one: the same losses and gradients."""

import os
import pathlib
import subprocess
import sys

import pytest

from lavit_jax.models import lavit

PROGRAM = """
import functools
import jax
import jax.numpy as jnp
import numpy as np
from lavit_jax import sharding
from lavit_jax.models.interfaces.qformer_pretraining import QFormerPretraining

assert jax.device_count() == 8
module = QFormerPretraining(
  num_queries=2, hidden_size=8, num_layers=2, num_heads=2, mlp_dim=8, vocab_size=20, output_dim=4
)
rng = np.random.default_rng(0)
batch = dict(
  features=rng.standard_normal((8, 3, 6), np.float32),
  text=rng.integers(1, 19, (8, 4)).astype(np.int32),
  text_mask=np.arange(4) < rng.integers(2, 5, 8)[:, None],
  negative_keys=jax.random.split(jax.random.key(1), (8, 2)),
)
batch = {name: jnp.asarray(x) for name, x in batch.items()}
init = functools.partial(module.init, decode_id=19)
params = jax.eval_shape(init, jax.random.key(0), **batch)
params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), jnp.float32), params)
params['params']['temperature'] = jnp.asarray(0.3)

def total(params, batch):
  losses = module.apply(params, **batch, decode_id=19)
  return losses.total, losses

def run(batch):
  return jax.jit(jax.grad(total, has_aux=True))(params, batch)

on_one = run(batch)
mesh = sharding.make_mesh(dict(data=4, fsdp=2, tensor=1))
rows = jax.sharding.NamedSharding(mesh, sharding.BATCH)
with jax.set_mesh(mesh):
  split = jax.device_put(batch, rows)
  assert split['features'].addressable_shards[0].data.shape[0] == 1
  on_eight = run(split)

def distance(x, y):
  return np.abs(np.asarray(x) - np.asarray(y)).max()

difference = jax.tree.map(distance, on_one, on_eight)
print('gradient', max(np.abs(leaf).max() for leaf in jax.tree.leaves(on_one[0])))
print('losses', *on_one[1])
print('difference', max(jax.tree.leaves(difference)))
"""


@pytest.mark.slow
def test_all_devices_share_their_negatives():
  env = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count=8',
    'PYTHONPATH': str(pathlib.Path(lavit.__file__).parents[2]),
  }
  out = subprocess.run([sys.executable, '-c', PROGRAM], env=env, capture_output=True, text=True)
  assert out.returncode == 0, out.stderr
  found = dict(line.split(' ', 1) for line in out.stdout.splitlines())
  assert float(found['gradient']) > 0.1
  # ITC of a device's own row would be log(1) = 0.
  assert float(found['losses'].split()[0]) > 0.5
  # Only the order of sums differs; the loss is a sum of some hundred terms of about 1.
  assert float(found['difference']) < 1e-5
