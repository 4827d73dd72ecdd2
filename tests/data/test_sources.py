"""Every format is read as it was written, in order, from any state; bad records are skipped.

Several processes are in test_streams.py.
"""

import itertools
import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numbered_images import (
  FOLDER,
  SIZE,
  WRITERS,
  batches,
  caption,
  image_file,
  number,
  sample,
  write_parquet,
  write_tar,
  write_tars,
)

from lavit_jax.data import formats, loader, paths, tars, text
from lavit_jax.data.row_workers import SkipCounter
from lavit_jax.errors import UserError

TOKENS = text.TextTokenizer.load(FOLDER)


def numbers(iterator, count) -> list[int]:
  """The numbers of the images of `count` batches, each checked to have its own caption."""
  found = []
  for batch in itertools.islice(iterator, count):
    for i, image in enumerate(batch['image']):
      found.append(number(image))
      if 'text' in batch:
        assert TOKENS.decode(batch['text'][i][: batch['text_length'][i]]) in (
          caption(found[-1]),
          f'again {found[-1]}',
        )
  return found


@pytest.mark.parametrize('name', WRITERS)
def test_each_epoch_has_every_image_once_in_another_order(written, name):
  iterator = batches(written[name])
  first, second, third = (numbers(iterator, 8) for _ in range(3))
  assert sorted(first) == sorted(second) == sorted(third) == list(range(24))
  assert len({tuple(epoch) for epoch in (first, second, third, range(24))}) == 4
  assert numbers(batches(written[name]), 8) == first != numbers(batches(written[name], seed=2), 8)


@pytest.mark.parametrize('name', WRITERS)
def test_held_out_sources_come_in_order(written, name):
  iterator = batches(written[name], heldout=(written[name],), split='heldout')
  found = numbers(iterator, 8)
  assert sorted(found) == list(range(24)) and numbers(iterator, 8) == found
  assert name == 'tfds' or found == list(
    range(24)
  )  # tensorflow-datasets writes in an order of its own


def test_fields_are_those_of_the_composer(written):
  for task in ('images', 'lm'):
    batch = next(batches(written['tars'], task=task))
    shapes = loader.batch_shapes(task, 3, SIZE, 24)
    assert {name: (value.shape, value.dtype) for name, value in batch.items()} == shapes


@pytest.mark.parametrize('name', [*WRITERS, 'mix'])
@pytest.mark.parametrize('threads', [0, 3])
def test_goes_on_exactly_where_it_stopped(written, name, threads):
  sources = (
    [written[name]]
    if name != 'mix'
    else [written['tars'] | {'weight': 3.0}, written['folder'], written['parquet']]
  )

  def fresh():
    return batches(*sources, num_threads=threads, shares={'caption': 1, 'draw': 1}, crop='random')

  iterator = fresh()
  states = []
  expected = []
  for _ in range(18):
    states.append(json.loads(json.dumps(iterator.get_state())))
    expected.append(next(iterator))
  assert len(json.dumps(states[-1])) < 500
  other = fresh()
  for position in (17, 0, 1, 5, 8, 12):
    other.set_state(states[position])
    for batch in expected[position : position + 3]:
      for key, value in next(other).items():
        np.testing.assert_array_equal(value, batch[key], err_msg=f'{key} after {position}')


def test_nothing_goes_on_with_other_data(written):
  """Where a position would mean another record; the error names what has changed."""
  tars = written['tars']
  state = json.loads(json.dumps(batches(tars).get_state()))
  for other, message in (
    (
      dict(sources=(written['folder'],)),
      r'are sources\[0\].format tars -> folder, sources\[0\].units 4 -> 24, ',
    ),
    (dict(sources=(tars, written['folder'])), r'are sources\[1\].format \(none\) -> folder, '),
    (dict(shards=3), 'are shards 1 -> 3, '),
    (dict(seed=7), 'are seed 1 -> 7$'),
    (dict(sources=(tars | {'window': 6},)), r'are sources\[0\].window 5 -> 6$'),
  ):
    with pytest.raises(ValueError, match=message):
      batches(**{'sources': (tars,)} | other).set_state(state)
  batches(
    tars | {'weight': 2.0, 'text': 'json.again', 'use': 'draw'}, max_skipped=0.5, batch_size=4
  ).set_state(state)


@pytest.mark.parametrize('name', WRITERS)
def test_a_source_is_identified_by_its_files(written, tmp_path, name):
  """Another name or size is another source, with as many files; another folder is not."""
  state = batches(written[name]).get_state()
  if name == 'tfds':  # which will not be written twice
    again = written[name] | {
      'path': shutil.copytree(written[name]['path'], tmp_path / 'numbered' / '1.0.0').as_posix()
    }
  else:
    again = WRITERS[name](tmp_path)
  batches(again).set_state(state)
  if name == 'tfds':
    (info,) = tmp_path.glob('**/dataset_info.json')
    info.write_text(re.sub(r'"numBytes": "\d+"', '"numBytes": "7"', info.read_text()))
    others = [again]
  elif name == 'folder':
    captions = tmp_path / 'captions.jsonl'
    captions.write_text(captions.read_text().replace('/7.png', '/77.png'))
    others = [again]
  else:
    files = paths.expand(again['path'], '')
    Path(files[-1]).rename(tmp_path / 'other')
    others = [
      again | {'path': [*files[:-1], f'{tmp_path}/other']},
      again | {'path': [*files[:-1], files[0]]},
    ]
  if name == 'tars':
    longer = tmp_path / 'longer' / Path(files[-1]).name
    longer.parent.mkdir()
    longer.write_bytes((tmp_path / 'other').read_bytes() + bytes(512))
    others.append(again | {'path': [*files[:-1], str(longer)]})
  for other in others:
    contents = r', sources\[0\].contents \w{8} -> \w{8}' if name == 'folder' else ''
    with pytest.raises(
      ValueError,
      match=rf'^changed are sources\[0\].files [0-9a-f]{{8}} -> [0-9a-f]{{8}}{contents}$',
    ):
      batches(other).set_state(state)


def test_a_process_ends_with_its_own_status_while_threads_read_on(written):
  program = f"""
import sys
from lavit_jax.data import loader
kept = loader.batches('images', sources=({written['tars']!r},), batch_size=4, image_size=8)
next(kept)  # and a tar waits open
def main():
  iterator = loader.batches('images', sources=({written['tars']!r},), batch_size=4, image_size=8)
  next(iterator)
  sys.exit(3)
main()
"""
  done = subprocess.run([sys.executable, '-c', program], timeout=60, capture_output=True, text=True)
  assert (done.returncode, done.stderr) == (3, '')


def test_a_long_row_group_goes_on_at_any_row(tmp_path):
  """It is read in batches of 64 rows."""
  pq.write_table(
    pa.table(
      {'image': [image_file(i) for i in range(150)], 'text': [caption(i) for i in range(150)]}
    ),
    tmp_path / 'a.parquet',
  )
  records = formats.Parquets(str(tmp_path / 'a.parquet'), 'image', ('text',))
  whole = list(records.read(0))
  assert len(whole) == 151 and whole[140][2].texts == (caption(140),)
  for start in (1, 63, 64, 65, 128, 149, 150):
    assert list(records.read(0, start)) == whole[start:], start


def test_weights(written, tmp_path):
  other = tmp_path / 'other'
  other.mkdir()
  write_tar(
    other / 'a.tar',
    [(f'{i}', {'png': image_file(i), 'txt': caption(i).encode()}) for i in range(1000, 1040)],
  )
  found = numbers(
    batches(
      written['folder'] | {'weight': 3.0}, dict(format='tars', path=f'{other}/a.tar'), batch_size=40
    ),
    5,
  )
  assert abs(np.mean(np.array(found) >= 1000) - 0.25) < 0.02


def test_uses(written, tmp_path):
  texts = tmp_path / 'texts.tar'
  write_tar(texts, [(str(i), {'txt': f'only words {i}'.encode()}) for i in range(9)])
  batch = next(
    batches(
      written['tars'] | {'use': 'draw'},
      dict(format='tars', path=str(texts), use='text'),
      batch_size=64,
      drop_text=0.5,
      draw_text_weight=0.25,
    )
  )
  kind = batch['kind']
  length = batch['text_length']
  assert (
    set(kind) == {1, 2}
    and (length[kind == 2] > 0).all()
    and 0.2 < (length[kind == 1] == 0).mean() < 0.8
  )
  assert (batch['image'][kind == 2] == 0).all() and TOKENS.decode(
    batch['text'][kind == 2][0]
  ).startswith('only words')
  inside = np.arange(batch['text'].shape[1] + 1) < length[:, None]
  assert set(batch['text_weight'][inside & (kind == 1)[:, None]]) == {0.25}
  shared = next(
    batches(written['tars'], batch_size=200, shares={'caption': 1, 'draw': 3, 'answer': 5})
  )['kind']
  assert set(shared) == {0, 1} and abs(shared.mean() - 0.75) < 0.12


def test_one_caption_of_several_is_chosen(written):
  batch = next(batches(written['tars'] | {'text': ('json.caption', 'json.again')}, batch_size=96))
  words = [TOKENS.decode(ids[:n]).split()[0] for ids, n in zip(batch['text'], batch['text_length'])]
  assert 24 < words.count('again') < 72 and words.count('again') + words.count('thing') == 96


# ------------------------------------------------------------------------------------- skips


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


@pytest.mark.parametrize(
  'source, message',
  [
    (
      dict(format='zip', path='x'),
      r"sources\[0\] has format 'zip'; choose one of arrayrecord, tfds",
    ),
    (dict(format='tars', path='x', wieght=1), "does not know 'wieght'; did you mean 'weight'"),
    (dict(format='tars'), 'no path'),
    (dict(format='tars', path='nowhere/*.tar'), 'nowhere/.*matches no file'),
    (dict(format='tars', path='x', use='look'), "use 'look'"),
    (dict(format='tars', path='x', weight=0), 'weight must be a number above 0'),
    (dict(format='tars', path='x', text=5), r'sources\[0\] has text 5, which is no str'),
    (dict(format='tars', path='x', image=('jpg', 5)), r"has image \('jpg', 5\), which is no str"),
    (dict(format='parquet', path='x', image=('a', 'b')), 'give the name of one column'),
    (dict(format='arrayrecord', path='x', image='jpg'), 'each record has one image; leave it out'),
    (
      dict(format='tars', path='x', weight=float('inf')),
      r'weight must be a number above 0 \(now inf\)',
    ),
    (dict(format='arrayrecord', path='gs://a/b.array_record'), 'local files only'),
    (
      dict(format='arrayrecord', path='nowhere.array_record'),
      'no such file; make it with lavit data pack',
    ),
    (dict(format='folder', path='.'), 'has no captions.jsonl'),
    (dict(format='parquet', path='nowhere.parquet'), 'not a Parquet file'),
    (dict(format='tfds', path='nothing_of_this_name'), 'tfds .nothing_of_this_name'),
  ],
)
def test_a_bad_source_is_named(source, message):
  with pytest.raises(UserError, match=message):
    batches(source)


@pytest.mark.parametrize(
  'options, message',
  [
    (dict(task='contrastive'), "tasks 'images' and 'lm'"),
    (dict(split='heldout'), 'data.heldout'),
    (dict(crop='round'), "unknown crop 'round'"),
    (dict(split='test'), "unknown split 'test'"),
    (dict(shares={'captions': 1}), 'shares must be'),
  ],
)
def test_bad_options_with_sources(options, message):
  with pytest.raises(ValueError, match=message):
    batches(dict(format='tars', path='x'), **options)


# ------------------------------------------------------------------------------- files, names


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


@pytest.mark.parametrize(
  'options',
  [
    dict(format=tarfile.PAX_FORMAT),
    dict(format=tarfile.GNU_FORMAT),
    dict(format=tarfile.USTAR_FORMAT),
  ],
)
def test_tars_of_every_dialect(tmp_path, options):
  long = ('folder/' if options['format'] == tarfile.USTAR_FORMAT else 'ü' * 40 + '/') + 'x' * 90
  write_tar(
    tmp_path / 'a.tar',
    [
      ('first', {'png': image_file(0), 'txt': b'zero'}),
      (long, {'png': image_file(1), 'TXT': b'one'}),
    ],
    **options,
  )
  rows = list(formats.Tars(str(tmp_path / 'a.tar'), None, ('txt',)).read(0))
  assert [record.texts for *_, record in rows[:-1]] == [('zero',), ('one',)] and rows[-1][
    2
  ].reason == ''
  again = list(
    formats.Tars(str(tmp_path / 'a.tar'), None, ('txt',)).read(0, rows[0][1])
  )  # from the end of the first one on
  assert again == rows[1:]


def test_a_tar_without_an_end_mark_keeps_its_last_sample(tmp_path):
  """Half a sample does not count: one that lacks an extension of the one before it."""
  write_tar(tmp_path / 'whole.tar', [sample(i) for i in range(3)])
  whole = (tmp_path / 'whole.tar').read_bytes()
  with tarfile.open(tmp_path / 'whole.tar') as tar:
    ends = [member.offset_data + -(-member.size // 512) * 512 for member in tar]
  rows = list(formats.Tars(str(tmp_path / 'whole.tar'), None, ('txt',)).read(0))
  for cut, left, reason in (
    (ends[-1], 3, ''),
    (ends[-2], 2, 'broken tar'),
    (ends[-5], 2, ''),
    (ends[-1] + 100, 2, 'broken tar'),
    (0, 0, 'broken tar'),
  ):
    (tmp_path / 'cut.tar').write_bytes(whole[:cut])
    *found, last = formats.Tars(str(tmp_path / 'cut.tar'), None, ('txt',)).read(0)
    assert ([row[2][:2] for row in found], last[2].reason) == (
      [row[2][:2] for row in rows[:left]],
      reason,
    ), cut
  (tmp_path / 'cut.tar').write_bytes(whole[: ends[-1]])
  cut = formats.Tars(str(tmp_path / 'cut.tar'), None, ('txt',))
  for (_, end, _), left in zip(rows[:3], (3, 2, 1)):  # from the end of each sample on
    assert len(list(cut.read(0, end))) == left and list(cut.read(0, end))[-1][2].reason == ''


@pytest.mark.parametrize(
  'name, content',
  [
    ('captions.csv', 'file_name,text\n0.png,"a, b"\n1.png,c\n0.png,d\n'),
    ('captions.tsv', 'file_name\ttext\n0.png\ta, b\n1.png\tc\n0.png\td\n'),
    (
      'coco.json',
      json.dumps(
        {
          'images': [{'id': 5, 'file_name': '0.png'}, {'id': 6, 'file_name': '1.png'}],
          'annotations': [
            {'image_id': 5, 'caption': 'a, b'},
            {'image_id': 6, 'caption': 'c'},
            {'image_id': 5, 'caption': 'd'},
          ],
        }
      ),
    ),
  ],
)
def test_captions_of_a_folder(tmp_path, name, content):
  (tmp_path / name).write_text(content)
  (tmp_path / '0.png').write_bytes(image_file(0))
  folder = formats.Folder(str(tmp_path), None, (), captions=name)
  assert (
    len(folder) == 2
    and folder.read(0)[:2] == (image_file(0), ('a, b', 'd'))
    and folder.read(1).reason == 'no image'
  )


def test_a_folder_whose_captions_have_another_name(tmp_path):
  (tmp_path / 'captions.jsonl').write_text('{"image": "0.png", "text": "words"}')
  with pytest.raises(
    UserError,
    match="captions.jsonl has no field 'file_name'; its fields are 'image', 'text'; "
    'name the one to use with image=',
  ):
    formats.Folder(str(tmp_path), None, None)


def test_captions_of_a_folder_that_are_no_strings(tmp_path):
  """A list is a choice of captions, as in tars; what is none is as good as empty."""
  texts = [['an owl', 'a bird'], 5, None, {'en': 'a cat'}, [], ['a dog', 6, None], 0, True, 'a bee']
  rows = [{'file_name': f'{i}.png', 'text': words} for i, words in enumerate(texts)]
  (tmp_path / 'captions.jsonl').write_text(
    '\n'.join(map(json.dumps, [*rows, {'file_name': '0.png', 'text': 'it'}]))
  )
  for i in range(len(texts)):
    (tmp_path / f'{i}.png').write_bytes(image_file(i))
  folder = formats.Folder(str(tmp_path), None, ())
  assert [folder.read(i).texts for i in range(len(folder))] == [
    ('an owl', 'a bird', 'it'),
    (),
    (),
    (),
    (),
    ('a dog',),
    (),
    (),
    ('a bee',),
  ]
  skipped = SkipCounter()
  source = dict(format='folder', path=str(tmp_path))
  data = batches(
    source,
    heldout=(source,),
    split='heldout',
    skipped=skipped,
    num_threads=0,
    batch_size=1,
    max_skipped=1.0,
  )
  assert [number(next(data)['image'][0]) for _ in range(3)] == [0, 5, 8]
  assert skipped.reasons == {'empty caption': 6}


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


@pytest.mark.parametrize(
  'content', [b'0 path=x\n', b'99 path=x\n', b'-3 path=x\n', b'11 size=ten\n', b'path']
)
def test_a_damaged_pax_header_ends_the_tar(content):
  with pytest.raises(tars.Broken):
    tars._parse_pax(content)


def test_the_end_of_a_text_that_was_cut_is_not_taught(tmp_path):
  """A text that is cut at `text_length` has no end; one that fits to the last token has."""
  words = [' '.join(f'word{k}' for k in range(1000)), 'red sun', 'x' * 5000]
  exact = TOKENS.decode(TOKENS.encode('the quick brown fox jumps over a lazy dog')[:8])
  write_tar(
    tmp_path / 'a.tar',
    [
      (str(i), {'png': image_file(i), 'txt': word.encode()})
      for i, word in enumerate([*words, exact])
    ],
  )
  room = len(TOKENS.encode(exact))
  for use, kind in (('caption', 0), ('draw', 1)):
    source = dict(format='tars', path=f'{tmp_path}/a.tar', use=use)
    batch = next(
      loader.batches(
        'lm',
        sources=[source],
        batch_size=32,
        image_size=SIZE,
        tokenizer_folder=FOLDER,
        text_length=room,
        drop_text=0.0,
      )
    )
    behind = np.take_along_axis(batch['text_weight'], batch['text_length'][:, None], axis=1)[:, 0]
    ends = {
      TOKENS.decode(ids[:n]): float(weight)
      for ids, n, weight in zip(batch['text'], batch['text_length'], behind)
    }
    assert (batch['kind'] == kind).all()
    assert ends.pop('red sun') == 1 and ends.pop(exact) == 1
    assert set(ends.values()) == {0}
