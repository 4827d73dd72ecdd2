import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import nano
import numpy as np
import pytest

from lavit_jax.errors import UserError
from lavit_jax.models import lavit, vit
from lavit_jax.models.initialization import init_params
from lavit_jax.models.sequence import compact
from lavit_jax.models.tokenizer import l2_normalize
from lavit_jax.training import codebook
from lavit_jax.training.run import resolve_abstract
from lavit_jax.training.stages import autoencoder, build_stage
from lavit_jax.training.stages.base import (
  apply_module,
  image_features,
  initialize_params,
  row_keys,
)
from lavit_jax.training.train_step import numbers

nano.install()
MODEL = lavit.build('nano')


@pytest.fixture(scope='module')
def parts():
  """Random weights of all parts, drawn by numpy: nothing compiles."""
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    if getattr(path[-1], 'key', '') == 'scale':
      return jnp.ones(leaf.shape)
    return jnp.asarray(
      rng.normal(0, max(math.prod(leaf.shape[:-1][-3:]), 1) ** -0.5, leaf.shape), jnp.float32
    )

  parts = jax.tree_util.tree_map_with_path(
    draw, jax.eval_shape(functools.partial(init_params, MODEL), jax.random.key(0))
  )
  parts['tokenizer']['quantizer']['embedding'] = l2_normalize(
    parts['tokenizer']['quantizer']['embedding']
  )
  return parts


@pytest.fixture(scope='module')
def batch():
  rng = np.random.default_rng(0)
  length = np.array([3, 5, 2, 4, 6, 1, 4, 4], np.int32)
  text = np.where(np.arange(8) < length[:, None], rng.integers(3, 2048, (8, 8)), 0).astype(np.int32)
  text[7] = text[6]
  length[7] = length[6]  # two equal captions
  return dict(
    image=rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8),
    text=text,
    text_length=length,
    text_weight=(np.arange(8) < length[:, None]).astype(np.float32),
    kind=np.array([0, 1, 2, 0, 1, 0, 1, 2], np.int32),
  )


def build(name, **changes):
  return nano.run(name, **changes).stage


def start(stage, parts):
  """`stage.init`, of which little is computed where `parts` has it all."""
  return nano.jit(stage.init)(jax.random.key(0), parts)


def test_unknown_stage():
  config = nano.config('encoder')
  with config.unlocked():
    config.stage = 'decoder'
  with pytest.raises(UserError, match='unknown stage .decoder.'):
    resolve_abstract(config)


def test_equal_captions_are_no_negatives(batch):
  """Swapping two images changes the loss, unless their captions are equal."""
  stage = build('encoder')
  params, state = start(stage, {})
  loss = nano.jit(
    lambda image: stage.loss(params, {}, state, {**batch, 'image': image}, None, True)[0]
  )

  def swapped(a, b):
    order = np.arange(8)
    order[[a, b]] = b, a
    return float(loss(batch['image'][order]))

  value = float(loss(batch['image']))
  assert swapped(6, 7) == pytest.approx(value, rel=1e-5)
  assert swapped(5, 6) != pytest.approx(value, rel=1e-4)


def test_a_patch_must_tell_its_own_pixels_and_place(batch):
  """The linear predictions are those of the definition, patch by patch."""
  stage = build('encoder', pixel_weight=3.0, place_weight=5.0)
  params, state = start(stage, {})
  value, (_, metrics) = nano.jit(stage.loss, static_argnums=5)(params, {}, state, batch, None, True)
  assert value == pytest.approx(
    float(metrics['contrastive'] + 3 * metrics['pixel'] + 5 * metrics['place']), rel=1e-5
  )

  x = np.asarray(nano.jit(lambda: image_features(MODEL, params['vit'], batch['image']))())[:, 1:]
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
  kernel = np.asarray(params['to_pixels'])
  kernel = 0.5 * kernel / np.linalg.norm(kernel, axis=0)  # columns of length 1/2
  pixels = np.asarray(vit.preprocess(batch['image']))
  errors = []
  for i, j in itertools.product(range(4), repeat=2):
    patch = pixels[:, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8].reshape(8, -1)
    errors.append(np.square(x[:, 4 * i + j] @ kernel - patch).mean())
  assert float(metrics['pixel']) == pytest.approx(np.mean(errors), rel=1e-4)
  kernel = np.asarray(params['to_place'])
  predicted = x @ (kernel / np.linalg.norm(kernel, axis=0))
  true = np.array(list(itertools.product(np.linspace(-1, 1, 4), repeat=2)))
  assert float(metrics['place']) == pytest.approx(np.square(predicted - true).mean(), rel=1e-4)


def test_a_standardized_autoencoder_is_the_same_with_unit_latents(parts):
  images = jax.random.uniform(jax.random.key(1), (16, 16, 16, 3), minval=-1, maxval=1)
  mean, logvar = apply_module(MODEL.vae, parts['vae'], images, method='encode')
  one = jnp.float32(0.5)
  moments = autoencoder.Moments(
    one * mean.mean((0, 1, 2)), one * jnp.square(mean).mean((0, 1, 2)), one
  )
  new = autoencoder.standardize_latents(parts['vae'], moments, 0.25)
  new_mean, new_logvar = apply_module(MODEL.vae, new, images, method='encode')
  np.testing.assert_allclose(0.25 * new_mean.std((0, 1, 2)), 1, rtol=1e-3)
  np.testing.assert_allclose(new_mean.mean((0, 1, 2)), 0, atol=1e-3)
  deviation = mean.std((0, 1, 2))
  np.testing.assert_allclose(
    jnp.exp(new_logvar / 2) * 0.25 * deviation, jnp.exp(logvar / 2), rtol=1e-3
  )
  np.testing.assert_allclose(
    apply_module(MODEL.vae, new, new_mean, method='decode'),
    apply_module(MODEL.vae, parts['vae'], mean, method='decode'),
    atol=1e-4,
  )


def test_standardized_latents_fit_the_factors_of_the_vae(parts):
  settings = dict(
    scaling_factor=0.5, latents_mean=[0.3, -0.2, 0.1, 0.4], latents_std=[1.5, 0.5, 2.0, 0.8]
  )
  model = lavit.build('nano', settings=dict(vae=settings)).vae
  images = jax.random.uniform(jax.random.key(1), (16, 16, 16, 3), minval=-1, maxval=1)
  mean, _ = apply_module(model, parts['vae'], images, method='encode')
  moments = autoencoder.Moments(
    mean.mean((0, 1, 2)), jnp.square(mean).mean((0, 1, 2)), jnp.float32(1)
  )
  new = autoencoder.standardize_latents(
    parts['vae'], moments, model.scaling_factor, *model.moments()
  )
  new_mean, _ = apply_module(model, new, images, method='encode')
  np.testing.assert_allclose(model.to_unet(new_mean).mean((0, 1, 2)), 0, atol=1e-3)
  np.testing.assert_allclose(model.to_unet(new_mean).std((0, 1, 2)), 1, rtol=1e-3)
  np.testing.assert_allclose(
    apply_module(model, new, new_mean, method='decode'),
    apply_module(model, parts['vae'], mean, method='decode'),
    atol=1e-4,
  )


@pytest.fixture(scope='module')
def tokenizer(parts):
  """(stage, params, codebook, jit'd loss and gradient); quantization begins at step 1."""
  stage = build('tokenizer', tokenizer__quantize_from=1)
  without, _ = codebook.take_out(parts)  # with one in init_from: another test
  params, book = start(stage, {name: without[name] for name in ('vit', 'tokenizer', 'decoder')})
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


@pytest.fixture(scope='module')
def detokenizer(parts):
  def losses(drop):
    stage = build('detokenizer', detokenizer__drop_condition=drop)
    params, state = start(stage, parts)
    return (
      stage,
      params,
      nano.jit(
        lambda params, batch: stage.loss(params, parts, state, batch, jax.random.key(1), True)[0]
      ),
    )

  return losses


def test_the_condition_is_dropped(detokenizer, batch):
  """The context head matters only where the condition is not dropped."""
  for drop, matters in ((1.0, False), (0.0, True)):
    _, params, loss = detokenizer(drop)
    head = jax.tree.map(jnp.zeros_like, params['decoder']['context_proj_0'])
    other = {**params, 'decoder': {**params['decoder'], 'context_proj_0': head}}
    assert (loss(params, batch) != loss(other, batch)) == matters


@pytest.mark.parametrize('kind', ['epsilon', 'v_prediction', 'sample'])
def test_the_detokenizer_learns_the_target_of_the_scheduler(parts, batch, kind):
  """The loss of a U-Net that gives zeros is the square of the target, under the settings."""
  from diffusers import DDIMScheduler

  vae = dict(
    scaling_factor=0.5, latents_mean=[0.3, -0.2, 0.1, 0.4], latents_std=[1.5, 0.5, 2.0, 0.8]
  )
  scheduler = dict(
    prediction_type=kind,
    beta_schedule='linear',
    beta_start=1e-4,
    beta_end=0.02,
    num_train_timesteps=50,
    rescale_betas_zero_snr=True,
  )
  run = nano.run('detokenizer')
  model = lavit.build('nano', settings=dict(vae=vae, scheduler=scheduler))
  stage = build_stage('detokenizer', run.options, model, run.layout)
  params, state = start(
    stage, {name: parts[name] for name in ('unet', 'decoder', 'uncond_embeddings')}
  )
  params['unet'] = {
    **params['unet'],
    'conv_out': jax.tree.map(jnp.zeros_like, params['unet']['conv_out']),
  }
  frozen = {name: parts[name] for name in ('vit', 'tokenizer', 'vae')}
  value, _ = nano.jit(stage.loss, static_argnums=5)(
    params, frozen, state, batch, jax.random.key(5), True
  )

  rows = jnp.arange(8)
  keys = [
    jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
    for key in jax.random.split(jax.random.key(5), 5)
  ]
  normal = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))
  mean, logvar = apply_module(
    MODEL.vae, parts['vae'], batch['image'] / np.float32(127.5) - 1, method='encode'
  )
  latents = np.asarray(mean + jnp.exp(logvar / 2) * normal(keys[0]), np.float64)
  # As StableDiffusionXLImg2ImgPipeline.
  latents = (latents - vae['latents_mean']) * vae['scaling_factor'] / vae['latents_std']
  t = np.asarray(jax.vmap(lambda key: jax.random.randint(key, (), 0, 50))(keys[3]))
  noise = np.asarray(normal(keys[4]), np.float64)
  alpha = DDIMScheduler(**scheduler).alphas_cumprod.double().numpy()[t][:, None, None, None]
  target = dict(
    epsilon=noise, v_prediction=alpha**0.5 * noise - (1 - alpha) ** 0.5 * latents, sample=latents
  )[kind]
  assert float(value) == pytest.approx(np.square(target).mean(), rel=1e-4)


def test_detokenizer_draws(parts, batch):
  stage = build('detokenizer')
  params, state = start(stage, parts)
  rows = nano.jit(lambda: stage.draw(params, parts, state, batch, jax.random.key(1), num_steps=2))()
  assert [(row.shape, row.dtype) for row in rows] == [((8, 32, 32, 3), jnp.uint8)] * 3


def test_lm_draws_what_it_sees(parts, batch):
  stage = build('lm')
  params, state = start(stage, parts)
  images, kept = nano.jit(lambda: stage.draw(params, parts, state, batch, jax.random.key(1)))()
  np.testing.assert_array_equal(images, batch['image'][:8])
  # Dropped patches are shaded, the others as they were.
  assert kept.shape == images.shape and 0 < (kept == images).all(-1).mean() < 1


def lm_loss(parts, batch, shards=1, **changes):
  run = nano.run('lm', **changes)
  layout = dataclasses.replace(run.layout, shards=shards)
  stage = build_stage('lm', run.options, MODEL, layout)
  params, state = start(stage, parts)
  value, (_, metrics) = nano.jit(
    lambda params, batch: stage.loss(params, parts, state, batch, jax.random.key(1), True)
  )(params, batch)
  return params, value, numbers(metrics)


def test_lm_loss_is_that_of_the_pairs_one_by_one(parts, batch):
  params, value, metrics = lm_loss({k: parts[k] for k in ('vit', 'tokenizer')}, batch)
  assert metrics['overflow'] == 0
  np.testing.assert_array_equal(
    params['understanding']['merger']['norm']['scale'],
    parts['tokenizer']['merger']['norm']['scale'],
  )

  @nano.jit
  def tokens(images):
    x = image_features(MODEL, parts['vit'], images)[:, 1:]
    out = apply_module(MODEL.tokenizer, parts['tokenizer'], x, row_keys(jax.random.key(1), {}, 8))
    return *compact(
      apply_module(MODEL.understanding, params['understanding'], x, out.keep), out.keep
    ), compact(out.ids, out.keep)[0]

  visual, mask, codes = tokens(batch['image'])
  vocabulary = MODEL.vocabulary

  @nano.jit
  def costs(ids, continuous):
    """-log p of ids[1:]; where `continuous` f32[S, H] is not nan, it replaces the embeddings.

    S is padded, which causality ignores.
    """
    embedded = apply_module(MODEL.llama, params['llama'], ids[None], method='embed')
    embedded = jnp.where(jnp.isnan(continuous), embedded, continuous)
    causal = jnp.tril(jnp.ones((1, 1, len(ids), len(ids)), bool))
    hidden, _ = apply_module(
      MODEL.llama, params['llama'], embedded, jnp.arange(len(ids))[None], causal
    )
    log_probs = jax.nn.log_softmax(
      apply_module(MODEL.llama, params['llama'], hidden, method='logits')
    )
    return -log_probs[0, jnp.arange(len(ids) - 1), ids[1:]]

  total = {0: [0.0, 0.0], 1: [0.0, 0.0], 2: [0.0, 0.0]}
  for i in range(8):
    text = list(batch['text'][i, : batch['text_length'][i]])
    n = int(mask[i].sum())
    image = [
      vocabulary.image_start,
      *(int(c) + vocabulary.code_offset for c in codes[i, :n]),
      vocabulary.image_end,
    ]
    kind = int(batch['kind'][i])
    ids, first = {
      0: (image + text + [2], n + 2),
      1: (text + image + [2], 1),
      2: ([1] + text + [2], 1),
    }[kind]
    continuous = np.full((32, 32), np.nan, np.float32)
    if kind == 0:
      continuous[1 : n + 1] = visual[i, :n]
    nll = np.asarray(costs(jnp.array(ids + [0] * (32 - len(ids))), continuous))[
      first - 1 : len(ids) - 1
    ]
    total[kind][0] += float(nll.sum())
    total[kind][1] += len(nll)
  for kind, name in enumerate(('image_to_text', 'text_to_image', 'text_only')):
    assert metrics[f'loss_{name}'] == pytest.approx(total[kind][0] / total[kind][1], rel=1e-4)
  assert value == pytest.approx(
    sum(t[0] for t in total.values()) / sum(t[1] for t in total.values()), rel=1e-4
  )


def test_lm_loss_does_not_depend_on_shards_or_chunks(parts, batch):
  reference = lm_loss(parts, batch)[1]
  assert lm_loss(parts, batch, shards=4, lm__loss_chunks=4)[1] == pytest.approx(
    float(reference), rel=1e-5
  )


def test_lm_counts_what_overflows(parts, batch):
  metrics = lm_loss(parts, batch, lm__num_rows=1, lm__row_length=32)[2]
  assert metrics['overflow'] > 0 and metrics['packed_share'] > 0.3


@pytest.mark.parametrize(
  'changes, message',
  [(dict(lm__num_rows=6), 'num_rows=6'), (dict(lm__loss_chunks=5), 'loss_chunks=5')],
)
def test_lm_sizes_that_do_not_divide(changes, message):
  with pytest.raises(UserError, match=message):
    run = nano.run('lm', **changes)
    build_stage('lm', run.options, MODEL, dataclasses.replace(run.layout, shards=4))


def test_loaded_params_must_fit_but_a_vocabulary_may_grow():
  fresh = {
    'llama': {
      'embedding': jnp.zeros((5, 2)),
      'head': jnp.zeros((2, 5)),
      'norm': {'scale': jnp.zeros(2)},
    }
  }
  loaded = {
    'llama': {
      'embedding': jnp.ones((3, 2)),
      'head': jnp.ones((2, 3)),
      'norm': {'scale': jnp.ones(2)},
    },
    'other': {},
  }
  grown = initialize_params(fresh, loaded)['llama']
  np.testing.assert_array_equal(grown['embedding'][:, 0], [1, 1, 1, 0, 0])
  np.testing.assert_array_equal(grown['head'][0], [1, 1, 1, 0, 0])
  with pytest.raises(UserError, match='norm/scale: the given weights are'):
    initialize_params(fresh, {'llama': {**loaded['llama'], 'norm': {'scale': jnp.ones(1)}}})
  with pytest.raises(UserError, match="missing .'head'.*unexpected .'foot'"):
    initialize_params(
      fresh,
      {
        'llama': {
          'embedding': loaded['llama']['embedding'],
          'foot': jnp.ones(1),
          'norm': loaded['llama']['norm'],
        }
      },
    )
