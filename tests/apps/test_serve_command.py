"""`lavit serve` as users start and end it."""

import concurrent.futures
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest

from lavit_jax.cli import main

ROOT = pathlib.Path(__file__).parents[2]


def start(*options):
  """A server with the tiny checkpoint on a free port, and its address."""
  command = [sys.executable, '-m', 'lavit_jax', 'serve', '--port', '0', *options]
  server = subprocess.Popen(
    command,
    cwd=ROOT,
    env=dict(os.environ, JAX_PLATFORMS='cpu'),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  line = server.stdout.readline()
  assert 'answers; end it with Ctrl-C' in line, server.communicate()[1]
  return server, line.split('/v1')[0]


@pytest.mark.slow
def test_the_guide_and_a_signal_that_drains():
  guide = (ROOT / 'docs/guides/serve.md').read_text()
  block = re.search(r'^    from base64.*?(?=^\S)', guide, re.M | re.S)[0]
  code = re.sub(r'^    ', '', block, flags=re.M)
  server, url = start()
  try:
    code = code.replace('http://127.0.0.1:8000', url)
    result = subprocess.run(
      [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0 and result.stdout.strip(), result.stderr

    body = dict(messages=[{'role': 'user', 'content': 'What is this?'}], temperature=1, seed=1)

    def ask(_):
      return httpx.post(f'{url}/v1/chat/completions', json=body, timeout=120).status_code

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
      futures = [pool.submit(ask, number) for number in range(8)]
      while 'lavit_active_texts 0.0' in httpx.get(f'{url}/metrics').text:
        time.sleep(0.01)
        assert not all(future.done() for future in futures), 'none was seen at work'
      server.send_signal(signal.SIGTERM)
      assert {future.result() for future in futures} == {200}
    assert server.wait(60) in (0, 143, -signal.SIGTERM)
  finally:
    server.kill()
    server.communicate()


def test_a_port_that_is_taken(capsys):
  with socket.create_server(('127.0.0.1', 0)) as taken:
    port = taken.getsockname()[1]
    assert (
      main(['serve', '--port', str(port), '--folder', str(ROOT / 'lavit_jax/assets/tiny')]) == 2
    )
  assert f'cannot listen on 127.0.0.1:{port}; the port is taken' in capsys.readouterr().err
