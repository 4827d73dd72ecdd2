"""Attention against PyTorch's own, and the merger's attention against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from programs import compiled

from lavit_jax.models import attention as attention_module
from lavit_jax.models.attention import (
  attention,
  attention_by_blocks,
  counterfactual_attention,
  policy_attention,
)


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def to_torch(x):
  """q, k or v [B, N, H, d] as torch takes it, [B, H, N, d]."""
  return torch.from_numpy(np.ascontiguousarray(x.swapaxes(1, 2)))


@pytest.mark.parametrize('kv_heads', [4, 2, 1])
@pytest.mark.parametrize('extra', ['none', 'mask', 'bias', 'scale'])
def test_attention_matches_torch(kv_heads, extra):
  q = normal(2, 5, 4, 8)
  k = normal(2, 7, kv_heads, 8, seed=1)
  v = normal(2, 7, kv_heads, 8, seed=2)
  mask = normal(2, 1, 5, 7, seed=3) > -0.5
  mask[..., 0] = True
  bias = normal(1, 4, 5, 7, seed=4)
  options = dict(none={}, mask={'mask': mask}, bias={'bias': bias}, scale={'scale': 0.3})[extra]
  torch_options = {}
  for name, x in options.items():
    if name == 'scale':
      torch_options['scale'] = x
    else:
      torch_options['attn_mask'] = torch.from_numpy(x)
  expected = F.scaled_dot_product_attention(
    to_torch(q), to_torch(k), to_torch(v), enable_gqa=True, **torch_options
  )
  out = compiled(attention, 'scale')(q, k, v, **options)
  np.testing.assert_allclose(out, expected.numpy().swapaxes(1, 2), atol=1e-5)


# Blocks of 4 queries: five of them, and the last slot is padding.
@pytest.mark.parametrize('block', [256, 4, 1])
def test_attention_gradient_matches_torch(monkeypatch, block):
  monkeypatch.setattr(attention_module, 'QUERY_BLOCK', block)
  q, k, v = (normal(2, 19, 4, 8, seed=n) for n in range(3))
  weight = normal(2, 19, 4, 8, seed=3)
  gradient = jax.grad(lambda *qkv: (attention(*qkv) * weight).sum(), argnums=(0, 1, 2))
  gradients = compiled(gradient)(q, k, v)
  leaves = [torch.from_numpy(x).requires_grad_() for x in (q, k, v)]
  out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves)).transpose(1, 2)
  (out * torch.from_numpy(weight)).sum().backward()
  for gradient, leaf in zip(gradients, leaves, strict=True):
    np.testing.assert_allclose(gradient, leaf.grad, atol=1e-5)


# A prompt of 19 slots before a cache of 32, in blocks of 5, 5, 5 and 4 queries.
@pytest.mark.parametrize('queries', [19, 1])
def test_attention_of_a_masked_prompt_by_blocks_matches_torch(monkeypatch, queries):
  monkeypatch.setattr(attention_module, 'QUERY_BLOCK', 5)
  q = normal(2, 19, 4, 8)
  k, v = (normal(2, 32, 2, 8, seed=n) for n in (1, 2))
  mask = normal(2, 1, queries, 32, seed=3) > 0
  mask[..., 0] = True
  expected = F.scaled_dot_product_attention(
    *(to_torch(x) for x in (q, k, v)), attn_mask=torch.from_numpy(mask), enable_gqa=True
  )
  out = compiled(attention_by_blocks)(q, k, v, mask=mask)
  np.testing.assert_allclose(out, expected.numpy().swapaxes(1, 2), atol=1e-5)


def test_attention_to_nothing_is_the_mean():
  q, k, v = (normal(1, 3, 2, 4, seed=n) for n in range(3))
  out = compiled(attention)(q, k, v, mask=np.zeros((1, 1, 3, 3), bool))
  np.testing.assert_allclose(out, np.broadcast_to(v.mean(1, keepdims=True), v.shape), atol=1e-5)


def test_attention_refuses_shapes_that_would_broadcast():
  q, k, v = (normal(2, 3, 2, 4, seed=n) for n in range(3))
  with pytest.raises(AssertionError):
    attention(q, k, v[:1])
  with pytest.raises(AssertionError):
    attention(q, k, v, mask=np.ones((2, 3, 3), bool))  # the heads are missing
  with pytest.raises(AssertionError):
    policy_attention(q, k, v, np.ones((2, 3, 3), np.float32))


def naive_policy_attention(q, k, v, policy):
  """The definition (specification, Merger), one query at a time, in float64."""
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
  out = compiled(policy_attention)(q, k, v, policy[:, None])
  np.testing.assert_allclose(out, naive_policy_attention(q, k, v, policy), atol=1e-5)
  # A query without a key gives each the weight 1 / K.
  np.testing.assert_allclose(out[0, 1], v[0].mean(0), atol=1e-5)


def test_policy_gradient_is_finite_and_reaches_the_policy():
  # Large scores, where a naive softmax overflows.
  q, k, v = (30 * normal(1, 4, 2, 8, seed=n) for n in range(3))
  total = jax.grad(lambda *args: jnp.square(policy_attention(*args)).sum(), argnums=(0, 1, 2, 3))
  gradient = compiled(total)
  for policy in (np.ones((1, 1, 4, 4)), np.zeros((1, 1, 4, 4)), np.eye(4)[None, None]):
    gradients = gradient(q, k, v, np.float32(policy))
    assert all(np.isfinite(g).all() for g in gradients)
    assert np.abs(gradients[3]).max() > 0


POLICY = np.float32([0, 1, 0, 1, 1])


def counterfactual_policy(q, k, v, policy):
  return policy_attention(q, k, v, policy, counterfactual=True)


@pytest.mark.parametrize('attend', [counterfactual_policy, counterfactual_attention])
def test_the_counterfactual_derivative_is_the_change_of_the_output(attend):
  q, k, v = (normal(1, 5, 1, 4, seed=n) for n in range(3))

  def result(policy, attend=attend):
    return attend(4 * q, 4 * k, v, policy[None, None, None])

  evaluate = compiled(result, 'attend')
  derivative = compiled(jax.jacobian(result))(POLICY)
  for key in (0, 2):
    with_key = evaluate(POLICY + np.eye(5, dtype=np.float32)[key])
    np.testing.assert_allclose(derivative[..., key], with_key - evaluate(POLICY), atol=1e-4)
  true = compiled(jax.jacobian(lambda policy: result(policy, policy_attention)))(POLICY)
  np.testing.assert_array_less(3 * np.abs(derivative).max(), np.abs(true).max())
  np.testing.assert_allclose(derivative[..., [1, 3, 4]], true[..., [1, 3, 4]], atol=1e-4)
  np.testing.assert_allclose(evaluate(POLICY), evaluate(POLICY, policy_attention), atol=1e-4)


def test_counterfactual_attention_is_masked_attention_at_any_scores():
  # Products up to 1e4 apart: absent keys would overflow, or push those that count below epsilon.
  q, k, v = (normal(1, 5, 1, 4, seed=n) for n in range(3))
  gradient = compiled(
    jax.grad(lambda *args: jnp.square(counterfactual_attention(*args)).sum(), argnums=(0, 1, 2, 3))
  )
  for scale in (1.0, 60.0):
    mask = POLICY.astype(bool)[None, None, None]
    expected = compiled(attention)(scale * q, scale * k, v, mask)
    policy = np.float32(mask)
    result = compiled(counterfactual_attention)(scale * q, scale * k, v, policy)
    np.testing.assert_allclose(result, expected, atol=1e-5)
    gradients = gradient(scale * q, scale * k, v, policy)
    assert all(np.isfinite(g).all() for g in gradients)
    assert np.abs(gradients[3]).max() > 0
