"""Norms and MLPs of the transformers.

Axes: D model width. Parameters are float32; `dtype` is the compute dtype. Norms always run in
float32.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from lavit_jax.models.int8 import Linear
from lavit_jax.models.lora import Dense
from lavit_jax.models.remat import SAVED_MLP_OUT

Dtype = Any


class LayerNorm(nn.Module):
  """Layer normalization over the last axis, in float32."""

  epsilon: float = 1e-5
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[..., D] -> dtype[..., D]."""
    scale = self.param('scale', nn.initializers.ones, x.shape[-1:])
    bias = self.param('bias', nn.initializers.zeros, x.shape[-1:])
    # The variance takes two passes: E[x^2] - E[x]^2 cancels on large activations.
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon)
    return (x * scale + bias).astype(self.dtype)


class RMSNorm(nn.Module):
  """Root-mean-square normalization over the last axis, in float32."""

  epsilon: float = 1e-5
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[..., D] -> dtype[..., D]."""
    scale = self.param('scale', nn.initializers.ones, x.shape[-1:])
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon)
    return (x * scale).astype(self.dtype)


def gelu(x: Array) -> Array:
  """The exact GELU, computed in float32, in the dtype of x.

  It uses erf: `jax.nn.gelu` uses erfc, which doubles the time of an MLP's gradient on CPU.
  """
  y = x.astype(jnp.float32)  # 1 + erf cancels for negative x in bfloat16
  return (0.5 * y * (1 + jax.lax.erf(y * 0.5**0.5))).astype(x.dtype)


class Mlp(nn.Module):
  """Linear, activation (exact GELU by default), Linear."""

  mlp_dim: int
  dtype: Dtype = jnp.float32
  activation: Callable[[Array], Array] = gelu

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[..., D] -> dtype[..., D]."""
    hidden = self.activation(Dense(self.mlp_dim, dtype=self.dtype, name='fc1')(x))
    out = Dense(x.shape[-1], dtype=self.dtype, name='fc2')(hidden)
    return checkpoint_name(out, SAVED_MLP_OUT)


class SwiGLU(nn.Module):
  """down(silu(gate(x)) * up(x)) without biases: LLaMA's MLP."""

  mlp_dim: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[..., D] -> dtype[..., D]."""

    def linear(features: int, name: str) -> Linear:
      return Linear(features, self.dtype, name=name)

    gate = linear(self.mlp_dim, 'gate')(x)
    up = linear(self.mlp_dim, 'up')(x)
    return checkpoint_name(linear(x.shape[-1], 'down')(nn.silu(gate) * up), SAVED_MLP_OUT)
