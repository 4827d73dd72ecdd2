"""The quantizer against the golden case and against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.models import quantizer
from lavit_jax.models.quantizer import l2_normalize, nearest_code


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


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


@pytest.mark.parametrize('shape', [(8,), (3, 5, 8), (4, 96, 8)])
def test_nearest_code_by_brute_force(monkeypatch, shape):
  """Blocks of 5 codes; the last shape has blocks of 128 tokens; codes of unequal lengths."""
  monkeypatch.setattr(quantizer, 'CODE_BLOCK', 5)
  z = normal(*shape)
  codebook = normal(40, 8, seed=1)
  expected = np.square(z[..., None, :].astype(float) - codebook).sum(-1).argmin(-1)
  ids = nearest_code(z, codebook)
  assert ids.dtype == jnp.int32 and np.array_equal(ids, expected)
  # The lowest among equals, in the same block and in others.
  repeated = np.concatenate([codebook.repeat(2, axis=0), codebook])
  np.testing.assert_array_equal(jax.jit(nearest_code)(z, repeated), 2 * expected)


def test_integers_tie_exactly():
  """Integers are exact in float32, so that all ties of a grid are ties."""
  rng = np.random.default_rng(0)
  z = rng.integers(-3, 4, (200, 3)).astype(np.float32)
  codebook = rng.integers(-3, 4, (64, 3)).astype(np.float32)
  distance = np.square(z[:, None] - codebook).sum(-1)
  assert ((distance == distance.min(-1, keepdims=True)).sum(-1) > 1).sum() > 50
  np.testing.assert_array_equal(nearest_code(z, codebook), distance.argmin(-1))


def test_l2_normalize_of_zero_is_zero():
  x = normal(2, 4)
  x[1] = 0
  unit, pull = jax.vjp(l2_normalize, x)
  np.testing.assert_allclose(unit[0], x[0] / np.linalg.norm(x[0]), rtol=1e-6)
  assert not unit[1].any() and np.isfinite(pull(jnp.ones_like(x))[0]).all()
