"""One run at a time in a work directory, on one machine and on several, after a kill too."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from lavit_jax.errors import UserError
from lavit_jax.training import lock
from lavit_jax.training.lock import WorkdirLock, refuse_if_running


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr(lock, 'BEAT_INTERVAL', 0.05)
  monkeypatch.setattr(lock, 'POLL_INTERVAL', 0.02)
  monkeypatch.setattr(lock, 'SILENCE', 0.5)


def foreign(folder, **changes):
  """A lock of a process on another machine."""
  content = dict(run='other', host=['pod-7', 'boot', 'pid:[1]'], pid=1, began='5', beat=0) | changes
  (folder / '.lock').write_text(json.dumps(content))


def test_a_second_run_is_refused_and_the_next_one_is_not(tmp_path):
  with WorkdirLock(tmp_path / 'run'):
    for enter in (
      WorkdirLock(tmp_path / 'run').__enter__,
      lambda: refuse_if_running(tmp_path / 'run'),
    ):
      with pytest.raises(
        UserError, match=f'run is in use: process {os.getpid()} on .* choose another --workdir'
      ) as error:
        enter()
      assert '\n' not in str(error.value)
  assert not (tmp_path / 'run' / '.lock').exists()
  with WorkdirLock(tmp_path / 'run'):
    pass


def test_a_file_is_refused_at_once(tmp_path, monkeypatch):
  """A file in place of the directory is not the lock of a silent run."""
  monkeypatch.setattr(lock, 'SILENCE', float('inf'))
  (tmp_path / 'run').write_text('mine')
  with pytest.raises(UserError, match='run: Not a directory; choose another --workdir'):
    WorkdirLock(tmp_path / 'run').__enter__()
  assert (tmp_path / 'run').read_text() == 'mine'


def test_an_error_gives_the_directory_back(tmp_path):
  with pytest.raises(RuntimeError), WorkdirLock(tmp_path):
    raise RuntimeError
  assert list(tmp_path.iterdir()) == []


def test_after_a_kill_on_this_machine_the_next_run_begins_at_once(tmp_path, monkeypatch):
  monkeypatch.setattr(lock, 'SILENCE', 1e9)
  code = (
    'import os\nfrom lavit_jax.training.lock import WorkdirLock\n'
    f'WorkdirLock({str(tmp_path)!r}).__enter__()\n'
  )
  subprocess.run(
    [sys.executable, '-c', code + 'os.kill(os.getpid(), 9)'],
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
  )
  assert (tmp_path / '.lock').exists()
  refuse_if_running(tmp_path)
  with WorkdirLock(tmp_path):
    assert json.loads((tmp_path / '.lock').read_text())['pid'] == os.getpid()


def test_another_process_may_have_the_number_of_a_dead_one(tmp_path):
  foreign(tmp_path, host=lock._machine(), pid=os.getpid(), began='0')
  with WorkdirLock(tmp_path):
    pass


def test_a_run_on_another_machine_that_beats_is_left_alone(tmp_path):
  foreign(tmp_path)
  stop = threading.Event()

  def beat():
    for number in range(1, 10_000):
      foreign(tmp_path, beat=number)
      if stop.wait(0.1):
        return

  thread = threading.Thread(target=beat)
  thread.start()
  try:
    with pytest.raises(UserError, match='in use: process 1 on pod-7'):
      WorkdirLock(tmp_path).__enter__()
  finally:
    stop.set()
    thread.join()


def test_a_run_killed_on_another_machine_is_taken_over_after_a_while(tmp_path, capsys):
  foreign(tmp_path)
  began = time.monotonic()
  with WorkdirLock(tmp_path) as own:
    assert time.monotonic() - began > 0.5
    assert json.loads((tmp_path / '.lock').read_text())['run'] == own.run
  assert 'which may have been killed: waiting up to' in capsys.readouterr().out


@pytest.mark.parametrize('text', ['', '{', '[]'])
def test_a_lock_that_cannot_be_read_counts_as_silent(tmp_path, text):
  (tmp_path / '.lock').write_text(text)
  with WorkdirLock(tmp_path):
    pass


def test_a_run_that_was_silent_too_long_loses_the_directory(tmp_path):
  with WorkdirLock(tmp_path) as own:
    own.check()
    foreign(tmp_path)
    deadline = time.monotonic() + 20
    while not own.lost and time.monotonic() < deadline:
      time.sleep(0.02)
    with pytest.raises(UserError, match='another run has taken this work directory over'):
      own.check()
  assert (tmp_path / '.lock').exists()  # the other's
