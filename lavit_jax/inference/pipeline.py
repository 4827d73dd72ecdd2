"""The user's API: pictures and words in, words and pictures out.

    model = Lavit.from_pretrained('lavit_jax/assets/tiny')
    model.caption(['cat.png', photo])                       # ['cat on a red background', ...]
    model.answer(['cat.png'], ['What is this?'])            # ['cat']
    model.generate(['pizza on a blue background'])          # uint8[1, 64, 64, 3]
    model.synthesize([[Path('cat.png'), 'on a red background']])
    model.reconstruct(['cat.png'])

Every arrow is one compiled program (compiled.py, image_generation.py), batches are padded to powers of two and prompts to multiples of N, so that
few shapes are ever compiled. A part of the model is loaded when a task first needs it (parameters.py). Settings are those of the published results
(specification, Inference) unless they are asked for (generation_config.py).

What a batch becomes is fetched in one transfer, while the device is busy with the next. There are two more where the host must know how much there
is: of the number of tokens of each picture, before a caption's or an answer's prompt gets its shape; and of codes, before they are drawn or prompt.

Axes: B images, N patches, H width of the language model, S prompt slots.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from lavit_jax import sharding
from lavit_jax.data import prompts
from lavit_jax.data.images import read_images
from lavit_jax.data.text import TextTokenizer
from lavit_jax.errors import InputError, UserError
from lavit_jax.inference import compiled, decode, faults, image_generation
from lavit_jax.inference.batching import batch_ranges, double_buffer, fetch_batches
from lavit_jax.inference.generation_config import (
  VARIANT_DEFAULTS,
  GenerationConfig,
  Purpose,
  VariantDefaults,
  as_prompts,
  as_texts,
  check_prompt_lengths,
  check_value,
  example_keys,
  purpose_keys,
  resolve_generation_config,
  sample_keys,
  shared_argument,
)
from lavit_jax.local_paths import expand_home
from lavit_jax.models import lavit, sequence
from lavit_jax.models.vocabulary import EOS_ID
from lavit_jax.weights.loader import CheckpointInfo, LazyParams, open_checkpoint

MAX_BATCH = 16
DTYPES = ('float32', 'bfloat16', 'float16')
BARE = 3  # tokens of a picture, at least: [IMG], one of its own, [/IMG]


class TextOutput(NamedTuple):
  """What `caption` or `answer` found, in detail."""

  text: str  # as they return it
  ids: np.ndarray  # i32[n], the new tokens, the end of the sequence included where it was reached
  score: float  # by which the beam was ranked: summed log-probability / n ** length_penalty; of a sample, the sum


class CodesOutput(NamedTuple):
  """What `sample_codes` found, in detail."""

  codes: np.ndarray  # i32[n], as it returns them
  ids: np.ndarray  # i32[m], the new tokens of the language model, the end of the picture included where it was reached
  score: float  # their summed log-probability under guidance, before any id was forbidden


class ImageOutput(NamedTuple):
  """What `generate` or `synthesize` made, in detail: B pictures."""

  pictures: np.ndarray  # uint8[B, H, W, 3]
  flagged: np.ndarray  # bool[B], by the safety checker: these are black
  sampled: list[CodesOutput]  # what each was drawn from


class VisualTokens(NamedTuple):
  """The visual tokens of B images."""

  ids: list[np.ndarray]  # i32[n] codes of each image, in the order of its patches
  keep: np.ndarray  # bool[B, N], the patches that they stand for
  counts: np.ndarray  # i32[B]


class Lavit:
  """A model with its parameters and its words.

  Pictures are whatever `images.read_image` reads: paths, bytes, PIL images, arrays. Wrong input raises UserError. Which patches of
  a picture become tokens is sampled, as it is in training and was in the published results, by a key made of `seed` and the place
  among the pictures; `tokenize`, `caption` and `answer` take seed=None to keep the most probable ones instead. Every `seed` may be a
  IndexedSeed, for a part of a longer run.
  """

  def __init__(
    self,
    model: lavit.LavitModules,
    parts: Mapping[str, dict] | LazyParams | CheckpointInfo,
    words: TextTokenizer | str | os.PathLike,
    weights: str | None = None,
    cache: str | None = None,
    safety_checker: bool = True,
    mesh: Mesh | Mapping[str, int] | None = None,
  ):
    """`parts`: part name -> parameters, at least of the parts that the tasks at hand need, or another model's `parts`, on its mesh and with its
    weights. `words`: also the folder of them, which is read when a task first needs it. The other arguments: see `from_pretrained`.
    """
    for name, value, known in (
      ('weights', weights, (None, 'int8')),
      ('cache', cache, (None, 'bfloat16', 'int8')),
    ):
      if value not in known:
        raise UserError(
          f'{name}={value!r} is not known; choose one of {", ".join(map(repr, known))}'
        )
    if mesh is not None and not isinstance(mesh, Mesh):
      mesh = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1) | dict(mesh))
    self.model, self._words, self.cache, self.safety_checker, self.mesh = (
      model,
      words,
      cache,
      safety_checker,
      mesh,
    )
    if isinstance(parts, LazyParams):  # another model's, shared
      if weights is not None or mesh is not None:
        raise UserError(
          'the parts of another model have their weights and mesh; leave `weights` and `mesh` out, or open the checkpoint again'
        )
      self.parts, self.mesh = parts, parts.mesh
    else:
      self.parts = LazyParams(model, parts, weights, mesh)
    self.settings = VARIANT_DEFAULTS.get(model.variant, VariantDefaults())

  @classmethod
  def from_pretrained(
    cls,
    folder,
    mesh: Mesh | Mapping[str, int] | None = None,
    dtype: str | None = None,
    variant: str | None = None,
    weights: str | None = None,
    cache: str | None = None,
    safety_checker: bool = True,
  ) -> Lavit:
    """Opens a checkpoint: a folder of ours (weights/store/folder.py) or a PyTorch one (weights/torch/formats.py); parts are read when first needed.

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
    if dtype not in (None, *DTYPES):
      raise UserError(
        f'dtype={dtype!r} is not known; choose one of {", ".join(map(repr, (None, *DTYPES)))}'
      )
    found = open_checkpoint(expand_home(folder), variant)
    compute = dtype or ('float32' if jax.default_backend() == 'cpu' else 'bfloat16')
    model = lavit.build(found.variant, compute, settings=found.settings)
    return cls(model, found, found.tokenizer_folder, weights, cache, safety_checker, mesh)

  @functools.cached_property
  def words(self) -> TextTokenizer:
    """Raises UserError if they are missing, damaged, or another model's."""
    return (
      self._words
      if isinstance(self._words, TextTokenizer)
      else TextTokenizer.load(self._words, self.model.vocabulary.text_size)
    )

  # Pictures to codes and back.

  def tokenize(self, images, seed: int | None = 0) -> VisualTokens:
    """Pictures -> their visual tokens."""
    images = read_images(images, self.model.image_size)
    return self._tokens(
      images, purpose_keys(Purpose.PATCHES, example_keys(seed, len(images), optional=True))
    )

  def _tokens(
    self, images: np.ndarray, keys: Array | None, rows: np.ndarray | None = None
  ) -> VisualTokens:
    """`rows`: the input that each picture is of, for messages."""
    if not len(images):
      return VisualTokens([], np.zeros((0, self.model.num_patches), bool), np.zeros(0, int))
    ids, keep = self.in_batches(compiled.tokenize, ('vit', 'tokenizer'), images, keys)
    faults.check(np.maximum(-ids[:, 0], 0), rows=rows)
    return VisualTokens([row[kept] for row, kept in zip(ids, keep)], keep, keep.sum(-1))

  def draw(
    self, codes: Sequence[np.ndarray], *, seed: int | Sequence[int] = 0, **options
  ) -> np.ndarray | image_generation.DecodedImages:
    """Codes of each picture, i32[n] with n <= N -> uint8[B, H, W, 3].

    Args:
      seed: of all pictures, each of which then depends on its place too; or one for each, and a picture is the same wherever it stands.
      size: (height, width): the square of `settings.drawn_size` by Stable Diffusion 1.5 (default), or one of
        `settings.highres_sizes` by SDXL.
      guidance, steps: of the U-Net; by default as published, 5 and 50, or 7 and 25 by SDXL.
      sampler: 'ddim' (default, as published), 'euler' or 'dpm++2m'.
      rescale: the share of rescaled guidance, against pictures too bright or dark (Lin et al. 2023, who take 0.7); by default 0.
      start: pictures to begin from in place of noise, one for each or one for all; they are scaled to `size`.
      strength: of the change to `start`, the share of the steps that is made; by default 0.8. Even 1 keeps a trace of it, for the first
        step expects noise laid over a picture, not noise alone. Without `start` it plays no part.
      tile: side of the tiles that the VAE decodes one at a time, in pixels, for less memory and faint differences; by default pictures
        are decoded whole up to a megapixel (all published sizes) and in tiles of 1024 beyond.
      details: return `image_generation.DecodedImages`, which also has the flags of the safety checker; these are then not in the log.
    """
    return self._draw(
      codes,
      sample_keys(Purpose.LATENTS, example_keys(seed, len(codes)), 1),
      self._settle(len(codes), options),
    )

  def _draw(
    self, codes: Sequence[np.ndarray], keys: Array, request: image_generation.ImageRequest
  ) -> np.ndarray | image_generation.DecodedImages:
    ids, mask = self.in_slots(codes)
    if not len(ids):
      none = image_generation.DecodedImages(
        np.zeros((0, *request.options['size'], 3), np.uint8), np.zeros(0, bool)
      )
      return none if request.details else none.pictures
    way, checker = (
      request.options['way'],
      image_generation.safety_checker_part(self.model, self.parts) if self.safety_checker else (),
    )
    checked = self.in_batches(
      image_generation.decode_images,
      way.parts + checker,
      ids,
      mask,
      keys,
      request.start,
      most=way.batch,
      **request.options,
    )
    drawn = image_generation.DecodedImages(checked.pictures, checked.flagged)
    faults.check(checked.faults, drawn)
    if request.details:
      return drawn
    image_generation.report_flagged(
      f'picture {i + 1} of {len(ids)}' for i in drawn.flagged.nonzero()[0]
    )
    return drawn.pictures

  def reconstruct(self, images, *, seed: int | Sequence[int] = 0, **options) -> np.ndarray:
    """Pictures -> visual tokens -> pictures, uint8[B, H, W, 3]; what is lost is what the tokens do not say. `options`: of `draw`."""
    return self.draw(self.tokenize(images, seed).ids, seed=seed, **options)

  # Pictures to words.

  def caption(
    self,
    images,
    prompt: str | Sequence[str] = '',
    *,
    seed: int | None = 0,
    details: bool = False,
    **options,
  ) -> list[str] | list[TextOutput]:
    """What is in each picture: the continuation of [IMG] features [/IMG] prompt, cut at the first full stop.

    Args:
      prompt: of all pictures, or one for each; published results have none.
      details: return `TextOutput`.
      options: fields of `generation_config.GenerationConfig`. By default, as published, a search by 2 beams. sample=True samples instead, by temperature 1
        and top-k 50 unless others are given; num_samples captions of a picture come one after the other.
    """
    images = read_images(images, self.model.image_size)
    writing = self._settle_words(GenerationConfig(*self.settings.caption_tokens, beams=2), options)
    if isinstance(prompt, str):
      with shared_argument('prompt'):
        asked = [self._encode(prompt, empty=True)] * len(images)
        self._fit([BARE + len(ids) for ids in asked[:1]], writing, least=True)
    else:
      asked = [self._encode(text, empty=True) for text in as_texts(prompt, 'prompt')]
    if len(asked) != len(images):
      raise UserError(
        f'{len(images)} pictures but {len(asked)} prompts; give one for each, or one for all'
      )
    told = self._tell(images, asked, writing, seed)
    return _as_asked(
      [each._replace(text=prompts.parse_caption(each.text)) for each in told], details
    )

  def answer(
    self,
    images,
    questions: Sequence[str],
    *,
    judge: bool = False,
    seed: int | None = 0,
    details: bool = False,
    **options,
  ) -> list[str] | list[TextOutput]:
    """The answer to a question about each picture, lower case, cut at the first newline, comma or full stop.

    The published evaluation lemmatises it too.

    Args:
      judge: ask first whether the picture answers the question, and answer 'unanswerable' where that says 'no', as published for VizWiz.
      details: return `TextOutput`.
      options: as of `caption`; by default, as published, a search by 5 beams with length penalty 0 that stops early.
    """
    images = read_images(images, self.model.image_size)
    questions = as_texts(questions, 'questions')
    if len(images) != len(questions):
      raise UserError(
        f'{len(images)} pictures but {len(questions)} questions; give one question for each picture'
      )
    writing = self._settle_words(
      GenerationConfig(
        *self.settings.answer_tokens, beams=5, length_penalty=0.0, early_stopping=True
      ),
      options,
    )

    forms = (
      prompts.question_prompt,
      lambda question: prompts.question_prompt(prompts.answerable_question(question)),
    )[: 1 + bool(judge)]
    asked = [[self._encode(question, form) for question in questions] for form in forms]
    self._fit(
      [BARE + len(ids) for ids in asked[-1]], writing, least=True
    )  # the longer of both, before the first is computed

    def ask(asked: Sequence[Sequence[int]]) -> list[TextOutput]:
      told = self._tell(images, asked, writing, seed)
      return [each._replace(text=prompts.parse_answer(each.text)) for each in told]

    told = ask(asked[0])
    if judge:
      judged = ask(asked[1])
      told = [
        each._replace(text=prompts.UNANSWERABLE) if prompts.is_unanswerable(verdict.text) else each
        for each, verdict in zip(told, judged)
      ]
    return _as_asked(told, details)

  # Words and pictures to pictures.

  def generate(
    self, prompts: Sequence[str], *, guidance: float | None = 4.0, **options
  ) -> np.ndarray | ImageOutput:
    """A picture of each text, uint8[B, H, W, 3].

    Args:
      guidance: of the language model; None or 1 is none, which takes half the work.
      decoder_guidance: of the U-Net: the `guidance` of `draw`.
      details: return `ImageOutput`.
      options: all others of `sample_codes` and `draw`.
    """
    return self._generate(
      [[text] for text in as_texts(prompts, 'prompts')], guidance=guidance, **options
    )

  def synthesize(
    self, prompts: Sequence[Sequence], *, guidance: float | None = 5.0, **options
  ) -> np.ndarray | ImageOutput:
    """A picture from each sequence of pictures and words, in any order, uint8[B, H, W, 3].

    A `str` is words; a picture on disk is a `pathlib.Path`. One prompt may go without brackets, if it has both words and pictures:
    synthesize([picture, 'in the snow']) is synthesize([[picture, 'in the snow']]). The settings are those of `generate`.
    """
    return self._generate(prompts, guidance=guidance, **options)

  def _generate(
    self,
    prompts,
    *,
    decoder_guidance: float | None = None,
    negative: str = '',
    seed: int | Sequence[int] = 0,
    **options,
  ):
    asked, prompts = (
      {name: options.pop(name) for name in GenerationConfig._fields if name in options},
      as_prompts(prompts),
    )
    writing, against = self._settle_codes(
      asked, negative
    )  # what is wrong is told before anything runs
    decoder_guidance = check_value(
      'decoder_guidance', decoder_guidance, image_generation.LIMITS['guidance']
    )
    request = self._settle(
      len(prompts) * writing.num_samples, dict(options, guidance=decoder_guidance)
    )
    keys = example_keys(seed, len(prompts))
    sampled = self._sample(prompts, writing, keys, against)
    drawn = self._draw(
      [each.codes for each in sampled],
      sample_keys(Purpose.LATENTS, keys, writing.num_samples),
      request,
    )
    return ImageOutput(drawn.pictures, drawn.flagged, sampled) if request.details else drawn

  def sample_codes(
    self,
    prompts: Sequence[Sequence],
    *,
    guidance: float | None = 4.0,
    negative: str = '',
    seed: int | Sequence[int] = 0,
    details: bool = False,
    **options,
  ) -> list[np.ndarray] | list[CodesOutput]:
    """The codes that the language model continues each prompt with, i32[n].

    A prompt is its pictures and words in their order, then [IMG], which asks for a picture. Pictures are put as their discrete codes: this is
    the generating side, which knows pictures by the codes it writes itself. These stand bare, as in the published multimodal synthesis, or, where
    `Settings.bracketed` of the variant says so, as [IMG] codes [/IMG], as that was trained.

    Args:
      prompts: sequences of words (`str`) and pictures; one alone as of `synthesize`.
      guidance: of the language model, against the context `negative` [IMG]; None or 1 is none, which takes half the work and no `negative`.
      details: return `CodesOutput`.
      options: fields of `generation_config.GenerationConfig` but those of a search. By default, as published, temperature 1 and top-k 50. num_samples codes of a
        prompt come one after the other; the first of each is what one alone would be.
    """
    prompts, (writing, against) = (
      as_prompts(prompts),
      self._settle_codes(dict(options, guidance=guidance), negative),
    )
    sampled = self._sample(prompts, writing, example_keys(seed, len(prompts)), against)
    return sampled if details else [each.codes for each in sampled]

  def _settle_words(self, task: GenerationConfig, asked: Mapping[str, Any]) -> GenerationConfig:
    return resolve_generation_config(task, asked, self.parts.max_length - BARE)

  def _settle_codes(
    self, asked: Mapping[str, Any], negative: str
  ) -> tuple[GenerationConfig, list[Sequence[int]]]:
    """The settings, and the context that guidance is against."""
    writing = resolve_generation_config(
      GenerationConfig(*self.settings.image_tokens, guidance=4.0), asked, self.model.num_patches
    )
    against = [[self.model.vocabulary.image_start]]
    if negative in ('', None):
      return writing, against
    if writing.guidance is None:
      raise UserError(
        'negative plays no part without guidance; leave it out, or choose a guidance above 1'
      )
    with shared_argument('negative'):
      against = [self._encode(negative), *against]
      self._fit([sum(map(len, against))], writing)
    return writing, against

  def _sample(
    self,
    prompts: Sequence[Sequence],
    writing: GenerationConfig,
    keys: Array,
    against: Sequence[Sequence[int]],
  ) -> list[CodesOutput]:
    words = self.model.vocabulary
    start, end = [words.image_start], [words.image_end]
    bare = BARE if self.settings.bracketed else 1
    if not all(map(len, prompts)):
      raise InputError('the prompt is empty; give it words or pictures')
    asked = [
      [self._encode(part) if isinstance(part, str) else None for part in prompt]
      for prompt in prompts
    ]
    self._fit(
      [sum(bare if ids is None else len(ids) for ids in each) + 1 for each in asked],
      writing,
      least=True,
    )  # before anything runs
    places = [
      (i, part) for i, prompt in enumerate(prompts) for part in prompt if not isinstance(part, str)
    ]
    codes = iter(())
    if (
      places
    ):  # the j-th picture of a prompt has the j-th key of its row's, whatever the other rows are
      rows = np.array([i for i, _ in places])
      images = read_images([part for _, part in places], self.model.image_size)
      picked = purpose_keys(
        Purpose.PATCHES, keys[rows], np.arange(len(rows)) - np.searchsorted(rows, rows)
      )
      codes = iter(self._tokens(images, picked, rows).ids)

    def pieces(prompt):
      for ids in prompt:
        if ids is not None:
          yield ids
        else:
          picture = next(codes) + words.code_offset
          yield from [start, picture, end] if self.settings.bracketed else [picture]
      yield start

    prompts = [list(pieces(prompt)) for prompt in asked]
    self._fit([sum(map(len, prompt)) for prompt in prompts], writing)
    forbidden = (np.arange(words.size) >= 3) & (np.arange(words.size) < words.text_size)

    def sample(rows):
      guided = writing.guidance is not None
      embeddings, mask = self._embed([prompts[i] for i in rows] + [against] * len(rows) * guided)
      b = len(rows)
      null = (
        dict(
          guidance_scale=writing.guidance, uncond_embeddings=embeddings[b:], uncond_mask=mask[b:]
        )
        if guided
        else {}
      )
      return self._write(
        writing,
        embeddings[:b],
        mask[:b],
        keys[rows],
        eos_id=words.image_end,
        suppress=forbidden,
        **null,
      )

    most = max(1, MAX_BATCH // writing.num_samples)
    out = fetch_batches(
      ((n, sample(rows)) for n, rows in batch_ranges(len(prompts), most)), len(prompts), 'codes'
    )
    sampled = [
      CodesOutput(ids[ids >= words.code_offset] - words.code_offset, ids, score)
      for ids, score in _rows_of(out, writing.num_samples)
    ]
    _check_scores(sampled)
    return sampled

  # What the tasks share.

  def _tell(
    self, images: np.ndarray, asked: Sequence[Sequence[int]], writing: GenerationConfig, seed
  ) -> list[TextOutput]:
    """Continues [IMG] features [/IMG] asked, for each picture, in words alone."""
    decoded, words, slots = (
      self.words.decode,
      self.model.vocabulary,
      self.model.num_patches,
    )  # what is wrong with the words is told first
    forbidden = np.arange(words.size) >= words.text_size
    keys = example_keys(seed, len(images), optional=writing.beams is not None)
    patches = purpose_keys(Purpose.PATCHES, keys)
    self._fit([BARE + len(ids) for ids in asked], writing, least=True)

    broken = []  # the number of the fault of each picture, 0 for none

    def read():
      for n, rows in batch_ranges(
        len(images), MAX_BATCH if writing.beams else max(1, MAX_BATCH // writing.num_samples)
      ):
        yield (
          n,
          rows,
          self._run(
            compiled.read,
            ('vit', 'tokenizer', 'understanding'),
            images[rows],
            None if keys is None else patches[rows],
          ),
        )

    def write():
      for n, rows, (features, counts) in double_buffer(read()):
        counts = np.asarray(counts)
        broken.extend(np.maximum(-counts[:n], 0))
        counts = np.maximum(counts, 1)
        prompts = [
          [
            [words.image_start],
            range(i * slots, i * slots + int(count)),
            [words.image_end],
            asked[row],
          ]
          for i, (row, count) in enumerate(zip(rows, counts))
        ]
        self._fit(
          [sum(map(len, pieces)) for pieces in prompts], writing, rows=rows, count=len(images)
        )
        embeddings, mask = self._embed(prompts, features)
        yield (
          n,
          self._write(
            writing,
            embeddings,
            mask,
            None if keys is None else keys[rows],
            eos_id=EOS_ID,
            suppress=forbidden,
          ),
        )

    out = fetch_batches(write(), len(images), 'words')
    told = [
      TextOutput(decoded(ids), ids, score) for ids, score in _rows_of(out, writing.num_samples)
    ]
    _check_scores(told, np.repeat(broken, writing.num_samples))
    return told

  def _write(
    self, writing: GenerationConfig, embeddings: Array, mask: Array, keys: Array | None, **more
  ) -> decode.GenerateOutput:
    """Continues prompts [B, S, H] with keys [B]; B * num_samples rows."""
    same = dict(
      min_new_tokens=writing.min_tokens,
      max_new_tokens=writing.max_tokens,
      repetition_penalty=writing.repetition_penalty,
      num_samples=writing.num_samples,
      cache_dtype=self.cache,
      **more,
    )
    if writing.beams is not None:
      return self._run(
        compiled.beam_search,
        ('llama',),
        embeddings,
        mask,
        num_beams=writing.beams,
        length_penalty=writing.length_penalty,
        early_stopping=writing.early_stopping,
        **same,
      )
    return self._run(
      compiled.generate,
      ('llama',),
      embeddings,
      mask,
      key=sample_keys(Purpose.TOKENS, keys, writing.num_samples),
      temperature=writing.temperature,
      top_k=writing.top_k,
      top_p=writing.top_p,
      **same,
    )

  def _encode(
    self, text: str, form: Callable[[str], str] = str, empty: bool = False
  ) -> Sequence[int]:
    try:
      blank = not text.encode().strip()
    except (AttributeError, UnicodeEncodeError):
      raise InputError(f'{text!r} is no text; write it anew') from None
    if blank and not empty:
      raise InputError('the text is empty; say what to draw or what to ask')
    return () if blank else self.words.encode(form(text))

  def _fit(self, lengths: Sequence[int], writing: GenerationConfig, **of):
    check_prompt_lengths(lengths, self.parts.max_length - writing.max_tokens, **of)

  def _embed(self, prompts, features: Array | None = None) -> tuple[Array, Array]:
    """Lists of pieces -> embeddings [B, S, H] and mask bool[B, S], left-padded."""
    embeddings, mask, _ = sequence.embed_prompts(
      prompts,
      functools.partial(self._run, compiled.embed, ('llama',)),
      features,
      multiple=self.model.num_patches,
    )
    return embeddings, mask

  def in_slots(self, codes: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Codes of each picture, i32[n] with n <= N -> ids i32[B, N] in a prefix, and the mask bool[B, N] of it."""
    slots, size = np.arange(self.model.num_patches), self.model.vocabulary.codebook_size
    for row in map(np.asarray, codes):
      if row.ndim != 1 or row.size and row.dtype.kind not in 'iu':
        raise UserError(
          f'the codes of a picture are whole numbers in a row, of several pictures a list of these; got {row.tolist()!r}'
        )
      if len(row) > len(slots) or ((row < 0) | (row >= size)).any():
        raise UserError(
          f'the codes of a picture are at most {len(slots)} numbers in 0..{size - 1}; got {len(row)}: {row[:4].tolist()} ...'
        )
    ids = [np.resize(np.append(row, 0), slots.shape) for row in codes]
    mask = (
      slots < np.array([max(1, len(row)) for row in codes], int)[:, None]
    )  # no code at all would leave nothing to attend to
    return np.array(ids, np.int32).reshape(-1, len(slots)), mask

  def in_batches(self, program, names: tuple[str, ...], *rows, most: int = MAX_BATCH, **same):
    """program(model, parts, *rows, **same) over batches of `rows`, arrays [B, ...] or None; numpy arrays."""
    out = fetch_batches(
      (
        (n, self._run(program, names, *(None if x is None else x[index] for x in rows), **same))
        for n, index in batch_ranges(len(rows[0]), most)
      ),
      len(rows[0]),
      'pictures',
    )
    return jax.tree.map(
      lambda *x: np.concatenate(x), *(jax.tree.map(lambda x: x[:n], found) for n, found in out)
    )

  def _settle(self, count: int, options: Mapping) -> image_generation.ImageRequest:
    return image_generation.resolve_image_request(
      count,
      self.settings.drawn_size,
      self.settings.highres_sizes,
      self.parts,
      self.parts.scheduler,
      **options,
    )

  def _run(self, program, names: tuple[str, ...], *args, **kwargs):
    """Calls a program with the parts that it needs, loading them first."""
    parts = {name: self.parts[name] for name in names}
    with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
      return program(self.model, parts, *args, **kwargs)


def _rows_of(
  found: list[tuple[int, decode.GenerateOutput]], num_samples: int
) -> list[tuple[np.ndarray, float]]:
  """The new tokens i32[length] and the score of each row that counts, of batches with n * num_samples of them."""
  return [
    (ids[:length], float(score))
    for n, batch in found
    for ids, length, score in zip(*(x[: n * num_samples] for x in batch))
  ]


def _check_scores(
  found: Sequence[TextOutput] | Sequence[CodesOutput], broken: Sequence[int] | None = None
) -> None:
  """Raises NotFinite where the language model's results are not finite; `broken`: the faults of what it read, by row."""
  wrong = np.array(
    [0 if np.isfinite(each.score) else faults.number('llama') for each in found], int
  )
  faults.check(wrong if broken is None else np.where(broken, broken, wrong), found)


def _as_asked(told: list[TextOutput], details: bool) -> list[TextOutput] | list[str]:
  return told if details else [each.text for each in told]
