"""Decoding against golden sequences, transformers' beam search and a loop without a cache."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lavit_jax.inference.beam_search import beam_search
from lavit_jax.inference.decode import generate, prefill
from lavit_jax.models.llama import Llama
from lavit_jax.models.sequence import embed_prompts, prompt_mask, prompt_positions
from lavit_jax.weights.torch import mapping
from lavit_jax.weights.torch.names_llama import llama_rules

FOLDER = pathlib.Path(__file__).parents[1] / 'data/golden'
SIZES = json.loads((FOLDER / 'language_model.json').read_text())
GOLDEN = np.load(FOLDER / 'language_model_io.npz')
IMG = SIZES['image_start_id']
END = SIZES['image_end_id']
LLAMA = Llama(
  vocab_size=SIZES['vocab_size'],
  hidden_size=SIZES['hidden_size'],
  num_layers=SIZES['num_hidden_layers'],
  num_heads=SIZES['num_attention_heads'],
  num_kv_heads=SIZES['num_attention_heads'],
  head_dim=SIZES['hidden_size'] // SIZES['num_attention_heads'],
  mlp_dim=SIZES['intermediate_size'],
)
IDS = jnp.arange(SIZES['vocab_size'])
VISUAL = IDS >= SIZES['text_vocab']
TEXT = (IDS >= 3) & ~VISUAL
CAPTION = dict(
  min_new_tokens=SIZES['min_new_tokens'],
  max_new_tokens=SIZES['max_new_tokens'],
  eos_id=SIZES['eos_id'],
  suppress=VISUAL,
)


@pytest.fixture(scope='module')
def params():
  example = (
    jnp.zeros((1, 2, SIZES['hidden_size'])),
    jnp.zeros((1, 2), jnp.int32),
    jnp.ones((1, 1, 2, 2), bool),
  )
  like = jax.eval_shape(LLAMA.init, jax.random.key(0), *example)['params']
  tree = mapping.from_state_dict(
    llama_rules(), load_file(FOLDER / 'language_model.safetensors'), like
  )
  return jax.device_put(tree)


@pytest.fixture(scope='module')
def embed(params):
  return functools.partial(LLAMA.apply, {'params': params}, method='embed')


@pytest.fixture(scope='module')
def captions(embed):
  """The two golden caption prompts: embeddings and mask."""
  features = [GOLDEN['caption_features_0'], GOLDEN['caption_features_1']]
  width = max(map(len, features))
  padded = jnp.stack(
    [jnp.pad(f, ((0, width - len(f)), (0, 0)), constant_values=jnp.nan) for f in features]
  )
  prompts = [[[IMG], range(b * width, b * width + len(f)), [END]] for b, f in enumerate(features)]
  return embed_prompts(prompts, embed, padded)[:2]


def assert_ids(out, expected, eos_id=SIZES['eos_id']):
  """The ids are the expected ones, then padding; the lengths count up to eos."""
  expected = np.atleast_2d(expected)
  np.testing.assert_array_equal(out.ids[:, : expected.shape[1]], expected)
  assert (out.ids[:, expected.shape[1] :] == 2).all()
  for row, length in zip(np.asarray(out.ids), np.asarray(out.lengths), strict=True):
    assert length == len(row) or (row[length - 1] == eos_id and (row[length:] == 2).all())
    assert eos_id not in row[: length - 1]


def test_golden_greedy_captions(params, captions):
  assert_ids(generate(LLAMA, params, *captions, **CAPTION), GOLDEN['caption_greedy'])


@pytest.mark.parametrize('num_beams, length_penalty', [(2, 1), (5, 0), (5, 2)])
def test_golden_beam_captions(params, captions, num_beams, length_penalty):
  out = beam_search(
    LLAMA,
    params,
    *captions,
    num_beams=num_beams,
    length_penalty=length_penalty,
    early_stopping=length_penalty == 0,
    **CAPTION,
  )
  assert_ids(out, GOLDEN[f'caption_beam{num_beams}_lp{length_penalty}'])


@pytest.mark.parametrize('scale', [1, 4])
def test_golden_text_to_image(params, embed, scale):
  embeddings, mask, _ = embed_prompts([[GOLDEN['t2i_prompt_ids'][0], [IMG]], [[IMG]]], embed)
  settings = dict(
    max_new_tokens=SIZES['t2i_max_new_tokens'],
    min_new_tokens=SIZES['min_new_tokens'],
    eos_id=END,
    suppress=TEXT,
  )
  guided = generate(
    LLAMA,
    params,
    embeddings[:1],
    mask[:1],
    guidance_scale=scale,
    uncond_embeddings=embeddings[1:],
    uncond_mask=mask[1:],
    **settings,
  )
  assert_ids(guided, GOLDEN[f't2i_cfg{scale}'], END)
  if scale == 1:  # no guidance at all
    plain = generate(LLAMA, params, embeddings[:1], mask[:1], **settings)
    np.testing.assert_array_equal(guided.ids, plain.ids)
    np.testing.assert_allclose(guided.scores, plain.scores, atol=1e-4)


def test_guidance_needs_both_prompts(params, captions):
  with pytest.raises(ValueError, match='together'):
    generate(LLAMA, params, *captions, guidance_scale=2.0, **CAPTION)
  with pytest.raises(ValueError, match='shape'):
    generate(
      LLAMA,
      params,
      *captions,
      guidance_scale=2.0,
      uncond_embeddings=captions[0][:1],
      uncond_mask=captions[1][:1],
      **CAPTION,
    )


def test_greedy_equals_a_loop_without_a_cache(params, embed):
  """Its scores are the log-probabilities of the full forward pass, whatever padding and batch."""
  prompts = [[[1, 7, 9]], [[1, 30, 31, 32, 33, 34, 35]]]
  out = generate(LLAMA, params, *embed_prompts(prompts, embed)[:2], max_new_tokens=6, eos_id=-1)

  @jax.jit
  def log_probs(ids):
    mask = jnp.ones(ids.shape, bool)
    hidden, _ = LLAMA.apply(
      {'params': params}, embed(ids), prompt_positions(mask), prompt_mask(mask)
    )
    return jax.nn.log_softmax(LLAMA.apply({'params': params}, hidden, method='logits'))[0]

  for row, (prompt,) in enumerate(prompts):
    ids = jnp.zeros((1, 16), jnp.int32)  # attention is causal, so the rest does not matter
    ids = ids.at[0, : len(prompt)].set(jnp.array(prompt))
    score = 0.0
    for n in range(len(prompt), len(prompt) + 6):
      last = log_probs(ids)[n - 1]
      ids = ids.at[0, n].set(last.argmax())
      score += last.max()
    np.testing.assert_array_equal(out.ids[row], ids[0, len(prompt) : len(prompt) + 6])
    np.testing.assert_allclose(out.scores[row], score, atol=1e-4)


@pytest.fixture(scope='module')
def peer():
  """transformers' model of the golden weights."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  config = transformers.LlamaConfig(
    vocab_size=LLAMA.vocab_size,
    hidden_size=LLAMA.hidden_size,
    intermediate_size=LLAMA.mlp_dim,
    num_hidden_layers=LLAMA.num_layers,
    num_attention_heads=LLAMA.num_heads,
    rms_norm_eps=LLAMA.rms_norm_eps,
  )
  model = transformers.LlamaForCausalLM(config).eval()
  state = load_file(FOLDER / 'language_model.safetensors')
  model.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
  return model


@pytest.mark.parametrize('early_stopping', [True, False])
@pytest.mark.parametrize(
  'num_beams, length_penalty, min_new_tokens', [(3, 1.0, 0), (4, -0.5, 2), (4, 1.5, 4)]
)
def test_beam_search_equals_transformers(
  params, embed, peer, early_stopping, num_beams, length_penalty, min_new_tokens
):
  """Sequences and scores of eight prompts; a frequent token is eos.

  In the last case early stopping matters.
  """
  torch = pytest.importorskip('torch')
  rng = np.random.default_rng(5)
  prompts = [[rng.integers(3, 100, rng.integers(1, 9))] for _ in range(8)]
  embeddings, mask, _ = embed_prompts(prompts, embed, multiple=8)
  settings = dict(
    num_beams=num_beams,
    length_penalty=length_penalty,
    early_stopping=early_stopping,
    min_new_tokens=min_new_tokens,
  )
  eos_id = 44
  suppressed = np.r_[0:3, 100:230]
  out = beam_search(
    LLAMA,
    params,
    embeddings,
    mask,
    max_new_tokens=12,
    eos_id=eos_id,
    suppress=jnp.isin(IDS, suppressed),
    **settings,
  )
  with torch.no_grad():
    expected = peer.generate(
      inputs_embeds=torch.from_numpy(np.array(embeddings)),
      attention_mask=torch.from_numpy(np.array(mask)).long(),
      max_new_tokens=12,
      eos_token_id=eos_id,
      pad_token_id=2,
      do_sample=False,
      suppress_tokens=suppressed.tolist(),
      return_dict_in_generate=True,
      output_scores=True,
      **settings,
    )
  assert_ids(out, expected.sequences.numpy(), eos_id)
  np.testing.assert_allclose(out.scores, expected.sequences_scores.numpy(), atol=1e-4)
  # Some stop early, or this shows little.
  assert (np.asarray(out.lengths) < 12).any() == (early_stopping or length_penalty <= 1)


def test_one_beam_is_greedy(params, captions):
  greedy = generate(LLAMA, params, *captions, **CAPTION)
  beam = beam_search(LLAMA, params, *captions, num_beams=1, **CAPTION)
  np.testing.assert_array_equal(beam.ids, greedy.ids)


def test_sampled_rows_depend_on_their_own_key_only(params, embed):
  embeddings, mask, _ = embed_prompts([[[1, 7, 9]]] * 4, embed)
  sample = functools.partial(
    generate, LLAMA, params, max_new_tokens=8, eos_id=-1, top_k=50, suppress=~TEXT
  )
  out = sample(embeddings, mask, key=jax.random.key(3))
  assert len({tuple(row) for row in np.asarray(out.ids)}) == 4
  assert TEXT[out.ids].all()
  np.testing.assert_array_equal(
    sample(embeddings[:2], mask[:2], key=jax.random.key(3)).ids, out.ids[:2]
  )
  keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(3), jnp.array([2, 0]))
  np.testing.assert_array_equal(
    sample(embeddings[:2], mask[:2], key=keys).ids, out.ids[jnp.array([2, 0])]
  )


@pytest.mark.parametrize('cache_dtype', [None, 'int8'])
def test_samples_of_a_prompt_share_its_prefill(params, embed, cache_dtype):
  """The result is that of repeated prompts, also under guidance."""
  embeddings, mask, _ = embed_prompts([[[1, 7, 9]], [[1, 30, 31, 32, 33]], [[IMG]], [[IMG]]], embed)
  sample = functools.partial(
    generate,
    LLAMA,
    params,
    key=jax.random.key(3),
    max_new_tokens=6,
    eos_id=-1,
    suppress=~TEXT,
    guidance_scale=1.5,
    top_p=0.99,
    repetition_penalty=1.2,
    cache_dtype=cache_dtype,
  )
  once = sample(
    embeddings[:2],
    mask[:2],
    uncond_embeddings=embeddings[2:],
    uncond_mask=mask[2:],
    num_return_sequences=3,
  )
  embeddings = jnp.repeat(embeddings, 3, axis=0)
  mask = jnp.repeat(mask, 3, axis=0)
  repeated = sample(
    embeddings[:6], mask[:6], uncond_embeddings=embeddings[6:], uncond_mask=mask[6:]
  )
  np.testing.assert_array_equal(once.ids, repeated.ids)
  assert len({tuple(row) for row in np.asarray(once.ids)}) == 6


def test_early_stopping_is_checked(params, captions):
  message = "early_stopping must be True, False or 'never', not 'always'"
  with pytest.raises(ValueError, match=message):
    beam_search(LLAMA, params, *captions, num_beams=2, early_stopping='always', **CAPTION)


def test_settings_do_not_recompile(params, captions):
  settings = dict(max_new_tokens=3, eos_id=2, top_k=7)
  for n, (temperature, top_p, minimum) in enumerate([(1.0, 0.9, 0), (0.5, 0.3, 2)]):
    generate(
      LLAMA,
      params,
      *captions,
      key=jax.random.key(n),
      temperature=temperature,
      top_p=top_p,
      min_new_tokens=minimum,
      **settings,
    )
    if n == 0:
      size = generate._cache_size()
  assert generate._cache_size() == size


def test_finished_rows_are_padded_and_stop_the_loop(params, captions):
  """If all ids but eos are suppressed, eos comes first, and pad_id fills the rest."""
  out = generate(LLAMA, params, *captions, max_new_tokens=6, eos_id=2, pad_id=77, suppress=IDS != 2)
  np.testing.assert_array_equal(out.ids, [[2, 77, 77, 77, 77, 77]] * 2)
  np.testing.assert_array_equal(out.lengths, [1, 1])


def test_bfloat16_decodes(params, captions):
  llama = LLAMA.clone(dtype=jnp.bfloat16)
  for out in (
    generate(llama, params, *captions, **CAPTION),
    beam_search(llama, params, *captions, num_beams=2, **CAPTION),
  ):
    assert jnp.isfinite(out.scores).all()
    assert not VISUAL[out.ids].any()


def test_a_long_prompt_has_scores_of_a_block_of_queries_at_a_time():
  llama = Llama(
    vocab_size=8, hidden_size=8, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=4, mlp_dim=8
  ).clone(scan=False)
  prompt = (
    jax.ShapeDtypeStruct((3, 1000, 8), jnp.float32),
    jax.ShapeDtypeStruct((3, 1000), bool),
  )
  example = (prompt[0], jax.ShapeDtypeStruct((3, 1000), jnp.int32), jnp.ones((3, 1, 1, 1000), bool))
  params = jax.eval_shape(llama.init, jax.random.key(0), *example)['params']
  read = jax.jit(functools.partial(prefill, llama, new_slots=24, cache_dtype=None))
  program = read.lower(params, *prompt).as_text()
  assert '3x2x1000x1024xf32' not in program
  assert '3x2x250x1024xf32' in program  # four blocks
