"""`lavit data pack` keeps images and texts, goes on where it stopped, and counts what it skips."""

import json
import os
import re

import pytest
from numbered_images import batches, caption, image_file, numbers, sample, write_tar, write_tars

from lavit_jax import cli
from lavit_jax.data import array_record, formats, stores, tars
from lavit_jax.errors import UserError


def stored(folder):
  """{first text: record} of all packed records."""
  records = formats.ArrayRecords(f'{folder}/*.array_record', None, ('txt', 'json.again'))
  return {record.texts[0]: record for record in map(records.read, range(len(records)))}


@pytest.mark.parametrize('workers', [1, 2])
def test_images_and_texts_are_the_same(tmp_path, workers):
  source = write_tars(tmp_path)
  packed = array_record.write_array_records(
    source['path'], str(tmp_path / 'out'), workers, log=lambda line: None
  )
  assert packed == (24, {}, 0, [])
  found = stored(tmp_path / 'out')
  assert len(found) == 24
  for i in range(24):
    assert found[caption(i)][:2] == (image_file(i), (caption(i), f'again {i}'))
  names = [f'{t:05d}.array_record' for t in range(4)]
  assert sorted(os.listdir(tmp_path / 'out')) == sorted(names + [f'{name}.json' for name in names])


def test_the_layout_is_as_documented(tmp_path):
  record = stores.pack_record('key', {'txt': 'wörds'}, b'image')
  length = int.from_bytes(record[:4], 'little')
  assert (
    json.loads(record[4 : 4 + length]) == {'key': 'key', 'fields': {'txt': 'wörds'}}
    and record[4 + length :] == b'image'
  )
  assert stores.unpack_record(record) == ({'key': 'key', 'fields': {'txt': 'wörds'}}, b'image')


def test_goes_on_where_it_was_stopped(tmp_path):
  source = write_tars(tmp_path)
  out = tmp_path / 'out'
  lines = []

  def stop(line):
    lines.append(line)
    if len(lines) == 2:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    array_record.write_array_records(source['path'], str(out), log=stop)
  done = {path: path.stat().st_mtime_ns for path in out.glob('*.array_record')}
  assert len(done) == 2
  (out / '.00002.array_record.half').write_bytes(b'half a file')
  packed = array_record.write_array_records(source['path'], str(out), log=lines.append)
  assert packed == (24, {}, 2, []) and len(lines) == 4 and len(stored(out)) == 24
  assert {path: path.stat().st_mtime_ns for path in done} == done and not list(out.glob('.*'))
  again = array_record.write_array_records(source['path'], str(out), log=lines.append)
  assert again == (24, {}, 4, []) and len(lines) == 4


def test_what_is_skipped_is_counted_over_all_runs(tmp_path, capsys):
  bad = [('x', {'png': image_file(3)[:45], 'txt': b'cut'}), ('y', {'txt': b'no picture'})]
  write_tar(tmp_path / '0.tar', [sample(i) for i in range(6)] + bad)
  whole = (tmp_path / '0.tar').read_bytes()
  (tmp_path / '1.tar').write_bytes(whole[: len(whole) // 2])
  arguments = ['data', 'pack', f'{tmp_path}/{{0..2}}.tar', '--out', str(tmp_path / 'out')]
  assert cli.main(arguments) == 2  # 2.tar is not there
  out, err = capsys.readouterr()
  assert (
    'broken tar 1, corrupt image 1, no image 1' in out
    and '1 tars are not packed: ' in err
    and '2.tar could not be opened: [Errno 2]' in err
  )
  write_tar(tmp_path / '2.tar', [sample(9)])
  assert cli.main(arguments) == 0
  out, _ = capsys.readouterr()
  assert 'skipped: 3, broken tar 1, corrupt image 1, no image 1; tars done before: 2' in out
  assert len(stored(tmp_path / 'out')) == 7 and 6 < int(out.splitlines()[-1].split()[0]) < 12


def test_two_tars_of_one_name_are_refused(tmp_path):
  for name in 'ab':
    (tmp_path / name).mkdir()
    write_tar(tmp_path / name / '0.tar', [sample(1)])
  with pytest.raises(UserError, match='a/0.tar and .*b/0.tar would both become'):
    array_record.write_array_records(f'{tmp_path}/{{a,b}}/0.tar', str(tmp_path / 'out'))


def test_a_failure_to_read_is_no_broken_tar(tmp_path, monkeypatch, capsys):
  """The samples before it are not taken for the whole tar; the next run reads it again."""
  source = write_tars(tmp_path)
  whole = tars.samples

  def samples(file):
    for n, member_sample in enumerate(whole(file)):
      if n == 2:
        raise ConnectionResetError('the network is gone')
      yield member_sample

  monkeypatch.setattr(tars, 'samples', samples)
  assert cli.main(['data', 'pack', source['path'], '--out', str(tmp_path / 'out')]) == 2
  out, err = capsys.readouterr()
  assert out.splitlines()[-1].startswith('0 records') and '2/4  ' in out
  assert re.search(
    r'4 tars are not packed: \S*00000.tar failed after 2 samples: the network is gone, '
    'and others; the same command',
    err,
  )
  monkeypatch.undo()
  assert array_record.write_array_records(
    source['path'], str(tmp_path / 'out'), 1, log=lambda line: None
  ) == (24, {}, 0, [])


@pytest.mark.parametrize(
  'path', ['', '/', '/*.array_record', 'file://', 'file:///00000.array_record']
)
def test_paths_of_array_records(written, path):
  folder = written['arrayrecord']['path'].removesuffix('/*.array_record')
  count = 6 if '0000' in path else 24
  path = (
    f'file://{folder}{path.removeprefix("file://")}'
    if path.startswith('file://')
    else folder + path
  )
  assert sorted(
    numbers(batches(dict(format='arrayrecord', path=path), batch_size=6), count // 6)
  ) == list(range(count))


@pytest.mark.parametrize('content', [b'', b'{"records": 6}', b'?' * 200_000])
def test_what_is_no_array_record_is_named(written, tmp_path, content):
  (tmp_path / 'a.txt').write_bytes(content)
  with pytest.raises(
    UserError,
    match=r'^sources\[0\]: \S*/a.txt: no ArrayRecord, or damaged \(.*\); '
    r'give the folder or its \*.array',
  ):
    batches(
      dict(format='arrayrecord', path=[written['arrayrecord']['path'], str(tmp_path / 'a.txt')])
    )
