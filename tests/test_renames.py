"""Old import paths give the current modules and names themselves."""

import importlib
import importlib.util
import pathlib
import re

import pytest

from lavit_jax import renames

ROOT = pathlib.Path(__file__).parents[1]
NEED_EXTRAS = ('apps.web', 'data.emoji.rendering')


def import_module(name):
  return importlib.import_module(f'lavit_jax.{name}')


@pytest.mark.parametrize('old', sorted(set(renames.MODULES) - {'inference.app', 'data.drawing'}))
def test_modules(old):
  current = import_module(renames.MODULES[old])
  with pytest.warns(DeprecationWarning, match=f'{current.__name__} now'):
    spec = importlib.util.find_spec(f'lavit_jax.{old}')
    module = importlib.util.module_from_spec(spec)
  for name in vars(current):
    if not name.startswith('_'):
      assert getattr(module, name) is getattr(current, name)


@pytest.mark.parametrize('module', sorted(renames.MODULES_WITH_OLD_NAMES - set(NEED_EXTRAS)))
def test_names(module):
  for old, current in renames.NAMES.items():
    old_module, _, old_name = old.rpartition('.')
    if old_module == module:
      owner, _, name = current.rpartition('.')
      assert getattr(import_module(module), old_name) is getattr(import_module(owner), name)


def test_renames_point_to_current_modules():
  current = {*renames.MODULES_WITH_OLD_NAMES, *renames.MODULES.values()}
  current |= {path.rpartition('.')[0] for path in renames.NAMES.values()}
  assert not current & renames.MODULES.keys()


def test_the_table_is_sorted():
  assert list(renames.MODULES) == sorted(renames.MODULES)
  assert list(renames.NAMES) == sorted(renames.NAMES)


@pytest.mark.parametrize('section, table', [('Modules', renames.MODULES), ('Names', renames.NAMES)])
def test_the_documentation_lists_all_renames(section, table):
  page = (ROOT / 'docs' / 'renames.md').read_text()
  text = page.split(f'\n## {section}\n')[1].split('\n## ')[0]
  assert re.findall(r'^\| `(.+)` \| `(.+)` \|$', text, re.MULTILINE) == list(table.items())


def test_an_assignment_to_an_old_module_reaches_the_current_one():
  old = import_module('data.mixtures')
  loader = import_module('data.loader')
  before = loader.batch_shapes
  try:
    old.shapes = None  # by its old name
    assert loader.batch_shapes is None
  finally:
    loader.batch_shapes = before


def test_unknown_names_are_errors():
  with pytest.raises(ModuleNotFoundError):
    import_module('nothing')
  with pytest.raises(AttributeError, match="no attribute 'nothing'"):
    import_module('models.llama').nothing  # noqa: B018
  with pytest.raises(ImportError):
    import_module('porting.nothing')
