"""Eight-bit numbers against NumPy, products by each of the ways to them, and what a compiled loop holds in memory."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bounds import assert_product
from safetensors.numpy import load_file

from lavit_jax.models import int8
from lavit_jax.models.llama import Llama, unroll
from lavit_jax.models.sequence import prompt_mask, prompt_positions
from lavit_jax.porting import engine
from lavit_jax.porting.tables_language import llama_rows

GOLDEN = pathlib.Path(__file__).parents[1] / 'data/golden'


def normal(*shape):
  return np.random.default_rng(len(shape)).standard_normal(shape, np.float32)


def test_quantize():
  x = normal(5, 40) * np.array([[1e-3], [1], [100], [0], [1]], np.float32)
  found = int8.quantize(jnp.asarray(x))
  assert found.values.dtype == jnp.int8 and found.values.shape == x.shape and found.scale.shape == (5,)
  steps = np.where(np.abs(x).max(-1) == 0, 1, np.abs(x).max(-1) / 127)
  np.testing.assert_allclose(found.scale, steps, rtol=1e-6)
  # To the nearest one; x / step is rounded, so near the middle between two it may be either.
  half = 0.5 + 127 * 4 * np.finfo(np.float32).eps
  assert np.abs(found.values - np.float64(x) / steps[:, None]).max() <= half
  assert np.abs(found.values).max(-1).tolist() == [127, 127, 127, 0, 127]
  np.testing.assert_allclose(int8.dequantize(found, jnp.float32), x, atol=steps.max() / 2 * 1.001)


@pytest.mark.parametrize('rows', [1, 2, 3, 40])  # partial sums, then blocks
@pytest.mark.parametrize('inputs, outputs', [(160, 90), (432, 300), (11008, 512), (20, 7)])
def test_products(rows, inputs, outputs):
  """432 and 20 are no multiples of the lanes, 300 none of the blocks, 11008 has more terms than are written out."""
  x, kernel = normal(2, rows, inputs)[0], normal(inputs, outputs)
  quantised = int8.quantize(jnp.asarray(kernel.T))
  product = jax.jit(int8.product, static_argnums=2)(x, quantised, jnp.float32)
  weights = np.float64(quantised.values) * np.float64(quantised.scale)[:, None]
  assert_product(product, x, weights.T)
  elsewhere = int8._product(jnp.asarray(x), quantised.values) * quantised.scale
  assert_product(elsewhere, x, weights.T)
  assert int8.product(jnp.asarray(x, jnp.bfloat16)[None], quantised, jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize('rows', [1, 4])
def test_a_loop_never_holds_the_weights_as_floats(rows):
  """XLA moves what is constant out of loops: conversions too, if it sees them."""
  weights = int8.quantize(jnp.asarray(normal(1024, 1024)))

  def run(x, weights):
    return jax.lax.fori_loop(0, 5, lambda _, x: jnp.tanh(int8.product(x, weights, jnp.float32)), x)

  memory = jax.jit(run).lower(jnp.ones((rows, 1024)), weights).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 2 * weights.values.nbytes  # as floats they would be four times their bytes


def test_golden_language_model():
  """Matrices alone become integers; the logits are those of a float model of the rounded weights, and near the golden ones."""
  sizes = json.loads((GOLDEN / 'language_model.json').read_text())
  golden, heads = np.load(GOLDEN / 'language_model_io.npz'), sizes['num_attention_heads']
  llama = Llama(
      vocab_size=sizes['vocab_size'], hidden_size=sizes['hidden_size'], num_layers=sizes['num_hidden_layers'], num_heads=heads,
      num_kv_heads=heads, head_dim=sizes['hidden_size'] // heads, mlp_dim=sizes['intermediate_size'])
  example = jnp.zeros((1, 2, llama.hidden_size)), jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 1, 2, 2), bool)
  like = jax.eval_shape(llama.init, jax.random.key(0), *example)['params']
  llama, params = unroll(llama, jax.tree.map(jnp.asarray, engine.from_torch(llama_rows(), load_file(GOLDEN / 'language_model.safetensors'), like)))
  rounded = jax.tree.map(lambda x: x, params)
  for holder, name in [(rounded, 'head')] + [(module, 'kernel') for i in range(llama.num_layers) for block in ('attention', 'mlp')
                                             for module in rounded[f'layers_{i}'][block].values()]:
    step = np.abs(holder[name]).max(0) / 127
    holder[name] = np.rint(holder[name] / step) * step
  params = int8.quantize_weights(params)
  types = {name: {str(x.dtype) for x in jax.tree.leaves(leaf)} for name, leaf in {**params, **params['layers_1']['mlp']}.items()}
  assert types['head'] == types['gate'] == {'int8', 'float32'} and types['embedding'] == types['norm'] == {'float32'}

  @jax.jit
  def forward(params, ids):
    mask, apply = jnp.ones(ids.shape, bool), functools.partial(llama.apply, {'params': params})
    return apply(apply(apply(ids, method='embed'), prompt_positions(mask), prompt_mask(mask))[0], method='logits')

  ids, expected = jnp.asarray(golden['forward_ids'], jnp.int32), golden['forward_logits']
  found = forward(params, ids)
  np.testing.assert_allclose(found, forward(rounded, ids), atol=1e-4)
  error = np.abs(found - expected) / expected.std()
  assert 1e-3 < error.mean() < 0.03  # 0.024: these weights are random, and large
