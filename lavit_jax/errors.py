"""The exceptions that are meant for the person at the keyboard, and the status that `lavit` ends with.

    0          done
    1          a fault of the program: a traceback
    2          a fault of the input, in one line: started again it would be the same
    130        interrupted by Ctrl-C
    134        JAX found another process of the job gone, or silent (it aborts)
    143        stopped by SIGTERM, with everything saved
    200        another process of the job, or a store, does not answer

What ends with 128 or more may be started again as it is, and goes on; the scripts of launch/, xpk and SLURM go by this.
"""

from __future__ import annotations


class UserError(Exception):
  """A mistake in the input, told in one line: what is wrong, where (file, option, key), and the remedy."""

  status = 2

  def __init__(self, message: object = '', *, option: str = ''):
    super().__init__(message)
    self.option = option  # the option that the message begins with, such as sources[0]

  def within(self, where: str, *, option: str = '') -> UserError:
    """The same, of the same kind, told with the place where it happened."""
    error = type(self)(f'{where}: {self}')
    error.option = option
    return error


class InputError(UserError):
  """A mistake in one of several inputs, which the others need not suffer for."""


class Unreachable(UserError):
  """Nothing is wrong with the input: another process of the job, or a store, does not answer. Started again, the command goes on."""

  status = 200  # no signal's, and above 127: what xpk starts again
