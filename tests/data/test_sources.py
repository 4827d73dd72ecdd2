"""Every format is read as it was written, in order, from any state; bad records are skipped.

Several processes are in test_streams.py.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numbered_images import (
  FOLDER,
  SIZE,
  TOKENS,
  WRITERS,
  batches,
  caption,
  image_file,
  numbers,
  write_tar,
)

from lavit_jax.data import formats, loader, paths


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
