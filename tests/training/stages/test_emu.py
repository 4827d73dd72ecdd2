"""Stage 2 with Emu's interface: words and regressed embeddings in packed rows, and the gradient."""

import jax
import jax.numpy as jnp
import nano
import numpy as np
import pytest

from lavit_jax import sharding
from lavit_jax.training import flops
from lavit_jax.training.stages.base import apply_module
from lavit_jax.training.train_step import numbers

nano.install()
LENGTH = 16  # of the longest pair
WEIGHT = 0.5


def separate_rows(batch, n, vocabulary):
  """A row for each pair, by the definition of the pairs.

  Returns ids, the vector [row, slot, number] of each slot that has one, the words
  [row, slot, weight] that are predicted from the slot before, and the slots [row, slot] whose
  embedding is regressed from the slot before.
  """
  ids = np.zeros((len(batch['kind']), LENGTH), np.int32)
  vectors, words, regressed = [], [], []
  for row, kind in enumerate(batch['kind']):
    text = [int(word) for word in batch['text'][row, : batch['text_length'][row]]]
    image = [vocabulary.image_start, *[0] * n, vocabulary.image_end]
    tokens = [[*image, *text, 2], [*text, *image, 2], [1, *text, 2]][kind]
    ids[row, : len(tokens)] = tokens
    first = [n + 2, 1, 1][kind]  # word that has one before it
    last = [n + 2 + len(text), len(text) - 1, len(text) + 1][kind]  # the end too, but of an image
    words += [(row, slot, 1.0) for slot in range(first, last + 1)]
    if kind < 2:
      start = [0, len(text)][kind]
      vectors += [(row, start + 1 + i, i) for i in range(n)]
      regressed += [(row, start + 1 + i) for i in range(n + 1)]
  return ids, np.array(vectors), np.array(words), np.array(regressed)


@pytest.fixture(scope='module')
def run():
  return nano.run('lm', interface='emu', lm__regression_weight=WEIGHT)


def test_packed_pairs_have_the_loss_and_the_gradient_of_separate_rows(run, parts, batch):
  model = run.model
  frozen = {'vit': parts['vit']}
  params, state = nano.init_stage(run.stage, {'llama': parts['llama'], **frozen})
  ids, places, words, regressed = separate_rows(batch, 4, model.vocabulary)
  assert len(regressed) == 6 * 5

  @nano.jit
  def packed(params):
    def loss(params):
      return run.stage.loss(params, frozen, state, batch, jax.random.key(1), True)

    return jax.value_and_grad(loss, has_aux=True)(params)

  def read(params):
    """What each row reads, and its hidden states."""
    features = model.tower.features(frozen['vit'], batch['image'])
    vectors = apply_module(model.interface, params['interface'], features).vectors
    embedded = apply_module(model.llama, params['llama'], ids, method='embed')
    row, slot, number = places.T
    embedded = embedded.at[row, slot].set(vectors[row, number])
    causal = jnp.tril(jnp.ones((1, 1, LENGTH, LENGTH), bool))
    positions = jnp.broadcast_to(jnp.arange(LENGTH), ids.shape)
    return embedded, apply_module(model.llama, params['llama'], embedded, positions, causal)[0]

  @nano.jit
  def separate(params):
    targets = read(params)[0]  # computed outside of the gradient

    def loss(params):
      _, hidden = read(params)
      row, slot, weight = words.T
      row, slot = row.astype(int), slot.astype(int)
      logits = apply_module(model.llama, params['llama'], hidden[row, slot - 1], method='logits')
      chosen = jax.nn.log_softmax(logits)[np.arange(len(words)), ids[row, slot]]
      row, slot = regressed.T
      predicted = hidden[row, slot - 1] @ params['interface']['head']['kernel']
      errors = jnp.square(predicted - targets[row, slot]).mean(-1).sum()
      total = errors * WEIGHT - (chosen * weight).sum()
      return total / (weight.sum() + WEIGHT * len(regressed)), errors / len(regressed)

    return jax.value_and_grad(loss, has_aux=True)(params)

  (value, (_, metrics)), gradient = packed(params)
  (want, errors), want_gradient = separate(params)
  metrics = numbers(metrics)
  assert metrics['overflow'] == 0 and metrics['loss_tokens'] == len(words)
  assert value == pytest.approx(float(want), rel=1e-5)
  assert metrics['loss'] == pytest.approx(float(want), rel=1e-5)
  assert metrics['loss_regression'] == pytest.approx(float(errors), rel=1e-4)
  largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(want_gradient))
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
    other = want_gradient
    for key in path:
      other = other[key.key]
    np.testing.assert_allclose(leaf, other, atol=1e-5 * largest)
    if path[0].key == 'interface':
      assert np.abs(leaf).max() > 0, sharding.path_name(path)
  assert run.stage.draw is None
  assert sorted(run.stage.export(params, state)) == ['interface', 'llama']


def test_the_flops_of_the_head_are_those_of_its_product(run):
  """An image that is drawn costs what one that is read does: n + 1 pairs of width 32."""
  interface = run.model.interface
  features = jax.ShapeDtypeStruct((1, 17, 32), jnp.float32)
  params = jax.eval_shape(interface.init, jax.random.key(0), features)
  gradient = jax.grad(lambda params, x: interface.apply(params, x).vectors.sum())
  with jax.sharding.use_abstract_mesh(flops.ONE_CPU):
    pair = flops.pair_flops(run)
    seen = flops.count(jax.make_jaxpr(gradient)(params, features))
  assert pair.codes == pair.understanding == seen + 3 * 2 * 5 * 32 * 32
