"""Continuous batching: sequences join and leave a batch of fixed size while it decodes.

The cache has B slots. The columns of each are S for the prompt, left-padded, and T for new tokens.
All slots write their new tokens at the same column, which goes round and round:

    slot 0  . . P P P  3 4 . 1 2      has generated 4 tokens, the first at column 3 of T
    slot 1  P P P P P  . 1 . . .      joined later
                         ^ the column that was written last

So one program serves all, whatever their ages: a slot sees its prompt and the columns since it
joined, and its rotary positions do not depend on the columns. A sequence has at most T new tokens,
so no column is written again while it is needed.

What each sequence asks for (`Rows`) is on the host, and an argument of each step; only the cache
and its mask stay on the device. Of a sequence's numbers none depends on the other slots, so its
tokens are those that it would have alone.

Axes: B slots, K sequences that join, S prompt length, T new tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lavit_jax.inference import decode, faults, sampling
from lavit_jax.models.llama import KVCache, Llama

Params = dict[str, Any]


class SlotState(NamedTuple):
  """What stays on the device.

  Attributes:
    layers: the cache of each layer, of B rows and S + T columns.
    mask: bool[B, S + T], the columns that a slot sees.
  """

  layers: tuple[Any, ...]
  mask: Array


class Rows(NamedTuple):
  """How sequences go on; arrays of numpy on the host.

  Attributes:
    key_data: u32[B, ...], of the key of a sequence (`jax.random.key_data`).
    temperature: f32[B]; 0 takes the most probable token.
    top_p: f32[B], in (0, 1].
    min_new_tokens: i32[B].
    step: i32[B], the number of tokens that a sequence has.
    token: i32[B], the last of them; without a meaning when it joins.
    position: i32[B], of that token, as counted from the first of the prompt.
  """

  key_data: np.ndarray
  temperature: np.ndarray
  top_p: np.ndarray
  min_new_tokens: np.ndarray
  step: np.ndarray
  token: np.ndarray
  position: np.ndarray

  def take(self, indices: np.ndarray) -> Rows:
    """The rows of some sequences."""
    return Rows(*(field[indices] for field in self))

  @classmethod
  def empty(cls, count: int) -> Rows:
    """Rows of `count` free slots."""
    shape = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape
    ints = [np.zeros(count, np.int32) for _ in range(4)]
    return cls(
      np.zeros((count, *shape), np.uint32),
      np.zeros(count, np.float32),
      np.ones(count, np.float32),
      *ints,
    )


class NextTokens(NamedTuple):
  """The next token of each row.

  Attributes:
    ids: i32[B].
    finite: bool[B], whether its logits are finite.
  """

  ids: Array
  finite: Array


def init_state(
  llama: Llama, num_slots: int, prompt_length: int, new_tokens: int, cache_dtype: str | None
) -> SlotState:
  """Empty slots.

  Args:
    llama: the model.
    num_slots: B.
    prompt_length: S.
    new_tokens: T.
    cache_dtype: as in `decode.generate`.
  """
  length = prompt_length + new_tokens
  cache = llama.init_cache(num_slots, length, cache_dtype)
  return SlotState(
    jax.tree.map(lambda x: jnp.array(x, copy=True), cache.layers),  # layers share theirs
    jnp.zeros((num_slots, length), bool),
  )


@functools.partial(
  jax.jit, static_argnames=('llama', 'prompt_length', 'eos_id'), donate_argnames='state'
)
def join(
  llama: Llama,
  params: Params,
  state: SlotState,
  slots: Array,
  embeddings: Array,
  mask: Array,
  rows: Rows,
  *,
  prompt_length: int,
  eos_id: int,
  suppress: Array,
) -> tuple[SlotState, NextTokens]:
  """Reads the prompts of new sequences into slots, and chooses their first tokens.

  Args:
    llama: the model, unrolled (`llama.unroll_layers`).
    params: of it.
    state: of the slots.
    slots: i32[K], where each goes; B for a row that is padding.
    embeddings: [K, S', H] with S' <= S, left-padded.
    mask: bool[K, S'].
    rows: of the new sequences, K of each.
    prompt_length: S.
    eos_id: ends a sequence.
    suppress: bool[V], ids that are never generated.

  Returns:
    The state, and K tokens.
  """
  cache_dtype = _cache_dtype(state)
  logits, cache = decode.prefill(llama, params, embeddings, mask, 0, cache_dtype)
  first = prompt_length - mask.shape[1]

  def write(old: Array, new: Array) -> Array:  # [B, heads, columns, ...] of any trailing axes
    return old.at[slots, :, first:prompt_length].set(new, mode='drop')

  layers = jax.tree.map(write, state.layers, cache.layers)
  seen = jnp.zeros((len(mask), state.mask.shape[1]), bool)
  seen = seen.at[:, first:prompt_length].set(mask)
  state = SlotState(layers, state.mask.at[slots].set(seen, mode='drop'))
  return state, _choose(logits, rows, eos_id, suppress)


@functools.partial(
  jax.jit, static_argnames=('llama', 'prompt_length', 'eos_id'), donate_argnames='state'
)
def advance(
  llama: Llama,
  params: Params,
  state: SlotState,
  column: Array,
  active: Array,
  rows: Rows,
  *,
  prompt_length: int,
  eos_id: int,
  suppress: Array,
) -> tuple[SlotState, NextTokens]:
  """Reads the last token of each sequence, and chooses the next one.

  Args:
    llama: the model, unrolled.
    params: of it.
    state: of the slots.
    column: i32[], the column of T that is written.
    active: bool[B], the slots that are in use; what the others give has no meaning.
    rows: of all slots.
    prompt_length: S.
    eos_id: ends a sequence.
    suppress: bool[V], ids that are never generated.

  Returns:
    The state, and B tokens.
  """
  column = prompt_length + column
  is_column = jnp.arange(state.mask.shape[1]) == column
  mask = jnp.where(is_column, active[:, None], state.mask)
  logits, cache = decode.extend(
    llama,
    params,
    rows.token[:, None],
    rows.position,
    mask[:, None],
    KVCache(state.layers, column),
  )
  return SlotState(cache.layers, mask), _choose(logits[:, 0], rows, eos_id, suppress)


def _choose(logits: Array, rows: Rows, eos_id: int, suppress: Array) -> NextTokens:
  """The next tokens, by logits f32[B, V]; the filters are those of `decode.generate`."""
  too_short = rows.step < rows.min_new_tokens
  is_eos = jnp.arange(logits.shape[-1]) == eos_id
  allowed = sampling.suppress(logits, suppress | (is_eos & too_short[:, None]))
  is_greedy = rows.temperature == 0
  scaled = allowed / jnp.where(is_greedy, 1, rows.temperature)[:, None]
  top_p = rows.top_p[:, None]
  filtered = jnp.where(top_p < 1, sampling.keep_top_p(scaled, top_p), scaled)
  keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(rows.key_data), rows.step)
  sampled = sampling.sample(keys, filtered)
  greedy = jnp.argmax(allowed, axis=-1).astype(jnp.int32)
  return NextTokens(jnp.where(is_greedy, greedy, sampled), faults.finite(logits))


def _cache_dtype(state: SlotState) -> str:
  """The name of the cache's dtype; an int8 cache has scales beside its values."""
  return str(jax.tree.leaves(state.layers)[0].dtype)
