"""The page: a tab for each task, in one column."""

from __future__ import annotations

import functools
import html
import logging
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gradio as gr
from gradio.components import Component

from lavit_jax.apps.demo import read_manifest
from lavit_jax.apps.web.tasks import MAX_CHARACTERS, Tasks
from lavit_jax.errors import UserError

MAX_QUEUE = 20  # requests that wait
UPLOAD_SECONDS = 1800  # after which an upload is deleted

EXAMPLES = pathlib.Path(__file__).parents[2] / 'assets' / 'demo'
EXAMPLES_LABEL = 'Or one of these'

ABOUT = (
  'An image becomes a few dozen tokens, '
  'which one language model reads and writes in the same way as text.'
)
TINY = ' This checkpoint is tiny, and has seen nothing but emoji on plain backgrounds.'

STYLE = """
  html { scrollbar-gutter: stable }
  .gradio-container {
    --soft: var(--neutral-500); max-width: 44rem !important; margin: 0 auto !important;
    padding: 1.5rem 1rem 3rem !important
  }
  .dark .gradio-container { --soft: var(--neutral-400) }
  .app { padding: 0 !important }
  #head h1 { font-size: 1.9rem; letter-spacing: -.02em; margin: 0 0 .3rem }
  #head p { margin: 0; color: var(--soft) }
  .pixel-image img { image-rendering: pixelated; object-fit: contain }
  .html-container { padding: 0 !important }
  .label svg { display: none }
  .gallery-item img, .gallery-item .container { width: 4rem !important; height: 4rem !important }
  .gallery-item .container:has(p) {
    display: flex; align-items: center; gap: .5rem; width: auto !important; overflow: visible
  }
  .gallery-item .container p { order: 1; min-width: 0 !important }
  .gallery-item .container p:empty { display: none }
  .output-text textarea { font-size: 1.25rem; line-height: 1.4 }
  .kept { display: grid; grid-template-columns: 11rem 1fr; gap: 1.2rem; align-items: start }
  .kept > img {
    width: 100%; image-rendering: pixelated; border-radius: .5rem;
    border: 1px solid var(--border-color-primary)
  }
  .tokens p { margin: 0 0 0.6rem; color: var(--soft); font-size: .875rem }
  .tokens ol {
    list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: .4rem
  }
  .tokens li { width: 2.1rem; text-align: center; line-height: 1 }
  .tokens img, .tokens i {
    display: block; width: 100%; height: 2.1rem; border-radius: .25rem; image-rendering: pixelated
  }
  .tokens b {
    display: block; font: .625rem/1 ui-monospace, monospace; padding: .25rem 0 .15rem;
    border-bottom: 3px solid
  }
  @media (max-width: 34rem) {
    button[role=tab] { padding: 0 .6rem !important }
    .kept { grid-template-columns: 1fr }
    .kept > img { max-width: 16rem }
  }
"""


class Examples(NamedTuple):
  """The inputs of the demo, as examples to click on.

  Attributes:
    images: paths.
    questions: different questions, in order.
    texts: to generate from.
    prompts: {'text': text, 'files': paths}, to generate from.
  """

  images: list[str]
  questions: list[str]
  texts: list[str]
  prompts: list[dict[str, Any]]


def build(tasks: Tasks) -> gr.Blocks:
  """The page for a model."""
  examples = _read_examples()
  note = TINY if tasks.model.modules.variant == 'tiny' else ''
  with gr.Blocks(
    title='LaVIT', analytics_enabled=False, delete_cache=(UPLOAD_SECONDS, UPLOAD_SECONDS)
  ) as page:
    gr.HTML(f'<h1>LaVIT</h1><p>{ABOUT}{note}</p>', elem_id='head')
    with gr.Tab('Caption'):
      _caption_tab(tasks, examples)
    with gr.Tab('Ask'):
      _ask_tab(tasks, examples)
    with gr.Tab('Generate'):
      _generate_tab(tasks, examples)
    with gr.Tab('Mix'):
      _mix_tab(tasks, examples)
    with gr.Tab('Reconstruct'):
      _reconstruct_tab(tasks, examples)
  return page.queue(max_size=MAX_QUEUE)


def report_errors(function: Callable[..., Any]) -> Callable[..., Any]:
  """Turns the errors of a function into messages on the page.

  A UserError is shown as it is. Any other error is logged, and the page only says that there was
  one, since its message may hold what visitors must not see.
  """

  @functools.wraps(function)
  def call(*args):
    try:
      return function(*args)
    except UserError as error:
      raise gr.Error(html.escape(f'{error}.'), print_exception=False) from None
    except Exception:
      logging.getLogger(__name__).exception('%s failed', function.__name__)
      raise gr.Error(
        'This failed, and not by your doing. The log of the server says why.',
        print_exception=False,
      ) from None

  return call


def _read_examples() -> Examples:
  manifest = read_manifest(EXAMPLES)
  prompts = []
  for parts in manifest['mixed']:
    files = [str(EXAMPLES / part) for part in parts if (EXAMPLES / part).is_file()]
    texts = [part for part in parts if not (EXAMPLES / part).is_file()]
    prompts.append({'text': ' '.join(texts), 'files': files})
  entries = manifest['pictures']
  return Examples(
    images=[os.fspath(EXAMPLES / entry['file']) for entry in entries],
    questions=list(dict.fromkeys(entry['question'] for entry in entries)),
    texts=[entry['text'] for entry in manifest['texts']],
    prompts=prompts,
  )


def _caption_tab(tasks: Tasks, examples: Examples) -> None:
  image = _upload()
  _add_examples(examples.images, image)
  button = gr.Button('Caption', variant='primary')
  _run_on([button.click], tasks.caption, [image], [_output_text('Caption'), gr.HTML()])


def _ask_tab(tasks: Tasks, examples: Examples) -> None:
  image = _upload()
  _add_examples(examples.images, image)
  question = gr.Textbox(label='Question', placeholder='What is this?', max_length=MAX_CHARACTERS)
  _add_examples(examples.questions, question)
  button = gr.Button('Answer', variant='primary')
  _run_on(
    [button.click, question.submit],
    tasks.ask,
    [image, question],
    [_output_text('Answer'), gr.HTML()],
  )


def _generate_tab(tasks: Tasks, examples: Examples) -> None:
  text = gr.Textbox(
    label='Prompt', placeholder='pizza on a blue background', max_length=MAX_CHARACTERS
  )
  _add_examples(examples.texts, text)
  options = _image_options(tasks, guidance=4.0)
  button = gr.Button('Generate', variant='primary')
  _run_on(
    [button.click, text.submit],
    tasks.draw,
    [text, *options],
    [_output_image('Generated image'), gr.HTML()],
  )


def _mix_tab(tasks: Tasks, examples: Examples) -> None:
  prompt = gr.MultimodalTextbox(
    label='Images, then text',
    placeholder='on a blue background',
    file_types=['image'],
    file_count='multiple',
    sources=['upload'],
    submit_btn=False,
    max_plain_text_length=MAX_CHARACTERS,
  )
  _add_examples(examples.prompts, prompt)
  before = gr.Textbox(label='Text before the images (optional)', max_length=MAX_CHARACTERS)
  options = _image_options(tasks, guidance=5.0)
  button = gr.Button('Generate', variant='primary')
  _run_on(
    [button.click, prompt.submit, before.submit],
    tasks.mix,
    [prompt, *options, before],
    [_output_image('Generated image'), gr.HTML()],
  )


def _reconstruct_tab(tasks: Tasks, examples: Examples) -> None:
  image = _upload()
  _add_examples(examples.images, image)
  options = _image_options(tasks)
  button = gr.Button('Reconstruct from its tokens', variant='primary')
  _run_on(
    [button.click],
    tasks.rebuild,
    [image, *options],
    [_output_image('Reconstruction'), gr.HTML()],
  )


def _upload() -> gr.Image:
  image = gr.Image(
    label='Image',
    sources=['upload'],
    type='filepath',
    height='13rem',
    elem_classes='pixel-image',
    buttons=[],
  )
  # Gradio would decode the image before its size could be checked.
  image.preprocess = lambda payload: payload.path if payload else None
  return image


def _output_text(label: str) -> gr.Textbox:
  return gr.Textbox(label=label, elem_classes='output-text', interactive=False)


def _output_image(label: str) -> gr.Image:
  return gr.Image(
    label=label,
    format='png',
    interactive=False,
    height='20rem',
    elem_classes='pixel-image',
    buttons=['download'],
  )


def _add_examples(values: Sequence[Any], component: Component) -> None:
  gr.Examples([[value] for value in values], component, label=EXAMPLES_LABEL)


def _image_options(tasks: Tasks, guidance: float | None = None) -> list[Component]:
  """Seed, guidance, steps and size.

  Args:
    tasks: for the sizes and their defaults.
    guidance: the default guidance scale of the language model. None shows the guidance scale of the
      U-Net, which, like the number of steps, follows the size.
  """
  sizes = tasks.sizes()
  default_steps, decoder_guidance = tasks.defaults(sizes[0])
  with gr.Accordion('Options', open=False):
    seed = gr.Number(
      0,
      label='Seed',
      info='Another seed gives another image.',
      precision=0,
      minimum=0,
      maximum=2**32 - 1,
    )
    guidance_slider = gr.Slider(
      1,
      10,
      guidance or decoder_guidance,
      step=0.5,
      label='Guidance',
      info='How strictly the input is followed.',
    )
    steps = gr.Slider(
      5,
      100,
      default_steps,
      step=5,
      label='Steps',
      info='More take longer and look smoother.',
    )
    size = gr.Dropdown(
      sizes, value=sizes[0], label='Size', info='Height x width.', visible=len(sizes) > 1
    )
  followers = [steps] if guidance else [steps, guidance_slider]

  def update(selected: str) -> dict[gr.Slider, float]:
    return dict(zip(followers, tasks.defaults(selected), strict=False))

  size.input(update, size, followers, api_visibility='private', queue=False)
  return [seed, guidance_slider, steps, size]


def _run_on(
  triggers: Sequence[Any],
  function: Callable[..., Any],
  inputs: Sequence[Component],
  outputs: Sequence[Component],
) -> None:
  """Runs a task on events; all tasks share one queue."""
  gr.on(
    list(triggers),
    report_errors(function),
    list(inputs),
    list(outputs),
    api_name=function.__name__,
    show_progress_on=outputs[0],
    concurrency_id='model',
    concurrency_limit=1,
  )
