"""The page of `lavit app`: tasks, wrong uploads, and that it fetches nothing from other servers.

A slow test opens it in Chromium.
"""

import asyncio
import base64
import io
import json
import pathlib
import re
import shutil
import socket
import time
import types
import urllib.request

import numpy as np
import pytest
from PIL import Image

pytest.importorskip(
  'gradio', reason="the page needs Gradio; pip install -e '.[app]' -c launch/constraints.txt"
)

import gradio as gr
from gradio_client import Client, handle_file

import lavit_jax
from lavit_jax.apps import web
from lavit_jax.errors import UserError
from lavit_jax.inference import image_decoder
from lavit_jax.inference.generation_config import VariantDefaults
from lavit_jax.inference.outputs import DecodedImages, VisualTokens
from lavit_jax.inference.pipeline import Lavit
from lavit_jax.models.noise_schedule import Scheduler

ASSETS = pathlib.Path(lavit_jax.__file__).parent / 'assets'
IMAGE = str(ASSETS / 'demo' / '01.png')
KEEP = np.arange(64) % 3 == 0
IDS = np.arange(KEEP.sum()) * 7 % 50


class Params(dict):
  """Parameter trees by module."""

  scheduler = staticmethod(lambda prefix: Scheduler())


class Stub:
  """A model that answers with its inputs, and counts simultaneous calls."""

  modules = types.SimpleNamespace(
    image_size=64,
    variant='stub',
    vocabulary=types.SimpleNamespace(codebook_size=50),
    tokenizer=types.SimpleNamespace(
      apply=lambda variables, codes, method: np.random.default_rng(0).normal(size=(50, 8))
    ),
  )
  params = Params(codebook={})
  defaults = VariantDefaults()

  def __init__(self):
    self.running = 0
    self.max_running = 0
    self.seen = []

  def tokenize(self, images, seed):
    return VisualTokens(
      [IDS] * len(images), np.tile(KEEP, (len(images), 1)), np.full(len(images), KEEP.sum())
    )

  def caption(self, images):
    self.running += 1
    self.max_running = max(self.max_running, self.running)
    time.sleep(0.3)
    self.running -= 1
    return [f'red {image[0, 0, 0]}' for image in images]

  def answer(self, images, questions):
    if questions == ['fail']:
      raise ZeroDivisionError('in /home/me/secret.py')
    return [f'{text} <b>' for text in questions]

  def sample_codes(self, prompts, guidance_scale, seed):
    self.seen.append((prompts, guidance_scale, seed))
    return [IDS[:5]]

  def decode_image_outputs(self, codes, num_inference_steps, seed, size):
    self.size = size
    return DecodedImages(
      np.full((len(codes), 64, 64, 3), num_inference_steps, np.uint8),
      np.array([num_inference_steps == 66] * len(codes)),
    )

  def reconstruct_outputs(self, images, guidance_scale, num_inference_steps, seed, size):
    return DecodedImages(np.stack(images), np.array([num_inference_steps == 66]))


@pytest.fixture
def tasks():
  return web.Tasks(Stub())


def images_in(text):
  images = []
  for data in re.findall('base64,([^"]+)', text):
    images.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))))
  return images


def test_tokens_are_shown_in_order(tasks):
  caption, shown = tasks.caption(IMAGE)
  image = Image.open(IMAGE).convert('RGB')
  assert caption == f'red {image.getpixel((0, 0))[0]}'
  overlay, *patches = images_in(shown)
  corners = [(8 * (i % 8), 8 * (i // 8)) for i in range(64)]
  crops = [np.asarray(image.crop((x, y, x + 8, y + 8))) for x, y in corners]
  for patch, i in zip(patches, np.flatnonzero(KEEP), strict=True):
    np.testing.assert_array_equal(patch, crops[i])
  for i, (x, y) in enumerate(corners):
    assert np.array_equal(overlay[y : y + 8, x : x + 8], crops[i]) == KEEP[i]
  assert [int(code) for code in re.findall(r'>(\d+)</b>', shown)] == IDS.tolist()
  assert f'{KEEP.sum()} of 64 patches' in shown


def test_similar_codes_have_similar_colors(tasks):
  vectors = np.random.default_rng(1).normal(size=(50, 8))
  vectors[7] = vectors[3] + 1e-4
  tasks.model.modules = types.SimpleNamespace(
    **vars(Stub.modules) | dict(tokenizer=types.SimpleNamespace(apply=lambda *_, **__: vectors))
  )
  colors = np.array([re.findall(r'\d+', color) for color in tasks.code_colors], int)
  assert colors.shape == (50, 3)
  assert colors.min() >= 0
  assert colors.max() < 256
  assert colors.std(0).min() > 10
  assert abs(colors[7] - colors[3]).max() <= 1
  assert abs(colors[7] - np.delete(colors, [3, 7], 0)).sum(-1).min() > 1


def test_drawing(tasks):
  image, shown = tasks.draw(' an owl ', 3, 4.5, 7)
  assert image.shape == (64, 64, 3)
  assert image[0, 0, 0] == 7
  assert shown.count('<li>') == 5
  tasks.mix(dict(files=[IMAGE, IMAGE], text=' '), 0, 5, 7)
  tasks.mix(dict(files=[IMAGE], text='on red'), 0, 5, 7)
  (text, guidance, seed), (two, *_), (mixed, *_) = tasks.model.seen
  assert (text, guidance, seed) == ([['an owl']], 4.5, 3)
  assert [part.shape for part in two[0]] == [(64, 64, 3)] * 2
  assert mixed[0][1:] == ['on red']
  image, shown = tasks.rebuild(IMAGE, 0, 5, 7)
  np.testing.assert_array_equal(image, np.asarray(Image.open(IMAGE).convert('RGB')))


def test_texts_keep_their_order(tasks):
  tasks.mix(dict(files=[IMAGE, IMAGE], text='on red'), 0, 5, 7, None, ' an owl and ')
  (prompt,), *_ = tasks.model.seen[0]
  assert [part if isinstance(part, str) else part.shape for part in prompt] == [
    'an owl and',
    (64, 64, 3),
    (64, 64, 3),
    'on red',
  ]


def test_sizes_are_those_of_the_checkpoint(tasks, monkeypatch):
  assert tasks.sizes() == ['512x512']
  assert tasks.defaults('512x512') == (50, 5.0)
  with pytest.raises(UserError, match='1024x1024 needs highres_decoder'):
    tasks.draw('owl', 0, 4, 7, '1024x1024')
  assert not tasks.model.seen
  monkeypatch.setattr(Stub, 'params', Params(dict.fromkeys(image_decoder.HIGHRES.modules)))
  assert tasks.sizes()[:3] == ['512x512', '1024x1024', '896x1152']
  assert len(tasks.sizes()) == 7
  assert tasks.defaults('896x1152') == (25, 7.0)
  tasks.draw('owl', 0, 4, 7, '896x1152')
  assert tasks.model.size == (896, 1152)
  with pytest.raises(UserError, match="'big' is not a size"):
    tasks.draw('owl', 0, 4, 7, 'big')
  monkeypatch.setattr(
    Stub, 'modules', types.SimpleNamespace(**vars(Stub.modules) | dict(variant='tiny'))
  )
  assert tasks.defaults('512x512') == (25, 5.0)

  def sliders(page):
    values = []
    for component in page.get_config_file()['components']:
      if component['type'] in ('slider', 'dropdown'):
        props = component['props']
        values.append((props['label'], props['value'], props['visible']))
    return values[:3]

  assert sliders(web.build(tasks)) == [
    ('Guidance', 4.0, True),
    ('Steps', 25, True),
    ('Size', '512x512', True),
  ]
  monkeypatch.setattr(
    Stub, 'modules', types.SimpleNamespace(**vars(Stub.modules) | dict(variant='stub'))
  )
  page = web.build(tasks)
  updates = []
  for event in page.fns.values():
    is_private = event.api_visibility == 'private'
    if is_private and [component.label for component in event.inputs] == ['Size']:
      updates.append(asyncio.run(page.process_api(event, ['896x1152']))['data'])
  assert updates == [[25], [25], [25, 7.0]]  # of Generate, Mix, Reconstruct
  monkeypatch.setattr(Stub, 'params', {})
  assert sliders(web.build(tasks))[2] == ('Size', '512x512', False)


def test_wrong_steps_are_reported_before_the_model_runs(tasks):
  for call in (
    lambda: tasks.draw('owl', 0, 4, 0),
    lambda: tasks.mix(dict(files=[IMAGE], text='owl'), 0, 4, 2000),
  ):
    with pytest.raises(UserError, match='steps=0 is not allowed|steps=2000 must be in'):
      call()
  assert not tasks.model.seen


def test_a_flagged_image_is_not_shown(tasks):
  for call in (lambda: tasks.draw('owl', 0, 4, 66), lambda: tasks.rebuild(IMAGE, 0, 5, 66)):
    with pytest.raises(UserError, match='the safety checker flagged this image'):
      call()


def upload(tmp_path, data):
  path = tmp_path / 'upload.png'
  path.write_bytes(data)
  return str(path)


@pytest.mark.parametrize(
  'data, message',
  [
    (b'words', '^upload.png: not an image that Pillow can read'),
    (b'', '^upload.png: the file is empty'),
    (pathlib.Path(IMAGE).read_bytes()[:300], '^upload.png: .*truncated'),
  ],
)
def test_uploads_that_are_not_images(tasks, tmp_path, data, message):
  for call in (
    tasks.caption,
    lambda path: tasks.mix(dict(files=[IMAGE, path]), 0, 5, 2),
    lambda path: tasks.rebuild(path, 0, 5, 2),
  ):
    with pytest.raises(UserError, match=message):
      call(upload(tmp_path, data))


def test_the_size_of_an_upload_is_checked_before_it_is_read(tasks, tmp_path, monkeypatch):
  monkeypatch.setattr(web.tasks, 'read_image', lambda *_: pytest.fail('decoded'))
  buffer = io.BytesIO()
  Image.new('1', (8000, 6250)).save(buffer, 'PNG')
  with pytest.raises(
    UserError, match='upload.png is 8000 x 6250, 50 million pixels; scale it below 40 million'
  ):
    tasks.caption(upload(tmp_path, buffer.getvalue()))
  path = upload(tmp_path, b'')
  with open(path, 'ab') as file:
    file.truncate(web.MAX_BYTES + 2**20)
  with pytest.raises(UserError, match='upload.png has 21 MB; make it smaller than 20 MB'):
    tasks.caption(path)


def test_a_deleted_upload(tasks, tmp_path):
  for call in (tasks.caption, lambda path: tasks.mix(dict(files=[path]), 0, 5, 2)):
    with pytest.raises(
      UserError, match='^cat.png was uploaded too long ago and is deleted; upload it again'
    ):
      call(str(tmp_path / 'cat.png'))


@pytest.mark.parametrize(
  'call, message',
  [
    (lambda t: t.caption(None), 'no image yet'),
    (lambda t: t.ask(IMAGE, ' '), 'the text is empty; ask something'),
    (lambda t: t.draw(None, 0, 4, 2), 'the text is empty; describe an image'),
    (lambda t: t.draw('owl ' * 200, 0, 4, 2), 'the text has 799 characters; shorten it to 500'),
    (lambda t: t.draw('owl', -1, 4, 2), 'seed is a whole number'),
    (lambda t: t.draw('owl', None, 4, 2), 'seed is a whole number'),
    (lambda t: t.mix(None, 0, 4, 2), 'no image; add one'),
    (
      lambda t: t.mix(dict(files=[IMAGE] * 5, text=''), 0, 4, 2),
      '5 images are too many; leave at most 4',
    ),
  ],
)
def test_invalid_inputs(tasks, call, message):
  with pytest.raises(UserError, match=message):
    call(tasks)


def test_errors_are_shown_without_internals(tasks, caplog):
  with pytest.raises(gr.Error) as error:
    web.report_errors(tasks.ask)('<i>.png', 'a')
  with pytest.raises(gr.Error) as error:
    web.report_errors(tasks.draw)('owl', -1, 4, 2)
  assert (
    error.value.message == 'the seed is a whole number from 0 up to four billion; choose another.'
  )
  with pytest.raises(gr.Error) as error:
    web.report_errors(tasks.ask)(IMAGE, 'fail')
  assert 'log of the server' in error.value.message
  assert 'secret' not in error.value.message
  assert 'secret.py' in caplog.text


@pytest.fixture
def server(tasks, tmp_path, monkeypatch):
  """The address of a page with the stub model `tasks.model`."""
  monkeypatch.setenv('GRADIO_TEMP_DIR', str(tmp_path / 'uploads'))
  page = web.build(tasks)
  yield web.launch(page, '127.0.0.1', free_port())
  page.close()


def free_port():
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


def test_the_page_over_http(server, tasks, tmp_path):
  with urllib.request.urlopen(server) as response:
    text = response.read().decode()
    policy = response.headers['content-security-policy']
  assert "default-src 'self'" in policy
  assert 'http' not in policy
  assert not re.findall(r'<(?:script|link)[^>]+(?:src|href)="(?:https?:)?//', text)
  client = Client(server, verbose=False)
  # Three requests at once run one after the other.
  jobs = [client.submit(handle_file(IMAGE), api_name='/caption') for _ in range(3)]
  assert {job.result()[0] for job in jobs} == {tasks.caption(IMAGE)[0]}
  assert tasks.model.max_running == 1
  assert client.predict(handle_file(IMAGE), 'What?', api_name='/ask')[0] == 'What? <b>'
  words = upload(tmp_path, b'words')
  with pytest.raises(Exception, match='upload.png: not an image'):
    client.predict(handle_file(words), api_name='/caption')
  with pytest.raises(Exception, match='the text is empty; describe an image'):
    client.predict('', 0, 4, 5, api_name='/draw')
  with pytest.raises(Exception, match='log of the server'):
    client.predict(handle_file(IMAGE), 'fail', api_name='/ask')
  head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="big.png"\r\n\r\n'
  body = head + bytes(web.MAX_BYTES + 1) + b'\r\n--x--\r\n'
  headers = {'content-type': 'multipart/form-data; boundary=x'}
  request = urllib.request.Request(f'{server}/gradio_api/upload', body, headers)
  with pytest.raises(OSError) as error:
    urllib.request.urlopen(request)
  # Without a status, the server closed the connection before everything was sent.
  assert getattr(error.value, 'code', 413) == 413
  with pytest.raises(UserError, match='cannot listen on 127.0.0.1:.* choose another --port'):
    web.launch(web.build(tasks), '127.0.0.1', int(server.rstrip('/').split(':')[-1]))


# ------------------------------------------------------------------------------------------ browser


@pytest.fixture
def browser(tmp_path):
  """Chromium without a window."""
  webdriver = pytest.importorskip(
    'selenium.webdriver', reason="no selenium; it comes with pip install -e '.[test]'"
  )
  chromium = shutil.which('chromium') or shutil.which('google-chrome')
  driver = shutil.which('chromedriver')
  if not chromium or not driver:
    pytest.skip('no chromium or chromedriver; apt-get install chromium chromium-driver')
  options = webdriver.ChromeOptions()
  options.binary_location = chromium
  for option in (
    'headless',
    'no-sandbox',
    'disable-gpu',
    'disable-quic',
    'no-first-run',
    'disable-background-networking',
    'disable-component-update',
    'disable-sync',
    f'user-data-dir={tmp_path / "profile"}',
  ):
    options.add_argument(f'--{option}')
  options.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
  browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
  yield browser
  browser.quit()


def wait(condition, seconds=120):
  end = time.monotonic() + seconds
  while not (value := condition()):
    assert time.monotonic() < end, 'the page took too long'
    time.sleep(0.2)
  return value


@pytest.mark.slow
def test_in_a_browser(browser, tmp_path, monkeypatch):
  monkeypatch.setenv('GRADIO_TEMP_DIR', str(tmp_path / 'uploads'))
  page = web.build(web.Tasks(Lavit.from_pretrained(ASSETS / 'tiny')))
  url = web.launch(page, '127.0.0.1', free_port())

  def shown(selector):
    elements = browser.find_elements('css selector', selector)
    return [element for element in elements if element.is_displayed()]

  def press(selector, text):
    wait(lambda: [element for element in shown(selector) if element.text == text])[0].click()

  phone = dict(width=390, height=844, deviceScaleFactor=1, mobile=True)
  browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', phone)
  browser.get(url)
  wait(lambda: shown('.pixel-image'))
  assert browser.execute_script('return document.documentElement.scrollWidth') <= 390

  def caption(path):
    browser.find_elements('css selector', 'input[type=file]')[0].send_keys(path)
    wait(lambda: browser.find_elements('css selector', f'img[src*="{pathlib.Path(path).name}"]'))
    press('button.primary', 'Caption')

  caption(upload(tmp_path, b'words'))
  message = wait(lambda: shown('.toast-body'))[0].text
  assert 'upload.png: not an image that Pillow can read; convert it to PNG or JPEG.' in message
  assert 'Traceback' not in message
  press('[aria-label="Remove Image"]', '')
  caption(IMAGE)
  assert 'background' in wait(
    lambda: (
      shown('.output-text textarea') and shown('.output-text textarea')[0].get_attribute('value')
    )
  )
  wait(lambda: len(shown('.tokens li')) > 5)
  press('button[role=tab]', 'Generate')
  wait(lambda: shown('textarea'))[0].send_keys('pizza on a blue background')
  press('button.primary', 'Generate')
  wait(lambda: len(shown('.tokens i')) > 5)
  image = wait(lambda: shown('.pixel-image img'))[0]
  assert image.size['width'] > 200
  assert browser.execute_script('return arguments[0].naturalWidth', image) == 64
  fetched = []
  for entry in browser.get_log('performance'):
    event = json.loads(entry['message'])['message']
    if event['method'] == 'Network.requestWillBeSent':
      fetched.append(event['params']['request']['url'])
  own = (url, 'data:', 'blob:', 'chrome')  # chrome: is the empty tab
  assert len(fetched) > 20
  assert not [address for address in fetched if not address.startswith(own)]
  messages = [entry['message'] for entry in browser.get_log('browser')]
  assert not [message for message in messages if 'Content Security Policy' in message]
  page.close()
