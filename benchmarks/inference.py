"""Inference beside the PyTorch peers on the same weights in the same run: how many times as fast.

    python benchmarks/inference.py [--only decode_b1,tokenize,unet] [--repeats 3] [--json FILE]

decode_*: LLaMA of 12 layers of width 768 and LaVIT's vocabulary, a prompt of 64 and 128 new tokens, greedy, float32, by
`inference.decode` and by transformers' `generate`: one row, eight rows, eight rows under classifier-free guidance (transformers reads
the unconditional rows in a second pass), and one row with our weights in eight bits beside theirs in float32. The float tokens must be
the same.
tokenize: eight pictures of 224 pixels to codes by the variant `small`, beside the published modules in plain PyTorch.
unet: ten guided DDIM steps of Stable Diffusion 1.5's U-Net on latents of 32 x 32 (256 pixels) under 256 condition rows, of which the
unconditional branch masks all but 77, beside diffusers; and what each takes of memory, in a process of its own.
Weights are random. PyTorch is eager, both sides use all cores and take turns; compilation is told apart. Numbers are medians.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import pathlib
import re
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from lavit_jax.inference import decode, diffusion, pipeline
from lavit_jax.models import lavit, vit
from lavit_jax.models.initial import initial_parts
from lavit_jax.models.int8 import quantize_weights
from lavit_jax.models.llama import Llama, unroll
from lavit_jax.models.noise import scaled_linear
from lavit_jax.porting import engine
from lavit_jax.porting.tables_language import llama_rows
from lavit_jax.porting.tables_pixels import unet_rows
from lavit_jax.porting.tables_visual import tokenizer_rows, vit_rows

LLAMA = Llama(vocab_size=48386, hidden_size=768, num_layers=12, num_heads=12, num_kv_heads=12, head_dim=64, mlp_dim=2048)
SMALL = lavit.build('small')
PROMPT, NEW, GUIDANCE = 64, 128, 4.0
DECODING = dict(decode_b1=dict(rows=1), decode_b8=dict(rows=8), decode_b8_cfg=dict(rows=8, guided=True), decode_b1_int8=dict(rows=1, int8=True))
PICTURES = 8
SIDE, STEPS, DRAWING_GUIDANCE, ROWS, NULL_ROWS = 32, 10, 5.0, 256, 77
CASES = (*DECODING, 'tokenize', 'unet')


def in_turn(ours: Callable[[], np.ndarray], theirs: Callable[[], np.ndarray], repeats: int) -> tuple[dict, np.ndarray, np.ndarray]:
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
  return dict(ratio=other / mine, seconds=mine, peer_seconds=other, compile_seconds=first - mine), a, b


# ------------------------------------------------------------------------------------------------------------- random weights

POOL = np.random.default_rng(0).standard_normal(1_000_003, np.float32)  # a prime: no two rows of a matrix are the same part of it


class Weights:
  """An array known by name and shape, made when it is asked for: numbers that depend on the name, of a size that keeps activations level."""

  dtype = np.dtype(np.float32)

  def __init__(self, name: str, shape: tuple[int, ...]):
    self.name, self.shape = name, shape

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    size = math.prod(self.shape)
    start = zlib.crc32(self.name.encode()) % len(POOL)
    values = np.resize(np.roll(POOL, -start)[:size], self.shape)
    if len(self.shape) > 1:
      return values / np.float32(math.sqrt(math.prod(self.shape[1:])))
    return values * np.float32(0.1) + np.float32(self.name.endswith('weight'))  # of a norm, or a bias


def random_weights(rows: list[engine.Row], part: str) -> tuple[dict, dict[str, Weights]]:
  """The shapes of a part of SMALL, and weights under PyTorch's names."""
  like = jax.eval_shape(functools.partial(initial_parts, SMALL, names=(part,)), jax.random.key(0))[part]
  return like, {name: Weights(name, shape) for name, shape in engine.torch_shapes(rows, like).items()}


def our_weights(rows: list[engine.Row], part: str) -> dict:
  like, state = random_weights(rows, part)
  return engine.from_torch(rows, state, like, lambda _, x: jnp.asarray(x))


def fill(module: nn.Module, rows: list[engine.Row], part: str, without: str = ' ') -> nn.Module:
  """Gives a module on the meta device the weights of a part, but for the names that match `without`."""
  state = {name: torch.from_numpy(np.asarray(x)) for name, x in random_weights(rows, part)[1].items() if not re.match(without, name)}
  module.load_state_dict(state, assign=True)
  return module.eval()


# ------------------------------------------------------------------------------------------------------------------- decoding

@functools.cache
def llama_and_peer() -> tuple[dict, transformers.LlamaForCausalLM]:
  """Random weights, wide enough apart that no two logits tie, as ours (unrolled) and as transformers'."""
  example = jnp.zeros((1, 2, LLAMA.hidden_size)), jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 1, 2, 2), bool)
  params = jax.jit(LLAMA.init)(jax.random.key(0), *example)['params']
  params['embedding'] = params['embedding'] * 50
  params['head'] = params['head'] * 10
  config = transformers.LlamaConfig(
      vocab_size=LLAMA.vocab_size, hidden_size=LLAMA.hidden_size, intermediate_size=LLAMA.mlp_dim, num_hidden_layers=LLAMA.num_layers,
      num_attention_heads=LLAMA.num_heads, rms_norm_eps=LLAMA.rms_norm_eps)
  with torch.device('meta'):
    peer = transformers.LlamaForCausalLM(config)
  peer = peer.to_empty(device='cpu')
  state = {name: torch.from_numpy(np.array(value)) for name, value in engine.to_torch(llama_rows(), params).items()}
  peer.load_state_dict(state, assign=True)
  peer.model.rotary_emb = type(peer.model.rotary_emb)(config=config)  # its frequencies are no parameters
  peer.generation_config = transformers.GenerationConfig(do_sample=False, max_new_tokens=NEW, pad_token_id=2)
  return unroll(LLAMA, params)[1], peer.eval()


def decoding(repeats: int, rows: int, guided: bool = False, int8: bool = False) -> dict:
  params, peer = llama_and_peer()
  ids, against = np.random.default_rng(rows).integers(3, LLAMA.vocab_size, (2, rows, PROMPT))
  embed = functools.partial(LLAMA.apply, {'params': params}, method='embed')
  settings, theirs = dict(max_new_tokens=NEW, eos_id=-1), dict()
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
      return peer.generate(tokens, attention_mask=torch.ones_like(tokens), **theirs)[:, PROMPT:].numpy()

  result, a, b = in_turn(ours, transformers_generate, repeats)
  if not int8:
    np.testing.assert_array_equal(a, b)
  tokens = rows * NEW
  return result | dict(tokens_per_second=tokens / result['seconds'], peer_tokens_per_second=tokens / result['peer_seconds'],
                       same=float((a == b).mean()))


# ---------------------------------------------------------------------------------------- pictures to codes, in plain PyTorch

class Attention(nn.Module):
  """Attention by softmax, or under a 0/1 policy by the masked softmax of REFERENCE section 2; of x to itself (`fused`), or to a memory."""

  def __init__(self, width: int, num_heads: int, fused: bool, key_bias: bool = True):
    super().__init__()
    self.num_heads = num_heads
    if fused:
      self.qkv = nn.Linear(width, 3 * width, bias=key_bias)
    else:
      self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
    if not key_bias:
      self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(width)) for _ in range(2))
    self.proj = nn.Linear(width, width)

  def forward(self, x, memory=None, policy=None):
    if memory is not None:
      qkv = self.query(x), self.key(memory), self.value(memory)
    elif hasattr(self, 'q_bias'):
      qkv = F.linear(x, self.qkv.weight, torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])).chunk(3, -1)
    else:
      qkv = self.qkv(x).chunk(3, -1)
    q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in qkv)
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
    if policy is None:
      a = scores.softmax(-1)
    else:
      a = (scores - scores.amax(-1, keepdim=True)).exp() * policy
      a = (a + 1e-6 / a.shape[-1]) / (a.sum(-1, keepdim=True) + 1e-6)
    return self.proj((a @ v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):

  def __init__(self, width: int, mlp_dim: int):
    super().__init__()
    self.fc1, self.fc2 = nn.Linear(width, mlp_dim), nn.Linear(mlp_dim, width)

  def forward(self, x):
    return self.fc2(F.gelu(self.fc1(x)))


class ViTBlock(nn.Module):

  def __init__(self, width: int, num_heads: int, mlp_dim: int):
    super().__init__()
    self.norm1, self.norm2 = (nn.LayerNorm(width, 1e-6) for _ in range(2))
    self.attn, self.mlp = Attention(width, num_heads, True, key_bias=False), Mlp(width, mlp_dim)

  def forward(self, x):
    x = x + self.attn(self.norm1(x))
    return x + self.mlp(self.norm2(x))


class ViT(nn.Module):

  def __init__(self, module: vit.ViT):
    super().__init__()
    width = module.hidden_size
    self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(3, width, module.patch_size, module.patch_size)))
    self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(1, 1 + module.num_patches, width))
    self.blocks = nn.Sequential(*(ViTBlock(width, module.num_heads, module.mlp_dim) for _ in range(module.num_layers)))

  def forward(self, pixels):
    x = self.patch_embed['proj'](pixels).flatten(2).transpose(1, 2)
    return self.blocks(torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed)[:, 1:]


class Selector(nn.Module):

  def __init__(self, width: int):
    super().__init__()
    self.in_conv = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
    self.out_conv = nn.Sequential(nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, width // 4), nn.GELU(),
                                  nn.Linear(width // 4, 2), nn.LogSoftmax(-1))

  def forward(self, x):
    local, context = self.in_conv(x).chunk(2, -1)
    return self.out_conv(torch.cat([local, context.mean(1, keepdim=True).expand_as(local)], -1))


class MergerBlock(nn.Module):

  def __init__(self, width: int, num_heads: int, mlp_dim: int):
    super().__init__()
    self.norm0, self.norm1, self.norm2 = (nn.LayerNorm(width) for _ in range(3))
    self.token_causal_attn, self.token_cross_attn = Attention(width, num_heads, True), Attention(width, num_heads, False)
    self.mlp = Mlp(width, mlp_dim)

  def forward(self, x, dropped, kept_policy, dropped_policy):
    x = x + self.token_causal_attn(self.norm0(x), policy=kept_policy)
    x = x + self.token_cross_attn(self.norm1(x), dropped, dropped_policy)
    return x + self.mlp(self.norm2(x))


class Merger(nn.Module):

  def __init__(self, width: int, num_layers: int, num_heads: int, mlp_dim: int):
    super().__init__()
    self.ln_vision, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
    self.blocks = nn.ModuleList(MergerBlock(width, num_heads, mlp_dim) for _ in range(num_layers))

  def forward(self, x, keep):
    dropped, tokens = self.ln_vision(x), x.shape[1]
    kept_policy = torch.ones(tokens, tokens).tril(-1) * keep[:, None, None] + torch.eye(tokens)
    for block in self.blocks:
      x = block(x, dropped, kept_policy, 1 - keep[:, None, None])
    return self.norm(x)


class Tokenizer(nn.Module):

  def __init__(self, module):
    super().__init__()
    width = module.hidden_size
    self.token_predictor = Selector(width)
    self.causal_encoder = Merger(width, module.num_layers, module.num_heads, module.mlp_dim)
    self.encode_task_layer = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, module.code_dim))
    self.quantize = nn.ModuleDict(dict(embedding=nn.Embedding(module.codebook_size, module.code_dim)))

  def forward(self, x):
    """Features [B, N, D] -> codes [B, N] and keep [B, N], deterministic: the round(sum p) most probable patches."""
    p = self.token_predictor(x)[..., 0].exp()
    keep = ((-p).argsort(stable=True).argsort() < p.sum(-1, keepdim=True).round()).float()
    z = F.normalize(self.encode_task_layer(self.causal_encoder(x, keep)), dim=-1).flatten(0, 1)
    codes = self.quantize['embedding'].weight
    distance = z.square().sum(-1, keepdim=True) + codes.square().sum(-1) - 2 * z @ codes.T
    return distance.argmin(-1).view(keep.shape), keep.bool()


def tokenizing(repeats: int) -> dict:
  images = np.random.default_rng(0).integers(0, 256, (PICTURES, SMALL.image_size, SMALL.image_size, 3), np.uint8)
  parts = dict(vit=our_weights(vit_rows(), 'vit'), tokenizer=our_weights(tokenizer_rows(), 'tokenizer'))
  with torch.device('meta'):
    encoder, tokenizer = ViT(SMALL.vit), Tokenizer(SMALL.tokenizer)
  encoder, tokenizer = fill(encoder, vit_rows(), 'vit', r'(norm|head)\.'), fill(tokenizer, tokenizer_rows(), 'tokenizer')

  def ours():
    return jax.block_until_ready(pipeline.tokenize(SMALL, parts, jnp.asarray(images), None))

  def theirs():
    with torch.no_grad():
      pixels = (torch.from_numpy(images).float() / 255 - torch.tensor(vit.MEAN)) / torch.tensor(vit.STD)
      return tokenizer(encoder(pixels.permute(0, 3, 1, 2)))

  result, *found = in_turn(ours, theirs, repeats)
  (ids, keep), (peer_ids, peer_keep) = ([np.asarray(x) for x in pair] for pair in found)
  return result | dict(
      images_per_second=PICTURES / result['seconds'], peer_images_per_second=PICTURES / result['peer_seconds'],
      kept=float(keep.mean()), same_keep=float((keep == peer_keep).mean()), same=float((ids == peer_ids)[keep & peer_keep].mean()))


# ------------------------------------------------------------------------------------------------------------- noise to latents

def drawing_inputs() -> tuple[np.ndarray, tuple, tuple]:
  """Noise [1, h, w, 4]; context [1, M, E] and its mask [1, M], with a condition and without."""
  rng = np.random.default_rng(0)
  context, null = rng.standard_normal((2, 1, ROWS, SMALL.unet.cross_attention_dim), np.float32)
  noise = rng.standard_normal((1, SIDE, SIDE, SMALL.unet.in_channels), np.float32)
  return noise, (context, np.ones((1, ROWS), bool)), (null, np.arange(ROWS)[None] < NULL_ROWS)


def our_drawing() -> Callable[[], np.ndarray]:
  params = our_weights(unet_rows(SMALL.unet), 'unet')

  @jax.jit
  def draw(params, noise, condition, null):
    return diffusion.sample(functools.partial(SMALL.unet.apply, {'params': params}), noise, condition, null, steps=STEPS,
                            guidance_scale=DRAWING_GUIDANCE, schedule=scaled_linear())

  return lambda: np.asarray(draw(params, *drawing_inputs()))


def their_drawing() -> Callable[[], np.ndarray]:
  module = SMALL.unet
  with torch.device('meta'):
    unet = diffusers.UNet2DConditionModel(block_out_channels=module.block_out_channels, cross_attention_dim=module.cross_attention_dim)
  fill(unet, unet_rows(module), 'unet')
  scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear', steps_offset=1, clip_sample=False,
                                      set_alpha_to_one=False)

  def draw():
    noise, *branches = drawing_inputs()
    context, mask = (torch.from_numpy(np.concatenate(both)) for both in zip(*branches))
    x = torch.from_numpy(noise).permute(0, 3, 1, 2).contiguous()
    scheduler.set_timesteps(STEPS)
    with torch.no_grad():
      for t in scheduler.timesteps:
        given, null = unet(torch.cat([x, x]), t, encoder_hidden_states=context, encoder_attention_mask=mask).sample.chunk(2)
        x = scheduler.step(null + DRAWING_GUIDANCE * (given - null), t, x).prev_sample
    return x.permute(0, 2, 3, 1).numpy()

  return draw


SIDES = dict(ours=our_drawing, theirs=their_drawing)


def peak_gb(side: str) -> float:
  """What a process that only draws by one side takes of memory at most, in 1e9 bytes: weights, libraries and compilation too."""
  return float(subprocess.run([sys.executable, __file__, '--one', side], check=True, stdout=subprocess.PIPE, text=True).stdout)


def drawing(repeats: int) -> dict:
  peaks = {side: peak_gb(side) for side in SIDES}
  result, a, b = in_turn(our_drawing(), their_drawing(), repeats)
  return result | dict(max_difference=float(np.abs(a - b).max()), deviation=float(b.std()), unet_peak_gb=peaks)


def run(name: str, repeats: int) -> dict:
  if name in DECODING:
    return decoding(repeats, **DECODING[name])
  return dict(tokenize=tokenizing, unet=drawing)[name](repeats)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--only', default=','.join(CASES), help='cases, with commas between: ' + ', '.join(CASES))
  parser.add_argument('--repeats', type=int, default=3)
  parser.add_argument('--json', type=pathlib.Path)
  parser.add_argument('--one', choices=SIDES, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.one:
    SIDES[args.one]()()
    print(int(re.search(r'VmHWM:\s+(\d+)', pathlib.Path('/proc/self/status').read_text())[1]) * 1024 / 1e9)  # ru_maxrss has the parent's
    return
  result = {}
  for name in args.only.split(','):
    result[name] = run(name, args.repeats)
    print(name, json.dumps(jax.tree.map(lambda value: round(value, 6), result[name])), flush=True)
  if args.json:
    args.json.write_text(json.dumps(result) + '\n')


if __name__ == '__main__':
  main()
