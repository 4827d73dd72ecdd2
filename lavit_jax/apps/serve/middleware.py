"""What is around the routes: the size of bodies, and the count of responses."""

from __future__ import annotations

import time
from typing import Any

from starlette.exceptions import HTTPException

from lavit_jax.apps.serve.errors import error_response
from lavit_jax.apps.serve.metrics import Metrics


class BodyLimit:
  """ASGI middleware that refuses bodies above a size, announced or not."""

  def __init__(self, app: Any, max_bytes: int):
    self._app = app
    self._max_bytes = max_bytes

  async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
    """Handles a request."""
    if scope['type'] != 'http':
      await self._app(scope, receive, send)
      return
    refusal = HTTPException(413, f'the body is larger than {self._max_bytes / 2**20:g} MiB')
    announced = dict(scope['headers']).get(b'content-length', b'0')
    if announced.isdigit() and int(announced) > self._max_bytes:
      await error_response(413, refusal.detail)(scope, receive, send)
      return
    received = 0

    async def receive_limited() -> Any:
      nonlocal received
      message = await receive()
      received += len(message.get('body', b''))
      if received > self._max_bytes:
        raise refusal
      return message

    await self._app(scope, receive_limited, send)


class CountResponses:
  """ASGI middleware that counts responses.

  FastAPI's own middleware would hide from the routes that a client has gone.
  """

  def __init__(self, app: Any, metrics: Metrics):
    self._app = app
    self._metrics = metrics

  async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
    """Handles a request."""
    start = time.monotonic()

    async def send_counted(message: Any) -> None:
      if message['type'] == 'http.response.start':
        self._metrics.count_response(scope.get('route'), message['status'], start)
      await send(message)

    await self._app(scope, receive, send_counted)
