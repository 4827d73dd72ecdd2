"""The command line: a wrong input gives one clear line and exit status 2, and writes nothing."""

import errno
import io
import json
import os
import pathlib
import re
import shutil
import sys
import types

import numpy as np
import pytest
from PIL import Image

from lavit_jax import cli, output
from lavit_jax.errors import Unreachable

ROOT = pathlib.Path(cli.__file__).parents[2]
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))


@pytest.fixture
def fails(capsys):
  """fails(arguments, pattern): the command ends with 2 after one line on stderr that matches."""

  def run(arguments, pattern):
    assert cli.main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith('lavit: error: ')
    assert error.count('\n') == 1
    assert re.search(pattern, error), error

  return run


def jpeg(**kwargs):
  buffer = io.BytesIO()
  NOISE.save(buffer, 'JPEG', **kwargs)
  return buffer.getvalue()


@pytest.mark.parametrize(
  'data, message',
  [
    (b'words', 'not an image'),
    (b'', 'empty'),
    (jpeg()[:-800], 'truncated'),
    (None, 'no such file'),
  ],
)
@pytest.mark.parametrize('command', ['caption', 'reconstruct', 'tokenize', 'answer', 'synthesize'])
def test_files_that_are_not_images(shallow_folder, tmp_path, fails, command, data, message):
  path = tmp_path / 'picture.jpg'
  out = tmp_path / 'out'
  if data is not None:
    path.write_bytes(data)
  more = ['What is this?'] if command in ('answer', 'synthesize') else []
  fails(
    [command, path, *more, '--folder', shallow_folder, '--out', out], f'picture.jpg: .*{message}'
  )
  assert not out.exists()


def test_images_of_every_mode_are_tokenized(shallow_folder, tmp_path, capsys):
  images = {
    'one.png': NOISE.resize((1, 1)),
    'palette.png': NOISE.quantize(16),
    'cmyk.jpg': NOISE.convert('CMYK'),
    'deep.png': Image.fromarray(np.asarray(NOISE)[..., 0].astype(np.uint16) * 257),
    'alpha.png': NOISE.convert('RGBA'),
  }
  for name, image in images.items():
    image.save(tmp_path / name)
  out = tmp_path / 'tokens.jsonl'
  paths = [str(tmp_path / name) for name in images]
  assert cli.main(['tokenize', *paths, '--folder', str(shallow_folder), '--out', str(out)]) == 0
  rows = [json.loads(line) for line in out.read_text().splitlines()]
  assert [os.path.basename(row['image']) for row in rows] == list(images)
  assert all(len(row['ids']) == len(row['patches']) == row['count'] > 0 for row in rows)
  assert len(capsys.readouterr().out.splitlines()) == 5


@pytest.mark.parametrize(
  'arguments, message',
  [
    (['generate', ' '], 'text is empty'),
    (['generate', 'owl ' * 3000], 'tokens long; shorten it to'),
    (['answer', 'IMAGE', ''], 'text is empty'),
    (['synthesize', ''], 'text is empty'),
    (['generate', 'owl', '--steps', '0'], '--steps'),
    (['generate', 'owl', '--steps', '2000'], '--steps'),
    (['generate', 'owl', '--top-k', '0'], '--top-k'),
    (['generate', 'owl', '--temperature', '0'], '--temperature'),
    (['generate', 'owl', '--top-p', '2'], '--top-p'),
    (['generate', 'owl', '--samples', '0'], '--samples'),
    (['generate', 'owl', '--max-tokens', '99'], 'min_new_tokens <= max_new_tokens <= 64'),
    (['caption', 'IMAGE', '--beams', '0'], '--beams'),
    (
      ['answer', 'IMAGE', 'What?', '--temperature', '2'],
      'temperature has no effect in beam search; set do_sample=True too',
    ),
    (
      ['generate', 'owl', '--max-tokens', '5'],
      'min_new_tokens=16 with max_new_tokens=5 is not allowed',
    ),
    (
      ['caption', 'IMAGE', '--most-probable', '--sample'],
      '--do-sample needs a random seed, and --most-probable has none; leave one out',
    ),
    (
      ['caption', 'IMAGE', '--most-probable', '--samples', '2'],
      '--num-return-sequences 2 needs a random seed, and --most-probable has none; leave one out',
    ),
    (['app', '--seed', '1'], 'app does not know --seed 1'),
    (['generate', 'owl', '--seed', '-1'], "--seed: '-1' is not an integer from 0"),
    (
      ['generate', 'owl', '--guidance', 'much'],
      "--guidance: 'much' is not a number from 0 up; see lavit generate --help",
    ),
    (['generate', 'owl', '--sped', '1'], '--sped'),
    (['generate'], 'required: TEXT'),
    (['draw', 'owl'], "'draw'.*generate"),
  ],
)
def test_prompts_and_options(shallow_folder, tmp_path, fails, arguments, message):
  image = tmp_path / 'image.png'
  out = tmp_path / 'out'
  NOISE.save(image)
  arguments = [image if argument == 'IMAGE' else argument for argument in arguments]
  fails([*arguments, '--folder', shallow_folder, '--out', out], message)
  assert not out.exists()


def test_checkpoints(shallow_folder, tmp_path, fails):
  fails(
    ['generate', 'owl', '--folder', tmp_path / 'nowhere'], 'nowhere is not a lavit_jax checkpoint'
  )
  folder = shutil.copytree(shallow_folder, tmp_path / 'broken')
  data = max((folder / 'parts' / 'llama').rglob('*/d/*'), key=lambda x: x.stat().st_size)
  data.write_bytes(data.read_bytes()[:1000])
  fails(['generate', 'owl', '--folder', folder, '--out', tmp_path / 'out'], r'/llama is truncated')
  shutil.rmtree(folder / 'parts' / 'llama')
  fails(['generate', 'owl', '--folder', folder, '--out', tmp_path / 'out'], r'/llama is missing')
  config = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps(config | dict(variant='tinny')))
  fails(['generate', 'owl', '--folder', folder], "unknown variant 'tinny'.*'tiny'")
  (folder / 'config.json').write_text('{')
  fails(['generate', 'owl', '--folder', folder], r'config\.json cannot be read')
  assert not (tmp_path / 'out').exists()


def test_training_options(tmp_path, fails):
  workdir = tmp_path / 'run'
  config = ROOT / 'configs' / 'tokenizer.py'
  fails(
    ['train', '--config', 'configs/nowhere.py:tiny', '--workdir', workdir],
    'no file configs/nowhere.py',
  )
  fails(['train', '--config', f'{config}:tinny', '--workdir', workdir], 'tinny.*tiny')
  fails(
    ['train', '--config', config, '--workdir', workdir, '--config.batchsize=1'],
    'did you mean --config.batch_size',
  )
  fails(['train', '--config', config, '--workdir', workdir, '--config.batch_size=few'], 'type int')
  fails(
    ['train', '--config', config, '--workdir', workdir, '--workdirs', 'x'],
    'does not know --workdirs x',
  )
  assert not workdir.exists()


def test_patches_are_sampled_without_most_probable(monkeypatch, tmp_path):
  NOISE.save(tmp_path / 'owl.png')
  seen = []
  model = types.SimpleNamespace(
    modules=types.SimpleNamespace(image_size=8),
    caption=lambda images, seed: seen.append(seed) or ['owl'],
  )
  monkeypatch.setattr(cli.options, 'load_model', lambda args: model)
  for options in ([], ['--seed', '3'], ['--most-probable']):
    assert cli.main(['caption', str(tmp_path / 'owl.png'), *options]) == 0
  assert seen == [(0, [0]), (3, [0]), None]


def test_a_workdir_that_is_a_file(tmp_path, fails):
  (tmp_path / 'notes').write_text('mine')
  fails(
    [
      'train',
      '--config',
      f'{ROOT}/configs/encoder.py:tiny',
      '--workdir',
      tmp_path / 'notes',
      '--config.data.source=embedded',
    ],
    'notes.*Not a directory',
  )
  assert (tmp_path / 'notes').read_text() == 'mine'


def test_overrides_reach_the_loop(tmp_path, monkeypatch):
  from lavit_jax.training import loop

  seen = []
  monkeypatch.setattr(loop, 'train', lambda config, workdir, *_: seen.append((config, workdir)))
  config_file = f'{ROOT}/configs/tokenizer.py:tiny'
  overrides = ['--config.batch_size=3', '--config.seed', '7']
  assert cli.main(['train', '--config', config_file, '--workdir', 'runs/x', *overrides]) == 0
  ((config, workdir),) = seen
  assert (config.batch_size, config.seed, config.variant, workdir) == (3, 7, 'tiny', 'runs/x')


def test_an_error_that_a_restart_may_remove_has_another_status(tmp_path, monkeypatch, capsys):
  def run(*_):
    raise Unreachable('gs://b/0.tar cannot be read')

  monkeypatch.setattr('lavit_jax.training.loop.train', run)
  config = f'{ROOT}/configs/encoder.py:tiny'
  assert cli.main(['train', '--config', config, '--workdir', str(tmp_path)]) == 200
  assert capsys.readouterr().err == 'lavit: error: gs://b/0.tar cannot be read\n'


@pytest.mark.parametrize(
  'arguments',
  [
    ['data', 'pack', 'gs://b/0.tar', '--out', 'gs://b/x'],
    ['answer', 'x.png', 'Why?', '--out', 'gs://b/x.jsonl'],
  ],
)
def test_a_bucket_is_not_a_folder(tmp_path, monkeypatch, fails, arguments):
  monkeypatch.chdir(tmp_path)
  remedy = r'mount the bucket \(gcsfuse\), or use a disk that all machines share; see lavit'
  fails(arguments, rf"'gs://b/.* is not a local path; {remedy}")
  assert not any(tmp_path.iterdir())


def test_parts_in_an_unknown_store(tmp_path, fails):
  fails(
    [
      'train',
      '--config',
      ROOT / 'configs' / 'tokenizer.py:tiny',
      '--workdir',
      tmp_path / 'run',
      '--config.frozen=a, nowhere://b/export',
    ],
    'nowhere://b/export: .*; install what fsspec needs for it',
  )


def test_a_missing_data_set(shallow_folder, tmp_path, fails):
  fails(
    [
      'evaluate',
      '--folder',
      shallow_folder,
      '--source',
      tmp_path,
      '--out',
      tmp_path / 'report.json',
    ],
    'no emoji data set; build one',
  )
  assert not list(tmp_path.iterdir())


def full(*_args, **_kwargs):
  raise OSError(errno.ENOSPC, 'No space left on device', 'runs/x/state')


def test_a_full_disk(tmp_path, monkeypatch, fails):
  from lavit_jax.training import loop

  monkeypatch.setattr(loop, 'train', full)
  fails(
    ['train', '--config', ROOT / 'configs/tokenizer.py', '--workdir', tmp_path],
    'disk is full at runs/x/state; free some space',
  )
  old = output.write_atomic(tmp_path / 'report.json', 'old')

  class Full(io.BytesIO):
    write = full

  monkeypatch.setattr(output.os, 'fdopen', lambda *_: Full())
  with pytest.raises(output.UserError, match='cannot write .*report.json: No space left'):
    output.write_atomic(old, 'new')
  assert [path.name for path in tmp_path.iterdir()] == ['report.json']
  assert old.read_text() == 'old'


def test_other_errors_are_not_hidden(monkeypatch):
  from lavit_jax.training import loop

  monkeypatch.setattr(loop, 'train', lambda *_: 1 // 0)
  with pytest.raises(ZeroDivisionError):
    cli.main(['train', '--config', str(ROOT / 'configs/tokenizer.py'), '--workdir', 'x'])


def test_the_page_without_gradio(monkeypatch, fails):
  monkeypatch.setitem(sys.modules, 'gradio', None)
  for name in list(sys.modules):
    if name.startswith('lavit_jax.apps.web'):
      monkeypatch.delitem(sys.modules, name)
  fails(['app'], r"needs Gradio; pip install -e '.\[app\]' -c launch/constraints.txt")
  fails(['app', '--port', '0'], "--port: '0' is not an integer from 1 to 65535")
