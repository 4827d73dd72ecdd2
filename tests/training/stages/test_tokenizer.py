"""Stage 1: first without quantization, then with codes."""

import functools

import jax
import jax.numpy as jnp
import nano
import numpy as np
import pytest

from lavit_jax.models import lavit
from lavit_jax.training import codebook

nano.install()
MODEL = lavit.build('nano')


@pytest.fixture(scope='module')
def tokenizer(parts):
  """(stage, params, codebook, jit'd loss and gradient); quantization begins at step 1."""
  stage = nano.run('tokenizer', tokenizer__quantize_from=1).stage
  without, _ = codebook.take_out(parts)  # with one in init_from: another test
  loaded = {name: without[name] for name in ('vit', 'tokenizer', 'decoder')}
  params, book = nano.init_stage(stage, loaded)
  frozen = {'vit': parts['vit']}

  @functools.partial(nano.jit, static_argnums=4)
  def step(params, book, batch, key, train):
    (value, (book, metrics)), gradient = jax.value_and_grad(stage.loss, has_aux=True)(
      params, frozen, book, batch, key, train
    )
    return value, book, metrics, gradient

  return stage, params, book, step


def test_tokenizer_schedule(tokenizer, batch):
  stage, params, book, step = tokenizer
  key = jax.random.key(1)
  assert 'embedding' not in params['tokenizer']['quantizer']
  value, first, metrics, gradient = step(params, book, batch, key, True)
  first_commitment = float(metrics['commitment'])
  # Without quantization the codebook waits.
  np.testing.assert_array_equal(first.embedding, book.embedding)
  assert value == pytest.approx(float(metrics['cosine'] + 2 * metrics['ratio']), rel=1e-5)
  # Through the keep mask alone.
  assert jnp.abs(gradient['tokenizer']['selector']['fc_in']['kernel']).max() > 0
  assert jnp.abs(gradient['tokenizer']['merger']['norm']['scale']).max() > 0

  evaluated, same, _, _ = step(params, first, batch, key, False)
  np.testing.assert_array_equal(same.embedding, first.embedding)  # evaluation starts nothing
  assert evaluated == pytest.approx(float(value), rel=1e-5)

  value, second, metrics, gradient = step(params, first, batch, key, True)
  assert value == pytest.approx(
    float(metrics['cosine'] + 2 * metrics['ratio'] + metrics['commitment']), rel=1e-5
  )
  assert np.abs(second.embedding - first.embedding).max() > 0.1  # k-means
  assert metrics['commitment'] < first_commitment / 2  # of the random codes before
  assert jnp.abs(gradient['tokenizer']['quantizer']['fc1']['kernel']).max() > 0  # straight through
  value, third, _, _ = step(params, second, batch, jax.random.key(2), True)
  # A moving average, no second k-means.
  assert 0 < np.abs(third.embedding - second.embedding).max() < 0.1
  assert third.step == 3
  assert stage.hold({}) == (('^tokenizer/selector/', 1),)
  np.testing.assert_array_equal(
    stage.export(params, third)['tokenizer']['quantizer']['embedding'], third.embedding
  )


def test_tokenizer_metrics_are_those_of_the_dashboard(tokenizer, batch):
  _, params, book, step = tokenizer
  metrics = step(params, book, batch, jax.random.key(1), True)[2]
  assert {
    'cosine',
    'ratio',
    'commitment',
    'code_usage',
    'perplexity',
    'dead_codes',
    'keep_ratio',
  } <= set(metrics)
