"""`lavit convert`: a PyTorch folder <-> our folder of Orbax checkpoints, a tensor at a time, checked at the end.

What a PyTorch folder holds beside the weights of the model (tokenizer, schedulers, descriptions, other models) travels in `torch/`, with
the tensors that our model computes itself or has no use for, so that the way back gives every tensor again, bit for bit.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np
import xxhash

from lavit_jax.data.text import complete_tokenizer_folder
from lavit_jax.errors import UserError
from lavit_jax.models import lavit
from lavit_jax.models import settings as checkpoint_settings
from lavit_jax.weights.store import arrays as leaves
from lavit_jax.weights.store import folder
from lavit_jax.weights.torch import (
  configs,
  finite,
  formats,
  leftovers,
  vocabulary_growth,
)
from lavit_jax.weights.torch import (
  files as torch_files,
)
from lavit_jax.weights.torch.formats import MappedModule, SourceModule
from lavit_jax.weights.torch.mapping import contiguous, slots_of

VERSION = 1  # of the tables: counts their changes


class ConversionItem(NamedTuple):
  """A line of the plan: what becomes of one part. `place`: where the PyTorch folder has it; dtype, bytes: of the result."""

  part: str
  place: str
  tensors: int
  parameters: int
  dtype: str
  bytes: int


class Conversion(NamedTuple):
  """A conversion that has been looked at: `items` says what `run(tell)` will do; it calls tell(bytes) as it moves and checks them.

  `notes` says what of the source is not taken; `run` adds what it lets through.
  """

  direction: str
  kind: str
  variant: str
  items: list[ConversionItem]
  run: Callable[[Callable[[int], None]], None]
  notes: list[str] = []


def plan_conversion(
  src,
  dst,
  *,
  variant: str | None = None,
  dtype: str | None = None,
  allow_missing: str = '',
  force: bool = False,
  pickles: bool = False,
  grow: bool = True,
  weights_variant: str | None = None,
  allow_nonfinite: bool = False,
) -> Conversion:
  """Looks at a folder and says how it would be converted; nothing is written.

  Args:
    src: a PyTorch folder or file (formats.py), or one of ours; decides the direction.
    dst: where the other one goes.
    variant: the row of the variants table; None finds the largest whose shapes the files have.
    dtype: of floating tensors in the result; None keeps the types.
    allow_missing: regex of torch names that may be missing; recorded in the result.
    force: what stands at `dst` may be replaced, if a conversion wrote it.
    pickles: write `.bin` files in place of safetensors.
    grow: a language model with the text's rows only gets those for [IMG], [/IMG] and the codes, by the rule of vocabulary_growth.py.
    weights_variant: which edition of the weights to take, where a folder has several (weight_files.py), such as 'fp16'.
    allow_nonfinite: NaN and infinity in the source are taken along and told; otherwise they end the conversion.

  Raises:
    UserError: `src` is unknown or damaged, `dst` is in the way, or pickles cannot be written.
    PortingError: the files and the variant do not fit.
  """
  src, dst = (
    pathlib.Path(os.path.abspath(src)),
    pathlib.Path(dst).resolve(),
  )  # a link keeps its name: what it points to may have none
  if dst.exists() and not (dst.is_dir() and not any(dst.iterdir())) and not force:
    raise UserError(f'{dst} exists; choose another place, or --force to replace it')
  if dst == src.resolve() or src.resolve() in dst.parents or dst in src.resolve().parents:
    raise UserError(f'{dst} and {src} lie within each other; choose another place')
  if 'variant' in formats.read_json(src / 'config.json'):
    if pickles and importlib.util.find_spec('torch') is None:
      raise UserError(
        '.bin files need PyTorch: pip install -e ".[torch]" -c launch/constraints.txt; or leave out --bin'
      )
    return _to_torch(src, dst, dtype, pickles, allow_nonfinite)
  if pickles:
    raise UserError(f'{src} becomes a folder of ours, which has no .bin files; leave out --bin')
  return _to_orbax(src, dst, variant, dtype, allow_missing, grow, weights_variant, allow_nonfinite)


# ------------------------------------------------------------------------------------------------------------ torch -> orbax


def _to_orbax(
  src: pathlib.Path,
  dst: pathlib.Path,
  variant: str | None,
  dtype: str | None,
  allow_missing: str,
  grow: bool,
  weights_variant: str | None,
  allow_nonfinite: bool,
) -> Conversion:
  kind, found = formats.detect(src, edition_of=weights_variant)
  variant = variant or formats.find_variant(found)
  model = lavit.build(variant)
  settings = configs.read_settings(
    src,
    {each.place.part: each.place.folder for each in found},
    [each.place.part for each in found],
    variant,
  )
  fits = formats.map_modules(model, found, allow_missing, mixed=dtype is not None)
  rows = {part: model.vocabulary.size for part in fits if part == 'llama' and grow}
  structs = {
    part: {
      path: vocabulary_growth.grown_struct(path, folder.cast(x, dtype), rows.get(part))
      for path, x in fit.plan.leaves.items()
    }
    for part, fit in fits.items()
  }
  items = [
    _item(each, len(fits[each.place.part].plan.slots), structs[each.place.part]) for each in found
  ]
  notes = leftovers.notes(src, kind, found, model.vocabulary.text_size)

  def run(tell):
    ledger = finite.FiniteLedger()
    sources = sorted({tensor.file for each in found for tensor in each.merged.values()})
    with (
      folder.open_writer(dst, variant, settings=settings) as made,
      torch_files.Digests() as digests,
    ):
      for part, fit in fits.items():
        with made.part(part, structs[part], fit.plan.stacked) as writer:
          _fill(writer, part, fit, structs[part], digests, ledger, tell)
          ledger.check(dtype, allow_nonfinite)
      _keep_the_rest(src, found, fits, made.path)
      trained = (
        formats.read_json(src / formats.EXPORT_INFO).get('source', {}).get('metadata', {})
      )  # of a folder that came from one of ours
      made.config['metadata'] = trained | dict(
        source=dict(
          kind=kind, files={_within(src, file): f'sha256:{digests.of(file)}' for file in sources}
        ),
        tables=dict(
          version=VERSION, chosen={part: fit.table for part, fit in fits.items() if fit.table}
        ),
        overlay=next(
          (list(each.overlay) for each in found if each.place.part == 'understanding'), None
        ),
        tied=next((each.tied for each in found if each.tied), None),
        dtype=dtype,
        allow_missing=allow_missing or None,
        grown=vocabulary_growth.RULE
        if any(
          x.shape != fits['llama'].plan.leaves[path].shape
          for path, x in structs.get('llama', {}).items()
        )
        else None,
      )
      _check_leaves(made, tell)
    notes.extend(ledger.notes())

  return Conversion('torch -> orbax', kind, variant, items, run, notes)


def _fill(
  writer: leaves.Writer,
  part: str,
  fit: MappedModule,
  structs: Mapping,
  digests: torch_files.Digests,
  ledger: finite.FiniteLedger,
  tell,
) -> None:
  """Writes a part, tensor by tensor in the order of the files."""

  def read(name, slot, tensor):
    return name, slot, tensor, np.asarray(tensor)

  def turn(name, slot, array, counted):
    struct = structs[slot.leaf]
    converted, counts = finite.cast(array, struct.dtype)
    turned = contiguous(slot.row_of(converted))
    if counted is not None:
      counted.result()
    return (
      name,
      counts,
      slot,
      vocabulary_growth.grow_rows(turned, struct.shape) if slot.layer is None else turned,
    )

  slots = fit.plan.slots
  reads = leaves.prefetch(
    functools.partial(read, name, slots[name], tensor)
    for name, tensor in fit.state.items()
    if name in slots
  )
  turns = leaves.prefetch(
    functools.partial(turn, name, slot, array, digests.add(tensor, array))
    for name, slot, tensor, array in reads
  )
  for name, counts, slot, array in turns:
    ledger.add(f'{part}: {name}', counts)
    writer.write(slot.leaf, slot.layer, array)
    tell(array.nbytes)


def _keep_the_rest(
  src: pathlib.Path,
  found: list[SourceModule],
  fits: Mapping[str, MappedModule],
  scratch: pathlib.Path,
) -> None:
  """Into `torch/`: tensors that no leaf takes, and the files that hold no weights of ours; its words also into `tokenizer/`."""
  if not src.is_dir():
    return
  taken, groups = {}, {}
  for each in found:
    for place, state in (
      ((each.place.folder, each.place.stems[0]), each.state),
      (each.place.overlay, each.overlay),
    ):
      if state:
        groups[place] = state
        used = {
          name
          for name in fits[each.place.part].plan.slots
          if fits[each.place.part].state[name] is state.get(name)
        }
        taken[place] = taken.get(place, set()) | used
  for place, state in groups.items():
    if rest := {name: tensor for name, tensor in state.items() if name not in taken[place]}:
      with torch_files.Writer(scratch / 'torch' / place[0], f'{place[1]}.extras', rest) as writer:
        for name, tensor in rest.items():
          writer.write(name, np.asarray(tensor))
  ours = leftovers.taken_files(found) | set(leftovers.other_editions(src, found))
  for file in sorted(src.rglob('*')):
    if not file.is_file() or file == src / formats.EXPORT_INFO or file in ours:
      continue
    target = scratch / 'torch' / file.relative_to(src)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, target)
  for where in (src, src / 'language_model'):
    folder.copy_tokenizer_files(where, scratch / 'tokenizer')


def _check_leaves(made: folder.FolderWriter, tell) -> None:
  """Reads all of it back."""
  for part, sums in made.sums.items():
    left = dict(sums)
    for path, total, size in leaves.checksums(made.path / 'parts' / part, sums):
      left[path] ^= total
      tell(size)
    if wrong := [path for path, rest in left.items() if rest]:
      raise UserError(
        f'{part}/{wrong[0]} is not on the disk as it was written; the disk is at fault, convert again to another one'
      )


# ------------------------------------------------------------------------------------------------------------ orbax -> torch


def _to_torch(
  src: pathlib.Path, dst: pathlib.Path, dtype: str | None, pickles: bool, allow_nonfinite: bool
) -> Conversion:
  config = folder.read_config(src)
  settings = folder.read_settings(src)
  metadata, model = config['metadata'], lavit.build(config['variant'], settings=settings)
  kind = metadata.get('source', {}).get('kind', 'LaVIT')
  _check_descriptions(src, config, kind, settings)
  chosen = metadata.get('tables', {}).get('chosen', {})
  files, jobs, items = {}, [], []  # files: (folder, stem) -> name -> shape and dtype
  places = formats.locations(kind)
  for part in (
    part for part in places if part in config['parts']
  ):  # the tokenizer before the part that shares its file
    place = places[part]
    with folder.reading_errors(src / 'parts' / part):
      arrays = leaves.open_leaves(
        src / 'parts' / part, folder.read_checksums(src, part), leaves.DIRECT
      )
    structs = {
      path: jax.ShapeDtypeStruct(x.shape, x.dtype.numpy_dtype) for path, x in arrays.items()
    }
    slots, writes = slots_of(formats.name_rules(model, part)[chosen.get(part, 0)], structs), {}
    for name, slot in slots.items():
      file = place.folder, place.stems[0]
      if place.overlay and (metadata.get('overlay') is None or name in metadata['overlay']):
        file = place.overlay
      elif name in files.get(file, {}):
        continue  # the two parts share it
      if part == 'llama' and name == metadata.get('tied'):
        continue  # the source had one tensor for embedding and head
      shape = slot.array({slot.leaf: formats.zeros_view(structs[slot.leaf])}).shape
      files.setdefault(file, {})[name] = folder.cast(
        jax.ShapeDtypeStruct(shape, structs[slot.leaf].dtype), dtype
      )
      writes[name] = file, slot
    jobs.append((part, arrays, writes))
    items.append(
      _item(
        SourceModule(place, {}, {}),
        len(writes),
        {name: files[file][name] for name, (file, _) in writes.items()},
      )
    )
  if not jobs:
    raise UserError(
      f'{src} holds {", ".join(config["parts"])}: nothing that a {kind} folder has a place for'
    )
  extras = {}
  for file, specs in files.items():
    kept = src / 'torch' / file[0] / f'{file[1]}.extras.safetensors'
    if kept.is_file():
      extras[file] = torch_files.load(kept)
      specs |= extras[file]

  notes = []

  def run(tell):
    ledger = finite.FiniteLedger()
    with folder.replace_folder(dst, formats.EXPORT_INFO) as scratch:
      with contextlib.ExitStack() as stack:
        writers = {
          file: stack.enter_context(torch_files.Writer(scratch / file[0], file[1], specs))
          for file, specs in files.items()
        }
        for part, arrays, writes in jobs:
          with folder.reading_errors(src / 'parts' / part):
            _pour(arrays, writes, writers, folder.read_checksums(src, part), dtype, ledger, tell)
          ledger.check(dtype, allow_nonfinite)
        for file, tensors in extras.items():
          for name, tensor in tensors.items():
            writers[file].write(name, np.asarray(tensor))
      for writer in writers.values():
        _check_tensors(writer, tell)
        if pickles:
          torch_files.to_pickles(writer.files)
      _describe(src, scratch, kind, model, config, files, dtype)
    notes.extend(ledger.notes())

  return Conversion('orbax -> torch', kind, config['variant'], items, run, notes)


def _check_descriptions(src: pathlib.Path, config: dict, kind: str, settings: Mapping) -> None:
  """Raises UserError where the descriptions in `torch/`, which the result will have, are not of the checkpoint's settings."""
  variant, places = config['variant'], formats.locations(kind)
  described = configs.described(
    src / 'torch', {part: place.folder for part, place in places.items()}, config['parts']
  )
  told = configs.read_settings(
    src / 'torch', {part: place.folder for part, place in places.items()}, config['parts'], variant
  )
  for name, field in checkpoint_settings.differences(told, settings):
    if name in described:
      row = lavit.variant_config(variant)
      raise UserError(
        f'{described[name]} says {checkpoint_settings.format_setting(told, name, field, row)}, but the settings in {src / "config.json"} say '
        f'{checkpoint_settings.format_setting(settings, name, field, row)} of {name}; correct one of the two'
      )


def _pour(
  arrays: Mapping,
  writes: Mapping,
  writers: Mapping,
  sums: Mapping,
  dtype: str | None,
  ledger: finite.FiniteLedger,
  tell,
) -> None:
  """Leaf by leaf, layer by layer, into the files."""
  left = {slot.leaf: sums[slot.leaf] for _, slot in writes.values()}

  def read(name, file, slot):
    array = (
      (arrays[slot.leaf] if slot.layer is None else arrays[slot.leaf][slot.layer]).read().result()
    )
    total = (
      leaves.checksum(array) if slot.layer is None else leaves.checksum(array[None], slot.layer)
    )
    converted, counts = finite.cast(array, folder.cast(array, dtype).dtype)
    return name, file, slot.leaf, total, counts, contiguous(slot.tensor_of(converted))

  tasks = (
    functools.partial(read, name, file, slot)
    for name, (file, slot) in sorted(writes.items(), key=lambda item: item[1][1].leaf)
  )
  for name, file, path, total, counts, array in leaves.prefetch(tasks):
    ledger.add(f'{file[1]}: {name}', counts)
    left[path] ^= total
    writers[file].write(name, array)
    tell(array.nbytes)
  if wrong := [path for path, rest in left.items() if rest]:
    raise ValueError(f'the checksum of {wrong[0]} is another')


def _check_tensors(writer: torch_files.Writer, tell) -> None:
  """Reads all of it back."""

  def read(file, name, tensor):
    array = np.asarray(tensor)
    return file, name, xxhash.xxh3_64_intdigest(array.reshape(-1).view(np.uint8)), array.nbytes

  tasks = (
    functools.partial(read, file, name, tensor)
    for file in writer.files
    for name, tensor in torch_files.load(file).items()
  )
  for file, name, total, size in leaves.prefetch(tasks):
    if total != writer.sums[name]:
      raise UserError(
        f'{name} of {file.name} is not on the disk as it was written; the disk is at fault, convert again to another one'
      )
    tell(size)


def _describe(
  src: pathlib.Path,
  scratch: pathlib.Path,
  kind: str,
  model: lavit.LavitModules,
  config: dict,
  files: Mapping,
  dtype: str | None,
) -> None:
  """The files beside the weights: those that came along, the descriptions that are missing, and where all this is from."""
  if (src / 'torch').is_dir():
    shutil.copytree(
      src / 'torch',
      scratch,
      dirs_exist_ok=True,
      ignore=shutil.ignore_patterns('*.extras.safetensors'),
    )
  places = formats.locations(kind)
  language = (
    scratch / places['llama'].folder if 'llama' in places and 'llama' in config['parts'] else None
  )
  rows = 0
  if language is not None:
    rows = files[places['llama'].folder, places['llama'].stems[0]][
      'model.embed_tokens.weight'
    ].shape[0]
    folder.copy_tokenizer_files(src / 'tokenizer', language)
  if 'source' not in config['metadata']:  # trained here
    for path, content in formats.descriptions(model, config['parts'], rows).items():
      if not (scratch / path).exists():
        (scratch / path).parent.mkdir(parents=True, exist_ok=True)
        (scratch / path).write_text(json.dumps(content, indent=2) + '\n')
    if language is not None:
      complete_tokenizer_folder(language)
  if language is not None:
    about = formats.read_json(language / 'config.json')
    about['vocab_size'] = rows
    for key in ('dtype', 'torch_dtype'):
      if key in about and dtype:
        about[key] = dtype
    (language / 'config.json').write_text(json.dumps(about, indent=2) + '\n')
  about = dict(
    variant=config['variant'],
    tables=VERSION,
    dtype=dtype,
    source=dict(
      kind='lavit_jax',
      files={'checksums.json': f'sha256:{torch_files.sha256(src / "checksums.json")}'},
      metadata=config['metadata'],
    ),
  )
  (scratch / formats.EXPORT_INFO).write_text(json.dumps(about, indent=1) + '\n')


# ------------------------------------------------------------------------------------------------------------------- details


def _item(found: SourceModule, tensors: int, structs: Mapping) -> ConversionItem:
  dtypes = sorted({str(np.dtype(x.dtype)) for x in structs.values()})
  return ConversionItem(
    found.place.part,
    str(pathlib.PurePosixPath(found.place.folder, found.place.stems[0])),
    tensors,
    sum(int(np.prod(x.shape)) for x in structs.values()),
    ', '.join(dtypes),
    sum(torch_files.nbytes(x) for x in structs.values()),
  )


def _within(src: pathlib.Path, file: pathlib.Path) -> str:
  return file.name if src.is_file() else file.relative_to(src).as_posix()
