"""The bytes of a tar: its dialects, damaged headers, and a missing end."""

import tarfile

import pytest
from numbered_images import (
  image_file,
  sample,
  write_tar,
)

from lavit_jax.data import formats, tars


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
  'content', [b'0 path=x\n', b'99 path=x\n', b'-3 path=x\n', b'11 size=ten\n', b'path']
)
def test_a_damaged_pax_header_ends_the_tar(content):
  with pytest.raises(tars.Broken):
    tars._parse_pax(content)
