"""What ends a run: updates skipped in a row, and pairs without room."""

import pathlib
from types import SimpleNamespace

import nano
import pytest

from lavit_jax.errors import UserError
from lavit_jax.training.watch import MetricWatch

nano.install()


def watch(run, rows=()):
  lines = []
  aside = []
  log = SimpleNamespace(
    print_line=lines.append,
    take_new=lambda: [dict(step=step, nonfinite=lost) for step, lost in rows],
  )
  checkpoints = SimpleNamespace(
    set_aside_broken=lambda first: aside.append(first) or [first],
    manager=SimpleNamespace(all_steps=lambda read: [2]),
  )
  return MetricWatch(run, log, checkpoints), lines, aside


@pytest.mark.parametrize(
  'lost, last, ends',
  [
    ([0, 1, 1, 0, 1, 1], False, False),
    ([0, 1, 1, 1], False, True),
    ([0, 0, 1], False, False),
    ([0, 0, 1], True, True),
    ([1, 0, 0], True, False),
  ],
)
def test_updates_skipped_in_a_row(lost, last, ends):
  seen, _, aside = watch(nano.run('encoder', optim__max_nonfinite=3), list(enumerate(lost, 1)))
  if not ends:
    seen.check_steps(last)
    assert seen.is_sound() == (not lost[-1]) and not aside
    return
  with pytest.raises(
    UserError,
    match='lower optim.learning_rate or optim.clip_norm, or look at the data, and start again: '
    'it resumes from step 2',
  ):
    seen.check_steps(last)
  assert aside == [lost.index(1)]  # of the step before the first, whose parameters they are


def test_pairs_without_room():
  """24 of 64 pairs of 60 tokens in 10 rows of 256: 4 to a row."""
  means = dict(overflow=24.0, packed_share=40 * 60 / 2560)
  run = nano.run('lm', batch_size=64, lm__num_rows=10, lm__row_length=256)
  seen, lines, _ = watch(run)
  remedy = (
    r'24 of the 64 pairs of a step \(38%\) find no room in the packed rows and are dropped; '
    r'set lm.num_rows=17 \(now 10\) and lm.mean_length=60'
  )
  with pytest.raises(UserError, match=remedy + r', or lower batch_size \(lm.max_overflow=0.2'):
    seen.check_packing(means, 50)
  seen.check_packing(means | dict(overflow=1.0), 50)  # below 2%
  assert not lines
  seen.check_packing(means | dict(overflow=3.0), 50)
  seen.check_packing(means | dict(overflow=3.0), 100)
  assert len(lines) == 1 and lines[0].startswith('warning: 3 of the 64 pairs')


def test_rows_that_are_too_short_for_the_longest_pair():
  run = nano.run('lm', lm__row_length=48)  # of 48 text tokens, 16 patches and 3 marks
  with pytest.raises(
    UserError,
    match='lm.row_length=48 is less than the 83 tokens that a pair may have: set lm.row_length=83',
  ):
    watch(run)[0].check_packing(dict(overflow=6.0, packed_share=0.1), 1)


def test_the_tokenizer_of_the_tiny_configs_loads_from_anywhere(tmp_path, monkeypatch):
  from lavit_jax.data.text import TextTokenizer

  monkeypatch.chdir(tmp_path)
  assert TextTokenizer.load('lavit_jax/assets/tiny/language_model').vocab_size == 2048
  # What is here comes first.
  pathlib.Path('lavit_jax/assets/tiny/language_model').mkdir(parents=True)
  with pytest.raises(
    UserError, match='lavit_jax/assets/tiny/language_model/tokenizer.json does not exist'
  ):
    TextTokenizer.load('lavit_jax/assets/tiny/language_model')
