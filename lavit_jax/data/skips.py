"""What is left out of the data: counted by reason and by source, and judged by source.

A source is faulty when too large a share of its records is skipped. The records of a stream come
tar by tar, so one tar that is bad as a whole must not count as the whole source: each unit (a tar,
a row group) has a share of its own, and the share of the source is the smaller one of

    skipped records / all records, and
    the mean over the units of (skipped records / records of the unit).

It is judged after 1,000 records, and when 20 units have been seen, or all if there are fewer.
Before that the worst unit is left aside, and the rest must have 1,000 records. Files are judged
after 20 of them; of fewer than 20 different files one bad file is left aside.

A source that is read again in a later epoch brings the same records and files. Each file counts
once, and so does each record while a source has no more than 10,000 of them; the records of larger
sources count each time that they are read, which leaves their share as it is.

Where several processes read, each has counts of its own part; they add them up (`account_of`,
`check`) each time that the metrics are written. A file that several of them have read counts once;
a record that they have read in different epochs counts once in each.
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lavit_jax.data.record import EMPTY_CAPTION, NO_IMAGE, Skip
from lavit_jax.errors import UserError

_MIN_READ = {'records': 1000, 'files': 20}  # reads before their share of skipped ones is judged
_MIN_UNITS = 20
_MAX_DISTINCT = 10_000  # records of a source that are remembered
_MAX_LISTED_FILES = 512  # of a source whose files are listed one by one to other processes
_LOGGED = 3  # skips of each reason that are logged
_FIELD_REASONS = (NO_IMAGE, EMPTY_CAPTION)  # where the message names the expected fields


class SourceInfo(NamedTuple):
  """A source, for messages.

  Attributes:
    name: such as 'sources[1]'.
    path: format and path.
    units: the number of units; 1 of a store.
    expected_fields: where images and texts are read from.
  """

  name: str = 'the data'
  path: str = ''
  units: int = 1
  expected_fields: str = ''


class _UnitCounts:
  """The records of a unit: how often they were read, how many there are, how many are skipped."""

  def __init__(self) -> None:
    self.read = 0
    self.seen = 0
    self.skipped = 0

  @property
  def share(self) -> float:
    return self.skipped / self.seen if self.seen else 0.0


class _Account:
  """The counts of one source.

  `read` counts each time that a record or file is read; `seen` and `skipped` count each of them
  once, as the module says. Files are sets of units, as the bits of an integer.
  """

  def __init__(self, info: SourceInfo):
    self.info = info
    self.read: collections.Counter[str] = collections.Counter()
    self.seen: collections.Counter[str] = collections.Counter()
    self.skipped: collections.Counter[str] = collections.Counter()
    self.reasons: collections.Counter[str] = collections.Counter()
    self.units: dict[int, _UnitCounts] = {}
    self.unit_shares = 0.0  # the sum of their shares
    self.files_seen = 0
    self.files_skipped = 0
    self.last: Skip | None = None
    self._records_seen: set[tuple[int, int]] = set()  # (unit, position)
    self._records_skipped: set[tuple[int, int]] = set()

  def add_record(self, unit: int, position: int | None, is_skipped: bool) -> bool:
    """Counts a record, and returns whether it is counted as skipped for the first time.

    A record without a position counts each time.
    """
    counts = self.units.setdefault(unit, _UnitCounts())
    counts.read += 1
    self.read['records'] += 1
    seen_first = True
    skipped_first = is_skipped
    if position is not None and len(self._records_seen) <= _MAX_DISTINCT:
      record = (unit, position)
      seen_first = record not in self._records_seen
      skipped_first = is_skipped and record not in self._records_skipped
      self._records_seen.add(record)
      if is_skipped:
        self._records_skipped.add(record)
    before = counts.share
    counts.seen += seen_first
    counts.skipped += skipped_first
    self.unit_shares += counts.share - before
    self.seen['records'] += seen_first
    return skipped_first

  def add_file(self, unit: int, is_skipped: bool) -> bool:
    """Counts a file, and returns whether it is skipped for the first time."""
    bit = 1 << unit
    skipped_first = is_skipped and not self.files_skipped & bit
    self.read['files'] += 1
    self.files_seen |= bit
    self.seen['files'] = self.files_seen.bit_count()
    if is_skipped:
      self.files_skipped |= bit
    return skipped_first

  def record_share(self) -> float | None:
    """The share of skipped records; None: too few have been read."""
    if self.read['records'] < _MIN_READ['records']:
      return None
    seen = self.seen['records']
    skipped = self.skipped['records']
    if len(self.units) >= min(self.info.units, _MIN_UNITS):
      if skipped == seen:
        return 1.0
      return min(skipped / seen, self.unit_shares / len(self.units))
    worst = max(self.units.values(), key=lambda counts: counts.skipped)
    if self.read['records'] - worst.read < _MIN_READ['records']:
      return None
    return (skipped - worst.skipped) / (seen - worst.seen)


def _file_share(read: int, seen: int, skipped: int) -> float | None:
  """The share of skipped files; None: too few have been read. Of few files one is left aside."""
  if read < _MIN_READ['files']:
    return None
  if seen < _MIN_READ['files']:
    return max(skipped - 1, 0) / max(seen - 1, 1)
  return skipped / seen


class SkipCounter:
  """Counts by reason what this process left out since it started, and logs the first few.

  Args:
    alone: this process is the only one that reads, so that its shares are those of all.

  Attributes:
    seen, skipped: {'records', 'files', 'members': count} over all sources.
    reasons: {reason: count} over all sources.
  """

  def __init__(self, alone: bool = True):
    self.seen: collections.Counter[str] = collections.Counter()
    self.skipped: collections.Counter[str] = collections.Counter()
    self.reasons: collections.Counter[str] = collections.Counter()
    self._alone = alone
    self._accounts: dict[int, _Account] = {}

  def add(
    self,
    outcome: Mapping[str, Any] | Skip,
    limit: float,
    source: int = 0,
    info: SourceInfo | None = None,
    unit: int = 0,
    position: int | None = None,
  ) -> None:
    """Counts an example or a Skip.

    Args:
      outcome: an example, or why there is none.
      limit: the share of skipped records or files that is allowed.
      source: the number of the source.
      info: the source, for messages.
      unit: the unit of the source.
      position: of the record in the unit; None: it counts each time.

    Raises:
      UserError: more than `limit` of the source's records or files are skipped, or all of its
        records, whatever the limit.
    """
    account = self._accounts.get(source)
    if account is None:
      account = self._accounts[source] = _Account(info or SourceInfo())
    kind = outcome.unit if isinstance(outcome, Skip) else 'records'
    reason = outcome.reason if isinstance(outcome, Skip) else ''
    seen_before = account.seen[kind]
    if kind == 'records':
      is_first = account.add_record(unit, position, bool(reason))
    elif kind == 'files':
      is_first = account.add_file(unit, bool(reason))
    else:
      is_first = bool(reason)
      account.seen[kind] += 1
    self.seen[kind] += account.seen[kind] - seen_before
    if not isinstance(outcome, Skip) or not reason:
      return
    if is_first:
      self._count_skip(account, outcome)
    if kind == 'members':
      return
    account.last = outcome
    self._judge(account, kind, limit)

  def _count_skip(self, account: _Account, skip: Skip) -> None:
    for counts in (self, account):
      counts.skipped[skip.unit] += 1
      counts.reasons[skip.reason] += 1
    if self.reasons[skip.reason] <= _LOGGED:
      logging.getLogger(__name__).warning('skipped: %s, %s', skip.reason, skip.origin)

  def _judge(self, account: _Account, kind: str, limit: float) -> None:
    """Raises UserError if too much of the source is skipped."""
    seen = account.seen[kind]
    skipped = account.skipped[kind]
    if kind == 'records':
      share = account.record_share()
      no_example = share == 1  # streams.py raises an error for files without a record
    else:
      share = _file_share(account.read[kind], seen, skipped)
      no_example = False
    if share is not None and (no_example or (self._alone and share > limit)):
      raise UserError(_describe_fault(account, kind, skipped, seen, limit))

  def metrics(self) -> dict[str, int]:
    """{'data/skipped_corrupt_image': 3, ...}."""
    return {
      f'data/skipped_{reason.replace(" ", "_")}': count
      for reason, count in sorted(self.reasons.items())
    }

  def account_of(self, source: int) -> dict[str, list]:
    """The counts of this process of a source, for `check`, as a few hundred bytes of JSON.

    Returns:
      {'records': [read, seen, skipped], 'files': the same, 'units': [number, sum of shares],
      'file_bits': [seen, skipped] in hexadecimal, or [] of a source with many files}.
    """
    account = self._accounts.get(source) or _Account(SourceInfo())
    bits = []
    if account.info.units <= _MAX_LISTED_FILES:
      bits = [f'{account.files_seen:x}', f'{account.files_skipped:x}']
    counts = {
      kind: [account.read[kind], account.seen[kind], account.skipped[kind]]
      for kind in ('records', 'files')
    }
    units = [len(account.units), round(account.unit_shares, 6)]
    return {**counts, 'units': units, 'file_bits': bits}

  def check(self, source: int, accounts: Iterable[Mapping[str, list]], limit: float) -> None:
    """Judges a source by the `accounts` of all processes.

    Raises:
      UserError: as `add`.
    """
    accounts = list(accounts)
    own = self._accounts.get(source) or _Account(SourceInfo(f'sources[{source}]'))
    read, seen, skipped = _sum_columns(account['records'] for account in accounts)
    units, unit_shares = _sum_columns(account['units'] for account in accounts)
    enough_units = units >= min(own.info.units, _MIN_UNITS)
    if read >= _MIN_READ['records'] and enough_units:
      if min(skipped / seen, unit_shares / units) > limit:
        raise UserError(_describe_fault(own, 'records', skipped, seen, limit))
    read, seen, skipped = _sum_columns(account['files'] for account in accounts)
    if all(account['file_bits'] for account in accounts):  # a file that two read counts once
      files_seen = 0
      files_skipped = 0
      for account in accounts:
        files_seen |= int(account['file_bits'][0], 16)
        files_skipped |= int(account['file_bits'][1], 16)
      seen = files_seen.bit_count()
      skipped = files_skipped.bit_count()
    share = _file_share(read, seen, skipped)
    if share is not None and share > limit:
      raise UserError(_describe_fault(own, 'files', skipped, seen, limit))


def _sum_columns(rows: Iterable[list]) -> list:
  """The sums of the columns of a table."""
  return [sum(column) for column in zip(*rows, strict=True)]


def _describe_fault(account: _Account, kind: str, skipped: int, seen: int, limit: float) -> str:
  """The message for a source of which too much is skipped: what, why, where, and the remedy."""
  info = account.info
  reasons = ', '.join(f'{reason} {count}' for reason, count in account.reasons.most_common())
  where = f'{info.name} ({info.path})' if info.path else info.name
  line = f'{where}: {skipped} of {seen} {kind} were skipped ({reasons})'
  if account.last:
    line += f', the last one {account.last.origin}'
  if info.expected_fields and any(reason in account.reasons for reason in _FIELD_REASONS):
    line += f'; looked for: {info.expected_fields}; name what is there with image= and text='
  if skipped == seen:
    return f'{line}; there is no example in the data'
  return f'{line}; mend the data or raise data.max_skipped={limit}'
