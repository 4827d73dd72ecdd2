"""The decoder of features against the golden case, and its conditions of the U-Nets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.models.decoder import null_context


def prefix(golden):
  """The golden codes [B, N, C] and the mask of each image's prefix."""
  mask = np.arange(golden.features.shape[1]) < golden.io['kept_token_counts'][:, None]
  codes = np.zeros((*mask.shape, golden.size['code_dim']), np.float32)
  codes[mask] = golden.io['quantized']
  return codes, mask


def test_golden_features_and_lowres_context(golden, run):
  features = run('decoder', *prefix(golden))
  np.testing.assert_allclose(features, golden.io['reconstructed_features'], atol=1e-4, rtol=0)
  context, pooled = run('decoder', features, method='context')
  np.testing.assert_allclose(context, golden.io['lowres_context'], atol=1e-4, rtol=0)
  assert pooled is None


def test_golden_highres_context_and_pool(golden, run):
  features = run('highres_decoder', *prefix(golden))
  context, pooled = run('highres_decoder', features, method='context')
  np.testing.assert_allclose(context, golden.io['highres_context'], atol=1e-4, rtol=0)
  np.testing.assert_allclose(pooled, golden.io['highres_pooled'], atol=1e-4, rtol=0)


def test_padded_slots_do_not_matter(golden, run):
  codes, mask = prefix(golden)
  other = np.where(mask[..., None], codes, 7.0)
  expected = run('decoder', codes, mask)
  np.testing.assert_allclose(run('decoder', other, mask), expected, atol=1e-6)
  assert np.abs(run('decoder', other, np.ones_like(mask)) - expected).max() > 1e-2


def test_kept_codes_are_decoded_in_place(golden, run):
  """Codes between dropped patches give what compacted codes give, and gradients to the choice."""
  keep = np.float32(golden.io['keep_mask'])
  codes = np.full((*keep.shape, golden.size['code_dim']), 7.0, np.float32)
  codes[keep > 0] = golden.io['quantized']
  features = run('decoder', codes, keep, method='decode_kept')
  np.testing.assert_allclose(features, golden.io['reconstructed_features'], atol=1e-4, rtol=0)

  def total(keep):
    decoded = golden.modules['decoder'].apply(
      {'params': golden.params['decoder']}, codes, keep, method='decode_kept'
    )
    return jnp.sin(decoded).sum()

  gradient = np.array(jax.grad(total)(keep))
  dropped = gradient[1][keep[1] == 0]  # row 1 keeps one patch
  assert dropped.size > 1 and np.abs(dropped).min() > 0


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_finite_at_the_extremes(golden, dtype):
  codes, mask = prefix(golden)  # row 0 keeps all, row 1 one
  module = golden.modules['highres_decoder'].clone(dtype=dtype)

  def loss(params, codes, mask):
    features = module.apply({'params': params}, codes, mask)
    context = module.apply({'params': params}, features, method='context')
    assert features.dtype == dtype
    return sum(
      jnp.square(x.astype(jnp.float32)).mean() for x in jax.tree.leaves((features, context))
    )

  value, grads = jax.jit(jax.value_and_grad(loss))(golden.params['highres_decoder'], codes, mask)
  assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_bfloat16_is_near_float32(golden, run):
  features = np.float32(run('decoder', *prefix(golden), dtype=jnp.bfloat16))
  expected = golden.io['reconstructed_features']
  assert np.abs(features - expected).mean() < 0.03 * expected.std()


def test_null_context_is_padded_and_masked():
  rows = np.ones((3, 4), np.float32)
  context, mask = null_context(rows, 5)
  assert context.tolist() == [[1] * 4] * 3 + [[0] * 4] * 2
  assert mask.tolist() == [True] * 3 + [False] * 2
  with pytest.raises(ValueError, match='3 unconditional rows do not fit'):
    null_context(rows, 2)
