import pytest
from numbered_images import WRITERS


@pytest.fixture(scope='session')
def written(tmp_path_factory):
  """{format: a source of 24 numbered images}."""
  return {name: write(tmp_path_factory.mktemp(name)) for name, write in WRITERS.items()}
