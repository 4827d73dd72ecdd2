"""What `lavit convert` and `lavit inspect` print."""

from __future__ import annotations

import ctypes
import json
import pathlib
import sys

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.tree import Tree

from lavit_jax.porting import convert, folder, layouts, leaves


def run(job: convert.Job, dry_run: bool) -> None:
  """Prints the plan, and carries it out unless `dry_run`; every byte counts twice, once written and once read back."""
  console = _console()
  table = Table('part', 'PyTorch files', 'tensors', 'parameters', 'dtype', 'bytes', title=f'{job.direction}: {job.kind}, variant {job.variant}',
                title_justify='left')
  for item in job.items:
    table.add_row(item.part, item.place, f'{item.tensors:,}', f'{item.parameters:,}', item.dtype, f'{item.bytes:,}')
  total = sum(item.bytes for item in job.items)
  table.add_row('all', '', f'{sum(item.tensors for item in job.items):,}', f'{sum(item.parameters for item in job.items):,}', '', f'{total:,}')
  console.print(table)
  told = len(job.notes)
  _tell(job.notes)
  if dry_run:
    return
  _keep_memory()
  columns = ('{task.description}', BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
  with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
    task = progress.add_task('convert and check', total=2 * total)
    job.run(lambda size: progress.advance(task, size))
  _tell(job.notes[told:])
  console.print(f'{total:,} bytes written, read back and found right')


def _tell(notes: list[str]) -> None:
  """Notes on stderr, a line each."""
  for note in notes:
    print(f'lavit: note: {note}', file=sys.stderr)


def _keep_memory() -> None:
  """Has glibc keep what is freed, for the next tensor: fresh pages cost the kernel as much time as the tensor itself takes."""
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError, TypeError):  # another C library
    return
  for option, value in ((-4, 0), (-1, 2**31 - 1), (-8, 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX
    mallopt(option, value)


def inspect(path) -> None:
  """Prints what a folder holds: of ours the parts as trees with their parameters, and where they are from; of PyTorch's, the parts."""
  path, console = pathlib.Path(path), _console()
  if path.is_file() or 'variant' not in layouts.read_json(path / 'config.json'):
    kind, found = layouts.recognise(path)
    tree = Tree(f'{path}: {kind}')
    for each in found:
      state = each.merged
      tree.add(f'{each.place.part}: {len(state):,} tensors in its files, {sum(int(np.prod(x.shape)) for x in state.values()):,} parameters, '
               f'{", ".join(sorted({str(x.dtype) for x in state.values()}))}')
    console.print(tree)
    about = layouts.read_json(path / layouts.ABOUT)
    if about:
      console.print_json(json.dumps(about))
    return
  config = folder.read_config(path)
  tree = Tree(f'{path}: lavit_jax, variant {config["variant"]}, {sum(part["parameters"] for part in config["parts"].values()):,} parameters')
  for name, part in config['parts'].items():
    with folder.reading(path / 'parts' / name):
      arrays = leaves.open_leaves(path / 'parts' / name, folder.read_checksums(path, name))
    branch = tree.add(f'{name}: {part["parameters"]:,} parameters, {part["dtype"]}')
    groups = {}
    for leaf, array in arrays.items():
      group = leaf.split('/')[0]
      count, leaf_count = groups.get(group, (0, 0))
      groups[group] = count + int(np.prod(array.shape)), leaf_count + 1
    for group, (count, leaf_count) in groups.items():
      branch.add(f'{group}: {count:,} in {leaf_count} {"leaf" if leaf_count == 1 else "leaves"}')
  for name, fields in folder.read_settings(path).items():
    told = ', '.join(f'{field}={json.dumps(value)}' for field, value in fields.items())
    tree.add(f'settings of {name}: {told}')
  console.print(tree)
  metadata = dict(config['metadata'])
  if metadata.get('overlay'):
    metadata['overlay'] = f'{len(metadata["overlay"])} tensors'  # their names are for the way back
  console.print_json(json.dumps(metadata))


def _console() -> Console:
  return Console(width=None if sys.stdout.isatty() else 140)  # a file has no width
