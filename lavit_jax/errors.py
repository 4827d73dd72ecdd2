"""The exceptions that are meant for the person at the keyboard."""


class UserError(Exception):
  """A mistake in the input, told in one line: what is wrong, where (file, option, key), and the remedy."""


class InputError(UserError):
  """A mistake in one of several inputs, which the others need not suffer for."""
