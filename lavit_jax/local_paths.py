"""Paths of this machine as people write them on a command line or in a config."""

from __future__ import annotations

import os


def expand_home(path: str | os.PathLike[str]) -> str:
  """Expands '~/x' and '~name/x'; any other path, and a '~' that exists, is returned as it is.

  The shell expands a word that begins with '~', but not '--folder=~/x' and not a config value.
  """
  path = os.fspath(path)
  if not path.startswith('~') or os.path.lexists(path):
    return path
  return os.path.expanduser(path)
