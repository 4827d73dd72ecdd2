"""Meshes, specs of parameters and optimizer state, and batches over processes."""

import functools
import math
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from nano import optimizer_config

from lavit_jax import sharding
from lavit_jax.errors import UserError
from lavit_jax.models import lavit
from lavit_jax.models.initialization import init_params
from lavit_jax.training import optimizer

MESH = AbstractMesh((2, 4, 2), sharding.AXES)


@pytest.mark.parametrize('sizes, shape', [((-1, 1, 1), 1), ((1, -1, 1), 1), ((1, 1, 1), 1)])
def test_one_size_takes_the_remaining_devices(sizes, shape):
  if jax.device_count() == 1:
    assert math.prod(sharding.make_mesh(dict(zip(sharding.AXES, sizes))).shape.values()) == shape


@pytest.mark.parametrize('sizes', [(3, -1, 1), (-1, -1, 1), (2, 1, 1), (0, -1, 1)])
def test_mesh_that_does_not_fit(sizes):
  with pytest.raises(UserError, match=r'mesh: data=.* does not fit \d+ device'):
    sharding.make_mesh(dict(zip(sharding.AXES, sizes)))


@pytest.mark.parametrize(
  'name, shape, expected',
  [
    ('params/llama/layers/mlp/up/kernel', (32, 64, 128), P(None, 'fsdp', 'tensor')),
    ('params/llama/layers/mlp/down/kernel', (32, 128, 64), P(None, 'tensor', 'fsdp')),
    ('params/unet/conv_in/kernel', (3, 3, 4, 320), P(None, None, 'fsdp', 'tensor')),
    ('params/llama/embedding', (48387, 64), P(None, 'fsdp')),
    ('params/vit/norm/scale', (64,), P()),
    ('params/conv/kernel', (3, 3, 5, 5), P(None, None, None, None)),
  ],
)
def test_specs_are_right_aligned_and_omit_axes_that_do_not_divide(name, shape, expected):
  assert sharding.spec(name, shape, MESH) == expected


@pytest.mark.parametrize(
  'layer, shape, mesh_shape, expected',
  [
    ('fc1', (12, 1408, 6144), (1, 256, 1), P(None, None, 'fsdp')),
    ('fc2', (12, 6144, 1408), (1, 256, 1), P(None, 'fsdp', None)),
    # A dimension that another axis of the mesh splits is not available.
    ('fc1', (12, 1408, 6144), (1, 256, 2), P(None, None, 'tensor')),
  ],
)
def test_an_axis_moves_to_a_dimension_that_it_divides(layer, shape, mesh_shape, expected):
  """1408 is no multiple of 256; otherwise each of 256 devices would store the whole merger."""
  mesh = AbstractMesh(mesh_shape, sharding.AXES)
  name = f'params/understanding/merger/blocks/mlp/{layer}/kernel'
  assert sharding.spec(name, shape, mesh) == expected


def test_a_large_leaf_without_a_rule_is_an_error():
  with pytest.raises(ValueError, match='params/new/table .* no rule of sharding.RULES matches it'):
    sharding.spec('params/new/table', (1024, 1024), MESH)
  assert sharding.spec('params/new/table', (1024, 1023), MESH) == P()


@pytest.fixture(scope='module')
def seven_b():
  return jax.eval_shape(functools.partial(init_params, lavit.build('lavit_7b')), jax.random.key(0))


def test_every_large_leaf_of_the_7b_model_is_split(seven_b):
  """A device of 16 stores only a share of the model, with few copied parameters."""
  stored = 0
  total = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(seven_b):
    name = sharding.path_name(path)
    spec = sharding.spec(f'params/{name}', leaf.shape, MESH)
    pieces = math.prod(MESH.shape[axis] for axis in spec if axis)
    stored += leaf.size / pieces
    total += leaf.size
    if leaf.size >= sharding.LARGE:
      assert pieces >= 4, f'{name} {leaf.shape} {spec}'
  assert stored < total / 7


def leaf_specs(tree):
  """{path: spec} of the shardings of a tree."""
  leaves = jax.tree_util.tree_leaves_with_path(sharding.shardings(tree, MESH))
  return {sharding.path_name(path): leaf.spec for path, leaf in leaves}


def test_optimizer_moments_are_split_as_their_parameters(seven_b):
  params = {'llama': seven_b['llama']}
  config = optimizer_config(learning_rate=1.0, warmup_steps=1, weight_decay=0.1, clip_norm=1.0)
  state = jax.eval_shape(optimizer.make_optimizer(config, params).init, params)
  specs = leaf_specs(state)
  for moment in ('mu', 'nu'):
    of_moment = {}
    for name, spec in specs.items():
      if f'/{moment}/' in name:
        of_moment[re.sub(f'.*/{moment}/', '', name)] = spec
    assert of_moment == leaf_specs(params)
  assert P(None, 'fsdp', 'tensor') in specs.values()


class Chip:
  """One of 2 x 2 of a slice of a TPU, as JAX describes it."""

  platform = 'tpu'
  device_kind = 'TPU v4'
  core_on_chip = 0
  process_index = 0

  def __init__(self, number, slice_index):
    self.id = number
    self.slice_index = slice_index
    self.coords = (number % 2, number // 2 % 2, 0)


@pytest.mark.parametrize(
  'slices, sizes, slices_by_data',
  [
    (2, (2, -1, 1), [[0] * 4, [1] * 4]),
    (2, (-1, 2, 1), [[0] * 2, [0] * 2, [1] * 2, [1] * 2]),
    (2, (4, 1, 2), [[0] * 2, [0] * 2, [1] * 2, [1] * 2]),
    (4, (4, 2, 2), [[n] * 4 for n in range(4)]),
    (1, (2, 2, 1), [[0] * 2, [0] * 2]),
  ],
)
def test_over_slices_only_data_runs_across(slices, sizes, slices_by_data):
  """The chips at one index of `data` are in one slice, in whatever order they are listed."""
  chips = [Chip(n, n // 4) for n in range(4 * slices)]
  mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes)), chips[1::2] + chips[::2])
  assert mesh.axis_names == sharding.AXES
  assert {chip.id for chip in mesh.devices.flat} == set(range(4 * slices))
  slice_index = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
  assert slice_index.reshape(len(mesh.devices), -1).tolist() == slices_by_data


@pytest.mark.parametrize('sizes', [(1, -1, 1), (1, 4, 2), (-1, 4, 3)])
def test_slices_that_data_does_not_run_across(sizes):
  chips = [Chip(n, n // 4) for n in range(12 if sizes[2] == 3 else 8)]
  count = len(chips) // 4
  message = f'mesh: .* does not fit {count} slices; data must be a multiple of {count}'
  with pytest.raises(UserError, match=message):
    sharding.make_mesh(dict(zip(sharding.AXES, sizes)), chips)


def test_batches_and_trees_keep_their_values():
  mesh = sharding.make_mesh(dict(data=-1, fsdp=1, tensor=1))
  rows = {'image': np.arange(24 * 8, dtype=np.uint8).reshape(8, 24)}
  batch = sharding.put_batch(rows, mesh, sharding.process_share(mesh, 8))
  assert batch['image'].sharding.spec == sharding.BATCH
  np.testing.assert_array_equal(batch['image'], rows['image'])
  tree = {'fc1': {'kernel': np.ones((4, 2), np.float32)}, 'uncond_embeddings': jnp.zeros((1, 3))}
  on_devices = jax.device_put(tree, sharding.shardings(tree, mesh))
  jax.tree.map(np.testing.assert_array_equal, on_devices, tree)


def test_a_batch_with_missing_rows_is_an_error():
  mesh = sharding.make_mesh(dict(data=-1, fsdp=1, tensor=1))
  batch = {'image': np.zeros((8, 3)), 'caption': np.zeros((7, 3))}
  with pytest.raises(AssertionError):
    sharding.put_batch(batch, mesh, sharding.process_share(mesh, 8))


class Device:
  """A device of some process."""

  def __init__(self, number, process):
    self.id = number
    self.process_index = process


def fake_sharding(indices):
  """A class in place of NamedSharding with `indices` [(process, rows)] of its devices."""

  class FakeSharding:
    def __init__(self, mesh, spec):
      del mesh, spec

    def devices_indices_map(self, shape):
      del shape
      devices = enumerate(indices)
      return {Device(i, process): (rows,) for i, (process, rows) in devices}

  return FakeSharding


@pytest.mark.parametrize(
  'sizes, processes, rows, index, count',
  [
    ((4, 1, 1), [0, 0, 1, 1], [0, 1, 2, 3], 0, 2),
    ((4, 1, 1), [1, 1, 0, 0], [4, 5, 6, 7], 1, 2),
    ((4, 1, 1), [0, 1, 0, 1], [0, 1, 4, 5], 0, 2),  # as on a pod, whose hosts have squares of it
    ((2, 1, 2), [0, 1, 2, 3], [0, 1, 2, 3], 0, 2),  # 0 and 1 split `tensor`, not the batch
    ((1, 2, 2), [2, 3, 0, 1], [4, 5, 6, 7], 1, 2),
    ((1, 1, 4), [0, 1, 2, 3], list(range(8)), 0, 1),
  ],
)
def test_a_process_reads_the_rows_of_its_devices(monkeypatch, sizes, processes, rows, index, count):
  data, fsdp, tensor = sizes
  step = 8 // (data * fsdp)
  pieces = np.repeat(np.arange(data * fsdp), tensor)
  indices = [
    (process, slice(piece * step, piece * step + step)) for piece, process in zip(pieces, processes)
  ]
  monkeypatch.setattr(sharding, 'NamedSharding', fake_sharding(indices))
  share = sharding.process_share(None, 8)
  assert (share.rows.tolist(), share.index, share.count) == (rows, index, count)


def test_processes_with_some_rows_in_common_are_an_error(monkeypatch):
  indices = []
  for i, process in enumerate([0, 0, 0, 1, 1, 1]):
    first = 2 * (i // 2)
    indices.append((process, slice(first, first + 2)))
  monkeypatch.setattr(sharding, 'NamedSharding', fake_sharding(indices))
  with pytest.raises(UserError, match='do not fall evenly to the processes'):
    sharding.process_share(None, 6)


EIGHT_DEVICES = """
import sys
import jax, jax.numpy as jnp
from lavit_jax import sharding
from lavit_jax.models import vit

sharding.BATCH_AXES = sys.argv[1].split(',')
mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
model = vit.ViT(16, 8, 32, 2, 2, 16, 64, 8)
images = jnp.zeros((8, 16, 16, 3))
params = jax.eval_shape(model.init, jax.random.key(0), images)
params = jax.tree.map(lambda x: jnp.ones(x.shape), params)
params = jax.device_put(params, sharding.shardings(params, mesh))
print('weights', params['params']['blocks']['mlp']['fc1']['kernel'].sharding.spec)
with jax.set_mesh(mesh):
  print('rows per device', jax.jit(model.apply)(params, images).addressable_shards[0].data.shape[0])
"""


@pytest.mark.parametrize('axes, rows', [('data,fsdp', 2), ('nothing,like_it', 8)])
def test_activations_are_split_by_rows_whatever_the_input(axes, rows):
  """A batch that is whole on every device leaves the blocks split by the constraint between them.

  Without the constraint, it leaves them whole.
  """
  env = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count=8',
    'PYTHONPATH': str(pathlib.Path(lavit.__file__).parents[2]),
  }
  out = subprocess.run(
    [sys.executable, '-c', EIGHT_DEVICES, axes], env=env, capture_output=True, text=True
  )
  assert out.returncode == 0, out.stderr
  assert "(None, 'fsdp', 'tensor')" in out.stdout
  assert f'rows per device {rows}' in out.stdout
