"""What choices at inference change, on held-out pictures and the tiny checkpoint.

    python benchmarks/agreement.py [--source data] [--count 128] [--json FILE]

keep: the patches that become tokens, sampled by each of 8 seeds, beside the deterministic choice (seed=None).
precision: weights of the language model in eight bits, caches in bfloat16 and eight bits, beside float32: the loss (a token's
negative log-likelihood) of the true captions and of the pictures' codes, captions, answers; and of the golden model, whose weights are
random, the error of its logits and its greedy captions.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from lavit_jax import Lavit
from lavit_jax.data.emoji import corpus
from lavit_jax.evaluation import captions as captioning
from lavit_jax.evaluation import vqa
from lavit_jax.evaluation.report import stack_images
from lavit_jax.inference import decode
from lavit_jax.inference.compiled import read
from lavit_jax.models import sequence
from lavit_jax.models.int8 import quantize_weights
from lavit_jax.models.llama import Llama, unroll_layers
from lavit_jax.models.vocabulary import EOS_ID
from lavit_jax.weights.torch import mapping
from lavit_jax.weights.torch.names_llama import llama_rules

REPOSITORY = pathlib.Path(__file__).parents[1]
TINY, GOLDEN = REPOSITORY / 'lavit_jax/assets/tiny', REPOSITORY / 'tests/data/golden'
SEEDS = range(8)
PRECISIONS = {
  'float32': {},
  'int8 weights': dict(weights_dtype='int8'),
  'bfloat16 cache': dict(cache_dtype='bfloat16'),
  'int8 cache': dict(cache_dtype='int8'),
  'int8 weights and cache': dict(weights_dtype='int8', cache_dtype='int8'),
}


def agreement(one, other) -> float:
  return captioning.mean(a == b for a, b in zip(one, other, strict=True))


def keep(examples) -> dict:
  """Counts of a picture by seeds and by the deterministic choice; share of the patches in common, and of those of one colour alone, which
  show nothing but background; captions, and how often these name the background right, by whether the choice has such a patch."""
  model, shown = Lavit.from_pretrained(TINY), stack_images(examples)
  fixed, said = model.tokenize(shown, seed=None), model.caption(shown, seed=None)
  sampled = [model.tokenize(shown, seed=seed) for seed in SEEDS]
  captions = [model.caption(shown, seed=seed) for seed in SEEDS]
  counts = np.stack([tokens.counts for tokens in sampled])
  common = [
    (tokens.keep & fixed.keep).sum(-1) / (tokens.keep | fixed.keep).sum(-1) for tokens in sampled
  ]

  side = model.modules.vit.patch_size
  rows = (
    shown.reshape(len(shown), shown.shape[1] // side, side, -1, side, 3)
    .swapaxes(2, 3)
    .reshape(*fixed.keep.shape, -1, 3)
  )
  plain = (rows.max(2) == rows.min(2)).all(-1)  # [B, N]

  def right(texts, which=slice(None)):
    return captioning.mean(
      np.array(
        [f'{example.facts.background} background' in text for example, text in zip(examples, texts)]
      )[which]
    )

  shows = (plain & fixed.keep).any(-1)
  return dict(
    deterministic_tokens=float(fixed.counts.mean()),
    sampled_tokens=float(counts.mean()),
    spread_of_a_picture=float(counts.std(0).mean()),
    difference_to_deterministic=float((counts - fixed.counts).mean()),
    spread_of_means=float(counts.mean(1).std()),
    patches_in_common=float(np.mean(common)),
    captions_as_deterministic=[agreement(texts, said) for texts in captions],
    captions_of_a_picture=captioning.mean(len(set(texts)) for texts in zip(*captions)),
    plain_patches=float(plain.sum(-1).mean()),
    plain_tokens_deterministic=float((plain & fixed.keep).sum(-1).mean()),
    plain_tokens=float(np.mean([(plain & tokens.keep).sum(-1).mean() for tokens in sampled])),
    no_plain_token_deterministic=float((~shows).mean()),
    no_plain_token=[float((~(plain & tokens.keep).any(-1)).mean()) for tokens in sampled],
    background_right_deterministic=right(said),
    background_right=[right(texts) for texts in captions],
    background_right_with_plain_token=right(said, shows),
    background_right_without=right(said, ~shows),
  )


def losses(model: Lavit, examples) -> dict[str, float]:
  """Mean loss of the true captions after their pictures, and of the pictures' codes after their captions."""
  words, shown = model.modules.vocabulary, stack_images(examples)
  llama, params = unroll_layers(model.modules.llama, model.params['llama'])

  @jax.jit
  def nll(embeddings, mask, ids):
    cache = llama.init_cache(*mask.shape, model.cache_dtype)
    hidden, _ = llama.apply(
      {'params': params},
      embeddings,
      sequence.prompt_positions(mask),
      sequence.prompt_mask(mask),
      cache,
    )
    log_probs = jax.nn.log_softmax(llama.apply({'params': params}, hidden[:, :-1], method='logits'))
    return -jnp.take_along_axis(log_probs, ids[:, 1:, None], axis=-1)[..., 0]

  def mean(prompts, ends, features=None):
    """Of the last ends[i] tokens of each prompt."""
    laid = sequence.layout_prompts(prompts, multiple=64)
    embeddings, mask, _ = sequence.embed_prompts(
      prompts,
      lambda ids: llama.apply({'params': params}, ids, method='embed'),
      features,
      multiple=64,
    )
    values = np.asarray(nll(embeddings, mask, laid.ids))
    return float(np.concatenate([row[-end:] for row, end in zip(values, ends)]).mean())

  texts = [model.tokenizer.encode(example.caption) for example in examples]
  features, counts = model.run(read, ('vit', 'tokenizer', 'understanding'), shown, None)
  slots = model.modules.num_patches
  told = [
    [[words.image_start], range(i * slots, i * slots + int(n)), [words.image_end], text, [EOS_ID]]
    for i, (n, text) in enumerate(zip(np.asarray(counts), texts))
  ]
  codes = model.tokenize(shown, seed=None).ids
  drawn = [
    [text, [words.image_start], ids + words.code_offset, [words.image_end]]
    for text, ids in zip(texts, codes)
  ]
  return dict(
    caption_loss=mean(told, [len(text) + 1 for text in texts], features),
    code_loss=mean(drawn, [len(ids) + 1 for ids in codes]),
  )


def golden_model(
  weights_dtype: str | None = None, cache_dtype: str | None = None
) -> dict[str, float]:
  """Mean absolute error of the golden logits, in standard deviations of them, and the share of the tokens of the greedy captions."""
  sizes, golden = (
    json.loads((GOLDEN / 'language_model.json').read_text()),
    np.load(GOLDEN / 'language_model_io.npz'),
  )
  heads = sizes['num_attention_heads']
  llama = Llama(
    vocab_size=sizes['vocab_size'],
    hidden_size=sizes['hidden_size'],
    num_layers=sizes['num_hidden_layers'],
    num_heads=heads,
    num_kv_heads=heads,
    head_dim=sizes['hidden_size'] // heads,
    mlp_dim=sizes['intermediate_size'],
  )
  example = (
    jnp.zeros((1, 2, llama.hidden_size)),
    jnp.zeros((1, 2), jnp.int32),
    jnp.ones((1, 1, 2, 2), bool),
  )
  like = jax.eval_shape(llama.init, jax.random.key(0), *example)['params']
  params = mapping.from_torch(llama_rules(), load_file(GOLDEN / 'language_model.safetensors'), like)
  llama, params = unroll_layers(llama, jax.tree.map(jnp.asarray, params))
  params = quantize_weights(params) if weights_dtype else params
  embed = functools.partial(llama.apply, {'params': params}, method='embed')

  ids, logits = jnp.asarray(golden['forward_ids'], jnp.int32), golden['forward_logits']
  mask = jnp.ones(ids.shape, bool)
  hidden, _ = llama.apply(
    {'params': params},
    embed(ids),
    sequence.prompt_positions(mask),
    sequence.prompt_mask(mask),
    llama.init_cache(*ids.shape, cache_dtype),
  )
  error = (
    np.abs(llama.apply({'params': params}, hidden, method='logits') - logits).mean() / logits.std()
  )

  features = [golden['caption_features_0'], golden['caption_features_1']]
  width = max(map(len, features))
  prompts = [
    [[sizes['image_start_id']], range(b * width, b * width + len(f)), [sizes['image_end_id']]]
    for b, f in enumerate(features)
  ]
  padded = jnp.stack([jnp.pad(f, ((0, width - len(f)), (0, 0))) for f in features])
  expected = golden['caption_greedy']
  out = decode.generate(
    llama,
    params,
    *sequence.embed_prompts(prompts, embed, padded)[:2],
    min_new_tokens=sizes['min_new_tokens'],
    max_new_tokens=sizes['max_new_tokens'],
    eos_id=sizes['eos_id'],
    suppress=jnp.arange(sizes['vocab_size']) >= sizes['text_vocab'],
    cache_dtype=cache_dtype,
  )
  return dict(
    golden_error=float(error),
    golden_tokens_alike=float((np.asarray(out.ids)[:, : expected.shape[1]] == expected).mean()),
  )


def precision(examples) -> dict:
  shown, asked, found = stack_images(examples), vqa.collect_questions(examples), {}
  for name, settings in PRECISIONS.items():
    model = Lavit.from_pretrained(TINY, **settings)
    captions = model.caption(shown, seed=None)
    answers = model.answer(
      shown[[each.index for each in asked]], [each.question for each in asked], seed=None
    )
    if name == 'float32':
      reference = captions, answers
    found[name] = dict(
      losses(model, examples),
      captions_alike=agreement(captions, reference[0]),
      answers_alike=agreement(answers, reference[1]),
      **golden_model(**settings),
    )
  return found


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--source', default='embedded')
  parser.add_argument('--count', type=int, default=128)
  parser.add_argument('--json', type=pathlib.Path)
  args = parser.parse_args()
  examples = corpus.examples(args.source, 'heldout/pair', 0, args.count)
  result = dict(
    source=args.source, count=args.count, keep=keep(examples), precision=precision(examples)
  )
  print(json.dumps(result, indent=1))
  if args.json:
    args.json.write_text(json.dumps(result) + '\n')


if __name__ == '__main__':
  main()
