"""Skips are judged by source, over all units and processes."""

import pytest

from lavit_jax.data.formats import Skip
from lavit_jax.data.skips import About, Skipped
from lavit_jax.errors import UserError

TARS = About('sources[0]', 'tars x', 40, 'text in txt')
BAD = Skip('no image', 'x.tar: 7 (txt)')


def add(skipped, good, bad, unit, limit=0.05, source=0, about=TARS):
  for _ in range(bad):
    skipped.add(BAD, limit, source, about, unit)
  for _ in range(good):
    skipped.add({}, limit, source, about, unit)


def test_one_bad_unit_is_one_of_many():
  skipped = Skipped()
  add(skipped, 0, 5000, 0)
  for unit in range(1, 20):
    add(skipped, 100, 0, unit)
  add(skipped, 0, 5000, 0)  # in the next epoch too: 1 of 20 is no more than 5%
  with pytest.raises(UserError, match=r'^sources\[0\] \(tars x\): 1\d\d\d\d of 1\d\d\d\d records were skipped .*; looked for: text in txt; .*data.max_skipped=0.05$'):
    add(skipped, 0, 5000, 20)


def test_what_is_bad_everywhere_is_told_before_many_units_are_seen():
  skipped = Skipped()
  add(skipped, 700, 300, 0)
  with pytest.raises(UserError, match=': 601 of 2001 records were skipped'):
    for _ in range(10):
      add(skipped, 70, 30, 1)
    add(skipped, 0, 1, 1)


def test_a_small_source_does_not_hide_behind_a_large_one():
  skipped = Skipped()
  add(skipped, 30_000, 0, 0)
  small = About('sources[1]', 'tars y', 1, '')
  with pytest.raises(UserError, match=r'^sources\[1\] \(tars y\): 400 of 1000 records'):
    add(skipped, 600, 399, 0, source=1, about=small)
    add(skipped, 0, 1, 0, source=1, about=small)


def test_processes_add_up_what_they_know():
  """One of two meets more than the limit, both together do not; until the other one does too."""
  one, other = Skipped(alone=False), Skipped(alone=False)
  for unit in range(20):
    add(one, 92, 8, unit)
    add(other, 99, 1, unit)
  one.check(0, [one.account_of(0), other.account_of(0)], 0.05)
  for unit in range(20):
    add(other, 80, 20, unit)
  for process in (one, other):  # 580 of 6,000; the mean over the units is 0.0925
    with pytest.raises(UserError, match=r'^sources\[0\] \(tars x\): 580 of 6000 records were skipped'):
      process.check(0, [one.account_of(0), other.account_of(0)], 0.05)


def test_a_process_that_finds_nothing_does_not_wait_for_the_others():
  skipped = Skipped(alone=False)
  add(skipped, 0, 3000, 0)
  with pytest.raises(UserError, match='no example'):
    add(skipped, 0, 1000, 1)


def test_members_are_counted_only():
  skipped = Skipped()
  for _ in range(2000):
    skipped.add(Skip('link', 'x.tar: a', 'members'), 0.05, 0, TARS, 0)
  assert skipped.metrics() == {'data/skipped_link': 2000} and skipped.seen['records'] == 0
