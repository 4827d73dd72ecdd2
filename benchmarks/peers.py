"""The PyTorch side of inference.py: diffusers' U-Net under DDIM, and LaVIT's tokenizer as published, in plain eager PyTorch. No JAX here."""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from weights import DRAWING_GUIDANCE, STEPS, Weights, drawing_inputs

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def fill(module: nn.Module) -> nn.Module:
  """Gives a module on the meta device the weights of its names."""
  state = {
    name: torch.from_numpy(np.asarray(Weights(name, tuple(x.shape))))
    for name, x in module.state_dict().items()
  }
  module.load_state_dict(state, assign=True)
  return module.eval()


def drawing() -> Callable[[], np.ndarray]:
  """Stable Diffusion 1.5's U-Net, whose sizes are diffusers' defaults but for the condition's width; -> latents [1, h, w, 4]."""
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
    noise, *branches = drawing_inputs()
    context, mask = (torch.from_numpy(np.concatenate(both)) for both in zip(*branches))
    x = torch.from_numpy(noise).permute(0, 3, 1, 2).contiguous()
    scheduler.set_timesteps(STEPS)
    with torch.no_grad():
      for t in scheduler.timesteps:
        given, null = unet(
          torch.cat([x, x]), t, encoder_hidden_states=context, encoder_attention_mask=mask
        ).sample.chunk(2)
        x = scheduler.step(null + DRAWING_GUIDANCE * (given - null), t, x).prev_sample
    return x.permute(0, 2, 3, 1).numpy()

  return draw


def tokenizing(
  encoder_sizes, tokenizer_sizes, images: np.ndarray
) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
  """Images uint8[B, H, W, 3] to codes [B, N] and keep [B, N], by modules of the sizes that ours have as fields."""
  with torch.device('meta'):
    encoder, tokenizer = ViT(encoder_sizes), Tokenizer(tokenizer_sizes)
  fill(encoder), fill(tokenizer)

  def tokenize():
    with torch.no_grad():
      pixels = (torch.from_numpy(images).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
      return [x.numpy() for x in tokenizer(encoder(pixels.permute(0, 3, 1, 2)))]

  return tokenize


class Attention(nn.Module):
  """Attention by softmax, or under a 0/1 policy by the masked softmax of specification, Merger; of x to itself (`fused`), or to a memory."""

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
      qkv = F.linear(
        x, self.qkv.weight, torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
      ).chunk(3, -1)
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
  def __init__(self, sizes):
    super().__init__()
    width = sizes.hidden_size
    self.patch_embed = nn.ModuleDict(
      dict(proj=nn.Conv2d(3, width, sizes.patch_size, sizes.patch_size))
    )
    self.cls_token, self.pos_embed = (
      nn.Parameter(torch.zeros(1, 1, width)),
      nn.Parameter(torch.zeros(1, 1 + sizes.num_patches, width)),
    )
    self.blocks = nn.Sequential(
      *(ViTBlock(width, sizes.num_heads, sizes.mlp_dim) for _ in range(sizes.num_layers))
    )

  def forward(self, pixels):
    x = self.patch_embed['proj'](pixels).flatten(2).transpose(1, 2)
    return self.blocks(torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed)[
      :, 1:
    ]


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
    self.norm0, self.norm1, self.norm2 = (nn.LayerNorm(width) for _ in range(3))
    self.token_causal_attn, self.token_cross_attn = (
      Attention(width, num_heads, True),
      Attention(width, num_heads, False),
    )
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
  def __init__(self, sizes):
    super().__init__()
    width = sizes.hidden_size
    self.token_predictor = Selector(width)
    self.causal_encoder = Merger(width, sizes.num_layers, sizes.num_heads, sizes.mlp_dim)
    self.encode_task_layer = nn.Sequential(
      nn.Linear(width, width), nn.Tanh(), nn.Linear(width, sizes.code_dim)
    )
    self.quantize = nn.ModuleDict(dict(embedding=nn.Embedding(sizes.codebook_size, sizes.code_dim)))

  def forward(self, x):
    """Features [B, N, D] -> codes [B, N] and keep [B, N], deterministic: the round(sum p) most probable patches."""
    p = self.token_predictor(x)[..., 0].exp()
    keep = ((-p).argsort(stable=True).argsort() < p.sum(-1, keepdim=True).round()).float()
    z = F.normalize(self.encode_task_layer(self.causal_encoder(x, keep)), dim=-1).flatten(0, 1)
    codes = self.quantize['embedding'].weight
    distance = z.square().sum(-1, keepdim=True) + codes.square().sum(-1) - 2 * z @ codes.T
    return distance.argmin(-1).view(keep.shape), keep.bool()
