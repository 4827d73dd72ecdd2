"""Reading past the page cache, and writing through little of it."""

import errno
import os

import numpy as np
import pytest

from lavit_jax.weights.store import disk


def test_any_stretch_of_a_file(tmp_path):
  content = np.random.default_rng(0).integers(0, 256, 3 * disk.SECTOR + 77, np.uint8)
  file = tmp_path / 'file'
  file.write_bytes(content.tobytes())
  for start, size in (
    (0, 0),
    (0, 1),
    (5, disk.SECTOR),
    (disk.SECTOR - 1, 2),
    (disk.SECTOR, disk.SECTOR),
    (3, len(content) - 3),
    (len(content) - 9, 9),
  ):
    got = disk.read_bytes(file, start, size)
    assert got.dtype == np.uint8 and np.array_equal(got, content[start : start + size])
  assert np.array_equal(disk.read_bytes(file, len(content) - 9, 50), content[-9:])
  assert len(disk.read_bytes(file, len(content) + disk.SECTOR, 5)) == 0


@pytest.mark.skipif(not hasattr(os, 'O_DIRECT'), reason='this system has no O_DIRECT')
def test_a_file_system_that_always_caches(tmp_path, monkeypatch):
  (tmp_path / 'file').write_bytes(b'abcdef')
  opened, real = [], os.open

  def refuse(path, flags, *args):
    opened.append(bool(flags & os.O_DIRECT))
    if opened[-1]:
      raise OSError(errno.EINVAL, 'no direct reads here')
    return real(path, flags, *args)

  monkeypatch.setattr(os, 'open', refuse)
  assert disk.read_bytes(tmp_path / 'file', 2, 3).tobytes() == b'cde' and opened == [True, False]


def test_what_is_missing_is_told(tmp_path):
  with pytest.raises(FileNotFoundError):
    disk.read_bytes(tmp_path / 'nothing', 0, 1)


def test_files_reach_the_disk(tmp_path, monkeypatch):
  synced, real = [], os.fsync
  monkeypatch.setattr(
    os, 'fsync', lambda file: (synced.append(os.readlink(f'/proc/self/fd/{file}')), real(file))
  )
  files, flusher = [tmp_path / 'a', tmp_path / 'b'], disk.Flusher()
  for file in files:
    file.write_text(file.name)
  flusher.flush(files)
  flusher.wait()
  assert synced == [str(file) for file in files] and files[1].read_text() == 'b'
  flusher.flush([tmp_path / 'gone'])
  with pytest.raises(FileNotFoundError):
    flusher.wait()
