"""`lavit convert` at full size, in both directions, beside `cp` of the same bytes.

    python benchmarks/port.py --scratch /tmp/port [--variant lavit_7b] [--json FILE]

Reports seconds, speed and peak memory of each step. Writes a LaVIT folder of random 16-bit weights
(26 GB for lavit_7b), copies it, converts it to Orbax, and converts that back. It needs three times
as much disk, and removes what it wrote. Between the two conversions the language model is loaded
onto a mesh of 8 virtual devices, in the dtypes of the files.

Before each step the page cache is emptied, if that is permitted, and half a minute passes: a
virtual machine returns freed memory to its host, and is slow when it uses that memory again. Each
step ends with `sync`.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import pathlib
import shutil
import subprocess
import sys
import time
import zlib
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lavit_jax.models import lavit
from lavit_jax.weights.store.folder import load_params
from lavit_jax.weights.torch import formats, name_tables
from lavit_jax.weights.torch.mapping import torch_shapes
from lavit_jax.weights.torch.safetensors_files import SafetensorsWriter

BLOCK = 1 << 25  # numbers
REST = 30  # seconds


def write_folder(folder: pathlib.Path, variant: str) -> None:
  """Writes all modules of a variant, one tensor at a time.

  Each tensor is another stretch of one block of random numbers.
  """
  model = lavit.build(variant)
  quarter = np.random.default_rng(0).standard_normal(BLOCK // 4, np.float32)
  block = np.tile(quarter.astype(np.float16), 8)  # two blocks, for stretches that wrap around
  start = 0
  for location in formats.PUBLISHED:
    like = name_tables.module_shapes(model, [location.module])
    if not like:
      continue
    shapes = torch_shapes(
      name_tables.name_rules(model, location.module)[0],
      name_tables.as_tree(like[location.module]),
    )
    where, stem = location.overlay or (location.folder, location.stems[0])
    specs = {name: jax.ShapeDtypeStruct(shape, np.float16) for name, shape in shapes.items()}
    with SafetensorsWriter(folder / where, stem, specs) as writer:
      for name, spec in specs.items():
        start = (start + 7919) % BLOCK
        writer.write(name, _stretch(block, start, int(np.prod(spec.shape))).reshape(spec.shape))


def _stretch(block: np.ndarray, start: int, size: int) -> np.ndarray:
  """`size` numbers from `start` on, repeated after BLOCK numbers."""
  pieces = []
  for offset in range(0, size, BLOCK):
    pieces.append(block[start : start + min(BLOCK, size - offset)])
  return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def digest(folder: pathlib.Path) -> dict[tuple[str, str], tuple]:
  """(module, name) -> (shape, dtype, CRC-32) of every tensor of a PyTorch folder."""
  result = {}
  for source in formats.detect(folder)[1]:
    for name, tensor in source.merged.items():
      checksum = zlib.crc32(np.asarray(tensor).reshape(-1).view(np.uint8))
      result[source.module, name] = (tensor.shape, str(tensor.dtype), checksum)
  return result


def restore(folder: pathlib.Path) -> None:
  """Loads the language model onto all devices; splits each array on its last axis that divides."""
  devices = jax.devices()
  mesh = Mesh(np.array(devices), 'x')

  def sharding(x):
    axes = [axis for axis, size in enumerate(x.shape) if size % len(devices) == 0]
    if not axes:
      return NamedSharding(mesh, P())
    return NamedSharding(mesh, P(*[None] * axes[-1], 'x'))

  params = load_params(
    folder, ['llama'], shardings=lambda tree: jax.tree.map(sharding, tree), dtype=None
  )
  size = sum(x.nbytes for x in jax.tree.leaves(params))
  print(f'{size / 1e9:.2f} GB on {len(devices)} devices')


class Usage(NamedTuple):
  """What a command takes: seconds until the last byte is on the disk, peak resident GB."""

  seconds: float
  peak_gb: float


def measure(command: list[str], **environment: str) -> Usage:
  """Runs a command from a cold page cache."""
  subprocess.run(['sync'], check=True)
  try:
    pathlib.Path('/proc/sys/vm/drop_caches').write_text('3')
  except OSError:
    print('the page cache stays warm: emptying it is not permitted', file=sys.stderr)
  time.sleep(REST)
  start = time.monotonic()
  child = subprocess.Popen(command, env=os.environ | environment)
  _, status, usage = os.wait4(child.pid, 0)
  if status:
    raise SystemExit(f'{command[0]} failed')
  subprocess.run(['sync'], check=True)
  return Usage(time.monotonic() - start, usage.ru_maxrss * 1024 / 1e9)


def in_new_process(function, *args):
  """The result of a call in a process of its own.

  The memory that this process has used would count in the peaks of its children.
  """
  context = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
    return pool.submit(function, *args).result()


def run(scratch: pathlib.Path, variant: str) -> dict:
  """All steps; returns the report."""
  source = scratch / 'source'
  copy = scratch / 'copy'
  ours = scratch / 'ours'
  back = scratch / 'back'
  convert = [sys.executable, '-m', 'lavit_jax', 'convert', '--variant', variant]
  scratch.mkdir(parents=True)
  try:
    in_new_process(write_folder, source, variant)
    size = sum(file.stat().st_size for file in source.rglob('*') if file.is_file())
    usages = {'cp': measure(['cp', '-r', str(source), str(copy)])}
    shutil.rmtree(copy)
    usages['torch -> orbax'] = measure([*convert, '--src', str(source), '--dst', str(ours)])
    expected = in_new_process(digest, source)
    shutil.rmtree(source)
    on_mesh = measure(
      [sys.executable, __file__, '--restore', str(ours)],
      XLA_FLAGS='--xla_force_host_platform_device_count=8',
    )
    usages['orbax -> torch'] = measure([*convert, '--src', str(ours), '--dst', str(back)])
    same = in_new_process(digest, back) == expected
  finally:
    shutil.rmtree(scratch, ignore_errors=True)
  result: dict = {}
  for name, usage in usages.items():
    result[name] = {
      'seconds': round(usage.seconds, 1),
      'mb_per_second': round(size / usage.seconds / 1e6),
      'peak_gb': round(usage.peak_gb, 2),
      'of_cp': round(usages['cp'].seconds / usage.seconds, 2),
    }
  result['orbax -> 8 devices'] = {
    'seconds': round(on_mesh.seconds, 1),
    'peak_gb': round(on_mesh.peak_gb, 2),
  }
  return result | {'bytes': size, 'tensors': len(expected), 'same': same}


def main() -> None:
  """Measures, or is the process that loads onto a mesh."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--scratch', type=pathlib.Path)
  parser.add_argument('--restore', type=pathlib.Path, help=argparse.SUPPRESS)  # for `measure`
  parser.add_argument('--variant', default='lavit_7b')
  parser.add_argument('--json', type=pathlib.Path)
  args = parser.parse_args()
  if args.restore:
    restore(args.restore)
    return
  if not args.scratch:
    parser.error('--scratch is required')
  result = run(args.scratch, args.variant)
  print(json.dumps(result, indent=1))
  if args.json:
    args.json.write_text(json.dumps(result) + '\n')


if __name__ == '__main__':
  main()
