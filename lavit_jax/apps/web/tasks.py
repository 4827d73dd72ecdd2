"""What the buttons of the page do: paths of uploads and texts in; texts, arrays and HTML out."""

from __future__ import annotations

import functools
import html
import io
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from lavit_jax.apps.demo import NUM_STEPS
from lavit_jax.apps.page import image_tag, show_kept_patches
from lavit_jax.data.images import read_image, resize
from lavit_jax.errors import UserError
from lavit_jax.inference import image_decoder, image_generation
from lavit_jax.inference.outputs import DecodedImages
from lavit_jax.inference.pipeline import Lavit

MAX_BYTES = 20 * 2**20  # of an upload
MAX_PIXELS = 40_000_000
MAX_IMAGES = 4  # of a prompt
MAX_CHARACTERS = 500  # of a text


class Tasks:
  """The tasks of the page. All methods raise UserError if an input is wrong."""

  def __init__(self, model: Lavit):
    self.model = model

  def caption(self, path: str | None) -> tuple[str, str]:
    """Returns the caption of an upload, and its tokens as HTML."""
    image = self._open(path)
    caption = self.model.caption([image])[0]
    return caption, self._show_tokens(image)

  def ask(self, path: str | None, question: str) -> tuple[str, str]:
    """Returns the answer to a question about an upload, and the image's tokens as HTML."""
    image = self._open(path)
    answer = self.model.answer([image], [_check_text(question, 'ask something')])[0]
    return answer, self._show_tokens(image)

  def draw(
    self,
    text: str | None,
    seed: float | None,
    guidance: float,
    steps: float,
    size: str | None = None,
  ) -> tuple[np.ndarray, str]:
    """Returns an image uint8[H, W, 3] generated from a text, and its tokens as HTML."""
    return self._generate([_check_text(text, 'describe an image')], seed, guidance, steps, size)

  def mix(
    self,
    prompt: dict | None,
    seed: float | None,
    guidance: float,
    steps: float,
    size: str | None = None,
    before: str | None = None,
  ) -> tuple[np.ndarray, str]:
    """Returns an image uint8[H, W, 3] generated from images and texts, and its tokens as HTML.

    Args:
      prompt: {'files': paths of images, 'text': a text after them}.
      seed: of the sampling.
      guidance: guidance scale of the language model.
      steps: number of denoising steps.
      size: 'HEIGHTxWIDTH'.
      before: a text before the images.
    """
    prompt = prompt or {}
    files = prompt.get('files') or []
    if not files:
      raise UserError('there is no image; add one with the paper clip')
    if len(files) > MAX_IMAGES:
      raise UserError(f'{len(files)} images are too many; leave at most {MAX_IMAGES}')
    leading = _optional_text(before)
    trailing = _optional_text(prompt.get('text'))
    parts = [*leading, *map(self._open, files), *trailing]
    return self._generate(parts, seed, guidance, steps, size)

  def rebuild(
    self,
    path: str | None,
    seed: float | None,
    guidance: float,
    steps: float,
    size: str | None = None,
  ) -> tuple[np.ndarray, str]:
    """Returns an upload reconstructed from its tokens alone, uint8[H, W, 3], and these as HTML."""
    image = self._open(path)
    checked_seed = _check_seed(seed)
    output = self.model.reconstruct_outputs(
      [image],
      guidance_scale=guidance,
      num_inference_steps=int(steps),
      size=_parse_size(size),
      seed=checked_seed,
    )
    return _single_image(output), self._show_tokens(image, checked_seed)

  def sizes(self) -> list[str]:
    """The sizes 'HEIGHTxWIDTH' of generated images; the first is the square of Stable Diffusion.

    The sizes of SDXL follow if the checkpoint has its modules.
    """
    defaults = self.model.defaults
    sizes = [(defaults.output_size, defaults.output_size)]
    if all(name in self.model.params for name in image_decoder.HIGHRES.modules):
      sizes += defaults.highres_sizes
    return [f'{height}x{width}' for height, width in sizes]

  def defaults(self, size: str) -> tuple[int, float]:
    """The number of steps and the U-Net's guidance scale for a size.

    These are the published ones, except for the tiny checkpoint, which needs fewer steps.
    """
    is_square = size == self.sizes()[0]
    decoder = image_decoder.LOWRES if is_square else image_decoder.HIGHRES
    if self.model.modules.variant == 'tiny':
      return NUM_STEPS, decoder.guidance_scale
    return decoder.num_inference_steps, decoder.guidance_scale

  def _generate(
    self,
    parts: Sequence[str | np.ndarray],
    seed: float | None,
    guidance: float,
    steps: float,
    size: str | None,
  ) -> tuple[np.ndarray, str]:
    model = self.model
    checked_seed = _check_seed(seed)
    num_steps = int(steps)
    height_width = _parse_size(size)
    image_generation.resolve_image_request(  # reports errors before the language model runs
      1,
      model.defaults,
      model.params,
      model.params.scheduler,
      num_inference_steps=num_steps,
      size=height_width,
    )
    (codes,) = model.sample_codes([parts], guidance_scale=guidance, seed=checked_seed)
    output = model.decode_image_outputs(
      [codes], num_inference_steps=num_steps, size=height_width, seed=checked_seed
    )
    swatches = [f'<i style="background:{self.code_colors[code]}"></i>' for code in codes]
    title = f'{len(codes)} tokens, as the language model wrote them'
    return _single_image(output), _token_list(title, codes, swatches, self.code_colors)

  def _open(self, path: str | None) -> np.ndarray:
    """An upload as uint8[S, S, 3]."""
    return resize(open_upload(path), self.model.modules.image_size)

  def _show_tokens(self, image: np.ndarray, seed: int = 0) -> str:
    """The image with its dropped patches bleached, and its tokens in order, as HTML."""
    ids, (keep,), (count,) = self.model.tokenize([image], seed=seed)
    side = round(len(keep) ** 0.5)
    patch_size = len(image) // side
    grid = image.reshape(side, patch_size, side, patch_size, 3).swapaxes(1, 2)
    patches = grid.reshape(-1, patch_size, patch_size, 3)[keep]
    tags = [image_tag(patch, '') for patch in patches]
    title = f'{count} of {len(keep)} patches became tokens, which also describe the bleached rest'
    tokens = _token_list(title, ids[0], tags, self.code_colors)
    kept = image_tag(show_kept_patches(image, keep), 'the patches that became tokens')
    return f'<div class="kept">{kept}{tokens}</div>'

  @functools.cached_property
  def code_colors(self) -> list[str]:
    """A CSS color of each code, from the codebook's three principal directions.

    Similar codes have similar colors.
    """
    model = self.model
    codes = np.arange(model.modules.vocabulary.codebook_size)
    codebook = {'params': model.params['codebook']}
    lookup = model.modules.tokenizer.apply(codebook, codes, method='lookup')
    vectors = np.asarray(lookup, np.float32)
    centered = vectors - vectors.mean(0)
    directions = np.linalg.svd(centered.T @ centered)[0][:, :3]
    coordinates = centered @ directions
    colors = 128 + 80 * np.tanh(coordinates / coordinates.std(0))
    return [f'rgb({red},{green},{blue})' for red, green, blue in colors.astype(int)]


def open_upload(path: str | None) -> np.ndarray:
  """Reads an upload.

  Returns:
    uint8[H, W, 3].

  Raises:
    UserError: there is no upload, it is not an image, or it is too large.
  """
  if not path:
    raise UserError('there is no image yet; choose or drop one')
  name = os.path.basename(path)
  try:
    size = os.path.getsize(path)
    if size > MAX_BYTES:
      raise UserError(
        f'{name} has {size / 2**20:.0f} MB; make it smaller than {MAX_BYTES >> 20} MB'
      )
    data = pathlib.Path(path).read_bytes()
  except FileNotFoundError:
    raise UserError(f'{name} was uploaded too long ago and is deleted; upload it again') from None
  try:
    width, height = Image.open(io.BytesIO(data)).size  # reads the header alone
  except Exception:
    width = height = 0  # read_image reports what is wrong
  if width * height > MAX_PIXELS:
    raise UserError(
      f'{name} is {width} x {height}, {width * height / 1e6:.0f} million pixels; '
      f'scale it below {MAX_PIXELS // 10**6} million'
    )
  return read_image(data, name)


def _single_image(output: DecodedImages) -> np.ndarray:
  if output.flagged[0]:
    raise UserError('the safety checker flagged this image; try another text or another seed')
  return output.images[0]


def _check_text(text: str | None, remedy: str = '') -> str:
  text = (text or '').strip()
  if not text:
    raise UserError(f'the text is empty; {remedy}')
  if len(text) > MAX_CHARACTERS:
    raise UserError(f'the text has {len(text)} characters; shorten it to {MAX_CHARACTERS}')
  return text


def _optional_text(text: str | None) -> list[str]:
  return [_check_text(text)] if text and text.strip() else []


def _check_seed(seed: float | None) -> int:
  if seed is None or not 0 <= seed < 2**32:
    raise UserError('the seed is a whole number from 0 up to four billion; choose another')
  return int(seed)


def _parse_size(text: str | None) -> tuple[int, int] | None:
  if not text:
    return None
  height, _, width = text.partition('x')
  if not (height.isdigit() and width.isdigit()):
    raise UserError(f'{text!r} is not a size, such as 1024x1024; choose one of the list')
  return int(height), int(width)


def _token_list(title: str, codes: np.ndarray, symbols: list[str], code_colors: list[str]) -> str:
  """Tokens in order, as HTML: a symbol of each, and its code, underlined in the code's color."""
  items = []
  for code, symbol in zip(codes, symbols, strict=True):
    items.append(f'<li>{symbol}<b style="border-color:{code_colors[code]}">{code}</b></li>')
  return f'<div class="tokens"><p>{html.escape(title)}</p><ol>{"".join(items)}</ol></div>'
