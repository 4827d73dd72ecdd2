"""The model that the tests of the user's API share."""

import pytest

from lavit_jax.inference.pipeline import Lavit


@pytest.fixture(scope='session')
def model(shallow_folder):
  return Lavit.from_pretrained(shallow_folder)
