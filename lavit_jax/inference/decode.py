"""Continues prompts token by token: one compiled prefill, and one loop over a cache of fixed size.

A prompt is left-padded embeddings, since it mixes text and visual features; new tokens are ids.
Parameters are an argument. What changes a shape or the program is static (the model,
`max_new_tokens`, `top_k`); all other options are arrays, so that a change of them compiles nothing.

The layers are unrolled. Scanned parameters are unstacked inside the program, which copies them at
each call; a frequent caller does it once (`llama.unstack_layers`).

Axes: B rows, S prompt length, T most new tokens, M cache slots, Q queries, V vocabulary, H hidden
size.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from lavit_jax.inference import sampling
from lavit_jax.models.llama import ExtraLayers, KVCache, Llama, unroll_layers
from lavit_jax.models.sequence import prompt_mask, prompt_positions
from lavit_jax.models.vocabulary import PAD_ID

Params = dict[str, Any]


class GenerateOutput(NamedTuple):
  """The new tokens of each sequence.

  Attributes:
    ids: i32[B, T], with eos where it was reached, then padding.
    lengths: i32[B], with eos.
    scores: f32[B], defined by the function that returns them; NaN if a logit of the sequence was
      NaN or infinite.
  """

  ids: Array
  lengths: Array
  scores: Array


def prefill(
  llama: Llama,
  params: Params,
  embeddings: Array,
  mask: Array,
  new_slots: int,
  cache_dtype: str | None,
  extra: ExtraLayers | None = None,
) -> tuple[Array, KVCache]:
  """Reads prompts.

  Args:
    llama: the model.
    params: its parameters.
    embeddings: [B, S, H], left-padded.
    mask: bool[B, S], False in the padding.
    new_slots: free slots of the cache for new tokens.
    cache_dtype: of the cache; None for the compute dtype.
    extra: unrolled layers that read images (`Llama.__call__`).

  Returns:
    Logits f32[B, V] of the next token, and the cache of M = S + new_slots.
  """
  hidden, cache = read_prompts(llama, params, embeddings, mask, new_slots, cache_dtype, extra)
  return _apply(llama, params, hidden, method='logits'), cache


def read_prompts(
  llama: Llama,
  params: Params,
  embeddings: Array,
  mask: Array,
  new_slots: int,
  cache_dtype: str | None,
  extra: ExtraLayers | None = None,
) -> tuple[Array, KVCache]:
  """`prefill` with the hidden states [B, H] of the last tokens in place of logits."""
  cache = llama.init_cache(mask.shape[0], mask.shape[1] + new_slots, cache_dtype)
  visible = jnp.pad(prompt_mask(mask), ((0, 0), (0, 0), (0, 0), (0, new_slots)))
  hidden, cache = _apply(llama, params, embeddings, prompt_positions(mask), visible, cache, extra)
  return hidden[:, -1], cache


def extend(
  llama: Llama,
  params: Params,
  tokens: Array,
  positions: Array,
  visible: Array,
  cache: KVCache,
  extra: ExtraLayers | None = None,
) -> tuple[Array, KVCache]:
  """Reads new tokens.

  Args:
    llama: the model.
    params: its parameters.
    tokens: i32[B, Q].
    positions: i32[B], that of all Q tokens of a row.
    visible: bool[B, Q, M], the slots that each token attends to.
    cache: of the earlier tokens.
    extra: as in `prefill`, `for_new_tokens`.

  Returns:
    Logits f32[B, Q, V] of the next tokens, and the longer cache.
  """
  embeddings = _apply(llama, params, tokens, method='embed')
  positions = jnp.broadcast_to(positions[:, None], tokens.shape)
  hidden, cache = _apply(llama, params, embeddings, positions, visible[:, None], cache, extra)
  return _apply(llama, params, hidden, method='logits'), cache


def suppressed_ids(suppress: Array | None, vocab_size: int, eos_id: int, too_short: Array) -> Array:
  """Returns bool[V]: `suppress`, and eos while a sequence is too short to end."""
  suppressed = (jnp.arange(vocab_size) == eos_id) & too_short
  return suppressed if suppress is None else suppressed | suppress


@functools.partial(
  jax.jit,
  static_argnames=('llama', 'max_new_tokens', 'top_k', 'num_return_sequences', 'cache_dtype'),
)
def generate(
  llama: Llama,
  params: Params,
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
  num_return_sequences: int = 1,
  cache_dtype: str | None = None,
  extra: ExtraLayers | None = None,
  guidance_scale: float | None = None,
  uncond_embeddings: Array | None = None,
  uncond_mask: Array | None = None,
) -> GenerateOutput:
  """Continues each prompt by sampling, or greedily without a key.

  Args:
    llama: the model.
    params: its parameters, of scanned or unrolled layers, quantized or not
      (`int8.quantize_weights`).
    embeddings: [B, S, H], left-padded prompts (`sequence.embed_prompts`).
    mask: bool[B, S], False in the padding.
    key: a typed key, or keys[B * num_return_sequences], and a sequence depends on its own key only;
      None is greedy, without temperature, top_k and top_p.
    max_new_tokens: T.
    min_new_tokens: number of tokens before which no sequence ends.
    eos_id: ends a sequence.
    pad_id: fills `ids` after the end.
    suppress: bool[V], ids that are never generated.
    repetition_penalty: for ids that the sequence has generated (`sampling.penalize`); the prompt
      does not count, for it may have no ids.
    temperature: divides the logits.
    top_k: sample among so many most probable ids; None among all.
    top_p: sample among the ids that together reach this probability; None among all.
    num_return_sequences: for each prompt, which is read once. They differ only if sampled.
    cache_dtype: of the keys and values: None for the compute dtype, 'bfloat16', or 'int8' with a
      scale for each head and slot.
    extra: layers between those of the language model, which read images of the prompts
      (`Llama.__call__`); unconditional prompts have none, so not with guidance.
    guidance_scale: of classifier-free guidance; None for none.
    uncond_embeddings: [B, S, H], the unconditional prompts, which run in the same batch.
    uncond_mask: bool[B, S], of these.

  Returns:
    B * num_return_sequences sequences, those of the first prompt first. A score is the summed
    log-probability of the tokens, under guidance but before any penalty or filter, so that those of
    greedy and of sampled sequences compare.

  Raises:
    ValueError: guidance without unconditional prompts of the same shape, or the reverse; guidance
      with extra layers.
  """
  _check_guidance(embeddings, mask, guidance_scale, uncond_embeddings, uncond_mask)
  if extra is not None and guidance_scale is not None:
    raise ValueError('guidance_scale is for a model without extra layers')
  copies = 1
  if uncond_embeddings is not None and uncond_mask is not None:
    embeddings = jnp.concatenate([embeddings, uncond_embeddings])
    mask = jnp.concatenate([mask, uncond_mask])
    copies = 2  # rows of the conditional prompts, then of the unconditional ones
  llama, params = unroll_layers(llama, params)
  extra = None if extra is None else extra.unrolled()
  batch = mask.shape[0] // copies * num_return_sequences
  choose = _TokenChooser(
    vocab_size=llama.vocab_size,
    keys=None if key is None else sampling.row_keys(key, batch),
    eos_id=eos_id,
    min_new_tokens=min_new_tokens,
    suppress=suppress,
    repetition_penalty=repetition_penalty,
    temperature=temperature,
    top_k=top_k,
    top_p=top_p,
    guidance_scale=guidance_scale,
  )

  def append(state: _State, logits: Array, cache: KVCache) -> _State:
    """Adds the next token of each sequence."""
    token, log_prob = choose(logits, state.step, state.used)
    token = jnp.where(state.done, pad_id, token)
    out = GenerateOutput(
      ids=state.out.ids.at[:, state.step].set(token),
      lengths=state.out.lengths + ~state.done,
      scores=state.out.scores + jnp.where(state.done, 0.0, log_prob),
    )
    used = None if state.used is None else state.used.at[jnp.arange(batch), token].set(True)
    return _State(state.step + 1, token, state.done | (token == eos_id), used, out, cache)

  def unfinished(state: _State) -> Array:
    return (state.step < max_new_tokens) & ~state.done.all()

  def advance(state: _State) -> _State:
    generated = jnp.broadcast_to(
      jnp.arange(max_new_tokens) < state.step, (mask.shape[0], max_new_tokens)
    )
    visible = jnp.concatenate([mask, generated], axis=1)[:, None]
    tokens = jnp.tile(state.token, copies)[:, None]
    positions = mask.sum(1) + state.step - 1
    logits, cache = extend(llama, params, tokens, positions, visible, state.cache, new_extra)
    return append(state, logits[:, 0], cache)

  logits, cache = prefill(llama, params, embeddings, mask, max_new_tokens, cache_dtype, extra)
  new_extra = None
  if extra is not None:
    new_extra = extra.for_new_tokens().repeat_rows(num_return_sequences)
  logits = jnp.repeat(logits, num_return_sequences, axis=0)
  mask = jnp.repeat(mask, num_return_sequences, axis=0)
  cache = _repeat_rows(cache, num_return_sequences)
  start = _initial_state(batch, max_new_tokens, pad_id, cache)
  if repetition_penalty is not None:
    start = start._replace(used=jnp.zeros((batch, llama.vocab_size), bool))
  return jax.lax.while_loop(unfinished, advance, append(start, logits, cache)).out


class _State(NamedTuple):
  """Of the loop.

  Attributes:
    step: i32, the number of tokens generated.
    token: i32[B], the last of them.
    done: bool[B], whether the sequence has ended.
    used: bool[B, V], the generated ids, if they are penalized.
    out: the result so far.
    cache: of the earlier tokens.
  """

  step: Array
  token: Array
  done: Array
  used: Array | None
  out: GenerateOutput
  cache: KVCache


def _initial_state(batch: int, max_new_tokens: int, pad_id: int, cache: KVCache) -> _State:
  out = GenerateOutput(
    ids=jnp.full((batch, max_new_tokens), pad_id, jnp.int32),
    lengths=jnp.zeros(batch, jnp.int32),
    scores=jnp.zeros(batch, jnp.float32),
  )
  token = jnp.zeros(batch, jnp.int32)
  return _State(jnp.int32(0), token, jnp.zeros(batch, bool), None, out, cache)


@dataclasses.dataclass(frozen=True)
class _TokenChooser:
  """Chooses the next token of each sequence; fields as in `generate`, with keys[B] or None."""

  vocab_size: int
  keys: Array | None
  eos_id: int
  min_new_tokens: int
  suppress: Array | None
  repetition_penalty: float | None
  temperature: float
  top_k: int | None
  top_p: float | None
  guidance_scale: float | None

  def __call__(self, logits: Array, step: Array, used: Array | None) -> tuple[Array, Array]:
    """Returns token number `step`, i32[B], and its log-probability f32[B]."""
    if self.guidance_scale is not None:
      conditional, unconditional = jnp.split(logits, 2)
      logits = sampling.guided_log_probs(conditional, unconditional, self.guidance_scale)
    allowed = logits
    if used is not None and self.repetition_penalty is not None:
      allowed = sampling.penalize(logits, used, self.repetition_penalty)
    too_short = step < self.min_new_tokens
    suppressed = suppressed_ids(self.suppress, self.vocab_size, self.eos_id, too_short)
    allowed = sampling.suppress(allowed, suppressed)
    if self.keys is None:
      token = jnp.argmax(allowed, axis=-1).astype(jnp.int32)
    else:
      step_keys = jax.vmap(jax.random.fold_in, (0, None))(self.keys, step)
      allowed = sampling.filter_logits(allowed, self.temperature, self.top_k, self.top_p)
      token = sampling.sample(step_keys, allowed)
    log_probs = jax.nn.log_softmax(logits)
    return token, jnp.take_along_axis(log_probs, token[:, None], axis=-1)[:, 0]


def _check_guidance(
  embeddings: Array,
  mask: Array,
  guidance_scale: float | None,
  uncond_embeddings: Array | None,
  uncond_mask: Array | None,
) -> None:
  absent = {x is None for x in (guidance_scale, uncond_embeddings, uncond_mask)}
  if len(absent) > 1:
    raise ValueError('guidance_scale, uncond_embeddings and uncond_mask must come together')
  if uncond_embeddings is None or uncond_mask is None:
    return
  if uncond_embeddings.shape != embeddings.shape or uncond_mask.shape != mask.shape:
    raise ValueError(
      f'uncond_embeddings {uncond_embeddings.shape} must have the shape of embeddings, '
      f'{embeddings.shape}'
    )


def _apply(llama: Llama, params: Params, *args: Any, **kwargs: Any) -> Any:
  return llama.apply({'params': params}, *args, **kwargs)


def _repeat_rows(cache: KVCache, times: int) -> KVCache:
  return cache._replace(layers=jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), cache.layers))
