"""Trainings in processes of their own."""

import pytest
from nano import launch


@pytest.fixture(scope='session')
def cache(tmp_path_factory):
  """Where the processes share what they compile; the computations are the same."""
  return tmp_path_factory.mktemp('compiled')


@pytest.fixture
def running():
  """The processes of a test; what still runs at its end is killed."""
  processes = []
  yield processes
  for process in processes:
    if process.poll() is None:
      process.kill()
      process.communicate()


@pytest.fixture
def start(cache, running):
  """start(stage, workdir, key=value ...) -> the running process of one training."""

  def begin(stage, workdir, **changes):
    running.append(launch(stage, workdir, cache, **changes))
    return running[-1]

  return begin
