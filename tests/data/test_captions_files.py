"""Files of captions of a folder in every form, and errors that name the line."""

import csv
import json
import random

import pytest
from captioned_folders import NAMES, ROWS, SENTENCES, pairs_of, read, table
from numbered_images import image_file

from lavit_jax.data import captions_file, formats
from lavit_jax.errors import UserError

LONG = ['many words ' * 20_000, 'an owl', 'a pie']  # csv's own limit is 131,072 characters
LINES = ['a dog\nand a cat', 'an owl,\n\nat night', 'a "pie"']
COLUMNS = dict(file_name=NAMES, text=SENTENCES)


@pytest.mark.parametrize(
  'name, content, captions',
  [
    ('captions.csv', table(SENTENCES), SENTENCES),
    ('captions.csv', table(SENTENCES, quoting=csv.QUOTE_ALL), SENTENCES),
    ('captions.csv', table(SENTENCES, delimiter=';'), SENTENCES),
    ('captions.csv', table(LONG), LONG),
    ('captions.csv', table(LINES), LINES),
    ('captions.csv', '\ufeff' + table(SENTENCES), SENTENCES),
    (
      'captions.csv',
      'file_name,text\n' + ''.join(map('{},{}\n'.format, NAMES, SENTENCES)),
      SENTENCES,
    ),
    (
      'captions.csv',
      'text,file_name\n' + ''.join(map('{1},{0}\n'.format, NAMES, SENTENCES)),
      SENTENCES,
    ),
    (
      'captions.csv',
      'file_name,width,text\n' + ''.join(map('{},32,{}\n'.format, NAMES, SENTENCES)),
      SENTENCES,
    ),
    (
      'captions.csv',
      'file_name,text\n0.png,"Hm", she said, "no"\n1.png,"what?\n2.png,a 12" pie\n',
      ['"Hm", she said, "no"', '"what?', 'a 12" pie'],
    ),
    ('captions.csv', 'File Name , TEXT\n0.png,a\n1.png,b\n2.png,c\n\n', ['a', 'b', 'c']),
    (
      'captions.tsv',
      'file_name\ttext\n0.png\t"Never\n1.png\ta "b"\n2.png\tc"\n',
      ['"Never', 'a "b"', 'c"'],
    ),
    (
      'captions.tsv',
      'file_name\ttext\n0.png\t"all of it"\n1.png\tb\n2.png\tc',
      ['"all of it"', 'b', 'c'],
    ),
    ('captions.tsv', table(LINES, delimiter='\t'), LINES),
    ('captions.tsv', table(SENTENCES, delimiter='\t', quoting=csv.QUOTE_ALL), SENTENCES),
    ('captions.tsv', table(SENTENCES, delimiter='\t').encode('utf-16'), SENTENCES),
    ('captions.jsonl', '\ufeff' + '\r\n'.join(map(json.dumps, ROWS)) + '\r\n', SENTENCES),
    ('captions.jsonl', json.dumps(ROWS, indent=1), SENTENCES),
    (
      'captions.jsonl',
      '\n'.join(
        json.dumps(row | {'text': '\u2028'.join('ab')}, ensure_ascii=False) for row in ROWS
      ),
      ['a\u2028b'] * 3,
    ),
    ('captions.json', json.dumps(ROWS), SENTENCES),
    ('captions.json', json.dumps({'data': ROWS, 'version': 1}), SENTENCES),
    ('captions.json', json.dumps(dict(zip(NAMES, SENTENCES))), SENTENCES),
    (
      'captions.json',
      json.dumps({name: {'text': text} for name, text in zip(NAMES, SENTENCES)}),
      SENTENCES,
    ),
    ('captions.json', json.dumps(COLUMNS), SENTENCES),
    (
      'captions.json',
      json.dumps({key: dict(zip('012', values)) for key, values in COLUMNS.items()}),
      SENTENCES,
    ),  # pandas
    ('captions.json', '\ufeff' + json.dumps(ROWS), SENTENCES),
    ('metadata.csv', table(SENTENCES), SENTENCES),
  ],
  ids=lambda value: value if str(value)[8:9] == '.' else '',
)
def test_files_of_captions_in_every_form(folder, name, content, captions):
  content = content if isinstance(content, bytes) else content.encode()
  (folder / name).write_bytes(content)
  assert read(folder) == pairs_of(captions)


def test_several_captions_in_each_form(folder):
  coco = dict(images=[], annotations=[])
  karpathy = dict(images=[])
  lines = []
  for i, name in enumerate(NAMES):
    coco['images'].append(dict(id=i, file_name=name))
    karpathy['images'].append(dict(filename=name, sentences=[dict(raw='one'), dict(raw='two')]))
    for text in ('one', 'two'):
      coco['annotations'].append(dict(image_id=i, caption=text))
      lines.append(json.dumps(dict(file_name=name, text=text)))
  forms = {
    'a.json': json.dumps({name: ['one', 'two'] for name in NAMES}),
    'b.jsonl': '\n'.join(lines),
    'c.json': json.dumps(coco),
    'd.json': json.dumps(karpathy),
  }
  for name, content in forms.items():
    (folder / name).write_text(content)
    text = ('sentences.raw',) if name == 'd.json' else ()
    assert read(folder, text=text, captions=name) == dict.fromkeys(NAMES, ('one', 'two')), name


@pytest.mark.parametrize('name', ['captions.jsonl', 'captions.csv', 'captions.json'])
def test_the_options_image_and_text_name_fields(folder, name):
  columns = {
    'file_name': ['no.png'] * 3,
    'img': NAMES,
    'text': ['junk'] * 3,
    'caption': ['good'] * 3,
    'a.b': ['dotted'] * 3,
  }
  rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
  content = {
    'captions.jsonl': '\n'.join(map(json.dumps, rows)),
    'captions.csv': '\n'.join([','.join(columns), *(','.join(row.values()) for row in rows)]),
    'captions.json': json.dumps(columns),
  }
  (folder / name).write_text(content[name])
  assert read(folder, 'img', ('caption',)) == dict.fromkeys(NAMES, ('good',))
  assert read(folder, 'img', ('a.b', 'caption')) == dict.fromkeys(NAMES, ('dotted', 'good'))
  with pytest.raises(
    UserError,
    match=rf"{name} has no field 'captions' \('caption' is near\); its fields are .*with text=",
  ):
    formats.Folder(str(folder), 'img', ('captions',))


@pytest.mark.parametrize(
  'name, content, message',
  [
    (
      'captions.csv',
      'file_name,title,text\n0.png,a,b\n1.png,a,b,c\n',
      r"captions.csv:3: has 1 more ',' than the header",
    ),
    ('captions.csv', 'file_name,text\n0.png,a\na, b.png,c\n', r"captions.csv:3: has 1 more ','"),
    (
      'captions.csv',
      'file_name,text\n0.png,"a\nb"\n1.png\n',
      r"captions.csv:4: has 1 of 2 fields \('1.png'\)",
    ),
    (
      'captions.csv',
      'file_name,text\n0.png,"a\n1.png,b\n2.png,c"\n',
      'captions.csv:2: a quotation mark opens',
    ),
    (
      'captions.csv',
      'file_name,text\n0.png,"a \\"b\\", c"\n',
      r'captions.csv:2: has \\" in a field',
    ),
    (
      'captions.csv',
      '0.png,a dog\n1.png,a cat\n',
      "captions.csv:1: the first line names an image.*write 'file_name,text'",
    ),
    ('captions.csv', 'file_name,text,text\n', "captions.csv:1: has the column 'text' twice"),
    (
      'captions.csv',
      'file_name,Text,TEXT\n0.png,a,b\n',
      "several fields like 'text': 'Text', 'TEXT'; say which with text=",
    ),
    ('captions.csv', b'file_name,text\n0.png,a\n1.png,caf\xe9\n', 'captions.csv:3: not UTF-8'),
    ('captions.csv', 'file_name,text\n', 'captions.csv has no rows'),
    ('captions.csv', 'file_name,text\n0.png,\n1.png, \n', "none of 2 rows has a text in 'text'"),
    ('captions.tsv', 'file_name\ttext\n0.png\ta\n1.png b\n', 'captions.tsv:3: has 1 of 2 fields'),
    (
      'captions.jsonl',
      '{"file_name": "0.png", "text": "a"}\n{"file_name": "1.png"\n',
      'captions.jsonl:2: not JSON',
    ),
    (
      'captions.jsonl',
      '{"file_name": "0.png", "text": "a"}\n"b"\n',
      'captions.jsonl:2: not an object but str',
    ),
    (
      'captions.jsonl',
      '{"file_name": "0.png", "text": "a"}\n{"text": "b"}\n',
      'captions.jsonl:2: file_name is None',
    ),
    ('captions.json', '5', 'captions.json: holds int'),
    ('captions.json', '[1]', 'captions.json: entry 0 is not an object but int'),
    (
      'captions.json',
      '{"file_name": ["0.png", "1.png"], "text": ["a"]}',
      "captions.json: 'text' has not one value",
    ),
    (
      'captions.json',
      '{"images": [{"id": 1, "file_name": "0.png"}], '
      '"annotations": [{"image_id": 2, "caption": "a"}]}',
      'captions.json: annotation 0 is of the image 2',
    ),
    ('captions.json', '{"a": ', 'captions.json:1: not JSON'),
    (
      'captions.jsonl',
      '{"file_name": "img/0.png", "text": "a"}',
      "names 1 images, such as 'img/0.png', and none of 1 .* is in .*; it has 4 files",
    ),
    (
      'notes.md',
      'x',
      r'has no captions.jsonl or .*, nor NAME.txt beside an image; '
      r'it has 4 files \(0.png, 1.png, 2.png ...\)',
    ),
  ],
)
def test_errors_name_the_line(folder, name, content, message):
  content = content if isinstance(content, bytes) else content.encode()
  (folder / name).write_bytes(content)
  with pytest.raises(UserError, match=message) as caught:
    formats.Folder(str(folder), None, ())
  assert '\n' not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize('encoding', ['UTF-16-LE', 'UTF-16-BE'])
@pytest.mark.parametrize(
  'name', ['captions.csv', 'captions.tsv', 'captions.jsonl', 'captions.json']
)
def test_utf16_without_a_byte_order_mark_is_named(folder, name, encoding):
  content = {
    'captions.csv': table(SENTENCES),
    'captions.tsv': table(['東京', 'né', '猫'], delimiter='\t'),
    'captions.jsonl': '\n'.join(json.dumps(row) for row in ROWS),
    'captions.json': json.dumps(ROWS),
  }
  (folder / name).write_bytes(content[name].encode(encoding))
  message = (
    f'{name}: {encoding} without a byte order mark, which is not read; save the file as UTF-8'
  )
  with pytest.raises(UserError, match=message):
    formats.Folder(str(folder), None, ())


def test_zero_bytes_alone_are_not_utf16():
  text = 'a dog\x00\x00, a cat\x00' + 100 * ' and more'
  assert captions_file.decode('captions.txt', text.encode()) == text


@pytest.mark.parametrize('name, delimiter', [('captions.csv', ','), ('captions.tsv', '\t')])
def test_tables_are_read_as_the_csv_module_wrote_them(name, delimiter):
  """With captions of marks, quotes, line breaks and spaces, quoted if needed or everywhere."""
  rng = random.Random(0)
  marks = ['a', 'b ', '"', '""', ',', '\t', '\n', '\\', ' ', 'é', ';']
  for case in range(300):
    captions = [''.join(rng.choices(marks, k=rng.randint(1, 8))) for _ in NAMES]
    quoting = csv.QUOTE_ALL if case % 2 else csv.QUOTE_MINIMAL
    written = table(captions, delimiter=delimiter, quoting=quoting)
    rows = captions_file.read_rows(name, written.encode(), captions_file.Fields('', ()))
    assert [row.fields['text'] for row in rows] == captions, written


def test_a_raw_tsv_is_read_as_it_is():
  """Captions are all characters between the tab and the end of the line, unless each quoted field
  needs its quotes."""
  rng = random.Random(0)
  marks = ['a', '"Never', 'mind"', '12"', ',', "'x'", 'said;']
  for _ in range(300):
    captions = ['bare', *(' '.join(rng.choices(marks, k=rng.randint(1, 5))) for _ in NAMES[1:])]
    written = 'file_name\ttext\n' + ''.join(
      f'{name}\t{text}\n' for name, text in zip(NAMES, captions)
    )
    rows = captions_file.read_rows('captions.tsv', written.encode(), captions_file.Fields('', ()))
    assert [row.fields['text'] for row in rows] == captions, written


def test_a_file_of_captions_with_another_name(folder):
  (folder / 'results.token').write_text(
    'image\tcomment\n' + ''.join(f'{name}\ta, b\n' for name in NAMES)
  )
  assert read(folder, 'image', ('comment',), captions='results.token') == dict.fromkeys(
    NAMES, ('a, b',)
  )


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
