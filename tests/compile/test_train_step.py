"""The train step compiled for absent TPUs; libtpu is in the extra [tpu]."""

import json
import math
import os
import subprocess
import sys

import pytest

from lavit_jax.accelerators import TPUS
from lavit_jax.models import lavit
from lavit_jax.training import flops
from lavit_jax.training.config import load_config, split_overrides
from lavit_jax.training.run import resolve_abstract

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


def compile_page(page, topology, *options):
  """Runs `lavit compile` in its own process, since libtpu cannot be unloaded.

  Returns:
    (status, output, errors).
  """
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'TPU_WORKER_HOSTNAMES': 'localhost'}
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'lavit_jax',
      'compile',
      '--config',
      page,
      '--topology',
      topology,
      *options,
    ],
    env=env,
    capture_output=True,
    text=True,
    timeout=3000,
  )
  return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize('topology', ['v9:2x2', 'v5e', 'v5e:'])
def test_other_topologies_are_refused(topology):
  status, _, errors = compile_page('configs/tokenizer.py:tiny', topology)
  assert status == 2 and 'write CHIP:SHAPE such as v5e:16x16; known chips: v4, v5e' in errors


def step_operations(page, options):
  """Operations of a step, each counted once, with all slots and towers, whatever they hold."""
  run = resolve_abstract(load_config(f'configs/{page}', split_overrides(options)[0]))
  if run.stage_name != 'lm':
    return flops.step_flops(run).fixed
  pair = flops.pair_flops(run)
  row = pair.row + run.options.row_length**2 * pair.attention / 2
  return (
    run.batch_size * (pair.features + pair.codes + pair.understanding) + run.options.num_rows * row
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  'page, topology, options, mfu, most',
  [
    ('tokenizer.py:tiny', 'v5e:2x2', (), 0.0, 2.0),
    ('lm.py:tiny', 'v5e:2x2', ('--config.batch_size=64', '--config.lm.num_rows=16'), 0.0, 2.0),
    (
      'lm.py:tiny',
      'v5e:2x2',
      (
        '--config.batch_size=64',
        '--config.lm.num_rows=16',
        '--config.mesh.data=1',
        '--config.mesh.fsdp=2',
        '--config.mesh.tensor=2',
        '--config.optim.mu_dtype=bfloat16',
      ),
      0.0,
      3.0,
    ),  # five heads do not go in two
    (
      'lm.py:tiny',
      'v5e:2x2',
      ('--slices', '2', '--config.batch_size=64', '--config.lm.num_rows=16'),
      0.0,
      2.0,
    ),
    ('tokenizer.py:lavit_7b', 'v5e:8x8', (), 0.9, 1.1),
    ('detokenizer.py:lavit_7b', 'v5p:4x4x8', (), 0.9, 1.1),
    ('lm.py:lavit_7b', 'v5p:4x4x8', (), 0.6, 1.3),
  ],
)
@pytest.mark.timeout(3100)
def test_fits_and_is_accounted_for(page, topology, options, mfu, most):
  """The smallest documented pod of each stage, and some that compile in seconds.

  `mfu` is the lower limit of its bound; `most` the upper limit of the program's operations for each
  that must be computed.
  """
  pytest.importorskip('libtpu')
  status, output, errors = compile_page(f'configs/{page}', topology, '--json', *options)
  assert status == 0, errors
  print(output)
  report = json.loads(output)
  assert not set(KEYS) - set(report)
  chip = TPUS[topology.split(':')[0]]
  assert report['fits'] and report['hbm_per_chip_gib'] < 0.9 * chip.hbm_gib
  operations = step_operations(page, options)
  flops_of_all = report['flops_per_chip'] * report['chips']
  assert 0.98 < flops_of_all / operations < most  # nothing is missing from the count
  if page.startswith('lm'):
    assert report['packed_share'] < 1
    assert report['model_flops_per_chip'] * report['chips'] < 0.85 * operations
  seconds = max(report[f'{kind}_seconds'] for kind in ('compute', 'memory', 'network'))
  bound = report['model_flops_per_chip'] / (chip.tflops * 1e12 * seconds)
  assert report['mfu_bound'] == pytest.approx(bound) and report['mfu_bound'] > mfu
  sides = map(int, topology.split(':')[1].split('x'))
  assert math.prod(report['mesh'].values()) == report['chips']
  assert report['chips'] == math.prod(sides) * report['slices']
  if page == 'lm.py:lavit_7b':
    llama = lavit.build('lavit_7b').llama
    weights = (
      llama.num_layers * (4 * llama.hidden_size**2 + 3 * llama.hidden_size * llama.mlp_dim)
      + 2 * llama.hidden_size * llama.vocab_size
    )
    assert flops_of_all < 1.4 * 6 * weights * report['tokens_per_step']
