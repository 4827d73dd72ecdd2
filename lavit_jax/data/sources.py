"""The list of sources in a config -> one mixed stream of examples.

    sources=(
      dict(format='tars', path='gs://BUCKET/laion400m/{00000..41407}.tar', weight=3.0,
           use='caption'),
      dict(format='parquet', path='hf://datasets/OWNER/NAME/data/*.parquet',
           text=('caption', 'recaption')),
    )

| option                    | default | meaning                                          |
|---------------------------|---------|--------------------------------------------------|
| format, path, image, text |         | formats.py                                       |
| split, data_dir, captions,|         | stores.py                                        |
| annotations               |         |                                                  |
| weight                    | 1       | share of the rows, against the other sources     |
| use                       | ''      | 'caption', 'draw', 'text' (which needs no        |
|                           |         | image), 'chat', 'answer' (conversations and      |
|                           |         | questions of a folder); '': by `data.shares`; of |
|                           |         | codes 'draw'                                     |
| window                    | 2048    | records of a stream that are shuffled together   |

`window` is the size of the shuffle buffer. It is split over the `data.shards` shards, with at least
32 records each, and a process holds two such buffers for each of its shards: one that it shuffles,
and the next one.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from typing import Any, NamedTuple

import grain
import xxhash

from lavit_jax.data import formats
from lavit_jax.data.open_units import OpenUnits
from lavit_jax.data.record import format_names
from lavit_jax.data.row_workers import OpenShards
from lavit_jax.data.shards import Shard, ShardSource, StoreShard, open_stored
from lavit_jax.data.skips import SourceInfo
from lavit_jax.data.streams import Reader, Stream, StreamShard
from lavit_jax.data.tasks import DIALOGS
from lavit_jax.errors import UserError

USES = ('', 'caption', 'draw', 'text', 'chat', 'answer')
_OPTIONS = {
  'tfds': ('split', 'data_dir'),
  'folder': ('captions', 'annotations'),
  'tars': ('window',),
  'parquet': ('window',),
  'codes': ('window',),
  'arrayrecord': (),
}
_COMMON_OPTIONS = ('format', 'path', 'weight', 'use', 'image', 'text')
_STREAMS = ('tars', 'parquet', 'codes')
_WINDOW = 2048  # records, over all shards
_MIN_WINDOW = 32  # records of a shard
_HELDOUT_WINDOW = 64


class _Source(NamedTuple):
  """An opened source: its tickets, what distinguishes it in a state, its description."""

  tickets: Stream | grain.MapDataset
  identity: dict[str, Any]
  info: SourceInfo


def mix_sources(
  sources: Sequence[Mapping[str, Any]],
  seed: int | None,
  shards: int,
  local_shards: Sequence[int],
  name: str = 'sources',
  captioned: bool = True,
  weights: Sequence[float] | None = None,
) -> tuple[OpenShards, dict[str, Any]]:
  """Opens sources and deals them to shards.

  Args:
    sources: options of each.
    seed: of the run; None: every source in its order.
    shards: their number, over all processes.
    local_shards: the shards that this process reads.
    name: of the list in the config, for messages.
    captioned: whether texts are needed; without them a folder needs no captions.
    weights: how often rows come from each; None: by the options `weight`.

  Returns:
    `open_shards` of a RowDataset, and everything that a position among the shards depends on ({}
    if `seed` is None).

  Raises:
    UserError: an option that is unknown or wrong, files that do not exist, an empty source.
  """
  opened = [
    _open_source(f'{name}[{number}]', number, source, seed, shards, captioned)
    for number, source in enumerate(sources)
  ]
  if weights is None:
    weights = [float(source.get('weight', 1.0)) for source in sources]
  infos = [source.info for source in opened]

  def open_shards(pool: Executor) -> tuple[dict[int, Shard], OpenUnits]:
    open_units = OpenUnits(_count_readers(opened, local_shards))
    parts: dict[int, list[ShardSource]] = {shard: [] for shard in local_shards}
    for source in opened:
      if isinstance(source.tickets, Stream):
        dealt = _deal_stream(source.tickets, local_shards, pool, open_units)
        for shard, part in dealt.items():
          parts[shard].append(part)
      else:
        for shard in local_shards:
          parts[shard].append(StoreShard(source.tickets, shard, shards))
    dealt_shards = {
      shard: Shard(shard, shards, parts[shard], weights, infos) for shard in local_shards
    }
    return dealt_shards, open_units

  if seed is None:
    return open_shards, {}
  identities = [source.identity for source in opened]
  return open_shards, {'seed': seed, 'shards': shards, 'sources': identities}


def _count_readers(sources: Sequence[_Source], local_shards: Sequence[int]) -> int:
  """The number of units that this process reads in turn."""
  count = 0
  for source in sources:
    if isinstance(source.tickets, Stream):
      fan = source.tickets.fan
      count += len({shard // fan for shard in local_shards})
  return count


def _deal_stream(
  stream: Stream, local_shards: Sequence[int], pool: Executor, open_units: OpenUnits
) -> dict[int, StreamShard]:
  """{shard: its part of a stream}; shards of one reader share it."""
  shards_of_reader: dict[int, list[int]] = {}
  for shard in local_shards:
    shards_of_reader.setdefault(shard // stream.fan, []).append(shard % stream.fan)
  readers = {
    index: Reader(stream, index, shards, pool, open_units)
    for index, shards in shards_of_reader.items()
  }
  return {
    shard: StreamShard(readers[shard // stream.fan], shard % stream.fan) for shard in local_shards
  }


def has_codes(sources: Sequence[Any]) -> bool:
  """Whether a source has codes in place of images; what is no source has none."""
  return any(isinstance(source, Mapping) and source.get('format') == 'codes' for source in sources)


def check_files(name: str, sources: Sequence[Mapping[str, Any]], limit: float) -> None:
  """Checks that the tars of `sources` exist; the files of other formats are opened at the start.

  Args:
    name: of the list in the config, for messages.
    sources: options of each.
    limit: the share of a source's tars that may be absent.

  Raises:
    UserError: more than `limit` of a source's tars do not exist.
  """
  for number, source in enumerate(sources):
    if source['format'] != 'tars':
      continue
    records = formats.Tars(source['path'], None, ())
    sizes = {}
    for file, (_, size) in zip(records.files, records.identity(), strict=True):
      if size is not None:
        sizes[file] = size
    absent = [file for file, size in sizes.items() if size < 0]
    if len(absent) > limit * len(sizes):
      raise UserError(
        f'{name}[{number}]: {len(absent)} of {len(sizes)} tars are not there, such as '
        f'{absent[0]}; check the path'
      )


def _open_source(
  name: str,
  number: int,
  options: Mapping[str, Any],
  seed: int | None,
  shards: int,
  captioned: bool,
) -> _Source:
  _check_options(name, options)
  kind = options['format']
  use = options.get('use', '')
  records = _open_records(name, options, captioned)
  identity = {'format': kind, 'units': len(records)}
  if seed is not None:
    identity['files'] = xxhash.xxh32_hexdigest(json.dumps(records.identity()).encode())
    if kind == 'folder':
      identity['contents'] = records.digest()
  path = options['path']
  if not isinstance(path, str):
    path = format_names(map(str, path), 2)
  is_stream = kind in _STREAMS
  info = SourceInfo(
    name=name,
    path=f'{kind} {path}',
    units=len(records) if is_stream else 1,
    expected_fields=getattr(records, 'expected_fields', ''),
  )
  if not is_stream:
    return _Source(open_stored(records, number, use, seed), identity, info)
  if seed is None:
    window = max(_HELDOUT_WINDOW // shards, _MIN_WINDOW)
  else:
    window = _shard_window(options.get('window'), shards)
  identity['window'] = window
  return _Source(Stream.of(records, number, use, seed, window, shards, name), identity, info)


def _open_records(name: str, options: Mapping[str, Any], captioned: bool) -> Any:
  """The store or stream of a source, which is not empty."""
  kind = options['format']
  default_image, default_text = formats.DEFAULT_FIELDS[kind]
  image = options.get('image') or default_image
  if kind == 'tars' and image:
    image = _as_names(image)
  text = _as_names(options.get('text') or default_text)
  extra = {key: options[key] for key in _OPTIONS[kind] if key in options and key != 'window'}
  if kind == 'folder':
    extra['use'] = options.get('use', '')
    extra['captioned'] = captioned
  try:
    records = formats.FORMATS[kind](options['path'], image, text, **extra)
  except UserError as error:
    raise error.within(name, option=name) from error
  if not len(records):
    raise UserError(
      f'{name}: {options["path"]} holds no records; give a path with some, or remove this source',
      option=name,
    )
  return records


def _check_options(name: str, options: Mapping[str, Any]) -> None:
  """Raises UserError for an option that is unknown or has a wrong value."""
  kind = options.get('format')
  if kind not in formats.FORMATS:
    raise UserError(
      f'{name} has format {kind!r}; choose one of {", ".join(formats.FORMATS)}', option=name
    )
  allowed = _COMMON_OPTIONS + _OPTIONS[kind]
  for key in options:
    if key not in allowed:
      near = difflib.get_close_matches(key, allowed, n=1)
      hint = f'did you mean {near[0]!r}?' if near else f'it knows {", ".join(allowed)}'
      raise UserError(f'{name} ({kind}) does not know {key!r}; {hint}', option=name)
  if not options.get('path'):
    raise UserError(f"{name} has no path; add 'path': '...'", option=name)
  if options.get('use', '') not in USES:
    choices = ', '.join(map(repr, USES))
    raise UserError(f'{name} has use {options["use"]!r}; choose one of {choices}', option=name)
  if options.get('use') in DIALOGS and kind != 'folder':
    raise UserError(
      f"{name} ({kind}) has use {options['use']!r}, which the format 'folder' has; put the images "
      'in a folder and name the file of conversations or questions with captions=',
      option=name,
    )
  weight = options.get('weight', 1.0)
  window = options.get('window', 1)
  weight_is_valid = not isinstance(weight, bool) and 0 < weight < math.inf
  window_is_valid = not isinstance(window, bool) and window >= 1
  if not (weight_is_valid and window_is_valid):
    raise UserError(
      f'{name}: weight must be a number above 0 (now {weight}) and window an integer of at least '
      f'1 (now {window})',
      option=name,
    )
  image = options.get('image')
  if image and kind in ('arrayrecord', 'codes'):
    reason = 'there are codes in place of images'
    if kind == 'arrayrecord':
      reason = 'each record has one image'
    raise UserError(f'{name} ({kind}) has image {image!r}, but {reason}; leave it out', option=name)
  if image is not None and kind in ('parquet', 'tfds') and not isinstance(image, str):
    raise UserError(
      f'{name} ({kind}) has image {image!r}; give the name of one column or feature', option=name
    )


def _shard_window(window: int | None, shards: int) -> int:
  """Records in a shard's part of a window; of the default a part that is worth a shuffle."""
  if window:
    return -(-window // shards)
  return max(_WINDOW // shards, _MIN_WINDOW)


def _as_names(value: str | Sequence[str]) -> tuple[str, ...]:
  return (value,) if isinstance(value, str) else tuple(value)
