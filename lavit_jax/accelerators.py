"""Datasheet figures of accelerators, for rooflines and for model FLOP/s utilization (MFU)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax


class Chip(NamedTuple):
  """The figures of one chip.

  Attributes:
    kind: JAX's `device_kind`.
    tflops: peak bfloat16 TFLOP/s.
    hbm_gib: memory in GiB.
    hbm_tbps: memory bandwidth in TB/s.
    ici_gbps: bandwidth of all links to other chips together, in Gbit/s.
    devices: the number of JAX devices. The two cores of a v4 or v5p chip are one device, those of
      a tpu7x chip are two.
  """

  kind: str
  tflops: float
  hbm_gib: float
  hbm_tbps: float
  ici_gbps: float
  devices: int = 1

  def device(self) -> Chip:
    """The figures of one JAX device of the chip."""
    n = self.devices
    return Chip(self.kind, self.tflops / n, self.hbm_gib / n, self.hbm_tbps / n, self.ici_gbps / n)


TPUS = {
  'v4': Chip('TPU v4', 275, 32, 1.2, 2400),
  'v5e': Chip('TPU v5 lite', 197, 16, 0.82, 1600),
  'v5p': Chip('TPU v5', 459, 95, 2.77, 4800),
  'v6e': Chip('TPU v6 lite', 918, 32, 1.64, 3584),
  'tpu7x': Chip('TPU7x', 2307, 192, 7.38, 4800, devices=2),  # Ironwood
}

# (pattern in JAX's `device_kind`, peak bfloat16 TFLOP/s without sparsity); the first match counts.
GPUS = (
  (r'\bA100\b', 312),
  (r'\bH100 PCIe\b', 756),
  (r'\bH100 NVL\b', 835),
  (r'\bH100\b', 989),
  (r'\bH200\b', 989),
  (r'\bL4\b', 121),
)


def peak_tflops(devices: Iterable[Any]) -> float:
  """Peak bfloat16 TFLOP/s of all JAX devices together; 0 if the kind of any is unknown."""
  peaks = [_device_tflops(device.device_kind) for device in devices]
  return float(sum(peaks)) if all(peaks) else 0.0


def run_once_compiler_options() -> dict[str, int] | None:
  """Compiler options of a program that runs once: on CPU, compiling costs more than running."""
  return {'xla_backend_optimization_level': 0} if jax.default_backend() == 'cpu' else None


def _device_tflops(kind: str) -> float:
  for name, chip in TPUS.items():
    if kind in (chip.kind, f'TPU {name}'):  # JAX itself accepts both
      return chip.device().tflops
  for pattern, tflops in GPUS:
    if re.search(pattern, kind):
      return tflops
  return 0.0
