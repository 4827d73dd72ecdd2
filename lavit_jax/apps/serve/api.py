"""The routes of the server.

    POST /v1/chat/completions     texts and images in, text out; `stream` for server-sent events
    POST /v1/images/generations   a text in, images out
    POST /v1/images/edits         images and a text in, images out
    GET  /v1/models, /health, /metrics

Errors: errors.py.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import hmac
import io
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from lavit_jax.apps.serve.conversation import decode_image, prompt_parts
from lavit_jax.apps.serve.engine import Engine, ImageJob, TextJob
from lavit_jax.apps.serve.errors import (
  ClientGone,
  EngineFailed,
  add_error_handlers,
  error_body,
  message_of,
  status_of,
)
from lavit_jax.apps.serve.metrics import Metrics
from lavit_jax.apps.serve.middleware import BodyLimit, CountResponses
from lavit_jax.apps.serve.replies import Reply
from lavit_jax.apps.serve.schemas import ChatRequest, ImageRequest
from lavit_jax.errors import InputError, UserError
from lavit_jax.inference.slot_decoder import TextSequence

CHECK_INTERVAL = 0.2  # seconds between two looks at whether the client is still there
MAX_IMAGES = 4  # of an edit
MIN_TEMPERATURE = 1e-4  # below it, logits over the temperature would overflow


@dataclasses.dataclass(frozen=True)
class Limits:
  """What a request may ask for.

  Attributes:
    body_bytes: of its body.
    pixels: of each of its images.
    seconds: until its end; then it is cut off.
  """

  body_bytes: int = 20 * 2**20
  pixels: int = 40_000_000
  seconds: float = 120.0


def create_app(engine: Engine, model_name: str, limits: Limits, api_key: str | None) -> FastAPI:
  """Makes the application; it closes the engine at its end.

  Args:
    engine: computes.
    model_name: as /v1/models names it; requests may name any.
    limits: of each request.
    api_key: without it, requests below /v1 are refused; None for none.
  """

  @contextlib.asynccontextmanager
  async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    del app
    yield
    await asyncio.to_thread(engine.close)

  metrics = Metrics(engine)
  app = FastAPI(title='lavit_jax', lifespan=lifespan, docs_url=None, redoc_url=None)
  app.add_middleware(BodyLimit, max_bytes=limits.body_bytes)
  app.add_middleware(CountResponses, metrics=metrics)
  add_error_handlers(app)

  def authorize(request: Request) -> None:
    sent = request.headers.get('authorization', '').removeprefix('Bearer ')
    if api_key is not None and not hmac.compare_digest(sent.encode(), api_key.encode()):
      raise HTTPException(401, 'the API key is missing or wrong; send it as a Bearer token')

  protected = [Depends(authorize)]

  @app.get('/health')
  async def health() -> dict[str, str]:
    return {'status': 'ok'}

  @app.get('/metrics')
  async def show_metrics() -> Response:
    return PlainTextResponse(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

  @app.get('/v1/models', dependencies=protected)
  async def models() -> dict[str, Any]:
    entry = dict(id=model_name, object='model', created=0, owned_by='lavit_jax')
    return {'object': 'list', 'data': [entry]}

  @app.post('/v1/chat/completions', dependencies=protected)
  async def chat(body: ChatRequest, request: Request) -> Response:
    parts = await asyncio.to_thread(
      prompt_parts,
      body.messages,
      engine.tokenizer,
      engine.model.chat_template,
      engine.model.modules.image_size,
      limits.pixels,
    )
    max_tokens = body.max_completion_tokens or body.max_tokens or engine.max_new_tokens
    sequences = []
    for number in range(body.n):
      sequences.append(
        TextSequence(
          parts,
          seed=body.seed,
          number=number,
          temperature=body.temperature if body.temperature >= MIN_TEMPERATURE else 0.0,
          top_p=body.top_p,
          min_new_tokens=1,
          max_new_tokens=max_tokens,
        )
      )
    completion = _Completion(body, sequences, engine, model_name)
    events = _text_events(engine, sequences, request, limits.seconds)
    first = await anext(events)  # errors before it still have a status of their own
    if body.stream:
      return StreamingResponse(completion.stream(first, events), media_type='text/event-stream')
    return JSONResponse(await completion.collect(first, events))

  @app.post('/v1/images/generations', dependencies=protected)
  async def generate(body: ImageRequest, request: Request) -> Any:
    return await _make_images(engine, [body.prompt], body, request, limits.seconds)

  @app.post('/v1/images/edits', dependencies=protected)
  async def edit(request: Request) -> Any:
    async with request.form() as form:
      fields = {name: value for name, value in form.items() if isinstance(value, str)}
      uploads = [*form.getlist('image'), *form.getlist('image[]')]
      if 'mask' in form:
        raise InputError('mask is not supported; leave it out')
      if not 1 <= len(uploads) <= MAX_IMAGES:
        raise InputError(f'image: send 1 to {MAX_IMAGES} files')
      parts = []
      for number, upload in enumerate(uploads):
        if not isinstance(upload, UploadFile):
          raise InputError('image: send files, as multipart/form-data')
        data = await upload.read()
        name = upload.filename or f'image {number}'
        parts.append(await asyncio.to_thread(decode_image, data, name, limits.pixels))
    try:
      body = ImageRequest.model_validate(fields)
    except ValidationError as error:
      raise RequestValidationError(error.errors()) from None
    return await _make_images(engine, [*parts, body.prompt], body, request, limits.seconds)

  return app


# --- Texts ---------------------------------------------------------------------------------------


class _Completion:
  """The answer to a chat request, whole or as a stream of chunks."""

  def __init__(
    self, body: ChatRequest, sequences: Sequence[TextSequence], engine: Engine, model_name: str
  ):
    self._body = body
    self._sequences = sequences
    self._numbers = {id(sequence): number for number, sequence in enumerate(sequences)}
    self._replies = [Reply(engine.tokenizer, body.stop) for _ in sequences]
    self._head = dict(id=f'chatcmpl-{uuid.uuid4().hex}', created=int(time.time()), model=model_name)

  async def collect(self, first: Any, events: AsyncGenerator[Any, None]) -> dict[str, Any]:
    """The whole answer."""
    async with contextlib.aclosing(self._texts(first, events)) as texts:
      async for _ in texts:
        pass
    choices = []
    for number, reply in enumerate(self._replies):
      message = {'role': 'assistant', 'content': reply.text.rstrip()}
      choices.append(dict(index=number, message=message, finish_reason=reply.finish_reason))
    return dict(self._head, object='chat.completion', choices=choices, usage=self._usage())

  async def stream(self, first: Any, events: AsyncGenerator[Any, None]) -> AsyncIterator[str]:
    """Server-sent events."""
    try:
      for number in range(len(self._replies)):
        yield self._chunk(number, {'role': 'assistant', 'content': ''})
      async with contextlib.aclosing(self._texts(first, events)) as texts:
        async for number, text in texts:
          if text:
            yield self._chunk(number, {'content': text})
          if reason := self._replies[number].finish_reason:
            yield self._chunk(number, {}, reason)
    except ClientGone:
      return
    except Exception as error:  # the status is sent already
      yield f'data: {json.dumps(error_body(status_of(error), message_of(error)))}\n\n'
      return
    if self._body.stream_options and self._body.stream_options.include_usage:
      usage = dict(self._head, object='chat.completion.chunk', choices=[], usage=self._usage())
      yield f'data: {json.dumps(usage)}\n\n'
    yield 'data: [DONE]\n\n'

  async def _texts(
    self, first: Any, events: AsyncGenerator[Any, None]
  ) -> AsyncGenerator[tuple[int, str], None]:
    """(number of a choice, its new text) until all have ended."""
    event = first
    while True:
      number = self._numbers[id(event.sequence)]
      reply = self._replies[number]
      if reply.finish_reason is None:
        yield number, reply.add(event.id, event.is_last)
      if all(reply.finish_reason for reply in self._replies):
        await events.aclose()
        return
      event = await anext(events)

  def _chunk(self, number: int, delta: dict[str, str], reason: str | None = None) -> str:
    choice = dict(index=number, delta=delta, finish_reason=reason)
    chunk = dict(self._head, object='chat.completion.chunk', choices=[choice])
    return f'data: {json.dumps(chunk)}\n\n'

  def _usage(self) -> dict[str, int]:
    prompt = self._sequences[0].prompt_tokens
    completion = sum(reply.num_tokens for reply in self._replies)
    return dict(
      prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion
    )


async def _text_events(
  engine: Engine, sequences: Sequence[TextSequence], request: Request, seconds: float
) -> AsyncGenerator[Any, None]:
  """The tokens of sequences; whatever ends it, the engine forgets what is left of them."""
  queue, put = _queue()
  job = TextJob(sequences, on_token=put, on_error=put)
  engine.submit(job)
  try:
    async for event in _events(queue, request, seconds):
      if event.error is not None:
        raise event.error
      yield event
  finally:
    engine.cancel(job)


# --- Images --------------------------------------------------------------------------------------


async def _make_images(
  engine: Engine, parts: list[Any], body: ImageRequest, request: Request, seconds: float
) -> dict[str, Any]:
  engine.model.require_drawing()
  try:
    size = body.height_width()
  except ValueError as error:
    raise InputError(str(error)) from None
  queue, put = _queue()
  job = ImageJob(parts, body.n, size, body.num_inference_steps, body.seed, put, put)
  engine.submit(job)
  try:
    async with contextlib.aclosing(_events(queue, request, seconds)) as events:
      images = await anext(events)
  finally:
    engine.cancel(job)
  encoded = await asyncio.to_thread(lambda: [_encode_png(image) for image in images])
  return {'created': int(time.time()), 'data': [{'b64_json': image} for image in encoded]}


def _encode_png(image: Any) -> str:
  file = io.BytesIO()
  Image.fromarray(image).save(file, 'PNG')
  return base64.b64encode(file.getvalue()).decode()


# --- Events --------------------------------------------------------------------------------------


def _queue() -> tuple[asyncio.Queue[Any], Callable[[Any], None]]:
  """A queue, and what puts into it from the engine's thread."""
  loop = asyncio.get_running_loop()
  queue: asyncio.Queue[Any] = asyncio.Queue()

  def put(event: Any) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has ended
      loop.call_soon_threadsafe(queue.put_nowait, event)

  return queue, put


async def _events(
  queue: asyncio.Queue[Any], request: Request, seconds: float
) -> AsyncGenerator[Any, None]:
  """What comes out of a queue, as long as the client is there and has time."""
  deadline = time.monotonic() + seconds
  while True:
    try:
      event = await asyncio.wait_for(queue.get(), CHECK_INTERVAL)
    except TimeoutError:
      event = None
    if isinstance(event, UserError):
      raise event
    if isinstance(event, Exception):
      raise EngineFailed from event
    if event is not None:
      yield event
    elif await request.is_disconnected():
      raise ClientGone
    if time.monotonic() > deadline:
      raise HTTPException(504, f'the request took more than {seconds:g} seconds')
