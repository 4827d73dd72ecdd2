"""The errors of requests, in the form of OpenAI's: {"error": {"message", "type", "code"}}."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from lavit_jax.apps.serve.engine import Closed, Flagged, Overloaded
from lavit_jax.errors import UserError

CLIENT_CLOSED = 499  # nginx's status of a request whose client has gone
TYPES = {401: 'authentication_error', 429: 'rate_limit_error', 503: 'server_error'}


class ClientGone(Exception):
  """The client has closed the connection."""


class EngineFailed(Exception):
  """The engine could not compute, by a fault of its own."""


def add_error_handlers(app: FastAPI) -> None:
  """Answers all errors in one form."""

  async def handle(request: Request, error: Exception) -> Response:
    del request
    code = 'content_policy_violation' if isinstance(error, Flagged) else None
    return error_response(status_of(error), message_of(error), code)

  refusals = (HTTPException, UserError, RequestValidationError, Overloaded, Closed)
  for kind in (*refusals, ClientGone, EngineFailed, Exception):
    app.add_exception_handler(kind, handle)


def status_of(error: Exception) -> int:
  """The status of HTTP for an error."""
  statuses = {Overloaded: 429, Closed: 503, ClientGone: CLIENT_CLOSED}
  if isinstance(error, HTTPException):
    return error.status_code
  if isinstance(error, (UserError, RequestValidationError)):
    return 400
  return statuses.get(type(error), 500)


def message_of(error: Exception) -> str:
  """What a client is told of an error."""
  match error:
    case HTTPException():
      return str(error.detail)
    case RequestValidationError():
      first = error.errors()[0]
      place = '.'.join(str(part) for part in first['loc'] if part != 'body')
      return f'{place}: {first["msg"]}' if place else first['msg']
    case Overloaded():
      return 'too many requests are waiting; try again later'
    case Closed():
      return 'the server is shutting down'
    case ClientGone():
      return 'the client has gone'
    case UserError():
      return str(error)
  return 'the server has failed; its log says why'


def error_body(status: int, message: str, code: str | None = None) -> dict[str, Any]:
  """The body of an error."""
  kind = TYPES.get(status, 'invalid_request_error' if status < 500 else 'server_error')
  return {'error': dict(message=message, type=kind, param=None, code=code)}


def error_response(status: int, message: str, code: str | None = None) -> JSONResponse:
  """The response to a request that failed."""
  headers = {'Retry-After': '1'} if status == 429 else None
  return JSONResponse(error_body(status, message, code), status, headers=headers)
