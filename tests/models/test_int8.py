"""Eight-bit numbers against NumPy, every kind of product, and the memory of a compiled loop."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bounds import assert_product
from programs import compiled
from safetensors.numpy import load_file

from lavit_jax.models import int8
from lavit_jax.models.llama import Llama, unroll_layers
from lavit_jax.models.sequence import prompt_mask, prompt_positions
from lavit_jax.weights.torch import mapping
from lavit_jax.weights.torch.names_llama import llama_rules

GOLDEN = pathlib.Path(__file__).parents[1] / 'data/golden'


quantize = compiled(int8.quantize)
multiply = compiled(int8.product, 'out_dtype')


def normal(*shape):
  return np.random.default_rng(len(shape)).standard_normal(shape, np.float32)


def test_quantize():
  x = normal(5, 40) * np.array([[1e-3], [1], [100], [0], [1]], np.float32)
  quantized = quantize(x)
  assert quantized.values.dtype == jnp.int8
  assert quantized.values.shape == x.shape
  assert quantized.scale.shape == (5,)
  steps = np.where(np.abs(x).max(-1) == 0, 1, np.abs(x).max(-1) / 127)
  np.testing.assert_allclose(quantized.scale, steps, rtol=1e-6)
  # To the nearest one; x / step is rounded, so near the middle between two it may be either.
  half = 0.5 + 127 * 4 * np.finfo(np.float32).eps
  assert np.abs(quantized.values - np.float64(x) / steps[:, None]).max() <= half
  assert np.abs(quantized.values).max(-1).tolist() == [127, 127, 127, 0, 127]
  dequantized = compiled(int8.dequantize, 'dtype')(quantized, jnp.float32)
  np.testing.assert_allclose(dequantized, x, atol=steps.max() / 2 * 1.001)


@pytest.mark.parametrize('rows', [1, 2, 3, 40])  # partial sums, then blocks
@pytest.mark.parametrize('inputs, outputs', [(160, 90), (432, 300), (11008, 512), (20, 7)])
def test_products(rows, inputs, outputs):
  """Sizes for every branch.

  432 and 20 are no multiples of the lanes, 300 is none of the blocks, and 11008 needs wider lanes.
  """
  x = normal(2, rows, inputs)[0]
  kernel = normal(inputs, outputs)
  quantized = quantize(kernel.T)
  product = multiply(x, quantized, jnp.float32)
  weights = np.float64(quantized.values) * np.float64(quantized.scale)[:, None]
  assert_product(product, x, weights.T)
  elsewhere = compiled(int8._product)(x, quantized.values) * quantized.scale
  assert_product(elsewhere, x, weights.T)
  low = multiply(x.astype(jnp.bfloat16)[None], quantized, jnp.bfloat16)
  assert low.dtype == jnp.bfloat16


@pytest.mark.parametrize('rows', [1, 4])
def test_a_loop_never_has_the_weights_as_floats(rows):
  """XLA moves constant computations out of loops: conversions too, unless they are hidden."""
  weights = quantize(normal(1024, 1024))

  def run(x, weights):
    return jax.lax.fori_loop(0, 5, lambda _, x: jnp.tanh(int8.product(x, weights, jnp.float32)), x)

  memory = (
    jax.jit(run).lower(np.ones((rows, 1024), np.float32), weights).compile().memory_analysis()
  )
  # As floats they would take four times their bytes.
  assert memory.temp_size_in_bytes < 2 * weights.values.nbytes


def round_matrix(params, name):
  """Rounds a matrix [I, O] as `int8.quantize` does, in floats."""
  step = np.abs(params[name]).max(0) / 127
  params[name] = np.rint(params[name] / step) * step


def test_gradients_pass_to_the_activations_alone():
  x, weights = normal(3, 64), normal(3, 8)
  kernel = quantize(normal(8, 64))

  def loss(x):
    return (int8.product(x, kernel, jnp.float32) * weights).sum()

  gradient = compiled(jax.grad(loss))(x)
  floats = kernel.values.astype(np.float64) * kernel.scale[:, None]
  assert_product(gradient, weights, floats)


def test_golden_language_model():
  """Only matrices become integers.

  The logits are those of a float model with rounded weights, and near the golden ones.
  """
  sizes = json.loads((GOLDEN / 'language_model.json').read_text())
  golden = np.load(GOLDEN / 'language_model_io.npz')
  heads = sizes['num_attention_heads']
  llama = Llama(
    vocab_size=sizes['vocab_size'],
    hidden_size=sizes['hidden_size'],
    num_layers=sizes['num_hidden_layers'],
    num_heads=heads,
    num_kv_heads=heads,
    head_dim=sizes['hidden_size'] // heads,
    mlp_dim=sizes['intermediate_size'],
  )
  example = (
    jnp.zeros((1, 2, llama.hidden_size)),
    jnp.zeros((1, 2), jnp.int32),
    jnp.ones((1, 1, 2, 2), bool),
  )
  like = jax.eval_shape(llama.init, jax.random.key(0), *example)['params']
  state = load_file(GOLDEN / 'language_model.safetensors')
  stacked = jax.device_put(mapping.from_state_dict(llama_rules(), state, like))
  llama, params = unroll_layers(llama, stacked)
  rounded = jax.tree.map(lambda x: x, params)
  round_matrix(rounded, 'head')
  for i in range(llama.num_layers):
    for block in ('attention', 'mlp'):
      for module in rounded[f'layers_{i}'][block].values():
        round_matrix(module, 'kernel')
  params = int8.quantize_weights(params)

  def dtypes(tree):
    return {str(x.dtype) for x in jax.tree.leaves(tree)}

  assert dtypes(params['head']) == {'int8', 'float32'}
  assert dtypes(params['layers_1']['mlp']['gate']) == {'int8', 'float32'}
  assert dtypes(params['embedding']) == {'float32'}
  assert dtypes(params['norm']) == {'float32'}

  @jax.jit
  def forward(params, ids):
    apply = functools.partial(llama.apply, {'params': params})
    mask = jnp.ones(ids.shape, bool)
    hidden, _ = apply(apply(ids, method='embed'), prompt_positions(mask), prompt_mask(mask))
    return apply(hidden, method='logits')

  ids = golden['forward_ids'].astype(np.int32)
  expected = golden['forward_logits']
  logits = forward(params, ids)
  np.testing.assert_allclose(logits, forward(rounded, ids), atol=1e-4)
  error = np.abs(logits - expected) / expected.std()
  assert 1e-3 < error.mean() < 0.03  # 0.024: these weights are random, and large
