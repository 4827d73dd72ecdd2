"""Norms and MLPs against PyTorch's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lavit_jax.models.layers import LayerNorm, Mlp, RMSNorm, SwiGLU, gelu


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
  ('module', 'torch_norm'), [(LayerNorm(1e-5), F.layer_norm), (RMSNorm(1e-5), F.rms_norm)]
)
def test_norms_match_torch(module, torch_norm):
  x = 100 + normal(3, 16)  # a large mean, where E[x^2] - E[x]^2 fails
  params = {'scale': normal(16, seed=1)}
  if isinstance(module, LayerNorm):
    params['bias'] = normal(16, seed=2)
  expected = torch_norm(
    torch.from_numpy(x), (16,), *map(torch.from_numpy, params.values()), eps=1e-5
  )
  np.testing.assert_allclose(module.apply({'params': params}, x), expected, atol=2e-4)
  low = module.clone(dtype=jnp.bfloat16).apply({'params': params}, x.astype(jnp.bfloat16))
  assert low.dtype == jnp.bfloat16


def test_gelu_matches_torch():
  x = np.linspace(-8, 8, 401, dtype=np.float32)
  few = 4 * np.finfo(np.float32).eps  # rounding errors
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
