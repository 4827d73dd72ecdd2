"""Captions and tokens of tars and Parquet files: whole files, each once, whatever the processes."""

import io
import os
import signal
import subprocess
import sys
import tarfile
import time

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from batch_runs import lavit
from PIL import Image

from lavit_jax import cli

COUNTS = (20, 3, 0)  # records of the tars


def png(level):
  buffer = io.BytesIO()
  Image.new('RGB', (8, 8), (level, level, level)).save(buffer, 'PNG')
  return buffer.getvalue()


def write_tar(file, members):
  with tarfile.open(fileobj=file, mode='w') as tar:
    for name, content in members:
      info = tarfile.TarInfo(name)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))


def members_of(number, count):
  """Records with the gray levels from 100 * `number` on, and captions."""
  members = []
  for i in range(count):
    members.append((f'{number}-{i:02}.png', png(100 * number + i)))
    members.append((f'{number}-{i:02}.txt', f'gray {i}'.encode()))
  return members


def write_tars(folder):
  folder.mkdir()
  for number, count in enumerate(COUNTS):
    with open(folder / f'{number:03}.tar', 'wb') as file:
      write_tar(file, members_of(number, count))
  return folder


@pytest.fixture
def tars(tmp_path):
  return write_tars(tmp_path / 'tars')


def contents(folder):
  return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def rows(path):
  return pq.read_table(path).to_pylist()


def test_captions_of_tars(stub, tars, tmp_path, capsys):
  """Row by row: the image, its key and its texts; the random key is that of the row's number."""
  out = tmp_path / 'out'
  assert lavit('caption', '--input', tars, '--out', out) == 0
  assert [len(rows(out / f'{number:03}.parquet')) for number in range(3)] == list(COUNTS)
  second = [
    {'key': f'1-{i:02}', 'text': [f'gray {i}'], 'caption': f'{100 + i} at {i}', 'error': None}
    for i in range(3)
  ]
  assert rows(out / '001.parquet') == second
  assert rows(out / '000.parquet')[19]['caption'] == '19 at 19'
  assert '3 files with 23 records' in capsys.readouterr().err


def test_tokens_of_tars(stub, tars, tmp_path):
  assert lavit('tokenize', '--input', f'{tars}/{{000..001}}.tar', '--out', tmp_path / 'out') == 0
  assert rows(tmp_path / 'out' / '001.parquet')[2] == {
    'key': '1-02',
    'text': ['gray 2'],
    'codes': [102, 102],
    'keep': [False, True, False, True],
    'error': None,
  }


def test_a_run_is_resumed_and_shared(stub, tars, tmp_path, capsys):
  """What is there is not computed again; what a killed run left of a file is removed."""
  whole = tmp_path / 'whole'
  assert lavit('caption', '--input', tars, '--out', whole) == 0
  out = tmp_path / 'out'
  out.mkdir()
  arguments = ('caption', '--input', tars, '--out', out)
  (out / '001.parquet').write_bytes((whole / '001.parquet').read_bytes())
  (out / '.000.parquet.x1y2').write_bytes(b'half')
  stub.calls = 0
  capsys.readouterr()
  assert lavit(*arguments) == 0
  assert '1 of 3 files are in' in capsys.readouterr().err
  assert stub.calls == 2
  assert contents(out) == contents(whole)
  assert lavit(*arguments) == 0
  assert stub.calls == 2

  shared = tmp_path / 'shared'
  for number in (1, 0):
    assert lavit(*arguments[:4], shared, '--shard', f'{number}/2') == 0
    assert (shared / '000.parquet').exists() == (number == 0)
  assert contents(shared) == contents(whole)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(stub, 'caption', lambda images, seed: [str(seed.seed) for _ in images])
    assert lavit(*arguments[:4], tmp_path / 'seeds') == 0
  first, second = (rows(tmp_path / 'seeds' / f'{name}.parquet') for name in ('000', '001'))
  assert first[0]['caption'] != second[0]['caption']


def test_bad_records_do_not_end_the_run(stub, tars, tmp_path, capsys):
  members = members_of(0, 2)
  members[2] = ('0-01.png', b'words')
  with open(tars / '000.tar', 'wb') as file:
    write_tar(file, [*members, ('0-02.txt', b'no image'), *members_of(1, 1), *members_of(1, 1)])
  out = tmp_path / 'out'
  assert lavit('caption', '--input', tars, '--out', out) == 0
  found = rows(out / '000.parquet')
  assert [row['caption'] for row in found] == ['0 at 0', None, None, None]
  assert [(row['error'] or '').partition(':')[0] for row in found] == [
    '',
    'image',
    'no image',
    'repeated member',
  ]
  error = capsys.readouterr().err
  assert f'{tars}/000.tar: 0-01 (png, txt): image: not an image that Pillow can read' in error
  assert '3 of the records have no result' in error


def test_names_and_texts_that_are_no_utf_8(stub, tmp_path):
  with open(tmp_path / 'x.tar', 'wb') as file:
    write_tar(file, [('caf\udce9.png', png(1)), ('caf\udce9.json', b'{"text": "\\ud800"}')])
  out = tmp_path / 'out'
  arguments = ('--input', tmp_path / 'x.tar', '--text-field', 'json.text')
  assert lavit('caption', *arguments, '--out', out) == 0
  assert rows(out / 'x.parquet')[0] == {
    'key': r'caf\udce9',
    'text': [r'\ud800'],
    'caption': '1 at 0',
    'error': None,
  }


def test_missing_and_broken_tars(stub, tars, tmp_path, capsys):
  """The others are computed; a missing tar can come later, of a broken one the beginning counts."""
  data = (tars / '001.tar').read_bytes()
  (tars / '001.tar').write_bytes(data[:3500])
  out = tmp_path / 'out'
  arguments = ('caption', '--input', f'{tars}/{{000..003}}.tar', '--out', out)
  for _ in range(2):
    assert lavit(*arguments) == 2
    error = capsys.readouterr().err
    assert f'1 of 4 files have no result, the first is a missing tar: {tars}/003.tar' in error
  assert len(rows(out / '001.parquet')) == 1
  (tars / '003.tar').write_bytes(data)
  assert lavit(*arguments) == 2
  assert 'the first is a broken tar' in capsys.readouterr().err
  (tars / '001.tar').write_bytes(data)
  (out / '001.parquet').unlink()
  assert lavit(*arguments) == 0
  assert rows(out / '001.parquet')[2]['caption'] == '102 at 2'


def test_files_of_a_store(stub, tars, tmp_path):
  store = fsspec.filesystem('memory')
  for path in tars.iterdir():
    store.pipe_file(f'/bulk/in/{path.name}', path.read_bytes())
  assert lavit('caption', '--input', tars, '--out', tmp_path / 'out') == 0
  arguments = ('caption', '--input', 'memory://bulk/in/{000..002}.tar', '--out')
  try:
    for _ in range(2):
      assert lavit(*arguments, 'memory://bulk/out/') == 0
      results = {name.rpartition('/')[2]: store.cat(name) for name in store.find('/bulk/out')}
      assert results == contents(tmp_path / 'out')
  finally:
    store.rm('/bulk', recursive=True)
  assert stub.calls == 2 * 3


def test_parquet_files_with_columns_of_other_names(stub, tmp_path):
  table = pa.table({'picture': [png(i) for i in range(3)], 'words': [['a', 'b'], [], ['c']]})
  pq.write_table(table, tmp_path / 'x.parquet', row_group_size=2)
  fields = ('--image-field', 'picture', '--text-field', 'words')
  out = tmp_path / 'out'
  assert lavit('caption', '--input', tmp_path / 'x.parquet', '--out', out, *fields) == 0
  found = rows(out / 'x.parquet')
  assert [row['key'] for row in found] == ['x/0/0', 'x/0/1', 'x/1/0']
  assert [row['text'] for row in found] == [['a', 'b'], [], ['c']]
  assert [row['caption'] for row in found] == ['0 at 0', '1 at 1', '2 at 2']


def test_errors(stub, tars, tmp_path, capsys):
  def fails(message, *arguments):
    assert lavit(*arguments) == 2
    assert message in capsys.readouterr().err

  out = tmp_path / 'out'
  arguments = ('caption', '--input', tars, '--out', out)
  assert lavit(*arguments) == 0
  capsys.readouterr()
  fails('000.parquet holds results of seed 0, not of seed 1', *arguments, '--seed', 1)
  fails('needs --out DIR', *arguments[:3])
  fails("both 'a.png' and --input", 'caption', 'a.png', *arguments[1:])
  fails('--num-return-sequences has no effect', *arguments, '--num-return-sequences', 2)
  fails('--shard needs --input with tars', 'caption', 'a.png', '--shard', '0/2')
  fails(
    'only tars, Parquet files and their results may be in a store',
    'caption',
    'a.png',
    '--out',
    'gs://b/c',
  )
  (out / '001.parquet').write_text('notes')
  fails('001.parquet is not a result of this command', *arguments)
  twin = tmp_path / 'twin'
  twin.mkdir()
  (twin / '000.tar').write_bytes((tars / '000.tar').read_bytes())
  fails('would both become 000.parquet', *arguments[:2], f'{tmp_path}/*/000.tar', '--out', twin)


@pytest.mark.slow
def test_a_job_that_is_killed_and_started_again(tmp_path):
  """Four processes on loopback, killed twice, leave what one process makes without a break."""
  from training import nano

  assets = os.path.join(cli.ASSETS, 'demo')
  pictures = [open(os.path.join(assets, f'{i:02}.png'), 'rb').read() for i in range(1, 7)]
  tars = tmp_path / 'tars'
  tars.mkdir()
  for number in range(12):
    with open(tars / f'{number:03}.tar', 'wb') as file:
      write_tar(file, [(f'{i:02}.png', pictures[(number + i) % 6]) for i in range(24)])
  command = [sys.executable, '-m', 'lavit_jax', 'tokenize', '--input', str(tars), '--out']

  def start(out, env=()):
    return subprocess.Popen(
      [*command, str(out)], env={**os.environ, **dict(env)}, stderr=subprocess.PIPE, text=True
    )

  alone = start(tmp_path / 'alone')
  assert not nano.finish(alone)
  out = tmp_path / 'out'
  first_kept = {}
  for kill_at in (1, 5, None):
    job = [start(out, env) for env in nano.job_environments(4, 60)]
    if kill_at is None:
      for process in job:
        process.communicate()
      assert [process.returncode for process in job] == [0] * 4
      break
    while len(list(out.glob('*.parquet')) if out.exists() else ()) < kill_at:
      assert all(process.poll() in (None, 0) for process in job)
      time.sleep(0.01)
    for process in job:
      process.send_signal(signal.SIGKILL)
    for process in job:
      process.communicate()
    first_kept |= {path: path.stat().st_mtime_ns for path in out.glob('*.parquet')}
  assert contents(out) == contents(tmp_path / 'alone')
  assert len(contents(out)) == 12
  assert first_kept.items() <= {path: path.stat().st_mtime_ns for path in out.iterdir()}.items()
