"""Old names of keywords that still work, each with a DeprecationWarning."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from lavit_jax.errors import UserError

P = ParamSpec('P')
R = TypeVar('R')


def accept_old_keywords(**renamed: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
  """Makes a function take the old names of its keywords.

  Args:
    **renamed: old name -> current name.

  Returns:
    A decorator. The function raises UserError for an old and a new name of the same keyword.
  """

  def decorate(function: Callable[P, R]) -> Callable[P, R]:
    call: Callable[..., R] = function

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
      return call(*args, **rename_keywords(kwargs, renamed))

    return wrapper

  return decorate


def rename_keywords(kwargs: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
  """Gives keywords their current names; a warning points to the caller of the caller.

  Args:
    kwargs: the keywords of a call.
    renamed: old name -> current name.

  Raises:
    UserError: a keyword has its old and its current name.
  """
  current = {}
  for name, value in kwargs.items():
    new = renamed.get(name, name)
    if new != name:
      if new in kwargs:
        raise UserError(f'{name} and {new} are the same; leave {name} out')
      warnings.warn(f'deprecated: {name}=; use {new}=', DeprecationWarning, stacklevel=3)
    current[new] = value
  return current
