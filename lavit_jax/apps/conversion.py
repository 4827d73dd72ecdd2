"""What `lavit convert` and `lavit inspect` print."""

from __future__ import annotations

import ctypes
import json
import math
import os
import pathlib
import sys
from collections.abc import Collection, Iterable

from rich.console import Console
from rich.progress import (
  BarColumn,
  DownloadColumn,
  Progress,
  TimeRemainingColumn,
  TransferSpeedColumn,
)
from rich.table import Table
from rich.tree import Tree

from lavit_jax.weights.store import arrays, folder
from lavit_jax.weights.store.metadata import read_checksums
from lavit_jax.weights.torch import adapters, files, formats, interface_folders
from lavit_jax.weights.torch.conversion_plan import Conversion
from lavit_jax.weights.torch.tensors import ArraySpec

FILE_WIDTH = 140  # columns of output that goes to a file
MALLOC_OPTIONS = (  # of glibc's mallopt: no mapped blocks, no trimming, one arena
  (-4, 0),  # M_MMAP_MAX
  (-1, 2**31 - 1),  # M_TRIM_THRESHOLD
  (-8, 1),  # M_ARENA_MAX
)


# --- lavit convert ---------------------------------------------------------------------------


def run(conversion: Conversion, dry_run: bool) -> None:
  """Prints the plan and, unless `dry_run`, carries it out with a progress bar.

  Every byte counts twice: when it is written, and when it is read back.
  """
  console = _console()
  console.print(_plan_table(conversion))
  _print_notes(conversion.notes)
  if dry_run:
    return
  _keep_freed_memory()
  notes_before = len(conversion.notes)
  total = sum(item.bytes for item in conversion.items)
  columns = (
    '{task.description}',
    BarColumn(),
    DownloadColumn(),
    TransferSpeedColumn(),
    TimeRemainingColumn(),
  )
  with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
    task = progress.add_task('convert and check', total=2 * total)
    conversion.run(lambda size: progress.advance(task, size))
  _print_notes(conversion.notes[notes_before:])
  console.print(f'{total:,} bytes written, read back and found right')


def _plan_table(conversion: Conversion) -> Table:
  title = f'{conversion.direction}: {conversion.kind}, variant {conversion.variant}'
  columns = ('module', 'PyTorch files', 'tensors', 'parameters', 'dtype', 'bytes')
  table = Table(*columns, title=title, title_justify='left')
  for item in conversion.items:
    table.add_row(
      item.module,
      item.path,
      f'{item.tensors:,}',
      f'{item.parameters:,}',
      item.dtype,
      f'{item.bytes:,}',
    )
  table.add_row(
    'all',
    '',
    f'{sum(item.tensors for item in conversion.items):,}',
    f'{sum(item.parameters for item in conversion.items):,}',
    '',
    f'{sum(item.bytes for item in conversion.items):,}',
  )
  return table


def _print_notes(notes: Iterable[str]) -> None:
  """Prints notes on stderr, a line each."""
  for note in notes:
    print(f'lavit: note: {note}', file=sys.stderr)


def _keep_freed_memory() -> None:
  """Makes glibc keep freed memory for the next tensor.

  Fresh pages cost the kernel as much time as the tensor itself takes.
  """
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError, TypeError):  # another C library
    return
  for option, value in MALLOC_OPTIONS:
    mallopt(option, value)


# --- lavit inspect ---------------------------------------------------------------------------


def inspect(path: str | os.PathLike) -> None:
  """Prints what a folder holds: modules, parameters, settings, and where they are from."""
  path = pathlib.Path(path)
  is_checkpoint = path.is_dir() and 'variant' in formats.read_json(path / 'config.json')
  if is_checkpoint:
    _inspect_checkpoint(path)
  elif path.is_dir() and adapters.is_adapter_folder(path):
    _inspect_adapters(path)
  else:
    _inspect_torch(path)


def _inspect_adapters(path: pathlib.Path) -> None:
  """Prints the modules that adapters belong to, and what they were trained beside."""
  console = _console()
  info = adapters.read_info(path)
  tree = Tree(f'{path}: adapters (LoRA)')
  for module in info.get('modules', ['llama']):
    folder_of_module = path / module if info else path
    tensors = files.load(folder_of_module, adapters.STEM).values()
    config = formats.read_json(folder_of_module / adapters.CONFIG)
    parameters = sum(math.prod(tensor.shape) for tensor in tensors)
    layers = config.get('target_modules') or 'in full'
    layers = layers if isinstance(layers, str) else ', '.join(layers)
    tree.add(f'{module}: {parameters:,} parameters, rank {config.get("r")}: {layers}')
  console.print(tree)
  console.print_json(json.dumps(info or formats.read_json(path / adapters.CONFIG)))


def _inspect_torch(path: pathlib.Path) -> None:
  """Prints the modules of a PyTorch folder or file, and its origin if it was exported."""
  console = _console()
  interface = interface_folders.find(path)
  if interface is not None:
    _inspect_interface(interface)
    return
  kind, sources = formats.detect(path)
  tree = Tree(f'{path}: {kind}')
  for source in sources:
    tree.add(_summary(source.module, source.merged.values()))
  console.print(tree)
  _print_export_info(console, path)


def _inspect_interface(source: interface_folders.InterfaceSource) -> None:
  """Prints the modules of another system's folder or file."""
  console = _console()
  tree = Tree(f'{source.path}: {source.file.form}')
  for module, state in source.file.states.items():
    tree.add(_summary(module, state.values()))
  if source.file.others:
    others = [source.state[name] for name in source.file.others]
    tree.add(_summary('of other models', others))
  console.print(tree)
  _print_export_info(console, source.path)


def _summary(module: str, tensors: Collection[ArraySpec]) -> str:
  parameters = sum(math.prod(tensor.shape) for tensor in tensors)
  dtypes = ', '.join(sorted({str(tensor.dtype) for tensor in tensors}))
  return f'{module}: {len(tensors):,} tensors in its files, {parameters:,} parameters, {dtypes}'


def _print_export_info(console: Console, path: pathlib.Path) -> None:
  """Prints where an exported folder is from."""
  export_info = formats.read_json(path / formats.EXPORT_INFO)
  if export_info:
    console.print_json(json.dumps(export_info))


def _inspect_checkpoint(path: pathlib.Path) -> None:
  """Prints the modules of a checkpoint folder, its settings and metadata."""
  console = _console()
  config = folder.read_config(path)
  parameters = sum(module['parameters'] for module in config['parts'].values())
  tree = Tree(f'{path}: lavit_jax, variant {config["variant"]}, {parameters:,} parameters')
  for name, module in config['parts'].items():
    branch = tree.add(f'{name}: {module["parameters"]:,} parameters, {module["dtype"]}')
    _add_leaf_groups(branch, path, name)
  for group, fields in folder.read_settings(path).items():
    values = ', '.join(f'{field}={json.dumps(value)}' for field, value in fields.items())
    tree.add(f'settings of {group}: {values}')
  console.print(tree)
  metadata = dict(config['metadata'])
  if metadata.get('overlay'):  # the names of its tensors, which the way back needs
    metadata['overlay'] = f'{len(metadata["overlay"])} tensors'
  console.print_json(json.dumps(metadata))


def _add_leaf_groups(branch: Tree, path: pathlib.Path, module: str) -> None:
  """Adds a line for each group of leaves of a module: those below one key at the top."""
  folder_of_module = path / 'parts' / module
  with folder.reading_errors(folder_of_module):
    leaves = arrays.open_leaves(folder_of_module, read_checksums(path, module))
  sizes: dict[str, list[int]] = {}
  for leaf, array in leaves.items():
    sizes.setdefault(leaf.split('/')[0], []).append(math.prod(array.shape))
  for group, leaf_sizes in sizes.items():
    plural = 'leaf' if len(leaf_sizes) == 1 else 'leaves'
    branch.add(f'{group}: {sum(leaf_sizes):,} in {len(leaf_sizes)} {plural}')


def _console() -> Console:
  return Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
