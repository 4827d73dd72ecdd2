"""The list of sources in a config -> one mixed stream of examples.

    sources=(dict(format='tars', path='gs://BUCKET/laion400m/{00000..41407}.tar', weight=3.0, use='caption'),
             dict(format='parquet', path='hf://datasets/OWNER/NAME/data/*.parquet', text=('caption', 'recaption')))

`format` and `path` are in formats.py, with what `image`, `text`, `split`, `data_dir` and `captions` mean. `weight` (1): how often a
record is of this source, against the others. `use` (''): 'caption', 'draw', 'text' (which needs no picture), or by `data.shares`.
`window` (2048, or 32 a shard if that is more): records of a stream that are shuffled together; each of `data.shards` has its part of them, and a
process holds the parts of its shards, and the next as many, in memory.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor

import grain
import xxhash

from lavit_jax.data import formats
from lavit_jax.data.skips import About
from lavit_jax.data.streams import OpenUnits, Reader, Shard, Stored, Stream, Windows, store
from lavit_jax.errors import UserError

USES = ('', 'caption', 'draw', 'text')
_OPTIONS = {'tfds': ('split', 'data_dir'), 'folder': ('captions',), 'tars': ('window',), 'parquet': ('window',), 'arrayrecord': ()}
_COMMON = ('format', 'path', 'weight', 'use', 'image', 'text')
_WINDOW, _LEAST_WINDOW, _HELDOUT_WINDOW = 2048, 32, 64


def mix(sources: Sequence[Mapping], seed: int | None, shards: int, held: Sequence[int], name: str = 'sources',
        captioned: bool = True) -> tuple[
    Callable[[Executor], tuple[dict[int, Shard], OpenUnits]], dict]:
  """(`deal` of the shards `held` of so many, all that a position among them depends on), both for `rows.Made`.

  `seed` None: every source in its order, and no such account. `name`: of the option, for messages.
  `captioned`: whether texts are needed; a folder needs no captions without.

  Raises:
    UserError: an option that is unknown or wrong, files that are not there, an empty source.
  """
  opened, accounts, abouts = zip(*(
      _open(f'{name}[{number}]', number, dict(source), seed, shards, captioned)
      for number, source in enumerate(sources)))
  weights = [float(source.get('weight', 1.0)) for source in sources]

  def deal(pool: Executor) -> tuple[dict[int, Shard], OpenUnits]:
    streams = [source for source in opened if isinstance(source, Stream)]
    dealt, units = [], OpenUnits(sum(len({shard // stream.fan for shard in held}) for stream in streams))
    for source in opened:
      if isinstance(source, Stream):
        among = {}  # the shards of each reader
        for shard in held:
          among.setdefault(shard // source.fan, []).append(shard % source.fan)
        readers = {index: Reader(source, index, mine, pool, units) for index, mine in among.items()}
        dealt.append([Windows(readers[shard // source.fan], shard % source.fan) for shard in held])
      else:
        dealt.append([Stored(source, shard, shards) for shard in held])
    return {shard: Shard(shard, shards, of_shard, weights, abouts) for shard, of_shard in zip(held, zip(*dealt))}, units

  return deal, {} if seed is None else {'seed': seed, 'shards': shards, 'sources': list(accounts)}


def check_files(name: str, sources: Sequence[Mapping], limit: float) -> None:
  """Asks for the tars of `sources`, which are opened only as they are read; the files of the other formats have been.

  Raises:
    UserError: of a source more than the share `limit` are not there.
  """
  for number, source in enumerate(sources):
    if source['format'] == 'tars':
      records = formats.Tars(source['path'], None, ())
      asked = [(file, size) for file, (_, size) in zip(records.files, records.names()) if size is not None]
      absent = [file for file, size in asked if size < 0]
      if len(absent) > limit * len(asked):
        raise UserError(f'{name}[{number}]: {len(absent)} of {len(asked)} tars are not there, such as {absent[0]}; check the path')


def _open(
    name: str, number: int, options: dict, seed: int | None, shards: int, captioned: bool = True
) -> tuple[Stream | grain.MapDataset, dict, About]:
  kind = options.get('format')
  if kind not in formats.FORMATS:
    raise UserError(f'{name} has format {kind!r}; choose one of {", ".join(formats.FORMATS)}')
  known = _COMMON + _OPTIONS[kind]
  for key in options:
    if key not in known:
      near = difflib.get_close_matches(key, known, n=1)
      hint = f'did you mean {near[0]!r}?' if near else f'it knows {", ".join(known)}'
      raise UserError(f'{name} ({kind}) does not know {key!r}; {hint}')
  if not options.get('path'):
    raise UserError(f'{name} has no path')
  if options.get('use', '') not in USES:
    raise UserError(f'{name} has use {options["use"]!r}; choose one of {", ".join(map(repr, USES))}')
  weight, window = options.get('weight', 1.0), options.get('window', 1)
  if isinstance(weight, bool) or not 0 < weight < math.inf or isinstance(window, bool) or window < 1:
    raise UserError(f'{name}: weight must be a number above 0 (now {weight}) and window an integer of at least 1 (now {window})')
  _check_values(name, kind, options)
  image, text = formats.DEFAULTS[kind]
  image = options.get('image') or image
  image = _names(image) if kind == 'tars' and image else image
  extra = {key: options[key] for key in _OPTIONS[kind] if key in options and key != 'window'}
  if kind == 'folder':
    extra |= {'use': options.get('use', ''), 'captioned': captioned}
  try:
    records = formats.FORMATS[kind](options['path'], image, _names(options.get('text') or text), **extra)
  except UserError as error:
    raise error.within(name) from error
  if not len(records):
    raise UserError(f'{name}: {options["path"]} holds no records')
  path = options['path'] if isinstance(options['path'], str) else formats.some(map(str, options['path']), 2)
  about = About(name, f'{kind} {path}', len(records) if 'window' in known else 1, getattr(records, 'looked_for', ''))
  use, account = options.get('use', ''), {'format': kind, 'units': len(records)}
  if seed is not None:
    account['files'] = xxhash.xxh32_hexdigest(json.dumps(records.names()).encode())
    if kind == 'folder':
      account['contents'] = records.digest()
  if 'window' in known:
    window = account['window'] = _window(options.get('window'), shards) if seed is not None else max(_HELDOUT_WINDOW // shards, _LEAST_WINDOW)
    return Stream.of(records, number, use, seed, window, shards, name), account, about
  return store(records, number, use, seed), account, about


def _check_values(name: str, kind: str, options: Mapping) -> None:
  """Raises UserError where a format has no such option, or reads one name where several are given."""
  image = options.get('image')
  if image and kind == 'arrayrecord':
    raise UserError(f'{name} (arrayrecord) has image {image!r}, but each record has one image; leave it out')
  if image is not None and kind in ('parquet', 'tfds') and not isinstance(image, str):
    raise UserError(f'{name} ({kind}) has image {image!r}; give the name of one column or feature')


def _window(asked: int | None, shards: int) -> int:
  """Records of a shard's window: its part of what is asked for, or of the default, which stays worth a shuffle."""
  return -(-asked // shards) if asked else max(_WINDOW // shards, _LEAST_WINDOW)


def _names(value: str | Sequence[str]) -> tuple[str, ...]:
  return (value,) if isinstance(value, str) else tuple(value)
