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
from lavit_jax.models.interfaces.base import RowImages
from lavit_jax.training.checkpoint import saved_settings
from lavit_jax.training.loop import train
from lavit_jax.weights.store import folder
from lavit_jax.weights.store.bundle import bundle
from lavit_jax.weights.torch import name_tables

nano.install()
TOKENIZER = nano.ROOT / 'lavit_jax/assets/tiny/language_model'


@pytest.fixture(scope='module', params=['emu', 'flamingo'])
def options(request, tmp_path_factory):
  """Of all runs: they save a checkpoint in the middle, and read a random image encoder."""
  path = tmp_path_factory.mktemp('vit')
  rng = np.random.default_rng(0)
  shapes = name_tables.module_shapes(lavit.build('nano'), ['vit'])
  vit = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), shapes)
  folder.save_params(path, 'nano', vit)
  return dict(frozen=str(path), interface=request.param, checkpoint_every=2)


@pytest.fixture(scope='module')
def finished(options, tmp_path_factory):
  """The workdir of a run, and what it printed."""
  workdir = tmp_path_factory.mktemp('run')
  with contextlib.redirect_stdout(io.StringIO()) as out:
    train(nano.config('lm', **options), workdir)
  return workdir, out.getvalue()


@pytest.fixture(scope='module')
def model(options, finished, tmp_path_factory):
  """The image encoder and the export as one checkpoint, with open gates if there are some."""
  path = tmp_path_factory.mktemp('model')
  exported = finished[0] / 'export'
  if options['interface'] == 'flamingo':
    params = folder.load_params(exported)
    blocks = params['interface']['gated']['blocks']
    blocks |= {name: np.ones_like(blocks[name]) for name in ('attn_gate', 'ff_gate')}
    settings = folder.read_settings(exported)
    exported = folder.save_params(path / 'open', 'nano', params, settings=settings)
  bundle(path / 'model', [options['frozen'], exported], TOKENIZER, 'float32')
  return Lavit.from_pretrained(path / 'model')


LINES = dict(
  emu='interface emu: 4 tokens an image, which are regressed, too, in place of codes',
  flamingo='interface flamingo: 4 vectors an image, which extra layers read, and no codes, so',
)


def test_it_trains_says_what_follows_and_exports(options, finished):
  workdir, out = finished
  name = options['interface']
  losses = [row['loss'] for row in rows(workdir)]
  assert len(losses) == 4 and np.isfinite(losses).all()
  assert LINES[name] in ' '.join(out.split())
  if name == 'emu':  # which draws
    assert all(row['loss_text_to_image'] > 0 < row['loss_regression'] for row in rows(workdir))
  else:
    assert all(row['loss_text_to_image'] is None for row in rows(workdir))  # no such pair
  assert folder.read_settings(workdir / 'export') == {'interface': {'name': name}}
  assert saved_settings(workdir) == {'interface': {'name': name}}
  assert sorted(folder.load_params(workdir / 'export', variant='nano')) == ['interface', 'llama']


@pytest.mark.usefixtures('without_flops')
def test_continued_from_the_middle_it_ends_as_the_whole_run(options, finished, tmp_path):
  shutil.copytree(finished[0] / 'checkpoints' / '2', tmp_path / 'checkpoints' / '2')
  train(nano.config('lm', **options), tmp_path)
  exports = [folder.load_params(workdir / 'export') for workdir in (finished[0], tmp_path)]
  chex.assert_trees_all_equal(*exports)
  assert rows(tmp_path) == rows(finished[0])[2:]


def test_eight_devices_give_the_losses_of_one(options, finished, tmp_path):
  mesh = dict(mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
  finish(launch('lm', tmp_path, 8, **dict(options, checkpoint_every=0), **mesh))
  one, eight = ([row['loss'] for row in rows(workdir)] for workdir in (finished[0], tmp_path))
  np.testing.assert_allclose(eight, one, rtol=1e-4)


def test_another_interface_does_not_continue_it(options, finished, tmp_path):
  name = options['interface']
  changed = nano.config('lm', **dict(options, interface='mlp'))
  with pytest.raises(UserError, match=f"trained with interface='{name}', .* has interface='mlp'"):
    train(changed, finished[0])
  start = nano.config('lm', **dict(options, interface='mlp', init_from=f'{finished[0]}/export'))
  with pytest.raises(UserError, match=f"has the interface '{name}', .* --config.interface={name}"):
    train(start, tmp_path)


def test_captions_and_answers_follow_the_vectors_of_the_interface(model):
  """Greedy: each new word is the most probable one of the whole sequence, computed anew.

  The best one alone, drawn twice, is the same; the score of a beam is that of its words.
  """
  images = np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3), np.uint8)
  modules, params = model.modules, model.params
  lengths = dict(max_new_tokens=3, min_new_tokens=3)
  captions = model.caption_outputs(images, num_beams=1, **lengths)
  question = 'What is this?'
  answers = model.answer_outputs(images, [question] * 2, num_beams=1, **lengths)
  asked = model.tokenizer.encode(prompts.question_prompt(question))
  suppressed = np.arange(modules.vocabulary.size) >= modules.vocabulary.text_size
  suppressed[2] = True  # too short to end
  slots = modules.max_visual_tokens
  llama = stacked_layers(params['llama'])

  @nano.jit
  def see(images):
    features = modules.tower.features(params['vit'], images)
    return modules.interface.apply({'params': params['interface']}, features).vectors

  @nano.jit
  def next_logits(ids, vectors, last):
    def apply(*args, **kwargs):
      return modules.llama.apply({'params': llama}, *args, **kwargs)

    embedded = apply(ids, method='embed').at[:, 1 : 1 + slots].set(vectors[:, :slots])
    extra = None
    if modules.layered_interface is not None:
      images = RowImages(vectors[:, None], jnp.zeros_like(ids))
      extra = modules.layered_interface.extra_layers(params['interface'], images)
    causal = jnp.tril(jnp.ones((1, 1, ids.shape[1], ids.shape[1]), bool))
    hidden, _ = apply(embedded, jnp.arange(ids.shape[1])[None], causal, extra=extra)
    return apply(hidden[0, last], method='logits')

  vectors = see(images)
  before = [modules.vocabulary.image_start, *[0] * slots, modules.vocabulary.image_end]

  def logits_of(prompt, row, words):
    """Logits of each of the words."""
    ids = [*before, *prompt]
    for word in words:
      padded = np.array([ids + [0] * (40 - len(ids))], np.int32)
      yield np.asarray(next_logits(padded, vectors[row : row + 1], len(ids) - 1))
      ids.append(word)

  for outputs, prompt in ((captions, []), (answers, asked)):
    for row, output in enumerate(outputs):
      for word, logits in zip(output.ids, logits_of(prompt, row, output.ids), strict=True):
        assert word == np.where(suppressed, -np.inf, logits).argmax()
  assert captions[0].score != captions[1].score  # they see their own images
  sampling = dict(do_sample=True, top_k=1, num_return_sequences=2, seed=0)
  drawn = model.answer_outputs(images, [question] * 2, **sampling, **lengths)
  assert [output.ids.tolist() for output in drawn] == [
    answers[row].ids.tolist() for row in (0, 0, 1, 1)
  ]
  beams = model.caption_outputs(images, num_beams=3, length_penalty=0.0, **lengths)
  for row, beam in enumerate(beams):
    score = 0.0
    for word, logits in zip(beam.ids, logits_of([], row, beam.ids), strict=True):
      score += float(jax.nn.log_softmax(logits)[word])
    assert beam.score == pytest.approx(score, rel=1e-4)
  assert len({tuple(output.ids) for output in (*captions, *answers)}) > 1


def stacked_layers(params):
  """The language model's parameters with one stack of layers, as in training."""
  layers = [params[f'layers_{i}'] for i in range(nano.NANO['llama']['num_layers'])]
  others = {name: tree for name, tree in params.items() if not name.startswith('layers_')}
  return dict(others, layers=jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers))


def test_what_it_cannot_do_is_one_line(options, model):
  name = options['interface']
  image = np.zeros((1, 32, 32, 3), np.uint8)
  draws = 'vectors' if name == 'emu' else 'nothing'
  limit = f"sees images by the interface '{name}', which has no codes: .*, and draws {draws}; to "
  unread = "vectors of the interface 'emu', and this checkpoint has no U-Net that reads them"
  for task in (
    lambda: model.generate(['a cat']),
    lambda: model.synthesize([[image[0], 'in the snow']]),
  ):
    with pytest.raises(UserError, match=unread if name == 'emu' else limit + 'draw'):
      task()
  with pytest.raises(UserError, match=limit + 'draw codes'):
    model.sample_codes([['a cat']])
  for task in (model.tokenize, model.reconstruct, model.select_patches):
    with pytest.raises(UserError, match=limit + 'tokenize'):
      task(image)


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
