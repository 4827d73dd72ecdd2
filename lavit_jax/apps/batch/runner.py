"""The run of a batch: blocks of rows through the model, result lines and images out.

Rows are computed in fixed blocks of MAX_BATCH, the n-th row with the n-th key of the seed. A block
with missing lines is computed whole, and only the missing lines are written: so the result of a row
does not depend, to the bit, on where a run was interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

from lavit_jax.apps.batch.inputs import Inputs, is_image_path, load_inputs
from lavit_jax.apps.batch.results import ResultsFile
from lavit_jax.apps.batch.tasks import Outcome, Row, Task
from lavit_jax.errors import InputError, UserError
from lavit_jax.inference.batching import MAX_BATCH
from lavit_jax.inference.faults import NotFinite
from lavit_jax.inference.image_generation import report_flagged
from lavit_jax.inference.pipeline import Lavit
from lavit_jax.inference.rng import IndexedSeed
from lavit_jax.output import encode_png, slug, write_atomic

LOG_EVERY = 60.0  # seconds between lines about progress where stderr is no terminal


def run_batch(
  task: Task,
  model: Lavit,
  inputs: Inputs,
  seed: int | None,
  options: dict[str, Any],
  *,
  as_json: bool = False,
  results: ResultsFile | None = None,
  image_folder: str | None = None,
  share: tuple[int, int] = (0, 1),
  quiet: bool = False,
) -> None:
  """Computes the rows that have no line in `results` yet; prints each result and adds its line.

  Args:
    task: what to compute.
    model: the model that computes it.
    inputs: the rows.
    seed: of the run; None keeps the most probable patches.
    options: further arguments of the model's method.
    as_json: print results as JSON objects.
    results: the result file, if there is one.
    image_folder: the folder for generated images; None for tasks without images.
    share: (i, n) computes the blocks i, i + n, i + 2 n, ... alone, with the results that they have
      in the whole.
    quiet: print no results.

  Raises:
    UserError: at the end, the number of rows with errors; at once, an error of all rows.
  """
  rows = inputs.rows
  own = [i for i in range(len(rows)) if i // MAX_BATCH % share[1] == share[0]]
  pending = set(own)
  if results is not None:
    missing_rows = results.missing([rows[i] for i in own])
    pending = {i for i, is_missing in zip(own, missing_rows, strict=True) if is_missing}
    if len(pending) < len(own):
      done = len(own) - len(pending)
      print(f'lavit: {done} of {len(own)} are in {results.path} already', file=sys.stderr)
  computation = Computation(task, model, inputs, seed, options)
  images = _ImageWriter(image_folder, results.next_number if results is not None else 0)
  progress = _Progress(len(pending))
  errors: list[str] = []
  for start in range(0, len(rows), MAX_BATCH):
    block = range(start, min(start + MAX_BATCH, len(rows)))
    missing = [i for i in block if i in pending]
    if not missing:
      continue
    outcomes = computation.run(block)
    lines = []
    flagged = []
    for i in missing:
      values = images.save(outcomes[i], rows[i][task.inputs[0]])
      lines.append(rows[i] | values)
      if 'flagged' in values:
        flagged.append(f'{values["file"]}, of row {i + 1} of {len(rows)},')
    if results is None:
      errors += [line['error'] for line in lines if 'error' in line]
    else:
      results.add(lines)
    progress.clear()
    report_flagged(flagged)
    for line in lines:
      if image_folder and 'file' in line:
        line = line | {'file': os.path.join(image_folder, line['file'])}
      if not quiet:
        _print_result(line, task, inputs.many, as_json)
    progress.advance(len(lines))
  progress.clear()
  if results is not None:
    errors = results.errors(rows)
  if errors:
    remedy = 'correct it, and try again'
    if results is not None:
      remedy = f'correct it, and delete its line from {results.path} to try it again'
    raise UserError(f'{len(errors)} of {len(own)} failed, the first: {errors[0]}; {remedy}')


@dataclasses.dataclass(frozen=True)
class Computation:
  """A task with a model and its options, to be run on blocks of rows."""

  task: Task
  model: Lavit
  inputs: Inputs
  seed: int | None
  options: dict[str, Any]

  def run(self, indices: Sequence[int]) -> dict[int, Outcome]:
    """The outcomes of some rows; if there are many inputs, an 'error' for a row that has one."""
    loaded: dict[int, Row] = {}
    outcomes: dict[int, Outcome] = {}
    for i in indices:
      try:
        loaded[i] = load_inputs(
          self.inputs.rows[i],
          self.task.inputs,
          self.inputs.folder,
          self.model.modules.image_size,
        )
      except UserError as error:
        if not self.inputs.many:
          raise
        outcomes[i] = Outcome({'error': str(error)})
    return outcomes | self.compute(loaded)

  def compute(self, loaded: dict[int, Row]) -> dict[int, Outcome]:
    """The outcomes of rows whose inputs are read; 'error' as in `run`."""
    if not loaded:
      return {}
    try:
      return self._call(loaded)
    except NotFinite as error:
      if not self.inputs.many:
        raise
      computed = list(loaded)
      outcomes = {}
      for position, message in error.rows.items():
        outcomes[computed[position]] = Outcome({'error': message})
      return outcomes | self.compute({i: loaded[i] for i in computed if i not in outcomes})
    except InputError:
      if not self.inputs.many:
        raise
    # A text is empty or too long. Each row alone shows which.
    outcomes = {}
    for i, row in loaded.items():
      try:
        outcomes |= self._call({i: row})
      except InputError as error:
        outcomes[i] = Outcome({'error': str(error)})
    return outcomes

  def _call(self, rows: dict[int, Row]) -> dict[int, Outcome]:
    indices = list(rows)
    seed = None if self.seed is None else IndexedSeed(self.seed, indices)
    outcomes = self.task.compute(self.model, list(rows.values()), seed=seed, **self.options)
    return dict(zip(indices, outcomes, strict=True))


class _ImageWriter:
  """Writes the images of outcomes to numbered files."""

  def __init__(self, folder: str | None, first_number: int):
    self.folder = folder
    self.number = first_number

  def save(self, outcome: Outcome, source: str | list[str]) -> dict[str, Any]:
    """Writes the outcome's image, if it has one; returns its values, with the 'file'.

    The number is the first that replaces no other image. An equal file is the image itself, of a
    run that was interrupted before it wrote the result line.

    Args:
      outcome: what to save.
      source: the text or the path that it comes from, or several.
    """
    values = dict(outcome.values)
    if outcome.image is not None and self.folder is not None:
      data = encode_png(outcome.image)
      path = self._path(source)
      while os.path.lexists(path) and not (path.is_file() and path.read_bytes() == data):
        self.number += 1
        path = self._path(source)
      values['file'] = write_atomic(path, data).name
    self.number += 1
    return values

  def _path(self, source: str | list[str]) -> pathlib.Path:
    return pathlib.Path(self.folder or '', f'{self.number}-{_image_name(source)}.png')


def _image_name(source: str | list[str]) -> str:
  texts = []
  for text in [source] if isinstance(source, str) else source:
    is_file = is_image_path(text) or os.path.isfile(text)
    texts.append(os.path.basename(text) if is_file else text)
  return slug(' and '.join(texts))


def _print_result(line: Row, task: Task, many: bool, as_json: bool) -> None:
  if as_json:
    print(json.dumps(line), flush=True)
    return
  if 'error' in line:
    print('lavit: ' + ' '.join(line['error'].split()), file=sys.stderr)
    return
  text_format = task.text_format
  if 'question' in line and not many:  # all results are about one image
    text_format = '{question} {answer}'
  encoding = sys.stdout.encoding or 'utf-8'
  text = text_format.format(**line)
  print(text.encode(encoding, 'backslashreplace').decode(encoding), flush=True)


class _Progress:
  """How many rows are done, and the remaining time, on stderr.

  On a terminal, one line that is written again and again; in a log, a line from time to time.
  """

  def __init__(self, total: int):
    self.total = total
    self.count = 0
    self.start = time.monotonic()
    self.logged = self.start
    self.terminal = sys.stderr.isatty() and total > MAX_BATCH
    self.advance(0)

  def advance(self, count: int) -> None:
    """Counts rows and shows the line."""
    self.count += count
    now = time.monotonic()
    rest = ''
    if self.count:
      rate = self.count / max(now - self.start, 1e-9)
      minutes = (self.total - self.count) / rate / 60
      rest = f', {rate:.1f} rows/s, {minutes:.0f} min left'
    if self.terminal:
      print(f'\r\x1b[K{self.count} of {self.total}{rest}', end='', file=sys.stderr, flush=True)
    elif now - self.logged > LOG_EVERY:
      self.logged = now
      print(f'lavit: {self.count} of {self.total}{rest}', file=sys.stderr, flush=True)

  def clear(self) -> None:
    """Removes the line from a terminal."""
    if self.terminal:
      print('\r\x1b[K', end='', file=sys.stderr, flush=True)
