"""Runs in separate processes, and a run with checkpoints."""

import pytest
from nano import launch


@pytest.fixture
def without_flops(monkeypatch):
  """Runs do not count their operations, for which the whole step is traced once more."""
  from lavit_jax.training import flops

  monkeypatch.setattr(flops, 'step_flops', lambda run: flops.StepFlops(1.0))


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
def start(running):
  """start(stage, workdir, key=value ...) -> the running process of one training."""

  def begin(stage, workdir, **changes):
    running.append(launch(stage, workdir, **changes))
    return running[-1]

  return begin


@pytest.fixture
def saved(tmp_path):
  """A run with checkpoints of steps 1, 2, 3, of which it keeps two."""
  from checkpoint_runs import config, numbers, state

  from lavit_jax.training.checkpoint import Checkpoints

  checkpoints = Checkpoints(tmp_path, config(), keep=2)
  data = numbers()
  for step in (1, 2, 3):
    next(data)
    checkpoints.save(step, state(step), data)
  checkpoints.wait()
  checkpoints.close()
  return tmp_path
