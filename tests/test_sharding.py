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
def test_mesh_takes_what_is_left(sizes, shape):
  if jax.device_count() == 1:
    assert math.prod(sharding.make_mesh(dict(zip(sharding.AXES, sizes))).shape.values()) == shape


@pytest.mark.parametrize('sizes', [(3, -1, 1), (-1, -1, 1), (2, 1, 1), (0, -1, 1)])
def test_mesh_that_does_not_fit(sizes):
  with pytest.raises(UserError, match=r'mesh: data=.* does not fit \d+ device'):
    sharding.make_mesh(dict(zip(sharding.AXES, sizes)))


def test_specs_are_right_aligned_and_leave_out_what_does_not_divide():
  assert sharding.spec('params/llama/layers/mlp/up/kernel', (32, 64, 128), MESH) == P(
    None, 'fsdp', 'tensor'
  )
  assert sharding.spec('params/llama/layers/mlp/down/kernel', (32, 128, 64), MESH) == P(
    None, 'tensor', 'fsdp'
  )
  assert sharding.spec('params/unet/conv_in/kernel', (3, 3, 4, 320), MESH) == P(
    None, None, 'fsdp', 'tensor'
  )
  assert sharding.spec('params/llama/embedding', (48387, 64), MESH) == P(None, 'fsdp')
  assert sharding.spec('params/vit/norm/scale', (64,), MESH) == P()
  assert sharding.spec('params/conv/kernel', (3, 3, 5, 5), MESH) == P(None, None, None, None)


def test_an_axis_goes_where_it_divides():
  """1408 is no multiple of 256, and each of 256 devices would hold the whole of the merger."""
  wide = AbstractMesh((1, 256, 1), sharding.AXES)
  assert sharding.spec(
    'params/understanding/merger/blocks/mlp/fc1/kernel', (12, 1408, 6144), wide
  ) == P(None, None, 'fsdp')
  assert sharding.spec(
    'params/understanding/merger/blocks/mlp/fc2/kernel', (12, 6144, 1408), wide
  ) == P(None, 'fsdp', None)
  both = AbstractMesh((1, 256, 2), sharding.AXES)  # what another axis of the mesh lies on is taken
  assert sharding.spec(
    'params/understanding/merger/blocks/mlp/fc1/kernel', (12, 1408, 6144), both
  ) == P(None, None, 'tensor')


def test_a_large_leaf_without_a_rule_is_an_error():
  with pytest.raises(ValueError, match='params/new/table .* no row of sharding.RULES names it'):
    sharding.spec('params/new/table', (1024, 1024), MESH)
  assert sharding.spec('params/new/table', (1024, 1023), MESH) == P()


@pytest.fixture(scope='module')
def seven_b():
  return jax.eval_shape(functools.partial(init_params, lavit.build('lavit_7b')), jax.random.key(0))


def test_every_large_leaf_of_the_7b_model_is_split(seven_b):
  """No device of 16 holds more than a share of it, and what everybody holds is next to nothing."""
  held = whole = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(seven_b):
    name = sharding.path_name(path)
    spec = sharding.spec(f'params/{name}', leaf.shape, MESH)
    pieces = math.prod(MESH.shape[axis] for axis in spec if axis)
    held, whole = held + leaf.size / pieces, whole + leaf.size
    if leaf.size >= sharding.LARGE:
      assert pieces >= 4, f'{name} {leaf.shape} {spec}'
  assert held < whole / 7


def test_optimizer_moments_lie_with_their_parameters(seven_b):
  params = {'llama': seven_b['llama']}
  config = optimizer_config(learning_rate=1.0, warmup_steps=1, weight_decay=0.1, clip_norm=1.0)
  state = jax.eval_shape(optimizer.make_optimizer(config, params).init, params)
  specs = {
    sharding.path_name(path): s.spec
    for path, s in jax.tree_util.tree_leaves_with_path(sharding.shardings(state, MESH))
  }
  for moment in ('mu', 'nu'):
    mine = {
      re.sub(f'.*/{moment}/', '', name): spec
      for name, spec in specs.items()
      if f'/{moment}/' in name
    }
    assert mine == {
      sharding.path_name(path): s.spec
      for path, s in jax.tree_util.tree_leaves_with_path(sharding.shardings(params, MESH))
    }
  assert P(None, 'fsdp', 'tensor') in specs.values()


class Chip:
  """One of 2 x 2 of a slice of a TPU, as JAX describes it."""

  platform, device_kind, core_on_chip, process_index = 'tpu', 'TPU v4', 0, 0

  def __init__(self, number, slice_index):
    self.id, self.slice_index, self.coords = number, slice_index, (number % 2, number // 2 % 2, 0)


@pytest.mark.parametrize(
  'slices, sizes, rows',
  [
    (2, (2, -1, 1), [[0] * 4, [1] * 4]),
    (2, (-1, 2, 1), [[0] * 2, [0] * 2, [1] * 2, [1] * 2]),
    (2, (4, 1, 2), [[0] * 2, [0] * 2, [1] * 2, [1] * 2]),
    (4, (4, 2, 2), [[n] * 4 for n in range(4)]),
    (1, (2, 2, 1), [[0] * 2, [0] * 2]),
  ],
)
def test_over_slices_only_data_runs_across(slices, sizes, rows):
  """The chips of one row of `data` are all of one slice, whichever order they are told in."""
  chips = [Chip(n, n // 4) for n in range(4 * slices)]
  mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes)), chips[1::2] + chips[::2])
  assert mesh.axis_names == sharding.AXES and {chip.id for chip in mesh.devices.flat} == set(
    range(4 * slices)
  )
  assert [[chip.slice_index for chip in row.flat] for row in mesh.devices] == rows


@pytest.mark.parametrize('sizes', [(1, -1, 1), (1, 4, 2), (-1, 4, 3)])
def test_slices_that_data_does_not_run_across(sizes):
  chips = [Chip(n, n // 4) for n in range(12 if sizes[2] == 3 else 8)]
  count = len(chips) // 4
  with pytest.raises(
    UserError, match=f'mesh: .* does not fit {count} slices; data must be a multiple of {count}'
  ):
    sharding.make_mesh(dict(zip(sharding.AXES, sizes)), chips)


def test_batches_and_trees_arrive_as_they_were():
  mesh = sharding.make_mesh(dict(data=-1, fsdp=1, tensor=1))
  rows = {'image': np.arange(24 * 8, dtype=np.uint8).reshape(8, 24)}
  batch = sharding.put_batch(rows, mesh, sharding.process_share(mesh, 8))
  assert batch['image'].sharding.spec == sharding.BATCH
  np.testing.assert_array_equal(batch['image'], rows['image'])
  tree = {'fc1': {'kernel': np.ones((4, 2), np.float32)}, 'uncond_embeddings': jnp.zeros((1, 3))}
  jax.tree.map(
    np.testing.assert_array_equal, jax.device_put(tree, sharding.shardings(tree, mesh)), tree
  )


class Device:
  def __init__(self, number, process):
    self.id, self.process_index = number, process


@pytest.mark.parametrize(
  'sizes, processes, rows, index, count',
  [
    ((4, 1, 1), [0, 0, 1, 1], [0, 1, 2, 3], 0, 2),
    ((4, 1, 1), [1, 1, 0, 0], [4, 5, 6, 7], 1, 2),
    ((4, 1, 1), [0, 1, 0, 1], [0, 1, 4, 5], 0, 2),  # as on a pod, whose hosts hold squares of it
    ((2, 1, 2), [0, 1, 2, 3], [0, 1, 2, 3], 0, 2),  # 0 and 1 split `tensor`, not the batch
    ((1, 2, 2), [2, 3, 0, 1], [4, 5, 6, 7], 1, 2),
    ((1, 1, 4), [0, 1, 2, 3], list(range(8)), 0, 1),
  ],
)
def test_a_process_reads_the_rows_that_its_devices_hold(
  monkeypatch, sizes, processes, rows, index, count
):
  held = {}

  class Places:
    def __init__(self, mesh, spec):
      del mesh, spec

    def devices_indices_map(self, shape):
      pieces = np.repeat(np.arange(sizes[0] * sizes[1]), sizes[2])
      step = shape[0] // (sizes[0] * sizes[1])
      held.update(
        {
          Device(i, process): (slice(piece * step, piece * step + step),)
          for i, (piece, process) in enumerate(zip(pieces, processes))
        }
      )
      return held

  monkeypatch.setattr(sharding, 'NamedSharding', Places)
  share = sharding.process_share(None, 8)
  assert (share.rows.tolist(), share.index, share.count) == (rows, index, count)


def test_rows_that_two_processes_hold_in_part(monkeypatch):
  class Places:
    def __init__(self, mesh, spec):
      del mesh, spec

    def devices_indices_map(self, shape):
      del shape
      return {
        Device(i, process): (slice(2 * (i // 2), 2 * (i // 2) + 2),)
        for i, process in enumerate([0, 0, 0, 1, 1, 1])
      }

  monkeypatch.setattr(sharding, 'NamedSharding', Places)
  with pytest.raises(UserError, match='do not fall evenly to the processes'):
    sharding.process_share(None, 6)


EIGHT_DEVICES = """
import sys
import jax, jax.numpy as jnp
from lavit_jax import sharding
from lavit_jax.models import vit

sharding.BATCH_AXES = sys.argv[1].split(',')
mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
model, images = vit.ViT(16, 8, 32, 2, 2, 16, 64, 8), jnp.zeros((8, 16, 16, 3))
params = jax.eval_shape(model.init, jax.random.key(0), images)
params = jax.tree.map(lambda x: jnp.ones(x.shape), params)
params = jax.device_put(params, sharding.shardings(params, mesh))
print('weights', params['params']['blocks']['mlp']['fc1']['kernel'].sharding.spec)
with jax.set_mesh(mesh):
  print('rows a device', jax.jit(model.apply)(params, images).addressable_shards[0].data.shape[0])
"""


@pytest.mark.parametrize('axes, rows', [('data,fsdp', 2), ('nothing,like_it', 8)])
def test_activations_are_split_by_rows_whatever_the_input(axes, rows):
  """The constraint at block boundaries binds: a batch that is whole on every device leaves the blocks split; without it, whole."""
  env = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '--xla_force_host_platform_device_count=8',
    'PYTHONPATH': str(pathlib.Path(lavit.__file__).parents[2]),
  }
  out = subprocess.run(
    [sys.executable, '-c', EIGHT_DEVICES, axes], env=env, capture_output=True, text=True
  )
  assert out.returncode == 0, out.stderr
  assert "(None, 'fsdp', 'tensor')" in out.stdout
  assert f'rows a device {rows}' in out.stdout
