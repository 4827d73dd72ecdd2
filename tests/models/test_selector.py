"""The selector against the golden case, and the choice of patches against definitions."""

import jax
import numpy as np
import pytest
import torch
from programs import compiled

from lavit_jax.models import selector
from lavit_jax.models.selector import Selector

gumbel = compiled(selector.gumbel)
gumbel_keep = compiled(selector.gumbel_keep)


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_golden_selector(golden, run):
  log_probs = run('tokenizer', golden.features, method='select')
  np.testing.assert_allclose(log_probs, golden.io['selector_log_probs'], atol=1e-4, rtol=0)


def test_the_selector_multiplies_in_float32_wherever_it_runs():
  module = Selector(hidden_size=8)
  x = np.zeros((1, 4, 8), np.float32)
  params = jax.eval_shape(module.init, jax.random.key(0), x)
  jaxpr = jax.make_jaxpr(module.apply)(params, x)
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
  gradient = jax.grad(lambda x: (selector.gumbel_keep(x, noise=noise) * weight).sum())
  grad = compiled(gradient)(log_probs)
  np.testing.assert_allclose(grad, golden.io['gumbel_grad_logits'], atol=1e-5, rtol=0)


@pytest.mark.parametrize('temperature', [0.5, 1.0, 3.0])
def test_gumbel_is_torch_straight_through(temperature):
  logits = normal(2, 9, 2)
  weight = normal(2, 9, seed=1)
  noise = gumbel(np.random.default_rng(0).random((2, 9, 2), np.float32))
  leaf = torch.from_numpy(logits).requires_grad_()
  soft = ((leaf + torch.from_numpy(noise)) / temperature).softmax(-1)
  hard = torch.nn.functional.one_hot(soft.argmax(-1), 2) - soft.detach() + soft
  (hard[..., 0] * torch.from_numpy(weight)).sum().backward()

  def total(x):
    return (selector.gumbel_keep(x, noise=noise, temperature=temperature) * weight).sum()

  keep, grad = compiled(jax.value_and_grad(total))(logits)
  np.testing.assert_allclose(keep, (hard[..., 0].detach().numpy() * weight).sum(), atol=1e-5)
  np.testing.assert_allclose(grad, leaf.grad, atol=1e-5)


def test_gumbel_noise_is_finite_at_the_ends_and_gumbel_between():
  ends = np.float32([0, 1e-45, 1e-38, 1 - 2**-24, 1])
  assert np.isfinite(gumbel(ends)).all() and np.all(np.diff(gumbel(ends)) >= 0)
  sample = gumbel(np.random.default_rng(0).random(200_000, np.float32))
  np.testing.assert_allclose(
    [sample.mean(), sample.var()], [np.euler_gamma, np.pi**2 / 6], rtol=0.02
  )


def test_sampling_keeps_with_probability_p():
  p = np.float32([0.1, 0.34, 0.5, 0.9])
  log_probs = np.broadcast_to(np.log(np.stack([p, 1 - p], -1)), (20_000, 4, 2))
  keep = gumbel_keep(log_probs, key=jax.random.key(1))
  assert set(np.unique(keep).tolist()) == {0.0, 1.0}  # hard to the last bit
  # The fallback (the most probable patch stays, here the last) has the probability prod(1 - p).
  expected = p + np.prod(1 - p) * np.array([0, 0, 0, 1])
  np.testing.assert_allclose(keep.mean(0), expected, atol=0.015)
  assert np.array_equal(keep, gumbel_keep(log_probs, key=jax.random.key(1)))
  assert not np.array_equal(keep, gumbel_keep(log_probs, key=jax.random.key(2)))


def keep_and_pull(function, log_probs, weight):
  """(the choice, the gradient of its weighted sum)."""

  def run(log_probs):
    keep, pull = jax.vjp(function, log_probs)
    return keep, pull(weight)[0]

  return compiled(run)(log_probs)


def test_without_a_key_the_expected_number_is_kept():
  p = np.float32(
    [[0.30, 0.45, 0.40, 0.35, 0.45], [0.01, 0.02, 0.01, 0.02, 0.01], [0.9, 0.8, 0.9, 0.9, 0.4]]
  )
  log_probs = np.log(np.stack([p, 1 - p], -1))
  keep, pulled = keep_and_pull(selector.gumbel_keep, log_probs, p)
  # round(1.95) patches though each p is below 1/2; at least one, the first among equals; round(3.9)
  assert keep.tolist() == [[0, 1, 0, 0, 1], [0, 1, 0, 0, 0], [1, 1, 1, 1, 0]]
  _, soft = keep_and_pull(lambda x: jax.nn.softmax(x)[..., 0], log_probs, p)
  np.testing.assert_allclose(pulled, soft, atol=1e-7)


def test_a_sampled_row_that_keeps_nothing_keeps_its_most_probable_patch():
  p = np.float32([[0.2, 0.4, 0.3]])
  log_probs = np.log(np.stack([p, 1 - p], -1))
  noise = np.broadcast_to(np.float32([0, 9]), (1, 3, 2))
  keep, pulled = keep_and_pull(lambda x: selector.gumbel_keep(x, noise=noise), log_probs, p)
  assert keep.tolist() == [[0, 1, 0]]
  _, soft = keep_and_pull(lambda x: jax.nn.softmax(x + noise)[..., 0], log_probs, p)
  np.testing.assert_allclose(pulled, soft, atol=1e-7)
  with pytest.raises(ValueError, match='not both'):
    gumbel_keep(log_probs, key=jax.random.key(0), noise=noise)
