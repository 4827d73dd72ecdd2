"""`lavit data pack`: tars -> ArrayRecord, which can be shuffled globally; one file a tar, many at a time, and on from where it stopped.

    OUT/<tar's name>.array_record         records as `formats.pack_record` lays them out, each a group of its own
    OUT/<tar's name>.array_record.json    how many records, and what was skipped for which reason

Pictures stay the bytes they are; of the other members those that are UTF-8 text stay, under their extensions. What holds no picture, or
one that cannot be decoded, is skipped; captions are left for training to judge.
"""

from __future__ import annotations

import collections
import concurrent.futures
import glob
import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lavit_jax.data import formats, paths, tars
from lavit_jax.data.images import open_image
from lavit_jax.errors import UserError


class Packed(NamedTuple):
  """`records` written, `skipped` by reason, tars `found` done already, tars that `failed`, with what happened: the next run tries again."""

  records: int
  skipped: dict[str, int]
  found: int
  failed: list[str]


def pack(sources: str | Sequence[str], out: str, workers: int = 1, say: Callable[[str], None] = print) -> Packed:
  """Packs the tars that paths, globs and braces name into the folder `out`, with so many processes; files that are there already stay.

  Returns:
    Totals, with those of earlier runs.
  Raises:
    UserError: two tars of the same name, a process that died, or tars nowhere.
  """
  files, targets = paths.expand(sources, '.tar'), {}
  for file in files:
    target = os.path.join(out, os.path.splitext(os.path.basename(file))[0] + formats.ARRAY_RECORD)
    if targets.setdefault(target, file) != file:
      raise UserError(f'{targets[target]} and {file} would both become {target}; pack them into different folders')
  os.makedirs(out, exist_ok=True)
  for half in glob.glob(os.path.join(glob.escape(out), f'.*{formats.ARRAY_RECORD}.half')):
    os.remove(half)  # of a run that was stopped
  waiting = {target: file for target, file in targets.items() if not os.path.exists(target)}
  failed = []
  pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context('spawn')) if workers > 1 else None
  try:
    run = pool.map if pool else map
    for i, (file, error) in enumerate(run(_pack_one, waiting.values(), waiting.keys()), 1):
      failed += [f'{file} {error}'] if error else []
      say(f'{i}/{len(waiting)}  {file}' + (f'  {error}' if error else ''))
  except concurrent.futures.process.BrokenProcessPool:
    raise UserError('a process that packed was killed (out of memory?); the same command goes on, with fewer --workers') from None
  finally:
    if pool:
      pool.shutdown(wait=True, cancel_futures=True)
  records, skipped = 0, collections.Counter()
  for target in targets:
    if os.path.exists(f'{target}.json'):
      with open(f'{target}.json', encoding='utf-8') as file:
        about = json.load(file)
      records += about['records']
      skipped.update(about['skipped'])
  return Packed(records, dict(skipped), len(targets) - len(waiting), failed)


def _pack_one(file: str, target: str) -> tuple[str, str]:
  """(the tar, '' or what happened to it). `target` appears when it is complete: of a broken tar, with what comes before the break."""
  from array_record.python.array_record_module import ArrayRecordWriter
  skipped, records = collections.Counter(), 0
  half = os.path.join(os.path.dirname(target), f'.{os.path.basename(target)}.half')
  try:
    opened = paths.open_file(file)
  except (OSError, UserError) as error:
    return file, f'could not be opened: {error}'
  writer = ArrayRecordWriter(half, 'group_size:1')
  try:
    for _, _, key, sample in tars.samples(opened):
      image = next((sample.pop(extension) for extension in formats.IMAGE_EXTENSIONS if extension in sample), b'')
      reason = '' if image and _whole(image) else 'corrupt image' if image else 'no image'
      if reason:
        skipped[reason] += 1
      else:
        writer.write(formats.pack_record(key, _texts(sample), image))
        records += 1
  except tars.Broken:
    skipped['broken tar'] += 1
  except (OSError, UserError) as error:  # of the network or the disk, not of the tar: the next run tries again
    return file, f'failed after {records + skipped.total()} samples: {error}'
  finally:
    writer.close()
    opened.close()
  with open(f'{target}.json', 'w', encoding='utf-8') as about:
    json.dump({'records': records, 'skipped': skipped}, about)
  os.replace(half, target)
  return file, ''


def _whole(image: bytes) -> bool:
  """Whether a picture can be decoded to its end; JPEGs at an eighth, which reads all of the file."""
  try:
    opened = open_image(image, 'image')
    opened.draft(None, (1, 1))
    opened.load()
    return True
  except Exception:  # a decoder may throw anything at damaged bytes
    return False


def _texts(sample: dict[str, bytes]) -> dict[str, str]:
  texts = {}
  for extension, content in sample.items():
    try:
      texts[extension] = content.decode('utf-8')
    except UnicodeDecodeError:
      pass  # embeddings and the like
  return texts
