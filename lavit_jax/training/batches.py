"""The batches that a run reads, and what of its data is skipped."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

import jax
import numpy as np

from lavit_jax.data import loader, text
from lavit_jax.data.loader import BatchIterator
from lavit_jax.data.skips import SkipCounter
from lavit_jax.data.sources import check_files
from lavit_jax.errors import UserError
from lavit_jax.training import distributed
from lavit_jax.training.run import Run
from lavit_jax.training.run_config import name_data_errors


def open_batches(run: Run, split: str, skipped: SkipCounter | None = None) -> BatchIterator:
  """An iterator over this process's share of the batches of a split (`data.loader.batches`).

  Args:
    run: the run.
    split: 'train' or 'heldout'.
    skipped: counts the examples that are left out.

  Raises:
    UserError: the data set or the tokenizer is not there, or the tokenizer has another vocabulary
      than the model.
  """
  with name_data_errors():
    if run.data.tokenizer_folder:
      text.TextTokenizer.load(
        run.data.tokenizer_folder,
        run.model.vocabulary.text_size,
        run.model.has_padded_vocabulary,
      )
    return loader.batches(
      **run.data.loader_options(),
      split=split,
      seed=run.seed,
      batch_size=len(run.share.rows),
      shard_index=run.share.index,
      shard_count=run.share.count,
      rows=run.share.rows.tolist(),
      skipped=skipped,
      vit_size=run.vit_size,
      code_sizes=run.code_sizes,
    )


def check_heldout(run: Run) -> None:
  """Opens the held-out data as evaluation will, so that errors appear before the first step."""
  if not run.intervals.eval_every and not run.intervals.picture_every:
    return
  with contextlib.closing(open_batches(run, 'heldout')):
    if run.data.sources:
      check_files('data.heldout', run.data.heldout, run.data.max_skipped)


def next_batch(batches: Iterator[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """The next batch; UserError if an example does not fit the options."""
  try:
    return next(batches)
  except ValueError as error:
    raise UserError(f'data: {error}') from error


def count_skipped(run: Run, skipped: SkipCounter) -> dict[str, int]:
  """What all processes together have skipped, by reason; all of them must call this.

  Processes that read the same rows count once.

  Raises:
    UserError: more than the share `data.max_skipped` of a source, over all processes.
  """
  if not run.data.sources:
    return {}
  share = run.share.index
  if jax.process_count() > 1:  # a process on its own has checked as it read
    for source in range(len(run.data.sources)):
      messages = distributed.gather({'share': share, 'account': skipped.account_of(source)})
      accounts = {message['share']: message['account'] for message in messages}
      skipped.check(source, accounts.values(), run.data.max_skipped)
  counts = {}
  for message in distributed.gather({'share': share, **skipped.metrics()}):
    counts[message.pop('share')] = message
  return dict(sum(map(Counter, counts.values()), Counter()))
