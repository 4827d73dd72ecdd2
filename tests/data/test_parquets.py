"""Columns, types and nulls of Parquet files; files that differ; the memory that is used."""

import io
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numbered_images import batches, caption, image_file, read_numbers

from lavit_jax.data import formats, open_units, parquets
from lavit_jax.errors import UserError

STRUCT = pa.struct([('bytes', pa.binary()), ('path', pa.string())])


def records(path, image='image', text=('text',)):
  read = formats.Parquets(str(path), image, text)
  items = []
  for unit in range(len(read)):
    items += [item for *_, item in read.read(unit)]
  return [item for item in items if isinstance(item, formats.Record)]


@pytest.mark.parametrize(
  'kind',
  [
    pa.binary(),
    pa.large_binary(),
    pa.binary_view(),
    STRUCT,
    pa.dictionary(pa.int32(), pa.binary()),
  ],
)
def test_images_of_every_type(tmp_path, kind):
  values = [image_file(0), None, image_file(1)]
  if kind == STRUCT:
    values = [
      {'bytes': image_file(0), 'path': '0.png'},
      None,
      {'bytes': image_file(1), 'path': None},
      {'bytes': None, 'path': 'a'},
    ]
  pq.write_table(
    pa.table({'image': pa.array(values, kind), 'text': ['words'] * len(values)}),
    tmp_path / 'a.parquet',
  )
  assert [record.image for record in records(tmp_path)] == [image_file(0), b'', image_file(1), b''][
    : len(values)
  ]


@pytest.mark.parametrize(
  'kind, values, expected',
  [
    (pa.large_string(), ['a', None], [('a',), ()]),
    (pa.dictionary(pa.int8(), pa.string()), ['a', 'a'], [('a',), ('a',)]),
    (pa.list_(pa.string()), [['a', None, 'b'], []], [('a', 'b'), ()]),
    (pa.string_view(), ['a'], [('a',)]),
    (pa.large_list(pa.large_string()), [['a', 'b'], None], [('a', 'b'), ()]),
    (pa.binary(), [b'a'], [('a',)]),
    (pa.int32(), [5], [()]),
  ],
)
def test_texts_of_every_type(tmp_path, kind, values, expected):
  pq.write_table(
    pa.table({'image': [image_file(0)] * len(values), 'text': pa.array(values, kind)}),
    tmp_path / 'a.parquet',
  )
  assert [record.texts for record in records(tmp_path)] == expected


def test_nested_columns_and_names_with_dots(tmp_path):
  table = pa.table(
    {
      'data': [{'image': {'bytes': image_file(3)}}],
      'text.en': ['dotted'],
      'texts': [{'en': 'nested', 'de': 'geschachtelt'}],
      'map': pa.array(
        [[('en', 'mapped'), ('de', 'abgebildet')]], pa.map_(pa.string(), pa.string())
      ),
    }
  )
  pq.write_table(table, tmp_path / 'a.parquet')
  (record,) = records(tmp_path, 'data.image', ('text.en', 'texts.de', 'map.en'))
  assert record[:2] == (image_file(3), ('dotted', 'geschachtelt', 'mapped'))


def test_the_columns_of_every_file_are_read(tmp_path, caplog):
  """Columns that only later files have are found; files that lack one are logged."""
  pq.write_table(pa.table({'image': [image_file(0)], 'text': ['words']}), tmp_path / '0.parquet')
  pq.write_table(
    pa.table({'recaption': ['other'], 'image': [image_file(1)], 'text': ['words']}),
    tmp_path / '1.parquet',
  )
  assert [record[:2] for record in records(tmp_path, text=('text', 'recaption'))] == [
    (image_file(0), ('words',)),
    (image_file(1), ('words', 'other')),
  ]
  assert (
    '1 of 2 Parquet files have no column recaption, such as ' in caplog.text
    and '0.parquet' in caplog.text
  )
  with pytest.raises(
    UserError, match=r'has the columns image, text, recaption, and no file has captoin; name those'
  ):
    records(tmp_path, text=('text', 'captoin'))


@pytest.mark.parametrize(
  'image, message',
  [
    ('url', 'the column url is string, not the bytes of images'),
    ('many', 'the column many is list<.*>, not the bytes'),
    ('struct.bites', 'the column struct has no bites'),
  ],
)
def test_a_column_without_images_is_named(tmp_path, image, message):
  table = pa.table(
    {'url': ['http://x'], 'many': [[b'']], 'struct': [{'bytes': b''}], 'text': ['words']}
  )
  pq.write_table(table, tmp_path / 'a.parquet')
  with pytest.raises(UserError, match=message):
    records(tmp_path, image)


@pytest.mark.parametrize('split', ['train', 'heldout'])
@pytest.mark.parametrize('bad', ['no rows', 'no row groups', 'no bytes'])
def test_an_empty_file_among_sound_ones(tmp_path, split, bad):
  table = pa.table(
    {'image': [image_file(i) for i in range(8)], 'text': [caption(i) for i in range(8)]}
  )
  if bad == 'no rows':
    pq.write_table(table.slice(0, 0), tmp_path / '0.parquet')
  elif bad == 'no row groups':
    pq.ParquetWriter(tmp_path / '0.parquet', table.schema).close()
  else:
    (tmp_path / '0.parquet').write_bytes(b'')
  pq.write_table(table, tmp_path / '1.parquet')
  source = dict(format='parquet', path=str(tmp_path))
  iterator = batches(
    source, split=split, heldout=(source,), batch_size=8, shards=8, max_skipped=0.6
  )
  assert set(read_numbers(iterator, 40)) == set(range(8))
  iterator.close()


class Counted(io.BufferedReader):
  """A file that counts what is read of it."""

  count = 0

  def read(self, size=-1):
    data = super().read(size)
    Counted.count += len(data)
    return data


def test_a_row_group_is_not_loaded_whole(tmp_path, monkeypatch):
  """Of 1,000 images of 100 kB in pages of 8, some pages and a batch are read for 64 rows.

  Arrow has as much in memory.
  """
  rng = np.random.default_rng(0)
  with pq.ParquetWriter(
    tmp_path / 'a.parquet',
    pa.schema([('image', pa.binary()), ('text', pa.string())]),
    write_batch_size=8,
  ) as writer:
    writer.write_table(
      pa.table({'image': [rng.bytes(100_000) for _ in range(1000)], 'text': ['words'] * 1000}),
      row_group_size=1000,
    )
  read = formats.Parquets(str(tmp_path / 'a.parquet'), 'image', ('text',))
  monkeypatch.setattr(parquets.paths, 'open_file', lambda path, **options: Counted(io.FileIO(path)))
  Counted.count = 0
  before = pa.total_allocated_bytes()
  rows = read.read(0)
  allocated = 0
  for _ in range(64):
    next(rows)
    allocated = max(allocated, pa.total_allocated_bytes() - before)
  rows.close()
  # 6.4 MB are needed; a batch has 4 MB, which Arrow doubles as it grows
  assert Counted.count < 25e6 and allocated < 25e6


def test_large_pages_cost_more(tmp_path):
  """pyarrow ends a page after 1,024 rows: of rows of 10 kB it has 10 MB, compressed and plain."""
  image = np.random.default_rng(0).bytes(10_000)
  pq.write_table(
    pa.table({'image': [image] * 2048, 'text': ['words'] * 2048}),
    tmp_path / 'a.parquet',
    use_dictionary=False,
    compression='none',
  )
  read = formats.Parquets(str(tmp_path / 'a.parquet'), 'image', ('text',))
  page = 1024 * (10_000 + 4 + 9)
  memory = read.units[0].memory
  assert memory == pytest.approx(2 * page + (4 << 20), rel=0.01)
  assert read.cost == -(-memory // (2 << 20))
  assert parquets.unit_cost([]) == 8


def test_what_is_read_at_once_is_bounded(monkeypatch):
  """Waiting units are closed, except the one that is read next; a unit without room waits."""
  monkeypatch.setattr(open_units, '_MAX_OPEN', 100)
  monkeypatch.setattr(open_units.OpenUnits, '_instances', set())
  monkeypatch.setattr(open_units.OpenUnits, '_busy', [0])
  units = open_units.OpenUnits()
  closed = []
  entered = threading.Event()

  class Rows:
    def __init__(self, name):
      self.name = name

    def close(self):
      closed.append(self.name)

  for place in 'abc':
    units.keep(place, Rows(place), 30)

  def other():
    with units.reserve(60, 'z'):
      entered.set()

  with units.reserve(60, 'a'):
    assert closed == ['b', 'c'] and units.take('a')
    thread = threading.Thread(target=other)
    thread.start()
    assert not entered.wait(0.1)
  thread.join(10)
  assert entered.is_set() and units._busy == [0]


def test_a_file_with_other_columns_is_no_error(tmp_path):
  pq.write_table(pa.table({'other': [1, 2]}), tmp_path / '0.parquet')
  pq.write_table(pa.table({'image': [image_file(0)], 'text': ['words']}), tmp_path / '1.parquet')
  assert [record[:2] for record in records(tmp_path)] == [(b'', ())] * 2 + [
    (image_file(0), ('words',))
  ]
