"""The page of `lavit app`: what its buttons do, what it says to bad uploads, that it fetches nothing; `slow` looks at it in Chromium."""

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
PICTURE = str(ASSETS / 'demo' / '01.png')
KEEP = np.arange(64) % 3 == 0
IDS = np.arange(KEEP.sum()) * 7 % 50


class Held(dict):
  """Parts by name."""

  scheduler = staticmethod(lambda prefix: Scheduler())


class Stub:
  """Answers with what it was asked, and counts how many ask at once."""

  modules = types.SimpleNamespace(
    image_size=64,
    variant='stub',
    vocabulary=types.SimpleNamespace(codebook_size=50),
    tokenizer=types.SimpleNamespace(
      apply=lambda variables, codes, method: np.random.default_rng(0).normal(size=(50, 8))
    ),
  )
  params, defaults = Held(codebook={}), VariantDefaults()

  def __init__(self):
    self.now, self.most, self.seen = 0, 0, []

  def tokenize(self, images, seed):
    return VisualTokens(
      [IDS] * len(images), np.tile(KEEP, (len(images), 1)), np.full(len(images), KEEP.sum())
    )

  def caption(self, images):
    self.now += 1
    self.most = max(self.most, self.now)
    time.sleep(0.3)
    self.now -= 1
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


def pictures_in(text):
  return [
    np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    for data in re.findall('base64,([^"]+)', text)
  ]


def test_tokens_are_shown_in_order(tasks):
  said, shown = tasks.caption(PICTURE)
  picture = Image.open(PICTURE).convert('RGB')
  assert said == f'red {picture.getpixel((0, 0))[0]}'
  overlay, *patches = pictures_in(shown)
  corners = [(8 * (i % 8), 8 * (i // 8)) for i in range(64)]
  crops = [np.asarray(picture.crop((x, y, x + 8, y + 8))) for x, y in corners]
  for patch, i in zip(patches, np.flatnonzero(KEEP), strict=True):
    np.testing.assert_array_equal(patch, crops[i])
  for i, (x, y) in enumerate(corners):
    assert np.array_equal(overlay[y : y + 8, x : x + 8], crops[i]) == KEEP[i]
  assert [int(code) for code in re.findall(r'>(\d+)</b>', shown)] == IDS.tolist()
  assert f'{KEEP.sum()} of 64 patches' in shown


def test_near_codes_have_near_colours(tasks):
  rows = np.random.default_rng(1).normal(size=(50, 8))
  rows[7] = rows[3] + 1e-4
  tasks.model.modules = types.SimpleNamespace(
    **vars(Stub.modules) | dict(tokenizer=types.SimpleNamespace(apply=lambda *_, **__: rows))
  )
  colours = np.array(
    [[int(part) for part in re.findall(r'\d+', colour)] for colour in tasks.code_colors]
  )
  assert (
    colours.shape == (50, 3)
    and colours.min() >= 0
    and colours.max() < 256
    and colours.std(0).min() > 10
  )
  assert (
    abs(colours[7] - colours[3]).max() <= 1
    and abs(colours[7] - np.delete(colours, [3, 7], 0)).sum(-1).min() > 1
  )


def test_drawing(tasks):
  picture, shown = tasks.draw(' an owl ', 3, 4.5, 7)
  assert picture.shape == (64, 64, 3) and picture[0, 0, 0] == 7 and shown.count('<li>') == 5
  tasks.mix(dict(files=[PICTURE, PICTURE], text=' '), 0, 5, 7)
  tasks.mix(dict(files=[PICTURE], text='on red'), 0, 5, 7)
  (text, guidance, seed), (two, *_), (mixed, *_) = tasks.model.seen
  assert (text, guidance, seed) == ([['an owl']], 4.5, 3)
  assert [part.shape for part in two[0]] == [(64, 64, 3)] * 2 and mixed[0][1:] == ['on red']
  picture, shown = tasks.rebuild(PICTURE, 0, 5, 7)
  np.testing.assert_array_equal(picture, np.asarray(Image.open(PICTURE).convert('RGB')))


def test_words_stand_where_they_were_written(tasks):
  tasks.mix(dict(files=[PICTURE, PICTURE], text='on red'), 0, 5, 7, None, ' an owl and ')
  (prompt,), *_ = tasks.model.seen[0]
  assert [part if isinstance(part, str) else part.shape for part in prompt] == [
    'an owl and',
    (64, 64, 3),
    (64, 64, 3),
    'on red',
  ]


def test_sizes_are_those_of_the_checkpoint(tasks, monkeypatch):
  assert tasks.sizes() == ['512x512'] and tasks.defaults('512x512') == (50, 5.0)
  with pytest.raises(UserError, match='1024x1024 needs highres_decoder'):
    tasks.draw('owl', 0, 4, 7, '1024x1024')
  assert not tasks.model.seen
  monkeypatch.setattr(Stub, 'params', Held(dict.fromkeys(image_decoder.HIGHRES.modules)))
  assert tasks.sizes()[:3] == ['512x512', '1024x1024', '896x1152'] and len(tasks.sizes()) == 7
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
    given = [
      each['props']
      for each in page.get_config_file()['components']
      if each['type'] in ('slider', 'dropdown')
    ]
    return [(each['label'], each['value'], each['visible']) for each in given][:3]

  assert sliders(web.build(tasks)) == [
    ('Guidance', 4.0, True),
    ('Steps', 25, True),
    ('Size', '512x512', True),
  ]
  monkeypatch.setattr(
    Stub, 'modules', types.SimpleNamespace(**vars(Stub.modules) | dict(variant='stub'))
  )
  page = web.build(tasks)
  chosen = [
    each
    for each in page.fns.values()
    if each.api_visibility == 'private' and len(each.inputs) == 1 and each.inputs[0].label == 'Size'
  ]
  moved = [
    asyncio.run(page.process_api(each, ['896x1152']))['data'] for each in chosen
  ]  # of Draw, Mix, Rebuild
  assert moved == [[25], [25], [25, 7.0]]
  monkeypatch.setattr(Stub, 'params', {})
  assert sliders(web.build(tasks))[2] == ('Size', '512x512', False)


def test_wrong_steps_are_told_before_anything_runs(tasks):
  for call in (
    lambda: tasks.draw('owl', 0, 4, 0),
    lambda: tasks.mix(dict(files=[PICTURE], text='owl'), 0, 4, 2000),
  ):
    with pytest.raises(UserError, match='steps=0 is not allowed|steps=2000 must be in'):
      call()
  assert not tasks.model.seen


def test_a_flagged_picture_is_told_not_shown(tasks):
  for call in (lambda: tasks.draw('owl', 0, 4, 66), lambda: tasks.rebuild(PICTURE, 0, 5, 66)):
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
    (pathlib.Path(PICTURE).read_bytes()[:300], '^upload.png: .*truncated'),
  ],
)
def test_uploads_that_are_no_pictures(tasks, tmp_path, data, message):
  for call in (
    tasks.caption,
    lambda path: tasks.mix(dict(files=[PICTURE, path]), 0, 5, 2),
    lambda path: tasks.rebuild(path, 0, 5, 2),
  ):
    with pytest.raises(UserError, match=message):
      call(upload(tmp_path, data))


def test_uploads_are_measured_before_they_are_read(tasks, tmp_path, monkeypatch):
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


def test_an_upload_that_is_no_more_there(tasks, tmp_path):
  for call in (tasks.caption, lambda path: tasks.mix(dict(files=[path]), 0, 5, 2)):
    with pytest.raises(
      UserError, match='^cat.png was uploaded too long ago and is deleted; upload it again'
    ):
      call(str(tmp_path / 'cat.png'))


@pytest.mark.parametrize(
  'call, message',
  [
    (lambda t: t.caption(None), 'no image yet'),
    (lambda t: t.ask(PICTURE, ' '), 'the text is empty; ask something'),
    (lambda t: t.draw(None, 0, 4, 2), 'the text is empty; describe an image'),
    (lambda t: t.draw('owl ' * 200, 0, 4, 2), 'the text has 799 characters; shorten it to 500'),
    (lambda t: t.draw('owl', -1, 4, 2), 'seed is a whole number'),
    (lambda t: t.draw('owl', None, 4, 2), 'seed is a whole number'),
    (lambda t: t.mix(None, 0, 4, 2), 'no image; add one'),
    (
      lambda t: t.mix(dict(files=[PICTURE] * 5, text=''), 0, 4, 2),
      '5 images are too many; leave at most 4',
    ),
  ],
)
def test_inputs_that_are_none(tasks, call, message):
  with pytest.raises(UserError, match=message):
    call(tasks)


def test_errors_are_told_without_their_insides(tasks, caplog):
  with pytest.raises(gr.Error) as error:
    web.report_errors(tasks.ask)('<i>.png', 'a')
  with pytest.raises(gr.Error) as error:
    web.report_errors(tasks.draw)('owl', -1, 4, 2)
  assert (
    error.value.message == 'the seed is a whole number from 0 up to four billion; choose another.'
  )
  with pytest.raises(gr.Error) as error:
    web.report_errors(tasks.ask)(PICTURE, 'fail')
  assert (
    'log of the server' in error.value.message
    and 'secret' not in error.value.message
    and 'secret.py' in caplog.text
  )


@pytest.fixture
def server(tasks, tmp_path, monkeypatch):
  """The address of a page on a stand-in for the model, `tasks.model`."""
  monkeypatch.setenv('GRADIO_TEMP_DIR', str(tmp_path / 'uploads'))
  page = web.build(tasks)
  yield web.launch(page, '127.0.0.1', free_port())
  page.close()


def free_port():
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


def test_the_page_over_http(server, tasks, tmp_path):
  with urllib.request.urlopen(server) as answer:
    text, policy = answer.read().decode(), answer.headers['content-security-policy']
  assert "default-src 'self'" in policy and 'http' not in policy
  assert not re.findall(r'<(?:script|link)[^>]+(?:src|href)="(?:https?:)?//', text)
  client = Client(server, verbose=False)
  jobs = [
    client.submit(handle_file(PICTURE), api_name='/caption') for _ in range(3)
  ]  # three people at once: one after the other
  assert {job.result()[0] for job in jobs} == {tasks.caption(PICTURE)[0]} and tasks.model.most == 1
  assert client.predict(handle_file(PICTURE), 'What?', api_name='/ask')[0] == 'What? <b>'
  words = upload(tmp_path, b'words')
  with pytest.raises(Exception, match='upload.png: not an image'):
    client.predict(handle_file(words), api_name='/caption')
  with pytest.raises(Exception, match='the text is empty; describe an image'):
    client.predict('', 0, 4, 5, api_name='/draw')
  with pytest.raises(Exception, match='log of the server'):
    client.predict(handle_file(PICTURE), 'fail', api_name='/ask')
  body = (
    b'--x\r\nContent-Disposition: form-data; name="files"; filename="big.png"\r\n\r\n'
    + bytes(web.MAX_BYTES + 1)
    + b'\r\n--x--\r\n'
  )
  with pytest.raises(OSError) as error:
    urllib.request.urlopen(
      urllib.request.Request(
        f'{server}/gradio_api/upload', body, {'content-type': 'multipart/form-data; boundary=x'}
      )
    )
  assert (
    getattr(error.value, 'code', 413) == 413
  )  # or, the server hanging up before all is sent, no answer at all
  with pytest.raises(UserError, match='cannot listen on 127.0.0.1:.* choose another --port'):
    web.launch(web.build(tasks), '127.0.0.1', int(server.rstrip('/').split(':')[-1]))


# ----------------------------------------------------------------------------------------------------------------- browser


@pytest.fixture
def browser(tmp_path):
  """Chromium without a window, which may talk to this machine alone."""
  webdriver = pytest.importorskip(
    'selenium.webdriver', reason="no selenium; it comes with pip install -e '.[test]'"
  )
  chromium, driver = (
    shutil.which('chromium') or shutil.which('google-chrome'),
    shutil.which('chromedriver'),
  )
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
  while not (found := condition()):
    assert time.monotonic() < end, 'the page did not do it in time'
    time.sleep(0.2)
  return found


@pytest.mark.slow
def test_in_a_browser(browser, tmp_path, monkeypatch):
  monkeypatch.setenv('GRADIO_TEMP_DIR', str(tmp_path / 'uploads'))
  page = web.build(web.Tasks(Lavit.from_pretrained(ASSETS / 'tiny')))
  url = web.launch(page, '127.0.0.1', free_port())

  def shown(selector):
    return [each for each in browser.find_elements('css selector', selector) if each.is_displayed()]

  def press(selector, text):
    wait(lambda: [each for each in shown(selector) if each.text == text])[0].click()

  browser.execute_cdp_cmd(
    'Emulation.setDeviceMetricsOverride',
    dict(width=390, height=844, deviceScaleFactor=1, mobile=True),
  )  # a phone
  browser.get(url)
  wait(lambda: shown('.picture'))
  assert browser.execute_script('return document.documentElement.scrollWidth') <= 390

  def give(path):
    browser.find_elements('css selector', 'input[type=file]')[0].send_keys(path)
    wait(lambda: browser.find_elements('css selector', f'img[src*="{pathlib.Path(path).name}"]'))
    press('button.primary', 'Say what it is')

  give(upload(tmp_path, b'words'))
  message = wait(lambda: shown('.toast-body'))[0].text
  assert (
    'upload.png: not an image that Pillow can read; convert it to PNG or JPEG.' in message
    and 'Traceback' not in message
  )
  press('[aria-label="Remove Image"]', '')
  give(PICTURE)
  assert 'background' in wait(
    lambda: shown('.said textarea') and shown('.said textarea')[0].get_attribute('value')
  )
  wait(lambda: len(shown('.tokens li')) > 5)
  press('button[role=tab]', 'Draw')
  wait(lambda: shown('textarea'))[0].send_keys('pizza on a blue background')
  press('button.primary', 'Draw')
  wait(lambda: len(shown('.tokens i')) > 5)
  picture = wait(lambda: shown('.picture img'))[0]
  assert (
    picture.size['width'] > 200
    and browser.execute_script('return arguments[0].naturalWidth', picture) == 64
  )
  events = [json.loads(entry['message'])['message'] for entry in browser.get_log('performance')]
  fetched = [
    event['params']['request']['url']
    for event in events
    if event['method'] == 'Network.requestWillBeSent'
  ]
  elsewhere = [
    each for each in fetched if not each.startswith((url, 'data:', 'blob:', 'chrome'))
  ]  # chrome: is its empty tab
  assert len(fetched) > 20 and not elsewhere, elsewhere
  assert not [
    entry for entry in browser.get_log('browser') if 'Content Security Policy' in entry['message']
  ]
  page.close()
