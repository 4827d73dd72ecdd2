"""What a run of training reads, and how much memory it takes until its first step.

    python benchmarks/loading.py [--stage tokenizer] [--variant small] [--dtype bfloat16] [--json]

Writes a folder with random weights of seven modules of a variant, and starts a stage from it, with
both `frozen` and `init_from`. Then it saves a checkpoint, and starts again from that. Each start is
a process of its own, which ends before its first step. A line of each says:

    read   MB of arrays that are read from the folder, and how many times that is of the modules
           that the stage uses
    peak   GB of resident memory, above that before loading, and how many times that is of what the
           first step then gets: the train state and the frozen modules
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import pathlib
import re
import tempfile
from multiprocessing.connection import Connection
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
MODULES = ('vit', 'tokenizer', 'decoder', 'understanding', 'llama', 'vae', 'uncond_embeddings')


def write_folder(folder: str, variant: str, dtype: str) -> None:
  """Modules of a variant, with random numbers."""
  import jax
  import numpy as np

  from lavit_jax.models import lavit
  from lavit_jax.models.initialization import init_params
  from lavit_jax.weights.store.folder import save_params

  model = lavit.build(variant)
  shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0), MODULES))
  numbers = np.random.default_rng(0).standard_normal(1 << 20, np.float32) * np.float32(0.02)
  params = jax.tree.map(lambda leaf: np.resize(numbers, leaf.shape), shapes)
  save_params(folder, variant, params, dtype=dtype)


class Reading:
  """Counts the bytes that are read from a folder."""

  def __init__(self):
    from lavit_jax.weights.store import folder

    self.bytes = 0
    self.modules: dict[str, int] = {}  # bytes of the modules that were opened
    self._open = folder.open_params
    folder.open_params = self._open_counting

  def _open_counting(self, folder: str, name: str, dtype: str | None = 'float32') -> Any:
    stored = self._open(folder, name, None).structs
    self.modules[name] = sum(leaf.size * leaf.dtype.itemsize for leaf in stored.values())
    source = self._open(folder, name, dtype)

    def read(path: str, index: int | None = None, sharding: Any = None) -> Any:
      self.bytes += stored[path].size * stored[path].dtype.itemsize
      return source.read(path, index, sharding)

    return source._replace(read=read)


def memory(field: str) -> int:
  """Bytes of this process: VmRSS now, or VmHWM at its peak."""
  match = re.search(rf'{field}:\s+(\d+) kB', pathlib.Path('/proc/self/status').read_text())
  assert match is not None
  return int(match[1]) * 1024


def start(pipe: Connection, config: Any, workdir: str, saves: bool) -> None:
  """Starts a run, and ends before its first step; sends what it read, took and has."""
  import jax

  from lavit_jax.training import flops, loop

  flops.step_flops = lambda run: flops.StepFlops(1.0)
  reading = Reading()

  def stop(run, inputs, start, *_):
    jax.block_until_ready(start.state)
    peak = memory('VmHWM') - before
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((start.state, inputs.frozen)))
    if saves:
      inputs.checkpoints.save(1, start.state, inputs.batches)
      inputs.checkpoints.wait()
    used = sum(reading.modules.values())
    pipe.send({'read': reading.bytes, 'used': used, 'peak': peak, 'held': held})
    raise SystemExit

  loop._train_steps = stop  # pyright: ignore[reportPrivateUsage]
  jax.jit(lambda x: x + 1)(1.0).block_until_ready()
  pathlib.Path('/proc/self/clear_refs').write_text('5')  # forgets the peak until now
  before = memory('VmRSS')
  loop.train(config, workdir)


def main() -> None:
  from lavit_jax.training.config import load_config

  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--stage', default='tokenizer')
  parser.add_argument('--variant', default='small')
  parser.add_argument('--dtype', default='bfloat16', help='of the numbers in the folder')
  parser.add_argument('--json', action='store_true')
  args = parser.parse_args()
  config = load_config(f'{ROOT}/configs/{args.stage}.py:{args.variant}')
  options = {'data.source': 'embedded', 'data.sources': (), 'data.heldout': ()}
  options |= {'eval_every': 0, 'picture_every': 0, 'batch_size': 8, 'num_steps': 100}
  options |= {'mesh.fsdp': 1}
  results = {}
  with tempfile.TemporaryDirectory() as scratch, config.unlocked():
    folder = f'{scratch}/weights'
    config.update_from_flattened_dict({**options, 'frozen': folder, 'init_from': folder})
    spawn = multiprocessing.get_context('spawn')
    writer = spawn.Process(target=write_folder, args=(folder, args.variant, args.dtype))
    writer.start()
    writer.join()
    for name in ('new', 'continued'):
      receiver, sender = spawn.Pipe(duplex=False)
      arguments = (sender, config, f'{scratch}/run', name == 'new')
      process = spawn.Process(target=start, args=arguments)
      process.start()
      sender.close()
      result = receiver.recv()
      process.join()
      results[name] = result
      print(
        f'{name}: read {result["read"] / 1e6:.0f} MB ({result["read"] / result["used"]:.2f} of the '
        f'modules); peak {result["peak"] / 1e9:.2f} GB ({result["peak"] / result["held"]:.3f} of '
        f'what the first step gets)',
        flush=True,
      )
  if args.json:
    print(json.dumps(results))


if __name__ == '__main__':
  main()
