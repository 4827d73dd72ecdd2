"""Old names go on to work, and each is the new one itself."""

import importlib
import importlib.util

import pytest

from lavit_jax import renames

OPTIONAL = ('apps.web', 'data.emoji.rendering', 'data.emoji.build')  # need extras


@pytest.mark.parametrize('old', sorted(set(renames.MODULES) - {'inference.app', 'data.drawing'}))
def test_modules(old):
  new = importlib.import_module(f'lavit_jax.{renames.MODULES[old]}')
  with pytest.warns(DeprecationWarning, match=f'{new.__name__} now'):
    spec = importlib.util.find_spec(f'lavit_jax.{old}')
    module = importlib.util.module_from_spec(spec)
  names = [name for name in vars(new) if not name.startswith('_')]
  for name in names:
    assert getattr(module, name) is getattr(new, name)


@pytest.mark.parametrize('new', sorted(set(renames.NAMES) - set(OPTIONAL)))
def test_names(new):
  module = importlib.import_module(f'lavit_jax.{new}')
  for old, name in renames.NAMES[new].items():
    owner, _, name = name.rpartition(':')  # it may have moved to another module
    owner = importlib.import_module(f'lavit_jax.{owner}') if owner else module
    assert getattr(module, old) is getattr(owner, name)


@pytest.mark.parametrize('module', renames.MOVED_NAMES)
def test_names_in_another_module(module):
  for old, path in renames.MOVED_NAMES[module].items():
    target, _, name = path.rpartition('.')
    current = getattr(importlib.import_module(f'lavit_jax.{target}'), name)
    assert getattr(importlib.import_module(f'lavit_jax.{module}'), old) is current


def test_an_old_module_is_written_through():
  old = importlib.import_module('lavit_jax.data.mixtures')
  loader = importlib.import_module('lavit_jax.data.loader')
  before = loader.batch_shapes
  try:
    old.shapes = None  # by its old name
    assert loader.batch_shapes is None
  finally:
    loader.batch_shapes = before


def test_what_never_was_is_an_error():
  with pytest.raises(ModuleNotFoundError):
    importlib.import_module('lavit_jax.nothing')
  with pytest.raises(AttributeError, match="no attribute 'nothing'"):
    getattr(importlib.import_module('lavit_jax.models.llama'), 'nothing')  # noqa: B009
  with pytest.raises(ImportError):
    importlib.import_module('lavit_jax.porting.nothing')
