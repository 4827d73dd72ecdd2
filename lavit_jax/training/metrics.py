"""The record of a run: a line on the terminal, TensorBoard, `metrics.jsonl`, and images.

`metrics.jsonl` has one line for every training step, with all digits, and one for every evaluation
(keys 'heldout/...'); the terminal and TensorBoard show the mean since the last report. Values stay
on the device until a report, so a step never waits for them.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter

from lavit_jax.training.goodput import Goodput

T = TypeVar('T')
Record = dict[str, float]  # a line of metrics.jsonl
# Rates on the terminal, where they are known.
SHOWN_RATES = {'tokens_per_s': 'tokens/s', 'mfu': 'MFU', 'hbm_gib': 'HBM GiB'}
# Never nan but for a fault: if one of these is lost, so are the parameters of the next step.
VITAL = ('loss', 'grad_norm')
STEPS_AHEAD = 2  # steps that the host may be ahead of the device: each of them holds a batch


class MetricLogger:
  """The record of one run in `workdir`. Only process 0 writes.

  Args:
    workdir: receives metrics.jsonl, tensorboard/ and pictures/.
    start_step: the steps done so far; a previous run's lines beyond it are dropped, since those
      steps will be made again.
    num_steps: for the estimate of the time left.
    batch_size: for examples/s.
    flops: floating-point operations that the model needs for a step, by `packed_share`, the share
      of its slots that hold a token (flops.StepFlops.at), 1 where nothing is packed.
    peak_tflops: of all devices together (0 = unknown), for the MFU.
    tokens: slots of one step, for tokens/s, of which those that hold a token count.
    goodput: counts the waiting for data and writes a line at each report, which shows it.
  """

  def __init__(
    self,
    workdir: str | pathlib.Path,
    start_step: int,
    num_steps: int,
    batch_size: int,
    flops: Callable[[float], float] | None = None,
    peak_tflops: float = 0.0,
    tokens: int = 0,
    goodput: Goodput | None = None,
  ):
    self.workdir = pathlib.Path(workdir)
    self.num_steps = num_steps
    self.batch_size = batch_size
    self.tokens = tokens
    self.goodput = goodput
    self.flops = flops
    self.peak = 1e12 * peak_tflops
    self.pending: list[tuple[int, Mapping[str, Any]]] = []  # on the device
    self.unreported: list[Record] = []  # in metrics.jsonl already, and not yet shown
    self.untaken: list[Record] = []  # in metrics.jsonl already, and not yet taken by `take_new`
    self.writes = jax.process_index() == 0
    self.clock = time.monotonic()
    self.last_step = start_step
    self.waited = 0.0  # seconds in which the device waited for data, since the last report
    self.watch = ThreadPoolExecutor(1)
    self.ready: Future | None = None  # when the last step was done
    if self.writes:
      self.workdir.mkdir(parents=True, exist_ok=True)
      file = self.workdir / 'metrics.jsonl'
      keep_lines(file, start_step)
      self.jsonl = file.open('a')
      self.board = SummaryWriter(str(self.workdir / 'tensorboard'), purge_step=start_step + 1)

  # --- Training steps ---

  def step(self, step: int, values: Mapping[str, Any]) -> None:
    """Takes the metrics of training step `step` (1 is the first), still on the device."""
    self.pending.append((step, values))
    self.ready = self.watch.submit(_when_ready, values)
    if len(self.pending) > STEPS_AHEAD:
      _, earlier = self.pending[-STEPS_AHEAD - 1]
      jax.block_until_ready(earlier)

  def flush(self) -> Record:
    """Writes what is pending to metrics.jsonl.

    Returns:
      The mean of each metric since the last report.
    """
    pending = jax.device_get(self.pending)
    self.pending = []
    records = []
    for step, values in pending:
      floats = {key: float(value) for key, value in values.items()}
      records.append({'step': step, 'loss': 0.0, **floats})  # the loss comes first
    if self.writes:
      self.jsonl.writelines(json_line(record) for record in records)
      self.jsonl.flush()
    self.unreported += records
    self.untaken += records
    return mean_metrics(_finite_updates(self.unreported))

  def take_new(self) -> list[Record]:
    """The metrics of the steps that were flushed since the last call."""
    records = self.untaken
    self.untaken = []
    return records

  def fetch(self, source: Callable[..., T], *args: Any) -> T:
    """source(*args), the next batch, timed.

    While the device is idle meanwhile, it waits for data.
    """
    start = time.monotonic()
    batch = source(*args)
    waited = 0.0
    if self.ready is None:
      waited = time.monotonic() - start
    elif self.ready.done():
      waited = time.monotonic() - max(start, self.ready.result())
    self.waited += waited
    if self.goodput is not None:
      self.goodput.move(waited, 'data_wait')
    return batch

  def report(self, counts: Mapping[str, int] | None = None) -> Record:
    """Flushes, and shows the mean since the last report on the terminal and in TensorBoard.

    Args:
      counts: shown with it.

    Returns:
      The mean of each metric.
    """
    means = self.flush()
    if not means:
      return means
    counts = dict(counts or {})
    step = int(self.unreported[-1]['step'])
    skipped = sum(record.get('nonfinite', 0) for record in self.unreported)
    self.unreported = []
    means.pop('step')
    means.pop('nonfinite', None)
    if skipped:
      self.print_line(f'warning: {skipped:g} updates were skipped: loss or gradient was not finite')
      counts['nonfinite'] = int(skipped)
    rates = self._rates(step, means.get('packed_share', 1.0))
    self.last_step = step
    self.restart_clock()
    self.scalars(step, {**means, **rates, **counts})
    self._show(step, rates, {**means, **counts})
    return means

  def _rates(self, step: int, packed_share: float) -> Record:
    """The speed since the last report."""
    seconds = max(time.monotonic() - self.clock, 1e-9)
    speed = (step - self.last_step) / seconds
    rates = {
      'steps_per_s': speed,
      'examples_per_s': speed * self.batch_size,
      'data_wait': self.waited / seconds,
      **memory_in_use(),
    }
    if self.goodput is not None:
      self.goodput.record(step)
      rates |= self.goodput.totals().scalars()
    if self.tokens:
      rates['tokens_per_s'] = speed * packed_share * self.tokens
    if self.flops:
      rates['tflops'] = self.flops(packed_share) * speed / 1e12
      if self.peak:
        rates['mfu'] = self.flops(packed_share) * speed / self.peak
    return rates

  def _show(self, step: int, rates: Record, values: Mapping[str, float]) -> None:
    """The line of a report on the terminal; a nan (nothing to measure) is not shown."""
    speed = rates['steps_per_s']
    fields = [f'step {step}/{self.num_steps}', f'{speed:.2f} steps/s']
    fields.append(f'{rates["examples_per_s"]:.0f} examples/s')
    fields += [f'{unit} {rates[key]:.3g}' for key, unit in SHOWN_RATES.items() if key in rates]
    fields.append(f'ETA {duration((self.num_steps - step) / speed)}')
    fields.append(f'data_wait {rates["data_wait"]:.1%}')
    if 'goodput' in rates:
      fields.append(f'goodput {rates["goodput"]:.1%}')
    fields += [f'{key} {value:.4g}' for key, value in values.items() if not math.isnan(value)]
    self.print_line('  '.join(fields))

  # --- Evaluations ---

  def evaluation(self, step: int, values: Mapping[str, float]) -> None:
    """Records held-out metrics everywhere."""
    self.flush()
    record = {f'heldout/{key}': float(value) for key, value in values.items()}
    if self.writes:
      self.jsonl.write(json_line({'step': step, **record}))
      self.jsonl.flush()
    self.scalars(step, record)
    shown = '  '.join(f'{key} {float(value):.4g}' for key, value in values.items())
    self.print_line(f'step {step} held-out  {shown}')

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Writes numbers to TensorBoard, but for those that were not measured (nan)."""
    if self.writes:
      for name, value in values.items():
        if math.isfinite(value):
          self.board.add_scalar(name, value, step)

  def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """Writes images uint8[H, W, 3] to TensorBoard and to pictures/<name>_<step>.png."""
    if not self.writes:
      return
    folder = self.workdir / 'pictures'
    folder.mkdir(exist_ok=True)
    for name, image in images.items():
      self.board.add_image(name, image, step, dataformats='HWC')
      Image.fromarray(image).save(folder / f'{name}_{step:07d}.png')

  # --- Clock and terminal ---

  def restart_clock(self) -> None:
    """Begins to measure the speed: what was compiled until now does not count."""
    self.clock = time.monotonic()
    self.waited = 0.0

  def pause(self, seconds: float) -> None:
    """Takes time that was not spent on training steps out of the speed."""
    self.clock += seconds

  def print_line(self, line: str) -> None:
    """Prints a line on process 0.

    A lost terminal does not end a job, whose record is in `workdir`.
    """
    if self.writes:
      try:
        print(line, flush=True)
      except OSError:  # nobody reads any more
        sys.stdout = open(os.devnull, 'w')

  def close(self) -> None:
    """Writes what is pending, and closes the files."""
    self.flush()
    self.watch.shutdown()
    if self.writes:
      self.jsonl.close()
      self.board.close()


def _when_ready(values: Mapping[str, Any]) -> float:
  jax.block_until_ready(values)
  return time.monotonic()


def _finite_updates(records: list[Record]) -> list[Record]:
  """The records of steps whose updates were applied, or all where none was."""
  return [record for record in records if not record.get('nonfinite')] or records


def memory_in_use() -> dict[str, float]:
  """GiB of device memory in use now and at most so far, on the fullest device of this process.

  {} where it is unknown (CPU).
  """
  devices = [device.memory_stats() for device in jax.local_devices()]
  known = [stats for stats in devices if stats]
  memory = {}
  for name, key in (('hbm_gib', 'bytes_in_use'), ('hbm_peak_gib', 'peak_bytes_in_use')):
    if known and all(key in stats for stats in known):
      memory[name] = max(stats[key] for stats in known) / 2**30
  return memory


def json_line(record: Mapping[str, float]) -> str:
  """A line of metrics.jsonl, with null for nan and infinity, which JSON does not know."""
  finite = {key: value if math.isfinite(value) else None for key, value in record.items()}
  return json.dumps(finite, allow_nan=False) + '\n'


def mean_metrics(records: Sequence[Mapping[str, float]]) -> Record:
  """The mean of each key.

  A nan (nothing to measure) is left out; but a single nan of what is `VITAL` makes its mean nan, so
  that it is seen.
  """
  if not records:
    return {}
  means = {}
  for key in records[0]:
    values = np.array([record[key] for record in records], np.float64)
    keeps_nan = key in VITAL or bool(np.isnan(values).all())
    means[key] = float(values.mean() if keeps_nan else np.nanmean(values))
  return means


def keep_lines(file: pathlib.Path, last_step: int) -> None:
  """Drops the lines of steps after `last_step` from a JSONL file; atomically.

  A last line that was cut short is dropped too.
  """
  if not file.exists():
    return
  scratch = file.with_suffix('.tmp')
  kept = _lines_until(file.read_text().splitlines(), last_step)
  scratch.write_text(''.join(line + '\n' for line in kept))
  os.replace(scratch, file)


def _lines_until(lines: Iterable[str], last_step: int) -> list[str]:
  kept = []
  for line in lines:
    try:
      if json.loads(line)['step'] <= last_step:
        kept.append(line)
    except ValueError:  # cut short
      pass
  return kept


def duration(seconds: float) -> str:
  """3725 -> '1:02:05'."""
  minutes, seconds = divmod(int(seconds), 60)
  return f'{minutes // 60}:{minutes % 60:02d}:{seconds:02d}'
