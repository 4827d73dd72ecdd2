"""Serving the page."""

from __future__ import annotations

import os
import signal
import sys
import tempfile

import gradio as gr
from gradio.themes import Base

from lavit_jax.apps.listening import cannot_listen
from lavit_jax.apps.web import page
from lavit_jax.apps.web.tasks import MAX_BYTES, Tasks
from lavit_jax.inference.pipeline import Lavit

# The browser may fetch from the page's own server alone.
POLICY = '; '.join(
  (
    "default-src 'self'",
    "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
    "style-src 'self' 'unsafe-inline'",
    "img-src 'self' data: blob:",
    "font-src 'self' data:",
    "connect-src 'self' data: blob:",
    "worker-src 'self' blob:",
  )
)


class PolicyMiddleware:
  """ASGI middleware that adds POLICY to every response."""

  def __init__(self, app):
    self.app = app

  async def __call__(self, scope, receive, send):
    """Handles a request."""
    if scope['type'] != 'http':
      await self.app(scope, receive, send)
      return

    async def send_with_policy(message):
      if message['type'] == 'http.response.start':
        header = (b'content-security-policy', POLICY.encode())
        message['headers'] = [*message.get('headers', ()), header]
      await send(message)

    await self.app(scope, receive, send_with_policy)


def launch(blocks: gr.Blocks, host: str, port: int) -> str:
  """Starts to serve a page, in threads of its own.

  Returns:
    The address of the page.

  Raises:
    UserError: the port is taken, or the host is not an address of this machine.
  """
  theme = Base(
    primary_hue='indigo',
    neutral_hue='slate',
    radius_size='lg',
    font=['system-ui', 'sans-serif'],
    font_mono=['ui-monospace', 'monospace'],
  )
  try:
    _, url, _ = blocks.launch(
      server_name=host,
      server_port=port,
      share=False,
      inbrowser=False,
      prevent_thread_lock=True,
      quiet=True,
      ssr_mode=False,
      footer_links=[],
      max_file_size=MAX_BYTES,
      enable_monitoring=False,
      mcp_server=False,
      theme=theme,
      css=page.STYLE,
      app_kwargs={'middleware': [(PolicyMiddleware, (), {})]},
    )
  except OSError:
    raise cannot_listen(host, port) from None
  return url


def serve(model: Lavit, host: str, port: int) -> None:
  """Serves the page until interrupted or terminated; raises as `launch`.

  Uploads are in a temporary folder, which is deleted at the end.
  """
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  with tempfile.TemporaryDirectory(prefix='lavit-app-') as uploads:
    os.environ['GRADIO_TEMP_DIR'] = uploads
    blocks = page.build(Tasks(model))
    print(f'{launch(blocks, host, port)} has the page; end it with Ctrl-C', flush=True)
    blocks.block_thread()
