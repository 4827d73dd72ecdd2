"""The FID of COCO captions on a miniature, by a model that paints its row and prompt.

The networks are those of tests/evaluation; here they are replaced by colors.
"""

import hashlib
import inspect
import json
import typing

import jax.numpy as jnp
import miniatures
import numpy as np
import pytest
from benchmark_runs import evaluate, read

from lavit_jax.apps import benchmarks
from lavit_jax.evaluation import clip_score, inception
from lavit_jax.inference.image_generation import ImageGenerationOptions
from lavit_jax.inference.pipeline import Lavit

GENERATED = [captions[0] for _, captions in miniatures.CAPTIONS]
ORDER = sorted(range(12), key=lambda i: hashlib.sha256(str(700 + i).encode()).digest())

COLORS = np.array([[1, 0], [0, 1], [0, -1]])  # gray has no second feature


class ColorScorer:
  """In place of a CLIP: prefers some rows, and checks the prompt."""

  def __init__(self, folder):
    self.folder = folder

  def score(self, images, texts):
    scores = []
    for image, text in zip(images, texts, strict=True):
      row, prompt, _ = image[0, 0]
      assert GENERATED[prompt] == text
      scores.append(row_score(row))
    return np.array(scores, np.float32)


def row_score(row):
  return (int(row) * 7 % 5) / 10 - 0.1


@pytest.fixture
def networks(monkeypatch, tmp_path, benchmark_model):
  """Replaces both networks; returns the options that name them."""
  benchmark_model.prompts = GENERATED
  monkeypatch.setattr(inception, 'NUM_FEATURES', 2)
  monkeypatch.setattr(inception, 'read_weights', lambda path: {})
  monkeypatch.setattr(
    inception,
    'extract_features',
    lambda weights, images: images.astype(jnp.float32).mean((1, 2)) @ COLORS,
  )
  monkeypatch.setattr(clip_score, 'ClipScorer', ColorScorer)
  (tmp_path / 'inception.pth').write_text('weights')
  (tmp_path / 'clip').mkdir()
  return ('--inception', tmp_path / 'inception.pth', '--clip', tmp_path / 'clip')


def distance(a, b):
  """The distance by its formula, between features [N, 2]."""
  covariances = [np.cov(x, rowvar=False) for x in (a, b)]
  roots = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]))
  return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(sum(covariances)) - 2 * roots.sum()


@pytest.mark.parametrize('protocol', ['lavit', 'standard'])
def test_distance_and_score(protocol, networks, benchmark_model, tmp_path):
  assert evaluate(tmp_path, 'coco-fid', '--protocol', protocol, *networks) == 0
  report = read(tmp_path / 'out/report.json')
  generated = []
  scores = []
  for place, index in enumerate(ORDER):
    rows = range(4 * place, 4 * place + 4) if protocol == 'lavit' else [place]
    best = max(rows, key=row_score)
    generated.append((best, index))
    scores.append(max(row_score(best), 0))
  real = np.array([(10 * index, 0) for index in ORDER], float)
  assert report['metrics']['FID'] == pytest.approx(distance(np.array(generated, float), real))
  assert report['metrics']['CLIP score'] == pytest.approx(np.mean(scores))
  assert report['count'] == (48 if protocol == 'lavit' else 12)
  assert report['measured_by']['inception'] == hashlib.sha256(b'weights').hexdigest()
  assert benchmark_model.options['num_inference_steps'] == 50
  assert ('top_k' in benchmark_model.options) == (protocol == 'lavit')


@pytest.mark.parametrize('protocol', benchmarks.PROTOCOLS)
def test_the_model_takes_the_options(protocol):
  options = benchmarks.BENCHMARKS['coco-fid'].protocols[protocol].options
  parameters = inspect.signature(Lavit.generate_outputs).parameters.keys()
  assert options.keys() <= parameters | typing.get_type_hints(ImageGenerationOptions).keys()


def test_shares_give_the_same(networks, benchmark_model, tmp_path):
  assert evaluate(tmp_path, 'coco-fid', *networks, out='whole') == 0
  for share in ('0/2', '1/2'):
    assert evaluate(tmp_path, 'coco-fid', *networks, '--shard', share) == 0
  assert read(tmp_path / 'out/report.json') == read(tmp_path / 'whole/report.json')


def test_a_few_images_are_said(networks, tmp_path, capsys):
  arguments = ('--protocol', 'standard', *networks[:2], '--limit', '3')
  assert evaluate(tmp_path, 'coco-fid', *arguments) == 0
  assert 'an FID of 3 images is far larger' in capsys.readouterr().err
  assert list(read(tmp_path / 'out/report.json')['metrics']) == ['FID']


@pytest.mark.parametrize(
  ('kept', 'error'),
  [
    (slice(2, 4), 'needs --inception FILE'),
    (slice(0, 2), 'needs --clip DIR'),
    (slice(0, 4), 'has no captions'),
  ],
)
def test_missing_inputs_are_named(kept, error, networks, benchmark_model, tmp_path, capsys):
  miniatures.coco_fid(tmp_path / 'data')
  if kept == slice(0, 4):
    path = tmp_path / 'data/captions_val2014.json'
    path.write_text(json.dumps({'annotations': []}))
  assert evaluate(tmp_path, 'coco-fid', *networks[kept]) == 2
  printed = capsys.readouterr().err
  assert error in printed
  assert printed.count('\n') == 1
  assert benchmark_model.calls == 0


def test_networks_have_no_effect_elsewhere(networks, tmp_path, capsys):
  assert evaluate(tmp_path, 'geneval', *networks[:2]) == 2
  assert '--inception has no effect with --benchmark geneval' in capsys.readouterr().err
