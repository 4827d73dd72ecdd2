"""The server, asked by OpenAI's client over loopback."""

import base64
import concurrent.futures
import io
import json
import re
import socket
import threading
import time
import types

import httpx
import jax
import numpy as np
import openai
import pytest
import uvicorn
from PIL import Image

from lavit_jax.apps.serve import api, engine
from lavit_jax.apps.serve.replies import Reply
from lavit_jax.errors import InputError
from lavit_jax.inference import slots
from lavit_jax.inference.outputs import ImageOutput
from lavit_jax.inference.pipeline import Lavit

KEY = 'a key'
SLOTS = 3
NEW_TOKENS = 12


@pytest.fixture(scope='module')
def model(shallow_folder):
  return Lavit.from_pretrained(shallow_folder)


@pytest.fixture(scope='module')
def running(model):
  """A server: its engine and its address."""
  running_engine = engine.Engine(model, SLOTS, 128, NEW_TOKENS, max_queue=8)
  limits = api.Limits(body_bytes=100_000, pixels=10_000, seconds=60)
  app = api.create_app(running_engine, 'shallow', limits, KEY)
  listener = socket.create_server(('127.0.0.1', 0))
  server = uvicorn.Server(uvicorn.Config(app, log_level='warning', lifespan='on'))
  thread = threading.Thread(target=server.run, kwargs=dict(sockets=[listener]))
  thread.start()
  url = 'http://{}:{}'.format(*listener.getsockname())
  yield types.SimpleNamespace(engine=running_engine, url=url, app=app)
  server.should_exit = True
  thread.join(30)
  assert not thread.is_alive()


@pytest.fixture(scope='module')
def client(running):
  with openai.OpenAI(base_url=f'{running.url}/v1', api_key=KEY, max_retries=0) as client:
    yield client


def png(size=64, seed=0):
  pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, 'PNG')
  return file.getvalue()


def image_message(text, seed=0):
  url = 'data:image/png;base64,' + base64.b64encode(png(seed=seed)).decode()
  content = [{'type': 'image_url', 'image_url': {'url': url}}]
  if text:
    content.append({'type': 'text', 'text': text})
  return {'role': 'user', 'content': content}


def ask(client, messages, **options):
  return client.chat.completions.create(model='any', messages=messages, **options)


def test_an_answer_is_that_of_the_api(client, model):
  reply = ask(client, [image_message('What is this?')], seed=3, temperature=0.7, top_p=0.8)
  (output,) = model.answer_outputs(
    [png()],
    ['What is this?'],
    seed=[3],
    do_sample=True,
    temperature=0.7,
    top_p=0.8,
    top_k=None,
    min_new_tokens=1,
    max_new_tokens=NEW_TOKENS,
  )
  choice = reply.choices[0]
  text = model.tokenizer.decode(output.ids.tolist())
  assert choice.message.content == text.strip()
  assert choice.finish_reason == ('stop' if output.ids[-1] == 2 else 'length')
  assert reply.usage.completion_tokens == len(output.ids)
  assert reply.usage.total_tokens == reply.usage.prompt_tokens + len(output.ids)


def test_requests_at_the_same_time_have_the_answers_that_they_have_alone(client):
  def answer(number):
    messages = [image_message(f'What is thing {number}?' if number % 4 else '', seed=number)]
    reply = ask(client, messages, seed=number, max_tokens=4 + number % 8, n=1 + number % 2)
    return [choice.message.content for choice in reply.choices]

  alone = [answer(number) for number in range(6)]
  with concurrent.futures.ThreadPoolExecutor(6) as pool:
    together = list(pool.map(answer, range(6)))
  assert together == alone
  assert len({text for texts in alone for text in texts}) > 5


def test_a_stream_has_the_same_text(client):
  messages = [image_message('What is this?', seed=1)]
  options = dict(seed=4, n=2)
  whole = ask(client, messages, **options)
  texts = ['', '']
  reasons = [None, None]
  usage = None
  stream = ask(client, messages, stream=True, stream_options={'include_usage': True}, **options)
  for chunk in stream:
    usage = chunk.usage or usage
    for choice in chunk.choices:
      texts[choice.index] += choice.delta.content or ''
      reasons[choice.index] = choice.finish_reason or reasons[choice.index]
  assert [text.rstrip() for text in texts] == [c.message.content for c in whole.choices]
  assert reasons == [choice.finish_reason for choice in whole.choices]
  assert usage == whole.usage


def test_a_temperature_near_0_is_that_of_the_most_probable_token(client):
  messages = [image_message('What is this?', seed=2)]
  replies = [ask(client, messages, temperature=t, seed=1) for t in (0, 1e-30)]
  assert replies[0].choices[0].message.content == replies[1].choices[0].message.content


def test_a_conversation_is_written_as_in_training(client, running, monkeypatch):
  submitted = []
  real = running.engine.submit
  monkeypatch.setattr(
    running.engine, 'submit', lambda job: (submitted.extend(job.sequences), real(job))
  )
  encode = running.engine.tokenizer.encode
  messages = [
    {'role': 'system', 'content': 'be short'},
    {'role': 'user', 'content': 'What is red?'},
    {'role': 'assistant', 'content': 'a rose'},
    {'role': 'user', 'content': [{'type': 'text', 'text': 'And blue?'}]},
  ]
  ask(client, messages, max_completion_tokens=1)
  assert [list(part) for part in submitted[0].parts] == [
    [1],
    list(encode('be short')),
    list(encode('Question: What is red? Answer:')),
    [*encode('a rose'), 2],
    list(encode('Question: And blue? Answer:')),
  ]
  ask(client, [image_message('')], max_tokens=1)
  assert len(submitted[1].parts) == 1 and submitted[1].parts[0].shape == (64, 64, 3)


@pytest.mark.parametrize(
  'messages, options, message',
  [
    ([{'role': 'assistant', 'content': 'a'}], {}, "the last one must have the role 'user'"),
    ([{'role': 'user', 'content': ' '}], {}, r'messages\[0\] is empty'),
    ([{'role': 'robot', 'content': 'a'}, image_message('a')], {}, "the role 'robot' is unknown"),
    (
      [{'role': 'user', 'content': [{'type': 'image_url', 'image_url': {'url': 'http://a/b'}}]}],
      {},
      r'messages\[0\].content\[0\]: the server fetches nothing',
    ),
    ([image_message('a')], dict(max_tokens=99), '99 new tokens are too many; ask for at most 12'),
    ([image_message('a ' * 299)], {}, 'tokens long; shorten it to 128'),
    ([image_message('a')], dict(temperature=-1), 'temperature: '),
    ([image_message('a')], dict(logprobs=True), 'logprobs is not supported; leave it out'),
    ([image_message('a')], dict(tools=[{'type': 'function'}]), 'tools is not supported'),
  ],
)
def test_a_wrong_request_is_refused_in_one_line(client, messages, options, message):
  with pytest.raises(openai.BadRequestError, match=message) as error:
    ask(client, messages, **options)
  assert error.value.body['type'] == 'invalid_request_error'


def test_limits_of_a_body_and_of_pixels(client, running):
  url = 'data:image/png;base64,' + base64.b64encode(png(120)).decode()
  content = [{'type': 'image_url', 'image_url': {'url': url}}]
  with pytest.raises(openai.BadRequestError, match='120 x 120 is too large; scale it below 0.01'):
    ask(client, [{'role': 'user', 'content': content}])
  with pytest.raises(openai.APIStatusError, match='the body is larger than') as error:
    ask(client, [{'role': 'user', 'content': 'a' * 200_000}])
  assert error.value.status_code == 413

  def chunks():
    for _ in range(30):
      yield b' ' * 10_000

  headers = {'authorization': f'Bearer {KEY}', 'content-type': 'application/json'}
  reply = httpx.post(f'{running.url}/v1/chat/completions', content=chunks(), headers=headers)
  assert reply.status_code == 413


def test_the_key(running):
  with openai.OpenAI(base_url=f'{running.url}/v1', api_key='another', max_retries=0) as stranger:
    with pytest.raises(openai.AuthenticationError, match='the API key is missing or wrong'):
      stranger.models.list()
    with pytest.raises(openai.AuthenticationError):
      ask(stranger, [image_message('a')])
  assert httpx.get(f'{running.url}/health').json() == {'status': 'ok'}


def test_models_and_metrics(client, running):
  assert [model.id for model in client.models.list()] == ['shallow']
  ask(client, [image_message('a')], max_tokens=1)
  text = httpx.get(f'{running.url}/metrics').text
  count = re.search(
    r'lavit_responses_total\{route="/v1/chat/completions",status="200"\} (\S+)', text
  )
  assert float(count[1]) >= 1
  assert 'lavit_waiting_requests 0.0' in text and 'lavit_active_texts 0.0' in text


def hold(running, monkeypatch):
  """Stops the engine before its next step until the event that it returns is set."""
  release = threading.Event()
  real = running.engine._guard

  def wait(step):
    release.wait(30)
    real(step)

  monkeypatch.setattr(running.engine, '_guard', wait)
  return release


def test_overload_is_answered_at_once_and_a_client_that_goes_frees_its_place(
  client, running, monkeypatch
):
  release = hold(running, monkeypatch)
  monkeypatch.setattr(running.engine, '_max_queue', 2)
  body = dict(model='any', messages=[image_message('a')], max_tokens=2)
  headers = {'authorization': f'Bearer {KEY}'}

  def send():
    try:
      httpx.post(f'{running.url}/v1/chat/completions', json=body, headers=headers, timeout=2)
    except httpx.TimeoutException:
      return 'gone'
    return 'answered'

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    first = [pool.submit(send) for _ in range(1)]
    while not running.engine._jobs:  # it is in a slot
      time.sleep(0.01)
    waiting = [pool.submit(send) for _ in range(2)]
    while running.engine.num_waiting < 2:
      time.sleep(0.01)
    start = time.monotonic()
    with pytest.raises(openai.RateLimitError, match='too many requests are waiting'):
      ask(client, [image_message('a')])
    assert time.monotonic() - start < 2
    assert [future.result() for future in first + waiting] == ['gone'] * 3
    deadline = time.monotonic() + 10
    while running.engine.num_waiting and time.monotonic() < deadline:
      time.sleep(0.01)
    assert running.engine.num_waiting == 0
  release.set()
  monkeypatch.undo()
  assert ask(client, [image_message('a')], max_tokens=1).choices[0].message.content is not None
  assert running.engine.num_active == 0


def test_a_request_that_takes_too_long_is_cut_off(running, monkeypatch):
  release = hold(running, monkeypatch)
  limits = api.Limits(seconds=0.3)
  app = api.create_app(running.engine, 'shallow', limits, None)
  transport = httpx.ASGITransport(app)

  async def send():
    async with httpx.AsyncClient(transport=transport, base_url='http://server') as own:
      return await own.post('/v1/chat/completions', json=dict(messages=[image_message('a')]))

  import asyncio

  reply = asyncio.run(send())
  assert reply.status_code == 504 and 'more than 0.3 seconds' in reply.json()['error']['message']
  release.set()


def test_a_failure_of_the_engine_is_an_error_and_not_its_end(client, running, monkeypatch):
  def fail(*_, **__):
    jax.tree.map(lambda array: array.delete(), running.engine._decoder._state)  # it was donated
    raise RuntimeError('out of memory')

  monkeypatch.setattr(slots, 'advance', fail)
  with pytest.raises(openai.InternalServerError, match='the server has failed; its log says why'):
    ask(client, [image_message('a')])
  monkeypatch.undo()
  assert ask(client, [image_message('a')], max_tokens=1).choices


@pytest.fixture
def fake_images(running, monkeypatch):
  """Images whose pixels are the seeds of their requests; the calls that were made."""
  calls = []

  def make(kind):
    def generate(prompts, *, seed, num_return_sequences, **options):
      calls.append((kind, prompts, list(seed), num_return_sequences, options))
      if any(prompt == 'bad' for prompt in prompts):
        raise InputError('this prompt is bad')
      values = np.repeat(np.array(seed, np.uint8), num_return_sequences)
      images = np.broadcast_to(values[:, None, None, None], (len(values), 8, 8, 3))
      return ImageOutput(images, values == 66, [])

    return generate

  monkeypatch.setattr(running.engine.model, 'generate_outputs', make('generate'))
  monkeypatch.setattr(running.engine.model, 'synthesize_outputs', make('synthesize'))
  return calls


def colors(reply):
  images = [Image.open(io.BytesIO(base64.b64decode(image.b64_json))) for image in reply.data]
  return [np.asarray(image)[0, 0, 0] for image in images]


def test_images_from_texts_are_batched_and_not_mixed_up(client, running, fake_images):
  def generate(number):
    prompt = 'bad' if number == 3 else f'thing {number}'
    return client.images.generate(prompt=prompt, n=2, size='64x32', extra_body={'seed': number})

  with concurrent.futures.ThreadPoolExecutor(6) as pool:
    futures = [pool.submit(generate, number) for number in range(6)]
    for number, future in enumerate(futures):
      if number == 3:
        with pytest.raises(openai.BadRequestError, match='this prompt is bad'):
          future.result()
      else:
        assert colors(future.result()) == [number, number]
  assert all(call[4]['size'] == (32, 64) for call in fake_images)  # height, width


def test_edits_and_flagged_images(client, fake_images):
  reply = client.images.edit(
    image=[('a.png', png()), ('b.png', png())], prompt='on red', extra_body={'seed': 7}
  )
  assert colors(reply) == [7]
  kind, ((first, second, text),), *_ = fake_images[0]
  assert (kind, first.shape, second.shape, text) == (
    'synthesize',
    (64, 64, 3),
    (64, 64, 3),
    'on red',
  )
  with pytest.raises(openai.BadRequestError, match='safety checker flagged') as error:
    client.images.generate(prompt='a', extra_body={'seed': 66})
  assert error.value.code == 'content_policy_violation'
  with pytest.raises(openai.BadRequestError, match='mask is not supported'):
    client.images.edit(image=png(), mask=png(), prompt='a')
  with pytest.raises(openai.BadRequestError, match="size='big' is not WIDTHxHEIGHT"):
    client.images.generate(prompt='a', size='big')


def test_stop_texts_and_characters_of_several_tokens():
  """Nothing is sent that may still change."""

  class Tokenizer:
    def decode(self, ids):
      return bytes(ids).decode(errors='replace')

  sent = []
  reply = Reply(Tokenizer(), ['END'])
  for byte in 'aé EN ENDx'.encode():
    sent.append(reply.add(byte, False))
    if reply.finish_reason:
      break
  assert sent == ['a', '', 'é', ' ', '', '', 'EN ', '', '', '']
  assert reply.text == 'aé EN ' and reply.finish_reason == 'stop'
  cut = Reply(Tokenizer(), [])
  assert [cut.add(ord('a'), False), cut.add(ord('b'), True)] == ['a', 'b']
  assert cut.finish_reason == 'length'
  assert json.dumps(cut.text) == '"ab"'
