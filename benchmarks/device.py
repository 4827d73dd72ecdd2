"""What one accelerator computes, how fast and in how much memory: the cases of device.sh.

    python benchmarks/device.py --out DIR [--tiny] [--only CASE,...] [--seconds 480]

parity         tests of golden case A, with float32 products
attention      cuDNN's and Pallas' attention against plain products, forward and backward
train_small    steps of stage 2, variant small, random pairs
train_wide     steps of four blocks as wide as the 7B model's, packed rows
tokenize       eight images by variant small, beside PyTorch
decode         eight rows of inference.py's language model, beside transformers

Each case is a process of its own. A case that fails, or for which no time is left, has an `error`
in place of numbers. DIR/device.json is written after each. --tiny has sizes for a CPU: it shows
that the cases run, and its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

sys.path.append(os.environ.get('LAVIT_WHEELS', ''))
ROOT = pathlib.Path(__file__).parents[1]
STEPS = 10  # timed
WARMUP = 2
RESERVE = 10.0  # seconds at the end
TINY_LAYERS: dict[str, Any] = {
  'hidden_size': 64,
  'num_layers': 2,
  'num_heads': 2,
  'num_kv_heads': 2,
  'head_dim': 32,
  'mlp_dim': 96,
}

Result = dict[str, Any]


# --- Cases ---------------------------------------------------------------------------------------


def parity(tiny: bool) -> Result:
  """The golden tests of the visual modules and of the language model."""
  files = ['tests/models'] if tiny else ['tests/models', 'tests/inference/test_decode.py']
  command = [sys.executable, '-m', 'pytest', '-q', '-k', 'golden', '-p', 'no:cacheprovider', *files]
  process = subprocess.run(
    command,
    cwd=ROOT,
    env={**os.environ, 'JAX_DEFAULT_MATMUL_PRECISION': 'highest'},
    capture_output=True,
    text=True,
  )
  summary = process.stdout.splitlines()[-1] if process.stdout else process.stderr[-500:]
  failed = re.findall(r'^(?:FAILED|ERROR) (\S+)', process.stdout, re.MULTILINE)
  counts = {word: int(number) for number, word in re.findall(r'(\d+) (passed|failed)', summary)}
  if process.returncode:
    return {'error': summary, 'failed_tests': failed}
  return counts


def attention(tiny: bool) -> Result:
  """The kernels against plain products in float32, and beside plain products in their own type."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  from jax.experimental.pallas.ops.gpu import attention as pallas

  from lavit_jax.models.attention import attention as plain
  from lavit_jax.models.attention_kernels import cudnn_attention
  from lavit_jax.models.packing import segment_mask

  on_gpu = jax.default_backend() == 'gpu'
  rows, length, heads, width = (1, 64, 2, 16) if tiny else (4, 2048, 32, 128)
  rng = np.random.default_rng(0)
  q, k, v, weight = (
    jnp.asarray(rng.standard_normal((rows, length, heads, width), np.float32), jnp.bfloat16)
    for _ in range(4)
  )
  segments = jnp.asarray(np.arange(length) * 3 // length, jnp.int32)[None].repeat(rows, 0)

  def with_gradient(attend: Callable) -> Callable:
    def value(q, k, v):
      out = attend(q, k, v)
      return (out.astype(jnp.float32) * weight).sum(), out

    return jax.jit(jax.grad(value, argnums=(0, 1, 2), has_aux=True))

  def packed_plain(q, k, v):
    return plain(q, k, v, segment_mask(segments))

  blocks = pallas.BlockSizes.get_default()
  if tiny:
    blocks = pallas.BlockSizes(*(16,) * len(dataclasses.fields(blocks)))

  def packed_pallas(q, k, v):
    scale = width**-0.5
    return pallas.mha(q, k, v, segments, scale, True, blocks, interpret=not on_gpu)

  kernels = {'plain': packed_plain, 'pallas': packed_pallas}
  if on_gpu:
    kernels['cudnn'] = functools.partial(cudnn_attention, segments=segments)
  exact = with_gradient(packed_plain)(*(x.astype(jnp.float32) for x in (q, k, v)))
  result: Result = {'cudnn': None if on_gpu else 'no GPU'}
  for name, kernel in kernels.items():
    try:
      function = with_gradient(kernel)
      outputs = function(q, k, v)
      pairs = zip(jax.tree.leaves(outputs), jax.tree.leaves(exact), strict=True)
      errors = [
        float(jnp.abs(x.astype(jnp.float32) - y).max() / jnp.abs(y).max()) for x, y in pairs
      ]
      result[name] = {
        'max_relative_errors': dict(zip(('dq', 'dk', 'dv', 'out'), errors, strict=True)),
        'ms': 1e3 * seconds_of(lambda function=function: function(q, k, v)),
      }
    except Exception as error:  # the others are still of interest
      result[name] = {'error': first_line(error)}
  return result


def train_small(tiny: bool) -> Result:
  """Steps of stage 2 as `lavit train` makes them, without reading data."""
  import jax
  import numpy as np

  from lavit_jax import sharding
  from lavit_jax.models.initialization import init_params
  from lavit_jax.training import flops
  from lavit_jax.training.config import load_config
  from lavit_jax.training.keys import Purpose, key_for
  from lavit_jax.training.run import resolve_abstract
  from lavit_jax.training.train_step import abstract_inputs, make_init, make_train_step

  variant = 'tiny' if tiny else 'small'
  config = load_config(f'{ROOT}/configs/lm.py:{variant}')
  sizes = {'batch_size': 4, 'lm.num_rows': 2} if tiny else {'batch_size': 128, 'lm.num_rows': 16}
  with config.unlocked():
    config.update_from_flattened_dict({**sizes, 'mesh.fsdp': 1, 'accumulate': 1})
  mesh = sharding.make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1}, jax.devices()[:1])
  run = resolve_abstract(config, mesh)
  shapes, batch_shapes = abstract_inputs(run)
  rng = np.random.default_rng(0)
  limits = {'kind': 3, 'text': run.model.vocabulary.text_size}
  batch = {}
  for name, like in batch_shapes.items():
    if like.dtype == np.float32:
      batch[name] = np.ones(like.shape, np.float32)
    elif name == 'text_length':
      batch[name] = np.full(like.shape, run.layout.text_length // 2, np.int32)
    else:
      batch[name] = rng.integers(0, limits.get(name, 256), like.shape).astype(like.dtype)
  with jax.set_mesh(mesh):
    frozen = jax.jit(lambda key: init_params(run.model, key, tuple(shapes)))(jax.random.key(0))
    init, tx = make_init(run, frozen)
    state = jax.jit(init)(key_for(0, Purpose.WEIGHTS), frozen)
    batch = sharding.put_batch(batch, mesh, sharding.process_share(mesh, run.batch_size))
    shardings = jax.tree.map(lambda x: x.sharding, state)
    frozen = {name: frozen[name] for name in run.stage.modules.needs}
    start = time.monotonic()
    step = make_train_step(run, tx, shardings).lower(state, frozen, batch).compile()
    compile_seconds = time.monotonic() - start
    seconds, values = time_steps(lambda state: step(state, frozen, batch), state)
  share = float(values['packed_share']) if 'packed_share' in values else 1.0
  return {
    'variant': variant,
    'loss': float(values['loss']),
    'packed_share': share,
    **speed(run.tokens_per_step * share, flops.step_flops(run).at(share), seconds),
    'compile_seconds': compile_seconds,
  }


def train_wide(tiny: bool) -> Result:
  """Steps of a language model of four blocks of the 7B model, bfloat16, float32 Adam."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  import optax

  from lavit_jax.models.llama import Llama

  wide: dict[str, Any] = {'hidden_size': 4096, 'num_heads': 32, 'num_kv_heads': 32, 'head_dim': 128}
  wide |= {'mlp_dim': 11008, 'num_layers': 4, 'vocab_size': 32000}
  if tiny:
    wide = {**TINY_LAYERS, 'vocab_size': 128}
  rows, length = (1, 32) if tiny else (8, 2048)
  model = Llama(**wide, dtype=jnp.bfloat16, remat='minimal')
  ids = np.random.default_rng(0).integers(0, wide['vocab_size'], (rows, length)).astype(np.int32)
  positions = np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape)
  segments = np.zeros_like(ids)
  example = (jnp.zeros((1, 8, wide['hidden_size'])), positions[:1, :8], segments[:1, :8])
  tx = optax.adamw(1e-4)

  def init(key):
    params = model.init(key, *example)['params']
    return params, tx.init(params)

  def loss(params, ids):
    def apply(*args: Any, **options: Any) -> Any:
      return model.apply({'params': params}, *args, **options)

    hidden, _ = apply(apply(ids, method='embed'), positions, segments)

    # A row at a time: logits of all rows would take more memory than the model.
    def row_loss(row):
      logits = apply(row[0][:-1], method='logits')
      return optax.softmax_cross_entropy_with_integer_labels(logits, row[1][1:]).mean()

    return jax.lax.map(jax.checkpoint(row_loss), (hidden, ids)).mean()

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state):
    params, moments = state
    value, gradient = jax.value_and_grad(loss)(params, ids)
    updates, moments = tx.update(gradient, moments, params)
    return (optax.apply_updates(params, updates), moments), {'loss': value}

  state = jax.jit(init)(jax.random.key(0))
  trained = sum(
    x.size for name, tree in state[0].items() if name != 'embedding' for x in jax.tree.leaves(tree)
  )
  seconds, values = time_steps(step, state)
  tokens = rows * length
  # Six operations for each parameter and token; of attention, the half that causality allows.
  scores = 6 * 2 * wide['num_layers'] * wide['num_heads'] * wide['head_dim'] * length / 2
  return {
    'parameters': trained,
    'loss': float(values['loss']),
    **speed(tokens, tokens * (6.0 * trained + scores), seconds),
  }


def tokenize(tiny: bool) -> Result:
  """inference.py's case, with PyTorch on the accelerator, too."""
  return beside_pytorch('tokenize', tiny)


def decode(tiny: bool) -> Result:
  """inference.py's case of eight rows, with PyTorch on the accelerator, too."""
  return beside_pytorch('decode_b8', tiny)


def beside_pytorch(case: str, tiny: bool) -> Result:
  """A case of inference.py; both sides make float32 products."""
  import inference
  import jax
  import torch

  if jax.default_backend() == 'gpu':
    inference.peers.DEVICE = 'cuda'
    torch.backends.cuda.matmul.allow_tf32 = False
  if tiny:
    from lavit_jax.models import lavit

    inference.jax_side.SMALL = lavit.build('tiny')
    inference.PICTURES, inference.NEW = 2, 4
    inference.LLAMA = inference.LLAMA.clone(vocab_size=300, **TINY_LAYERS)
  with jax.default_matmul_precision('highest'):
    return inference.CASES[case](1 if tiny else 5)


CASES: dict[str, Callable[[bool], Result]] = {
  'parity': parity,
  'attention': attention,
  'train_small': train_small,
  'train_wide': train_wide,
  'tokenize': tokenize,
  'decode': decode,
}


# --- Measuring -----------------------------------------------------------------------------------


def seconds_of(function: Callable[[], Any]) -> float:
  """The median time of a call, after others."""
  import jax

  times = []
  for number in range(WARMUP + STEPS):
    start = time.monotonic()
    jax.block_until_ready(function())
    if number >= WARMUP:
      times.append(time.monotonic() - start)
  return statistics.median(times)


def time_steps(step: Callable, state: Any) -> tuple[float, Any]:
  """The seconds of a step among several, and the last metrics."""
  import jax

  start = time.monotonic()
  values = None
  for number in range(WARMUP + STEPS):
    if number == WARMUP:
      jax.block_until_ready(state)
      start = time.monotonic()
    state, values = step(state)
  jax.block_until_ready(state)
  return (time.monotonic() - start) / STEPS, values


def speed(tokens: float, flops: float, seconds: float) -> Result:
  """Tokens and operations in a second; `mfu` is None where the peak of the device is unknown."""
  import jax

  from lavit_jax import accelerators

  peak = accelerators.peak_tflops(jax.devices()[:1])
  tflops = flops / seconds / 1e12
  return {
    'tokens_per_second': tokens / seconds,
    'step_seconds': seconds,
    'tflops': tflops,
    'mfu': tflops / peak if peak else None,
  }


def peak_gb() -> float | None:
  """The peak memory of the device in 1e9 bytes, of JAX's arrays; None where it does not tell."""
  import jax

  stats = jax.devices()[0].memory_stats() or {}
  peak = stats.get('peak_bytes_in_use')
  return None if peak is None else peak / 1e9


def first_line(error: BaseException) -> str:
  """An error in one line."""
  return f'{type(error).__name__}: {" ".join(str(error).split())[:300]}'


# --- Processes -----------------------------------------------------------------------------------


def run_case(name: str, tiny: bool, timeout: float) -> Result:
  """Runs a case in a process of its own."""
  command = [sys.executable, __file__, '--case', name, *(['--tiny'] if tiny else [])]
  # JAX would take most of the memory, of which PyTorch needs some.
  env = {**os.environ, 'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
  if tiny:  # compiling takes all of the time
    env['XLA_FLAGS'] = '--xla_backend_optimization_level=0 ' + env.get('XLA_FLAGS', '')
  start = time.monotonic()
  try:
    process = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
  except subprocess.TimeoutExpired:
    return {'error': f'not done in {timeout:.0f} s'}
  lines = process.stdout.splitlines()
  try:
    result = json.loads(lines[-1])
  except (IndexError, ValueError):
    result = {'error': ' | '.join(process.stderr.splitlines()[-3:])[:500]}
  return {**result, 'case_seconds': round(time.monotonic() - start, 1)}


def describe() -> Result:
  """The machine and the versions."""
  code = (
    'import json, platform, jax, importlib.metadata as m; d = jax.devices()[0]; '
    'names = ("jax", "flax", "torch", "transformers"); '
    'print(json.dumps({"device": d.device_kind, "platform": d.platform, '
    '"python": platform.python_version(), **{n: m.version(n) for n in names}}))'
  )
  process = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
  try:
    return json.loads(process.stdout.splitlines()[-1])
  except (IndexError, ValueError):
    return {'error': process.stderr[-500:]}


def main() -> None:
  """Runs the cases, or one of them in this process."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--out', type=pathlib.Path, default=ROOT / 'runs/device', metavar='DIR')
  parser.add_argument('--tiny', action='store_true', help='sizes for a CPU')
  parser.add_argument('--only', default=','.join(CASES), metavar='CASE,...')
  parser.add_argument('--seconds', type=float, default=480.0, help='for all cases')
  parser.add_argument('--case', choices=CASES, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.case:
    try:
      result = CASES[args.case](args.tiny)
      if args.case != 'parity':  # which has a process of its own
        result['peak_gb'] = peak_gb()
    except Exception as error:
      result = {'error': first_line(error)}
    print(json.dumps(result))
    return
  deadline = time.monotonic() + args.seconds
  args.out.mkdir(parents=True, exist_ok=True)
  results: Result = {'machine': describe(), 'tiny': args.tiny, 'cases': {}}
  for name in args.only.split(','):
    left = deadline - time.monotonic() - RESERVE
    result = run_case(name, args.tiny, left) if left > 0 else {'error': 'no time was left'}
    results['cases'][name] = result
    print(name, json.dumps(result), flush=True)
    (args.out / 'device.json').write_text(json.dumps(results, indent=1) + '\n')


if __name__ == '__main__':
  main()
