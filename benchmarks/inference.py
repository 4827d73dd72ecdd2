"""Inference beside the PyTorch peers on the same weights in the same run: how many times as fast.

    python benchmarks/inference.py [--only decode_b1,tokenize,unet] [--repeats 3] [--json [FILE]]

decode_*: LLaMA of 12 layers of width 768 and LaVIT's vocabulary, a prompt of 64 and 128 new tokens, greedy, float32, by
`inference.decode` and by transformers' `generate`: one row, eight rows, eight rows under classifier-free guidance (transformers reads
the unconditional rows in a second pass), and one row with our weights in eight bits beside theirs in float32. The float tokens must be
the same.
tokenize: eight pictures of 224 pixels to codes by the variant `small`, beside the published modules in plain PyTorch.
unet: ten guided DDIM steps of Stable Diffusion 1.5's U-Net on latents of 32 x 32 (256 pixels) under 256 condition rows, of which the
unconditional branch masks all but 77, beside diffusers; and what each takes of memory, in a process of its own.
Weights are random. PyTorch is eager, both sides use all cores and take turns; compilation is told apart. Numbers are medians.

A line a case, as it is measured. With --json the last line is one object of all ratios (ours over theirs, of speed), {"decode_b1": 2.3, ...}.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import ours as jax_side
import peers
import torch
import transformers

from lavit_jax.inference import decode
from lavit_jax.models.int8 import quantize_weights
from lavit_jax.models.llama import Llama, unroll_layers
from lavit_jax.weights.torch import mapping
from lavit_jax.weights.torch.names_llama import llama_rules

LLAMA = Llama(
  vocab_size=48386,
  hidden_size=768,
  num_layers=12,
  num_heads=12,
  num_kv_heads=12,
  head_dim=64,
  mlp_dim=2048,
)
PROMPT, NEW, GUIDANCE = 64, 128, 4.0
DECODING = dict(
  decode_b1=dict(rows=1),
  decode_b8=dict(rows=8),
  decode_b8_cfg=dict(rows=8, guided=True),
  decode_b1_int8=dict(rows=1, int8=True),
)
PICTURES = 8
PEAK = r"""
import pathlib, re, {module}
{module}.drawing()()
print(int(re.search(r'VmHWM:\s+(\d+)', pathlib.Path('/proc/self/status').read_text())[1]) * 1024 / 1e9)
"""  # not ru_maxrss, which begins with that of the parent


def in_turn(
  ours: Callable[[], np.ndarray], theirs: Callable[[], np.ndarray], repeats: int
) -> tuple[dict, np.ndarray, np.ndarray]:
  """Times of two functions that return the same arrays, after a first call of each; and what they returned."""
  start = time.monotonic()
  a = ours()
  first = time.monotonic() - start
  b, seconds = theirs(), {ours: [], theirs: []}
  for _ in range(repeats):
    for side, times in seconds.items():
      start = time.monotonic()
      side()
      times.append(time.monotonic() - start)
  mine, other = (statistics.median(times) for times in seconds.values())
  return (
    dict(ratio=other / mine, seconds=mine, peer_seconds=other, compile_seconds=first - mine),
    a,
    b,
  )


@functools.cache
def llama_and_peer() -> tuple[dict, transformers.LlamaForCausalLM]:
  """Random weights, wide enough apart that no two logits tie, as ours (unrolled) and as transformers'."""
  example = (
    jnp.zeros((1, 2, LLAMA.hidden_size)),
    jnp.zeros((1, 2), jnp.int32),
    jnp.ones((1, 1, 2, 2), bool),
  )
  params = jax.jit(LLAMA.init)(jax.random.key(0), *example)['params']
  params['embedding'] = params['embedding'] * 50
  params['head'] = params['head'] * 10
  config = transformers.LlamaConfig(
    vocab_size=LLAMA.vocab_size,
    hidden_size=LLAMA.hidden_size,
    intermediate_size=LLAMA.mlp_dim,
    num_hidden_layers=LLAMA.num_layers,
    num_attention_heads=LLAMA.num_heads,
    rms_norm_eps=LLAMA.rms_norm_eps,
  )
  with torch.device('meta'):
    peer = transformers.LlamaForCausalLM(config)
  peer = peer.to_empty(device='cpu')
  state = {
    name: torch.from_numpy(np.array(value))
    for name, value in mapping.to_torch(llama_rules(), params).items()
  }
  peer.load_state_dict(state, assign=True)
  peer.model.rotary_emb = type(peer.model.rotary_emb)(
    config=config
  )  # its frequencies are no parameters
  peer.generation_config = transformers.GenerationConfig(
    do_sample=False, max_new_tokens=NEW, pad_token_id=2
  )
  return unroll_layers(LLAMA, params)[1], peer.eval()


def decoding(repeats: int, rows: int, guided: bool = False, int8: bool = False) -> dict:
  params, peer = llama_and_peer()
  ids, against = np.random.default_rng(rows).integers(3, LLAMA.vocab_size, (2, rows, PROMPT))
  embed = functools.partial(LLAMA.apply, {'params': params}, method='embed')
  settings, theirs = dict(max_new_tokens=NEW, eos_id=-1), {}
  mask = jnp.ones((rows, PROMPT), bool)
  if guided:
    settings |= dict(guidance_scale=GUIDANCE, uncond_embeddings=embed(against), uncond_mask=mask)
    theirs = dict(guidance_scale=GUIDANCE, negative_prompt_ids=torch.from_numpy(against))
  if int8:
    params = jax.jit(quantize_weights)(params)

  def ours():
    return np.asarray(decode.generate(LLAMA, params, embed(ids), mask, **settings).ids)

  def transformers_generate():
    tokens = torch.from_numpy(ids)
    with torch.inference_mode():
      return peer.generate(tokens, attention_mask=torch.ones_like(tokens), **theirs)[
        :, PROMPT:
      ].numpy()

  result, a, b = in_turn(ours, transformers_generate, repeats)
  if not int8:
    np.testing.assert_array_equal(a, b)
  tokens = rows * NEW
  return result | dict(
    tokens_per_second=tokens / result['seconds'],
    peer_tokens_per_second=tokens / result['peer_seconds'],
    same=float((a == b).mean()),
  )


def tokenizing(repeats: int) -> dict:
  side = jax_side.SMALL.image_size
  images = np.random.default_rng(0).integers(0, 256, (PICTURES, side, side, 3), np.uint8)
  result, (ids, keep), (peer_ids, peer_keep) = in_turn(
    jax_side.tokenizing(images),
    peers.tokenizing(jax_side.SMALL.vit, jax_side.SMALL.tokenizer, images),
    repeats,
  )
  return result | dict(
    images_per_second=PICTURES / result['seconds'],
    peer_images_per_second=PICTURES / result['peer_seconds'],
    kept=float(keep.mean()),
    same_keep=float((keep == peer_keep).mean()),
    same=float((ids == peer_ids)[keep & peer_keep].mean()),
  )


def peak_gb(module: str) -> float:
  """What a process that only draws by one side takes of memory at most, in 1e9 bytes: libraries, weights and compilation too."""
  run = subprocess.run(
    [sys.executable, '-c', PEAK.format(module=module)],
    check=True,
    stdout=subprocess.PIPE,
    text=True,
    env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)},
  )
  return float(run.stdout)


def drawing(repeats: int) -> dict:
  peaks = dict(ours=peak_gb('ours'), theirs=peak_gb('peers'))
  result, a, b = in_turn(jax_side.drawing(), peers.drawing(), repeats)
  return result | dict(
    max_difference=float(np.abs(a - b).max()), deviation=float(b.std()), unet_peak_gb=peaks
  )


CASES = {name: functools.partial(decoding, **case) for name, case in DECODING.items()} | dict(
  tokenize=tokenizing, unet=drawing
)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--only', default=','.join(CASES), help='cases, with commas between: ' + ', '.join(CASES)
  )
  parser.add_argument('--repeats', type=int, default=3)
  parser.add_argument(
    '--json',
    nargs='?',
    const='',
    metavar='FILE',
    help='end with a line of the ratios; FILE gets everything',
  )
  args = parser.parse_args()
  result = {}
  for name in args.only.split(','):
    result[name] = CASES[name](args.repeats)
    print(name, json.dumps(jax.tree.map(lambda value: round(value, 6), result[name])), flush=True)
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(result) + '\n')
  if args.json is not None:
    print(json.dumps({name: case['ratio'] for name, case in result.items()}))


if __name__ == '__main__':
  main()
