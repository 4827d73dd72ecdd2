"""The Q-Former's first stage: how captions are read, the sum of its losses, and what it exports."""

import chex
import jax
import jax.numpy as jnp
import nano
import numpy as np
import pytest

from lavit_jax.errors import UserError
from lavit_jax.training.loop import train
from lavit_jax.training.parameters import load_params
from lavit_jax.training.run import resolve
from lavit_jax.training.stages.qformer import mark_captions
from lavit_jax.weights.store import folder

nano.install()


@pytest.fixture(scope='module')
def encoder(parts, tmp_path_factory):
  """The folder of an image encoder."""
  path = tmp_path_factory.mktemp('vit')
  folder.save_params(path, 'nano', {'vit': jax.tree.map(np.asarray, parts['vit'])})
  return path


def test_captions_have_their_begin_and_end():
  text, mask = mark_captions(jnp.array([[7, 8, 0], [5, 6, 9], [0, 0, 0]]), jnp.array([2, 3, 0]))
  np.testing.assert_array_equal(text, [[1, 7, 8, 2, 0], [1, 5, 6, 9, 2], [1, 2, 0, 0, 0]])
  np.testing.assert_array_equal(mask.sum(1), [4, 5, 2])
  assert bool((mask == (jnp.arange(5) < mask.sum(1, keepdims=True))).all())


def test_the_loss_is_the_sum_of_three_and_trains_every_array(parts, batch):
  run = nano.run('qformer', qformer__dropout_rate=0.0)
  params, state = nano.init_stage(run.stage, {'vit': parts['vit']})

  @nano.jit
  def step(params):
    def loss(params):
      return run.stage.loss(params, {'vit': parts['vit']}, state, batch, jax.random.key(1), True)

    return jax.value_and_grad(loss, has_aux=True)(params)

  (value, (_, metrics)), gradient = step(params)
  terms = [metrics[name] for name in ('contrastive', 'matching', 'captioning')]
  np.testing.assert_allclose(value, sum(terms), rtol=1e-6)
  # Fresh weights tell nothing: two classes, of which one in three is a pair; V words.
  assert abs(metrics['matching'] - np.log(2)) < 0.1
  assert abs(metrics['captioning'] - np.log(run.model.vocabulary.text_size + 1)) < 0.5
  zero = [
    name
    for name, leaf in jax.tree_util.tree_leaves_with_path(gradient)
    if not np.abs(leaf).max() > 0
  ]
  assert not zero


@pytest.mark.usefixtures('without_flops')
def test_the_export_starts_the_interface_of_the_language_model(encoder, tmp_path):
  first = tmp_path / 'first'
  train(nano.config('qformer', frozen=str(encoder), num_steps=2), first)
  exported = folder.load_params(first / 'export')
  assert list(exported) == ['interface']
  assert folder.read_settings(first / 'export') == {'interface': {'name': 'qformer'}}

  options = dict(interface='qformer', frozen=str(encoder), init_from=str(first / 'export'))
  run = resolve(nano.config('lm', **options), tmp_path / 'second')
  loaded = load_params(run.variant, run.folders, run.mesh)
  params, _ = nano.init_stage(run.stage, loaded)
  chex.assert_trees_all_equal(params['interface'], exported['interface'])


def test_all_texts_are_captions():
  with pytest.raises(UserError, match='^data.shares.text=0.5: stage qformer learns .*text=0$'):
    nano.run('qformer', data__shares__text=0.5)
  source = {'format': 'tars', 'path': 'a'}
  for use, is_refused in (('', False), ('caption', False), ('draw', True), ('text', True)):
    options = dict(data__sources=(dict(source, use=use),), data__shards=1)
    if not is_refused:
      nano.run('qformer', **options)
      continue
    with pytest.raises(UserError, match=rf"^data.sources\[0\] has use '{use}': stage qformer"):
      nano.run('qformer', **options)


def test_one_pair_has_no_negatives():
  with pytest.raises(UserError, match='^batch_size=1: the negatives of a pair are the others'):
    nano.run('qformer', batch_size=1)
  with pytest.raises(UserError, match='^accumulate=2: stage qformer learns from whole batches'):
    nano.run('qformer', accumulate=2)
