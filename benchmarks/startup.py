"""What a second start of the same command costs, with the compilation cache and without it.

    python benchmarks/startup.py [--repeats 5] [--only caption,train] [--baseline LAVIT] [--json]

caption: CPU seconds (user and system) of `lavit caption IMAGE` as a process, with and without
    --compilation-cache off, in turn; the first start with a cache, which fills it, is apart.
    --baseline names the `lavit` of a build without a cache, which is started in turn, too.
train: CPU seconds in which the train step is lowered and compiled, of a run that is killed after
    its first checkpoint, and of its second start. The config is encoder:tiny with the embedded
    data. The seconds are those of the process between two lines of goodput.jsonl (Linux only).

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
  env = environment()
  if command[0] != sys.executable:  # another build, which finds its own package
    env.pop('PYTHONPATH')
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  subprocess.run(command, cwd='/', env=env, stdout=subprocess.DEVNULL, check=True)
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
  """Prints the CPU seconds of compiling a train step; returns second start over first."""
  times: dict[int, list[float]] = {1: [], 2: []}
  for repeat in range(repeats):
    workdir = folder / str(repeat)
    command = [*LAVIT, 'train', '--config', 'configs/encoder.py:tiny', '--workdir', str(workdir)]
    options = {'data.source': 'embedded', 'eval_every': 0, 'picture_every': 0}
    options |= {'checkpoint_every': 1, 'log_every': 1, 'num_steps': 1000, 'batch_size': 8}
    command += [f'--config.{name}={value}' for name, value in options.items()]
    for start, seconds in times.items():
      process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
      began = wait_for_line(process, workdir, start, compiling=True)
      seconds.append(wait_for_line(process, workdir, start, compiling=False) - began)
      while start == 1 and not any((workdir / 'checkpoints').glob('[0-9]*')):
        time.sleep(0.02)
      process.kill()
      process.wait()
  print('lavit train, encoder:tiny: lowering and compiling the train step, CPU seconds')
  print(f'  first start  {summary(times[1])}')
  print(f'  second start {summary(times[2])}')
  ratio = statistics.median(times[2]) / statistics.median(times[1])
  print(f'  second over first: {ratio:.2f}')
  return ratio


def wait_for_line(
  process: subprocess.Popen, workdir: pathlib.Path, start: int, compiling: bool
) -> float:
  """Waits until a start begins to compile its train step, or has done so.

  Returns:
    The CPU seconds of the process until then.
  """
  while True:
    seconds = process_cpu_seconds(process.pid)
    phases = line_phases(workdir / 'goodput.jsonl', start)
    if 'compile' in phases and (compiling or phases[-1] != 'compile'):
      return seconds
    if process.poll() is not None:
      sys.exit(f'the run ended early, with status {process.returncode}')
    time.sleep(0.02)


def line_phases(file: pathlib.Path, start: int) -> list[str]:
  """The phases of the lines of a start."""
  phases = []
  for text in file.read_text().splitlines() if file.exists() else ():
    try:
      line = json.loads(text)
    except ValueError:  # being written
      continue
    if line['start'] == start:
      phases.append(line['phase'])
  return phases


def process_cpu_seconds(pid: int) -> float:
  """CPU seconds of a process that runs."""
  fields = pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
  return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')


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
