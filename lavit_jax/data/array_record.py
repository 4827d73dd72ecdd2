"""`lavit data pack`: tars -> ArrayRecord, which can be shuffled globally; one file a tar, many at a time, and on from where it stopped.

    OUT/<tar's name>.array_record         records as `formats.pack_record` lays them out, each a group of its own
    OUT/<tar's name>.array_record.json    how many records, and what was skipped for which reason

Pictures stay the bytes they are; of the other members those that are UTF-8 text stay, under their extensions. What holds no picture, or
one that cannot be decoded, is skipped; captions are left for training to judge. A tar without a record leaves its counts alone.
"""

from __future__ import annotations

import collections
import concurrent.futures.process
import functools
import glob
import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lavit_jax.data import archives, formats, tars
from lavit_jax.data.images import open_image
from lavit_jax.errors import UserError

_MEMBERS = 16  # extensions that are kept for messages


class WriteSummary(NamedTuple):
  """`records` written, `skipped` by reason, tars `found` done already, tars that `failed`, with what happened: the next run tries again."""

  records: int
  skipped: dict[str, int]
  found: int
  failed: list[str]


def write_array_records(
  sources: str | Sequence[str],
  out: str,
  workers: int = 1,
  say: Callable[[str], None] = print,
  image: Sequence[str] = formats.IMAGE_EXTENSIONS,
) -> WriteSummary:
  """Packs the tars that paths, globs and braces name into the folder `out`, with so many processes; files that are there already stay.

  `image`: the extensions of pictures, of which a sample's first counts.

  Returns:
    Totals, with those of earlier runs.

  Raises:
    UserError: two tars of the same name, a process that died, tars nowhere, or tars that can be
      read and have no record at all.
  """
  image = tuple(extension.lower() for extension in image)
  files, targets = formats.tar_files(sources), {}
  for file in files:
    target = os.path.join(out, archives.stem(file) + formats.ARRAY_RECORD)
    if targets.setdefault(target, file) != file:
      raise UserError(
        f'{targets[target]} and {file} would both become {target}; pack them into different folders'
      )
  os.makedirs(out, exist_ok=True)
  for half in glob.glob(os.path.join(glob.escape(out), f'.*{formats.ARRAY_RECORD}.half')):
    os.remove(half)  # of a run that was stopped
  waiting = {target: file for target, file in targets.items() if not os.path.exists(target)}
  failed = []
  pool = (
    concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context('spawn'))
    if workers > 1
    else None
  )
  try:
    run = pool.map if pool else map
    for i, (file, error) in enumerate(
      run(functools.partial(_pack_one, image=image), waiting.values(), waiting.keys()), 1
    ):
      failed += [f'{file} {error}'] if error else []
      say(f'{i}/{len(waiting)}  {file}' + (f'  {error}' if error else ''))
  except concurrent.futures.process.BrokenProcessPool:
    raise UserError(
      'a process that packed was killed (out of memory?); the same command goes on, with fewer --workers'
    ) from None
  finally:
    if pool:
      pool.shutdown(wait=True, cancel_futures=True)
  records, skipped, members, broken = 0, collections.Counter(), collections.Counter(), ''
  for target in targets:
    if os.path.exists(f'{target}.json'):
      with open(f'{target}.json', encoding='utf-8') as file:
        about = json.load(file)
      records += about['records']
      skipped.update(about['skipped'])
      members.update(about.get('members', {}))
      broken = broken or about.get('broken', '')
  if not records and not failed:
    raise UserError(_nothing(files, skipped, members, image, broken))
  return WriteSummary(records, dict(skipped), len(targets) - len(waiting), failed)


def _nothing(
  files: Sequence[str],
  skipped: collections.Counter,
  members: collections.Counter,
  image: Sequence[str],
  broken: str,
) -> str:
  """What to say when there is no record in any tar."""
  reasons = (
    ', '.join(f'{reason} {count}' for reason, count in skipped.most_common())
    or 'they have no samples'
  )
  reasons += f' ({broken})' if broken else ''
  line = f'nothing is packed of {formats.some(files, 2)}: {reasons}'
  if members:
    there = [extension for extension, _ in members.most_common()]
    line += (
      f'; the samples have {formats.some(there)}, and the image is looked for in {formats.some(image)}, where an extension is all '
      'behind the first dot of a name; rename the members, or give --image'
    )
  return f'{line}; nothing was written of them'


def _pack_one(file: str, target: str, image: Sequence[str]) -> tuple[str, str]:
  """(the tar, '' or what happened to it). `target` appears when it is complete: of a broken tar, with what comes before the break."""
  from array_record.python.array_record_module import ArrayRecordWriter

  skipped, members, records = collections.Counter(), collections.Counter(), 0
  half = os.path.join(os.path.dirname(target), f'.{os.path.basename(target)}.half')
  writer, broken = None, ''
  try:
    with archives.open_tar(file) as opened:
      writer = ArrayRecordWriter(half, 'group_size:1')
      for sample in tars.samples(opened):
        skipped.update(reason for reason, _ in sample.unread)
        if sample.key is None:
          continue
        fields = dict(sample.fields)
        if len(members) < _MEMBERS:
          members.update(list(fields))
        picture = next((fields.pop(extension) for extension in image if extension in fields), b'')
        reason = _fault(sample, picture)
        if reason:
          skipped[reason] += 1
        else:
          writer.write(formats.pack_record(sample.key, _texts(fields), picture))
          records += 1
  except tars.Broken as error:
    skipped['broken tar'] += 1
    broken = f'{file}: {error}'
  except (
    OSError,
    UserError,
  ) as error:  # of the network or the disk, not of the tar: the next run tries again
    what = f'failed after {records + skipped.total()} samples' if writer else 'could not be opened'
    return file, f'{what}: {error}'
  finally:
    if writer:
      writer.close()
  with open(f'{target}.json', 'w', encoding='utf-8') as about:
    json.dump(
      {
        'records': records,
        'skipped': skipped,
        'members': dict(members.most_common(_MEMBERS)),
        'broken': broken,
      },
      about,
    )
  if records:
    os.replace(half, target)
  elif os.path.exists(half):
    os.remove(half)
  return file, ''


def _fault(sample: tars.Sample, picture: bytes) -> str:
  """Why a sample is skipped; '' if it is not."""
  if sample.repeated:
    return 'repeated member'
  if not picture:
    return 'no image'
  return '' if _whole(picture) else 'corrupt image'


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
