"""The one exception that is meant for the person at the keyboard."""


class UserError(Exception):
  """A mistake in the input, told in one line: what is wrong, where (file, option, key), and the remedy."""
