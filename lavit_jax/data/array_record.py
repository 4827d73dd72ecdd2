"""`lavit data pack`: tars -> ArrayRecord files, which can be shuffled globally.

    OUT/<tar's name>.array_record         one record for each sample (stores.pack_record)
    OUT/<tar's name>.array_record.json    the number of records, and of skipped samples by reason

One file is written for each tar, several at a time; a run that was stopped goes on with the tars
that have no file yet. Images stay the bytes they are; of the other members those that are UTF-8
text stay, under their extensions. Samples without an image, or with one that cannot be decoded, are
skipped; captions are left for training to judge. A tar without a record has only a file of counts.
"""

from __future__ import annotations

import collections
import concurrent.futures.process
import functools
import glob
import json
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from array_record.python.array_record_module import ArrayRecordWriter

from lavit_jax.data import archives, formats, tars
from lavit_jax.data.images import open_image
from lavit_jax.data.record import IMAGE_EXTENSIONS, NO_IMAGE, format_names
from lavit_jax.data.stores import ARRAY_RECORD, pack_record
from lavit_jax.errors import UserError

_MAX_EXTENSIONS = 16  # kept for messages


class WriteSummary(NamedTuple):
  """Totals of `write_array_records`, over all runs.

  Attributes:
    records: the number of records.
    skipped: {reason: number of samples}.
    existing: the number of tars that were done before.
    failed: tars that could not be read, with the reason; the next run tries them again.
  """

  records: int
  skipped: dict[str, int]
  existing: int
  failed: list[str]


class _TarCounts:
  """What was written and skipped of a tar, or of all of them."""

  def __init__(self) -> None:
    self.records = 0
    self.skipped: collections.Counter[str] = collections.Counter()
    self.extensions: collections.Counter[str] = collections.Counter()
    self.broken = ''  # the first broken tar, and why

  def add_file(self, path: str) -> None:
    """Adds the counts that `write` wrote."""
    with open(path, encoding='utf-8') as file:
      counts = json.load(file)
    self.records += counts['records']
    self.skipped.update(counts['skipped'])
    self.extensions.update(counts.get('members', {}))
    self.broken = self.broken or counts.get('broken', '')

  def write(self, path: str) -> None:
    counts = {
      'records': self.records,
      'skipped': self.skipped,
      'members': dict(self.extensions.most_common(_MAX_EXTENSIONS)),
      'broken': self.broken,
    }
    with open(path, 'w', encoding='utf-8') as file:
      json.dump(counts, file)


def write_array_records(
  sources: str | Sequence[str],
  out: str,
  workers: int = 1,
  log: Callable[[str], None] = print,
  image: Sequence[str] = IMAGE_EXTENSIONS,
) -> WriteSummary:
  """Packs tars into the folder `out`; files that exist there already stay.

  Args:
    sources: paths, globs and braces of tars.
    out: a local folder.
    workers: the number of processes.
    log: prints a line about each tar.
    image: extensions of images, of which a sample's first counts.

  Returns:
    Totals, with those of earlier runs.

  Raises:
    UserError: two tars of the same name, a process that died, no tars, or tars that can be read and
      have no record at all.
  """
  image = tuple(extension.lower() for extension in image)
  files = formats.tar_files(sources)
  names = archives.result_names(files, ARRAY_RECORD)
  targets = {os.path.join(out, name): file for name, file in names.items()}
  os.makedirs(out, exist_ok=True)
  for partial_file in glob.glob(os.path.join(glob.escape(out), f'.*{ARRAY_RECORD}.half')):
    os.remove(partial_file)  # of a run that was stopped
  waiting = {target: file for target, file in targets.items() if not os.path.exists(target)}
  failed = _pack_all(waiting, workers, log, image)
  total = _TarCounts()
  for target in targets:
    if os.path.exists(f'{target}.json'):
      total.add_file(f'{target}.json')
  if not total.records and not failed:
    raise UserError(_describe_nothing(files, total, image))
  return WriteSummary(total.records, dict(total.skipped), len(targets) - len(waiting), failed)


def _pack_all(
  waiting: Mapping[str, str], workers: int, log: Callable[[str], None], image: Sequence[str]
) -> list[str]:
  """Packs {file to write: tar}, and returns the tars that failed, with the reasons."""
  failed = []
  pool = None
  if workers > 1:
    context = multiprocessing.get_context('spawn')
    pool = concurrent.futures.ProcessPoolExecutor(workers, context)
  run = pool.map if pool else map
  pack = functools.partial(_pack_one, image=image)
  try:
    for number, (file, error) in enumerate(run(pack, waiting.values(), waiting.keys()), 1):
      line = f'{number}/{len(waiting)}  {file}'
      if error:
        failed.append(f'{file} {error}')
        line += f'  {error}'
      log(line)
  except concurrent.futures.process.BrokenProcessPool:
    raise UserError(
      'a process that packed was killed (out of memory?); the same command goes on, with fewer '
      '--workers'
    ) from None
  finally:
    if pool:
      pool.shutdown(wait=True, cancel_futures=True)
  return failed


def _describe_nothing(files: Sequence[str], total: _TarCounts, image: Sequence[str]) -> str:
  """The message for tars without any record."""
  reasons = ', '.join(f'{reason} {count}' for reason, count in total.skipped.most_common())
  line = f'nothing is packed of {format_names(files, 2)}: {reasons or "they have no samples"}'
  if total.broken:
    line += f' ({total.broken})'
  if total.extensions:
    extensions = [extension for extension, _ in total.extensions.most_common()]
    line += (
      f'; the samples have {format_names(extensions)}, and the image is looked for in '
      f'{format_names(image)}, where an extension is all after the first dot of a name; rename '
      'the members, or give --image'
    )
  return f'{line}; nothing was written of them'


def _pack_one(file: str, target: str, image: Sequence[str]) -> tuple[str, str]:
  """Packs a tar; `target` appears when it is complete.

  Of a broken tar it has what comes before the break.

  Returns:
    The tar, and the reason why it failed, or ''.
  """
  counts = _TarCounts()
  partial_file = os.path.join(os.path.dirname(target), f'.{os.path.basename(target)}.half')
  writer = None
  try:
    with archives.open_tar(file) as opened:
      writer = ArrayRecordWriter(partial_file, 'group_size:1')
      for sample in tars.samples(opened):
        _pack_sample(sample, image, writer, counts)
  except tars.Broken as error:
    counts.skipped['broken tar'] += 1
    counts.broken = f'{file}: {error}'
  except (OSError, UserError) as error:  # of the network or the disk: the next run tries again
    if not writer:
      return file, f'could not be opened: {error}'
    return file, f'failed after {counts.records + counts.skipped.total()} samples: {error}'
  finally:
    if writer:
      writer.close()
  counts.write(f'{target}.json')
  if counts.records:
    os.replace(partial_file, target)
  elif os.path.exists(partial_file):
    os.remove(partial_file)
  return file, ''


def _pack_sample(
  sample: tars.Sample, image: Sequence[str], writer: ArrayRecordWriter, counts: _TarCounts
) -> None:
  """Writes the record of a sample, or counts why there is none."""
  counts.skipped.update(reason for reason, _ in sample.unread)
  if sample.key is None:
    return
  fields = dict(sample.fields)
  if len(counts.extensions) < _MAX_EXTENSIONS:
    counts.extensions.update(list(fields))
  images = (fields.pop(extension) for extension in image if extension in fields)
  image_file = next(images, b'')
  reason = _fault(sample, image_file)
  if reason:
    counts.skipped[reason] += 1
    return
  writer.write(pack_record(sample.key, _decode_texts(fields), image_file))
  counts.records += 1


def _fault(sample: tars.Sample, image: bytes) -> str:
  """Why a sample is skipped; '' if it is not."""
  if sample.repeated:
    return 'repeated member'
  if not image:
    return NO_IMAGE
  return '' if _can_decode(image) else 'corrupt image'


def _can_decode(image: bytes) -> bool:
  """Whether an image can be decoded to its end.

  JPEGs are decoded at an eighth of their size, which reads all of the file.
  """
  try:
    opened = open_image(image, 'image')
    opened.draft(None, (1, 1))
    opened.load()
    return True
  except Exception:  # a decoder may raise anything at damaged bytes
    return False


def _decode_texts(fields: Mapping[str, bytes]) -> dict[str, str]:
  """The fields that are UTF-8 text; embeddings and the like are left out."""
  texts = {}
  for extension, content in fields.items():
    try:
      texts[extension] = content.decode('utf-8')
    except UnicodeDecodeError:
      continue
  return texts
