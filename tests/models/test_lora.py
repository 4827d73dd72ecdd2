"""Low-rank adapters beside kernels: the products are those of W + s A B, in float64."""

import jax
import numpy as np
from bounds import assert_within, sum_error
from programs import compiled

from lavit_jax.models import lora
from lavit_jax.models.attention import QKV
from lavit_jax.models.lora import Dense

RNG = np.random.default_rng(0)
SCALE = 1.5


def draw(*shape):
  return RNG.standard_normal(shape, np.float32)


def test_a_layer_with_an_adapter_multiplies_by_the_sum():
  x = draw(5, 12)
  dense = dict(kernel=draw(12, 6), bias=draw(6), lora=dict(a=draw(12, 3), b=draw(3, 6)))
  qkv = dict(kernel=draw(3, 12, 6), bias=draw(3, 6), lora=dict(a=draw(12, 3), b=draw(3, 3, 6)))

  @compiled
  def run(dense, qkv, x):
    def attached(tree):
      own = dict(tree)
      return {'params': lora.attach(own, {'lora': own.pop('lora')}, SCALE)}

    return [Dense(6).apply(attached(dense), x), *QKV(6).apply(attached(qkv), x)]

  kernels = [*dense['kernel'][None], *qkv['kernel']]
  biases = [dense['bias'], *qkv['bias']]
  factors = [(dense['lora']['a'], dense['lora']['b'])]
  factors += [(qkv['lora']['a'], b) for b in qkv['lora']['b']]
  for y, kernel, bias, (a, b) in zip(run(dense, qkv, x), kernels, biases, factors, strict=True):
    x64, kernel, bias, a, b = (t.astype(np.float64) for t in (x, kernel, bias, a, SCALE * b))
    absolute = np.abs(x64) @ (np.abs(kernel) + np.abs(a) @ np.abs(b)) + np.abs(bias)
    assert_within(y, x64 @ (kernel + a @ b) + bias, sum_error(absolute, 12 + 3 + 1))


def test_dropout_is_of_the_inputs_of_each_adapter_and_layer():
  """With A and B the identity and W zero, a layer returns what it keeps of its input."""
  eye = np.eye(64, dtype=np.float32)
  trained = {
    name: dict(lora=dict(a=np.stack([eye, eye]), b=np.stack([eye, eye]))) for name in ('p', 'q')
  }
  params = {name: dict(kernel=np.zeros((2, 64, 64), np.float32)) for name in trained}

  @compiled
  def run(x):
    attached = lora.attach(params, trained, 1.0, jax.random.key(0), 0.25)
    apply = jax.vmap(lambda layer: Dense(64, use_bias=False).apply({'params': layer}, x))
    return [apply(attached[name]) for name in ('p', 'q')]

  kept = [layer for module in run(np.ones((50, 64), np.float32)) for layer in module]
  for layer in kept:
    assert set(np.unique(layer)) == {0, np.float32(1 / 0.75)}
    assert abs((layer == 0).mean() - 0.25) < 4 * (0.25 * 0.75 / layer.size) ** 0.5
  assert len({layer.tobytes() for layer in kept}) == 4
