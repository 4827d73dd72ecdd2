"""Inference beside PyTorch on the same weights in the same run: how many times as fast.

    python benchmarks/inference.py [--only decode_b1,tokenize,unet] [--repeats 3] [--json [FILE]]

decode_*: a LLaMA with 12 layers of width 768 and LaVIT's vocabulary, a prompt of 64 tokens and 128
    new ones, greedy, float32, by `inference.decode` and by transformers' `generate`: one row, eight
    rows, eight rows with classifier-free guidance (transformers computes the unconditional rows in
    a second pass), and one row with our weights in int8 and theirs in float32. The tokens must be
    the same where both have float weights.
tokenize: eight images of 224 pixels to codes by the variant `small`, beside the published modules
    in plain PyTorch.
unet: ten guided DDIM steps of Stable Diffusion 1.5's U-Net on latents of 32 x 32 (256 pixels) with
    256 condition rows, of which the unconditional branch masks all but 77, beside diffusers; and
    the peak memory of each, in a process of its own.

The weights are random. PyTorch is eager. Both sides use all cores, and run in turn. Compilation is
reported separately. Numbers are medians.

Each case prints a line when it is measured. With --json the last line is one object with all ratios
(our speed over theirs), such as {"decode_b1": 2.3, ...}.
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
from typing import Any, NamedTuple

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
PROMPT = 64  # tokens
NEW = 128
GUIDANCE = 4.0
PICTURES = 8
# Not ru_maxrss, which starts at that of the parent process.
PEAK = r"""
import pathlib, re, {module}
{module}.drawing()()
status = pathlib.Path('/proc/self/status').read_text()
print(int(re.search(r'VmHWM:\s+(\d+)', status)[1]) * 1024 / 1e9)
"""


class Comparison(NamedTuple):
  """Two functions that compute the same.

  Attributes:
    times: the ratio of speeds, the medians in seconds, and the seconds of compilation.
    ours: what our function returned.
    theirs: what the other one returned.
  """

  times: dict[str, float]
  ours: Any
  theirs: Any


def compare(ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int) -> Comparison:
  """Times two functions in turn, after a first call of each."""
  start = time.monotonic()
  our_output = ours()
  first_seconds = time.monotonic() - start
  their_output = theirs()
  our_times = []
  their_times = []
  for _ in range(repeats):
    our_times.append(_seconds(ours))
    their_times.append(_seconds(theirs))
  our_median = statistics.median(our_times)
  their_median = statistics.median(their_times)
  times = {
    'ratio': their_median / our_median,
    'seconds': our_median,
    'peer_seconds': their_median,
    'compile_seconds': first_seconds - our_median,
  }
  return Comparison(times, our_output, their_output)


def _seconds(function: Callable[[], Any]) -> float:
  start = time.monotonic()
  function()
  return time.monotonic() - start


@functools.cache
def llama_and_peer() -> tuple[dict, transformers.LlamaForCausalLM]:
  """The parameters of our (unrolled) model, and a model of transformers with the same weights.

  The random weights are scaled up so that no two logits tie.
  """
  ids = jnp.zeros((1, 2), jnp.int32)
  embeddings = jnp.zeros((1, 2, LLAMA.hidden_size))
  mask = jnp.ones((1, 1, 2, 2), bool)
  params = jax.jit(LLAMA.init)(jax.random.key(0), embeddings, ids, mask)['params']
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
  peer = peer.to_empty(device=peers.DEVICE)
  arrays = mapping.to_torch(llama_rules(), params)
  state = {
    name: torch.from_numpy(np.array(value)).to(peers.DEVICE) for name, value in arrays.items()
  }
  peer.load_state_dict(state, assign=True)
  # The frequencies are not in the state dict.
  peer.model.rotary_emb = type(peer.model.rotary_emb)(config=config).to(peers.DEVICE)
  peer.generation_config = transformers.GenerationConfig(
    do_sample=False, max_new_tokens=NEW, pad_token_id=2
  )
  return unroll_layers(LLAMA, params)[1], peer.eval()


def compare_decoding(repeats: int, rows: int, guided: bool = False, int8: bool = False) -> dict:
  """Greedy decoding of `rows` prompts."""
  params, peer = llama_and_peer()
  rng = np.random.default_rng(rows)
  ids, negative_ids = rng.integers(3, LLAMA.vocab_size, (2, rows, PROMPT))
  embed = functools.partial(LLAMA.apply, {'params': params}, method='embed')
  mask = jnp.ones((rows, PROMPT), bool)
  our_options = {'max_new_tokens': NEW, 'eos_id': -1}
  peer_options = {}
  if guided:
    our_options |= {
      'guidance_scale': GUIDANCE,
      'uncond_embeddings': embed(negative_ids),
      'uncond_mask': mask,
    }
    peer_options = {
      'guidance_scale': GUIDANCE,
      'negative_prompt_ids': torch.from_numpy(negative_ids).to(peers.DEVICE),
    }
  if int8:
    params = jax.jit(quantize_weights)(params)

  def ours():
    return np.asarray(decode.generate(LLAMA, params, embed(ids), mask, **our_options).ids)

  def theirs():
    tokens = torch.from_numpy(ids).to(peers.DEVICE)
    with torch.inference_mode():
      output = peer.generate(tokens, attention_mask=torch.ones_like(tokens), **peer_options)
    return output[:, PROMPT:].cpu().numpy()

  result = compare(ours, theirs, repeats)
  if not int8 and peers.DEVICE == 'cpu':
    np.testing.assert_array_equal(result.ours, result.theirs)
  num_tokens = rows * NEW
  return result.times | {
    'tokens_per_second': num_tokens / result.times['seconds'],
    'peer_tokens_per_second': num_tokens / result.times['peer_seconds'],
    'same': float((result.ours == result.theirs).mean()),
  }


def compare_tokenizing(repeats: int) -> dict:
  """Images to codes."""
  small = jax_side.SMALL
  shape = (PICTURES, small.image_size, small.image_size, 3)
  images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
  result = compare(
    jax_side.tokenizing(images), peers.tokenizing(small.vit, small.tokenizer, images), repeats
  )
  ids, keep = result.ours
  peer_ids, peer_keep = result.theirs
  return result.times | {
    'images_per_second': PICTURES / result.times['seconds'],
    'peer_images_per_second': PICTURES / result.times['peer_seconds'],
    'kept': float(keep.mean()),
    'same_keep': float((keep == peer_keep).mean()),
    'same': float((ids == peer_ids)[keep & peer_keep].mean()),
  }


def compare_drawing(repeats: int) -> dict:
  """U-Net steps."""
  peaks = {'ours': peak_gb('ours'), 'theirs': peak_gb('peers')}
  result = compare(jax_side.drawing(), peers.drawing(), repeats)
  return result.times | {
    'max_difference': float(np.abs(result.ours - result.theirs).max()),
    'deviation': float(result.theirs.std()),
    'unet_peak_gb': peaks,
  }


def peak_gb(module: str) -> float:
  """Peak memory of a process that runs the U-Net of one side, in 1e9 bytes.

  Libraries, weights and compilation are included.
  """
  process = subprocess.run(
    [sys.executable, '-c', PEAK.format(module=module)],
    check=True,
    stdout=subprocess.PIPE,
    text=True,
    env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)},
  )
  return float(process.stdout)


CASES = {
  'decode_b1': functools.partial(compare_decoding, rows=1),
  'decode_b8': functools.partial(compare_decoding, rows=8),
  'decode_b8_cfg': functools.partial(compare_decoding, rows=8, guided=True),
  'decode_b1_int8': functools.partial(compare_decoding, rows=1, int8=True),
  'tokenize': compare_tokenizing,
  'unet': compare_drawing,
}


def main() -> None:
  """Measures cases and prints them."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--only', default=','.join(CASES), help='cases, separated by commas: ' + ', '.join(CASES)
  )
  parser.add_argument('--repeats', type=int, default=3)
  parser.add_argument(
    '--json',
    nargs='?',
    const='',
    metavar='FILE',
    help='print the ratios on the last line; write all numbers to FILE',
  )
  args = parser.parse_args()
  results = {}
  for name in args.only.split(','):
    results[name] = CASES[name](args.repeats)
    rounded = jax.tree.map(lambda value: round(value, 6), results[name])
    print(name, json.dumps(rounded), flush=True)
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(results) + '\n')
  if args.json is not None:
    print(json.dumps({name: result['ratio'] for name, result in results.items()}))


if __name__ == '__main__':
  main()
