"""Goodput of a run that is killed at random, with the compilation cache and without it.

    python benchmarks/goodput.py [--kills 20] [--seed 0] [--steps 300] [--mean SECONDS] [--json]

A run of encoder:tiny with the embedded data is killed (SIGKILL) again and again, after random
times with a mean of --mean seconds, and then finishes. Both sides are killed after the same times.
A start that is killed before it has the work directory leaves no line and is not counted: on a busy
machine, give a longer --mean.
The last line of each is that of `lavit train`; the losses of both must be the same, all digits.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import random
import subprocess
import sys
import tempfile
import time

from startup import LAVIT, ROOT, environment

from lavit_jax.training.goodput import Totals, read_totals


def run_killed(workdir: pathlib.Path, times: list[float], steps: int, cache: list[str]) -> Totals:
  """Runs until the end, killed after each of the times; returns where the time went."""
  command = [*LAVIT, 'train', '--config', 'configs/encoder.py:tiny', '--workdir', str(workdir)]
  options = {'data.source': 'embedded', 'eval_every': 0, 'picture_every': 0, 'batch_size': 8}
  options |= {'checkpoint_every': 10, 'log_every': 5, 'num_steps': steps}
  command += [f'--config.{name}={value}' for name, value in options.items()] + cache
  for seconds in [*times, None]:
    process = subprocess.Popen(
      command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )
    try:
      output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
      process.kill()
      process.communicate()
      continue
    if process.returncode:
      sys.exit(f'the run ended with status {process.returncode}')
    print('  ' + output.splitlines()[-1], flush=True)
    break
  return read_totals(workdir)


def losses(workdir: pathlib.Path) -> list[float]:
  """The loss of each step."""
  return [json.loads(line)['loss'] for line in (workdir / 'metrics.jsonl').open()]


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--kills', type=int, default=20)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--steps', type=int, default=300)
  parser.add_argument('--mean', type=float, default=20.0, metavar='SECONDS')
  parser.add_argument('--json', action='store_true')
  args = parser.parse_args()
  generator = random.Random(args.seed)
  times = [generator.uniform(0, 2 * args.mean) for _ in range(args.kills)]
  goodput = {}
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(scratch)
    for name, cache in (('cache', []), ('no cache', ['--compilation-cache', 'off'])):
      print(f'{name}: killed {args.kills} times, {args.steps} steps')
      began = time.monotonic()
      totals = run_killed(folder / name, times, args.steps, cache)
      goodput[name] = totals.goodput
      print(f'  {time.monotonic() - began:.0f} s in all', flush=True)
    assert losses(folder / 'cache') == losses(folder / 'no cache')
  ratio = goodput['cache'] / goodput['no cache']
  print(f'goodput {goodput["cache"]:.3f} and {goodput["no cache"]:.3f}: {ratio:.2f} times')
  if args.json:
    print(json.dumps({name: round(value, 4) for name, value in goodput.items()}))


if __name__ == '__main__':
  main()
