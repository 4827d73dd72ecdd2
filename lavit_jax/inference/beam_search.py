"""Continues prompts by beam search, with the semantics of transformers' `generate`.

Beams need neither copies of the prompt nor a reordered cache. The K beams of a row are K queries
over one cache, which has the prompt once and K slots for each step; the mask lets each beam attend
to its own ancestors. With K = 2, after the second step, when both live beams descend from beam 0 of
the first:

              prompt    step 0   step 1
    beam 0    x x x x    x .      x .
    beam 1    x x x x    x .      . x

Axes: B rows, K beams, S prompt length, T most new tokens, V vocabulary, H hidden size.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from lavit_jax.inference import sampling
from lavit_jax.inference.decode import GenerateOutput, Params, extend, prefill, suppressed_ids
from lavit_jax.models.llama import ExtraLayers, KVCache, Llama, unroll_layers
from lavit_jax.models.vocabulary import PAD_ID

EarlyStopping = bool | Literal['never']
ABSENT = -1e9  # the score of a beam that does not exist: finite, so that it divides and compares


@functools.partial(
  jax.jit,
  static_argnames=(
    'llama',
    'num_beams',
    'early_stopping',
    'max_new_tokens',
    'num_return_sequences',
    'cache_dtype',
  ),
)
def beam_search(
  llama: Llama,
  params: Params,
  embeddings: Array,
  mask: Array,
  *,
  num_beams: int,
  length_penalty: float = 1.0,
  early_stopping: EarlyStopping = False,
  max_new_tokens: int,
  min_new_tokens: int = 0,
  eos_id: int,
  pad_id: int = PAD_ID,
  suppress: Array | None = None,
  repetition_penalty: float | None = None,
  num_return_sequences: int = 1,
  cache_dtype: str | None = None,
  extra: ExtraLayers | None = None,
) -> GenerateOutput:
  """Searches the best continuations of each prompt.

  Args:
    llama: the model.
    params: its parameters, as in `decode.generate`.
    embeddings: [B, S, H], left-padded prompts.
    mask: bool[B, S], False in the padding.
    num_beams: K.
    length_penalty: finished beams compare by their summed log-probability divided by
      length ** length_penalty; the length counts eos.
    early_stopping: True ends the search of a row once K beams are finished. False ends it once,
      besides, the best live beam at its present length cannot beat the worst of them; this is a
      guess, since under a positive length penalty its score may still rise. 'never' takes the
      greatest length instead if the penalty is positive, so that no possible winner is lost.
    max_new_tokens: T.
    min_new_tokens: number of tokens before which no sequence ends.
    eos_id: ends a sequence.
    pad_id: fills `ids` after the end.
    suppress: bool[V], ids that are never generated.
    repetition_penalty: as in `decode.generate`, but of log-probabilities, and part of the score.
    num_return_sequences: beams of each prompt to return, at most K.
    cache_dtype: as in `decode.generate`.
    extra: as in `decode.generate`.

  Returns:
    B * num_return_sequences sequences: the best beams of the first prompt, best first, then those
    of the second. A score is the one that ranks the beam.

  Raises:
    ValueError: `early_stopping` is none of these, or more beams are to be returned than exist.
  """
  if not 1 <= num_return_sequences <= num_beams:
    raise ValueError(
      f'num_return_sequences={num_return_sequences} must be in 1..{num_beams}, the number of beams'
    )
  if early_stopping not in (True, False, 'never'):
    raise ValueError(f"early_stopping must be True, False or 'never', not {early_stopping!r}")
  llama, params = unroll_layers(llama, params)
  extra = None if extra is None else extra.unrolled()
  new_extra = None if extra is None else extra.for_new_tokens()
  search = _Search(
    vocab_size=llama.vocab_size,
    num_beams=num_beams,
    length_penalty=length_penalty,
    early_stopping=early_stopping,
    max_new_tokens=max_new_tokens,
    min_new_tokens=min_new_tokens,
    eos_id=eos_id,
    suppress=suppress,
    repetition_penalty=repetition_penalty,
  )
  batch = mask.shape[0]

  def unfinished(state: _State) -> Array:
    return (state.step < max_new_tokens) & state.open.any()

  def advance(state: _State) -> _State:
    prompt = jnp.broadcast_to(mask[:, None], (batch, num_beams, mask.shape[1]))
    visible = jnp.concatenate([prompt, state.ancestry], axis=-1)
    tokens = state.live.ids[:, :, state.step - 1]
    positions = mask.sum(1) + state.step - 1
    logits, cache = extend(llama, params, tokens, positions, visible, state.cache, new_extra)
    return search.append(state, logits, cache)

  new_slots = num_beams * max_new_tokens
  logits, cache = prefill(llama, params, embeddings, mask, new_slots, cache_dtype, extra)
  logits = jnp.broadcast_to(logits[:, None], (batch, num_beams, llama.vocab_size))
  start = search.append(search.initial_state(batch, pad_id, cache), logits, cache)
  state = jax.lax.while_loop(unfinished, advance, start)
  ids = state.finished.ids[:, :num_return_sequences].reshape(-1, max_new_tokens)
  scores = state.finished.scores[:, :num_return_sequences]
  scores = jnp.where(state.finite[:, None], scores, jnp.nan).reshape(-1)
  ended = ids == eos_id
  lengths = jnp.where(ended.any(1), jnp.argmax(ended, 1) + 1, max_new_tokens)
  return GenerateOutput(ids, lengths.astype(jnp.int32), scores)


class _Beams(NamedTuple):
  """K sequences of each row, best first.

  Attributes:
    ids: i32[B, K, T].
    scores: f32[B, K], the summed log-probabilities; of finished beams under the length penalty.
  """

  ids: Array
  scores: Array


class _State(NamedTuple):
  """Of the loop.

  Attributes:
    step: i32, the number of tokens generated.
    live: the beams that go on.
    ancestry: bool[B, K, T * K], the new slots of the cache that each live beam attends to.
    finished: the best finished beams.
    count: i32[B], the number of finished beams, up to K.
    open: bool[B], whether the finished beams may still improve.
    used: bool[B, K, V], the ids of each live beam, if they are penalized.
    finite: bool[B], whether all logits were finite.
    cache: of the earlier tokens.
  """

  step: Array
  live: _Beams
  ancestry: Array
  finished: _Beams
  count: Array
  open: Array
  used: Array | None
  finite: Array
  cache: KVCache


class _Candidates(NamedTuple):
  """The 2K best continuations of the live beams of each row, best first.

  Attributes:
    ids: i32[B, 2K, T].
    scores: f32[B, 2K], the summed log-probabilities.
    parents: i32[B, 2K], the beam that each continues.
    tokens: i32[B, 2K], the new token.
    ends: bool[B, 2K], whether it ends with this token.
  """

  ids: Array
  scores: Array
  parents: Array
  tokens: Array
  ends: Array


@dataclasses.dataclass(frozen=True)
class _Search:
  """One step of the search; the fields are arguments of `beam_search`."""

  vocab_size: int
  num_beams: int
  length_penalty: float
  early_stopping: EarlyStopping
  max_new_tokens: int
  min_new_tokens: int
  eos_id: int
  suppress: Array | None
  repetition_penalty: float | None

  def initial_state(self, batch: int, pad_id: int, cache: KVCache) -> _State:
    """One live beam in each row, or all would choose the same token."""
    ids = jnp.full((batch, self.num_beams, self.max_new_tokens), pad_id, jnp.int32)
    absent = jnp.full((batch, self.num_beams), ABSENT)
    used = None
    if self.repetition_penalty is not None:
      used = jnp.zeros((batch, self.num_beams, self.vocab_size), bool)
    return _State(
      step=jnp.int32(0),
      live=_Beams(ids, absent.at[:, 0].set(0.0)),
      ancestry=jnp.zeros((batch, self.num_beams, self.num_beams * self.max_new_tokens), bool),
      finished=_Beams(ids, absent),
      count=jnp.zeros(batch, jnp.int32),
      open=jnp.ones(batch, bool),
      used=used,
      finite=jnp.ones(batch, bool),
      cache=cache,
    )

  def append(self, state: _State, logits: Array, cache: KVCache) -> _State:
    """Chooses token number `step` of all beams from logits f32[B, K, V]."""
    finite = state.finite & (jnp.isfinite(logits).all((1, 2)) | ~state.open)
    candidates = self._expand(state, logits)
    step = state.step + 1

    scores = jnp.where(candidates.ends, ABSENT, candidates.scores)
    live_scores, chosen = jax.lax.top_k(scores, self.num_beams)
    live = _Beams(_take(candidates.ids, chosen), live_scores)
    parents = _take(candidates.parents, chosen)
    slots = jnp.arange(state.ancestry.shape[-1])
    own_slots = state.step * self.num_beams + jnp.arange(self.num_beams)
    ancestry = _take(state.ancestry, parents) | (slots == own_slots[:, None])
    used = None
    if state.used is not None:
      tokens = _take(candidates.tokens, chosen)
      used = _take(state.used, parents) | (tokens[..., None] == jnp.arange(self.vocab_size))

    finished, num_ended = self._finish(state, candidates, step)
    count = jnp.minimum(state.count + num_ended, self.num_beams)
    open_ = state.open & self._may_improve(live, finished, count, step)
    return _State(step, live, ancestry, finished, count, open_, used, finite, cache)

  def _expand(self, state: _State, logits: Array) -> _Candidates:
    log_probs = jax.nn.log_softmax(logits)
    if state.used is not None and self.repetition_penalty is not None:
      log_probs = sampling.penalize(log_probs, state.used, self.repetition_penalty)
    too_short = state.step < self.min_new_tokens
    log_probs = sampling.suppress(
      log_probs, suppressed_ids(self.suppress, self.vocab_size, self.eos_id, too_short)
    )
    scores = state.live.scores[..., None] + log_probs
    # At most one candidate of each beam is eos, so at least K of the 2K best go on.
    scores, index = jax.lax.top_k(scores.reshape(len(scores), -1), 2 * self.num_beams)
    parents = index // self.vocab_size
    tokens = (index % self.vocab_size).astype(jnp.int32)
    ids = _take(state.live.ids, parents).at[:, :, state.step].set(tokens)
    ends = (tokens == self.eos_id) | (state.step + 1 == self.max_new_tokens)
    return _Candidates(ids, scores, parents, tokens, ends)

  def _finish(self, state: _State, candidates: _Candidates, step: Array) -> tuple[_Beams, Array]:
    """The best finished beams, and the number i32[B] of those that ended in this step."""
    # Only the K best candidates may finish; the others keep the search alive.
    is_best = jnp.arange(2 * self.num_beams) < self.num_beams
    ends = candidates.ends & is_best & state.open[:, None]
    ranked = jnp.where(ends, candidates.scores / step**self.length_penalty, ABSENT)
    ids = jnp.concatenate([state.finished.ids, candidates.ids], axis=1)
    scores = jnp.concatenate([state.finished.scores, ranked], axis=1)
    scores, best = jax.lax.top_k(scores, self.num_beams)
    return _Beams(_take(ids, best), scores), ends.sum(1)

  def _may_improve(self, live: _Beams, finished: _Beams, count: Array, step: Array) -> Array:
    """Whether a live beam may still beat the worst finished one, bool[B]."""
    too_few = count < self.num_beams
    if self.early_stopping is True:
      return too_few
    length = step
    if self.early_stopping == 'never':
      length = jnp.where(self.length_penalty > 0, self.max_new_tokens, step)
    promising = live.scores[:, 0] / length**self.length_penalty > finished.scores[:, -1]
    return too_few | promising


def _take(tree: Any, index: Array) -> Any:
  """Selects the beams i32[B, K'] of every [B, K, ...] in a tree."""
  return jax.tree.map(lambda x: jax.vmap(lambda row, i: row[i])(x, index), tree)
