"""Starts and ends the server."""

from __future__ import annotations

import os
import pathlib
import socket

import uvicorn

from lavit_jax.apps.listening import cannot_listen
from lavit_jax.apps.serve.api import Limits, create_app
from lavit_jax.apps.serve.engine import Engine
from lavit_jax.inference.pipeline import Lavit

API_KEY_VARIABLE = 'LAVIT_API_KEY'


def serve(
  model: Lavit,
  name: str,
  host: str,
  port: int,
  *,
  num_slots: int,
  prompt_tokens: int,
  new_tokens: int,
  max_queue: int,
  limits: Limits,
) -> None:
  """Serves until interrupted or terminated; requests that were taken are answered first.

  Args:
    model: computes.
    name: of its folder.
    host: address to listen on.
    port: to listen on; 0 chooses a free one.
    num_slots: texts that are generated at once.
    prompt_tokens: the most tokens of a prompt.
    new_tokens: the most new tokens of a text.
    max_queue: requests that may wait.
    limits: of each request.

  Raises:
    UserError: the port is taken, or the host is no address of this machine; the model cannot be
      served.
  """
  try:
    listener = socket.create_server((host, port))
  except OSError:
    raise cannot_listen(host, port) from None
  with listener:
    engine = Engine(model, num_slots, prompt_tokens, new_tokens, max_queue)
    engine.warm_up()
    app = create_app(engine, pathlib.Path(name).name, limits, os.environ.get(API_KEY_VARIABLE))
    config = uvicorn.Config(
      app, log_level='warning', timeout_graceful_shutdown=int(limits.seconds), lifespan='on'
    )
    address = '{}:{}'.format(*listener.getsockname()[:2])
    print(f'http://{address}/v1 answers; end it with Ctrl-C', flush=True)
    uvicorn.Server(config).run(sockets=[listener])
