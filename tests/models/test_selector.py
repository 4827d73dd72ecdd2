"""The selector against the golden case, and the choice of patches against definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lavit_jax.models.selector import Selector, gumbel, gumbel_keep


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_golden_selector(golden, run):
  log_probs = run('tokenizer', golden.features, method='select')
  np.testing.assert_allclose(log_probs, golden.io['selector_log_probs'], atol=1e-4, rtol=0)


def test_the_selector_multiplies_in_float32_wherever_it_runs():
  selector = Selector(hidden_size=8)
  params = selector.init(jax.random.key(0), jnp.zeros((1, 4, 8)))
  jaxpr = jax.make_jaxpr(selector.apply)(params, jnp.zeros((1, 4, 8)))
  products = [eqn.params['precision'] for eqn in jaxpr.eqns if eqn.primitive.name == 'dot_general']
  assert len(products) == 4 and all(
    set(precision) == {jax.lax.Precision.HIGHEST} for precision in products
  )


def test_golden_gumbel_decisions_and_gradient(golden):
  log_probs = golden.io['selector_log_probs']
  noise = golden.io['gumbel_noise']
  weight = golden.io['gumbel_grad_weight']
  keep = gumbel_keep(log_probs, noise=noise)
  assert np.array_equal(keep, golden.io['gumbel_hard_keep'])
  grad = jax.grad(lambda x: (gumbel_keep(x, noise=noise) * weight).sum())(log_probs)
  np.testing.assert_allclose(grad, golden.io['gumbel_grad_logits'], atol=1e-5, rtol=0)


@pytest.mark.parametrize('temperature', [0.5, 1.0, 3.0])
def test_gumbel_is_torch_straight_through(temperature):
  logits = normal(2, 9, 2)
  weight = normal(2, 9, seed=1)
  noise = np.array(gumbel(jax.random.uniform(jax.random.key(0), (2, 9, 2))))
  leaf = torch.from_numpy(logits).requires_grad_()
  soft = ((leaf + torch.from_numpy(noise)) / temperature).softmax(-1)
  hard = torch.nn.functional.one_hot(soft.argmax(-1), 2) - soft.detach() + soft
  (hard[..., 0] * torch.from_numpy(weight)).sum().backward()
  keep, grad = jax.value_and_grad(
    lambda x: (gumbel_keep(x, noise=noise, temperature=temperature) * weight).sum()
  )(logits)
  np.testing.assert_allclose(keep, (hard[..., 0].detach().numpy() * weight).sum(), atol=1e-5)
  np.testing.assert_allclose(grad, leaf.grad, atol=1e-5)


def test_gumbel_noise_is_finite_at_the_ends_and_gumbel_between():
  ends = np.float32([0, 1e-45, 1e-38, 1 - 2**-24, 1])
  assert np.isfinite(gumbel(ends)).all() and np.all(np.diff(gumbel(ends)) >= 0)
  sample = np.array(gumbel(jax.random.uniform(jax.random.key(0), (200_000,))))
  np.testing.assert_allclose(
    [sample.mean(), sample.var()], [np.euler_gamma, np.pi**2 / 6], rtol=0.02
  )


def test_sampling_keeps_with_probability_p():
  p = np.array([0.1, 0.34, 0.5, 0.9])
  log_probs = jnp.broadcast_to(jnp.log(jnp.stack([p, 1 - p], -1)), (20_000, 4, 2))
  keep = gumbel_keep(log_probs, key=jax.random.key(1))
  assert set(np.unique(keep).tolist()) == {0.0, 1.0}  # hard to the last bit
  # The fallback (the most probable patch stays, here the last) has the probability prod(1 - p).
  expected = p + np.prod(1 - p) * np.array([0, 0, 0, 1])
  np.testing.assert_allclose(keep.mean(0), expected, atol=0.015)
  assert np.array_equal(keep, gumbel_keep(log_probs, key=jax.random.key(1)))
  assert not np.array_equal(keep, gumbel_keep(log_probs, key=jax.random.key(2)))


def test_without_a_key_the_expected_number_is_kept():
  p = jnp.array(
    [[0.30, 0.45, 0.40, 0.35, 0.45], [0.01, 0.02, 0.01, 0.02, 0.01], [0.9, 0.8, 0.9, 0.9, 0.4]]
  )
  log_probs = jnp.log(jnp.stack([p, 1 - p], -1))
  keep, pull = jax.vjp(gumbel_keep, log_probs)
  # round(1.95) patches though each p is below 1/2; at least one, the first among equals; round(3.9)
  assert keep.tolist() == [[0, 1, 0, 0, 1], [0, 1, 0, 0, 0], [1, 1, 1, 1, 0]]
  soft = jax.vjp(lambda x: jax.nn.softmax(x)[..., 0], log_probs)[1]
  np.testing.assert_allclose(pull(p)[0], soft(p)[0], atol=1e-7)


def test_a_sampled_row_that_keeps_nothing_keeps_its_most_probable_patch():
  p = jnp.array([[0.2, 0.4, 0.3]])
  log_probs = jnp.log(jnp.stack([p, 1 - p], -1))
  noise = jnp.zeros((1, 3, 2)).at[..., 1].set(9.0)
  keep, pull = jax.vjp(lambda x: gumbel_keep(x, noise=noise), log_probs)
  assert keep.tolist() == [[0, 1, 0]]
  soft = jax.vjp(lambda x: jax.nn.softmax(x + noise)[..., 0], log_probs)[1]
  np.testing.assert_allclose(pull(p)[0], soft(p)[0], atol=1e-7)
  with pytest.raises(ValueError, match='not both'):
    gumbel_keep(log_probs, key=jax.random.key(0), noise=noise)
