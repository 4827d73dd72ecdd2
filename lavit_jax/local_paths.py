"""Paths of this machine as people write them on a command line or in a config."""

import os


def expand_home(path):
  """'~/x' and '~name/x' -> the path in that home; any other path, and a '~' that exists, as it is.

  The shell does this for a word that begins with '~', but not for '--folder=~/x', nor for a value
  of a config. Returns a str.
  """
  path = os.fspath(path)
  if not path.startswith('~') or os.path.lexists(path):
    return path
  return os.path.expanduser(path)
