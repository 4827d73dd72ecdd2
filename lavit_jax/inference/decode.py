"""Continuing sequences: one compiled prefill and one compiled loop over a cache of fixed size.

The prompt is left-padded embeddings, since it mixes words and visual features; the new tokens are ids. Parameters are an
argument, never baked in. What changes a shape or the program is static (the model, `max_new_tokens`, `top_k`, beams); all
other settings are data, so that turning them compiles nothing.

Layers are unrolled. Parameters of scanned layers are taken apart inside the program, which copies them at each call: who calls often
does it once (`llama.unstack_layers`).

Axis letters: B rows, S prompt slots, T new tokens at most, M slots of the cache, K beams, V vocabulary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from lavit_jax.inference import sampling
from lavit_jax.models.llama import KVCache, Llama, unroll_layers
from lavit_jax.models.sequence import prompt_mask, prompt_positions
from lavit_jax.models.vocabulary import PAD_ID

NEVER = (
  -1e9
)  # The score of a beam that is not there: finite, so that it may be divided and compared.


class GenerateOutput(NamedTuple):
  """The new tokens of each row."""

  ids: Array  # i32[B, T], with eos where one was reached, then padding.
  lengths: Array  # i32[B], eos included.
  scores: (
    Array  # f32[B]; see the function that made it. NaN if the logits of a row were NaN or infinite.
  )


def prefill(
  llama: Llama,
  params: dict,
  embeddings: Array,
  mask: Array,
  new_slots: int,
  cache_dtype: str | None,
) -> tuple[Array, KVCache]:
  """Reads the prompts: logits f32[B, V] of what comes next, and a cache with `new_slots` free."""
  cache = llama.init_cache(mask.shape[0], mask.shape[1] + new_slots, cache_dtype)
  seen = jnp.pad(prompt_mask(mask), ((0, 0), (0, 0), (0, 0), (0, new_slots)))
  hidden, cache = llama.apply({'params': params}, embeddings, prompt_positions(mask), seen, cache)
  return llama.apply({'params': params}, hidden[:, -1], method='logits'), cache


def _repeat(cache: KVCache, times: int) -> KVCache:
  """Each row of a cache `times` times."""
  return cache._replace(layers=jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), cache.layers))


def extend(
  llama: Llama, params: dict, tokens: Array, positions: Array, seen: Array, cache: KVCache
) -> tuple[Array, KVCache]:
  """Reads tokens i32[B, Q] at positions i32[B], which see bool[B, Q, M]: logits f32[B, Q, V], and the longer cache."""
  embeddings = llama.apply({'params': params}, tokens, method='embed')
  positions = jnp.broadcast_to(positions[:, None], tokens.shape)
  hidden, cache = llama.apply({'params': params}, embeddings, positions, seen[:, None], cache)
  return llama.apply({'params': params}, hidden, method='logits'), cache


def _forbidden(suppress: Array | None, vocab_size: int, eos_id: int, too_early: Array) -> Array:
  """bool[V]: the suppressed ids, and eos while it is too early to stop."""
  forbidden = (jnp.arange(vocab_size) == eos_id) & too_early
  return forbidden if suppress is None else forbidden | suppress


@functools.partial(
  jax.jit, static_argnames=('llama', 'max_new_tokens', 'top_k', 'num_samples', 'cache_dtype')
)
def generate(
  llama: Llama,
  params: dict,
  embeddings: Array,
  mask: Array,
  *,
  key: Array | None = None,
  max_new_tokens: int,
  min_new_tokens: int = 0,
  eos_id: int,
  pad_id: int = PAD_ID,
  suppress: Array | None = None,
  repetition_penalty: float | None = None,
  temperature: float = 1.0,
  top_k: int | None = None,
  top_p: float | None = None,
  num_samples: int = 1,
  cache_dtype: str | None = None,
  guidance_scale: float | None = None,
  uncond_embeddings: Array | None = None,
  uncond_mask: Array | None = None,
) -> GenerateOutput:
  """Continues each prompt token by token: the most probable one without a key, a drawn one with.

  Args:
    llama: the model; params: its 'params' subtree, of scanned or unrolled layers, quantised or not (`int8.quantize_weights`).
    embeddings: [B, S, H], left-padded prompts; mask: bool[B, S], False in padding (`sequence.embed_prompts`).
    key: one typed key, or keys[B * num_samples]: a row's tokens depend on its own key only. None: greedy, and temperature, top_k and
      top_p play no part.
    eos_id: stops a row, but not among its first `min_new_tokens`.
    suppress: bool[V], ids never chosen.
    repetition_penalty: of the ids that a row has chosen so far (`sampling.penalize`); the prompt does not count, for it may be no ids.
    num_samples: continuations of each prompt, which is read once; the rows of the result are those of the first prompt, then of the
      second, ... They only differ if sampled.
    cache_dtype: of the keys and values: the compute dtype if None, 'bfloat16', or 'int8' with a scale a head and slot.
    guidance_scale: None, or the scale of classifier-free guidance against `uncond_embeddings` [B, S, H] and `uncond_mask`
      bool[B, S], which run in the same batch.

  Returns:
    GenerateOutput of B * num_samples rows; its scores are the summed log-probabilities of the tokens before any id was penalised or
    forbidden (under guidance: of the guided distribution), so that greedy and sampled results compare.

  Raises:
    ValueError: guidance without an unconditional prompt of the shape of the prompt, or the other way round.
  """
  batch, length = mask.shape
  guided = guidance_scale is not None
  if guided != (uncond_embeddings is not None) or guided != (uncond_mask is not None):
    raise ValueError(
      'guidance_scale, uncond_embeddings and uncond_mask come together or not at all'
    )
  if guided:
    if uncond_embeddings.shape != embeddings.shape or uncond_mask.shape != mask.shape:
      raise ValueError(
        f'uncond_embeddings {uncond_embeddings.shape} must have the shape of embeddings, {embeddings.shape}'
      )
    embeddings, mask = (
      jnp.concatenate([embeddings, uncond_embeddings]),
      jnp.concatenate([mask, uncond_mask]),
    )
  llama, params = unroll_layers(llama, params)
  batch *= num_samples
  keys = None if key is None else sampling.row_keys(key, batch)

  def choose(logits: Array, step: Array, used: Array | None) -> tuple[Array, Array]:
    """Token i32[B] number `step` and its log-probability f32[B]."""
    if guided:
      logits = sampling.guided_log_probs(*jnp.split(logits, 2), guidance_scale)
    allowed = logits if used is None else sampling.penalize(logits, used, repetition_penalty)
    allowed = sampling.suppress(
      allowed, _forbidden(suppress, llama.vocab_size, eos_id, step < min_new_tokens)
    )
    if keys is None:
      token = jnp.argmax(allowed, axis=-1).astype(jnp.int32)
    else:
      step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
      token = sampling.sample(step_keys, sampling.filter_logits(allowed, temperature, top_k, top_p))
    return token, jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]

  class State(NamedTuple):
    step: Array  # tokens chosen
    token: Array  # i32[B], the last of them
    done: Array  # bool[B]
    used: Array | None  # bool[B, V], the ids chosen so far, where they are penalised
    out: GenerateOutput
    cache: KVCache

  def commit(state: State, logits: Array, cache: KVCache) -> State:
    token, log_prob = choose(logits, state.step, state.used)
    token = jnp.where(state.done, pad_id, token)
    out = GenerateOutput(
      ids=state.out.ids.at[:, state.step].set(token),
      lengths=state.out.lengths + ~state.done,
      scores=state.out.scores + jnp.where(state.done, 0.0, log_prob),
    )
    used = None if state.used is None else state.used.at[jnp.arange(batch), token].set(True)
    return State(state.step + 1, token, state.done | (token == eos_id), used, out, cache)

  def unfinished(state: State) -> Array:
    return (state.step < max_new_tokens) & ~state.done.all()

  def advance(state: State) -> State:
    written = jnp.broadcast_to(
      jnp.arange(max_new_tokens) < state.step, (mask.shape[0], max_new_tokens)
    )
    seen = jnp.concatenate([mask, written], axis=1)[:, None]
    tokens = jnp.tile(state.token, 2 if guided else 1)[:, None]
    logits, cache = extend(llama, params, tokens, mask.sum(1) + state.step - 1, seen, state.cache)
    return commit(state, logits[:, 0], cache)

  logits, cache = prefill(llama, params, embeddings, mask, max_new_tokens, cache_dtype)
  logits, mask, cache = (
    jnp.repeat(logits, num_samples, axis=0),
    jnp.repeat(mask, num_samples, axis=0),
    _repeat(cache, num_samples),
  )
  used = None if repetition_penalty is None else jnp.zeros((batch, llama.vocab_size), bool)
  nothing = GenerateOutput(
    jnp.full((batch, max_new_tokens), pad_id, jnp.int32),
    jnp.zeros(batch, jnp.int32),
    jnp.zeros(batch, jnp.float32),
  )
  start = State(
    jnp.int32(0), jnp.zeros(batch, jnp.int32), jnp.zeros(batch, bool), used, nothing, cache
  )
  return jax.lax.while_loop(unfinished, advance, commit(start, logits, cache)).out


class _Beams(NamedTuple):
  """K hypotheses a row, best first."""

  ids: Array  # i32[B, K, T]
  scores: Array  # f32[B, K]: of live ones the summed log-probabilities, of finished ones those under the length penalty.


def _take(tree, index: Array):
  """Beams index i32[B, K'] of every [B, K, ...] in a tree."""
  return jax.tree.map(lambda x: jax.vmap(lambda row, i: row[i])(x, index), tree)


@functools.partial(
  jax.jit,
  static_argnames=(
    'llama',
    'num_beams',
    'early_stopping',
    'max_new_tokens',
    'num_samples',
    'cache_dtype',
  ),
)
def beam_search(
  llama: Llama,
  params: dict,
  embeddings: Array,
  mask: Array,
  *,
  num_beams: int,
  length_penalty: float = 1.0,
  early_stopping: bool | str = False,
  max_new_tokens: int,
  min_new_tokens: int = 0,
  eos_id: int,
  pad_id: int = PAD_ID,
  suppress: Array | None = None,
  repetition_penalty: float | None = None,
  num_samples: int = 1,
  cache_dtype: str | None = None,
) -> GenerateOutput:
  """The best continuations by beam search, with the semantics of transformers' `generate`.

  Beams need neither copies of the prompt nor a shuffled cache. The K beams of a row are K queries over one cache that holds
  the prompt once and K slots a step, and the mask lets each see its own ancestors. With K = 2, after the second step, when
  both live beams descend from beam 0 of the first:

                prompt    step 0   step 1
      beam 0    x x x x    x .      x .
      beam 1    x x x x    x .      . x

  Args:
    llama, params, embeddings, mask, eos_id, suppress, cache_dtype: as in `generate`.
    num_beams: K.
    length_penalty: finished beams compare by summed log-probability / length ** length_penalty, eos counted in the length.
    early_stopping: True stops a row once K beams are finished. False, once besides the best live one, at its present length, cannot beat
      the worst of them: a guess, since under a positive length penalty it may still rise. 'never' takes the greatest length instead
      where the penalty is positive, so that what could win is never given up.
    repetition_penalty: as in `generate`, but of log-probabilities, and summed into a beam's score.
    num_samples: beams of each prompt to return, of K at most.

  Returns:
    GenerateOutput of B * num_samples rows: the best beams of the first prompt, best first, then those of the second, ...; a score is the one
    it was ranked by.

  Raises:
    ValueError: `early_stopping` is something else, or more beams are to be returned than there are.
  """
  if not 1 <= num_samples <= num_beams:
    raise ValueError(f'num_samples={num_samples} must be in 1..{num_beams}, the beams')
  if early_stopping not in (True, False, 'never'):
    raise ValueError(f"early_stopping is True, False or 'never', not {early_stopping!r}")
  llama, params = unroll_layers(llama, params)
  batch, rows = mask.shape[0], jnp.arange(num_beams)

  class State(NamedTuple):
    step: Array  # tokens chosen
    live: _Beams
    ancestry: Array  # bool[B, K, T * K], the new slots of the cache that each live beam sees
    finished: _Beams
    count: Array  # i32[B], finished beams, up to K
    open: Array  # bool[B], finished beams may still improve
    used: Array | None  # bool[B, K, V], the ids of each live beam, where they are penalised
    sound: Array  # bool[B], no logit was NaN or infinite
    cache: KVCache

  def commit(state: State, logits: Array, cache: KVCache) -> State:
    """Chooses token number `step` of all beams from logits f32[B, K, V]."""
    sound = state.sound & (jnp.isfinite(logits).all((1, 2)) | ~state.open)
    log_probs = jax.nn.log_softmax(logits)
    if state.used is not None:
      log_probs = sampling.penalize(log_probs, state.used, repetition_penalty)
    log_probs = sampling.suppress(
      log_probs, _forbidden(suppress, llama.vocab_size, eos_id, state.step < min_new_tokens)
    )
    scores = (state.live.scores[..., None] + log_probs).reshape(batch, -1)
    # Each beam offers one eos at most, so that among 2K candidates K can go on.
    scores, index = jax.lax.top_k(scores, 2 * num_beams)
    parent, token = index // llama.vocab_size, (index % llama.vocab_size).astype(jnp.int32)
    ids = _take(state.live.ids, parent).at[:, :, state.step].set(token)
    step = state.step + 1
    ends = (token == eos_id) | (step == max_new_tokens)

    live_scores, chosen = jax.lax.top_k(jnp.where(ends, NEVER, scores), num_beams)
    live = _Beams(_take(ids, chosen), live_scores)
    own = jnp.arange(state.ancestry.shape[-1]) == state.step * num_beams + rows[:, None]
    ancestors = _take(parent, chosen)
    ancestry = _take(state.ancestry, ancestors) | own
    used = None
    if state.used is not None:
      used = _take(state.used, ancestors) | (
        _take(token, chosen)[..., None] == jnp.arange(llama.vocab_size)
      )

    # Only the K best candidates may finish: the others are there to keep the search alive.
    ends &= (jnp.arange(2 * num_beams) < num_beams) & state.open[:, None]
    ranked = jnp.where(ends, scores / step**length_penalty, NEVER)
    pool = _Beams(*(jnp.concatenate(x, axis=1) for x in zip(state.finished, (ids, ranked))))
    finished_scores, best = jax.lax.top_k(pool.scores, num_beams)
    finished = _Beams(_take(pool.ids, best), finished_scores)
    count = jnp.minimum(state.count + ends.sum(1), num_beams)
    hoped = jnp.where((early_stopping == 'never') & (length_penalty > 0), max_new_tokens, step)
    promising = live_scores[:, 0] / hoped**length_penalty > finished_scores[:, -1]
    improvable = (count < num_beams) | (promising & (early_stopping is not True))
    return State(step, live, ancestry, finished, count, state.open & improvable, used, sound, cache)

  def unfinished(state: State) -> Array:
    return (state.step < max_new_tokens) & state.open.any()

  def advance(state: State) -> State:
    prompt = jnp.broadcast_to(mask[:, None], (batch, num_beams, mask.shape[1]))
    seen = jnp.concatenate([prompt, state.ancestry], axis=-1)
    logits, cache = extend(
      llama,
      params,
      state.live.ids[:, :, state.step - 1],
      mask.sum(1) + state.step - 1,
      seen,
      state.cache,
    )
    return commit(state, logits, cache)

  new_slots = num_beams * max_new_tokens
  logits, cache = prefill(llama, params, embeddings, mask, new_slots, cache_dtype)
  ids = jnp.full((batch, num_beams, max_new_tokens), pad_id, jnp.int32)
  absent = jnp.full((batch, num_beams), NEVER)
  start = State(
    step=jnp.int32(0),
    live=_Beams(
      ids, absent.at[:, 0].set(0.0)
    ),  # One beam to begin with, or all would choose the same.
    ancestry=jnp.zeros((batch, num_beams, new_slots), bool),
    finished=_Beams(ids, absent),
    count=jnp.zeros(batch, jnp.int32),
    open=jnp.ones(batch, bool),
    used=None
    if repetition_penalty is None
    else jnp.zeros((batch, num_beams, llama.vocab_size), bool),
    sound=jnp.ones(batch, bool),
    cache=cache,
  )
  logits = jnp.broadcast_to(logits[:, None], (batch, num_beams, llama.vocab_size))
  state = jax.lax.while_loop(unfinished, advance, commit(start, logits, cache))
  ids = state.finished.ids[:, :num_samples].reshape(-1, max_new_tokens)
  scores = jnp.where(state.sound[:, None], state.finished.scores[:, :num_samples], jnp.nan).reshape(
    -1
  )
  ends = ids == eos_id
  lengths = jnp.where(ends.any(1), jnp.argmax(ends, 1) + 1, max_new_tokens).astype(jnp.int32)
  return GenerateOutput(ids, lengths, scores)
