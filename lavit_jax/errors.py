"""The exceptions for the user, and the exit statuses of `lavit`.

    0          done
    1          a bug in the program: a traceback
    2          an error in the input, in one line: the same command would fail again
    130        interrupted by Ctrl-C
    134        JAX found that another process of the job is gone or silent, and aborted
    143        stopped by SIGTERM, with everything saved
    200        another process of the job, or a store, does not answer

A command with a status of 128 or more can be started again unchanged, and resumes. The scripts of
launch/, xpk and SLURM depend on this.
"""

from __future__ import annotations


class UserError(Exception):
  """An error in the input: what is wrong, where (file, option, key), and the remedy, in one line.

  Attributes:
    status: the exit status of `lavit`.
    option: the option that the message begins with, such as sources[0], if it begins with one.
  """

  status = 2

  def __init__(self, message: object = '', *, option: str = ''):
    super().__init__(message)
    self.option = option

  def within(self, where: str, *, option: str = '') -> UserError:
    """An error of the same class, whose message begins with `where`."""
    error = type(self)(f'{where}: {self}')
    error.option = option
    return error


class InputError(UserError):
  """An error in one of several inputs; the others can go on."""


class Unreachable(UserError):
  """Another process of the job, or a store, does not answer; the same command resumes."""

  status = 200  # not the status of a signal, and above 127: xpk starts the job again
