"""The benchmarks of captions on miniatures: files, results, and pycocoevalcap's own numbers."""

import contextlib
import io

import miniatures
import numpy as np
import pytest
from benchmark_runs import evaluate, read

from lavit_jax.evaluation import caption_metrics

pytest.importorskip('pycocoevalcap', reason="no pycocoevalcap; pip install -e '.[evaluate]'")
needs_java = pytest.mark.skipif(
  caption_metrics.java_version() is None, reason='no java; apt install default-jre-headless'
)
SAID = [caption for caption, _ in miniatures.CAPTIONS]


@pytest.fixture
def no_java(monkeypatch):
  monkeypatch.setattr(caption_metrics, 'java_version', lambda: None)


class NoScorer:
  """In place of a scorer that takes long to start, or would download."""

  def compute_score(self, references, candidates):
    return 0.0, [0.0] * len(references)

  def method(self):
    return 'none'


def official(truth, results, monkeypatch):
  """What pycocoevalcap computes from two files in COCO's form, without SPICE."""
  from pycocoevalcap import eval as package
  from pycocotools.coco import COCO

  monkeypatch.setattr(package, 'Spice', NoScorer)
  with contextlib.redirect_stdout(io.StringIO()):
    coco = COCO(str(truth))
    evaluation = package.COCOEvalCap(coco, coco.loadRes(str(results)))
    evaluation.evaluate()
  return {name: value for name, value in evaluation.eval.items() if name != 'SPICE'}


@needs_java
@pytest.mark.parametrize(
  'meteor', [False, pytest.param(True, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_the_numbers_are_those_of_pycocoevalcap(
  meteor, benchmark_model, tmp_path, monkeypatch, capsys
):
  """To the last digit, on the result file that was written."""
  if not meteor:  # it reads a large table for half a minute
    monkeypatch.setattr('pycocoevalcap.meteor.meteor.Meteor', NoScorer)
    monkeypatch.setattr('pycocoevalcap.eval.Meteor', NoScorer)
  assert evaluate(tmp_path, 'coco', miniature='coco_of_blip') == 0
  assert 'SPICE is left out' in capsys.readouterr().err
  report = read(tmp_path / 'out/report.json')
  truth = tmp_path / 'data/coco_karpathy_test_gt.json'
  assert report['metrics'] == official(truth, tmp_path / 'out/results.json', monkeypatch)
  assert (report['metrics']['METEOR'] > 0) == meteor
  assert report['java'].startswith(('openjdk', 'java'))


def test_domains(benchmark_model, tmp_path, no_java, capsys):
  assert evaluate(tmp_path, 'nocaps') == 0
  assert 'there is no java' in capsys.readouterr().err
  report = read(tmp_path / 'out/report.json')
  domains = report['groups']['domain']
  assert [domain['count'] for domain in domains.values()] == [4, 4, 4]
  whole = [domain['CIDEr of the whole (plain tokenizer)'] for domain in domains.values()]
  assert np.mean(whole) == pytest.approx(report['metrics']['CIDEr (plain tokenizer)'])
  own = [domain['CIDEr (plain tokenizer)'] for domain in domains.values()]
  assert not np.allclose(own, whole)
  assert 'METEOR' not in ''.join(domains['in-domain'])


@pytest.mark.parametrize('protocol', ['lavit', 'standard'])
def test_protocols(protocol, benchmark_model, tmp_path, no_java):
  assert evaluate(tmp_path, 'flickr30k', '--protocol', protocol) == 0
  report = read(tmp_path / 'out/report.json')
  options = benchmark_model.options
  assert report['settings'] | options == report['settings']
  assert options['num_beams'] == (2 if protocol == 'lavit' else 1)
  assert options.get('prompt', '').startswith('' if protocol == 'lavit' else 'Provide a one-')
  results = read(tmp_path / 'out/results.json')
  assert results == [
    {'image_id': 600 + index, 'caption': caption} for index, caption in enumerate(SAID)
  ]
  assert report['groups'] == {}


def test_both_forms_of_coco(benchmark_model, tmp_path, no_java):
  reports = []
  for miniature in ('coco', 'coco_of_blip'):
    root = tmp_path / miniature
    root.mkdir()
    assert evaluate(root, 'coco', miniature=miniature) == 0
    report = read(root / 'out/report.json')
    reports.append([report['metrics'], report['count'], read(root / 'out/results.json')])
  assert reports[0] == reports[1]


@pytest.mark.parametrize(
  ('name', 'file', 'content', 'error'),
  [
    ('coco', 'dataset_coco.json', None, 'cannot be read'),
    ('coco', 'dataset_coco.json', '{"images": [{"split": "train"}]}', 'has no items'),
    ('coco', 'coco_karpathy_test.json', '[{"image": "x"}]', 'unexpected item'),
    ('flickr30k', 'dataset_flickr30k.json', '{"images": [{"split": "test"}]}', 'unexpected item 0'),
    ('nocaps', 'nocaps_val_4500_captions.json', '{"images": []}', "has no list 'annotations'"),
    ('nocaps', 'nocaps_val_4500_captions.json', '[]', "has no list 'annotations'"),
    ('nocaps', 'images/0000000000000002.jpg', None, 'lacks 1 of 12 images'),
  ],
)
def test_wrong_files_are_named(name, file, content, error, benchmark_model, tmp_path, capsys):
  getattr(miniatures, name)(tmp_path / 'data')
  path = tmp_path / 'data' / file
  path.unlink() if content is None else path.write_text(content)
  assert evaluate(tmp_path, name) == 2
  printed = capsys.readouterr().err
  assert error in printed
  assert path.name in printed
  assert printed.count('\n') == 1
  assert benchmark_model.calls == 0
