"""Keeps old import paths working: modules that have moved, and names that have changed.

`renames.json` has the table, in two objects; all paths are relative to the package:

    modules   old module -> module
    names     module as it is called now, and a name that it had -> module and name

`lavit_jax/__init__.py` installs the finder. An import of an old module gives a view of the current
one and a DeprecationWarning. docs/renames.md lists all renames for people.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import json
import pkgutil
import sys
import types
import warnings
from typing import Any, cast

PACKAGE = 'lavit_jax.'


def _read_table() -> dict[str, dict[str, str]]:
  content = pkgutil.get_data('lavit_jax', 'renames.json')
  assert content is not None
  return json.loads(content)


_TABLE = _read_table()
MODULES = _TABLE['modules']
NAMES = _TABLE['names']
MODULES_WITH_OLD_NAMES = frozenset(path.rpartition('.')[0] for path in NAMES)


def get_renamed(module: types.ModuleType, name: str) -> Any:
  """Returns what a module had under an old name.

  Raises:
    AttributeError: it never had that name.
  """
  owner, current = _current_place(module, name)
  if (owner, current) == (module, name):
    raise AttributeError(f'module {module.__name__!r} has no attribute {name!r}')
  return getattr(owner, current)


def _current_place(module: types.ModuleType, name: str) -> tuple[types.ModuleType, str]:
  """(module, name) of today for a name of a module; the arguments if it has not changed."""
  path = NAMES.get(f'{_relative(module.__name__)}.{name}')
  if path is None:
    return module, name
  owner, _, current = path.rpartition('.')
  return importlib.import_module(PACKAGE + owner), current


def _relative(name: str) -> str:
  """A module name without the package; not `removeprefix`, which old Pythons lack."""
  return name[len(PACKAGE) :]


class MovedModule(types.ModuleType):
  """An old module: reads and writes go to the current one.

  Args:
    name: the old module name.
    target: the current module.
  """

  def __init__(self, name: str, target: types.ModuleType):
    super().__init__(name, f'Moved to {target.__name__}.')
    self.__dict__['_target'] = target

  def __getattr__(self, name: str) -> Any:
    target = self.__dict__['_target']
    if not hasattr(target, name):
      # The old module may have imported the name, and the target imports its current name.
      for old, current in NAMES.items():
        imported = current.rpartition('.')[2]
        if old.rpartition('.')[2] == name and hasattr(target, imported):
          return getattr(target, imported)
    return getattr(target, name)

  def __setattr__(self, name: str, value: Any) -> None:
    target = self.__dict__.get('_target')
    is_of_import_system = name.startswith('__') or isinstance(value, MovedModule)
    if target is None or is_of_import_system:
      super().__setattr__(name, value)
    else:
      setattr(*_current_place(target, name), value)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
  """Finds old modules, and adds old names to current ones."""

  def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
    """Returns the spec of an old module, or of a module that has old names; else None."""
    if not fullname.startswith(PACKAGE):
      return None
    name = _relative(fullname)
    if name in MODULES:
      is_package = any(old.startswith(f'{name}.') for old in MODULES)
      return importlib.machinery.ModuleSpec(fullname, self, is_package=is_package)
    if name not in MODULES_WITH_OLD_NAMES:
      return None
    spec = importlib.machinery.PathFinder.find_spec(fullname, path)
    if spec is not None and spec.loader is not None:
      spec.loader = cast('importlib.abc.Loader', LoaderWithOldNames(spec.loader))
    return spec

  def create_module(self, spec: Any) -> types.ModuleType:
    """Returns a view of the current module, and warns."""
    current = PACKAGE + MODULES[_relative(spec.name)]
    warnings.warn(f'{spec.name} is {current} now', DeprecationWarning, stacklevel=2)
    return MovedModule(spec.name, importlib.import_module(current))

  def exec_module(self, module: types.ModuleType) -> None:
    """Does nothing: the current module has been executed."""


class LoaderWithOldNames:
  """Loads a module with its own loader, and adds a lookup of old names.

  Args:
    loader: the module's own, which has all other attributes.
  """

  def __init__(self, loader: Any):
    self.loader = loader

  def __getattr__(self, name: str) -> Any:
    return getattr(self.__dict__['loader'], name)

  def create_module(self, spec: Any) -> types.ModuleType | None:
    """As the module's own loader."""
    return self.loader.create_module(spec)

  def exec_module(self, module: types.ModuleType) -> None:
    """As the module's own loader; old names are then found by `get_renamed`."""
    self.loader.exec_module(module)
    if '__getattr__' not in module.__dict__:
      # Python calls it for names that the module lacks.
      module.__dict__['__getattr__'] = lambda name: get_renamed(module, name)


def install() -> None:
  """Puts the finder before the usual ones, once."""
  if not any(isinstance(finder, Finder) for finder in sys.meta_path):
    sys.meta_path.insert(0, Finder())
