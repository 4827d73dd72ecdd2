"""Settings of a checkpoint (models/settings.py) in a training: computed with, kept from leg to leg, and exported."""

import math

import jax
import nano
import pytest

from lavit_jax.errors import UserError
from lavit_jax.models import lavit
from lavit_jax.models.initial import initial_parts
from lavit_jax.porting import folder
from lavit_jax.training.loop import checkpoint_settings, train

nano.install()

# Hidden states over this are zeros, and so are all logits: the loss is that of guessing.
FLAT = {'llama': dict(rms_norm_eps=1e20, rope_theta=1e6, max_position_embeddings=512)}


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
  """Folders: `frozen` with what the stage lm needs, `flat` with a language model and settings, `plain` without."""
  where = tmp_path_factory.mktemp('sources')
  parts = initial_parts(lavit.build('nano'), jax.random.key(0), ('vit', 'tokenizer', 'llama'))
  llama = dict(llama=parts.pop('llama'))
  llama['llama']['head'] = 100 * llama['llama']['head']  # far from guessing
  folder.save_parts(where / 'frozen', 'nano', parts)
  folder.save_parts(where / 'plain', 'nano', llama)
  folder.save_parts(where / 'flat', 'nano', llama, settings=FLAT)
  return where


def lm(sources, start: str, **changes):
  return nano.config('lm', frozen=str(sources / 'frozen'), init_from=start, **changes)


def test_two_folders_that_disagree_are_told(sources, tmp_path):
  both = f'{sources}/plain,{sources}/flat'
  message = r'plain has rope_theta=10000.0 of llama, and .*flat has rope_theta=1000000.0; name one of the two'
  with pytest.raises(UserError, match=message):
    checkpoint_settings(lm(sources, both), tmp_path)
  assert checkpoint_settings(lm(sources, f'{sources}/flat'), tmp_path) == FLAT
  assert checkpoint_settings(lm(sources, f'{sources}/plain'), tmp_path) == {}
  assert checkpoint_settings(nano.config('encoder'), tmp_path) == {}


@pytest.mark.slow
def test_a_training_computes_with_them_and_keeps_them(sources, tmp_path):
  options = dict(checkpoint_every=1, optim__learning_rate=1e-30, lm__image_loss=False)
  train(lm(sources, f'{sources}/flat', num_steps=1, **options), tmp_path / 'run')
  train(lm(sources, '', num_steps=2, **options), tmp_path / 'run')  # goes on without the folder
  guessing = math.log(lavit.build('nano').vocabulary.size)
  losses = [row['loss'] for row in nano.rows(tmp_path / 'run') if 'loss' in row]
  assert losses == pytest.approx([guessing] * 2, rel=1e-5)
  assert folder.read_settings(tmp_path / 'run' / 'export') == FLAT

  train(lm(sources, f'{sources}/plain', num_steps=1, **options), tmp_path / 'other')
  assert nano.rows(tmp_path / 'other')[0]['loss'] > 1.5 * guessing
  with pytest.raises(UserError, match='was trained with rope_theta=1000000.0 of llama, and the folders of this run'):
    train(lm(sources, f'{sources}/plain', num_steps=3, **options), tmp_path / 'run')
