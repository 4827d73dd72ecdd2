import jax
import jax.numpy as jnp

from lavit_jax.training import flops


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
