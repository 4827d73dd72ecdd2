"""What is left out of the data: counted by reason and by source, and judged by source.

A source is a fault of the input when too large a share of its records is skipped. The records of a
stream come tar by tar, so a tar that is bad as a whole must not pass for the source: each unit (a
tar, a row group) has a share of its own, and the share of the source is the smaller one of

    all skipped records / all records, and
    the mean over the units of (skipped records / records of the unit).

It is judged after 1,000 records, and when 20 units have been seen, or all if there are fewer. Before
that the unit that lost most is left aside, and the rest must have 1,000 records.

Where several processes read, each knows its own part alone; they add up what they know (`share_of`)
each time that the metrics are written.
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Iterable
from typing import NamedTuple

from lavit_jax.data.formats import Skip
from lavit_jax.errors import UserError

_LEAST = {'records': 1000, 'files': 20}  # seen before their share of skipped ones means something
_LEAST_UNITS = 20
_TOLD = 3  # of each reason, by name
_OF_LOOKING = ('no image', 'empty caption')  # reasons where it helps to say what was looked for


class About(NamedTuple):
  """A source, for messages: 'sources[1]', its path, its units (1 of a store) and what is looked for in a record."""

  name: str = 'the data'
  path: str = ''
  units: int = 1
  looked_for: str = ''


class _Account:
  """What is known of one source."""

  def __init__(self, about: About):
    self.about = about
    self.seen, self.skipped, self.reasons = collections.Counter(), collections.Counter(), collections.Counter()
    self.units = {}  # unit -> [records, skipped ones]
    self.unit_shares = 0.0  # their sum
    self.last = None

  def add_record(self, unit: int, is_skipped: bool) -> None:
    counts = self.units.setdefault(unit, [0, 0])
    before = counts[1] / counts[0] if counts[0] else 0.0
    counts[0] += 1
    counts[1] += is_skipped
    self.unit_shares += counts[1] / counts[0] - before

  def share(self, unit: str) -> float | None:
    """The share of skipped records or files; None: too few have been seen."""
    seen, skipped = self.seen[unit], self.skipped[unit]
    if seen < _LEAST[unit]:
      return None
    if unit == 'files':
      return skipped / seen
    if len(self.units) >= min(self.about.units, _LEAST_UNITS):
      return min(skipped / seen, 1.0 if skipped == seen else self.unit_shares / len(self.units))
    worst = max(self.units.values(), key=lambda counts: counts[1])
    seen, skipped = seen - worst[0], skipped - worst[1]
    return skipped / seen if seen >= _LEAST[unit] else None


class Skipped:
  """Counts what this process left out by reason, since it started, and names the first few.

  `alone`: it is the only process that reads, so that its shares are those of all.
  """

  def __init__(self, alone: bool = True):
    self.seen, self.skipped, self.reasons = collections.Counter(), collections.Counter(), collections.Counter()
    self._alone, self._sources = alone, {}

  def add(self, made: dict | Skip, limit: float, source: int = 0, about: About = About(), unit: int = 0) -> None:
    """Counts an example, or a Skip, of a unit of a source.

    Raises:
      UserError: more than the share `limit` of the source's records or files was skipped, or all
        its records, whatever the limit.
    """
    account = self._sources.get(source)
    if account is None:
      account = self._sources[source] = _Account(about)
    kind = made.unit if isinstance(made, Skip) else 'records'
    is_skipped = isinstance(made, Skip) and bool(made.reason)
    self.seen[kind] += 1
    account.seen[kind] += 1
    if kind == 'records':
      account.add_record(unit, is_skipped)
    if not is_skipped:
      return
    for counts in (self, account):
      counts.skipped[kind] += 1
      counts.reasons[made.reason] += 1
    if self.reasons[made.reason] <= _TOLD:
      logging.getLogger(__name__).warning('skipped: %s, %s', made.reason, made.origin)
    if kind == 'members':
      return
    account.last = made
    share = account.share(kind)
    if share is None:
      return
    nothing = kind == 'records' and share == 1  # files without a record: streams.py
    if nothing or self._alone and share > limit:
      raise UserError(self._fault(account, kind, account.skipped[kind], account.seen[kind], limit))

  def metrics(self) -> dict[str, int]:
    """{'data/skipped_corrupt_image': 3, ...}."""
    return {f'data/skipped_{reason.replace(" ", "_")}': count for reason, count in sorted(self.reasons.items())}

  def account_of(self, source: int) -> dict[str, list]:
    """What this process knows of a source, for `check`: numbers that can be added up."""
    account = self._sources.get(source) or _Account(About())
    return {'records': [account.seen['records'], account.skipped['records']],
            'files': [account.seen['files'], account.skipped['files']],
            'units': [len(account.units), round(account.unit_shares, 6)]}

  def check(self, source: int, accounts: Iterable[dict[str, list]], limit: float) -> None:
    """Judges a source by what all processes know of it, which `accounts` are.

    Raises:
      UserError: as `add`.
    """
    total = {'records': [0, 0], 'files': [0, 0], 'units': [0, 0]}
    for account in accounts:
      for key, numbers in account.items():
        total[key] = [a + b for a, b in zip(total[key], numbers)]
    mine = self._sources.get(source) or _Account(About(f'sources[{source}]'))
    units, unit_shares = total['units']
    for kind in ('records', 'files'):
      seen, skipped = total[kind]
      if seen < _LEAST[kind] or kind == 'records' and units < min(mine.about.units, _LEAST_UNITS):
        continue
      share = skipped / seen if kind == 'files' else min(skipped / seen, unit_shares / units)
      if share > limit:
        raise UserError(self._fault(mine, kind, skipped, seen, limit))

  @staticmethod
  def _fault(account: _Account, kind: str, skipped: int, seen: int, limit: float) -> str:
    about = account.about
    reasons = ', '.join(f'{reason} {count}' for reason, count in account.reasons.most_common())
    where = f'{about.name} ({about.path})' if about.path else about.name
    line = f'{where}: {skipped} of {seen} {kind} were skipped ({reasons})'
    if account.last:
      line += f', the last one {account.last.origin}'
    if about.looked_for and any(reason in account.reasons for reason in _OF_LOOKING):
      line += f'; looked for: {about.looked_for}; name what is there with image= and text='
    if skipped == seen:
      return f'{line}; there is no example in the data'
    return f'{line}; mend the data or raise data.max_skipped={limit}'
