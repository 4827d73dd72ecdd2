"""Batches of inputs: their shapes, and the progress bar."""

import functools
import io
import time

import numpy as np

from lavit_jax.inference import batching


def test_batches_cover_everything_in_few_shapes():
  for count in (0, 1, 5, 16, 17, 40):
    rows = [row for n, rows in batching.batch_ranges(count, 16) for row in rows[:n]]
    assert rows == list(range(count))
  assert [len(rows) for _, rows in batching.batch_ranges(21, 16)] == [16, 8]


def slow_batches(count, pause):
  for _ in range(count):
    time.sleep(pause)
    yield 4, np.zeros(3)


def test_the_progress_bar_needs_a_terminal_and_long_work(monkeypatch):
  monkeypatch.setattr(batching, 'SHOW_AFTER', 0.2)
  monkeypatch.setenv('TERM', 'xterm')
  for terminal, batches, pause, shown in (
    (True, 1, 0.8, True),
    (False, 1, 0.8, False),
    (True, 3, 0.0, False),
  ):
    stderr = io.StringIO()
    stderr.isatty = functools.partial(bool, terminal)
    monkeypatch.setattr('sys.stderr', stderr)
    fetched = batching.fetch_batches(slow_batches(batches, pause), 4 * batches, 'codes')
    assert [n for n, _ in fetched] == [4] * batches
    assert ('codes' in stderr.getvalue()) == shown
