"""Decoding compiled for absent TPUs; libtpu is in the extra [tpu]."""

import json
import os
import subprocess
import sys

import pytest

from lavit_jax.models import lavit


def compile_decoding(*options):
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'TPU_WORKER_HOSTNAMES': 'localhost'}
  done = subprocess.run(
    [sys.executable, '-m', 'lavit_jax', 'compile', '--topology', 'v5e:2x4', *options],
    env=env,
    capture_output=True,
    text=True,
    timeout=1500,
  )
  return done.returncode, done.stdout, done.stderr


def test_the_program_must_be_named():
  for options in ((), ('--config', 'configs/lm.py:tiny', '--decode', 'tiny')):
    status, _, errors = compile_decoding(*options)
    assert status == 2 and 'give either --config PAGE.py:VARIANT' in errors


@pytest.mark.slow
@pytest.mark.parametrize('options, width', [((), 2), (('--weights', 'int8', '--cache', 'int8'), 1)])
@pytest.mark.timeout(1600)
def test_a_token_reads_the_model_and_the_cache_once(options, width):
  """The 7B model on eight chips; `width` is the bytes of a weight.

  A tenth comes on top: the compiler moves the cache of some layers into the memory of the chip to
  write the new slot, and writes it back as a whole.
  """
  pytest.importorskip('libtpu')
  status, output, errors = compile_decoding('--decode', 'lavit_7b', '--json', *options)
  assert status == 0, errors
  prefill, decode = map(json.loads, output.splitlines())
  llama = lavit.build('lavit_7b').llama
  matrices = (
    llama.num_layers * (4 * llama.hidden_size**2 + 3 * llama.hidden_size * llama.mlp_dim)
    + llama.hidden_size * llama.vocab_size
  )
  cache = 2 * llama.num_layers * 8 * (512 + 256) * llama.hidden_size
  # int8 has scales beside it.
  assert decode['hbm_cache_gib'] * 8 * 2**30 == pytest.approx(cache * width, rel=0.05)
  once = (matrices + cache) * width / 8
  assert once < decode['hbm_bytes_per_chip'] < 1.15 * once
  assert prefill['fits'] and decode['fits'] and decode['hbm_per_chip_gib'] < 3
  assert prefill['flops_per_chip'] == pytest.approx(2 * 8 * 512 * matrices / 8, rel=0.1)
  assert decode['tokens_per_second'] == pytest.approx(
    8 / max(decode[f'{kind}_seconds'] for kind in ('compute', 'memory', 'network'))
  )


def test_one_token_has_no_loop():
  status, _, errors = compile_decoding('--decode', 'tiny', '--new-tokens', '1')
  assert status == 2 and 'ask for 2 or more' in errors
