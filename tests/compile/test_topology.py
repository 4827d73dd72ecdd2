"""libtpu's names and options of topologies, and the number of JAX devices of a chip."""

import json
import math
import os
import subprocess
import sys
import types

import pytest

from lavit_jax import accelerators
from lavit_jax.compile import topology as topology_lib
from lavit_jax.errors import UserError


@pytest.mark.parametrize(
  'topology, name, options',
  [
    ('v5e:16x16', 'v5e:16x16', {}),
    ('v5e:1x1', 'v5e:1x1', dict(chips_per_host_bounds=(1, 1, 1))),
    ('v6e:1x2', 'v6e:1x2', dict(chips_per_host_bounds=(1, 2, 1))),
    ('v6e:2x1', 'v6e:2x1', dict(chips_per_host_bounds=(2, 1, 1))),
    ('v4:2x2x4', 'v4:2x2x4', dict(chip_config_name='megacore')),
    ('v5p:4x4x8', 'v5p:4x4x8', dict(chip_config_name='megacore')),
    ('v5p:1x1x1', 'v5p:1x1x1', dict(chip_config_name='megacore', chips_per_host_bounds=(1, 1, 1))),
    ('tpu7x:2x2x1', 'tpu7x:2x2x1', {}),
    ('v7x:2x2x4', 'tpu7x:2x2x4', {}),
  ],
)
def test_names_and_options(topology, name, options):
  assert topology_lib.libtpu_topology(topology)[1:] == (name, options)
  assert topology_lib.libtpu_topology(topology, 2)[2] == {**options, 'num_slices': 2}


@pytest.mark.parametrize(
  'topology', ['v9:2x2', 'v5e', 'v5e:', 'v5e:2', 'v5e:0x2', 'v5e:2x2x2x2', 'v5e:axb', 'tpu7:2x2x1']
)
def test_invalid_topologies_are_refused(topology):
  with pytest.raises(UserError, match='write CHIP:SHAPE such as .*: v4, v5e, v5p, v6e, tpu7x'):
    topology_lib.libtpu_topology(topology)


def test_the_error_advises_to_install_libtpu_only_if_it_is_missing(monkeypatch):
  monkeypatch.setenv('TPU_LIBRARY_PATH', '/there/libtpu.so')

  def refuse(**options):
    raise RuntimeError('not divisible by the\n  bounds')

  monkeypatch.setattr(topology_lib.topologies, 'get_topology_desc', refuse)
  with pytest.raises(UserError, match=r'refuses it \(not divisible by the bounds\);') as refusal:
    topology_lib.pod_devices('v5e:3x3')
  assert 'pip install' not in str(refusal.value)
  monkeypatch.delenv('TPU_LIBRARY_PATH')
  monkeypatch.setattr(topology_lib.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match='libtpu is missing; pip install'):
    topology_lib.pod_devices('v5e:2x2')


def test_a_chip_of_tpu7x_is_two_devices():
  """The MFU is a share of what all devices can do: 2,307 TFLOP/s a chip of two devices."""
  names = 'TPU7x', 'TPU7x', 'TPU v5', 'TPU v4'
  kinds = [types.SimpleNamespace(device_kind=name) for name in names]
  assert accelerators.peak_tflops(kinds[:2]) == 2307
  assert accelerators.peak_tflops(kinds[2:]) == 459 + 275
  half = accelerators.TPUS['tpu7x'].device()
  assert (half.hbm_gib, half.hbm_tbps, half.devices) == (96, 3.69, 1)
  per_chip = topology_lib.devices_per_chip('v7x:4x4x4')
  assert topology_lib.format_device_count(128, per_chip) == '128 devices, 2 a chip'
  per_chip = topology_lib.devices_per_chip('v5p:4x4x4')
  assert topology_lib.format_device_count(64, per_chip) == '64 chips'


LIST_DEVICES = """
import json, sys
from lavit_jax.compile.topology import pod_devices
counts = {}
for topology in sys.argv[1:]:
  _, devices = pod_devices(topology)
  counts[topology] = len(devices), devices[0].device_kind
print(json.dumps(counts))
"""


def test_libtpu_has_these_devices():
  """Runs in a process of its own, since libtpu cannot be unloaded."""
  pytest.importorskip('libtpu')
  expected = {
    'v5e:1x1': (1, 'TPU v5 lite'),
    'v5e:2x2': (4, 'TPU v5 lite'),
    'v6e:1x2': (2, 'TPU v6 lite'),
    'v4:2x2x1': (4, 'TPU v4'),
    'v4:1x1x1': (1, 'TPU v4'),
    'v5p:2x2x2': (8, 'TPU v5'),
    'v5p:1x2x1': (2, 'TPU v5'),
    'tpu7x:2x2x1': (8, 'TPU7x'),
    'v7x:1x1x1': (2, 'TPU7x'),
  }
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'TPU_WORKER_HOSTNAMES': 'localhost'}
  command = [sys.executable, '-c', LIST_DEVICES, *expected]
  process = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
  assert process.returncode == 0, process.stderr
  devices = {name: tuple(value) for name, value in json.loads(process.stdout).items()}
  assert devices == expected
  for topology, (count, kind) in expected.items():
    name, shape = topology_lib.libtpu_topology(topology)[1].split(':')
    num_chips = math.prod(int(side) for side in shape.split('x'))
    assert accelerators.TPUS[name].kind == kind
    assert count == accelerators.TPUS[name].devices * num_chips
