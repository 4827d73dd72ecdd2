"""Stage 2: the loss of packed pairs is that of the pairs one by one."""

import dataclasses

import jax
import jax.numpy as jnp
import nano
import numpy as np
import pytest

from lavit_jax.errors import UserError
from lavit_jax.models import lavit
from lavit_jax.models.packing import CHAT, IMAGE_ID
from lavit_jax.models.sequence import compact
from lavit_jax.training.stages import build_stage
from lavit_jax.training.stages.base import (
  apply_module,
  image_features,
  row_keys,
)
from lavit_jax.training.train_step import numbers

nano.install()
MODEL = lavit.build('nano')


def test_lm_draws_what_it_sees(parts, batch):
  stage = nano.run('lm').stage
  params, state = nano.init_stage(stage, parts)
  images, kept = nano.jit(lambda: stage.draw(params, parts, state, batch, jax.random.key(1)))()
  np.testing.assert_array_equal(images, batch['image'][:8])
  # Dropped patches are shaded, the others as they were.
  assert kept.shape == images.shape and 0 < (kept == images).all(-1).mean() < 1


def lm_loss(parts, batch, shards=1, **changes):
  run = nano.run('lm', **changes)
  layout = dataclasses.replace(run.layout, shards=shards)
  stage = build_stage('lm', run.options, MODEL, layout)
  params, state = nano.init_stage(stage, parts)
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


def test_a_chat_that_begins_with_its_image_is_an_image_with_its_text(parts, batch):
  _, _, before = lm_loss(parts, batch)
  is_read = np.asarray(batch['kind']) == 0
  text = np.where(is_read[:, None], np.roll(batch['text'], 1, axis=1), batch['text'])
  weight = np.asarray(batch['text_weight'])
  weight = np.where(is_read[:, None], np.roll(weight, 1, axis=1), weight)
  text[is_read, 0], weight[is_read, 0] = IMAGE_ID, 0
  changed = dict(
    batch,
    text=text,
    text_weight=weight,
    text_length=batch['text_length'] + is_read,
    kind=np.where(is_read, CHAT, batch['kind']),
  )
  _, value, metrics = lm_loss(parts, changed)
  assert np.isnan(before['loss_chat']) and np.isnan(metrics['loss_image_to_text'])
  assert metrics['loss_chat'] == pytest.approx(float(before['loss_image_to_text']), rel=1e-5)
  assert value == pytest.approx(float(before['loss']), rel=1e-5)


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
