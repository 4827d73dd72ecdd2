import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import compiled

from lavit_jax.models import quantizer
from lavit_jax.models.quantizer import l2_normalize
from lavit_jax.training import codebook

nearest_code = compiled(quantizer.nearest_code)
count_assignments = compiled(codebook.count_assignments, 'num_codes')
draw_vectors = compiled(codebook.draw_vectors, 'num')
kmeans = compiled(codebook.kmeans, 'num_codes')
update_codebook = compiled(codebook.update_codebook, 'decay', 'revive_after')
usage_metrics = compiled(codebook.usage_metrics)


def tokens(seed, shape):
  draw = compiled(lambda key: l2_normalize(jax.random.normal(key, shape)))
  return draw(jax.random.key(seed))


def init_codebook(embedding):
  return jax.device_get(codebook.init_codebook(embedding))


def test_tally_counts_only_what_weighs():
  z = tokens(0, (5, 3))
  ids = np.array([1, 0, 1, 1, 2])
  count, total = count_assignments(z, np.float32([1, 1, 1, 0, 0]), ids, 4)
  np.testing.assert_allclose(count, [1, 2, 0, 0])
  np.testing.assert_allclose(total[1], z[0] + z[2], rtol=1e-6)
  np.testing.assert_array_equal(total[2:], 0)


def test_kmeans_finds_the_clusters_and_ignores_what_does_not_weigh():
  centres = np.eye(4, dtype=np.float32)
  noise = np.random.default_rng(0).standard_normal((80, 4), np.float32)
  z = np.repeat(centres, 20, axis=0) + 0.05 * noise
  z /= np.linalg.norm(z, axis=1, keepdims=True)
  weight = np.repeat(np.float32([1, 1, 1, 0]), 20)
  embedding, count = kmeans(jax.random.key(3), z, weight, 8)
  assert float(count.sum()) == 60
  nearest = (embedding @ centres.T)[count > 0]
  assert (nearest.max(-1) > 0.95).all() and set(np.asarray(nearest.argmax(-1))) == {0, 1, 2}
  np.testing.assert_allclose(np.square(embedding).sum(-1), 1, rtol=1e-5)


def test_draw_repeats_only_when_there_are_too_few():
  z = np.arange(6, dtype=np.float32)[:, None]
  weight = np.float32([1, 0, 1, 1, 0, 1])
  four = draw_vectors(jax.random.key(0), z, weight, 4)[:, 0]
  assert sorted(four.tolist()) == [0, 2, 3, 5]
  assert set(draw_vectors(jax.random.key(0), z, weight, 9)[:, 0].tolist()) == {0, 2, 3, 5}


def test_update_is_the_moving_average_of_beit_v2():
  z = tokens(0, (12, 4))
  weight = np.float32([1] * 9 + [0] * 3)
  book = init_codebook(tokens(1, (5, 4)))
  ids = nearest_code(z, book.embedding)
  new = update_codebook(jax.random.key(0), book, z, weight, ids, decay=0.9, revive_after=0)
  for k in range(5):
    chosen = np.asarray(z)[(np.asarray(ids) == k) & (np.asarray(weight) > 0)]
    np.testing.assert_allclose(new.cluster_size[k], 0.9 + 0.1 * len(chosen), rtol=1e-6)
    expected = np.asarray(book.embedding[k])
    if len(chosen):
      mean = chosen.sum(0) / np.linalg.norm(chosen.sum(0))
      expected = 0.9 * expected + 0.1 * mean
      expected /= np.linalg.norm(expected)
    np.testing.assert_allclose(new.embedding[k], expected, rtol=1e-5, atol=1e-6)
    assert new.idle[k] == (0 if len(chosen) else 1)


@pytest.mark.parametrize('revive_after', [0, 3])
def test_dead_codes_come_back_to_life_on_tokens_they_describe_badly(revive_after):
  z = tokens(0, (20, 4))
  book = init_codebook(tokens(1, (5, 4)))
  for i in range(3):
    ids = nearest_code(z, book.embedding[:4])  # nobody chooses the last one
    before = book
    book = update_codebook(
      jax.random.key(i), book, z, np.ones(20, np.float32), ids, 0.99, revive_after
    )
  distance = np.square(book.embedding[4] - z).sum(-1)
  if revive_after:
    error = np.square(z - before.embedding[ids]).sum(-1)
    assert distance.min() < 1e-9 and error[distance.argmin()] > 0
  else:
    np.testing.assert_array_equal(book.embedding[4], tokens(1, (5, 4))[4])
  # Moved or not, nobody has chosen it: the usage must not call it alive.
  assert book.idle[4] == 3
  assert book.cluster_size[4] == pytest.approx(0.99**3)


def test_a_code_moves_again_only_after_as_many_batches_more():
  z = tokens(0, (20, 4))
  book = init_codebook(tokens(1, (5, 4)))
  positions = []
  for i in range(7):
    ids = nearest_code(z, book.embedding[:4])
    book = update_codebook(jax.random.key(i), book, z, np.ones(20, np.float32), ids, 0.99, 3)
    positions.append(np.asarray(book.embedding[4]))
  moved = [bool((a != b).any()) for a, b in zip([tokens(1, (5, 4))[4], *positions], positions)]
  assert moved == [False, False, True, False, False, True, False]


def test_a_dead_code_goes_where_the_error_is_whatever_its_index():
  z = tokens(0, (200, 4))
  num_codes = 180
  book = init_codebook(tokens(1, (num_codes, 4)))._replace(
    idle=np.where(np.arange(num_codes) == num_codes - 1, 2, 0).astype(np.int32)
  )
  ids = nearest_code(z, book.embedding[:-1])
  error = np.square(z - book.embedding[ids]).sum(-1)
  chances = error / error.sum()

  def revive(key, book, z, ids):
    return codebook.update_codebook(key, book, z, jnp.ones(200), ids, 0.99, 3).embedding[-1]

  revive_all = compiled(jax.vmap(revive, (0, None, None, None)))
  positions = revive_all(jax.random.split(jax.random.key(2), 40), book, z, ids)
  errors = error[np.square(z - positions[:, None]).sum(-1).argmin(-1)]
  expected = chances @ error
  spread = np.sqrt(chances @ error**2 - (chances @ error) ** 2)
  assert (
    abs(np.mean(errors) - expected) < 3.5 * spread / np.sqrt(40) and expected > 1.3 * error.mean()
  )


def test_usage():
  book = init_codebook(np.eye(8, dtype=np.float32))
  assert usage_metrics(book)['perplexity'] == pytest.approx(8, rel=1e-5)
  book = book._replace(
    cluster_size=np.float32([1, 1] + [0] * 6), idle=np.int32([0, 99] + [100] * 6)
  )
  usage = usage_metrics(book)
  assert usage['perplexity'] == pytest.approx(2, rel=1e-5)
  assert usage['dead_codes'] == 6 and usage['code_usage'] == 0.25
