"""What a run says about itself: a line on the terminal, TensorBoard, `metrics.jsonl`, and pictures.

`metrics.jsonl` has one line for every training step, with all digits, and one for every evaluation (keys 'heldout/...'); the
terminal and TensorBoard show the mean since the last report. Values wait on the device until a report, so a step never waits for them.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter

from lavit_jax.errors import UserError

SHOWN = {'tokens_per_s': 'tokens/s', 'mfu': 'MFU', 'hbm_gib': 'HBM GiB'}  # on the terminal, where they are known
VITAL = ('loss', 'grad_norm')  # never without a number: if one of these is lost, so are the parameters of the next step


class Log:
  """The record of one run in `workdir`. Only process 0 writes.

  Args:
    workdir: receives metrics.jsonl, tensorboard/ and pictures/.
    first_step: the steps done so far; a previous run's lines beyond it are dropped, since those steps will be made again.
    num_steps, batch_size: for the estimate of the time left and for examples/s.
    flops: floating-point operations that the model needs for a step, by `packed_share`, the share of its slots that hold a token
      (flops.StepFlops.at; that metric, or 1 where nothing is packed); peak_tflops: of all devices together (0 = unknown), for the MFU.
    tokens: slots of one step (stages.tokens), for tokens/s, of which those that hold a token count.
  """

  def __init__(self, workdir, first_step: int, num_steps: int, batch_size: int, flops: Callable[[float], float] | None = None,
               peak_tflops: float = 0.0, tokens: int = 0):
    self.workdir = pathlib.Path(workdir)
    self.num_steps, self.batch_size, self.tokens = num_steps, batch_size, tokens
    self.flops, self.peak = flops, 1e12 * peak_tflops
    self.pending: list[tuple[int, dict]] = []  # on the device
    self.since: list[dict] = []  # in metrics.jsonl already, and not yet shown
    self.new: list[dict] = []  # in metrics.jsonl already, and not yet taken by `take_new`
    self.writes = jax.process_index() == 0
    self.clock, self.last_step, self.waited = time.monotonic(), first_step, 0.0
    self.watch = ThreadPoolExecutor(1)
    self.ready: Future | None = None  # when the last step was done
    if self.writes:
      self.workdir.mkdir(parents=True, exist_ok=True)
      file = self.workdir / 'metrics.jsonl'
      keep_lines(file, first_step)
      self.jsonl = file.open('a')
      self.board = SummaryWriter(str(self.workdir / 'tensorboard'), purge_step=first_step + 1)

  def step(self, step: int, values: dict) -> None:
    """Takes the metrics of training step `step` (1 is the first), still on the device."""
    self.pending.append((step, values))
    self.ready = self.watch.submit(_when_ready, values)
    if len(self.pending) > 2:  # the host may run two steps ahead, not a whole report: every step in flight holds a batch
      jax.block_until_ready(self.pending[-3][1])

  def flush(self) -> dict[str, float]:
    """Writes what is pending to metrics.jsonl; returns the mean of each value since the last report."""
    pending, self.pending = jax.device_get(self.pending), []
    rows = [{'step': step, 'loss': 0.0, **{k: float(v) for k, v in values.items()}} for step, values in pending]  # in this order
    if self.writes:
      self.jsonl.writelines(json_line(row) for row in rows)
      self.jsonl.flush()
    self.since += rows
    self.new += rows
    return mean(made(self.since))

  def take_new(self) -> list[dict]:
    """The metrics of the steps that were flushed since the last call."""
    new, self.new = self.new, []
    return new

  def fetch(self, source, *args):
    """source(*args), the next batch; how long the device is idle meanwhile counts as waiting for data."""
    start = time.monotonic()
    batch = source(*args)
    if self.ready is None or self.ready.done():
      self.waited += time.monotonic() - max(start, self.ready.result() if self.ready else start)
    return batch

  def report(self, counts: dict[str, int] | None = None) -> dict[str, float]:
    """Flushes, and shows the mean since the last report, and `counts`, on the terminal and in TensorBoard."""
    means = self.flush()
    if not means:
      return means
    step, skipped = self.since[-1]['step'], sum(row.get('nonfinite', 0) for row in self.since)
    self.since = []
    means.pop('step')
    means.pop('nonfinite', None)
    if skipped:
      self.say(f'warning: {skipped:g} updates were skipped: loss or gradient was not finite')
      counts = {**(counts or {}), 'nonfinite': int(skipped)}
    seconds = max(time.monotonic() - self.clock, 1e-9)
    speed, wait, share = (step - self.last_step) / seconds, self.waited / seconds, means.get('packed_share', 1.0)
    self.last_step, self.clock, self.waited = step, time.monotonic(), 0.0
    rates = {'steps_per_s': speed, 'examples_per_s': speed * self.batch_size, 'data_wait': wait, **memory_in_use(), **(counts or {})}
    if self.tokens:
      rates['tokens_per_s'] = speed * share * self.tokens
    if self.flops:
      rates['tflops'] = self.flops(share) * speed / 1e12
    if self.flops and self.peak:
      rates['mfu'] = self.flops(share) * speed / self.peak
    self.scalars(step, {**means, **rates})
    left = (self.num_steps - step) / speed
    told = '  '.join(f'{k} {v:.4g}' for k, v in {**means, **(counts or {})}.items() if not math.isnan(v))  # nan: there was nothing of it
    self.say(f'step {step}/{self.num_steps}  {speed:.2f} steps/s  {speed * self.batch_size:.0f} examples/s  '
             + ''.join(f'{shown} {rates[k]:.3g}  ' for k, shown in SHOWN.items() if k in rates)
             + f'ETA {duration(left)}  data_wait {wait:.1%}  {told}')
    return means

  def evaluation(self, step: int, values: dict[str, float]) -> None:
    """Records held-out metrics everywhere."""
    self.flush()
    values = {f'heldout/{k}': float(v) for k, v in values.items()}
    if self.writes:
      self.jsonl.write(json_line({'step': step, **values}))
      self.jsonl.flush()
    self.scalars(step, values)
    self.say(f'step {step} held-out  ' + '  '.join(f'{k.removeprefix("heldout/")} {v:.4g}' for k, v in values.items()))

  def scalars(self, step: int, values: dict[str, float]) -> None:
    if self.writes:
      for name, value in values.items():
        if math.isfinite(value):  # there may be nothing to measure here
          self.board.add_scalar(name, value, step)

  def pictures(self, step: int, images: dict[str, np.ndarray]) -> None:
    """Pictures uint8[H, W, 3], to TensorBoard and to pictures/<name>_<step>.png."""
    if not self.writes:
      return
    (self.workdir / 'pictures').mkdir(exist_ok=True)
    for name, image in images.items():
      self.board.add_image(name, image, step, dataformats='HWC')
      Image.fromarray(image).save(self.workdir / 'pictures' / f'{name}_{step:07d}.png')

  def restart_clock(self) -> None:
    """Begins to measure the speed: what was compiled until now does not count."""
    self.clock, self.waited = time.monotonic(), 0.0

  def pause(self, seconds: float) -> None:
    """Takes time that was not spent on training steps out of the speed."""
    self.clock += seconds

  def say(self, line: str) -> None:
    if self.writes:
      try:
        print(line, flush=True)
      except OSError:  # nobody reads any more: a lost terminal does not end a job, whose record is in workdir
        sys.stdout = open(os.devnull, 'w')

  def close(self) -> None:
    self.flush()
    self.watch.shutdown()
    if self.writes:
      self.jsonl.close()
      self.board.close()


def _when_ready(values: dict) -> float:
  jax.block_until_ready(values)
  return time.monotonic()


def memory_in_use() -> dict[str, float]:
  """GiB of device memory in use now and at most so far, on the fullest device of this process; {} where it is not told (CPU)."""
  known = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
  keys = {'hbm_gib': 'bytes_in_use', 'hbm_peak_gib': 'peak_bytes_in_use'}
  return {name: max(stats[key] for stats in known) / 2**30 for name, key in keys.items() if known and all(key in stats for stats in known)}


class Trace:
  """An xprof trace of some steps in WORKDIR/profile, by process 0. `steps`: 'FIRST:LAST', or '' for none.

  Raises:
    UserError: `steps` are none.
  """

  def __init__(self, steps: str, workdir):
    self.folder, self.running = str(pathlib.Path(workdir) / 'profile'), False
    first, colon, last = steps.partition(':')
    if steps and not (colon and first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
      raise UserError(f'profile={steps!r}: give the first and the last step to trace, such as 10:12')
    self.first, self.last = (int(first), int(last)) if steps and jax.process_index() == 0 else (0, 0)

  def before(self, step: int) -> None:
    if self.first <= step <= self.last and not self.running:  # a run may be continued in the middle
      jax.profiler.start_trace(self.folder)
      self.running = True

  def after(self, step: int, values) -> None:
    if self.running and step >= self.last:
      jax.block_until_ready(values)
      self.close()

  def close(self) -> None:
    if self.running:
      jax.profiler.stop_trace()
      self.running = False


def json_line(row: dict) -> str:
  """A line of metrics.jsonl. JSON knows neither nan nor infinity: null stands for "nothing to measure here"."""
  return json.dumps({k: v if math.isfinite(v) else None for k, v in row.items()}, allow_nan=False) + '\n'


def mean(rows: list[dict]) -> dict[str, float]:
  """The mean of each key, where a nan says "nothing to measure here"; but one nan in what is VITAL makes its mean nan, to be seen."""

  def average(key):
    values = np.array([row[key] for row in rows], np.float64)
    return float(values.mean() if key in VITAL or np.isnan(values).all() else np.nanmean(values))

  return {key: average(key) for key in rows[0]} if rows else {}


def made(rows: list[dict]) -> list[dict]:
  """The rows of steps whose updates were made, or all where none was."""
  return [row for row in rows if not row.get('nonfinite')] or rows


def sheet(*rows: np.ndarray) -> np.ndarray:
  """Rows of pictures uint8[n, H, W, 3] -> one picture uint8[rows * H, n * W, 3]."""
  return np.concatenate([np.concatenate(list(np.asarray(row)), axis=1) for row in rows], axis=0)


def keep_lines(file: pathlib.Path, last_step: int) -> None:
  """Drops the lines of steps after `last_step`, and a last line that was cut short, from a JSONL file; atomically."""
  if not file.exists():
    return
  kept = []
  for line in file.read_text().splitlines():
    try:
      if json.loads(line)['step'] <= last_step:
        kept.append(line)
    except ValueError:
      pass
  scratch = file.with_suffix('.tmp')
  scratch.write_text(''.join(line + '\n' for line in kept))
  os.replace(scratch, file)


def duration(seconds: float) -> str:
  """3725 -> '1:02:05'."""
  minutes, seconds = divmod(int(seconds), 60)
  return f'{minutes // 60}:{minutes % 60:02d}:{seconds:02d}'
