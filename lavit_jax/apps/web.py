"""`lavit app`: a web page on which a person tries the model: caption, ask, draw, mix, rebuild; each with the tokens that it went through.

One computation runs at a time and the others queue. An upload is weighed and measured by its header before anything is decoded. Whatever is
wrong with the input is told on the page in a sentence; whatever else fails is in the log of the server, and the page goes on. Nothing is
fetched from elsewhere, which the browser is made to see to by a Content-Security-Policy.
"""

from __future__ import annotations

import base64
import functools
import html
import io
import logging
import os
import pathlib
import signal
import sys
import tempfile

import numpy as np
from PIL import Image

os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'  # read at import
import gradio as gr  # noqa: E402

from lavit_jax.apps.demo import STEPS, read_manifest, show_kept
from lavit_jax.data.images import read_image, resize
from lavit_jax.errors import UserError
from lavit_jax.inference import image_generation
from lavit_jax.inference.pipeline import Lavit
from lavit_jax.output import encode_png

MAX_BYTES = 20 * 2**20
MAX_PIXELS = 40_000_000
MAX_PICTURES = 4  # of a prompt
MAX_LETTERS = 500  # of a text
MAX_WAITING = 20  # people in the queue
KEPT_SECONDS = 1800  # for which an upload stays on disk

EXAMPLES = pathlib.Path(__file__).parents[1] / 'assets' / 'demo'

# The page's own server is the only one that it may talk to.
POLICY = (
  "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
  "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:"
)


class Tasks:
  """What the page's buttons do, on plain values: paths of uploads and texts in; texts, arrays and HTML out. Raises UserError."""

  def __init__(self, model: Lavit):
    self.model = model

  def caption(self, path: str | None) -> tuple[str, str]:
    """A picture -> what it shows, and its tokens."""
    picture = self._open(path)
    return self.model.caption([picture])[0], self._kept(picture)

  def ask(self, path: str | None, question: str) -> tuple[str, str]:
    """A picture and a question -> the answer, and the picture's tokens."""
    picture = self._open(path)
    return self.model.answer([picture], [_text(question, 'ask something')])[0], self._kept(picture)

  def draw(
    self, text: str, seed: float, guidance: float, steps: float, size: str | None = None
  ) -> tuple[np.ndarray, str]:
    """Words -> a picture uint8[H, W, 3], and the tokens it was drawn from."""
    return self._draw([_text(text, 'say what to draw')], seed, guidance, steps, size)

  def mix(
    self,
    prompt: dict | None,
    seed: float,
    guidance: float,
    steps: float,
    size: str | None = None,
    before: str | None = None,
  ) -> tuple[np.ndarray, str]:
    """Words, pictures, words: `before`, then {'files': paths, 'text': str} -> a picture, and its tokens."""
    prompt = prompt or {}
    files, text = prompt.get('files') or [], prompt.get('text') or ''
    if not files:
      raise UserError('there is no picture; add one with the paper clip')
    if len(files) > MAX_PICTURES:
      raise UserError(f'{len(files)} pictures are too many; leave at most {MAX_PICTURES}')
    first, last = ([_text(words)] if words and words.strip() else [] for words in (before, text))
    return self._draw([*first, *map(self._open, files), *last], seed, guidance, steps, size)

  def rebuild(
    self, path: str | None, seed: float, guidance: float, steps: float, size: str | None = None
  ) -> tuple[np.ndarray, str]:
    """A picture -> itself, drawn again from its tokens alone; and these."""
    picture = self._open(path)
    drawn = self.model.reconstruct(
      [picture],
      guidance=guidance,
      steps=int(steps),
      size=_size(size),
      seed=_seed(seed),
      details=True,
    )
    return _shown(drawn), self._kept(picture, _seed(seed))

  def sizes(self) -> list[str]:
    """What can be drawn, height x width: the square, and where the checkpoint has the parts for them, those of SDXL."""
    settings = self.model.settings
    more = (
      settings.highres_sizes
      if all(name in self.model.parts for name in image_generation.HIGHRES.parts)
      else ()
    )
    return [f'{height}x{width}' for height, width in ((settings.drawn_size,) * 2, *more)]

  def defaults(self, size: str) -> tuple[int, float]:
    """The steps and the guidance of the U-Net for a size: the published ones, but for the tiny checkpoint, which needs fewer steps."""
    way = image_generation.LOWRES if size == self.sizes()[0] else image_generation.HIGHRES
    return STEPS if self.model.model.variant == 'tiny' else way.steps, way.guidance

  def _draw(self, parts, seed, guidance, steps, size):
    model, seed, options = self.model, _seed(seed), dict(steps=int(steps), size=_size(size))
    image_generation.resolve_image_request(
      1,
      model.settings.drawn_size,
      model.settings.highres_sizes,
      model.parts,
      model.parts.scheduler,
      **options,
    )  # before anything runs
    codes = model.sample_codes([parts], guidance=guidance, seed=seed)
    picture = _shown(model.draw(codes, seed=seed, details=True, **options))
    shown = [f'<i style="background:{self.colours[code]}"></i>' for code in codes[0]]
    return picture, _strip(
      f'{len(codes[0])} tokens, as the language model wrote them', codes[0], shown, self.colours
    )

  def _open(self, path: str | None) -> np.ndarray:
    """An upload -> uint8[size, size, 3]."""
    return resize(open_upload(path), self.model.model.image_size)

  def _kept(self, picture: np.ndarray, seed: int = 0) -> str:
    """The picture with its dropped patches bleached, and the others in order with their codes, as HTML."""
    ids, (keep,), (count,) = self.model.tokenize([picture], seed=seed)
    side = round(len(keep) ** 0.5)
    patch = len(picture) // side
    patches = (
      picture.reshape(side, patch, side, patch, 3).swapaxes(1, 2).reshape(-1, patch, patch, 3)[keep]
    )
    strip = _strip(
      f'{count} of {len(keep)} patches became tokens; the rest, bleached, is told by these',
      ids[0],
      [_img(patch, '') for patch in patches],
      self.colours,
    )
    return f'<div class="kept">{_img(show_kept(picture, keep), "the patches that became tokens")}{strip}</div>'

  @functools.cached_property
  def colours(self) -> list[str]:
    """A colour of each code, from the three directions in which the codebook spreads most: near codes look alike."""
    model = self.model
    codes = np.arange(model.model.vocabulary.codebook_size)
    rows = model.model.tokenizer.apply({'params': model.parts['codebook']}, codes, method='lookup')
    rows = np.asarray(rows, np.float32) - np.mean(rows, 0)
    near = rows @ np.linalg.svd(rows.T @ rows)[0][:, :3]
    near = 128 + 80 * np.tanh(near / near.std(0))
    return ['rgb({},{},{})'.format(*row) for row in near.astype(int)]


def open_upload(path: str | None) -> np.ndarray:
  """The path of an upload -> uint8[H, W, 3]. Raises UserError: none, or none that is a picture of a reasonable size."""
  if not path:
    raise UserError('there is no picture yet; choose or drop one')
  name = os.path.basename(path)
  try:
    size = os.path.getsize(path)
    if size > MAX_BYTES:
      raise UserError(
        f'{name} has {size / 2**20:.0f} MB; make it smaller than {MAX_BYTES >> 20} MB'
      )
    data = pathlib.Path(path).read_bytes()
  except FileNotFoundError:
    raise UserError(f'{name} was here too long and is gone; upload it again') from None
  try:
    width, height = Image.open(io.BytesIO(data)).size  # the header alone
  except Exception:
    width = height = 0  # read_image tells what is wrong with it
  if width * height > MAX_PIXELS:
    raise UserError(
      f'{name} is {width} x {height}, {width * height / 1e6:.0f} million pixels; scale it below {MAX_PIXELS // 10**6} million'
    )
  return read_image(data, name)


def _shown(drawn: image_generation.DecodedImages) -> np.ndarray:
  if drawn.flagged[0]:
    raise UserError(
      'the safety checker found fault with this picture; try other words or another seed'
    )
  return drawn.pictures[0]


def _text(text: str | None, remedy: str = '') -> str:
  text = (text or '').strip()
  if not text:
    raise UserError(f'there are no words; {remedy}')
  if len(text) > MAX_LETTERS:
    raise UserError(f'the text has {len(text)} letters; shorten it to {MAX_LETTERS}')
  return text


def _seed(seed: float | None) -> int:
  if seed is None or not 0 <= seed < 2**32:
    raise UserError('the seed is a whole number from 0 up to four billion; choose another')
  return int(seed)


def _size(text: str | None) -> tuple[int, int] | None:
  if not text:
    return None
  height, _, width = text.partition('x')
  if not (height.isdigit() and width.isdigit()):
    raise UserError(f'{text!r} is no size, such as 1024x1024; choose one of the list')
  return int(height), int(width)


def _img(picture: np.ndarray, text: str) -> str:
  return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{base64.b64encode(encode_png(picture)).decode()}">'


def _strip(title: str, codes, shown: list[str], colours: list[str]) -> str:
  """Tokens in a row: what stands for each, and the number of its code, underlined in the code's colour."""
  cells = ''.join(
    f'<li>{each}<b style="border-color:{colours[code]}">{code}</b></li>'
    for code, each in zip(codes, shown)
  )
  return f'<div class="tokens"><p>{html.escape(title)}</p><ol>{cells}</ol></div>'


def report_errors(function):
  """`function`, whose errors become a message on the page: the user's own as they are, any other in the log alone."""

  @functools.wraps(function)
  def call(*args):
    try:
      return function(*args)
    except UserError as error:
      raise gr.Error(html.escape(f'{error}.'), print_exception=False) from None
    except Exception:
      logging.getLogger(__name__).exception('%s failed', function.__name__)
      raise gr.Error(
        'This failed, and not by your doing. The log of the server says why.', print_exception=False
      ) from None

  return call


# -------------------------------------------------------------------------------------------------------------------- page

ABOUT = 'A picture becomes a few dozen tokens, which one language model reads and writes as it does words.'
TINY = ' This checkpoint is tiny, and has seen nothing but emoji on plain backgrounds.'

STYLE = """
  html { scrollbar-gutter: stable } .gradio-container { --soft: var(--neutral-500) } .dark .gradio-container { --soft: var(--neutral-400) }
  .gradio-container { max-width: 44rem !important; margin: 0 auto !important; padding: 1.5rem 1rem 3rem !important } .app { padding: 0 !important }
  #head h1 { font-size: 1.9rem; letter-spacing: -.02em; margin: 0 0 .3rem } #head p { margin: 0; color: var(--soft) }
  .picture img { image-rendering: pixelated; object-fit: contain }
  .html-container { padding: 0 !important } .label svg { display: none }
  .gallery-item img, .gallery-item .container { width: 4rem !important; height: 4rem !important }
  .gallery-item .container:has(p) { display: flex; align-items: center; gap: .5rem; width: auto !important; overflow: visible }
  .gallery-item .container p { order: 1; min-width: 0 !important } .gallery-item .container p:empty { display: none }
  .said textarea { font-size: 1.25rem; line-height: 1.4 }
  .kept { display: grid; grid-template-columns: 11rem 1fr; gap: 1.2rem; align-items: start }
  .kept > img { width: 100%; image-rendering: pixelated; border-radius: .5rem; border: 1px solid var(--border-color-primary) }
  .tokens p { margin: 0 0 0.6rem; color: var(--soft); font-size: .875rem }
  .tokens ol { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: .4rem }
  .tokens li { width: 2.1rem; text-align: center; line-height: 1 }
  .tokens img, .tokens i { display: block; width: 100%; height: 2.1rem; border-radius: .25rem; image-rendering: pixelated }
  .tokens b { display: block; font: .625rem/1 ui-monospace, monospace; padding: .25rem 0 .15rem; border-bottom: 3px solid }
  @media (max-width: 34rem) { button[role=tab] { padding: 0 .6rem !important } .kept { grid-template-columns: 1fr } .kept > img { max-width: 16rem } }
"""


def build(tasks: Tasks) -> gr.Blocks:
  """The page: a tab for each task, in one column."""
  inputs, sizes = read_manifest(EXAMPLES), tasks.sizes()
  pictures = [str(EXAMPLES / row['file']) for row in inputs['pictures']]
  questions = dict.fromkeys(row['question'] for row in inputs['pictures'])
  mixed = [[part for part in parts if not (EXAMPLES / part).is_file()] for parts in inputs['mixed']]
  mixed = [
    {
      'text': ' '.join(words),
      'files': [str(EXAMPLES / part) for part in parts if part not in words],
    }
    for parts, words in zip(inputs['mixed'], mixed)
  ]

  def upload():
    picture = gr.Image(
      label='Picture',
      sources=['upload'],
      type='filepath',
      height='13rem',
      elem_classes='picture',
      buttons=[],
    )
    picture.preprocess = lambda payload: (
      payload and payload.path
    )  # Gradio's own would decode it before it could be measured
    return picture

  def drawn(label='Drawn'):
    return gr.Image(
      label=label,
      format='png',
      interactive=False,
      height='20rem',
      elem_classes='picture',
      buttons=['download'],
    )

  def options(guidance=None):
    """Of drawing; `guidance` of the language model, or, where none is given, of the U-Net, which like the steps goes by the size."""
    steps, usual = tasks.defaults(sizes[0])
    with gr.Accordion('Options', open=False):
      seed = gr.Number(
        0,
        label='Seed',
        info='Another seed, another picture.',
        precision=0,
        minimum=0,
        maximum=2**32 - 1,
      )
      strict = gr.Slider(
        1,
        10,
        guidance or usual,
        step=0.5,
        label='Guidance',
        info='How strictly the input is followed.',
      )
      steps = gr.Slider(
        5, 100, steps, step=5, label='Steps', info='More take longer and look smoother.'
      )
      size = gr.Dropdown(
        sizes, value=sizes[0], label='Size', info='Height x width.', visible=len(sizes) > 1
      )
    changed = [steps] if guidance else [steps, strict]
    size.input(
      lambda chosen: dict(zip(changed, tasks.defaults(chosen))),
      size,
      changed,
      api_visibility='private',
      queue=False,
    )
    return [seed, strict, steps, size]

  def on(function, triggers, given, found):
    gr.on(
      triggers,
      report_errors(function),
      given,
      found,
      api_name=function.__name__,
      show_progress_on=found[0],
      concurrency_id='model',
      concurrency_limit=1,
    )

  with gr.Blocks(
    title='LaVIT', analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)
  ) as page:
    gr.HTML(
      f'<h1>LaVIT</h1><p>{ABOUT}{TINY if tasks.model.model.variant == "tiny" else ""}</p>',
      elem_id='head',
    )
    with gr.Tab('Caption'):
      picture = upload()
      gr.Examples([[path] for path in pictures], picture, label='Or one of these')
      button = gr.Button('Say what it is', variant='primary')
      found = [gr.Textbox(label='Caption', elem_classes='said', interactive=False), gr.HTML()]
      on(tasks.caption, [button.click], [picture], found)
    with gr.Tab('Ask'):
      picture = upload()
      gr.Examples([[path] for path in pictures], picture, label='Or one of these')
      question = gr.Textbox(label='Question', placeholder='What is this?', max_length=MAX_LETTERS)
      gr.Examples([[text] for text in questions], question, label='Or one of these')
      button = gr.Button('Answer', variant='primary')
      found = [gr.Textbox(label='Answer', elem_classes='said', interactive=False), gr.HTML()]
      on(tasks.ask, [button.click, question.submit], [picture, question], found)
    with gr.Tab('Draw'):
      text = gr.Textbox(
        label='Words', placeholder='pizza on a blue background', max_length=MAX_LETTERS
      )
      gr.Examples([[row['text']] for row in inputs['texts']], text, label='Or one of these')
      settings = options(4.0)
      button = gr.Button('Draw', variant='primary')
      on(tasks.draw, [button.click, text.submit], [text, *settings], [drawn(), gr.HTML()])
    with gr.Tab('Mix'):
      prompt = gr.MultimodalTextbox(
        label='Pictures, then words',
        placeholder='on a blue background',
        file_types=['image'],
        file_count='multiple',
        sources=['upload'],
        submit_btn=False,
        max_plain_text_length=MAX_LETTERS,
      )
      gr.Examples([[each] for each in mixed], prompt, label='Or one of these')
      before = gr.Textbox(label='Words before the pictures, if any', max_length=MAX_LETTERS)
      settings = options(5.0)
      button = gr.Button('Draw', variant='primary')
      on(
        tasks.mix,
        [button.click, prompt.submit, before.submit],
        [prompt, *settings, before],
        [drawn(), gr.HTML()],
      )
    with gr.Tab('Rebuild'):
      picture = upload()
      gr.Examples([[path] for path in pictures], picture, label='Or one of these')
      settings = options()
      button = gr.Button('Draw it again from its tokens', variant='primary')
      on(tasks.rebuild, [button.click], [picture, *settings], [drawn('Drawn again'), gr.HTML()])
  return page.queue(max_size=MAX_WAITING)


class Policy:
  """ASGI middleware: adds POLICY to every response."""

  def __init__(self, app):
    self.app = app

  async def __call__(self, scope, receive, send):
    async def sending(message):
      if message['type'] == 'http.response.start':
        message['headers'] = [
          *message.get('headers', ()),
          (b'content-security-policy', POLICY.encode()),
        ]
      await send(message)

    await self.app(scope, receive, sending if scope['type'] == 'http' else send)


def launch(page: gr.Blocks, host: str, port: int) -> str:
  """Begins to serve the page in threads of its own; returns its address. Raises UserError if the port is taken."""
  theme = gr.themes.Base(
    primary_hue='indigo',
    neutral_hue='slate',
    radius_size='lg',
    font=['system-ui', 'sans-serif'],
    font_mono=['ui-monospace', 'monospace'],
  )
  try:
    _, url, _ = page.launch(
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
      css=STYLE,
      app_kwargs=dict(middleware=[(Policy, (), {})]),
    )
  except OSError:
    raise UserError(
      f'cannot listen on {host}:{port}, which is taken or not of this machine; choose another --port or --host'
    ) from None
  return url


def serve(model: Lavit, host: str, port: int):
  """Serves the page until interrupted or terminated; uploads lie in a folder that goes with it. Raises as `launch`."""
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  with tempfile.TemporaryDirectory(prefix='lavit-app-') as uploads:
    os.environ['GRADIO_TEMP_DIR'] = uploads
    page = build(Tasks(model))
    print(f'{launch(page, host, port)} has the page; end it with Ctrl-C', flush=True)
    page.block_thread()
