"""The PyTorch side of inference.py, in plain eager PyTorch. No JAX here.

Diffusers' U-Net with DDIM, and LaVIT's tokenizer as published.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from weights import DRAWING_GUIDANCE, STEPS, Weights, drawing_inputs

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
DEVICE = 'cpu'  # of what tokenizes and decodes


def fill(module: nn.Module) -> nn.Module:
  """Gives a module on the meta device the weights of its tensors' names, on DEVICE."""
  state = {}
  for name, tensor in module.state_dict().items():
    state[name] = torch.from_numpy(np.asarray(Weights(name, tuple(tensor.shape)))).to(DEVICE)
  module.load_state_dict(state, assign=True)
  return module.eval()


def drawing() -> Callable[[], np.ndarray]:
  """A function that makes ten guided steps; returns latents f32[1, h, w, 4].

  The U-Net of Stable Diffusion 1.5 has diffusers' default sizes, except for the condition's width.
  """
  import diffusers  # a machine that only tokenizes may lack it

  with torch.device('meta'):
    unet = diffusers.UNet2DConditionModel(cross_attention_dim=768)
  fill(unet)
  scheduler = diffusers.DDIMScheduler(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule='scaled_linear',
    steps_offset=1,
    clip_sample=False,
    set_alpha_to_one=False,
  )

  def draw():
    noise, conditional, unconditional = drawing_inputs()
    context, mask = (
      torch.from_numpy(np.concatenate(pair)) for pair in zip(conditional, unconditional)
    )
    x = torch.from_numpy(noise).permute(0, 3, 1, 2).contiguous()
    scheduler.set_timesteps(STEPS)
    with torch.no_grad():
      for t in scheduler.timesteps:
        output = unet(
          torch.cat([x, x]), t, encoder_hidden_states=context, encoder_attention_mask=mask
        )
        conditional_noise, null_noise = output.sample.chunk(2)
        guided_noise = null_noise + DRAWING_GUIDANCE * (conditional_noise - null_noise)
        x = scheduler.step(guided_noise, t, x).prev_sample
    return x.permute(0, 2, 3, 1).numpy()

  return draw


def tokenizing(
  encoder_sizes, tokenizer_sizes, images: np.ndarray
) -> Callable[[], list[np.ndarray]]:
  """A function that tokenizes images uint8[B, H, W, 3] with the most probable patches.

  It returns codes i64[B, N] and keep bool[B, N]. The sizes are those of our modules' fields.
  """
  with torch.device('meta'):
    encoder = ViT(encoder_sizes)
    tokenizer = Tokenizer(tokenizer_sizes)
  fill(encoder)
  fill(tokenizer)

  def tokenize():
    with torch.no_grad(), torch.device(DEVICE):
      pixels = torch.from_numpy(images).to(DEVICE).float() / 255
      pixels = (pixels - torch.tensor(MEAN)) / torch.tensor(STD)
      return [x.cpu().numpy() for x in tokenizer(encoder(pixels.permute(0, 3, 1, 2)))]

  return tokenize


class Attention(nn.Module):
  """Self-attention with one projection (`fused`), or attention to a memory.

  With a 0/1 policy it is the masked softmax of specification, Merger.
  """

  def __init__(self, width: int, num_heads: int, fused: bool, key_bias: bool = True):
    super().__init__()
    self.num_heads = num_heads
    if fused:
      self.qkv = nn.Linear(width, 3 * width, bias=key_bias)
    else:
      self.query = nn.Linear(width, width)
      self.key = nn.Linear(width, width)
      self.value = nn.Linear(width, width)
    if not key_bias:
      self.q_bias = nn.Parameter(torch.zeros(width))
      self.v_bias = nn.Parameter(torch.zeros(width))
    self.proj = nn.Linear(width, width)

  def forward(self, x, memory=None, policy=None):
    q, k, v = (
      y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in self._project(x, memory)
    )
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
    if policy is None:
      weights = scores.softmax(-1)
    else:
      weights = (scores - scores.amax(-1, keepdim=True)).exp() * policy
      weights = (weights + 1e-6 / weights.shape[-1]) / (weights.sum(-1, keepdim=True) + 1e-6)
    return self.proj((weights @ v).transpose(1, 2).flatten(2))

  def _project(self, x, memory):
    if memory is not None:
      return self.query(x), self.key(memory), self.value(memory)
    if hasattr(self, 'q_bias'):
      bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
      return F.linear(x, self.qkv.weight, bias).chunk(3, -1)
    return self.qkv(x).chunk(3, -1)


class Mlp(nn.Module):
  def __init__(self, width: int, mlp_dim: int):
    super().__init__()
    self.fc1 = nn.Linear(width, mlp_dim)
    self.fc2 = nn.Linear(mlp_dim, width)

  def forward(self, x):
    return self.fc2(F.gelu(self.fc1(x)))


class ViTBlock(nn.Module):
  def __init__(self, width: int, num_heads: int, mlp_dim: int):
    super().__init__()
    self.norm1 = nn.LayerNorm(width, 1e-6)
    self.norm2 = nn.LayerNorm(width, 1e-6)
    self.attn = Attention(width, num_heads, True, key_bias=False)
    self.mlp = Mlp(width, mlp_dim)

  def forward(self, x):
    x = x + self.attn(self.norm1(x))
    return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
  def __init__(self, sizes):
    super().__init__()
    width = sizes.hidden_size
    projection = nn.Conv2d(3, width, sizes.patch_size, sizes.patch_size)
    self.patch_embed = nn.ModuleDict({'proj': projection})
    self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
    self.pos_embed = nn.Parameter(torch.zeros(1, 1 + sizes.num_patches, width))
    blocks = [ViTBlock(width, sizes.num_heads, sizes.mlp_dim) for _ in range(sizes.num_layers)]
    self.blocks = nn.Sequential(*blocks)

  def forward(self, pixels):
    x = self.patch_embed['proj'](pixels).flatten(2).transpose(1, 2)
    x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
    return self.blocks(x + self.pos_embed)[:, 1:]


class Selector(nn.Module):
  def __init__(self, width: int):
    super().__init__()
    self.in_conv = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
    self.out_conv = nn.Sequential(
      nn.Linear(width, width // 2),
      nn.GELU(),
      nn.Linear(width // 2, width // 4),
      nn.GELU(),
      nn.Linear(width // 4, 2),
      nn.LogSoftmax(-1),
    )

  def forward(self, x):
    local, context = self.in_conv(x).chunk(2, -1)
    return self.out_conv(torch.cat([local, context.mean(1, keepdim=True).expand_as(local)], -1))


class MergerBlock(nn.Module):
  def __init__(self, width: int, num_heads: int, mlp_dim: int):
    super().__init__()
    self.norm0 = nn.LayerNorm(width)
    self.norm1 = nn.LayerNorm(width)
    self.norm2 = nn.LayerNorm(width)
    self.token_causal_attn = Attention(width, num_heads, True)
    self.token_cross_attn = Attention(width, num_heads, False)
    self.mlp = Mlp(width, mlp_dim)

  def forward(self, x, dropped, kept_policy, dropped_policy):
    x = x + self.token_causal_attn(self.norm0(x), policy=kept_policy)
    x = x + self.token_cross_attn(self.norm1(x), dropped, dropped_policy)
    return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
  def __init__(self, width: int, num_layers: int, num_heads: int, mlp_dim: int):
    super().__init__()
    self.ln_vision = nn.LayerNorm(width)
    self.norm = nn.LayerNorm(width)
    self.blocks = nn.ModuleList(MergerBlock(width, num_heads, mlp_dim) for _ in range(num_layers))

  def forward(self, x, keep):
    dropped = self.ln_vision(x)
    num_patches = x.shape[1]
    earlier = torch.ones(num_patches, num_patches).tril(-1)
    kept_policy = earlier * keep[:, None, None] + torch.eye(num_patches)
    for block in self.blocks:
      x = block(x, dropped, kept_policy, 1 - keep[:, None, None])
    return self.norm(x)


class Tokenizer(nn.Module):
  def __init__(self, sizes):
    super().__init__()
    width = sizes.hidden_size
    self.token_predictor = Selector(width)
    self.causal_encoder = Merger(width, sizes.num_layers, sizes.num_heads, sizes.mlp_dim)
    self.encode_task_layer = nn.Sequential(
      nn.Linear(width, width), nn.Tanh(), nn.Linear(width, sizes.code_dim)
    )
    self.quantize = nn.ModuleDict({'embedding': nn.Embedding(sizes.codebook_size, sizes.code_dim)})

  def forward(self, x):
    """Features [B, N, D] -> codes [B, N], keep [B, N]: the round(sum p) most probable patches."""
    p = self.token_predictor(x)[..., 0].exp()
    rank = (-p).argsort(stable=True).argsort()
    keep = (rank < p.sum(-1, keepdim=True).round()).float()
    z = F.normalize(self.encode_task_layer(self.causal_encoder(x, keep)), dim=-1).flatten(0, 1)
    codes = self.quantize['embedding'].weight
    distance = z.square().sum(-1, keepdim=True) + codes.square().sum(-1) - 2 * z @ codes.T
    return distance.argmin(-1).view(keep.shape), keep.bool()
