"""Train steps compiled for TPU pods. The tests that compile need the extra [tpu]."""

import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

from lavit_jax.accelerators import TPUS
from lavit_jax.cli import main
from lavit_jax.models import lavit
from lavit_jax.training import flops
from lavit_jax.training.config import load_config, split_overrides
from lavit_jax.training.run import resolve_abstract

ROOT = pathlib.Path(__file__).parents[2]
KEYS = (
  'topology',
  'chips',
  'hbm_per_chip_gib',
  'hbm_limit_gib',
  'fits',
  'flops_per_chip',
  'model_flops_per_chip',
  'packed_share',
  'collective_bytes_per_chip',
  'mfu_bound',
  'compile_seconds',
)


def compile_config(config, topology, *options):
  """Runs `lavit compile` in a process of its own, since libtpu cannot be unloaded.

  Returns (status, output, errors).
  """
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'TPU_WORKER_HOSTNAMES': 'localhost'}
  command = [sys.executable, '-m', 'lavit_jax', 'compile']
  process = subprocess.run(
    [*command, '--config', config, '--topology', topology, *options],
    env=env,
    capture_output=True,
    text=True,
    timeout=3000,
  )
  return process.returncode, process.stdout, process.stderr


@pytest.mark.parametrize('topology', ['v9:2x2', 'v5e', 'v5e:'])
def test_an_invalid_topology_is_refused(topology, capsys):
  """Before libtpu is loaded."""
  config = f'{ROOT}/configs/tokenizer.py:tiny'
  assert main(['compile', '--config', config, '--topology', topology]) == 2
  errors = capsys.readouterr().err
  assert 'write CHIP:SHAPE such as v5e:16x16; known chips: v4, v5e' in errors


def expected_flops(config, options):
  """Operations of a step, each counted once.

  The language model counts with all slots and all encoders, whatever the slots contain.
  """
  run = resolve_abstract(load_config(f'configs/{config}', split_overrides(options)[0]))
  if run.stage_name != 'lm':
    return flops.step_flops(run).fixed
  pair = flops.pair_flops(run)
  row = pair.row + run.options.row_length**2 * pair.attention / 2
  images = run.batch_size * (pair.features + pair.codes + pair.understanding)
  return images + run.options.num_rows * row


LM_BATCH = ('--config.batch_size=64', '--config.lm.num_rows=16')
LM_TENSOR = (  # the tiny model's five heads cannot be split in two
  '--config.mesh.data=1',
  '--config.mesh.fsdp=2',
  '--config.mesh.tensor=2',
  '--config.optim.mu_dtype=bfloat16',
)


@pytest.mark.slow
@pytest.mark.parametrize(
  'config, topology, options, min_mfu, max_ratio',
  [
    ('tokenizer.py:tiny', 'v5e:2x2', (), 0.0, 2.0),
    ('lm.py:tiny', 'v5e:2x2', LM_BATCH, 0.0, 2.0),
    ('lm.py:tiny', 'v5e:2x2', (*LM_BATCH, *LM_TENSOR), 0.0, 3.0),
    ('lm.py:tiny', 'v5e:2x2', ('--slices', '2', *LM_BATCH), 0.0, 2.0),
    ('tokenizer.py:lavit_7b', 'v5e:8x8', (), 0.9, 1.1),
    ('detokenizer.py:lavit_7b', 'v5p:4x4x8', (), 0.9, 1.1),
    ('lm.py:lavit_7b', 'v5p:4x4x8', (), 0.6, 1.3),
  ],
)
@pytest.mark.timeout(3100)
def test_a_step_fits_and_all_operations_are_counted(config, topology, options, min_mfu, max_ratio):
  """The smallest pod of the README's table for each stage, and some that compile in seconds.

  `min_mfu`: a lower limit of the bound of the MFU; `max_ratio`: an upper limit of the program's
  operations relative to the expected ones.
  """
  pytest.importorskip('libtpu')
  status, output, errors = compile_config(f'configs/{config}', topology, '--json', *options)
  assert status == 0, errors
  print(output)
  report = json.loads(output)
  assert not set(KEYS) - set(report)
  chip_name, shape = topology.split(':')
  chip = TPUS[chip_name]
  assert report['fits'] and report['hbm_per_chip_gib'] < 0.9 * chip.hbm_gib
  expected = expected_flops(config, options)
  program_flops = report['flops_per_chip'] * report['chips']
  assert 0.98 < program_flops / expected < max_ratio
  if config.startswith('lm'):
    assert report['packed_share'] < 1
    assert report['model_flops_per_chip'] * report['chips'] < 0.85 * expected
  seconds = max(report[f'{resource}_seconds'] for resource in ('compute', 'memory', 'network'))
  mfu_bound = report['model_flops_per_chip'] / (chip.tflops * 1e12 * seconds)
  assert report['mfu_bound'] == pytest.approx(mfu_bound)
  assert report['mfu_bound'] > min_mfu
  assert report['chips'] == math.prod(report['mesh'].values())
  assert report['chips'] == math.prod(map(int, shape.split('x'))) * report['slices']
  if config == 'lm.py:lavit_7b':
    llama = lavit.build('lavit_7b').llama
    layer = 4 * llama.hidden_size**2 + 3 * llama.hidden_size * llama.mlp_dim
    weights = llama.num_layers * layer + 2 * llama.hidden_size * llama.vocab_size
    assert program_flops < 1.4 * 6 * weights * report['tokens_per_step']
