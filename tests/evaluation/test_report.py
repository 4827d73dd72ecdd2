"""Reports of a model that knows every answer, and of one that always gives the same."""

import json
import types

import numpy as np
import pytest

from lavit_jax.data.emoji import corpus
from lavit_jax.errors import UserError
from lavit_jax.evaluation import report
from lavit_jax.inference.outputs import PatchSelection, VisualTokens

DRAWN = 16


SEEDS = {'train': report._TRAIN_SEED, 'heldout/pair': 0, 'heldout/concept': 0}  # of the sample


class Oracle:
  """Looks up every image, question and caption among the held-out examples."""

  modules = types.SimpleNamespace(
    variant='oracle',
    image_size=64,
    vocabulary=types.SimpleNamespace(codebook_size=8),
    interface=None,
  )

  def __init__(self, count):
    self.by_image = {}
    self.by_captions = {}
    for split, seed in SEEDS.items():
      single = corpus.examples('embedded', split, seed, count, 'single')
      scenes = corpus.examples('embedded', split, seed, count, 'scene')
      for example in single + scenes:
        self.by_image[example.image.tobytes()] = example
      captions = tuple(example.caption for example in single[:DRAWN])
      self.by_captions[captions] = [example.image for example in single[:DRAWN]]

  def tokenize(self, images, seed):
    keep = np.tile([True, True, False, False], (len(images), 1))
    return VisualTokens([np.array([1, 2])] * len(images), keep, np.full(len(images), 2))

  def pad_codes(self, codes):
    return np.stack(codes), None

  def select_patches(self, images):
    keep = np.ones((len(images), 4), bool)
    return PatchSelection(np.full((len(images), 4), 0.5, np.float32), keep, keep.sum(-1))

  def run_batches(self, program, names, arrays, *_):
    return np.ones((len(arrays), 4, 3), np.float32)

  def caption(self, images, seed):
    return [self.by_image[image.tobytes()].caption for image in images]

  def answer(self, images, questions, seed):
    answers = []
    for image, question in zip(images, questions, strict=True):
      example = self.by_image[image.tobytes()]
      answers.append({q: a for _, q, a in example.questions}[question])
    return answers

  def generate(self, captions, **_):
    return np.stack(self.by_captions[tuple(captions)])

  def reconstruct(self, images, **_):
    return np.zeros_like(images)


class Parrot(Oracle):
  """Gives the same caption, answer and image for every input."""

  def caption(self, images, seed):
    return ['pizza'] * len(images)

  def answer(self, images, questions, seed):
    return ['no'] * len(images)

  def generate(self, captions, **_):
    return np.zeros((len(captions), 64, 64, 3), np.uint8)


class Reader(Oracle):
  """Sees images by an interface without codes, and so only captions and answers."""

  modules = types.SimpleNamespace(
    **vars(Oracle.modules) | dict(interface='a module', interface_name='mlp')
  )
  tokenize = select_patches = run_batches = generate = reconstruct = None


def test_what_a_model_without_codes_cannot_do_is_left_out(tmp_path, capsys):
  out = tmp_path / 'report.json'
  written = report.evaluate(Reader(8), 'embedded', 8, out, drawn=4, train=32)
  assert (written['interface'], written['drawn']) == ('mlp', 0)
  for measures in written['splits'].values():
    assert list(measures) == ['captions', 'questions']
    assert measures['captions']['name'] == 1
    assert measures['questions']['all']['accuracy'] == 1
  printed = capsys.readouterr().out
  assert 'captions' in printed and 'answers' in printed
  assert 'visual tokens' not in printed and 'shuffled' not in printed


def test_an_oracle_is_right_and_a_parrot_is_not(tmp_path, capsys):
  count = 24
  options = dict(
    source='embedded', count=count, out=tmp_path / 'report.json', drawn=DRAWN, train=128
  )
  oracle = report.evaluate(Oracle(count), **options)
  assert json.loads((tmp_path / 'report.json').read_text()) == json.loads(json.dumps(oracle))
  printed = capsys.readouterr().out
  for name in ('visual tokens', 'selection', 'captions', 'answers', 'images', 'shuffled', 'yes/no'):
    assert name in printed
  parrot = report.evaluate(Parrot(count), **options)
  assert oracle['splits'].keys() == SEEDS.keys()
  for split in SEEDS:
    good = oracle['splits'][split]
    bad = parrot['splits'][split]
    assert good['tokens']['cosine_of_own_mean'] == pytest.approx(1)
    assert good['tokens']['cosine'] == pytest.approx(1)
    assert good['tokens']['tokens'] == good['tokens']['codes'] == 2
    assert good['tokens']['distinct'] == 2
    assert good['selection']['probability_ratio'] == 1
    assert good['selection']['most_probable_object'] == 1
    assert good['selection']['count_std_ratio'] == good['selection']['correlation_sampled'] == 0
    assert good['captions']['name'] == good['captions']['background'] == 1
    assert bad['captions']['background'] == 0
    assert {values['accuracy'] for values in good['questions'].values()} == {1.0}
    assert bad['questions']['background']['accuracy'] == 0
    assert 0 < bad['questions']['yes/no']['accuracy'] < 1
    assert bad['questions']['all']['majority'] == good['questions']['all']['majority'] > 0
    assert good['drawings']['drawn'] == good['drawings']['real']
    assert good['drawings']['real']['background'] > 0.9
    assert good['drawings']['shuffled']['background'] < 0.6
    assert bad['drawings']['drawn']['background'] < 0.6


def test_no_data_set(tmp_path):
  with pytest.raises(UserError, match='no emoji data set'):
    report.evaluate(None, str(tmp_path), 8, tmp_path / 'report.json')
