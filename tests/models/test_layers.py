"""Each op against PyTorch's own."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lavit_jax.models import layers
from lavit_jax.models.layers import (
  LayerNorm,
  Mlp,
  RMSNorm,
  SwiGLU,
  attention,
  gelu,
  policy_attention,
  rotary,
  scan_blocks,
)
from lavit_jax.models.rope import frequencies


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def heads(x):
  """q, k or v [B, N, H, d] for torch, which wants [B, H, N, d]."""
  return torch.from_numpy(np.ascontiguousarray(x.swapaxes(1, 2)))


@pytest.mark.parametrize('kv_heads', [4, 2, 1])
@pytest.mark.parametrize('extra', ['none', 'mask', 'bias', 'scale'])
def test_attention_matches_torch(kv_heads, extra):
  q, k, v = normal(2, 5, 4, 8), normal(2, 7, kv_heads, 8, seed=1), normal(2, 7, kv_heads, 8, seed=2)
  mask, bias = normal(2, 1, 5, 7, seed=3) > -0.5, normal(1, 4, 5, 7, seed=4)
  mask[..., 0] = True
  ours = {'none': {}, 'mask': {'mask': mask}, 'bias': {'bias': bias}, 'scale': {'scale': 0.3}}[
    extra
  ]
  theirs = {'attn_mask' if name in ('mask', 'bias') else name: x for name, x in ours.items()}
  theirs = {name: torch.from_numpy(x) if name == 'attn_mask' else x for name, x in theirs.items()}
  expected = F.scaled_dot_product_attention(heads(q), heads(k), heads(v), enable_gqa=True, **theirs)
  np.testing.assert_allclose(attention(q, k, v, **ours), expected.numpy().swapaxes(1, 2), atol=1e-5)


@pytest.mark.parametrize(
  'block', [256, 4, 1]
)  # of queries; 4: five times four, one of which is none
def test_attention_gradient_matches_torch(monkeypatch, block):
  monkeypatch.setattr(layers, 'QUERY_BLOCK', block)
  q, k, v = (normal(2, 19, 4, 8, seed=n) for n in range(3))
  weight = normal(2, 19, 4, 8, seed=3)
  ours = jax.grad(lambda *qkv: (attention(*qkv) * weight).sum(), argnums=(0, 1, 2))(q, k, v)
  leaves = [torch.from_numpy(x).requires_grad_() for x in (q, k, v)]
  out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves)).transpose(1, 2)
  (out * torch.from_numpy(weight)).sum().backward()
  for a, b in zip(ours, leaves, strict=True):
    np.testing.assert_allclose(a, b.grad, atol=1e-5)


def test_attention_to_nothing_is_the_mean():
  q, k, v = (normal(1, 3, 2, 4, seed=n) for n in range(3))
  out = attention(q, k, v, mask=np.zeros((1, 1, 3, 3), bool))
  np.testing.assert_allclose(out, np.broadcast_to(v.mean(1, keepdims=True), v.shape), atol=1e-5)


def naive_policy_attention(q, k, v, policy):
  """specification, Merger, word by word, one query at a time, in float64."""
  out = np.zeros(q.shape)
  for b, i, h in np.ndindex(q.shape[:3]):
    score = k[b, :, h].astype(float) @ q[b, i, h] / np.sqrt(q.shape[-1])
    a = np.exp(score - score.max()) * policy[b, i]
    out[b, i, h] = (a + 1e-6 / len(a)) / (a.sum() + 1e-6) @ v[b, :, h]
  return out


def test_policy_attention():
  q, k, v = (normal(2, 4, 2, 8, seed=n) for n in range(3))
  policy = np.float32(normal(2, 4, 4, seed=3) > 0)
  policy[0, 1] = 0
  out = policy_attention(q, k, v, policy[:, None])
  np.testing.assert_allclose(out, naive_policy_attention(q, k, v, policy), atol=1e-5)
  np.testing.assert_allclose(out[0, 1], v[0].mean(0), atol=1e-5)  # nothing to attend to: 1 / N each


def test_policy_gradient_is_finite_and_reaches_the_policy():
  q, k, v = (
    30 * normal(1, 4, 2, 8, seed=n) for n in range(3)
  )  # large scores: where a naive softmax overflows
  for policy in (np.ones((1, 1, 4, 4)), np.zeros((1, 1, 4, 4)), np.eye(4)[None, None]):
    grads = jax.grad(lambda *a: jnp.square(policy_attention(*a)).sum(), argnums=(0, 1, 2, 3))(
      q, k, v, np.float32(policy)
    )
    assert all(np.isfinite(g).all() for g in grads)
    assert np.abs(grads[3]).max() > 0


@pytest.mark.parametrize(
  ('ours', 'theirs'), [(LayerNorm(1e-5), F.layer_norm), (RMSNorm(1e-5), F.rms_norm)]
)
def test_norms_match_torch(ours, theirs):
  x, scale, bias = (
    100 + normal(3, 16),
    normal(16, seed=1),
    normal(16, seed=2),
  )  # a large mean: where E[x^2] - E[x]^2 fails
  params = {'scale': scale} | ({'bias': bias} if isinstance(ours, LayerNorm) else {})
  expected = theirs(torch.from_numpy(x), (16,), *map(torch.from_numpy, params.values()), eps=1e-5)
  np.testing.assert_allclose(ours.apply({'params': params}, x), expected, atol=2e-4)
  low = ours.clone(dtype=jnp.bfloat16).apply({'params': params}, x.astype(jnp.bfloat16))
  assert low.dtype == jnp.bfloat16


def test_gelu_matches_torch():
  x = np.linspace(-8, 8, 401, dtype=np.float32)
  few = 4 * np.finfo(np.float32).eps  # roundings
  np.testing.assert_allclose(gelu(x), F.gelu(torch.from_numpy(x)), atol=few * 8)  # of up to 8
  low = torch.from_numpy(x).bfloat16()
  np.testing.assert_allclose(
    np.float32(gelu(x.astype(jnp.bfloat16))), F.gelu(low).float(), rtol=1e-2, atol=1e-6
  )
  slope = jax.vmap(jax.grad(gelu))(x)
  leaf = torch.from_numpy(x).requires_grad_()
  F.gelu(leaf).sum().backward()
  np.testing.assert_allclose(slope, leaf.grad, atol=few * 8)


def test_mlps_match_torch():
  x = normal(3, 8)
  params = Mlp(16).init(jax.random.key(0), x)
  w = jax.tree.map(lambda a: torch.from_numpy(np.array(a)), params['params'])
  hidden = F.gelu(torch.from_numpy(x) @ w['fc1']['kernel'] + w['fc1']['bias'])
  np.testing.assert_allclose(
    Mlp(16).apply(params, x), hidden @ w['fc2']['kernel'] + w['fc2']['bias'], atol=1e-5
  )
  params = SwiGLU(16).init(jax.random.key(0), x)
  w = {name: torch.from_numpy(np.array(p['kernel'])) for name, p in params['params'].items()}
  hidden = F.silu(torch.from_numpy(x) @ w['gate']) * (torch.from_numpy(x) @ w['up'])
  np.testing.assert_allclose(SwiGLU(16).apply(params, x), hidden @ w['down'], atol=1e-5)


def test_rotary_turns_pairs_and_sees_only_differences():
  x, positions = normal(1, 3, 2, 8), np.array([[0, 1, 7]])
  pairs = x[..., :4] + 1j * x[..., 4:]
  turned = pairs * np.exp(1j * positions[..., None, None] * 100.0 ** (-np.arange(4) / 4))
  np.testing.assert_allclose(
    rotary(x, positions, frequencies(8, 100.0)),
    np.concatenate([turned.real, turned.imag], -1),
    atol=1e-5,
  )
  q, k = normal(1, 1, 1, 8), normal(1, 1, 1, 8, seed=1)
  near = (
    rotary(q, np.array([[5]]), frequencies(8)) * rotary(k, np.array([[2]]), frequencies(8))
  ).sum()
  far = (
    rotary(q, np.array([[105]]), frequencies(8)) * rotary(k, np.array([[102]]), frequencies(8))
  ).sum()
  np.testing.assert_allclose(near, far, atol=1e-4)


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, shift, slice):
    x = x + nn.tanh(nn.Dense(x.shape[-1])(x)) + shift + slice
    return x, x


@pytest.mark.parametrize('remat', ['none', 'full', 'minimal'])
def test_scan_blocks_is_a_loop(remat):
  x, slices = normal(2, 4), normal(3, 2, 4, seed=1)
  stack = scan_blocks(Block, 3, remat, in_axes=(nn.broadcast, 0))()
  params = stack.init(jax.random.key(0), x, 0.5, slices)['params']
  kernels = params['Dense_0']['kernel']
  assert kernels.shape == (3, 4, 4) and not np.allclose(kernels[0], kernels[1])

  def loop(params):
    y, outs = x, []
    for n in range(3):
      y, out = Block().apply({'params': jax.tree.map(lambda a: a[n], params)}, y, 0.5, slices[n])
      outs.append(out)
    return y, jnp.stack(outs)

  scanned = lambda params: stack.apply({'params': params}, x, 0.5, slices)
  jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), scanned(params), loop(params))
  loss = lambda f: lambda params: jnp.square(f(params)[1]).sum()
  jax.tree.map(
    partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
    jax.grad(loss(scanned))(params),
    jax.grad(loss(loop))(params),
  )


def test_scan_blocks_names_its_policies():
  with pytest.raises(ValueError, match="remat='al' is not one of 'none', 'full', 'save_qkv_proj'"):
    scan_blocks(Block, 2, 'al')
