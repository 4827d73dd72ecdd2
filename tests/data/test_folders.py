"""Folders of images: texts beside images, bare images, changes between two parts of a run.

Folders that cannot be read are named. Files of captions are in test_captions_files.py.
"""

import json

import pytest
from captioned_folders import NAMES, ROWS, SENTENCES, pairs_of, read, table
from numbered_images import batches, caption, image_file, number

from lavit_jax.data import formats
from lavit_jax.data.row_workers import SkipCounter
from lavit_jax.errors import UserError


@pytest.mark.parametrize(
  'options, message',
  [
    (dict(path=['d', 'e']), 'is not one folder'),
    (dict(path='nowhere'), 'nowhere: no such folder'),
    (dict(captions='no.csv'), "has no file 'no.csv'; it has 3 files"),
    (dict(captions=5), 'captions 5, which is no str'),
    (dict(text=5), 'text 5, which is no str'),
    (dict(text=('a', None)), r"text \('a', None\), which"),
    (dict(image=('a',)), 'image'),
    (dict(path=None), 'path'),
    (dict(use=None), 'use'),
    (dict(weight=None), 'weight'),
  ],
)
def test_options_of_another_type_are_errors_of_one_line(folder, options, message):
  with pytest.raises(UserError, match=message) as caught:
    batches(dict(format='folder', path=str(folder)) | options)
  assert '\n' not in str(caught.value) and str(caught.value).startswith('sources[0]')


def test_a_folder_that_is_a_file_of_captions(folder):
  (folder / 'x.csv').write_text(table(SENTENCES))
  with pytest.raises(
    UserError, match=rf"x.csv is a file; give the folder, path='{folder}', and.*captions='x.csv'"
  ):
    formats.Folder(f'{folder}/x.csv', None, ())


def test_captions_on_the_lines_of_a_text_beside_the_image(folder):
  """An image without such a file has no caption."""
  (folder / '0.txt').write_text('\ufeffone dog\r\n\r\ntwo dogs\n', encoding='utf-8')
  (folder / '1.png.txt').write_text('an owl')
  (folder / '._0.png').write_bytes(b'of macOS')
  assert read(folder) == {'0.png': ('one dog', 'two dogs'), '1.png': ('an owl',), '2.png': ()}


def test_bare_images_are_enough_where_no_captions_are_needed(folder):
  (folder / 'deeper').mkdir()
  (folder / 'deeper' / '3.PNG').write_bytes(image_file(3))
  source = dict(format='folder', path=str(folder))
  batch = next(batches(source, task='images', batch_size=4, heldout=(source,), split='heldout'))
  assert [number(image) for image in batch['image']] == [0, 1, 2, 3]
  with pytest.raises(UserError, match=r'sources\[0\]: .* has no captions'):
    batches(source)
  (folder / 'captions.csv').write_text('file_name,label\n0.png,5\n')
  assert len(formats.Folder(str(folder), None, (), captioned=False)) == 1


def test_texts_without_images(tmp_path):
  (tmp_path / 'a.txt').write_text('first line\nsecond line\n')
  records = formats.Folder(str(tmp_path), None, (), use='text')
  assert records.read(0)[:2] == (b'', ('first line\nsecond line\n',))
  (tmp_path / 'captions.jsonl').write_text('{"text": "one"}\n{"text": "one"}\n')
  records = formats.Folder(str(tmp_path), None, (), use='text')
  assert [records.read(i).texts for i in range(len(records))] == [('one',), ('one',)]
  assert (
    next(batches(dict(format='folder', path=str(tmp_path), use='text')))['kind'].tolist() == [2] * 3
  )


@pytest.mark.parametrize('beside', [False, True])
@pytest.mark.parametrize('what', ['caption', 'image'])
def test_changes_between_two_parts_of_a_run_are_errors(folder, beside, what):
  def write(word):
    for i in range(len(NAMES)):
      (folder / f'{i}.txt').write_text(f'{word} {i}')
    if not beside:
      (folder / 'captions.jsonl').write_text(
        '\n'.join(json.dumps(dict(file_name=name, text=word)) for name in NAMES)
      )

  write('one')
  source = dict(format='folder', path=str(folder))
  iterator = batches(source)
  next(iterator)
  state = json.loads(json.dumps(iterator.get_state()))
  batches(source).set_state(state)
  if what == 'caption':
    write('two')
  else:
    (folder / '1.png').write_bytes(image_file(7) + b'...')
  with pytest.raises(ValueError, match=r'^changed are sources\[0\].contents \w{8} -> \w{8}$'):
    batches(source).set_state(state)
  del state['of']['sources'][0]['contents']  # of a version that did not write it
  batches(source).set_state(state)


def test_names_as_windows_writes_them_and_whole_paths(folder):
  (folder / 'deep').mkdir()
  (folder / '0.png').rename(folder / 'deep' / '0.png')
  rows = [
    dict(file_name='deep\\0.png', text='a'),
    dict(file_name=f'{folder}/1.png', text='b'),
    dict(file_name='./2.png', text='c'),
  ]
  (folder / 'captions.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  opened = formats.Folder(str(folder), None, ())
  assert [opened.read(i)[:2] for i in range(3)] == [
    (image_file(i), (word,)) for i, word in enumerate('abc')
  ]


def test_a_second_file_of_captions_is_a_warning(folder, caplog):
  (folder / 'captions.jsonl').write_text('\n'.join(map(json.dumps, ROWS)))
  (folder / 'metadata.csv').write_text(table(['x'] * 3))
  assert read(folder) == pairs_of(SENTENCES)
  assert 'captions.jsonl is read, and not metadata.csv; say which with captions=' in caplog.text


def test_missing_images_are_counted(folder):
  (folder / 'captions.jsonl').write_text(
    '\n'.join(json.dumps(dict(file_name=name, text=caption(i))) for i, name in enumerate(NAMES))
  )
  (folder / '1.png').unlink()
  skipped = SkipCounter()
  source = dict(format='folder', path=str(folder))
  data = batches(
    source, heldout=(source,), split='heldout', skipped=skipped, num_threads=0, batch_size=1
  )
  assert [number(next(data)['image'][0]) for _ in range(2)] == [0, 2]
  assert skipped.reasons == {'no image': 1}


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


def test_a_text_beside_an_image_in_utf16_without_a_byte_order_mark(folder):
  for name in NAMES:
    (folder / name).with_suffix('.txt').write_bytes('a dog'.encode('utf-16-le'))
  skip = formats.Folder(str(folder), None, ()).read(0)
  assert skip.reason == 'broken caption'
  assert f'{folder}/0.txt: UTF-16-LE without a byte order mark' in skip.origin
