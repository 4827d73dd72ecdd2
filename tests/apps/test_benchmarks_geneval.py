"""GenEval's folders on a miniature, by a model that paints its row and prompt."""

import json

import miniatures
import numpy as np
import pytest
from batch_runs import lavit
from benchmark_runs import evaluate, read
from PIL import Image

from lavit_jax.apps.batch import runner as batch_runner


def test_folders(benchmark_model, tmp_path, monkeypatch, capsys):
  """Three prompts, four images of each, in two shares of which one was killed."""
  monkeypatch.setattr(batch_runner, 'MAX_BATCH', 2)
  out = tmp_path / 'out'
  assert evaluate(tmp_path, 'geneval', '--shard', '0/2') == 0
  rows = out / 'rows-0-of-2.jsonl'
  rows.write_bytes(rows.read_bytes()[:-5])
  assert evaluate(tmp_path, 'geneval', '--shard', '1/2') == 0
  assert 'has 11 of 12 rows' in capsys.readouterr().err
  assert evaluate(tmp_path, 'geneval', '--shard', '0/2') == 0
  assert "GenEval's repository scores them" in capsys.readouterr().err
  assert benchmark_model.options == {'num_inference_steps': 50}
  folders = sorted(path.name for path in out.iterdir() if path.name.isdigit())
  assert folders == ['00000', '00001', '00002']
  for index, name in enumerate(folders):
    metadata = json.loads((out / name / 'metadata.jsonl').read_text())
    assert metadata['prompt'] == miniatures.PROMPTS[index]
    samples = sorted((out / name / 'samples').iterdir())
    assert [path.name for path in samples] == [f'{sample:04d}.png' for sample in range(4)]
    for sample, path in enumerate(samples):
      assert (np.asarray(Image.open(path)) == (4 * index + sample, index, 0)).all()
  report = read(out / 'report.json')
  assert report['count'] == 12
  assert report['metrics'] == {}


@pytest.mark.parametrize(
  ('content', 'error'),
  [
    (None, 'cannot be read (No such file or directory); it comes from the folder prompts of Gen'),
    ('{"prompt": 1, "tag": "x"}', 'has no prompts'),
    ('[]', 'is not JSON lines of prompts'),
    ('', 'has no prompts'),
  ],
)
def test_wrong_prompts(content, error, benchmark_model, tmp_path, capsys):
  miniatures.geneval(tmp_path / 'data')
  path = tmp_path / 'data/evaluation_metadata.jsonl'
  path.unlink() if content is None else path.write_text(content)
  assert evaluate(tmp_path, 'geneval') == 2
  printed = capsys.readouterr().err
  assert error in printed
  assert printed.count('\n') == 1


@pytest.mark.parametrize(
  ('arguments', 'error'),
  [
    (('--protocol', 'lavit'), "geneval has no protocol 'lavit'; give --protocol standard"),
    (('--images', 'x'), '--images has no effect with --benchmark geneval'),
  ],
)
def test_wrong_options(arguments, error, capsys):
  assert lavit('evaluate', '--benchmark', 'geneval', '--data', 'x', *arguments) == 2
  assert error in capsys.readouterr().err
