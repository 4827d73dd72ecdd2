"""Filters against golden distributions, and samples against the distributions they come from."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.inference import sampling

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / 'data/golden/language_model_io.npz')


@pytest.mark.parametrize(
  'temperature, top_k, top_p', [(1.0, 50, 1.0), (0.7, 20, 0.9), (1.3, 300, 0.5)]
)
def test_golden_probabilities(temperature, top_k, top_p):
  logits = jnp.asarray(GOLDEN['sampling_logits'])
  expected = GOLDEN[f'sampling_probs_t{temperature}_k{top_k}_p{top_p}']
  probs = jax.nn.softmax(sampling.filter_logits(logits, temperature, top_k, top_p))
  np.testing.assert_allclose(probs, expected, atol=2e-5, rtol=0)  # exp of logits of tens
  np.testing.assert_array_equal(probs > 0, expected > 0)


def test_filters_compose_with_suppressed_ids():
  logits = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]]))
  logits = sampling.suppress(logits, jnp.array([True, False, False, False]))
  np.testing.assert_allclose(
    jax.nn.softmax(sampling.keep_top_k(logits, 2)), [[0, 0.6, 0.4, 0]], atol=1e-5
  )
  np.testing.assert_allclose(
    jax.nn.softmax(sampling.keep_top_p(logits, 0.51)), [[0, 0.6, 0.4, 0]], atol=1e-5
  )
  for p in (0.0, 0.49):  # the most probable id always stays
    np.testing.assert_allclose(
      jax.nn.softmax(sampling.keep_top_p(logits, p)), [[0, 1, 0, 0]], atol=1e-6
    )
  np.testing.assert_array_equal(sampling.keep_top_p(logits, 1.0), logits)


def test_guidance():
  conditional, unconditional = jax.random.normal(jax.random.key(0), (2, 3, 7))
  a = jax.nn.log_softmax(conditional)
  b = jax.nn.log_softmax(unconditional)
  np.testing.assert_allclose(
    sampling.guided_log_probs(conditional, unconditional, 1.0), a, atol=1e-5
  )
  np.testing.assert_allclose(
    sampling.guided_log_probs(conditional + 5, unconditional, 4.0), 4 * a - 3 * b, atol=1e-5
  )


def test_samples_follow_the_distribution_and_their_own_key():
  probs = jnp.array([0.5, 0.3, 0.2, 0.0])
  logits = jnp.log(jnp.broadcast_to(probs, (20000, 4)))
  keys = sampling.row_keys(jax.random.key(0), 20000)
  samples = sampling.sample(keys, logits)
  np.testing.assert_allclose(jnp.bincount(samples, length=4) / 20000, probs, atol=0.015)
  assert not (samples == 3).any()
  np.testing.assert_array_equal(sampling.sample(keys[7:9], logits[7:9]), samples[7:9])
  np.testing.assert_array_equal(
    sampling.sample(sampling.row_keys(jax.random.key(0), 9), logits[:9]), samples[:9]
  )
  np.testing.assert_array_equal(
    jax.random.key_data(sampling.row_keys(keys, 20000)), jax.random.key_data(keys)
  )
