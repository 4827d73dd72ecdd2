"""The user's API: pictures and words in, words and pictures out.

    model = Lavit.from_pretrained('lavit_jax/assets/tiny')
    model.caption(['cat.png', photo])                       # ['cat on a red background', ...]
    model.answer(['cat.png'], ['What is this?'])            # ['cat']
    model.generate(['pizza on a blue background'])          # uint8[1, 64, 64, 3]
    model.synthesize([[Path('cat.png'), 'on a red background']])
    model.reconstruct(['cat.png'])

Every arrow is one compiled program (programs.py, drawing.py), batches are padded to powers of two and prompts to multiples of N, so that
few shapes are ever compiled. A part of the model is loaded when a task first needs it (parts.py). Settings are those of the published results (REFERENCE section 4).

Axes: B images, N patches, H width of the language model, S prompt slots.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import Progress

from lavit_jax import sharding
from lavit_jax.data.images import read_images
from lavit_jax.data.questions import prompt
from lavit_jax.data.text import TextTokenizer
from lavit_jax.errors import InputError, UserError
from lavit_jax.inference import decode, drawing, programs
from lavit_jax.inference.parts import Checkpoint, Parts, open_checkpoint
from lavit_jax.models import lavit, sequence

EOS = 2
MAX_BATCH = 16


class Settings(NamedTuple):
  """What depends on how long the texts and codes of a model are: (fewest, most) new tokens, and the sizes of what it draws."""

  caption_tokens: tuple[int, int] = (8, 36)
  answer_tokens: tuple[int, int] = (2, 10)
  image_tokens: tuple[int, int] = (20, 200)
  drawn_size: int = 512  # side of the square
  highres_sizes: tuple[tuple[int, int], ...] = drawing.HIGHRES_SIZES  # (height, width)


class RowSeed(NamedTuple):
  """A seed for some of many rows: given in place of a seed, row i of the call gets the key that row `rows[i]` has among all of them."""

  seed: int
  rows: Sequence[int]


SETTINGS = {'tiny': Settings((4, 36), (1, 16), (16, 50), 64)}


class Told(NamedTuple):
  """What `caption` or `answer` found, in detail."""

  text: str  # as they return it
  ids: np.ndarray  # i32[n], the new tokens, the end of the sequence included where it was reached
  score: float  # by which the beam was ranked: summed log-probability / n ** length_penalty


class Sampled(NamedTuple):
  """What `sample_codes` found, in detail."""

  codes: np.ndarray  # i32[n], as it returns them
  ids: np.ndarray  # i32[m], the new tokens of the language model, the end of the picture included where it was reached
  score: float  # their summed log-probability under guidance, before any id was forbidden


class Tokens(NamedTuple):
  """The visual tokens of B images."""

  ids: list[np.ndarray]  # i32[n] codes of each image, in the order of its patches
  keep: np.ndarray  # bool[B, N], the patches that they stand for
  counts: np.ndarray  # i32[B]


class Lavit:
  """A model with its parameters and its words.

  Pictures are whatever `images.read_image` reads: paths, bytes, PIL images, arrays. Wrong input raises UserError. Which patches of
  a picture become tokens is sampled, as it is in training and was in the published results, by a key made of `seed` and the place
  among the pictures; `tokenize`, `caption` and `answer` take seed=None to keep the most probable ones instead. Every `seed` may be a
  RowSeed, for a part of a longer run.
  """

  def __init__(self, model: lavit.Lavit, parts: Mapping[str, dict] | Parts | Checkpoint, words: TextTokenizer | str | os.PathLike,
               weights: str | None = None, cache: str | None = None, safety_checker: bool = True, mesh: Mesh | Mapping[str, int] | None = None):
    """`parts`: part name -> parameters, at least of the parts that the tasks at hand need, or another model's `parts`, on its mesh and with its
    weights. `words`: also the folder of them, which is read when a task first needs it. The other arguments: see `from_pretrained`."""
    for name, value, known in (('weights', weights, (None, 'int8')), ('cache', cache, (None, 'bfloat16', 'int8'))):
      if value not in known:
        raise UserError(f'{name}={value!r} is not known; choose one of {", ".join(map(repr, known))}')
    if mesh is not None and not isinstance(mesh, Mesh):
      mesh = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1) | dict(mesh))
    self.model, self._words, self.cache, self.safety_checker, self.mesh = model, words, cache, safety_checker, mesh
    if isinstance(parts, Parts):  # another model's, shared
      if weights is not None or mesh is not None:
        raise UserError('the parts of another model have their weights and mesh; leave `weights` and `mesh` out, or open the checkpoint again')
      self.parts, self.mesh = parts, parts.mesh
    else:
      self.parts = Parts(model, parts, weights, mesh)
    self.settings = SETTINGS.get(model.variant, Settings())

  @classmethod
  def from_pretrained(cls, folder, mesh: Mesh | Mapping[str, int] | None = None, dtype: str | None = None, variant: str | None = None,
                      weights: str | None = None, cache: str | None = None, safety_checker: bool = True) -> Lavit:
    """Opens a checkpoint: a folder of ours (porting/folder.py) or a PyTorch one (porting/layouts.py); parts are read when first needed.

    Args:
      mesh: the devices to spread the model over: a mesh with the axes of sharding.py, or the sizes of some of them, {'tensor': 8};
        None uses one device.
      dtype: the compute dtype, in which parameters are held too, but for the tokenizer and the VAEs; None is bfloat16 on accelerators
        and float32 on CPUs, where that is faster.
      weights: of the language model: as they are stored (None), or 'int8': a byte a weight (models/int8.py).
      cache: keys and values of the language model: in the compute dtype (None), 'bfloat16' or 'int8'.
      safety_checker: pictures that the safety checker of the folder finds fault with are returned black, and a log line says which;
        False leaves it out. A warning says so where the variant has one and the folder does not.

    Raises:
      UserError: the folder is missing, damaged, or not of `variant`; an option is not known; the mesh does not fit the devices.
    """
    found = open_checkpoint(folder, variant)
    model = lavit.build(found.variant, dtype or ('float32' if jax.default_backend() == 'cpu' else 'bfloat16'))
    return cls(model, found, found.words, weights, cache, safety_checker, mesh)

  @functools.cached_property
  def words(self) -> TextTokenizer:
    """Raises UserError if they are missing, damaged, or another model's."""
    return self._words if isinstance(self._words, TextTokenizer) else TextTokenizer.load(self._words, self.model.vocabulary.text_size)

  # Pictures to codes and back.

  def tokenize(self, images, seed: int | None = 0) -> Tokens:
    """Pictures -> their visual tokens."""
    images = read_images(images, self.model.image_size)
    if len(images) == 0:
      raise UserError('there is no picture to tokenize; give at least one')
    return self._tokens(images, _keys(seed, len(images)))

  def _tokens(self, images: np.ndarray, keys: Array | None) -> Tokens:
    ids, keep = self.in_batches(programs.tokenize, ('vit', 'tokenizer'), images, keys)
    return Tokens([row[kept] for row, kept in zip(ids, keep)], keep, keep.sum(-1))

  def draw(self, codes: Sequence[np.ndarray], *, seed: int | Sequence[int] = 0, **options) -> np.ndarray | drawing.Drawn:
    """Codes of each picture, i32[n] with n <= N -> uint8[B, H, W, 3].

    Args:
      seed: of all pictures, each of which then depends on its place too; or one for each, and a picture is the same wherever it stands.
      size: (height, width): the square of `settings.drawn_size` by Stable Diffusion 1.5 (default), or one of
        `settings.highres_sizes` by SDXL.
      guidance, steps: of the U-Net; by default as published, 5 and 50, or 7 and 25 by SDXL.
      sampler: 'ddim' (default, as published), 'euler' or 'dpm++2m'.
      rescale: the share of rescaled guidance, against pictures too bright or dark (Lin et al. 2023, who take 0.7); by default 0.
      start: pictures to begin from in place of noise, one for each or one for all; they are scaled to `size`.
      strength: of the change to `start`, the share of the steps that is made; by default 0.8, and 1 keeps nothing of it.
      tile: side of the tiles that the VAE decodes one at a time, in pixels, for less memory and faint differences; by default pictures
        are decoded whole up to a megapixel (all published sizes) and in tiles of 1024 beyond.
      details: return `drawing.Drawn`, which also has the flags of the safety checker; these are then not in the log.
    """
    request = self._settle(len(codes), options)
    ids, mask = self.in_slots(codes)
    way, checker = request.options['way'], drawing.checker(self.model, self.parts) if self.safety_checker else ()
    drawn = self.in_batches(drawing.draw, way.parts + checker, ids, mask, _keys(seed, len(ids)), request.start, most=way.batch,
                            **request.options)
    if request.details:
      return drawn
    drawing.report_flagged(f'picture {i + 1} of {len(ids)}' for i in drawn.flagged.nonzero()[0])
    return drawn.pictures

  def reconstruct(self, images, *, seed: int | Sequence[int] = 0, **options) -> np.ndarray:
    """Pictures -> visual tokens -> pictures, uint8[B, H, W, 3]; what is lost is what the tokens do not say. `options`: of `draw`."""
    return self.draw(self.tokenize(images, seed).ids, seed=seed, **options)

  # Pictures to words.

  def caption(self, images, beams: int = 2, seed: int | None = 0, details: bool = False) -> list[str] | list[Told]:
    """What is in each picture: [IMG] features [/IMG] and no further prompt; cut at the first full stop. `details` asks for `Told`."""
    images = read_images(images, self.model.image_size)
    told = self._tell(images, [()] * len(images), self.settings.caption_tokens, seed, num_beams=beams)
    return _as_asked([each._replace(text=each.text.split('.')[0].strip()) for each in told], details)

  def answer(self, images, questions: Sequence[str], beams: int = 5, seed: int | None = 0, details: bool = False) -> list[str] | list[Told]:
    """The answer to a question about each picture, lower case, cut at the first newline, comma or full stop.

    The published evaluation lemmatises it too. `details` asks for `Told`.
    """
    images = read_images(images, self.model.image_size)
    questions = [questions] if isinstance(questions, str) else list(questions)
    if len(images) != len(questions):
      raise UserError(f'{len(images)} pictures but {len(questions)} questions; give one question for each picture')
    asked = [self._encode(question, prompt) for question in questions]
    told = self._tell(images, asked, self.settings.answer_tokens, seed, num_beams=beams, length_penalty=0.0, early_stopping=True)
    return _as_asked([each._replace(text=re.split(r'[\n,.]', each.text.strip())[0].strip().lower()) for each in told], details)

  # Words and pictures to pictures.

  def generate(self, prompts: Sequence[str], *, guidance: float = 4.0, decoder_guidance: float | None = None,
               temperature: float = 1.0, top_k: int = 50, negative: str = '', seed: int | Sequence[int] = 0, **options) -> np.ndarray:
    """A picture of each text, uint8[B, H, W, 3].

    The settings are those of `sample_codes` and `draw`, whose guidance is called `decoder_guidance` here.
    """
    options['guidance'] = decoder_guidance
    prompts = [[text] for text in ([prompts] if isinstance(prompts, str) else prompts)]
    options['start'] = self._settle(len(prompts), options).start  # what is wrong is told before anything runs
    codes = self.sample_codes(prompts, guidance=guidance, temperature=temperature, top_k=top_k, negative=negative, seed=seed)
    return self.draw(codes, seed=seed, **options)

  def synthesize(self, prompts: Sequence[Sequence], *, guidance: float = 5.0, decoder_guidance: float | None = None,
                 temperature: float = 1.0, top_k: int = 50, negative: str = '', seed: int = 0, **options) -> np.ndarray:
    """A picture from each sequence of pictures and words, in any order, uint8[B, H, W, 3].

    A `str` is words; a picture on disk is a `pathlib.Path`. The settings are those of `generate`.
    """
    options['guidance'] = decoder_guidance
    options['start'] = self._settle(len(prompts), options).start
    codes = self.sample_codes(prompts, guidance=guidance, temperature=temperature, top_k=top_k, negative=negative, seed=seed)
    return self.draw(codes, seed=seed, **options)

  def sample_codes(self, prompts: Sequence[Sequence], *, guidance: float = 4.0, temperature: float = 1.0, top_k: int = 50,
                   top_p: float | None = None, repetition_penalty: float | None = None, negative: str = '', num_samples: int = 1,
                   seed: int = 0, details: bool = False) -> list[np.ndarray] | list[Sampled]:
    """The codes that the language model continues each prompt with, i32[n].

    Pictures in a prompt are put as their discrete codes, [IMG] codes [/IMG]: this is the generating side, which knows pictures by
    the codes it writes itself. Then [IMG] asks for one more.

    Args:
      prompts: sequences of words (`str`) and pictures.
      guidance: of the language model, against the context `negative` [IMG].
      temperature, top_k, top_p, repetition_penalty: of the sampling (`decode.generate`).
      num_samples: pictures of each prompt, all of the first one's before the second's; the first of each is what one alone would be.
      details: return `Sampled`.
    """
    words = self.model.vocabulary
    if isinstance(prompts, str) or not all(isinstance(each, Sequence) and not isinstance(each, (str, bytes)) for each in prompts):
      raise UserError('prompts are lists of parts, [[picture, words], [words], ...]; put each prompt in brackets')
    if num_samples < 1:
      raise UserError(f'num_samples is {num_samples}; ask for at least one')
    keys, places = _keys(seed, len(prompts)), [(i, part) for i, prompt in enumerate(prompts) for part in prompt if not isinstance(part, str)]
    codes = iter(())
    if places:  # the j-th picture of a prompt has the j-th key of its row's, whatever the other rows are
      rows = np.array([i for i, _ in places])
      images = read_images([part for _, part in places], self.model.image_size)
      codes = iter(self._tokens(images, jax.vmap(jax.random.fold_in)(keys[rows], np.arange(len(rows)) - np.searchsorted(rows, rows))).ids)
    start, end = [words.image_start], [words.image_end]

    def pieces(prompt):
      if not prompt:
        raise UserError('the prompt is empty; give it words or pictures')
      for part in prompt:
        yield from [self._encode(part)] if isinstance(part, str) else [start, next(codes) + words.code_offset, end]
      yield start

    prompts = [list(pieces(prompt)) for prompt in prompts]
    against = [self._encode(negative), start] if negative else [start]
    fewest, most = self.settings.image_tokens
    forbidden = (np.arange(words.size) >= 3) & (np.arange(words.size) < words.text_size)
    keys, out = _sample_keys(keys, num_samples), []
    for n, rows in _batches(len(prompts), max(1, MAX_BATCH // num_samples), 'codes'):
      embeddings, mask = self._embed([prompts[i] for i in rows] + [against] * len(rows), most)
      b = len(rows)
      found = self._run(programs.generate, ('llama',), embeddings[:b], mask[:b], key=keys[rows].reshape(-1), min_new_tokens=fewest,
                        max_new_tokens=most, eos_id=words.image_end, suppress=forbidden, temperature=temperature, top_k=top_k,
                        top_p=top_p, repetition_penalty=repetition_penalty, num_samples=num_samples, cache_dtype=self.cache,
                        guidance_scale=guidance, uncond_embeddings=embeddings[b:], uncond_mask=mask[b:])
      out += _rows_of(found, n * num_samples)
    sampled = [Sampled(ids[ids >= words.code_offset] - words.code_offset, ids, score) for ids, score in out]
    return sampled if details else [each.codes for each in sampled]

  # What the tasks share.

  def _tell(self, images: np.ndarray, asked: Sequence[Sequence[int]], tokens: tuple[int, int], seed, **search) -> list[Told]:
    """Continues [IMG] features [/IMG] asked, for each picture, in words alone."""
    write, words, slots = self.words.decode, self.model.vocabulary, self.model.num_patches  # what is wrong with the words is told first
    forbidden = np.arange(words.size) >= words.text_size
    keys, out = _keys(seed, len(images)), []
    for n, rows in _batches(len(images), what='words'):
      features, counts = self._run(programs.read, ('vit', 'tokenizer', 'understanding'), images[rows], None if keys is None else keys[rows])
      prompts = [[[words.image_start], range(i * slots, i * slots + int(count)), [words.image_end], asked[row]]
                 for i, (row, count) in enumerate(zip(rows, np.asarray(counts)))]
      embeddings, mask = self._embed(prompts, tokens[1], features)
      found = self._run(programs.beam_search, ('llama',), embeddings, mask, min_new_tokens=tokens[0], max_new_tokens=tokens[1],
                        eos_id=EOS, suppress=forbidden, cache_dtype=self.cache, **search)
      out += [Told(write(ids), ids, score) for ids, score in _rows_of(found, n)]
    return out

  def _encode(self, text: str, form: Callable[[str], str] = str) -> Sequence[int]:
    if not text.strip():
      raise InputError('the text is empty; say what to draw or what to ask')
    return self.words.encode(form(text))

  def _embed(self, prompts, new_tokens: int, features: Array | None = None) -> tuple[Array, Array]:
    """Lists of pieces -> embeddings [B, S, H] and mask bool[B, S], left-padded."""
    longest, room = max(sum(map(len, pieces)) for pieces in prompts), self.parts.max_length - new_tokens
    if longest > room:
      raise InputError(f'the prompt is {longest} tokens long; shorten it to {room}')
    embeddings, mask, _ = sequence.assemble(
        prompts, functools.partial(self._run, programs.embed, ('llama',)), features, multiple=self.model.num_patches)
    return embeddings, mask

  def in_slots(self, codes: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Codes of each picture, i32[n] with n <= N -> ids i32[B, N] in a prefix, and the mask bool[B, N] of it."""
    slots, size = np.arange(self.model.num_patches), self.model.vocabulary.codebook_size
    if len(codes) == 0:
      raise UserError('there is nothing to draw; give at least one prompt or picture')
    for row in map(np.asarray, codes):
      if len(row) > len(slots) or ((row < 0) | (row >= size)).any():
        raise UserError(f'the codes of a picture are at most {len(slots)} numbers in 0..{size - 1}; got {len(row)}: {row[:4].tolist()} ...')
    ids = [np.resize(np.append(row, 0), slots.shape) for row in codes]
    mask = slots < np.array([max(1, len(row)) for row in codes])[:, None]  # no code at all would leave nothing to attend to
    return np.stack(ids).astype(np.int32), mask

  def in_batches(self, program, names: tuple[str, ...], *rows, most: int = MAX_BATCH, **same):
    """program(model, parts, *rows, **same) over batches of `rows`, arrays [B, ...] or None; numpy arrays, in one transfer."""
    out, counts = [], []
    for n, index in _batches(len(rows[0]), most):
      out.append(self._run(program, names, *(None if x is None else x[index] for x in rows), **same))
      counts.append(n)
    return jax.tree.map(lambda *x: np.concatenate([piece[:n] for piece, n in zip(x, counts)]), *jax.device_get(out))

  def _settle(self, count: int, options: Mapping) -> drawing.Request:
    return drawing.settle(count, self.settings.drawn_size, self.settings.highres_sizes, self.parts, schedulers=self.parts.scheduler, **options)

  def _run(self, program, names: tuple[str, ...], *args, **kwargs):
    """Calls a program with the parts that it needs, loading them first."""
    parts = {name: self.parts[name] for name in names}
    with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
      return program(self.model, parts, *args, **kwargs)


def _batches(count: int, size: int = MAX_BATCH, what: str = 'pictures') -> Iterator[tuple[int, np.ndarray]]:
  """Covers range(count) by (n, rows): n rows that count, at most `size`, filled up to a power of two by repeating the last.

  On a terminal a bar shows how many are done, unless one batch is all.
  """
  with Progress(console=Console(stderr=True), transient=True, disable=count <= size or not sys.stderr.isatty()) as bar:
    task = bar.add_task(what, total=count)
    for start in range(0, count, size):
      n = min(size, count - start)
      yield n, start + np.minimum(np.arange(1 << (n - 1).bit_length()), n - 1)
      bar.advance(task, n)


def _rows_of(found: decode.GenerateOutput, n: int) -> list[tuple[np.ndarray, float]]:
  """The new tokens i32[length] and the score of each of the first n rows."""
  ids, lengths, scores = jax.device_get(found)
  return [(row[:length], float(score)) for row, length, score in zip(ids[:n], lengths, scores)]


def _as_asked(told: list[Told], details: bool) -> list[Told] | list[str]:
  return told if details else [each.text for each in told]


def _sample_keys(keys: Array, count: int) -> Array:
  """keys [B] -> [B, count]: the first of each is its own, so that more samples change no earlier one."""
  more = jax.vmap(lambda key: jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(1, count)))(keys)
  return jnp.concatenate([keys[:, None], more], axis=1)


def _keys(seed: int | Sequence[int] | RowSeed | None, count: int) -> Array | None:
  """A key for each row, so that what a row becomes does not depend on its batch; of its own seed, or of one seed and its place."""
  if seed is None:
    return None
  if isinstance(seed, RowSeed):
    seed, rows = seed
  elif np.ndim(seed) == 0:
    rows = range(count)
  elif len(seed) == count:
    return jnp.stack([jax.random.key(int(each)) for each in seed])
  else:
    raise UserError(f'{len(seed)} seeds for {count}; give one for each, or one for all')
  return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), np.asarray(rows))

