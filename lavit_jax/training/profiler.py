"""An xprof trace of some steps of a run."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import jax

from lavit_jax.errors import UserError


def parse_steps(text: str) -> tuple[int, int] | None:
  """'10:12' -> (10, 12), the first and the last step; '' -> (0, 0), none; None if malformed."""
  if not text:
    return 0, 0
  match = re.fullmatch(r'([0-9]+):([0-9]+)', text)
  if match is None or not 1 <= int(match[1]) <= int(match[2]):
    return None
  return int(match[1]), int(match[2])


class ProfilerTrace:
  """Traces some steps into FOLDER/profile, on process 0.

  Args:
    steps: 'FIRST:LAST', or '' for none.
    folder: of the records of the run.

  Raises:
    UserError: `steps` is malformed.
  """

  def __init__(self, steps: str, folder: pathlib.Path):
    self.folder = str(folder / 'profile')
    self.running = False
    parsed = parse_steps(steps)
    if parsed is None:
      raise UserError(
        f'profile={steps!r}: give the first and the last step to trace, such as 10:12'
      )
    self.first, self.last = parsed if jax.process_index() == 0 else (0, 0)

  def before(self, step: int) -> None:
    """Begins to trace before its first step, or in the middle if the run is continued there."""
    if self.first <= step <= self.last and not self.running:
      jax.profiler.start_trace(self.folder)
      self.running = True

  def after(self, step: int, values: Any) -> None:
    """Ends after its last step, once the results `values` of that are there."""
    if self.running and step >= self.last:
      jax.block_until_ready(values)
      self.close()

  def close(self) -> None:
    """Writes the trace, if one is running."""
    if self.running:
      jax.profiler.stop_trace()
      self.running = False
