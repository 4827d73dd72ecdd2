import pytest
from captioned_folders import NAMES
from numbered_images import WRITERS, image_file


@pytest.fixture(scope='session')
def written(tmp_path_factory):
  """{format: a source of 24 numbered images}."""
  return {name: write(tmp_path_factory.mktemp(name)) for name, write in WRITERS.items()}


@pytest.fixture
def folder(tmp_path):
  """A folder of the images NAMES, which have no captions yet."""
  for i, name in enumerate(NAMES):
    (tmp_path / name).write_bytes(image_file(i))
  return tmp_path
