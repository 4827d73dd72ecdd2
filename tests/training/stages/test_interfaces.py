"""Stage 2 with the interfaces of other systems: the loss, its gradients, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import nano
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from lavit_jax import sharding
from lavit_jax.errors import UserError
from lavit_jax.models import lavit
from lavit_jax.models.interfaces.base import RowImages
from lavit_jax.models.interfaces.variants import DRAWING, OTHERS
from lavit_jax.training import flops
from lavit_jax.training.config import load_config
from lavit_jax.training.run import resolve_abstract
from lavit_jax.training.stages.base import apply_module
from lavit_jax.training.train_step import abstract_inputs, make_init, numbers

nano.install()


@pytest.fixture(scope='module')
def read_batch(batch):
  """The batch without images to draw: its pairs are read."""
  return dict(batch, kind=np.where(batch['kind'] == 1, 0, batch['kind']))


def separate_rows(batch, lengths, vocabulary, length=32):
  """A row for each pair, by its definition: ids, slots of vectors, and weights of the targets."""
  ids = np.zeros((len(lengths), length), np.int32)
  is_vector = np.zeros(ids.shape, bool)
  weights = np.zeros(ids.shape, np.float32)
  for row, n in enumerate(lengths):
    text = [*batch['text'][row, : batch['text_length'][row]], 2]
    before = [1]
    if batch['kind'][row] == 0:
      before = [vocabulary.image_start, *[0] * n, vocabulary.image_end]
      is_vector[row, 1 : n + 1] = True
    ids[row, : len(before) + len(text)] = before + text
    weights[row, len(before) : len(before) + len(text)] = 1
  return ids, is_vector, weights


def open_gates(interface):
  """The parameters of an interface whose extra layers, if any, count."""

  def change(path, leaf):
    return np.full_like(leaf, 0.5) if sharding.path_name(path).endswith('_gate') else leaf

  return jax.tree_util.tree_map_with_path(change, interface)


@pytest.mark.parametrize('name', [name for name in OTHERS if name not in DRAWING])
def test_packed_pairs_have_the_loss_of_separate_rows(parts, read_batch, name):
  run = nano.run('lm', interface=name)
  model = run.model
  frozen = {'vit': parts['vit']}
  fresh, state = nano.init_stage(run.stage, {'llama': parts['llama'], **frozen})
  params = dict(fresh, interface=open_gates(fresh['interface']))
  ids, is_vector, weights = separate_rows(
    read_batch, [model.max_visual_tokens] * 8, model.vocabulary
  )

  @nano.jit
  def packed(params):
    def loss(params):
      return run.stage.loss(params, frozen, state, read_batch, jax.random.key(1), True)

    return jax.value_and_grad(loss, has_aux=True)(params)

  @functools.partial(nano.jit, static_argnames='see')
  def separate(params, see=True):
    features = model.tower.features(frozen['vit'], read_batch['image'])
    vectors = apply_module(model.interface, params['interface'], features).vectors
    embedded = apply_module(model.llama, params['llama'], ids, method='embed')
    places = jnp.broadcast_to(is_vector[..., None], embedded.shape)
    embedded = jnp.where(
      places, jnp.pad(vectors, ((0, 0), (1, 31 - vectors.shape[1]), (0, 0))), embedded
    )
    causal = jnp.tril(jnp.ones((1, 1, 32, 32), bool))
    positions = jnp.broadcast_to(jnp.arange(32), ids.shape)
    extra = None
    if model.layered_interface is not None and see:
      ordinal = jnp.broadcast_to(jnp.where(read_batch['kind'] == 0, 0, -1)[:, None], ids.shape)
      images = RowImages(vectors[:, None], ordinal)
      extra = model.layered_interface.extra_layers(params['interface'], images)
    hidden, _ = apply_module(model.llama, params['llama'], embedded, positions, causal, extra=extra)
    logits = apply_module(model.llama, params['llama'], hidden, method='logits')
    log_probs = jax.nn.log_softmax(logits[:, :-1])
    chosen = jnp.take_along_axis(log_probs, ids[:, 1:, None], -1)[..., 0]
    return -(chosen * weights[:, 1:]).sum() / weights.sum()

  (value, (_, metrics)), gradients = packed(params)
  metrics = numbers(metrics)
  assert metrics['overflow'] == 0 and 'keep_ratio' not in metrics
  assert metrics['loss_tokens'] == weights.sum()
  assert value == pytest.approx(float(separate(params)), rel=1e-4)
  if model.layered_interface is not None:
    blind = float(separate(params, see=False))
    assert abs(value - blind) > 0.01
    # With closed gates, the language model is what it was.
    (value, _), _ = packed(fresh)
    assert value == pytest.approx(blind, rel=1e-4)
  for path, gradient in jax.tree_util.tree_leaves_with_path(gradients['interface']):
    if 'key/bias' in sharding.path_name(path):  # softmax does not see it
      continue
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0, sharding.path_name(path)
  assert run.stage.draw is None
  assert sorted(run.stage.export(params, state)) == ['interface', 'llama']


@pytest.mark.parametrize('name', OTHERS)
def test_published_sizes_train_on_a_pod(name):
  """They need the image encoder alone, each large parameter has a rule, and rows hold the pairs."""
  config = load_config(f'{nano.ROOT}/configs/lm.py:lavit_7b', [('interface', name)])
  mesh = AbstractMesh((2, 128, 1), sharding.AXES)
  run = resolve_abstract(config, mesh)
  assert run.stage.modules.needs == ('vit',)
  loaded, _ = abstract_inputs(run)
  assert list(loaded) == ['vit']
  state = jax.eval_shape(make_init(run, loaded)[0], jax.random.key(0), loaded)
  sharding.shardings(state, mesh)
  share = flops.expected_share(run)
  assert 0.4 < share < 0.95
  drawn = sum(source['use'] == 'draw' for source in (*run.data.sources, *run.data.heldout))
  assert drawn == (2 if name in DRAWING else 0)
  assert len(run.data.sources) - drawn / 2 == 5 and len(run.data.heldout) - drawn / 2 == 1


def test_options_follow_the_interface_until_they_are_set():
  page = f'{nano.ROOT}/configs/lm.py:tiny'
  usual = load_config(page)
  assert (usual.lm.num_rows, usual.lm.mean_length, usual.data.shares.draw) == (10, 49, 0.33)
  config = load_config(page, [('interface', 'mlp')])
  # Pairs that are read have 53 tokens, of which a third of 64 patches is 21; now there are 64:
  # 53 + 43. Rows grow in proportion.
  assert (config.lm.mean_length, config.lm.num_rows) == (96, 20)
  assert config.data.shares.draw == 0 and config.data.shares.caption == 0.38
  # Without tokens in the sequence: 53 - 21 = 32. Eight rows, for one has 8 pairs.
  config = load_config(page, [('interface', 'flamingo')])
  assert (config.lm.mean_length, config.lm.num_rows, config.lm.row_length) == (32, 8, 256)
  # A pod has 2048 pieces of a batch, and so no fewer rows: 110 - 85 = 25 tokens, a fourth.
  large = load_config(f'{nano.ROOT}/configs/lm.py:lavit_7b', [('interface', 'flamingo')])
  assert (large.lm.mean_length, large.lm.num_rows, large.lm.row_length) == (25, 2048, 512)
  large = load_config(f'{nano.ROOT}/configs/lm.py:lavit_7b', [('interface', 'qformer')])
  assert (large.lm.mean_length, large.lm.num_rows, large.lm.row_length) == (57, 2048, 2048)
  # Emu's vectors are drawn, too: 49 - 21 + 16.
  config = load_config(page, [('interface', 'emu')])
  assert (config.lm.mean_length, config.lm.num_rows) == (44, 10)
  assert config.data.shares.draw == 0.33
  config = load_config(page, [('lm.num_rows', '31'), ('interface', 'mlp')])
  assert (config.lm.mean_length, config.lm.num_rows) == (96, 31)


def test_the_flops_of_an_interface_are_those_of_its_products():
  """Linear(D, H) on the patches: forward once, and the gradient of its kernel."""
  run = nano.run('lm', interface='linear')
  with jax.sharding.use_abstract_mesh(flops.ONE_CPU):
    pair = flops.pair_flops(run)
  patches, width = 16, 32
  assert pair.codes == 0
  assert pair.understanding == 2 * 2 * patches * width * width
  # The resampler reads one block more of the image encoder: 17 rows, 32 wide, an MLP of 64.
  with jax.sharding.use_abstract_mesh(flops.ONE_CPU):
    whole = flops.pair_flops(nano.run('lm', interface='resampler')).features
  rows = patches + 1
  products = 2 * rows * width * (3 * width + width + 2 * 64)
  attention = 2 * 2 * rows * rows * width
  assert whole - pair.features == products + attention


def test_the_flops_of_gated_layers_are_those_of_their_products():
  """Two layers: keys and values once an image; the rest in each slot, which sees four latents."""
  run = nano.run('lm', interface='flamingo')
  usual = nano.run('lm', interface='resampler')
  with jax.sharding.use_abstract_mesh(flops.ONE_CPU):
    pair, without = flops.pair_flops(run), flops.pair_flops(usual)
  layers, latents, width = 2, 4, 32
  projection = 2 * latents * width * width  # of the resampler alone: into the sequence
  keys_and_values = 2 * layers * latents * width * (2 * 32)
  assert pair.understanding - (without.understanding - 3 * projection) == 3 * keys_and_values
  slot = 2 * width * (32 + 32 + 4 * width + 4 * width) + 2 * 2 * latents * 32
  assert pair.row - without.row == 3 * layers * run.options.row_length * slot


@pytest.mark.parametrize(
  'changes, message',
  [
    (dict(interface='clip'), "^interface='clip' is unknown; choose lavit or linear or mlp"),
    (
      dict(interface='mlp', data__shares__draw=0.1),
      "^data.shares.draw=0.1: interface='mlp' has no codes, .* give data.shares.draw=0$",
    ),
    (
      dict(interface='mlp', data__sources=({'format': 'tars', 'path': 'a', 'use': 'draw'},)),
      r"^data.sources\[0\] has use 'draw': interface='mlp' has no codes",
    ),
    (
      dict(interface='mlp', lm__image_loss=True),
      "^lm.image_loss=True: interface='mlp' has no codes to learn",
    ),
  ],
)
def test_what_an_interface_cannot_do_is_refused(changes, message):
  with pytest.raises(UserError, match=message):
    nano.run('lm', **changes)


def test_a_model_without_an_interface_has_no_parameters_of_one():
  model = lavit.build('nano')
  assert model.interface is None and model.interface_name == 'lavit'
  assert model.max_visual_tokens == model.num_patches == 16
  settings = {'interface': {'name': 'lavit'}}
  assert dataclasses.asdict(lavit.build('nano', settings=settings)) == dataclasses.asdict(model)


# --- Emu: regressed vectors -------------------------------------------------------------------

EMU_LENGTH = 16  # of the longest pair
REGRESSION_WEIGHT = 0.5


def emu_rows(batch, n, vocabulary):
  """A row for each pair, by the definition of the pairs.

  Returns ids, the vector [row, slot, number] of each slot that has one, the words
  [row, slot, weight] that are predicted from the slot before, and the slots [row, slot] whose
  embedding is regressed from the slot before.
  """
  ids = np.zeros((len(batch['kind']), EMU_LENGTH), np.int32)
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
def emu_run():
  return nano.run('lm', interface='emu', lm__regression_weight=REGRESSION_WEIGHT)


def test_regressed_pairs_have_the_loss_and_the_gradient_of_separate_rows(emu_run, parts, batch):
  run = emu_run
  model = run.model
  frozen = {'vit': parts['vit']}
  params, state = nano.init_stage(run.stage, {'llama': parts['llama'], **frozen})
  ids, places, words, regressed = emu_rows(batch, 4, model.vocabulary)
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
    causal = jnp.tril(jnp.ones((1, 1, EMU_LENGTH, EMU_LENGTH), bool))
    positions = jnp.broadcast_to(jnp.arange(EMU_LENGTH), ids.shape)
    return embedded, apply_module(model.llama, params['llama'], embedded, positions, causal)[0]

  @nano.jit
  def separate(params):
    def loss(params):
      embedded, hidden = read(params)
      targets = jax.lax.stop_gradient(embedded)
      row, slot, weight = words.T
      row, slot = row.astype(int), slot.astype(int)
      logits = apply_module(model.llama, params['llama'], hidden[row, slot - 1], method='logits')
      chosen = jax.nn.log_softmax(logits)[np.arange(len(words)), ids[row, slot]]
      row, slot = regressed.T
      predicted = hidden[row, slot - 1] @ params['interface']['head']['kernel']
      errors = jnp.square(predicted - targets[row, slot]).mean(-1).sum()
      total = errors * REGRESSION_WEIGHT - (chosen * weight).sum()
      return total / (weight.sum() + REGRESSION_WEIGHT * len(regressed)), errors / len(regressed)

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


def test_the_flops_of_emus_head_are_those_of_its_product(emu_run):
  """An image that is drawn costs what one that is read does: n + 1 pairs of width 32."""
  interface = emu_run.model.interface
  features = jax.ShapeDtypeStruct((1, 17, 32), jnp.float32)
  params = jax.eval_shape(interface.init, jax.random.key(0), features)
  gradient = jax.grad(lambda params, x: interface.apply(params, x).vectors.sum())
  with jax.sharding.use_abstract_mesh(flops.ONE_CPU):
    pair = flops.pair_flops(emu_run)
    seen = flops.count(jax.make_jaxpr(gradient)(params, features))
  assert pair.codes == pair.understanding == seen + 3 * 2 * 5 * 32 * 32
