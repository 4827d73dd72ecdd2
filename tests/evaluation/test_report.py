"""The report of a model that knows every answer, and of one that always says the same."""

import json
import types

import numpy as np
import pytest

from lavit_jax.data.emoji import corpus
from lavit_jax.errors import UserError
from lavit_jax.evaluation import report
from lavit_jax.inference.pipeline import VisualTokens

DRAWN = 16


class Oracle:
  """Looks every picture, question and text up among the held-out examples."""

  model = types.SimpleNamespace(
    variant='oracle', image_size=64, vocabulary=types.SimpleNamespace(codebook_size=8)
  )

  def __init__(self, count):
    single, scenes = (
      [corpus.examples('embedded', split, 0, count, kind) for split in report.SPLITS]
      for kind in ('single', 'scene')
    )
    self.by_image = {e.image.tobytes(): e for examples in single + scenes for e in examples}
    self.by_captions = {
      tuple(e.caption for e in examples[:DRAWN]): [e.image for e in examples[:DRAWN]]
      for examples in single
    }

  def tokenize(self, images, seed):
    return VisualTokens([np.array([1, 2])] * len(images), None, np.full(len(images), 2))

  def in_slots(self, codes):
    return np.stack(codes), None

  def in_batches(self, program, names, rows, *_):
    return np.ones((len(rows), 4, 3), np.float32)

  def caption(self, images, seed):
    return [self.by_image[image.tobytes()].caption for image in images]

  def answer(self, images, questions, seed):
    found = [{q: a for _, q, a in self.by_image[image.tobytes()].questions} for image in images]
    return [answers[question] for answers, question in zip(found, questions)]

  def generate(self, captions, **_):
    return np.stack(self.by_captions[tuple(captions)])

  def reconstruct(self, images, **_):
    return np.zeros_like(images)


class Parrot(Oracle):
  def caption(self, images, seed):
    return ['pizza'] * len(images)

  def answer(self, images, questions, seed):
    return ['no'] * len(images)

  def generate(self, captions, **_):
    return np.zeros((len(captions), 64, 64, 3), np.uint8)


def test_an_oracle_is_right_and_a_parrot_is_not(tmp_path, capsys):
  count = 24
  settings = dict(
    source='embedded', count=count, out=tmp_path / 'report.json', drawn=DRAWN, train=128
  )
  right = report.evaluate(Oracle(count), **settings)
  assert json.loads((tmp_path / 'report.json').read_text()) == json.loads(json.dumps(right))
  printed = capsys.readouterr().out
  assert all(
    name in printed
    for name in ('visual tokens', 'captions', 'answers', 'pictures', 'shuffled', 'yes/no')
  )
  wrong = report.evaluate(Parrot(count), **settings)
  for split in report.SPLITS:
    good, bad = right['splits'][split], wrong['splits'][split]
    assert good['tokens']['cosine_of_own_mean'] == pytest.approx(1)
    assert (
      good['tokens']['cosine'] == pytest.approx(1)
      and good['tokens']['tokens'] == 2
      and good['tokens']['codes'] == 2
    )
    assert (
      good['captions']['name'] == good['captions']['background'] == 1
      and bad['captions']['background'] == 0
    )
    assert {row['accuracy'] for row in good['questions'].values()} == {1.0}
    assert (
      bad['questions']['background']['accuracy'] == 0
      and 0 < bad['questions']['yes/no']['accuracy'] < 1
    )
    assert bad['questions']['all']['majority'] == good['questions']['all']['majority'] > 0
    assert (
      good['drawings']['drawn'] == good['drawings']['real']
      and good['drawings']['real']['background'] > 0.9
    )
    assert (
      good['drawings']['shuffled']['background'] < 0.6
      and bad['drawings']['drawn']['background'] < 0.6
    )


def test_no_data_set(tmp_path):
  with pytest.raises(UserError, match='no emoji data set'):
    report.evaluate(None, str(tmp_path), 8, tmp_path / 'report.json')
