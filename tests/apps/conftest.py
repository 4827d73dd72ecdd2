"""Models that answer with their inputs, for commands on many inputs and for the page."""

import batch_runs
import benchmark_runs
import pytest
from PIL import Image

from lavit_jax import cli


@pytest.fixture
def stub(monkeypatch):
  """The model that commands load."""
  stub = batch_runs.Stub()
  monkeypatch.setattr(cli.options, 'load_model', lambda args: stub)
  return stub


@pytest.fixture
def benchmark_model(monkeypatch):
  """The model that `lavit evaluate --benchmark` loads; it knows the miniatures."""
  model = benchmark_runs.Model()
  monkeypatch.setattr(cli.options, 'load_model', lambda args: model)
  return model


@pytest.fixture
def folder(tmp_path):
  """Twenty gray images at two depths; notes, a hidden file, and a text named like an image."""
  folder = tmp_path / 'pictures'
  (folder / 'deep').mkdir(parents=True)
  for i in range(20):
    Image.new('RGB', (8, 8), (i, i, i)).save(folder / ('deep' if i % 2 else '') / f'{i:02}.PNG')
  (folder / '07.jpg').write_text('words')
  (folder / 'notes.txt').write_text('words')
  (folder / '.hidden.png').write_text('words')
  return folder


@pytest.fixture
def tasks():
  """The tasks of the page, by a model that answers with its inputs."""
  from web_stub import Stub

  from lavit_jax.apps import web

  return web.Tasks(Stub())
