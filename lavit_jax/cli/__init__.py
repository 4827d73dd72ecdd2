"""`lavit COMMAND`: the whole project from the shell.

A command parses its options, imports what it needs, calls one function of the package and prints
the result. A `UserError`, or an `OSError` such as a full disk, becomes one line on stderr and an
exit status of errors.py.

Imports of the package are inside the commands, so that `lavit --help` answers at once. This file
and what it imports have no syntax that an old Python cannot parse, so that `check_python` can
report that Python is too old.
"""

from __future__ import annotations

import errno
import gc
import sys
from collections.abc import Sequence

from lavit_jax.cli.options import ASSETS, TINY
from lavit_jax.cli.parser import build_parser

__all__ = ['ASSETS', 'TINY', 'build_parser', 'check_python', 'main']

MIN_PYTHON = (3, 11)
# Imports and tracing make millions of objects that stay: with Python's own threshold of 700, a
# tenth of the time of a command that starts goes to looking for garbage among them.
OBJECTS_BEFORE_COLLECTION = 100_000


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command.

  Args:
    argv: the arguments without the name of the program; None means those of this process.

  Returns:
    The exit status: 0, or one of errors.py after one line on stderr with the error and the remedy.
  """
  check_python()
  gc.set_threshold(OBJECTS_BEFORE_COLLECTION, *gc.get_threshold()[1:])
  from lavit_jax.errors import UserError

  try:
    _run_command(argv)
  except UserError as error:
    return _fail(error, error.status)
  except OSError as error:
    message = _os_error_message(error)
    if message is None:
      raise
    return _fail(message)
  except KeyboardInterrupt:
    return _fail('interrupted', 130)
  return 0


def check_python(version: Sequence[int] | None = None) -> None:
  """Exits with one line on stderr if Python is older than the package supports.

  Args:
    version: (major, minor, ...); None means the version of this interpreter.
  """
  current = tuple(version or sys.version_info)[:2]
  if current < MIN_PYTHON:
    status = _fail(
      'Python %d.%d is too old; make the virtual environment with Python %d.%d or newer'
      % (current + MIN_PYTHON)
    )
    raise SystemExit(status)


def _run_command(argv: Sequence[str] | None) -> None:
  from lavit_jax.errors import UserError

  args, unknown = build_parser().parse_known_args(argv)
  if getattr(args, 'accepts_overrides', False):
    from lavit_jax.training.config import split_overrides

    args.overrides, unknown = split_overrides(unknown)
  if unknown:
    command = f'lavit {args.command}'
    raise UserError(f'{command} does not know {" ".join(unknown)}; see {command} --help')
  args.run(args)


def _os_error_message(error: OSError) -> str | None:
  """The line for the user; None for an error that is not the user's to repair."""
  if error.errno in (errno.ENOSPC, errno.EDQUOT):
    place = f' at {error.filename}' if error.filename else ''
    return f'the disk is full{place}; free some space or write elsewhere'
  if error.filename:
    return f'{error.filename}: {error.strerror}; choose another path or repair this one'
  if error.errno is None:  # raised by the data package, with a remedy
    return str(error)
  return None


def _fail(message: object, status: int = 2) -> int:
  print('lavit: error: ' + ' '.join(str(message).split()), file=sys.stderr)
  return status
