"""`lavit convert` at full size, both ways, beside `cp` of the same bytes: seconds, speed, and peak memory of each.

    python benchmarks/port.py --scratch /tmp/port [--variant lavit_7b] [--json FILE]

Writes a LaVIT folder of random 16-bit weights (26 GB for lavit_7b), copies it, converts it to Orbax, and that back; needs three times
that much disk, and removes what it wrote. Before each the page cache is emptied, where the system lets us, and half a minute passes:
a virtual machine hands freed memory back to its host, and is slow with the first use of it again. Each ends with `sync`.

Between the two, the language model goes straight onto a mesh of 8 virtual devices, in the types of the files.
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
  """All parts, each tensor another stretch of one block of random numbers; a tensor at a time."""
  model = lavit.build(variant)
  block = np.tile(
    np.random.default_rng(0).standard_normal(BLOCK // 4, np.float32).astype(np.float16), 8
  )
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
        size, start = int(np.prod(spec.shape)), (start + 7919) % BLOCK
        pieces = [block[start : start + min(BLOCK, size - at)] for at in range(0, size, BLOCK)]
        writer.write(
          name,
          np.concatenate(pieces).reshape(spec.shape)
          if len(pieces) > 1
          else pieces[0].reshape(spec.shape),
        )


def digest(folder: pathlib.Path) -> dict:
  """(file's folder, name, shape, type, CRC-32) of every tensor."""
  found = formats.detect(folder)[1]
  return {
    (each.module, name): (
      tensor.shape,
      str(tensor.dtype),
      zlib.crc32(np.asarray(tensor).reshape(-1).view(np.uint8)),
    )
    for each in found
    for name, tensor in each.merged.items()
  }


def restore(folder: pathlib.Path) -> None:
  """The language model onto all devices, each matrix split by its last axis that divides."""
  mesh = Mesh(np.array(jax.devices()), 'x')

  def place(x):
    axis = max(
      (n for n, size in enumerate(x.shape) if size % len(jax.devices()) == 0), default=None
    )
    return NamedSharding(mesh, P() if axis is None else P(*[None] * axis, 'x'))

  params = load_params(
    folder, ['llama'], shardings=lambda tree: jax.tree.map(place, tree), dtype=None
  )
  print(
    f'{sum(x.nbytes for x in jax.tree.leaves(params)) / 1e9:.2f} GB on {len(jax.devices())} devices'
  )


def timed(command: list[str], **environment) -> tuple[float, float]:
  """(seconds to the last byte on the disk, peak resident GB) of a command, from a cold page cache."""
  subprocess.run(['sync'], check=True)
  try:
    pathlib.Path('/proc/sys/vm/drop_caches').write_text('3')
  except OSError:
    print('the page cache stays warm: not permitted to empty it', file=sys.stderr)
  time.sleep(REST)
  start = time.monotonic()
  child = subprocess.Popen(command, env=os.environ | environment)
  _, status, usage = os.wait4(child.pid, 0)
  if status:
    raise SystemExit(f'{command[0]} failed')
  subprocess.run(['sync'], check=True)
  return time.monotonic() - start, usage.ru_maxrss * 1024 / 1e9


def apart(function, *args):
  """The result of a call in a process of its own: what this one has had in memory counts in its children's peaks."""
  with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
    return pool.submit(function, *args).result()


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--scratch', type=pathlib.Path)
  parser.add_argument(
    '--restore', type=pathlib.Path, help=argparse.SUPPRESS
  )  # what a process of ours is asked for
  parser.add_argument('--variant', default='lavit_7b')
  parser.add_argument('--json', type=pathlib.Path)
  args = parser.parse_args()
  if args.restore:
    return restore(args.restore)
  if not args.scratch:
    parser.error('--scratch is required')
  scratch = args.scratch
  source, copy, ours, back = (scratch / name for name in ('source', 'copy', 'ours', 'back'))
  convert = [sys.executable, '-m', 'lavit_jax', 'convert', '--variant', args.variant]
  scratch.mkdir(parents=True)
  try:
    apart(write_folder, source, args.variant)
    size = sum(file.stat().st_size for file in source.rglob('*') if file.is_file())
    rows = {'cp': timed(['cp', '-r', str(source), str(copy)])}
    shutil.rmtree(copy)
    rows['torch -> orbax'] = timed([*convert, '--src', str(source), '--dst', str(ours)])
    wanted = apart(digest, source)
    shutil.rmtree(source)
    on_mesh = timed(
      [sys.executable, __file__, '--restore', str(ours)],
      XLA_FLAGS='--xla_force_host_platform_device_count=8',
    )
    rows['orbax -> torch'] = timed([*convert, '--src', str(ours), '--dst', str(back)])
    same = apart(digest, back) == wanted
  finally:
    shutil.rmtree(scratch, ignore_errors=True)
  result = {
    name: dict(
      seconds=round(seconds, 1),
      mb_per_second=round(size / seconds / 1e6),
      peak_gb=round(peak, 2),
      of_cp=round(rows['cp'][0] / seconds, 2),
    )
    for name, (seconds, peak) in rows.items()
  }
  result['orbax -> 8 devices'] = dict(seconds=round(on_mesh[0], 1), peak_gb=round(on_mesh[1], 2))
  result |= dict(bytes=size, tensors=len(wanted), same=same)
  print(json.dumps(result, indent=1))
  if args.json:
    args.json.write_text(json.dumps(result) + '\n')


if __name__ == '__main__':
  main()
