"""The list of sources in a config -> one mixed stream of examples.

    sources=(dict(format='tars', path='gs://BUCKET/laion400m/{00000..41407}.tar', weight=3.0, use='caption'),
             dict(format='parquet', path='hf://datasets/OWNER/NAME/data/*.parquet', text=('caption', 'recaption')))

`format` and `path` are in formats.py, with what `image`, `text`, `split`, `data_dir` and `captions` mean. `weight` (1): how often a
record is of this source, against the others. `use` (''): 'caption', 'draw', 'text' (which needs no picture), or by `data.shares`.
`window` (2048): records of a stream that are shuffled together; these and the next as many are held in memory.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence

import grain
import xxhash

from lavit_jax.data import formats, streams
from lavit_jax.errors import UserError

USES = ('', 'caption', 'draw', 'text')
_OPTIONS = {'tfds': ('split', 'data_dir'), 'folder': ('captions',), 'tars': ('window',), 'parquet': ('window',), 'arrayrecord': ()}
_COMMON = ('format', 'path', 'weight', 'use', 'image', 'text')
_WINDOW, _HELDOUT_WINDOW = 2048, 64


def mix(sources: Sequence[Mapping], seed: int | None, shard_index: int, shard_count: int) -> tuple[grain.IterDataset, dict]:
  """Tickets of all sources, mixed by weight, endless; and all that a position among them depends on, for `streams.Made`.

  `seed` None: every source in its order, and no such account.

  Raises:
    UserError: an option that is unknown or wrong, files that are not there, an empty source.
  """
  opened = [_open(number, dict(source), seed, shard_index, shard_count) for number, source in enumerate(sources)]
  tickets, accounts = zip(*opened)
  weights = [float(source.get('weight', 1.0)) for source in sources]
  of = {} if seed is None else {'seed': seed, 'processes': shard_count, 'sources': list(accounts)}
  return tickets[0] if len(tickets) == 1 else grain.IterDataset.mix(tickets, weights), of


def _open(number: int, options: dict, seed: int | None, shard_index: int, shard_count: int) -> tuple[grain.IterDataset, dict]:
  name = f'sources[{number}]'
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
  if not options.get('weight', 1.0) > 0 or not options.get('window', 1) >= 1:
    raise UserError(f'{name}: weight must be above 0 and window at least 1')
  image, text = formats.DEFAULTS[kind]
  image = options.get('image') or image
  image = _names(image) if kind == 'tars' and image else image
  extra = {key: options[key] for key in _OPTIONS[kind] if key in options and key != 'window'}
  try:
    records = formats.FORMATS[kind](options['path'], image, _names(options.get('text') or text), **extra)
  except UserError as error:
    raise error.within(name) from error
  if not len(records):
    raise UserError(f'{name}: {options["path"]} holds no records')
  use, account = options.get('use', ''), {'format': kind, 'units': len(records)}
  if seed is not None:
    account['files'] = xxhash.xxh32_hexdigest(json.dumps(records.names()).encode())
  if 'window' in known:
    window = account['window'] = options.get('window', _WINDOW) if seed is not None else _HELDOUT_WINDOW
    return streams.Windows(records, number, use, seed, shard_index, shard_count, window), account
  return streams.store(records, number, use, seed, shard_index, shard_count), account


def _names(value: str | Sequence[str]) -> tuple[str, ...]:
  return (value,) if isinstance(value, str) else tuple(value)
