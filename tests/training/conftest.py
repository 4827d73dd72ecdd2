"""Runs in separate processes, and a run with checkpoints."""

import hashlib

import fsspec
import pytest
from nano import launch


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  """A whole model of random weights."""
  import jax
  import nano
  import numpy as np

  from lavit_jax.models import lavit
  from lavit_jax.weights.store import folder
  from lavit_jax.weights.torch import name_tables

  nano.install()
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    mean = 1 if path[-1].key == 'scale' else 0
    return rng.normal(mean, 0.1, leaf.shape).astype(np.float32)

  shapes = name_tables.module_shapes(
    lavit.build('nano'), ['vit', 'tokenizer', 'understanding', 'llama']
  )
  params = jax.tree_util.tree_map_with_path(draw, shapes)
  path = tmp_path_factory.mktemp('base') / 'model'
  tokenizer = nano.ROOT / 'lavit_jax/assets/tiny/language_model'
  return folder.save_params(path, 'nano', params, tokenizer=tokenizer)


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


@pytest.fixture
def reads(monkeypatch):
  """The names of the leaves that are read from folders, as MODULE/PATH, in their order."""
  from lavit_jax.weights.store import folder

  names = []
  open_params = folder.open_params

  def counting(path, name, dtype='float32'):
    source = open_params(path, name, dtype)

    def read(leaf, index=None, sharding=None):
      names.append(f'{name}/{leaf}')
      return source.read(leaf, index, sharding)

    return source._replace(read=read)

  monkeypatch.setattr(folder, 'open_params', counting)
  return names


@pytest.fixture(scope='session')
def gcs():
  """A server like Google Cloud Storage, which gs:// means in this process and those it starts."""
  from fake_gcs import FakeGcs

  gcsfs = pytest.importorskip('gcsfs')
  for protocol in ('gs', 'gcs'):  # in this process, it may have been imported before
    fsspec.register_implementation(protocol, gcsfs.core.GCSFileSystem, clobber=True)
  with FakeGcs() as server, pytest.MonkeyPatch.context() as patch:
    for name, value in server.environment.items():
      patch.setenv(name, value)
    yield server


@pytest.fixture
def bucket(gcs, request):
  """The name of a bucket of the test's own."""
  return 'test-' + hashlib.md5(request.node.nodeid.encode()).hexdigest()
