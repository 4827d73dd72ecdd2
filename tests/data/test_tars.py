"""Tars are read as webdataset 1.0.2 reads them; what is refused is counted."""

import base64
import bz2
import gzip
import io
import lzma
import tarfile

import pyarrow as pa
import pytest
from numbered_images import batches, caption, image_file, read_numbers, sample, write_tar

from lavit_jax import cli
from lavit_jax.data import formats, tars
from lavit_jax.data.row_workers import SkipCounter
from lavit_jax.errors import UserError

# Written by GNU tar 1.34 with --sparse: x.txt of 65,539 bytes, three words and holes; y.txt.
# Compressed by xz, in base64.
SPARSE = {
  'old GNU': (
    '/Td6WFoAAATm1rRGAgAhARwAAAAQz1jM4E//AK5dADwLiofEDvKXpPh1PcWp7dmZu1r7eveHD5fFmLkzntQdJ2wI'
    '2SWZk/4N+BV3s3cHQuMOFp79sypQj76gJAUSZv5x2HryA3t2Askfc8NbkAGE19dmNbS+080B/Xav6QM18NGJjEvB'
    '+ovRI1D6Y+BQ3W2+dFqwaLIBTjgQnbg8Dut+L/14XtDtRddRnT5NVMLP5NqB7wSVk+Jal3QoxNRZGnxVF2wOMd1z'
    'pnwKWxRyAAAAAFmqdq1WLVwnAAHKAYCgAQClGnxjscRn+wIAAAAABFla'
  ),
  'pax 0.0': (
    '/Td6WFoAAATm1rRGAgAhARwAAAAQz1jM4E//AQ9dABcLxoeSWjunj8clDrgP8/KKo5l4SePVuKAwLNBSjZHG5EGU'
    'mF18naiKtjfM1/Co1pmmCpg02b5LVoXh1fAtdW10YcZqASGxdwyRjnNJ7Gm1oH+6pTPuvOUST/rrJZbL5lOg0NIu'
    'XY1HLQ9XydQLqYGAQMcAj0QDWeuRsKE5Dgbn5vTfuZX2YzGEr/CDZeVSs1es8OsNXRlFePI98yVZCwP814MTFhM6'
    'pL6vySkycxwqC0UpwHNNVYvIl7N+Z056HBMPT98VF+wiEE6vnntppKAKOZBuDTZS80lBIrYNuxRm4dA0HzP+NWS6'
    'NV8onzVZnc5dCP9z/G2MVrKR3vTybkQ5y0RsntVfvhnhWdDgSyAAAMEXza62nHfoAAGrAoCgAQCKvHTnscRn+wIA'
    'AAAABFla'
  ),
  'pax 0.1': (
    '/Td6WFoAAATm1rRGAgAhARwAAAAQz1jM4E//AR5dABcLxoeSWjunj8clDrgP8/KKo5l4SePVuKAwLNBSjZHG47qe'
    'Lk3XkZQwcp261r776AQ2yte8VMj1wFCNiIn3DAfJR+uuRBNlZ5oZvCrG6wSRaI7tRn6ISRfV+XYNsIMHIdsMWfla'
    'xRwrGSb4grZnYVlG8tWam0SyMfe5gbM3HhhiIXdoyNN20wXCsrLi/ikmyob2K61zjxGQ7ubZ8rCSTnpTrfC9Vw74'
    'XmWjyGn59+VYF9nbXmkEafByCgSmo3o/DX/EZLegH0lRglvxP5PWVrI5IIHsDazgg9EUxhpM+5kpQ0d4yZOIX6qm'
    'AZ8ajCvqQxYPx/yb+xNJZrg4Lu1NkWTQVXQMnqdq/qPRB9cuEbq06mO43uB+wJGmWV0cYQAAAAB7mKnJqmTk2wAB'
    'ugKAoAEAtG3+L7HEZ/sCAAAAAARZWg=='
  ),
  'pax 1.0': (
    '/Td6WFoAAATm1rRGAgAhARwAAAAQz1jM4E//ASZdABcLxoeSWjunj8clDrgP8/KKo5l4SePVuKAwLNBSjZHG4zaX'
    'ElRZf2oHK2EqgGAPcHeiTOJpHmoPJNNsLpde5a8GiwHuu4tF3cPIDvjt1ThunBhEZsZDpUNmJxIU7BOFxN+TY40n'
    '9bCgF7Ex7WToMbzXsIm4pWhe6f6zNdwc9WZOYhVST1/uhWtoWtsFDqbC9HAcwkjML6FG3V/7fMIsWGVo3TvfsXYN'
    'PPP4O99PnxBX8bGZ39oS8JzafNtovwk2FWc5a/rOVj0kSlLddBVJVouCh7ZXYe7+AFW0I9oK0uln+LW74KtxxUjw'
    '6vmnFR5YDqA323VfMdnuVcXvA2kvPFGMumwCQv+sa1HEPwsgscvgsdsFwTzXJv9kl0tzlXQFPL0WX46S6wAAAN6p'
    'fZRftWj8AAHCAoCgAQAY4o/IscRn+wIAAAAABFla'
  ),
}


def members(path, *named, mode='w', **options):
  """Writes a tar of (name, content) pairs; a tarfile.TarInfo stands for itself."""
  with tarfile.open(path, mode, **options) as tar:
    for name, content in named:
      info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))


def grouped(path):
  """[(key, {extension: content})] of a tar."""
  with open(path, 'rb') as file:
    return [(sample.key, sample.fields) for sample in tars.samples(file) if sample.key is not None]


def read(path, text=('txt',), image=None):
  return [item for *_, item in formats.Tars(str(path), image, text).read(0)]


def texts_by_image(path, **options):
  """{content of the image: texts} of the records."""
  return {
    item.image: item.texts for item in read(path, **options) if isinstance(item, formats.Record)
  }


# As webdataset.tariterators.group_by_keys groups them, except for names of macOS in folders, which
# it takes for samples.
@pytest.mark.parametrize(
  'names, expected',
  [
    (['a.jpg', 'a.TXT', 'b.jpg'], [('a', ['jpg', 'txt']), ('b', ['jpg'])]),
    (['a.jpg', 'b.jpg', 'a.txt'], [('a', ['jpg']), ('b', ['jpg']), ('a', ['txt'])]),
    (['0.input.png', '0.outputs.txt'], [('0', ['input.png', 'outputs.txt'])]),
    (['v1.5-0.jpg', 'v1.5-1.jpg'], [('v1', ['5-0.jpg', '5-1.jpg'])]),
    (
      ['x.y/a.jpg', 'x.y/a.txt', 'x/a.jpg', './a.jpg'],
      [('x.y/a', ['jpg', 'txt']), ('x/a', ['jpg']), ('./a', ['jpg'])],
    ),
    (
      ['a.jpg', 'README', 'a.txt', '__meta__', '__x__/b.jpg', 'b.'],
      [('a', ['jpg', 'txt']), ('b', [''])],
    ),
    (['__meta__.jpg', 'd/__x__.jpg'], [('__meta__', ['jpg']), ('d/__x__', ['jpg'])]),
    (['._a.jpg', 'a.jpg', '._a.txt', 'a.txt', '.DS_Store'], [('a', ['jpg', 'txt'])]),
    (
      ['d/._a.jpg', 'd/a.jpg', 'd/._a.txt', 'd/a.txt', '__MACOSX/d/._a.txt', 'd/.DS_Store'],
      [('d/a', ['jpg', 'txt'])],
    ),
  ],
)
def test_names_are_grouped_as_webdataset_groups_them(tmp_path, names, expected):
  members(tmp_path / 'a.tar', *((name, name.encode()) for name in names))
  assert [(key, list(fields)) for key, fields in grouped(tmp_path / 'a.tar')] == expected


def test_a_member_that_occurs_twice_is_refused_and_counted(tmp_path):
  """Which caption belongs to which image cannot be known; webdataset raises. Other samples stay."""
  for order in (
    'a.png 1, a.txt 1, a.png 2, a.txt 2',
    'a.png 1, a.png 2, a.txt 1',
    'a.png 1, a.txt 1, a.PNG 2',
  ):
    pairs = [pair.split() for pair in order.split(', ')]
    members(
      tmp_path / 'a.tar',
      ('0.png', b'0'),
      ('0.txt', b'0'),
      *((name, content.encode()) for name, content in pairs),
      ('b.png', b'b'),
      ('b.txt', b'b'),
    )
    first, bad, last, end = read(tmp_path / 'a.tar')
    assert first[:2] == (b'0', ('0',)) and last[:2] == (b'b', ('b',)) and end.reason == ''
    assert bad.reason == 'repeated member' and 'a.tar: a (png, txt), which has ' in bad.origin, (
      order
    )


def test_tars_joined_by_cat_are_read_on(tmp_path):
  """Also where both have a key, and without zeros between them; positions go on too."""
  write_tar(tmp_path / 'a.tar', [sample(i) for i in range(3)])
  write_tar(tmp_path / 'b.tar', [sample(2), *(sample(i) for i in range(3, 5))])
  one = (tmp_path / 'a.tar').read_bytes()
  other = (tmp_path / 'b.tar').read_bytes()
  (tmp_path / 'c.tar').write_bytes(one + other)
  records = formats.Tars(str(tmp_path / 'c.tar'), None, ('txt',))
  rows = list(records.read(0))
  assert [item.texts for *_, item in rows[:-1]] == [
    (caption(i),) for i in (0, 1, 2, 2, 3, 4)
  ] and rows[-1][2].reason == ''
  for place, (_, end, _) in enumerate(rows[:-1], 1):
    assert list(records.read(0, end)) == rows[place:]
  (tmp_path / 'c.tar').write_bytes(one + b'no tar' * 100)
  *found, last = read(tmp_path / 'c.tar')
  assert len(found) == 3 and last.reason == 'broken tar'


@pytest.mark.parametrize(
  'ending, compress',
  [
    ('tar.gz', gzip.compress),
    ('tgz', gzip.compress),
    ('tar.bz2', bz2.compress),
    ('txz', lzma.compress),
    ('tar', gzip.compress),
    ('tar.zst', lambda data: pa.Codec('zstd').compress(data, asbytes=True)),
  ],
)
def test_compressed_tars_are_detected_by_their_content(tmp_path, ending, compress):
  write_tar(tmp_path / 'a.tar', [sample(i) for i in range(5)])
  plain = read(tmp_path / 'a.tar')
  data = compress((tmp_path / 'a.tar').read_bytes())
  (tmp_path / 'a.tar').unlink()
  file = tmp_path / f'0.{ending}'
  file.write_bytes(data)
  records = formats.Tars(str(tmp_path), None, ('txt',))  # the folder
  rows = list(records.read(0))
  assert records.files == [str(file)] and [item[:2] for *_, item in rows[:-1]] == [
    item[:2] for item in plain[:-1]
  ]
  assert list(formats.Tars(str(file), None, ('txt',)).read(0, rows[2][1])) == rows[3:]
  file.write_bytes(data[: len(data) * 2 // 3])
  *_, last = read(file)
  assert last.reason == 'broken tar' and 'damaged or break off' in last.origin


@pytest.mark.parametrize(
  'content, expected',
  [
    (b'PK\x03\x04' + bytes(600), 'zip archive'),
    (b'version https://git-lfs.github.com/spec/v1', 'git lfs pull'),
    (b'<html>' + b' ' * 600, 'HTML'),
    (b'', 'it is empty'),
  ],
)
def test_a_file_that_is_no_tar_is_named(tmp_path, content, expected):
  (tmp_path / 'a.tar').write_bytes(content)
  (last,) = read(tmp_path / 'a.tar')
  assert last.reason == 'broken tar' and expected in last.origin


def test_links_and_names_without_extension_are_counted(tmp_path):
  """They are part of the sample before them, or of the first one, wherever reading starts."""
  link = tarfile.TarInfo('0.txt')
  link.type = tarfile.LNKTYPE
  link.linkname = 'first.txt'
  folder = tarfile.TarInfo('folder')
  folder.type = tarfile.DIRTYPE
  members(
    tmp_path / 'a.tar',
    (folder, b''),
    ('LICENCE', b'words'),
    ('0.png', b'0'),
    (link, b''),
    ('1.png', b'1'),
    ('1.txt', b'one'),
    (link, b''),
  )
  records = formats.Tars(str(tmp_path / 'a.tar'), None, ('txt',))
  rows = list(records.read(0))
  found = [
    (item.unit, item.reason) if isinstance(item, formats.Skip) else item[:2] for *_, item in rows
  ]
  unread = [('members', 'member without extension'), ('members', 'link')]
  assert found == [*unread, (b'0', ()), unread[1], (b'1', ('one',)), ('files', '')]
  assert (
    list(records.read(0, rows[2][1])) == rows[3:] and list(records.read(0, rows[4][1])) == rows[5:]
  )


@pytest.mark.parametrize('name', SPARSE)
def test_sparse_members_have_their_holes(tmp_path, name):
  (tmp_path / 'a.tar').write_bytes(lzma.decompress(base64.b64decode(SPARSE[name])))
  whole = b'begin' + bytes(19995) + b'middle' + bytes(65536 - 20006) + b'end'
  assert grouped(tmp_path / 'a.tar') == [('x', {'txt': whole}), ('y', {'txt': b'plain'})]


@pytest.mark.parametrize(
  'image, text', [(('input.png',), ('outputs.txt',)), (('INPUT.png',), ('Outputs.TXT',))]
)
def test_extensions_with_dots_are_named_whole(tmp_path, image, text):
  members(
    tmp_path / 'a.tar',
    ('0.input.png', b'0'),
    ('0.outputs.txt', b'zero'),
    ('0.meta.json', b'{"Caption": "json"}'),
  )
  assert texts_by_image(tmp_path / 'a.tar', image=image, text=text) == {b'0': ('zero',)}
  assert texts_by_image(tmp_path / 'a.tar', image=image, text=('meta.json.Caption',)) == {
    b'0': ('json',)
  }


def numbers(source, count, **options):
  """(the numbers of the images in the first `count` rows, the counter of skips)."""
  skipped = SkipCounter()
  iterator = batches(source, batch_size=8, shards=8, skipped=skipped, **options)
  found = read_numbers(iterator, count // 8)
  iterator.close()
  return found, skipped


@pytest.mark.parametrize('bad', [0, 5])
@pytest.mark.parametrize('split', ['train', 'heldout'])
def test_one_bad_sample_of_eight_in_eight_shards(tmp_path, bad, split):
  """No shard has only that one."""
  write_tar(
    tmp_path / 'a.tar',
    [
      (str(i), {'png': b'no picture' if i == bad else image_file(i), 'txt': caption(i).encode()})
      for i in range(8)
    ],
  )
  source = dict(format='tars', path=str(tmp_path / 'a.tar'))
  found, skipped = numbers(source, 1200, max_skipped=0.2, split=split, heldout=(source,))
  assert set(found) == {*range(8)} - {bad}
  assert abs(skipped.skipped['records'] / skipped.seen['records'] - 1 / 8) < 0.02


@pytest.mark.parametrize('split', ['train', 'heldout'])
@pytest.mark.parametrize('seed', range(3))
def test_an_empty_tar_among_sound_ones(tmp_path, split, seed):
  write_tar(tmp_path / '0.tar', [])
  write_tar(tmp_path / '1.tar', [sample(i) for i in range(8)])
  source = dict(format='tars', path=str(tmp_path))
  found, _ = numbers(source, 400, seed=seed, split=split, heldout=(source,))
  assert set(found) == set(range(8))


def test_a_bad_tar_does_not_pass_for_the_source(tmp_path):
  """One of eight, with more than 1,000 records, whichever is read first."""
  for t in range(8):
    samples = [
      (f'{t}-{i}', {'png': b'' if t == 3 else image_file(t), 'txt': b'words'})
      for i in range(1100 if t == 3 else 20)
    ]
    write_tar(tmp_path / f'{t}.tar', samples)
  source = dict(format='tars', path=str(tmp_path))
  found, skipped = numbers(source, 480, max_skipped=0.2, task='images')
  assert skipped.reasons['no image'] >= 1100 and set(found) == {*range(8)} - {3}


def test_weights_are_those_of_what_is_trained_on(tmp_path):
  """Four of ten of one source are skipped."""
  write_tar(tmp_path / 'a.tar', [sample(i) for i in range(10)])
  write_tar(
    tmp_path / 'b.tar',
    [
      (str(i), {'png': b'' if i % 10 < 4 else image_file(i), 'txt': caption(i).encode()})
      for i in range(100, 110)
    ],
  )
  for threads in (0, 2):
    iterator = batches(
      *(dict(format='tars', path=str(tmp_path / f'{name}.tar')) for name in 'ab'),
      batch_size=40,
      max_skipped=1.0,
      num_threads=threads,
    )
    found = read_numbers(iterator, 5)
    iterator.close()
    assert abs(sum(i >= 100 for i in found) - 100) <= 1


def test_a_source_that_gives_nothing_is_named(tmp_path):
  """Though it is a small part of all; with what it has, and where images and texts are expected."""
  write_tar(tmp_path / 'a.tar', [sample(i) for i in range(8)])
  write_tar(tmp_path / 'b.tar', [(str(i), {'png': image_file(i), 'json': b'{}'}) for i in range(8)])
  sources = [
    dict(format='tars', path=str(tmp_path / 'a.tar'), weight=30.0),
    dict(format='tars', path=str(tmp_path / 'b.tar')),
  ]
  iterator = batches(*sources, batch_size=40)
  with pytest.raises(
    UserError,
    match=r'^sources\[1\] \(tars .*b.tar\): 8 of 8 records were skipped \(empty caption 8\).*'
    r'\(png, json\); looked for: image in jpg, .*, text in txt, .*no example',
  ):
    for _ in range(40):
      next(iterator)


def test_a_pack_of_nothing_is_an_error(tmp_path, capsys):
  members(
    tmp_path / 'a.tar',
    *((f'v1.5-{i // 2}.{("png", "txt")[i % 2]}', image_file(i // 2)) for i in range(6)),
  )
  arguments = ['data', 'pack', str(tmp_path / 'a.tar'), '--out', str(tmp_path / 'out')]
  assert cli.main(arguments) == 2
  error = capsys.readouterr().err
  assert (
    'no image 1; the samples have 5-0.png, 5-0.txt, ' in error
    and 'looked for in jpg, ' in error
    and 'first dot' in error
  )
  assert (
    cli.main([*arguments, '--image', '5-1.png']) == 0 and '1 records' in capsys.readouterr().out
  )
  members(
    tmp_path / 'b.tar',
    ('a.png', image_file(1)),
    ('a.png', image_file(2)),
    ('b.png', image_file(3)),
    ('b.txt', b'b'),
  )
  (tmp_path / 'b.tgz').write_bytes(gzip.compress((tmp_path / 'b.tar').read_bytes()))
  assert cli.main(['data', 'pack', str(tmp_path / 'b.tgz'), '--out', str(tmp_path / 'out')]) == 0
  assert (
    '1 records' in (said := capsys.readouterr().out)
    and 'repeated member 1' in said
    and (tmp_path / 'out' / 'b.array_record').exists()
  )
