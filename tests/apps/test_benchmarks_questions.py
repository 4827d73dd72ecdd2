"""The benchmarks of questions on miniatures, by a model that knows its answers."""

import dataclasses
import inspect
import json
import re

import miniatures
import numpy as np
import pytest
from batch_runs import lavit
from benchmark_runs import evaluate, read

from lavit_jax import cli
from lavit_jax.apps import benchmarks
from lavit_jax.apps.batch import runner as batch_runner
from lavit_jax.inference.generation_config import (
  FIELD_NAMES,
  GenerationConfig,
  resolve_generation_config,
)
from lavit_jax.inference.pipeline import Lavit

pytest.importorskip('simplemma', reason="no simplemma; it comes with pip install -e '.[evaluate]'")


@pytest.mark.parametrize('name', ['vqav2', 'okvqa'])
@pytest.mark.parametrize('protocol', ['lavit', 'standard'])
def test_vqa(name, protocol, benchmark_model, tmp_path):
  assert evaluate(tmp_path, name, '--protocol', protocol) == 0
  report = read(tmp_path / 'out/report.json')
  accuracies = getattr(miniatures, protocol.upper())
  assert report['metrics'] == {'accuracy': pytest.approx(np.mean(accuracies))}
  numbers = report['groups']['answer_type']['number']
  assert numbers == {
    'accuracy': pytest.approx(np.mean([accuracies[0], accuracies[4]])),
    'count': 2,
  }
  results = read(tmp_path / 'out/results.json')
  assert [result['question_id'] for result in results] == list(range(100001, 100013))
  answers = [result['answer'] for result in results]
  assert set(results[0]) == {'question_id', 'answer'}
  if protocol == 'lavit':
    assert answers[:5] == ['two', 'dog', 'cat', 'red', 'one']
    assert answers[10] == 'unanswerable'
    assert benchmark_model.asked[4] == 'How many {people}?'
    assert benchmark_model.options['num_beams'] == 5
  else:
    assert answers == [answer for _, answer, _ in miniatures.QUESTIONS]
    assert benchmark_model.asked[4].startswith('How many {people}?\n')
    assert benchmark_model.asked[4].endswith('Answer the question using a single word or phrase.')
    assert ('insufficient' in benchmark_model.asked[4]) == (name == 'okvqa')
    assert benchmark_model.options['num_beams'] == 1
  assert benchmark_model.rows == {index: index for index in range(12)}
  assert report['settings']['num_beams'] == benchmark_model.options['num_beams']
  assert report['versions']['jax']
  assert len(report['checkpoint']['sha256']) == 64
  assert len(report['files']) == 2


def test_gqa(benchmark_model, tmp_path):
  """Exact match with the one answer; only lemmatizing makes 'dogs' and 'skateboarding' right."""
  for protocol, indices in {'standard': [6], 'lavit': [1, 6, 8]}.items():
    assert evaluate(tmp_path, 'gqa', '--protocol', protocol, out=protocol) == 0
    report = read(tmp_path / protocol / 'report.json')
    assert report['metrics']['accuracy'] == pytest.approx(len(indices) / 12)
    assert report['groups']['structural']['verify'] == {'accuracy': 0.5, 'count': 2}
    results = read(tmp_path / protocol / 'results.json')
    assert results[0] == {'questionId': '20000000', 'prediction': 'two'}


def test_vizwiz(benchmark_model, tmp_path):
  assert evaluate(tmp_path, 'vizwiz', '--protocol', 'standard', out='standard') == 0
  report = read(tmp_path / 'standard/report.json')
  assert report['metrics']['accuracy'] == pytest.approx(np.mean(miniatures.STANDARD))
  assert report['groups']['answerable']['no'] == {'accuracy': 0, 'count': 1}
  assert 'check_answerable' not in benchmark_model.options
  assert benchmark_model.asked[0].startswith('How many dogs are there?\nWhen the provided')
  assert evaluate(tmp_path, 'vizwiz', out='lavit') == 0
  report = read(tmp_path / 'lavit/report.json')
  answerable = np.delete(miniatures.LAVIT, 10)
  assert report['count'] == 11
  assert report['metrics']['accuracy'] == pytest.approx(np.mean(answerable))
  assert benchmark_model.options['check_answerable'] is True
  results = read(tmp_path / 'lavit/results.json')
  assert results[1] == {'image': 'VizWiz_val_00000001.jpg', 'answer': 'dog'}


def test_no_answerable_question(benchmark_model, tmp_path, capsys):
  miniatures.vizwiz(tmp_path / 'data')
  path = tmp_path / 'data/val.json'
  path.write_text(json.dumps([item | {'answerable': 0} for item in read(path)]))
  assert evaluate(tmp_path, 'vizwiz') == 2
  assert "val.json has no records that protocol 'lavit' evaluates" in capsys.readouterr().err


def test_shares_and_kills_change_nothing(benchmark_model, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(batch_runner, 'MAX_BATCH', 2)
  assert evaluate(tmp_path, 'vqav2', out='whole') == 0
  assert benchmark_model.calls == 6
  whole = [(tmp_path / 'whole' / name).read_bytes() for name in ('results.json', 'report.json')]
  capsys.readouterr()
  for share in ('2/3', '0/3'):
    assert evaluate(tmp_path, 'vqav2', '--shard', share) == 0
  assert 'has 8 of 12 rows' in capsys.readouterr().err
  assert not (tmp_path / 'out/report.json').exists()
  torn = tmp_path / 'out/rows-0-of-3.jsonl'
  torn.write_bytes(torn.read_bytes()[:-5])  # killed as it wrote the last line
  assert evaluate(tmp_path, 'vqav2', '--shard', '1/3') == 0
  assert 'has 11 of 12 rows' in capsys.readouterr().err
  benchmark_model.calls = 0
  assert evaluate(tmp_path, 'vqav2', '--shard', '0/3') == 0
  assert benchmark_model.calls == 1
  merged = [(tmp_path / 'out' / name).read_bytes() for name in ('results.json', 'report.json')]
  assert merged == whole
  assert evaluate(tmp_path, 'vqav2', '--shard', '2/3') == 0  # nothing is missing: it scores again
  assert benchmark_model.calls == 1
  assert (tmp_path / 'out/report.json').read_bytes() == whole[1]


def test_progress_in_a_log(benchmark_model, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(batch_runner, 'MAX_BATCH', 8)
  monkeypatch.setattr(batch_runner, 'LOG_EVERY', -1.0)
  assert evaluate(tmp_path, 'vqav2') == 0
  printed = capsys.readouterr()
  assert re.search(r'^lavit: 8 of 12, [0-9.]+ rows/s, 0 min left$', printed.err, re.M)
  assert 'skateboarding' not in printed.out  # no single result


def test_results_of_other_settings_are_refused(benchmark_model, tmp_path, capsys):
  assert evaluate(tmp_path, 'gqa', '--shard', '0/2') == 0
  assert evaluate(tmp_path, 'gqa', '--shard', '1/2', '--seed', '1') == 2
  assert 'rows-0-of-2.jsonl has results of other settings' in capsys.readouterr().err
  (tmp_path / 'checkpoint' / 'weights').write_text('2')
  assert evaluate(tmp_path, 'gqa', '--shard', '0/2') == 2
  assert 'holds results of checkpoint' in capsys.readouterr().err


WRONG = {  # the name of the file, its content (None: no file) -> a part of the error
  ('vqav2', 'v2_OpenEnded_mscoco_val2014_questions.json', None): 'No such file.*visualqa.org',
  ('vqav2', 'v2_mscoco_val2014_annotations.json', '{"annotations": []}'): 'lacks 12 of the 12',
  ('okvqa', 'mscoco_val2014_annotations.json', '{"questions": []}'): 'no list .annotations.*okvqa',
  ('okvqa', 'OpenEnded_mscoco_val2014_questions.json', '{"quest'): 'is not JSON',
  ('okvqa', 'OpenEnded_mscoco_val2014_questions.json', '{"questions": []}'): 'has no items',
  ('gqa', 'testdev_balanced_questions.json', '[]'): 'not an object of questions.*dorarad/gqa',
  ('gqa', 'testdev_balanced_questions.json', '{"1": {"imageId": "2"}}'): 'unexpected item 0',
  ('vizwiz', 'val.json', '{}'): 'not a list of questions.*vizwiz.org',
  (
    'vizwiz',
    'images/val/VizWiz_val_00000003.jpg',
    None,
  ): 'lacks 1 of 11 images, the first: val/Viz',
}


@pytest.mark.parametrize(('wrong', 'error'), WRONG.items())
def test_wrong_files_are_named(wrong, error, benchmark_model, tmp_path, capsys):
  name, file, content = wrong
  getattr(miniatures, name)(tmp_path / 'data')
  path = tmp_path / 'data' / file
  path.unlink() if content is None else path.write_text(content)
  assert evaluate(tmp_path, name) == 2
  printed = capsys.readouterr().err
  assert re.search(error, printed), printed
  assert printed.count('\n') == 1
  assert benchmark_model.calls == 0
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
  ('arguments', 'error'),
  [
    ((), 'give either --benchmark NAME'),
    (('--benchmark', 'gqa', '--source', 'x'), 'give either --benchmark NAME'),
    (('--benchmark', 'gqa', '--data', 'x'), '--benchmark gqa needs --images DIR'),
    (('--benchmark', 'gqa', '--count', '3'), '--count has no effect with --benchmark'),
    (('--source', 'x', '--limit', '3'), '--limit has no effect with --source'),
    (('--benchmark', 'gqa', '--shard', '2/2'), "'2/2' is not I/N"),
  ],
)
def test_wrong_options(arguments, error, capsys):
  assert lavit('evaluate', *arguments) == 2
  assert error in capsys.readouterr().err


def test_the_command_offers_all_benchmarks():
  assert set(cli.apps.BENCHMARKS) == set(benchmarks.BENCHMARKS)


def test_a_limit(benchmark_model, tmp_path):
  miniatures.vqav2(tmp_path / 'data')
  (tmp_path / 'data/images/val2014/COCO_val2014_000000000111.jpg').unlink()
  assert evaluate(tmp_path, 'vqav2', '--limit', 3) == 0
  report = read(tmp_path / 'out/report.json')
  assert report['count'] == report['settings']['limit'] == 3


WITH_TEXTS = [name for name, benchmark in benchmarks.BENCHMARKS.items() if benchmark.submit]


@pytest.mark.parametrize('name', WITH_TEXTS)
@pytest.mark.parametrize('protocol', benchmarks.PROTOCOLS)
def test_the_model_takes_the_options(name, protocol):
  """Those of a protocol, by the method of its task; the lengths have room in 4,096 tokens."""
  benchmark = benchmarks.BENCHMARKS[name]
  options = dict(benchmark.protocols[protocol].options)
  parameters = inspect.signature(getattr(Lavit, benchmark.task)).parameters
  fields = {key: options.pop(key) for key in list(options) if key in FIELD_NAMES}
  assert options.keys() <= parameters.keys()
  config = resolve_generation_config(GenerationConfig(1, 1), fields, 4096)
  assert config == dataclasses.replace(GenerationConfig(1, 1), **fields)


@pytest.mark.slow
def test_with_a_checkpoint(shallow_folder, tmp_path):
  """Random weights in two shares, of which the second completes the results."""
  miniatures.vqav2(tmp_path / 'data')
  command = ['evaluate', '--benchmark', 'vqav2', '--protocol', 'standard', '--limit', 3]
  command += ['--data', tmp_path / 'data', '--images', tmp_path / 'data/images']
  command += ['--folder', shallow_folder, '--out', tmp_path / 'out']
  assert lavit(*command, '--shard', '1/2') == 0
  assert not (tmp_path / 'out/results.json').exists()
  assert lavit(*command, '--shard', '0/2') == 0
  report = read(tmp_path / 'out/report.json')
  assert report['checkpoint']['variant'] == 'shallow'
  assert report['count'] == len(read(tmp_path / 'out/results.json')) == 3
