"""Records that cannot be used are skipped and counted by reason; too many of them are an error."""

import itertools

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numbered_images import batches, caption, image_file, number, numbers, sample, write_tar

from lavit_jax.data import formats
from lavit_jax.data.row_workers import SkipCounter
from lavit_jax.errors import UserError


def test_skipped_by_reason(tmp_path, caplog):
  good = [sample(i) for i in range(40)]
  bad = [
    ('a', {'png': b'no picture', 'txt': b'words'}),
    ('b', {'png': image_file(1)[:45], 'txt': b'words'}),
    ('c', {'txt': b'words'}),
    ('d', {'png': image_file(1), 'txt': b' \n<br> '}),
    ('e', {'png': image_file(1)}),
  ]
  write_tar(tmp_path / '0.tar', good[:20] + bad + good[20:])
  whole = (tmp_path / '0.tar').read_bytes()
  (tmp_path / '1.tar').write_bytes(whole[: len(whole) // 4])  # breaks off
  (tmp_path / '2.tar').write_bytes(
    whole[: len(whole) // 4 - 100] + b'?' * 600 + whole[len(whole) // 4 + 500 :]
  )  # a damaged header
  skipped = SkipCounter()
  source = dict(format='tars', path=f'{tmp_path}/{{0..3}}.tar')
  iterator = batches(
    source,
    heldout=(source,),
    split='heldout',
    skipped=skipped,
    num_threads=0,
    batch_size=1,
    max_skipped=1.0,
  )
  tar_format = formats.Tars(f'{tmp_path}/{{0..3}}.tar', None, ('txt',))
  before = []
  for unit in range(3):
    before.append(sum(isinstance(item, formats.Record) for *_, item in tar_format.read(unit)))
  assert before[0] == 45 and 5 < before[1] < 15 and 5 < before[2] < 15
  for _ in range(40 + before[1] + before[2]):
    next(iterator)
  assert number(next(iterator)['image'][0]) == 0  # the next epoch: all of the first has been seen
  assert skipped.reasons == {
    'corrupt image': 2,
    'no image': 1,
    'empty caption': 2,
    'broken tar': 2,
    'missing tar': 1,
  }
  assert skipped.metrics()['data/skipped_broken_tar'] == 2 and skipped.seen == {
    'records': 45 + before[1] + before[2],  # the first one is not counted again
    'files': 4,
  }
  assert '3.tar' in caplog.text and '0.tar: a' in caplog.text


@pytest.mark.parametrize('threads', [0, 2])
def test_too_many_skipped_is_an_error(tmp_path, threads, caplog):
  samples = [
    (str(i), {'png': image_file(i) if i % 10 else b'', 'txt': b'words'}) for i in range(100)
  ]
  write_tar(tmp_path / '0.tar', samples)
  source = dict(format='tars', path=f'{tmp_path}/0.tar')
  numbers_of = batches(source, task='images', batch_size=50, num_threads=threads, max_skipped=0.09)
  with pytest.raises(
    UserError,
    match=r'10 of 100 records were skipped \(no image 10\).*0.tar.*data.max_skipped=0.09',
  ):
    for _ in range(30):
      next(numbers_of)
  assert caplog.text.count('skipped: no image') == 3
  assert (
    len(
      list(
        itertools.islice(
          batches(source, task='images', batch_size=50, num_threads=threads, max_skipped=0.11), 30
        )
      )
    )
    == 30
  )


def test_data_without_an_example_is_an_error_at_any_limit(tmp_path):
  write_tar(tmp_path / '0.tar', [(str(i), {'png': b'', 'txt': b'words'}) for i in range(100)])
  source = dict(format='tars', path=f'{tmp_path}/0.tar')
  with pytest.raises(
    UserError,
    match=r': 100 of 100 records were skipped \(no image 100\).*; there is no example in the data',
  ):
    next(batches(source, task='images', max_skipped=1.0))


def test_broken_tars_have_a_share_of_their_own(tmp_path):
  for t in range(11):
    write_tar(tmp_path / f'{t}.tar', [sample(i) for i in range(30)])
  iterator = batches(
    dict(format='tars', path=f'{tmp_path}/{{0..21}}.tar'), task='images', batch_size=10
  )
  with pytest.raises(
    UserError, match=r'1\d of 2[012] files were skipped \(missing tar 1\d\).*\d\d.tar'
  ):
    for _ in range(100):
      next(iterator)
  with pytest.raises(
    UserError, match='3 files in a row have no record .missing tar.*check the path'
  ):
    next(batches(dict(format='tars', path=f'{tmp_path}/{{97..99}}.tar'), task='images'))


@pytest.mark.parametrize('kind', ['tars', 'parquet'])
def test_a_bad_file_counts_once_however_often_it_is_read(tmp_path, kind, caplog):
  """One of nine files is empty: the epochs add nothing to it. A second one is too much."""
  suffix = 'tar' if kind == 'tars' else 'parquet'
  for f in range(8):
    file_numbers = range(8 * f, 8 * f + 8)
    file = tmp_path / f'{f}.{suffix}'
    if kind == 'tars':
      write_tar(file, [sample(i) for i in file_numbers])
    else:
      table = {
        'image': [image_file(i) for i in file_numbers],
        'text': [caption(i) for i in file_numbers],
      }
      pq.write_table(pa.table(table), file)
  source = dict(format=kind, path=str(tmp_path))
  (tmp_path / f'8.{suffix}').write_bytes(b'')
  skipped = SkipCounter()
  iterator = batches(source, batch_size=8, shards=8, skipped=skipped)
  assert set(numbers(iterator, 8 * 10)) == set(range(64))
  iterator.close()
  assert skipped.skipped['files'] == 1 and skipped.seen['files'] == 9
  assert caplog.text.count('skipped: broken') == 1
  (tmp_path / f'9.{suffix}').write_bytes(b'')
  iterator = batches(source, batch_size=8, shards=8)
  with pytest.raises(UserError, match=r'2 of \d+ files were skipped \(broken \w+ 2\)'):
    numbers(iterator, 8 * 10)
  iterator.close()
