"""The user's API: pictures and words in, words and pictures out.

    model = Lavit.from_pretrained('lavit_jax/assets/tiny')
    model.caption(['cat.png', photo])                       # ['cat on a red background', ...]
    model.answer(['cat.png'], ['What is this?'])            # ['cat']
    model.generate(['pizza on a blue background'])          # uint8[1, 64, 64, 3]
    model.synthesize([[Path('cat.png'), 'on a red background']])
    model.reconstruct(['cat.png'])

Every arrow is one compiled program (`read`, `tokenize`, `draw` here; `generate`, `beam_search` in decode.py), batches are padded
to powers of two and prompts to multiples of N, so that few shapes are ever compiled. A part of the model is loaded when
a task first needs it. Settings are those of the published results (REFERENCE section 4).

Axes: B images, N patches, H width of the language model, S prompt slots.
"""

from __future__ import annotations

import functools
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lavit_jax.data.questions import prompt
from lavit_jax.data.text import TextTokenizer
from lavit_jax.errors import InputError, UserError
from lavit_jax.inference import decode
from lavit_jax.inference.diffusion import ddim_sample, initial_latents
from lavit_jax.data.images import read_images
from lavit_jax.models import lavit, noise, sequence, vae, vit
from lavit_jax.models.decoder import null_context
from lavit_jax.models.initial import initial_parts
from lavit_jax.models.tokenizer import gumbel_keep
from lavit_jax.porting import from_torch, layouts
from lavit_jax.porting.folder import load_parts, read_config

EOS = 2
MAX_LENGTH = 2048  # prompt and answer together: what LLaMA reads
MAX_BATCH = 16


class Settings(NamedTuple):
  """What depends on how long the texts and codes of a model are: (fewest, most) new tokens, and the side of what it draws."""

  caption_tokens: tuple[int, int] = (8, 36)
  answer_tokens: tuple[int, int] = (2, 10)
  image_tokens: tuple[int, int] = (20, 200)
  drawn_size: int = 512


class RowSeed(NamedTuple):
  """A seed for some of many rows: given in place of a seed, row i of the call gets the key that row `rows[i]` has among all of them."""

  seed: int
  rows: Sequence[int]


SETTINGS = {'tiny': Settings((4, 36), (1, 16), (16, 50), 64)}


class Tokens(NamedTuple):
  """The visual tokens of B images."""

  ids: list[np.ndarray]  # i32[n] codes of each image, in the order of its patches
  keep: np.ndarray  # bool[B, N], the patches that they stand for
  counts: np.ndarray  # i32[B]


# --------------------------------------------------------------------------------------------------- the compiled programs

@functools.partial(jax.jit, static_argnums=0)
def read(model: lavit.Lavit, parts: dict, images: Array, keys: Array | None) -> tuple[Array, Array]:
  """uint8[B, H, W, 3] -> what the language model reads: features compacted to a prefix [B, N, H], and their number i32[B]."""
  x, keep = _select(model, parts, images, keys)
  features, mask = sequence.compact(_apply(model.understanding, parts['understanding'], x, keep), keep)
  return features, mask.sum(-1)


@functools.partial(jax.jit, static_argnums=0)
def tokenize(model: lavit.Lavit, parts: dict, images: Array, keys: Array | None) -> tuple[Array, Array]:
  """uint8[B, H, W, 3] -> codes i32[B, N] in the place of their patches, and keep bool[B, N]."""
  x, keep = _select(model, parts, images, keys)
  merged = _apply(model.tokenizer, parts['tokenizer'], x, keep, method='merge')
  ids, _ = _apply(model.tokenizer, parts['tokenizer'], merged, method='quantize')
  return ids, keep > 0.5


@functools.partial(jax.jit, static_argnums=0)
def embed(model: lavit.Lavit, parts: dict, ids: Array) -> Array:
  """Words and codes, ids i32[B, S] -> embeddings [B, S, H]."""
  return _apply(model.llama, parts['llama'], ids, method='embed')


@functools.partial(jax.jit, static_argnames=('model', 'size', 'steps'))
def draw(model: lavit.Lavit, parts: dict, ids: Array, mask: Array, keys: Array, *, guidance: float, size: int, steps: int) -> Array:
  """Codes i32[B, N] in a prefix, mask bool[B, N] of it -> pictures uint8[B, size, size, 3] by DDIM under guidance."""
  codes = _apply(model.tokenizer, parts['tokenizer'], ids, method='lookup')
  features = _apply(model.decoder, parts['decoder'], codes, mask)
  context, _ = _apply(model.decoder, parts['decoder'], features, method='context')
  null = null_context(parts['uncond_embeddings'], model.num_patches)
  side = size // model.vae.factor
  latents = ddim_sample(
      functools.partial(_apply, model.unet, parts['unet']), initial_latents(keys, (side, side, model.vae.latent_channels)),
      (context, jnp.ones_like(mask)), null, steps=steps, guidance_scale=guidance, schedule=noise.scaled_linear())
  return vae.postprocess(_apply(model.vae, parts['vae'], latents / model.vae.scaling_factor, method='decode'))


def _generate(model: lavit.Lavit, parts: dict, *args, **kwargs) -> decode.GenerateOutput:
  return decode.generate(model.llama, parts['llama'], *args, **kwargs)


def _beam_search(model: lavit.Lavit, parts: dict, *args, **kwargs) -> decode.GenerateOutput:
  return decode.beam_search(model.llama, parts['llama'], *args, **kwargs)


def _select(model: lavit.Lavit, parts: dict, images: Array, keys: Array | None) -> tuple[Array, Array]:
  """uint8[B, H, W, 3] -> patch features [B, N, D] and keep f32[B, N]: sampled with keys [B], the most probable without."""
  x = _apply(model.vit, parts['vit'], vit.preprocess(images))[:, 1:]
  log_probs = _apply(model.tokenizer, parts['tokenizer'], x, method='select')
  if keys is None:
    return x, gumbel_keep(log_probs)
  return x, jax.vmap(lambda row, key: gumbel_keep(row[None], key=key)[0])(log_probs, keys)


def _apply(module, params, *args, **kwargs):
  return module.apply({'params': params}, *args, **kwargs)


# ------------------------------------------------------------------------------------------------------------ for the user

class Lavit:
  """A model with its parameters and its words.

  Pictures are whatever `images.read_image` reads: paths, bytes, PIL images, arrays. Wrong input raises UserError. Which patches of
  a picture become tokens is sampled, as it is in training and was in the published results, by a key made of `seed` and the place
  among the pictures; `tokenize`, `caption` and `answer` take seed=None to keep the most probable ones instead. Every `seed` may be a
  RowSeed, for a part of a longer run.
  """

  def __init__(self, model: lavit.Lavit, parts: Mapping[str, dict], words: TextTokenizer):
    """`parts`: part name -> parameters, at least of the parts that the tasks at hand need."""
    self.model, self.parts, self.words = model, parts, words
    self.settings = SETTINGS.get(model.variant, Settings())
    self._fitting = set()  # names of the parts that have been looked at

  @classmethod
  def from_pretrained(cls, folder, dtype: str = 'float32', variant: str | None = None) -> Lavit:
    """Opens a checkpoint: a folder of ours (porting/folder.py) or a PyTorch one (porting/layouts.py); parts are read when first needed.

    Raises:
      UserError: the folder is missing, damaged, or not of `variant`.
    """
    folder = pathlib.Path(folder)
    if layouts.kind_of(folder) == 'LaVIT':
      words, known = folder / 'language_model', layouts.read_json(folder / layouts.ABOUT).get('variant')
      known = known or variant or layouts.find_variant(layouts.recognise(folder)[1])
      read_part = functools.partial(from_torch, folder, variant=known)
    else:
      words, known = folder / 'tokenizer', read_config(folder)['variant']

      def read_part(name):
        return load_parts(folder, [name])[name]

    if variant not in (None, known):
      raise UserError(f'{folder} holds variant {known!r}, but {variant!r} was asked for')
    model = lavit.build(known, dtype)
    return cls(model, _Parts(read_part), TextTokenizer.load(words, model.vocabulary.text_size))

  # Pictures to codes and back.

  def tokenize(self, images, seed: int | None = 0) -> Tokens:
    """Pictures -> their visual tokens."""
    images = read_images(images, self.model.image_size)
    if len(images) == 0:
      raise UserError('there is no picture to tokenize; give at least one')
    ids, keep = self.in_batches(tokenize, ('vit', 'tokenizer'), images, _keys(seed, len(images)))
    return Tokens([row[kept] for row, kept in zip(ids, keep)], keep, keep.sum(-1))

  def draw(self, codes: Sequence[np.ndarray], guidance: float = 5.0, steps: int = 50, seed: int = 0) -> np.ndarray:
    """Codes of each picture, i32[n] with n <= N -> uint8[B, H, W, 3]."""
    ids, mask = self.in_slots(codes)
    return self.in_batches(draw, ('tokenizer', 'decoder', 'unet', 'vae', 'uncond_embeddings'), ids, mask, _keys(seed, len(ids)),
                           guidance=guidance, size=self.settings.drawn_size, steps=steps)

  def reconstruct(self, images, guidance: float = 5.0, steps: int = 50, seed: int = 0) -> np.ndarray:
    """Pictures -> visual tokens -> pictures, uint8[B, H, W, 3]; what is lost is what the tokens do not say."""
    return self.draw(self.tokenize(images, seed).ids, guidance, steps, seed)

  # Pictures to words.

  def caption(self, images, beams: int = 2, seed: int | None = 0) -> list[str]:
    """What is in each picture: [IMG] features [/IMG] and no further prompt; cut at the first full stop."""
    images = read_images(images, self.model.image_size)
    texts = self._tell(images, [()] * len(images), self.settings.caption_tokens, seed, num_beams=beams)
    return [text.split('.')[0].strip() for text in texts]

  def answer(self, images, questions: Sequence[str], beams: int = 5, seed: int | None = 0) -> list[str]:
    """The answer to a question about each picture, lower case, cut at the first newline, comma or full stop.

    The published evaluation lemmatises it too.
    """
    images = read_images(images, self.model.image_size)
    questions = [questions] if isinstance(questions, str) else list(questions)
    if len(images) != len(questions):
      raise UserError(f'{len(images)} pictures but {len(questions)} questions; give one question for each picture')
    asked = [self._encode(question, prompt) for question in questions]
    texts = self._tell(images, asked, self.settings.answer_tokens, seed, num_beams=beams, length_penalty=0.0, early_stopping=True)
    return [re.split(r'[\n,.]', text.strip())[0].strip().lower() for text in texts]

  # Words and pictures to pictures.

  def generate(self, prompts: Sequence[str], *, guidance: float = 4.0, decoder_guidance: float = 5.0, steps: int = 50,
               temperature: float = 1.0, top_k: int = 50, negative: str = '', seed: int = 0) -> np.ndarray:
    """A picture of each text, uint8[B, H, W, 3]. The settings are those of `sample_codes` and `draw`."""
    prompts = [[text] for text in ([prompts] if isinstance(prompts, str) else prompts)]
    codes = self.sample_codes(prompts, guidance=guidance, temperature=temperature, top_k=top_k, negative=negative, seed=seed)
    return self.draw(codes, decoder_guidance, steps, seed)

  def synthesize(self, prompts: Sequence[Sequence], *, guidance: float = 5.0, decoder_guidance: float = 5.0, steps: int = 50,
                 temperature: float = 1.0, top_k: int = 50, negative: str = '', seed: int = 0) -> np.ndarray:
    """A picture from each sequence of pictures and words, in any order, uint8[B, H, W, 3].

    A `str` is words; a picture on disk is a `pathlib.Path`.
    """
    codes = self.sample_codes(prompts, guidance=guidance, temperature=temperature, top_k=top_k, negative=negative, seed=seed)
    return self.draw(codes, decoder_guidance, steps, seed)

  def sample_codes(self, prompts: Sequence[Sequence], *, guidance: float = 4.0, temperature: float = 1.0, top_k: int = 50,
                   negative: str = '', seed: int = 0) -> list[np.ndarray]:
    """The codes that the language model continues each prompt with, i32[n].

    Pictures in a prompt are put as their discrete codes, [IMG] codes [/IMG]: this is the generating side, which knows pictures by
    the codes it writes itself. Then [IMG] asks for one more.

    Args:
      prompts: sequences of words (`str`) and pictures.
      guidance: of the language model, against the context `negative` [IMG].
      temperature, top_k: of the sampling.
    """
    words = self.model.vocabulary
    if isinstance(prompts, str) or not all(isinstance(each, Sequence) and not isinstance(each, (str, bytes)) for each in prompts):
      raise UserError('prompts are lists of parts, [[picture, words], [words], ...]; put each prompt in brackets')
    pictures = [part for prompt in prompts for part in prompt if not isinstance(part, str)]
    places = seed  # of a RowSeed, picture j of row i is put at i + j, so that it does not depend on the other rows of the call
    if isinstance(seed, RowSeed):
      counts = [sum(not isinstance(part, str) for part in prompt) for prompt in prompts]
      places = RowSeed(seed.seed, [row + j for row, count in zip(seed.rows, counts) for j in range(count)])
    codes = iter(self.tokenize(pictures, places).ids if pictures else ())
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
    keys, out = _keys(seed, len(prompts)), []
    for n, rows in _batches(len(prompts)):
      embeddings, mask = self._embed([prompts[i] for i in rows] + [against] * len(rows), most)
      b = len(rows)
      found = self._run(_generate, ('llama',), embeddings[:b], mask[:b], key=keys[rows], min_new_tokens=fewest,
                        max_new_tokens=most, eos_id=words.image_end, suppress=forbidden, temperature=temperature, top_k=top_k,
                        guidance_scale=guidance, uncond_embeddings=embeddings[b:], uncond_mask=mask[b:])
      out += [ids[:length] for ids, length in zip(np.asarray(found.ids[:n]), found.lengths)]
    return [ids[ids >= words.code_offset] - words.code_offset for ids in out]

  # What the tasks share.

  def _tell(self, images: np.ndarray, asked: Sequence[Sequence[int]], tokens: tuple[int, int], seed, **search) -> list[str]:
    """Continues [IMG] features [/IMG] asked, for each picture, in words alone."""
    words, slots = self.model.vocabulary, self.model.num_patches
    forbidden = np.arange(words.size) >= words.text_size
    keys, out = _keys(seed, len(images)), []
    for n, rows in _batches(len(images)):
      features, counts = self._run(read, ('vit', 'tokenizer', 'understanding'), images[rows], None if keys is None else keys[rows])
      prompts = [[[words.image_start], range(i * slots, i * slots + int(count)), [words.image_end], asked[row]]
                 for i, (row, count) in enumerate(zip(rows, np.asarray(counts)))]
      embeddings, mask = self._embed(prompts, tokens[1], features)
      found = self._run(_beam_search, ('llama',), embeddings, mask, min_new_tokens=tokens[0], max_new_tokens=tokens[1],
                        eos_id=EOS, suppress=forbidden, **search)
      out += [self.words.decode(ids[:length]) for ids, length in zip(np.asarray(found.ids[:n]), found.lengths)]
    return out

  def _encode(self, text: str, form: Callable[[str], str] = str) -> Sequence[int]:
    if not text.strip():
      raise InputError('the text is empty; say what to draw or what to ask')
    return self.words.encode(form(text))

  def _embed(self, prompts, new_tokens: int, features: Array | None = None) -> tuple[Array, Array]:
    """Lists of pieces -> embeddings [B, S, H] and mask bool[B, S], left-padded."""
    longest = max(sum(map(len, pieces)) for pieces in prompts)
    if longest + new_tokens > MAX_LENGTH:
      raise InputError(f'the prompt is {longest} tokens long; shorten it to {MAX_LENGTH - new_tokens}')
    embeddings, mask, _ = sequence.assemble(
        prompts, functools.partial(self._run, embed, ('llama',)), features, multiple=self.model.num_patches)
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

  def in_batches(self, program, names: tuple[str, ...], *rows, **same):
    """program(model, parts, *rows, **same) over batches of `rows`, arrays [B, ...] or None; the results as numpy arrays."""
    out = []
    for n, index in _batches(len(rows[0])):
      found = self._run(program, names, *(None if x is None else x[index] for x in rows), **same)
      out.append(jax.tree.map(lambda x: np.asarray(x)[:n], found))
    return jax.tree.map(lambda *x: np.concatenate(x), *out)

  def _run(self, program, names: tuple[str, ...], *args, **kwargs):
    """Calls a program with the parts that it needs, loading them first."""
    return program(self.model, {name: self._part(name) for name in names}, *args, **kwargs)

  def _part(self, name: str):
    """The parameters of a part; a UserError if they are another model's."""
    params = self.parts[name]
    if name not in self._fitting:
      expected = jax.eval_shape(lambda: initial_parts(self.model, jax.random.key(0), (name,)))[name]
      want, have = _shapes(expected), _shapes(params)
      wrong = [f'{key or name}: {have.get(key, "missing")} instead of {want.get(key, "nothing")}'
               for key in sorted(want.keys() | have.keys()) if want.get(key) != have.get(key)]
      if wrong:
        more = f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''
        raise UserError(f'the weights of {name} are not of variant {self.model.variant!r}, export the checkpoint again; '
                        f'{"; ".join(wrong[:3])}{more}')
      self._fitting.add(name)
    return params


def _shapes(tree) -> dict[str, tuple[int, ...]]:
  """'blocks/attn/qkv/kernel' -> its shape."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): x.shape for path, x in leaves}


class _Parts(dict):
  """The parts of a checkpoint, each read when first asked for."""

  def __init__(self, read_part):
    self.read_part = read_part

  def __missing__(self, name: str) -> dict:
    self[name] = jax.tree.map(jnp.asarray, self.read_part(name))
    return self[name]


def _batches(count: int) -> Iterator[tuple[int, np.ndarray]]:
  """Covers range(count) by (n, rows): n rows that count, filled up to a power of two by repeating the last."""
  for start in range(0, count, MAX_BATCH):
    n = min(MAX_BATCH, count - start)
    yield n, start + np.minimum(np.arange(1 << (n - 1).bit_length()), n - 1)


def _keys(seed: int | RowSeed | None, count: int) -> Array | None:
  """A key for each row, so that what a row becomes does not depend on its batch."""
  if seed is None:
    return None
  seed, rows = seed if isinstance(seed, RowSeed) else (seed, range(count))
  return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), np.asarray(rows))

