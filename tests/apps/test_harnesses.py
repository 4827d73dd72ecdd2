"""Harnesses of others: what they ask reaches the model, and their own packages run a made-up task.

The packages are not among the pinned ones; with them in the environment, the last tests run:

    pip install lmms-eval==0.7.3 ms-vlmeval==0.0.20
"""

import importlib
import json

import numpy as np
import pytest
from PIL import Image

from lavit_jax.apps.harnesses.requests import Request, Responder
from lavit_jax.errors import UserError

TASK = """
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
task: made_up
test_split: test
output_type: generate_until
doc_to_visual: !function made_up.images
doc_to_text: question
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 8
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
FUNCTIONS = """
from PIL import Image

def images(doc):
  return [Image.new('RGB', (8, 8), (doc['level'],) * 3)]
"""


class Model:
  """Answers with the level of the image and the question, and keeps the calls."""

  def __init__(self):
    self.calls = []

  def answer(self, images, questions, seed, **options):
    self.calls.append((len(questions), options))
    return [f'{level(image)} {text}' for image, text in zip(images, questions, strict=True)]

  def caption(self, images, prompt, seed, **options):
    self.calls.append((len(images), options))
    return [f'{prompt} {level(image)}' for image in images]


def level(image):
  image = image if isinstance(image, Image.Image) else Image.open(image)
  return int(np.asarray(image).mean())


def gray(value):
  return Image.new('RGB', (8, 8), (value,) * 3)


def test_requests_of_the_same_options_are_answered_together():
  model = Model()
  options = [{'max_new_tokens': 4}, {'max_new_tokens': 9, 'until': ['\n']}, {'max_new_tokens': 4}]
  requests = [Request([gray(i)], f'q{i}', options[i % 3]) for i in range(7)]
  texts = Responder(model, 'answer', batch_size=2)(requests)
  assert texts == [f'{i} q{i}' for i in range(7)]
  greedy = {'min_new_tokens': 1, 'num_beams': 1, 'do_sample': False}
  assert [count for count, _ in model.calls] == [2, 2, 1, 2]
  assert model.calls[0][1] == greedy | {'max_new_tokens': 4}
  assert model.calls[3][1] == greedy | {'max_new_tokens': 9}


@pytest.mark.parametrize(
  ('options', 'expected'),
  [
    ({}, {'do_sample': False, 'max_new_tokens': 64}),
    ({'temperature': 0, 'top_p': 0.9}, {'do_sample': False}),
    ({'temperature': 0.5}, {'do_sample': True, 'temperature': 0.5}),
    ({'do_sample': False, 'temperature': 1.0, 'top_p': None}, {'do_sample': False}),
    ({'num_beams': 3}, {'num_beams': 3}),
  ],
)
def test_options(options, expected):
  model = Model()
  assert Responder(model, 'caption')([Request([gray(5)], 'a', options)]) == ['a 5']
  (_, passed), *_ = model.calls
  assert passed | expected == passed
  assert ('temperature' in passed) == passed['do_sample']


def test_captions_with_the_same_prompt_are_computed_together():
  model = Model()
  requests = [Request([gray(i)], 'ab'[i % 2]) for i in range(6)]
  assert Responder(model, 'caption')(requests) == ['a 0', 'b 1', 'a 2', 'b 3', 'a 4', 'b 5']
  assert [count for count, _ in model.calls] == [3, 3]


@pytest.mark.parametrize('count', [0, 2])
def test_one_image_is_needed(count):
  with pytest.raises(UserError, match=f'has {count} images'):
    Responder(Model(), 'answer')([Request([gray(1)] * count, 'q')])


def test_an_unknown_task_is_refused():
  with pytest.raises(UserError, match='answer, caption'):
    Responder(Model(), 'chat')


@pytest.fixture
def loaded(monkeypatch):
  """The model that adapters open."""
  from lavit_jax.inference.pipeline import Lavit

  model = Model()
  monkeypatch.setattr(Lavit, 'from_pretrained', lambda folder, **options: model)
  return model


@pytest.mark.slow
def test_lmms_eval(loaded, tmp_path):
  """Its evaluator finds the model by its name, and scores a task from a file."""
  evaluator = pytest.importorskip('lmms_eval.evaluator', reason='no lmms-eval')
  from lmms_eval.tasks import TaskManager

  lines = [{'question': 'q', 'level': i, 'answer': f'{min(i, 2)} q'} for i in range(4)]
  (tmp_path / 'data.json').write_text('\n'.join(json.dumps(line) for line in lines))
  (tmp_path / 'made_up.yaml').write_text(TASK.format(file=tmp_path / 'data.json'))
  (tmp_path / 'made_up.py').write_text(FUNCTIONS)
  results = evaluator.simple_evaluate(
    model='lavit',
    model_args='folder=x',
    tasks=['made_up'],
    batch_size=2,
    task_manager=TaskManager(include_path=str(tmp_path)),
  )
  assert results['results']['made_up']['exact_match,none'] == 0.75
  assert loaded.calls[0][1]['max_new_tokens'] == 8


@pytest.mark.slow
def test_vlmevalkit(loaded, tmp_path):
  """Its `generate`, by which it asks all models, on a message of its form."""
  pytest.importorskip('vlmeval', reason='no ms-vlmeval')
  adapter = importlib.import_module('lavit_jax.apps.harnesses.vlmevalkit')
  gray(7).save(tmp_path / '7.png')
  model = adapter.LavitModel('x', max_new_tokens=5)
  message = [
    {'type': 'image', 'value': str(tmp_path / '7.png')},
    {'type': 'text', 'value': 'What is it?'},
  ]
  assert model.generate(message, dataset='made_up') == '7 What is it?'
  assert loaded.calls[0][1]['max_new_tokens'] == 5
