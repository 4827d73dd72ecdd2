"""The page of `lavit app` as a server: requests, limits, and that it fetches nothing elsewhere.

A slow test opens it in Chromium.
"""

import json
import pathlib
import re
import shutil
import socket
import time
import urllib.request

import pytest
from web_stub import ASSETS, IMAGE, upload

pytest.importorskip(
  'gradio', reason="the page needs Gradio; pip install -e '.[app]' -c launch/constraints.txt"
)

from gradio_client import Client, handle_file

from lavit_jax.apps import web
from lavit_jax.errors import UserError
from lavit_jax.inference.pipeline import Lavit


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
