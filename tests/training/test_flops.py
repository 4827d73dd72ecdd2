import jax
import jax.numpy as jnp
import nano
import pytest

from lavit_jax.models import lavit
from lavit_jax.training import flops
from lavit_jax.training.config import load_config
from lavit_jax.training.run import resolve_abstract

nano.install()


def counted(fn, *args):
  return flops.count(jax.make_jaxpr(fn)(*args))


def test_products_and_convolutions():
  assert counted(jnp.matmul, jnp.zeros((5, 3, 4)), jnp.zeros((5, 4, 7))) == 2 * 5 * 3 * 4 * 7
  x = jnp.zeros((2, 8, 8, 6))
  kernel = jnp.zeros((3, 3, 3, 10))  # two groups of 3 channels

  def convolve(x, kernel):
    return jax.lax.conv_general_dilated(
      x, kernel, (2, 2), 'SAME', feature_group_count=2, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )

  assert counted(convolve, x, kernel) == 2 * (2 * 4 * 4 * 10) * (3 * 3 * 3)
  assert counted(jnp.sin, x) == 0


def test_a_scan_counts_as_often_as_it_runs_and_the_gradient_twice_over():
  x = jnp.zeros((16, 8))
  w = jnp.zeros((5, 8, 8))

  def loss(w, x, remat=False):
    def body(x, w):
      return jnp.tanh(x @ w), None

    return jax.lax.scan(jax.checkpoint(body) if remat else body, x, w)[0].sum()

  forward = 5 * 2 * 16 * 8 * 8
  assert counted(jax.jit(loss), w, x) == forward
  assert counted(jax.grad(loss, argnums=(0, 1)), w, x) == 3 * forward
  assert counted(jax.grad(lambda w, x: loss(w, x, True), argnums=(0, 1)), w, x) == 4 * forward


def test_of_a_condition_the_cheaper_branch_counts():
  w = jnp.zeros((8, 8))
  assert (
    counted(lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x @ x @ x, lambda: x @ x), w) == 2 * 8**3
  )


def test_the_parts_of_the_language_models_step_are_all_of_it():
  """Every traced product of the loss and its gradient is in one of them."""
  run = nano.run('lm')
  with jax.sharding.use_abstract_mesh(flops.ONE_CPU):
    pair = flops.pair_flops(run)
    whole = flops.trace_step(run)
  rows = run.options.num_rows * (pair.row + run.options.row_length**2 * pair.attention)
  assert whole == pytest.approx(
    run.batch_size * (pair.features + pair.codes + pair.understanding) + rows, rel=1e-6
  )


def test_flops_of_slots_follow_the_formula():
  """6 for each parameter and slot, and attention to half of the own pair; nothing for remat."""
  run = nano.run('lm', lm__mean_length=31)
  llama = nano.NANO['llama']
  width = llama['hidden_size']
  heads = llama['num_heads'] * llama['head_dim']
  weights = (
    llama['num_layers'] * (4 * width * heads + 3 * width * llama['mlp_dim'])
    + width * lavit.build('nano').vocabulary.size
  )
  attention = llama['num_layers'] * 3 * 2 * 2 * (31 + 1) / 2 * heads
  step = flops.step_flops(run)
  assert step.slots == pytest.approx(run.tokens_per_step * (6 * weights + attention), rel=1e-6)
  assert step.at(1.0) - step.at(0.25) == pytest.approx(0.75 * step.slots)
  assert flops.step_flops(nano.run('lm', lm__mean_length=31, remat='full')) == step


def test_frozen_products_have_no_gradient_of_their_weights():
  """4 for each frozen parameter and slot: the gradient goes on to the images, through attention."""
  step = flops.step_flops(nano.run('lm'))
  frozen = flops.step_flops(nano.run('lm', optim__freeze=('^llama/',)))
  llama = nano.NANO['llama']
  width = llama['hidden_size']
  heads = llama['num_heads'] * llama['head_dim']
  weights = (
    llama['num_layers'] * (4 * width * heads + 3 * width * llama['mlp_dim'])
    + width * lavit.build('nano').vocabulary.size
  )
  tokens = nano.run('lm').tokens_per_step
  assert step.slots - frozen.slots == pytest.approx(2 * tokens * weights, rel=1e-6)
  assert frozen.fixed == step.fixed


def test_beside_adapters_a_weight_costs_two_thirds():
  """Forward and backward to the inputs of it; all three of the adapters' own products."""
  with jax.sharding.use_abstract_mesh(flops.ONE_CPU):
    whole = flops.pair_flops(nano.run('lm'))
    adapted = flops.pair_flops(nano.run('lm', lora__rank=2))
  channels = 4 * (32 + 32) + 3 * (32 + 64)  # in and out of a layer's kernels
  own = 2 * 128 * 2 * 2 * channels  # two layers, 128 slots, rank 2
  assert adapted.row == pytest.approx(whole.row * 2 / 3 + 3 * own)
  assert (adapted.features, adapted.codes, adapted.attention) == (
    whole.features,
    whole.codes,
    whole.attention,
  )


def test_what_a_kind_has_no_use_for_is_not_counted():
  def fixed(**shares):
    config = nano.config('lm')
    with config.unlocked():
      config.data.shares = shares
    return flops.step_flops(resolve_abstract(config)).fixed

  with jax.sharding.use_abstract_mesh(flops.ONE_CPU):
    pair = flops.pair_flops(nano.run('lm'))
  assert min(pair.features, pair.codes, pair.understanding) > 0
  assert fixed(text=1.0) == 0 and fixed(draw=1.0) == 8 * (pair.features + pair.codes)
  assert fixed(caption=1.0, answer=2.0) == pytest.approx(8 * (pair.features + pair.understanding))
  assert fixed(caption=1.0, draw=1.0, text=2.0) == pytest.approx(
    8 * (pair.features / 2 + pair.codes / 4 + pair.understanding / 4)
  )


def test_expected_share():
  """136 of the config's pairs to 8 rows of 2,048; a step cannot hold more than it has slots."""
  published = resolve_abstract(load_config(f'{nano.ROOT}/configs/lm.py:lavit_7b'))
  assert flops.expected_share(published) == pytest.approx(136 * 110 / (8 * 2048))
  assert flops.expected_share(nano.run('lm', batch_size=1000)) == 1
  assert flops.expected_share(nano.run('tokenizer')) == 1


def test_a_frozen_layer_counts_its_forward(monkeypatch):
  vit = nano.NANO['vit']
  before = flops.step_flops(nano.run('tokenizer')).fixed
  monkeypatch.setitem(
    lavit.VARIANTS, 'nano', {**nano.NANO, 'vit': {**vit, 'num_layers': vit['num_layers'] + 1}}
  )
  width = vit['hidden_size']
  heads = vit['num_heads'] * vit['head_dim']
  tokens = (vit['image_size'] // vit['patch_size']) ** 2 + 1
  products = 2 * (4 * width * heads + 2 * width * vit['mlp_dim']) + 2 * 2 * tokens * heads
  run = nano.run('tokenizer')
  assert flops.step_flops(run).fixed - before == run.batch_size * tokens * products
