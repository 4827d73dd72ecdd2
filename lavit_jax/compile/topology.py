"""Devices of TPU pods that the machine does not have.

libtpu compiles on any CPU host for a topology given by name. A device here is a JAX device: a
chip, except on tpu7x, where it is half of one.
"""

from __future__ import annotations

import importlib.util
import os
import re
from typing import Any

from jax.experimental import topologies

from lavit_jax.accelerators import TPUS, Chip
from lavit_jax.errors import UserError

# The two cores of these chips are one JAX device. Without this option v4 chips are two devices.
_MEGACORE_CHIPS = ('v4', 'v5p')
_ALIASES = {'v7x': 'tpu7x'}  # libtpu knows this chip by the longer name alone
_HOST_BOUNDS = (2, 2, 1)  # the chips of one host, which libtpu assumes


def pod_devices(topology: str, slices: int = 1) -> tuple[Chip, list[Any]]:
  """The devices of one or more pods.

  Args:
    topology: CHIP:SHAPE such as 'v5e:16x16'.
    slices: the number of pods of that topology.

  Returns:
    (the figures of one device, all devices).

  Raises:
    UserError: there is no such chip or topology, or libtpu is missing.
  """
  kind, name, options = libtpu_topology(topology, slices)
  # Otherwise libtpu queries the metadata of the pod that it expects to run on.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  # No chip is in use, so several processes may compile at once.
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  if importlib.util.find_spec('libtpu') is None and 'TPU_LIBRARY_PATH' not in os.environ:
    raise UserError(
      f"--topology {topology}: libtpu is missing; pip install -e '.[tpu]' -c launch/constraints.txt"
    )
  try:
    description = topologies.get_topology_desc(platform='tpu', topology_name=name, **options)
  except Exception as error:  # libtpu raises errors of several types
    reason = ' '.join(str(error).split())[:300]
    raise UserError(
      f'--topology {topology}: libtpu refuses it ({reason}); choose a shape in which such chips '
      'are available'
    ) from error
  return TPUS[kind].device(), list(description.devices)


def libtpu_topology(topology: str, slices: int = 1) -> tuple[str, str, dict[str, Any]]:
  """Translates a topology into libtpu's terms.

  Args:
    topology: CHIP:SHAPE such as 'v7x:2x2x1'.
    slices: the number of pods of that topology.

  Returns:
    (key of TPUS, libtpu's name of the topology, options for libtpu).

  Raises:
    UserError: there is no such chip, or the form is not CHIP:SHAPE.
  """
  kind, _, shape = topology.partition(':')
  kind = _ALIASES.get(kind, kind)
  if kind not in TPUS or not re.fullmatch(r'[1-9]\d*(x[1-9]\d*){1,2}', shape):
    raise UserError(
      f'--topology {topology}: write CHIP:SHAPE such as v5e:16x16; known chips: {", ".join(TPUS)}'
    )
  options: dict[str, Any] = {}
  if kind in _MEGACORE_CHIPS:
    options['chip_config_name'] = 'megacore'
  if slices > 1:
    options['num_slices'] = slices
  sides = [int(side) for side in shape.split('x')]
  if len(sides) == 2:
    sides.append(1)
  host_bounds = tuple(map(min, _HOST_BOUNDS, sides))
  if host_bounds != _HOST_BOUNDS:
    # Part of a host, such as 1x1: libtpu would fail to divide it into whole hosts.
    options['chips_per_host_bounds'] = host_bounds
  return kind, f'{kind}:{shape}', options


def devices_per_chip(topology: str) -> int:
  """The number of JAX devices of one chip; arguments and errors as in `libtpu_topology`."""
  kind, _, _ = libtpu_topology(topology)
  return TPUS[kind].devices


def format_device_count(num_devices: int, per_chip: int) -> str:
  """'64 chips', or '128 devices, 2 a chip'."""
  return f'{num_devices} chips' if per_chip == 1 else f'{num_devices} devices, {per_chip} a chip'


def format_device(per_chip: int) -> str:
  """The unit of figures of one device, as a heading."""
  return 'a chip' if per_chip == 1 else 'a device'
