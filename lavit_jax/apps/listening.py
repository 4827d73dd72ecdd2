"""What the servers say of an address that they cannot have."""

from lavit_jax.errors import UserError


def cannot_listen(host: str, port: int) -> UserError:
  """The error for a host and a port."""
  return UserError(
    f'cannot listen on {host}:{port}; the port is taken, or the host is not this machine; '
    'choose another --port or --host'
  )
