"""The tokenizer as a whole: from pixels to codes, at the extremes, in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.models.selector import gumbel_keep


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_golden_chain_from_pixels(golden, run):
  """The modules in a chain, each with the output of the one before, give the published ids."""
  x = run('vit', golden.io['images'].transpose(0, 2, 3, 1))[:, 1:]
  merged = run('tokenizer', x, golden.io['keep_mask'], method='merge')
  ids, _ = run('tokenizer', merged, method='quantize')
  assert ids[golden.io['keep_mask'].astype(bool)].tolist() == golden.io['code_ids'].tolist()


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
