"""Skips are judged by source, over all units and processes; what is read again counts once."""

import json

import pytest

from lavit_jax.data.record import Skip
from lavit_jax.data.skips import SkipCounter, SourceInfo
from lavit_jax.errors import UserError

TARS = SourceInfo('sources[0]', 'tars x', 40, 'text in txt')
BAD = Skip('no image', 'x.tar: 7 (txt)')
BROKEN = Skip('broken tar', 'x.tar (it is empty)', 'files')
ENDED = Skip('', 'y.tar', 'files')


def add(skipped, good, bad, unit, limit=0.05, source=0, info=TARS, start=0):
  """Adds records of a unit: the bad ones, then the good ones, from position `start` on."""
  for position in range(start, start + bad):
    skipped.add(BAD, limit, source, info, unit, position)
  for position in range(start + bad, start + bad + good):
    skipped.add({}, limit, source, info, unit, position)


def test_one_bad_unit_is_one_of_many():
  skipped = SkipCounter()
  add(skipped, 0, 5000, 0)
  for unit in range(1, 20):
    add(skipped, 100, 0, unit)
  add(skipped, 0, 5000, 0)  # in the next epoch too: 1 of 20 is no more than 5%
  with pytest.raises(
    UserError,
    match=r'^sources\[0\] \(tars x\): 5001 of 6901 records were skipped .*; '
    r'looked for: text in txt; .*data.max_skipped=0.05$',
  ):
    add(skipped, 0, 5000, 20)


def test_what_is_bad_everywhere_is_reported_before_many_units_are_seen():
  skipped = SkipCounter()
  add(skipped, 700, 300, 0)
  with pytest.raises(UserError, match=': 601 of 2001 records were skipped'):
    for n in range(10):
      add(skipped, 70, 30, 1, start=100 * n)
    add(skipped, 0, 1, 1, start=1000)


def test_a_small_source_does_not_hide_behind_a_large_one():
  skipped = SkipCounter()
  add(skipped, 30_000, 0, 0)
  small = SourceInfo('sources[1]', 'tars y', 1, '')
  with pytest.raises(UserError, match=r'^sources\[1\] \(tars y\): 400 of 1000 records'):
    add(skipped, 600, 399, 0, source=1, info=small, start=1)
    add(skipped, 0, 1, 0, source=1, info=small)


def test_processes_add_up_their_counts():
  """One of two meets more than the limit, both together do not; until the other one does too."""
  one = SkipCounter(alone=False)
  other = SkipCounter(alone=False)
  for unit in range(20):
    add(one, 92, 8, unit)
    add(other, 99, 1, unit)
  one.check(0, [one.account_of(0), other.account_of(0)], 0.05)
  for unit in range(20):
    add(other, 80, 20, unit, start=100)
  for process in (one, other):  # 580 of 6,000; the mean over the units is 0.0925
    with pytest.raises(
      UserError, match=r'^sources\[0\] \(tars x\): 580 of 6000 records were skipped'
    ):
      process.check(0, [one.account_of(0), other.account_of(0)], 0.05)


def test_a_process_that_finds_nothing_does_not_wait_for_the_others():
  skipped = SkipCounter(alone=False)
  add(skipped, 0, 3000, 0)
  with pytest.raises(UserError, match='no example'):
    add(skipped, 0, 1000, 1)


def test_members_are_counted_only():
  skipped = SkipCounter()
  for _ in range(2000):
    skipped.add(Skip('link', 'x.tar: a', 'members'), 0.05, 0, TARS, 0)
  assert skipped.metrics() == {'data/skipped_link': 2000} and skipped.seen['records'] == 0


def add_epochs(skipped, units, bad, epochs):
  """Adds the ends of `units` files, of which those in `bad` are broken, in several epochs."""
  for _ in range(epochs):
    for unit in range(units):
      skipped.add(BROKEN if unit in bad else ENDED, 0.05, 0, TARS, unit)


def test_a_file_counts_once_in_all_epochs():
  skipped = SkipCounter()
  add_epochs(skipped, 9, {3}, 50)
  assert skipped.metrics() == {'data/skipped_broken_tar': 1}
  assert skipped.seen['files'] == 9 and skipped.skipped['files'] == 1
  with pytest.raises(UserError, match=r'2 of 9 files were skipped \(broken tar 2\)'):
    add_epochs(skipped, 9, {3, 7}, 1)


def test_of_twenty_files_none_is_left_aside():
  skipped = SkipCounter()
  add_epochs(skipped, 20, {3}, 2)  # 5% is no more than the limit
  with pytest.raises(UserError, match=r'2 of 20 files were skipped'):
    add_epochs(skipped, 20, {3, 7}, 1)


def test_a_file_that_several_processes_read_counts_once():
  processes = [SkipCounter(alone=False) for _ in range(4)]
  for process in processes:
    add_epochs(process, 9, {3}, 50)
  accounts = json.loads(json.dumps([process.account_of(0) for process in processes]))
  processes[0].check(0, accounts, 0.05)
  add_epochs(processes[1], 9, {8}, 1)
  accounts = [process.account_of(0) for process in processes]
  with pytest.raises(UserError, match='2 of 9 files were skipped'):
    processes[0].check(0, accounts, 0.05)


def test_an_account_of_many_files_is_small():
  many = SourceInfo('sources[0]', 'tars x', 41_408, '')
  skipped = SkipCounter(alone=False)
  for unit in range(0, 41_408, 7):
    skipped.add(ENDED, 0.05, 0, many, unit)
  assert len(json.dumps(skipped.account_of(0))) < 300
  skipped.check(0, [skipped.account_of(0)] * 3, 0.05)
  few = SkipCounter(alone=False)
  few.add(BROKEN, 0.05, 0, SourceInfo('sources[0]', 'tars x', 512, ''), 511)
  assert len(json.dumps(few.account_of(0))) < 500


@pytest.mark.parametrize('bad, message', [(8, '8 of 8 .*no example'), (1, '1 of 8 .*max_skipped')])
def test_the_records_of_a_tiny_source_count_once(bad, message):
  """They are judged after 1,000 reads, by what is different among them."""
  skipped = SkipCounter()
  tiny = SourceInfo('sources[0]', 'folder x', 1, '')
  with pytest.raises(UserError, match=message) as caught:
    for _ in range(126):
      add(skipped, 8 - bad, bad, 0, info=tiny)
  assert f'no image {bad})' in str(caught.value)
  assert skipped.metrics() == {'data/skipped_no_image': bad}


def test_records_are_remembered_up_to_ten_thousand():
  skipped = SkipCounter()
  source = SourceInfo('sources[0]', 'folder x', 1, '')
  for _ in range(3):
    add(skipped, 9800, 200, 0, info=source)
  assert skipped.seen['records'] == 10_000 and skipped.skipped['records'] == 200


def test_the_records_of_a_large_source_keep_their_share():
  """Beyond 10,000 they are not remembered: each read counts, of good and bad ones alike."""
  skipped = SkipCounter()
  large = SourceInfo('sources[0]', 'folder x', 1, '')
  for _ in range(3):
    add(skipped, 19_600, 400, 0, info=large)
  assert skipped.seen['records'] == 60_000 and skipped.skipped['records'] == 1200
