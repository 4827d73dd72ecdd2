"""Selector, merger and quantizer against the golden case and against definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lavit_jax.models.tokenizer import (
  Selector,
  gumbel,
  gumbel_keep,
  l2_normalize,
  nearest_code,
)


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


def test_golden_merger_at_every_block(golden, run):
  apply = functools.partial(
    golden.modules['tokenizer'].apply, method='merge', mutable=['intermediates']
  )
  variables = {'params': golden.params['tokenizer']}
  merged, sown = jax.jit(apply)(variables, golden.features, golden.io['keep_mask'])
  intermediates = sown['intermediates']['merger']
  (vision,) = intermediates['vision']
  (streams,) = intermediates['blocks']['stream']
  np.testing.assert_allclose(vision, golden.io['ln_vision'], atol=1e-4, rtol=0)
  assert streams.shape == golden.io['merger_blocks'].shape
  np.testing.assert_allclose(streams, golden.io['merger_blocks'], atol=1e-4, rtol=0)
  np.testing.assert_allclose(merged, golden.io['merged'], atol=1e-4, rtol=0)
  plain = run('tokenizer', golden.features, golden.io['keep_mask'], method='merge')
  np.testing.assert_allclose(plain, merged, atol=1e-6)


def test_golden_understanding(golden, run):
  features = run('understanding', golden.features, golden.io['keep_mask'])
  np.testing.assert_allclose(features, golden.io['llm_features'], atol=1e-4, rtol=0)


def test_golden_codes(golden, run):
  kept = golden.io['keep_mask'].astype(bool)
  assert kept.sum(1).tolist() == golden.io['kept_token_counts'].tolist()
  encoded = run('tokenizer', golden.io['merged'][kept], method=lambda m, x: m.quantizer.encode(x))
  np.testing.assert_allclose(encoded, golden.io['pre_quant'], atol=1e-4, rtol=0)
  ids, z = run('tokenizer', golden.io['merged'], method='quantize')
  assert ids[kept].tolist() == golden.io['code_ids'].tolist()
  np.testing.assert_allclose(
    z[kept], encoded / np.linalg.norm(encoded, axis=-1, keepdims=True), atol=1e-6
  )
  codes = run('tokenizer', ids, method='lookup')
  np.testing.assert_allclose(codes[kept], golden.io['quantized'], atol=1e-4, rtol=0)


def test_golden_chain_from_pixels(golden, run):
  """The modules in a chain, each with the output of the one before, give the published ids."""
  x = run('vit', golden.io['images'].transpose(0, 2, 3, 1))[:, 1:]
  merged = run('tokenizer', x, golden.io['keep_mask'], method='merge')
  ids, _ = run('tokenizer', merged, method='quantize')
  assert ids[golden.io['keep_mask'].astype(bool)].tolist() == golden.io['code_ids'].tolist()


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


def test_nearest_code_by_brute_force():
  z = normal(3, 5, 8)
  codebook = normal(40, 8, seed=1)  # codes of unequal lengths
  expected = np.square(z[..., None, :].astype(float) - codebook).sum(-1).argmin(-1)
  ids = nearest_code(z, codebook)
  assert ids.dtype == jnp.int32 and np.array_equal(ids, expected)
  twice = np.concatenate([codebook, codebook])
  assert np.array_equal(nearest_code(z, twice), expected)  # the first among equals


def test_l2_normalize_of_zero_is_zero():
  x = normal(2, 4)
  x[1] = 0
  unit, pull = jax.vjp(l2_normalize, x)
  np.testing.assert_allclose(unit[0], x[0] / np.linalg.norm(x[0]), rtol=1e-6)
  assert not unit[1].any() and np.isfinite(pull(jnp.ones_like(x))[0]).all()


def test_merger_sees_dropped_patches_anywhere_but_kept_ones_only_before(golden, run):
  x = np.array(golden.features[:1])
  keep = np.ones((1, 16), np.float32)
  keep[0, [3, 11]] = 0
  base = run('tokenizer', x, keep, method='merge')

  def change(patch):
    other = x.copy()
    other[0, patch] += normal(64)
    return np.abs(run('tokenizer', other, keep, method='merge') - base)[0].max(-1)

  later_kept = change(8)
  assert later_kept[[0, 1, 2, 4, 5, 6, 7]].max() < 1e-5 and later_kept[8:11].min() > 1e-3
  assert change(11).min() > 1e-4  # a dropped one reaches all, also those before it


KEEPS = {
  'none dropped': np.ones(16),
  'all but one dropped': np.eye(16)[5],
  'some': np.arange(16) % 3 == 0,
}


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_finite_at_the_extremes(golden, dtype):
  keep = np.float32(np.stack(list(KEEPS.values())))
  x = golden.features[: len(keep)].astype(dtype)
  module = golden.modules['tokenizer'].clone(dtype=dtype)

  def loss(params, x, keep):
    merged = module.apply({'params': params}, x, keep, method='merge')
    _, z = module.apply({'params': params}, merged, method='quantize')
    assert merged.dtype == dtype and z.dtype == jnp.float32
    return jnp.square(merged.astype(jnp.float32)).mean() + (z * normal(*z.shape)).sum()

  value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(
    golden.params['tokenizer'], x, keep
  )
  assert np.isfinite(value) and all(
    np.isfinite(np.float32(g)).all() for g in jax.tree.leaves(grads)
  )
  assert np.abs(grads[2]).max() > 0  # the gradient reaches the selector


def test_bfloat16_is_near_float32(golden, run):
  merged = run(
    'tokenizer', golden.features, golden.io['keep_mask'], method='merge', dtype=jnp.bfloat16
  )
  error = np.abs(np.float32(merged) - golden.io['merged'])
  assert error.mean() < 0.02 * golden.io['merged'].std()
  # The selector stays float32.
  log_probs = run('tokenizer', golden.features, method='select', dtype=jnp.bfloat16)
  np.testing.assert_allclose(log_probs, golden.io['selector_log_probs'], atol=1e-4)


def test_tokenizer_joins_its_modules(golden, run):
  out = run('tokenizer', golden.features)
  assert np.array_equal(out.keep, gumbel_keep(out.log_probs))
  np.testing.assert_allclose(
    out.merged, run('tokenizer', golden.features, out.keep, method='merge'), atol=1e-5
  )
  embedding = golden.params['tokenizer']['quantizer']['embedding']
  assert np.array_equal(out.codes, embedding[out.ids]) and out.ids.dtype == jnp.int32
  sampled = run('tokenizer', golden.features, jax.random.key(3))
  assert np.array_equal(sampled.keep, gumbel_keep(out.log_probs, key=jax.random.key(3)))
