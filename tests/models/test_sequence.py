"""Compaction of visual features, and left-padded prompts, against plain Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.models.sequence import (
  compact,
  embed_prompts,
  layout_prompts,
  prompt_mask,
  prompt_positions,
)


@pytest.mark.parametrize('keep_dtype', [bool, np.float32])
def test_compact(keep_dtype):
  r = np.random.default_rng(0)
  x = r.normal(size=(5, 7, 3)).astype(np.float32)
  keep = r.random((5, 7)) < 0.5
  keep[0] = True
  keep[1] = False
  out, mask = jax.jit(compact)(x, keep.astype(keep_dtype))
  for b in range(5):
    n = keep[b].sum()
    np.testing.assert_array_equal(out[b, :n], x[b][keep[b]])
    assert not out[b, n:].any()
    np.testing.assert_array_equal(mask[b], np.arange(7) < n)
  ids, _ = compact(jnp.arange(14).reshape(2, 7), jnp.asarray(keep[:2]))
  np.testing.assert_array_equal(ids, [np.arange(7), np.zeros(7)])


def test_the_mask_of_prompts_matches_its_picture():
  """Queries down, keys across; an x where a query sees a key."""
  lines = ('.....', '.....', '..x..', '..xx.', '..xxx')
  expected = np.array([list(line) for line in lines]) == 'x'
  mask = jnp.array([[0, 0, 1, 1, 1]], bool)
  np.testing.assert_array_equal(prompt_mask(mask)[0, 0], expected)
  np.testing.assert_array_equal(prompt_positions(mask), [[0, 0, 0, 1, 2]])


def test_prompts_are_left_padded_to_a_bucket():
  prompts = [[[50], range(3, 5), [51], [7, 8]], [[9]]]
  padded = layout_prompts(prompts, pad_id=2, multiple=8)
  np.testing.assert_array_equal(padded.ids, [[2, 2, 50, 2, 2, 51, 7, 8], [2] * 7 + [9]])
  np.testing.assert_array_equal(padded.source, [[-1, -1, -1, 3, 4, -1, -1, -1], [-1] * 8])
  expected_mask = np.array([[0, 0, 1, 1, 1, 1, 1, 1], [0] * 7 + [1]], bool)
  np.testing.assert_array_equal(padded.mask, expected_mask)
  assert layout_prompts(prompts).ids.shape == (2, 32)
  assert layout_prompts([[range(33)]]).ids.shape == (1, 64)

  features = jnp.arange(6.0).reshape(2, 3, 1) + 100
  embeddings, mask, positions = embed_prompts(
    prompts, lambda ids: ids[..., None].astype(jnp.float32), features, multiple=8
  )
  np.testing.assert_array_equal(embeddings[..., 0], [[2, 2, 50, 103, 104, 51, 7, 8], [2] * 7 + [9]])
  np.testing.assert_array_equal(positions, [[0, 0, 0, 1, 2, 3, 4, 5], [0] * 8])
  np.testing.assert_array_equal(mask, padded.mask)
