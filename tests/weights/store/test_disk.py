"""Reads past the page cache, writes through little of it, and full disks."""

import errno
import os

import numpy as np
import pytest

from lavit_jax.weights.store import disk


def test_any_range_of_a_file(tmp_path):
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
    data = disk.read_bytes(file, start, size)
    assert data.dtype == np.uint8 and np.array_equal(data, content[start : start + size])
  assert np.array_equal(disk.read_bytes(file, len(content) - 9, 50), content[-9:])
  assert len(disk.read_bytes(file, len(content) + disk.SECTOR, 5)) == 0


@pytest.mark.skipif(not hasattr(os, 'O_DIRECT'), reason='this system has no O_DIRECT')
def test_a_file_system_without_direct_reads(tmp_path, monkeypatch):
  (tmp_path / 'file').write_bytes(b'abcdef')
  direct = []
  os_open = os.open

  def refuse(path, flags, *args):
    direct.append(bool(flags & os.O_DIRECT))
    if direct[-1]:
      raise OSError(errno.EINVAL, 'no direct reads here')
    return os_open(path, flags, *args)

  monkeypatch.setattr(os, 'open', refuse)
  assert disk.read_bytes(tmp_path / 'file', 2, 3).tobytes() == b'cde'
  assert direct == [True, False]


def test_a_missing_file_is_an_error(tmp_path):
  with pytest.raises(FileNotFoundError):
    disk.read_bytes(tmp_path / 'nothing', 0, 1)


def test_files_reach_the_disk(tmp_path, monkeypatch):
  synced = []
  fsync = os.fsync

  def record(file):
    synced.append(os.readlink(f'/proc/self/fd/{file}'))
    fsync(file)

  monkeypatch.setattr(os, 'fsync', record)
  files = [tmp_path / 'a', tmp_path / 'b']
  for file in files:
    file.write_text(file.name)
  flusher = disk.Flusher()
  flusher.flush(files)
  flusher.wait()
  assert synced == [str(file) for file in files] and files[1].read_text() == 'b'
  flusher.flush([tmp_path / 'gone'])
  with pytest.raises(FileNotFoundError):
    flusher.wait()
