import jax
import jax.numpy as jnp
import nano
import pytest

from lavit_jax.models import lavit
from lavit_jax.training import flops

nano.install()


def counted(fn, *args):
  return flops.count(jax.make_jaxpr(fn)(*args))


def test_products_and_convolutions():
  assert counted(jnp.matmul, jnp.zeros((5, 3, 4)), jnp.zeros((5, 4, 7))) == 2 * 5 * 3 * 4 * 7
  x, kernel = jnp.zeros((2, 8, 8, 6)), jnp.zeros((3, 3, 3, 10))  # two groups of 3 channels

  def convolve(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (2, 2), 'SAME', feature_group_count=2, dimension_numbers=('NHWC', 'HWIO', 'NHWC'))

  assert counted(convolve, x, kernel) == 2 * (2 * 4 * 4 * 10) * (3 * 3 * 3)
  assert counted(jnp.sin, x) == 0


def test_a_scan_counts_as_often_as_it_runs_and_the_gradient_twice_over():
  x, w = jnp.zeros((16, 8)), jnp.zeros((5, 8, 8))

  def loss(w, x, remat=False):
    body = lambda x, w: (jnp.tanh(x @ w), None)
    return jax.lax.scan(jax.checkpoint(body) if remat else body, x, w)[0].sum()

  forward = 5 * 2 * 16 * 8 * 8
  assert counted(jax.jit(loss), w, x) == forward
  assert counted(jax.grad(loss, argnums=(0, 1)), w, x) == 3 * forward
  assert counted(jax.grad(lambda w, x: loss(w, x, True), argnums=(0, 1)), w, x) == 4 * forward


def test_of_a_condition_the_cheaper_branch_counts():
  w = jnp.zeros((8, 8))
  assert counted(lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x @ x @ x, lambda: x @ x), w) == 2 * 8**3


def test_model_flops_of_the_language_model_follow_the_formula():
  """6 for each parameter of a product and each slot, and attention's half that causality allows; nothing for what remat does again."""
  config = nano.config('lm')
  llama = nano.NANO['llama']

  def with_rows(num_rows, **changes):
    return flops.model_flops(nano.config('lm', lm__num_rows=num_rows, **changes))

  width, heads = llama['hidden_size'], llama['num_heads'] * llama['head_dim']
  weights = llama['num_layers'] * (4 * width * heads + 3 * width * llama['mlp_dim']) + width * lavit.build('nano').vocabulary.size
  attention = llama['num_layers'] * 3 * 2 * 2 * config.lm.row_length * heads / 2
  slots = 8 * config.lm.row_length
  assert with_rows(16) - with_rows(8) == pytest.approx(slots * (6 * weights + attention), rel=1e-6)
  assert with_rows(8, remat='full') == with_rows(8)


def test_a_frozen_layer_counts_its_forward(monkeypatch):
  config, vit = nano.config('tokenizer'), nano.NANO['vit']
  before = flops.model_flops(config)
  monkeypatch.setitem(lavit.VARIANTS, 'nano', {**nano.NANO, 'vit': {**vit, 'num_layers': vit['num_layers'] + 1}})
  width, heads, tokens = vit['hidden_size'], vit['num_heads'] * vit['head_dim'], (vit['image_size'] // vit['patch_size'])**2 + 1
  products = 2 * (4 * width * heads + 2 * width * vit['mlp_dim']) + 2 * 2 * tokens * heads
  assert flops.model_flops(config) - before == config.batch_size * tokens * products
