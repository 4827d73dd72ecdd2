"""A task on the images of tars or Parquet files: one Parquet file for each, whatever the processes.

    IN/00000.tar, IN/00001.tar, ...  ->  OUT/00000.parquet, OUT/00001.parquet, ...

Each process computes whole files: file i of the list is that of process i modulo their number. A
result appears under its name when it is complete, and is never computed again: so the same command
resumes a run. It does not depend on the processes or on interruptions, for the random key of a row
is made of the seed, the file's name and the row's number in it.

| column | type | content |
|---|---|---|
| key | string | of a tar the sample's key, of Parquet 'FILE/ROW GROUP/ROW' |
| text | list<string> | the texts of the record as they are stored |
| codes | list<int32> | of `tokenize`: the codes of the kept patches, in their order |
| keep | list<bool> | of `tokenize`: which of the N patches were kept |
| caption | string | of `caption` |
| error | string | why a record has no result, else null |
"""

from __future__ import annotations

import collections
import io
import itertools
import json
import os
import pathlib
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from lavit_jax.apps.batch.inputs import Inputs
from lavit_jax.apps.batch.runner import Computation
from lavit_jax.apps.batch.tasks import TASKS, Outcome
from lavit_jax.data import archives, formats, parquets, paths, transforms
from lavit_jax.data.record import NO_IMAGE, Record, Skip
from lavit_jax.errors import UserError
from lavit_jax.inference.batching import MAX_BATCH
from lavit_jax.inference.pipeline import Lavit
from lavit_jax.output import write_atomic

NOTE = b'lavit'  # key of the metadata of a result: JSON, with the fields of `_Note`
COLUMNS = {  # of a task, besides key, text and error
  'tokenize': {'codes': pa.list_(pa.int32()), 'keep': pa.list_(pa.bool_())},
  'caption': {'caption': pa.string()},
}
_SUFFIX = '.parquet'
_BLOCKS_AHEAD = 2  # of images that threads decode while the model computes
_READERS = 16  # threads that read what finished files say of themselves
_NAMED = 3  # records with errors that are named for each file


class ShardRequest(NamedTuple):
  """What to read, and where results go.

  Attributes:
    inputs: tars or Parquet files: a path, a glob, braces, a folder; here or in a store.
    out: a folder, here or in a store.
    image: the extension or column of the image; None for the format's own.
    text: those of the texts, in the same way.
    share: (i, n) computes the i-th of n shares of the files.
  """

  inputs: str
  out: str
  image: str | None = None
  text: Sequence[str] = ()
  share: tuple[int, int] = (0, 1)


class _Note(NamedTuple):
  """What a result says of itself.

  Attributes:
    settings: everything besides the file that it depends on.
    rows: the number of its rows.
    failed: of those with an error.
    fault: why the input could not be read to its end, or ''.
  """

  settings: dict[str, Any]
  rows: int
  failed: int
  fault: str


def is_shards(path: str) -> bool:
  """Whether a path names tars or Parquet files, by its ending, or is a folder."""
  return path.lower().endswith((*archives.ENDINGS, _SUFFIX)) or os.path.isdir(path)


class ShardRun:
  """The files of a command, of which some are finished; to be opened before the model is loaded.

  Args:
    command: 'tokenize' or 'caption'.
    request: the files.
    settings: everything besides the files that results depend on.

  Raises:
    UserError: there are no files, two would have the same result, or the folder holds results of
      other settings.
  """

  def __init__(self, command: str, request: ShardRequest, settings: dict[str, Any]):
    self.command = command
    self.request = request
    self.settings = json.loads(json.dumps(settings))
    self.is_parquet = _is_parquet(request.inputs)
    if self.is_parquet:
      files = paths.expand(request.inputs, _SUFFIX)
    else:
      files = formats.tar_files(request.inputs)
    results = archives.result_names(files, _SUFFIX)
    share, count = request.share
    self.files = dict(itertools.islice(results.items(), share, None, count))
    self.notes = self._read_notes()
    self.pending = {name: file for name, file in self.files.items() if name not in self.notes}

  def run(self, model: Lavit, seed: int | None, options: dict[str, Any]) -> None:
    """Computes the files that have no result yet.

    Records that cannot be used are rows with an error, which do not end the run.

    Args:
      model: the model that computes them.
      seed: of the run; None keeps the most probable patches.
      options: further arguments of the model's method.

    Raises:
      UserError: in the end, if files are missing or damaged.
      Unreachable: a store does not answer.
    """
    finished = len(self.notes)
    if finished:
      _say(f'{finished} of {len(self.files)} files are in {self.request.out} already')
    began = time.monotonic()
    images = 0
    missing = []
    reader = _Reader(self.is_parquet, list(self.pending.values()), self.request)
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
      for number, (name, file) in enumerate(self.pending.items(), 1):
        shard_seed = None if seed is None else _shard_seed(seed, name)
        task = TASKS[self.command]
        computation = Computation(
          task, model, Inputs([], pathlib.Path(), True), shard_seed, options
        )
        rows, fault = self._compute(computation, reader.read(file), pool)
        if fault and not rows:  # nothing could be read: with a result it would count as finished
          missing.append(fault)
          continue
        note = _Note(self.settings, len(rows), sum(bool(row['error']) for row in rows), fault)
        self._write(name, rows, note)
        self.notes[name] = note
        images += len(rows)
        seconds = time.monotonic() - began
        left = seconds / number * (len(self.pending) - number)
        _say(
          f'{name}: {note.rows} records, {note.failed} failed; {finished + number} of '
          f'{len(self.files)} files, {images / seconds:.1f} records/s, {left / 60:.0f} min left'
        )
    self._report(missing)

  def _compute(
    self, computation: Computation, records: Iterator[Record | Skip], pool: ThreadPoolExecutor
  ) -> tuple[list[dict[str, Any]], str]:
    """The rows of a file, and why it could not be read to its end, or ''."""
    size = computation.model.modules.image_size
    fault = ''
    rows = []
    named = 0
    for block in _decode_blocks(records, size, pool):
      loaded = {}
      outcomes = {}
      values = []
      for record, future in block:
        if isinstance(record, Skip) and record.unit != 'records':
          if record.unit == 'files' and record.reason:
            fault = f'{record.reason}: {record.origin}'
          continue
        index = len(rows) + len(values)
        values.append(record)
        try:
          loaded[index] = {'image': future.result()}
        except UserError as error:
          outcomes[index] = Outcome({'error': str(error)})
      outcomes |= computation.compute(loaded)
      for record in values:
        row = self._make_row(record, outcomes[len(rows)].values, computation.model)
        rows.append(row)
        if row['error'] and named < _NAMED:
          named += 1
          _say(f'{record.origin}: {row["error"]}')
    return rows, fault

  def _make_row(
    self, record: Record | Skip, values: Mapping[str, Any], model: Lavit
  ) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(_schema(self.command).names)
    if error := values.get('error'):
      row['error'] = _encodable(error)
    if isinstance(record, Record):
      row |= {'key': _encodable(record.key), 'text': [_encodable(text) for text in record.texts]}
    if row['error']:
      return row
    if self.command == 'caption':
      row['caption'] = values['caption']
      return row
    keep = np.zeros(model.modules.num_patches, bool)
    keep[values['patches']] = True
    return row | {'codes': values['ids'], 'keep': keep.tolist()}

  def _write(self, name: str, rows: list[dict[str, Any]], note: _Note) -> None:
    text = json.dumps(note._asdict())
    table = pa.Table.from_pylist(rows, _schema(self.command).with_metadata({NOTE: text}))
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression='zstd')
    _write_whole(self.request.out, name, buffer.getvalue())

  def _read_notes(self) -> dict[str, _Note]:
    """{name: note} of the results that are there.

    Raises:
      UserError: one is something else, or of other settings.
    """
    out = self.request.out
    there = _list_names(out)
    names = [name for name in self.files if name in there]
    with ThreadPoolExecutor(_READERS) as pool:
      notes = list(pool.map(_read_note, [_join(out, name) for name in names]))
    for name, note in zip(names, notes, strict=True):
      for key in self.settings | note.settings:
        old = note.settings.get(key)
        new = self.settings.get(key)
        if old != new:
          raise UserError(
            f'{_join(out, name)} holds results of {key} {json.dumps(old)}, not of {key} '
            f'{json.dumps(new)}; give --out another name, or delete it to begin again'
          )
    return dict(zip(names, notes, strict=True))

  def _report(self, missing: list[str]) -> None:
    """Says what the results hold.

    Raises:
      UserError: files were not read, or not to their end.
    """
    rows = sum(note.rows for note in self.notes.values())
    failed = sum(note.failed for note in self.notes.values())
    line = f'{len(self.notes)} files with {rows} records are in {self.request.out}'
    if failed:
      line += f'; {failed} of the records have no result, and the column error says why'
    _say(line)
    damaged = [name for name, note in self.notes.items() if note.fault]
    if missing:
      raise UserError(
        f'{len(missing)} of {len(self.files)} files have no result, the first is a {missing[0]}; '
        'check --input, and give the same command again'
      )
    if damaged:
      raise UserError(
        f'{len(damaged)} of {len(self.files)} files could not be read to their end, the first is a '
        f'{self.notes[damaged[0]].fault}; mend it and delete {damaged[0]} in {self.request.out} to '
        'try it again'
      )


class _Reader:
  """The records of files, by path."""

  def __init__(self, is_parquet: bool, files: list[str], request: ShardRequest):
    kind = 'parquet' if is_parquet else 'tars'
    default_image, default_text = formats.DEFAULT_FIELDS[kind]
    text = tuple(request.text) or (default_text,)
    self._units: dict[str, list[int]] = {file: [] for file in files}
    if not files:
      return
    if is_parquet:
      assert default_image is not None
      self._records = formats.Parquets(files, request.image or default_image, text)
      names = [unit.file for unit in self._records.units]
    else:
      image = None if request.image is None else (request.image,)
      self._records = formats.Tars(files, image, text)
      names = self._records.files
    for unit, file in enumerate(names):
      self._units[file].append(unit)

  def read(self, file: str) -> Iterator[Record | Skip]:
    """The records of a file, and what is skipped in it."""
    for unit in self._units[file]:
      for _, _, record in self._records.read(unit):
        yield record


def _decode_blocks(
  records: Iterator[Record | Skip], size: int, pool: ThreadPoolExecutor
) -> Iterator[list[tuple[Record | Skip, Future]]]:
  """Blocks of MAX_BATCH records with their images, of which the next ones are being decoded."""
  blocks: collections.deque[list[tuple[Record | Skip, Future]]] = collections.deque()
  while block := list(itertools.islice(records, MAX_BATCH)):
    blocks.append([(record, pool.submit(_decode, record, size)) for record in block])
    if len(blocks) > _BLOCKS_AHEAD:
      yield blocks.popleft()
  yield from blocks


def _decode(record: Record | Skip, size: int) -> np.ndarray:
  """The image of a record as training reads it without a crop, uint8[size, size, 3].

  Raises:
    UserError: there is none.
  """
  if isinstance(record, Skip):
    raise UserError(record.reason)
  if not record.image:
    raise UserError(NO_IMAGE)
  return transforms.decode(record.image, size)


def _encodable(text: str) -> str:
  """The text with escapes for what UTF-8 cannot hold, as names in tars and JSON may have it."""
  return text.encode('utf-8', 'backslashreplace').decode()


def _schema(command: str) -> pa.Schema:
  fields = {'key': pa.string(), 'text': pa.list_(pa.string())}
  return pa.schema({**fields, **COLUMNS[command], 'error': pa.string()})


def _is_parquet(path: str) -> bool:
  if os.path.isdir(path):
    return not any(name.lower().endswith(archives.ENDINGS) for name in os.listdir(path))
  return path.lower().endswith(_SUFFIX)


def _shard_seed(seed: int, name: str) -> int:
  return xxhash.xxh32_intdigest(f'{seed} {name}'.encode())


def _read_note(path: str) -> _Note:
  try:
    with paths.open_file(path) as file:
      metadata = pq.ParquetFile(file).schema_arrow.metadata or {}
    return _Note(**json.loads(metadata[NOTE]))
  except (KeyError, TypeError, *parquets.DAMAGE) as error:
    reason = ' '.join(str(error).split())
    raise UserError(
      f'{path} is not a result of this command ({reason}); give --out another name'
    ) from None


def _list_names(folder: str) -> Collection[str]:
  if paths.is_remote(folder):
    return set(paths.list_files(folder))
  return set(os.listdir(folder)) if os.path.isdir(folder) else ()


def _write_whole(folder: str, name: str, data: bytes) -> None:
  """Writes a file that appears when it is complete; removes what a killed run left of it.

  Raises:
    UserError: it cannot be written.
  """
  if not paths.is_remote(folder):
    for leftover in pathlib.Path(folder).glob(f'.{name}.*'):
      leftover.unlink(missing_ok=True)
    write_atomic(pathlib.Path(folder, name), data)
    return
  filesystem, root = paths.filesystem_of(folder)
  path = _join(root, name)
  try:
    # An object of a store appears when its upload is complete.
    filesystem.makedirs(root, exist_ok=True)
    filesystem.pipe_file(path, data)
  except Exception as error:  # not all packages of stores raise OSErrors
    reason = ' '.join(str(error).split())[:200] or type(error).__name__
    raise UserError(
      f'cannot write {_join(folder, name)}: {reason}; see to the network and the permissions, and '
      'give the same command again'
    ) from error


def _join(folder: str, name: str) -> str:
  return f'{folder.rstrip("/")}/{name}'


def _say(line: str) -> None:
  print(f'lavit: {line}', file=sys.stderr, flush=True)
