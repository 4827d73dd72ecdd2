"""The parser of all commands."""

from __future__ import annotations

import argparse
from typing import NoReturn

from lavit_jax.cli import apps, checkpoints, data, tasks, training


class Parser(argparse.ArgumentParser):
  """A parser that reports an error as a `UserError`, so that it is one line."""

  def error(self, message: str) -> NoReturn:
    """Raises UserError, where argparse would print its usage and exit."""
    from lavit_jax.errors import UserError

    raise UserError(f'{message}; see {self.prog} --help')


def build_parser() -> argparse.ArgumentParser:
  """The options of every command; the parsed `run` is the function to call with them."""
  parser = Parser(
    prog='lavit',
    description='LaVIT in JAX: one language model that understands and generates images.',
    epilog='Programs that a command compiles are kept for its next start; --compilation-cache says '
    'where, and LAVIT_COMPILATION_CACHE=off turns it off.',
  )
  commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
  tasks.add_commands(commands)
  apps.add_commands(commands)
  training.add_commands(commands)
  checkpoints.add_commands(commands)
  data.add_commands(commands)
  return parser
