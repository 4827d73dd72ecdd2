"""Two processes of two devices each load a checkpoint onto one mesh; the first alone writes."""

import os
import socket
import subprocess
import sys

import jax
import nano
import numpy as np

from lavit_jax.models import lavit
from lavit_jax.models.initialization import init_params
from lavit_jax.weights.store.folder import load_params, save_params

CHILD = """
import itertools, sys, pathlib
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
address, index, folder = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
jax.distributed.initialize(address, 2, index)
from lavit_jax.weights.store import arrays as leaves
from lavit_jax.weights.store.folder import load_params, save_params
import nano
nano.install()
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ('x', 'y'))
specs = itertools.cycle([
  P(), P('x'), P('y'), P(None, 'x'), P(None, 'y'), P('x', 'y'), P('y', 'x'), P(None, ('x', 'y')),
  P(None, None, 'x'),
])
leaves.CHUNK_BYTES = 1000  # several stretches a leaf

def shardings(tree):
  def divides(spec, shape):
    return len(spec) <= len(shape) and not any(
      size % 4 for size, axis in zip(shape, spec) if axis
    )

  def sharding(x):
    return NamedSharding(mesh, next(spec for spec in specs if divides(spec, x.shape)))
  return jax.tree.map(sharding, tree)

whole = load_params(folder / 'model', ['llama'])['llama']
sharded = load_params(folder / 'model', ['llama'], shardings=shardings)['llama']
seen = set()
for x, expected in zip(jax.tree.leaves(sharded), jax.tree.leaves(whole), strict=True):
  assert x.shape == expected.shape and len(x.sharding.device_set) == 4
  seen.add(str(x.sharding.spec))
  for shard in x.addressable_shards:
    np.testing.assert_array_equal(shard.data, expected[shard.index])
if index == 0:
  save_params(folder / 'again', 'nano', {'llama': whole})
else:
  try:
    save_params(folder / 'never', 'nano', {'llama': whole})
  except ValueError as error:
    assert 'process 0 writes' in str(error)
  else:
    raise AssertionError('process 1 wrote')
print('ok', len(jax.devices()), len(jax.local_devices()), len(seen))
"""


def test_two_processes(tmp_path):
  rng = np.random.default_rng(0)
  nano.install()
  shapes = jax.eval_shape(lambda: init_params(lavit.build('nano'), jax.random.key(0), ('llama',)))
  params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
  save_params(tmp_path / 'model', 'nano', params)
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    address = '127.0.0.1:%d' % free.getsockname()[1]
  environment = os.environ | dict(
    XLA_FLAGS='--xla_force_host_platform_device_count=2',
    JAX_PLATFORMS='cpu',
    PYTHONPATH=os.pathsep.join([str(nano.ROOT), str(nano.ROOT / 'tests' / 'training')]),
  )
  children = [
    subprocess.Popen(
      [sys.executable, '-c', CHILD, address, str(index), str(tmp_path)],
      env=environment,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
    )
    for index in range(2)
  ]
  try:
    outputs = [child.communicate(timeout=120) for child in children]
  finally:
    for child in children:
      child.kill()
  assert [child.returncode for child in children] == [0, 0], outputs
  for out, _ in outputs:
    word, devices, local, seen = out.splitlines()[-1].split()
    assert (word, devices, local) == ('ok', '4', '2') and int(seen) > 4
  jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path / 'again'), params)
  assert {file.name for file in tmp_path.iterdir()} == {'model', 'again'}
