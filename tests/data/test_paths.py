"""Paths and files: braces and globs, and stores that fail now and then.

A store that fails gives the same records, or an error that names the file; never less data.
"""

import io
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from numbered_images import SIZE, batches, numbers, write_folder, write_parquet, write_tars

from lavit_jax import local_paths
from lavit_jax.data import formats, loader, paths
from lavit_jax.data.row_workers import SkipCounter
from lavit_jax.errors import Unreachable, UserError


class NoAnswer(Exception):
  """Not an OSError, like those of aiohttp."""


class Flaky(MemoryFileSystem):
  """A store whose every `failing`-th call fails; 0: none does.

  A read that fails has written to the buffer by then.
  """

  protocol = 'flaky'
  store = {}
  pseudo_dirs = ['']
  failing = 0
  calls = 0

  @classmethod
  def _strip_protocol(cls, path):
    return super()._strip_protocol(path.replace('flaky://', 'memory://'))

  @classmethod
  def fail(cls, buffer=None):
    cls.calls += 1
    if cls.failing and cls.calls % cls.failing == 0:
      if buffer is not None:
        buffer[:] = b'?' * len(buffer)
      raise (NoAnswer if cls.calls % 2 else ConnectionResetError)('the line is dead')

  def _open(self, path, mode='rb', **options):
    self.fail()
    file = super()._open(path, mode, **options)
    return File(file.getvalue()) if mode == 'rb' else file

  def info(self, path, **options):
    self.fail()
    return super().info(path, **options)


class File(io.BytesIO):
  def readinto(self, buffer):
    Flaky.fail(memoryview(buffer))
    return super().readinto(buffer)


@pytest.fixture
def flaky(monkeypatch):
  """Returns the class. Nothing sleeps: `waited` has the seconds of the waits instead."""
  fsspec.register_implementation('flaky', Flaky, clobber=True)
  monkeypatch.setattr(Flaky, 'store', {})
  monkeypatch.setattr(Flaky, 'failing', 0)
  monkeypatch.setattr(paths, '_BUFFER', 512)
  Flaky.waited = []
  monkeypatch.setattr(paths.time, 'sleep', Flaky.waited.append)
  return Flaky


@pytest.mark.parametrize('write', [write_tars, write_parquet, write_folder])
def test_files_are_read_in_full_in_spite_of_failures(tmp_path, flaky, write, caplog):
  source = write(tmp_path)
  files = fsspec.filesystem('flaky')
  for file in tmp_path.rglob('*'):
    if file.is_file():
      files.pipe(f'/bucket/{file.relative_to(tmp_path)}', file.read_bytes())
  source['path'] = source['path'].replace(str(tmp_path), 'flaky://bucket')

  def rows():
    skipped = SkipCounter()
    data = loader.batches(
      'images',
      sources=(source,),
      batch_size=4,
      image_size=SIZE,
      num_threads=0,
      seed=1,
      skipped=skipped,
    )
    found = [next(data)['image'].tobytes() for _ in range(6)]
    data.close()  # nothing is read behind the back of the next test
    assert not skipped.reasons
    return found

  whole = rows()
  assert not flaky.waited
  flaky.failing = 7
  assert rows() == whole and len(flaky.waited) > 5
  assert 'the line is dead' in caplog.text and 'again in 1 s' in caplog.text


def test_a_store_that_never_answers_is_an_error(tmp_path, flaky):
  """Nothing is skipped, because other processes might have read it."""
  files = fsspec.filesystem('flaky')
  write_tars(tmp_path)
  for file in tmp_path.glob('*.tar'):
    files.pipe(f'/bucket/{file.name}', file.read_bytes())
  rows = formats.Tars('flaky://bucket/{00000..00001}.tar', None, ('txt',)).read(1)
  next(rows)
  flaky.failing = 1
  with pytest.raises(
    Unreachable,
    match=r'^flaky://bucket/00001.tar cannot be read \(the line is dead; tried 4 times\); '
    'see to the network',
  ):
    list(rows)
  assert flaky.waited == [1, 4, 16]
  flaky.failing = 0
  write_parquet(tmp_path)
  files.pipe('/bucket/0.parquet', (tmp_path / '0.parquet').read_bytes())
  rows = formats.Parquets('flaky://bucket/0.parquet', 'image', ('text',))
  flaky.failing = 1
  with pytest.raises(Unreachable, match='^flaky://bucket/0.parquet cannot be read'):
    list(rows.read(1))
  with pytest.raises(Unreachable, match='00001.tar cannot be read'):
    paths.names_and_sizes(['flaky://bucket/00001.tar'])
  with pytest.raises(Unreachable, match=r'^sources.0.: flaky://bucket/0.parquet cannot be read'):
    loader.batches(
      'images',
      sources=({'format': 'parquet', 'path': 'flaky://bucket/0.parquet'},),
      batch_size=4,
      image_size=SIZE,
    )


@pytest.mark.parametrize(
  'message, kind', [('Forbidden: b/0.tar', UserError), ('Service Unavailable', Unreachable)]
)
def test_a_store_that_refuses_is_a_user_error(flaky, message, kind):
  def refuse():
    raise OSError(message)

  with pytest.raises(UserError, match=message) as caught:
    paths.retry('gs://b/0.tar', refuse)
  assert type(caught.value) is kind


def test_a_missing_file_is_not_waited_for(tmp_path, flaky):
  for path in (f'{tmp_path}/nothing', 'flaky://bucket/nothing', str(tmp_path)):
    with pytest.raises(paths.NO_FILE_ERRORS):
      paths.open_file(path)
  assert not flaky.waited


def test_names_and_sizes(tmp_path, monkeypatch):
  for i in range(5):
    (tmp_path / str(i)).write_bytes(b'x' * i)
  files = [f'{tmp_path}/{i}' for i in range(6)]
  assert paths.names_and_sizes(files) == [
    ('0', 0),
    ('1', 1),
    ('2', 2),
    ('3', 3),
    ('4', 4),
    ('5', -1),
  ]
  monkeypatch.setattr(paths, '_MAX_SIZES', 3)
  assert paths.names_and_sizes(files) == [
    ('0', 0),
    ('1', None),
    ('2', 2),
    ('3', None),
    ('4', None),
    ('5', -1),
  ]


@pytest.mark.parametrize('name', ['x' * 300, 'loop', 'no'])
def test_impossible_paths_fail_at_once(tmp_path, name):
  (tmp_path / 'loop').symlink_to(tmp_path / 'loop')
  # A retry would raise UserError, 21 seconds later.
  with pytest.raises(paths.NO_FILE_ERRORS):
    paths.open_file(str(tmp_path / name))


AWKWARD = [
  'a[1].tar',
  'b*.tar',
  'c?.tar',
  'd {x,y}.tar',
  'e {1..3}.tar',
  '~f.tar',
  'g h.tar',
  'i::j.tar',
  '%41.tar',
]


@pytest.mark.parametrize('name', AWKWARD)
def test_an_existing_path_is_literal(tmp_path, monkeypatch, name):
  for other in ('a1.tar', 'bb.tar', 'cc.tar', 'd x.tar', 'e 1.tar', 'A.tar', name):
    (tmp_path / other).write_bytes(b'123' if other == name else b'')
  monkeypatch.chdir(tmp_path)
  for path in (f'{tmp_path}/{name}', f'file://{tmp_path}/{name}', name):
    (file,) = paths.expand(path, '.tar')
    assert file == path.removeprefix('file://')
    assert paths.names_and_sizes([file]) == [(name, 3)]
    assert paths.open_file(file).read() == b'123'


@pytest.mark.parametrize('folder', ['data [2024]', '{a,b}', '*'])
def test_the_existing_part_of_a_path_is_literal(tmp_path, monkeypatch, folder):
  inside = tmp_path / folder
  inside.mkdir()
  for name in ('00.tar', '01.tar', '02.tar', 'x[0].tar', 'note'):
    (inside / name).touch()
  monkeypatch.chdir(tmp_path)
  for base in (str(inside), folder):
    expected = [f'{base}/0{i}.tar' for i in range(3)]
    assert paths.expand(f'{base}/0*.tar', '.tar') == expected
    assert paths.expand(f'{base}/{{00..02}}.tar', '.tar') == expected
    assert paths.expand(f'{base}/0[0-2].tar', '.tar') == expected
    assert paths.expand(f'{base}/{{00,x[0]}}.tar', '.tar') == [expected[0], f'{base}/x[0].tar']
    assert paths.expand(base, '.tar') == [*expected, f'{base}/x[0].tar']
  with pytest.raises(UserError, match=r'9\*.tar matches no file'):
    paths.expand(f'{inside}/9*.tar', '.tar')


def test_the_home_folder(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.chdir(tmp_path)
  write_tars(tmp_path)
  assert paths.expand('~/{00000..00001}.tar', '.tar') == [
    f'{tmp_path}/0000{i}.tar' for i in range(2)
  ]
  assert (
    paths.expand('~/*.tar', '.tar')
    == paths.expand('~', '.tar')
    == [f'{tmp_path}/0000{i}.tar' for i in range(4)]
  )
  assert local_paths.expand_home('~') == str(tmp_path) and local_paths.expand_home('a/~') == 'a/~'
  assert local_paths.expand_home('~nobody_of_this_name/x') == '~nobody_of_this_name/x'
  (tmp_path / 'pairs').mkdir()
  write_folder(tmp_path / 'pairs')
  assert len(formats.Folder('~/pairs', None, ())) == 24
  (tmp_path / '~').mkdir()  # which exists, in this folder
  assert local_paths.expand_home('~') == '~'


def test_braces_and_globs(tmp_path):
  assert paths.expand('a/{08..11}/{x,y}.tar', '.tar') == [
    f'a/{name}.tar' for name in ('08/x', '08/y', '09/x', '09/y', '10/x', '10/y', '11/x', '11/y')
  ]
  assert paths.expand(['b', 'a{1..2}'], '.tar') == ['b', 'a1', 'a2']
  for name in ('b.tar', 'a.tar', 'c.txt'):
    (tmp_path / name).touch()
  for path in ('/*.tar', '', '/'):  # a folder is all of these in it
    assert paths.expand(f'{tmp_path}{path}', '.tar') == [f'{tmp_path}/a.tar', f'{tmp_path}/b.tar']
    assert paths.expand(f'file://{tmp_path}{path}', '.tar') == paths.expand([tmp_path], '.tar')
  with pytest.raises(UserError, match=r'\*.parquet matches no file'):
    paths.expand(tmp_path, '.parquet')


def test_remote_paths(tmp_path):
  import fsspec

  memory = fsspec.filesystem('memory')
  for file in sorted(Path(write_tars(tmp_path)['path']).parent.glob('*.tar')):
    memory.pipe(f'/bucket/{file.name}', file.read_bytes())
  assert sorted(numbers(batches(dict(format='tars', path='memory://bucket/*.tar')), 8)) == list(
    range(24)
  )
  write_parquet(tmp_path)
  memory.pipe('/bucket/0.parquet', (tmp_path / '0.parquet').read_bytes())
  assert sorted(
    numbers(batches(dict(format='parquet', path='memory://bucket/0.parquet')), 4)
  ) == list(range(12))
  with pytest.raises(UserError, match='nowhere://a.*pip install'):
    next(batches(dict(format='tars', path='nowhere://a/*.tar')))
