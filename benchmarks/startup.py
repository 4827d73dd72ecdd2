"""What a second start of the same command costs, with the compilation cache and without it.

    python benchmarks/startup.py [--repeats 5] [--only caption,train] [--baseline LAVIT] [--json]

caption: CPU seconds (user and system) of `lavit caption IMAGE` as a process, with and without
    --compilation-cache off, in turn; the first start with a cache, which fills it, is apart.
    --baseline names another build's `lavit` that is started in turn, too.
train: wall and CPU seconds until the train step is compiled (lowering included), of a run that
    is killed after its first checkpoint, and of its second start. The config is encoder:tiny with
    the embedded data. The wall seconds are those of goodput.jsonl.

Numbers are medians; `range` is the smallest and the largest. With --json the last line is one
object with the ratios, such as {"caption": 0.34, "train": 0.15}.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
IMAGE = ROOT / 'lavit_jax' / 'assets' / 'demo' / '00.png'
LAVIT = (sys.executable, '-m', 'lavit_jax')


def cpu_seconds(command: list[str]) -> float:
  """CPU seconds of a command, which must succeed."""
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  subprocess.run(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, check=True)
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def environment() -> dict[str, str]:
  """The variables of a command: one cache is its own, that of the caller is not used."""
  variables = dict(os.environ, PYTHONPATH=str(ROOT))
  for name in ('LAVIT_COMPILATION_CACHE', 'JAX_COMPILATION_CACHE_DIR'):
    variables.pop(name, None)
  return variables


def caption(folder: pathlib.Path, repeats: int, baseline: str | None) -> float:
  """Prints the CPU seconds of `lavit caption`; returns those with the cache over those without."""
  command = [*LAVIT, 'caption', str(IMAGE), '--compilation-cache']
  sides = {'cache': [*command, str(folder)], 'no cache': [*command, 'off']}
  if baseline:
    sides['baseline'] = [baseline, 'caption', str(IMAGE)]
  first = cpu_seconds(sides['cache'])
  times: dict[str, list[float]] = {name: [] for name in sides}
  for _ in range(repeats):
    for name, arguments in sides.items():
      times[name].append(cpu_seconds(arguments))
  print(f'lavit caption: first start {first:.2f} CPU s')
  for name, seconds in times.items():
    print(f'  {name:9s} {summary(seconds)}')
  medians = {name: statistics.median(seconds) for name, seconds in times.items()}
  for name in sides:
    if name != 'cache':
      print(f'  cache over {name}: {medians["cache"] / medians[name]:.2f}')
  return medians['cache'] / medians['no cache']


def train(folder: pathlib.Path, repeats: int) -> float:
  """Prints the seconds of compiling the train step; returns those of a restart over the first."""
  first = []
  second = []
  for repeat in range(repeats):
    workdir = folder / str(repeat)
    command = [*LAVIT, 'train', '--config', 'configs/encoder.py:tiny', '--workdir', str(workdir)]
    options = {'data.source': 'embedded', 'eval_every': 0, 'picture_every': 0}
    options |= {'checkpoint_every': 1, 'log_every': 1, 'num_steps': 1000, 'batch_size': 8}
    command += [f'--config.{name}={value}' for name, value in options.items()]
    for start, times in ((1, first), (2, second)):
      process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
      seconds = None
      while seconds is None:
        if process.poll() is not None:
          sys.exit('the run ended early')
        time.sleep(0.05)
        seconds = compile_seconds(workdir / 'goodput.jsonl', start)
      times.append(seconds)
      while start == 1 and not any((workdir / 'checkpoints').glob('[0-9]*')):
        time.sleep(0.05)
      process.kill()
      process.wait()
  print('lavit train, encoder:tiny: lowering and compiling the train step, wall seconds')
  print(f'  first start  {summary(first)}')
  print(f'  second start {summary(second)}')
  ratio = statistics.median(second) / statistics.median(first)
  print(f'  second over first: {ratio:.2f}')
  return ratio


def compile_seconds(file: pathlib.Path, start: int) -> float | None:
  """Seconds of the phase `compile` of a start; None while it is not over."""
  if not file.exists():
    return None
  before = None
  for text in file.read_text().splitlines():
    try:
      line = json.loads(text)
    except ValueError:  # being written
      continue
    if line['start'] != start:
      continue
    if before is not None:
      return line['seconds']['compile'] - before
    if line['phase'] == 'compile':
      before = line['seconds'].get('compile', 0.0)
  return None


def summary(seconds: list[float]) -> str:
  """The median, and the range."""
  median = statistics.median(seconds)
  return f'{median:.2f} s (range {min(seconds):.2f} to {max(seconds):.2f})'


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--only', default='caption,train')
  parser.add_argument('--baseline')
  parser.add_argument('--json', action='store_true')
  args = parser.parse_args()
  ratios = {}
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(scratch)
    if 'caption' in args.only:
      ratios['caption'] = caption(folder / 'cache', args.repeats, args.baseline)
    if 'train' in args.only:
      ratios['train'] = train(folder / 'runs', args.repeats)
  if args.json:
    print(json.dumps({name: round(ratio, 3) for name, ratio in ratios.items()}))


if __name__ == '__main__':
  main()
