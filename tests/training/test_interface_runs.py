"""A language model with another interface as users have it: trained, continued, captioning."""

import contextlib
import io
import shutil

import chex
import jax
import jax.numpy as jnp
import nano
import numpy as np
import pytest
from nano import finish, launch, rows

from lavit_jax.data import prompts
from lavit_jax.errors import UserError
from lavit_jax.inference.pipeline import Lavit
from lavit_jax.models import lavit
from lavit_jax.training.checkpoint import saved_settings
from lavit_jax.training.loop import train
from lavit_jax.weights.store import folder
from lavit_jax.weights.store.bundle import bundle
from lavit_jax.weights.torch import name_tables
from lavit_jax.weights.torch.convert import plan_conversion

nano.install()
TOKENIZER = nano.ROOT / 'lavit_jax/assets/tiny/language_model'


@pytest.fixture(scope='module')
def options(tmp_path_factory):
  """Of all runs: they save a checkpoint in the middle, and read a random image encoder."""
  path = tmp_path_factory.mktemp('vit')
  rng = np.random.default_rng(0)
  shapes = name_tables.module_shapes(lavit.build('nano'), ['vit'])
  vit = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), shapes)
  folder.save_params(path, 'nano', vit)
  return dict(frozen=str(path), interface='qformer', checkpoint_every=2)


@pytest.fixture(scope='module')
def finished(options, tmp_path_factory):
  """The workdir of a run, and what it printed."""
  workdir = tmp_path_factory.mktemp('run')
  with contextlib.redirect_stdout(io.StringIO()) as out:
    train(nano.config('lm', **options), workdir)
  return workdir, out.getvalue()


@pytest.fixture(scope='module')
def model(options, finished, tmp_path_factory):
  """The image encoder and the export as one checkpoint."""
  path = tmp_path_factory.mktemp('model')
  bundle(path, [options['frozen'], finished[0] / 'export'], TOKENIZER, 'float32')
  return Lavit.from_pretrained(path)


def test_it_trains_says_what_follows_and_exports(finished):
  workdir, out = finished
  losses = [row['loss'] for row in rows(workdir)]
  assert len(losses) == 4 and np.isfinite(losses).all()
  line = 'interface qformer: 4 tokens an image, and no codes, so no image is drawn'
  assert line in ' '.join(out.split())
  assert all(row['loss_text_to_image'] is None for row in rows(workdir))  # no such pair
  assert folder.read_settings(workdir / 'export') == {'interface': {'name': 'qformer'}}
  assert saved_settings(workdir) == {'interface': {'name': 'qformer'}}
  assert sorted(folder.load_params(workdir / 'export', variant='nano')) == ['interface', 'llama']


def test_continued_from_the_middle_it_ends_as_the_whole_run(options, finished, tmp_path):
  shutil.copytree(finished[0] / 'checkpoints' / '2', tmp_path / 'checkpoints' / '2')
  train(nano.config('lm', **options), tmp_path)
  exports = [folder.load_params(workdir / 'export') for workdir in (finished[0], tmp_path)]
  chex.assert_trees_all_equal(*exports)
  assert rows(tmp_path) == rows(finished[0])[2:]


def test_eight_devices_give_the_losses_of_one(options, finished, tmp_path):
  mesh = dict(mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
  finish(launch('lm', tmp_path, 8, **options, **mesh))
  one, eight = ([row['loss'] for row in rows(workdir)] for workdir in (finished[0], tmp_path))
  np.testing.assert_allclose(eight, one, rtol=1e-4)


def test_another_interface_does_not_continue_it(options, finished, tmp_path):
  changed = nano.config('lm', **dict(options, interface='mlp'))
  with pytest.raises(UserError, match="trained with interface='qformer', .* has interface='mlp'"):
    train(changed, finished[0])
  start = nano.config('lm', **dict(options, interface='mlp', init_from=f'{finished[0]}/export'))
  with pytest.raises(UserError, match="has the interface 'qformer', .* --config.interface=qformer"):
    train(start, tmp_path)


def test_captions_and_answers_follow_the_vectors_of_the_interface(model):
  """Greedy: each new word is the most probable one of the whole sequence, computed anew."""
  images = np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3), np.uint8)
  modules, params = model.modules, model.params
  options = dict(num_beams=1, max_new_tokens=3, min_new_tokens=3)
  captions = model.caption_outputs(images, **options)
  question = 'What is this?'
  answers = model.answer_outputs(images, [question] * 2, **options)
  asked = model.tokenizer.encode(prompts.question_prompt(question))
  is_text = np.arange(modules.vocabulary.size) < modules.vocabulary.text_size
  llama = stacked_layers(params['llama'])

  @nano.jit
  def see(images):
    features = modules.tower.features(params['vit'], images)
    return modules.interface.apply({'params': params['interface']}, features).vectors

  @nano.jit
  def next_word(ids, vectors, last):
    def apply(*args, **kwargs):
      return modules.llama.apply({'params': llama}, *args, **kwargs)

    embedded = apply(ids, method='embed').at[:, 1:5].set(vectors)
    causal = jnp.tril(jnp.ones((1, 1, ids.shape[1], ids.shape[1]), bool))
    hidden, _ = apply(embedded, jnp.arange(ids.shape[1])[None], causal)
    logits = apply(hidden[:, last], method='logits')
    return jnp.where(is_text & (np.arange(len(is_text)) != 2), logits, -jnp.inf).argmax(-1)

  vectors = see(images)
  before = [modules.vocabulary.image_start, *[0] * 4, modules.vocabulary.image_end]
  for outputs, prompt in ((captions, []), (answers, asked)):
    for row, output in enumerate(outputs):
      ids = [*before, *prompt]
      for word in output.ids:
        padded = np.array([ids + [0] * (40 - len(ids))], np.int32)
        assert word == next_word(padded, vectors[row : row + 1], len(ids) - 1)[0]
        ids.append(word)
  assert len({tuple(output.ids) for output in (*captions, *answers)}) > 1


def stacked_layers(params):
  """The language model's parameters with one stack of layers, as in training."""
  layers = [params[f'layers_{i}'] for i in range(nano.NANO['llama']['num_layers'])]
  others = {name: tree for name, tree in params.items() if not name.startswith('layers_')}
  return dict(others, layers=jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers))


def test_what_it_cannot_do_is_one_line(model, finished, tmp_path):
  image = np.zeros((1, 32, 32, 3), np.uint8)
  limit = "sees images by the interface 'qformer', which has no codes: .*, and draws nothing; to "
  for task in (
    lambda: model.generate(['a cat']),
    lambda: model.synthesize([[image[0], 'in the snow']]),
    lambda: model.sample_codes([['a cat']]),
  ):
    with pytest.raises(UserError, match=limit + 'draw'):
      task()
  for task in (model.tokenize, model.reconstruct, model.select_patches):
    with pytest.raises(UserError, match=limit + 'tokenize'):
      task(image)
  with pytest.raises(UserError, match="has the interface 'qformer', for which a LaVIT folder has"):
    plan_conversion(finished[0] / 'export', tmp_path / 'torch')


def test_a_bundle_has_the_interface_of_its_last_source(finished, tmp_path):
  rng = np.random.default_rng(0)
  shapes = name_tables.module_shapes(lavit.build('nano'), ['understanding'])
  usual = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
  folder.save_params(tmp_path / 'usual', 'nano', usual)
  other = finished[0] / 'export'
  for name, sources, modules in (
    ('a', [tmp_path / 'usual', other], {'interface', 'llama'}),
    ('b', [other, tmp_path / 'usual'], {'understanding', 'llama'}),
  ):
    result = bundle(tmp_path / name, sources, TOKENIZER, 'float32')
    assert set(folder.read_config(result)['parts']) == modules
    assert ('interface' in folder.read_settings(result)) == ('interface' in modules)
