"""Decoding compiled for TPU pods. The tests that compile need the extra [tpu]."""

import json
import os
import subprocess
import sys

import pytest

from lavit_jax.models import lavit


def compile_decoding(*options):
  """Runs `lavit compile` in a process of its own, since libtpu cannot be unloaded.

  Returns (status, output, errors).
  """
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'TPU_WORKER_HOSTNAMES': 'localhost'}
  process = subprocess.run(
    [sys.executable, '-m', 'lavit_jax', 'compile', '--topology', 'v5e:2x4', *options],
    env=env,
    capture_output=True,
    text=True,
    timeout=1500,
  )
  return process.returncode, process.stdout, process.stderr


@pytest.mark.parametrize('options', [(), ('--config', 'configs/lm.py:tiny', '--decode', 'tiny')])
def test_either_a_config_or_decode_is_required(options):
  status, _, errors = compile_decoding(*options)
  assert status == 2 and 'give either --config FILE.py:VARIANT' in errors


@pytest.mark.slow
@pytest.mark.parametrize('options, width', [((), 2), (('--weights', 'int8', '--cache', 'int8'), 1)])
@pytest.mark.timeout(1600)
def test_a_token_reads_the_model_and_the_cache_once(options, width):
  """A step of decoding with 7B parameters on eight chips reads parameters and cache once.

  It may exceed that by a tenth: the compiler brings the cache of some layers into the chip's own
  memory to write the new slot, and writes it back whole. `width`: bytes of a weight.
  """
  pytest.importorskip('libtpu')
  status, output, errors = compile_decoding('--decode', 'lavit_7b', '--json', *options)
  assert status == 0, errors
  prefill, decode = map(json.loads, output.splitlines())
  llama = lavit.build('lavit_7b').llama
  layer = 4 * llama.hidden_size**2 + 3 * llama.hidden_size * llama.mlp_dim
  matrices = llama.num_layers * layer + llama.hidden_size * llama.vocab_size
  cache = 2 * llama.num_layers * 8 * (512 + 256) * llama.hidden_size
  # An int8 cache has scales in addition.
  assert decode['hbm_cache_gib'] * 8 * 2**30 == pytest.approx(cache * width, rel=0.05)
  once = (matrices + cache) * width / 8
  assert once < decode['hbm_bytes_per_chip'] < 1.15 * once
  assert prefill['fits'] and decode['fits'] and decode['hbm_per_chip_gib'] < 3
  assert prefill['flops_per_chip'] == pytest.approx(2 * 8 * 512 * matrices / 8, rel=0.1)
  seconds = max(decode[f'{resource}_seconds'] for resource in ('compute', 'memory', 'network'))
  assert decode['tokens_per_second'] == pytest.approx(8 / seconds)


def test_a_single_new_token_is_refused():
  """The prefill generates it, so there would be no loop."""
  status, _, errors = compile_decoding('--decode', 'tiny', '--new-tokens', '1')
  assert status == 2 and 'ask for 2 or more' in errors
