"""How choices at inference change results, on held-out images and the tiny checkpoint.

    python benchmarks/agreement.py [--source data] [--count 128] [--json FILE]

keep: the patches that become tokens, sampled with each of 8 seeds, beside the deterministic choice
    (seed=None).
precision: int8 weights of the language model, bfloat16 and int8 caches, beside float32. Measured
    are the loss (a token's negative log-likelihood) of the true captions and of the images' codes,
    captions and answers; and, with the random weights of the golden model, the error of its logits
    and its greedy captions.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from lavit_jax import Lavit
from lavit_jax.data.emoji import corpus
from lavit_jax.data.emoji.scenes import Example
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
TINY = REPOSITORY / 'lavit_jax/assets/tiny'
GOLDEN = REPOSITORY / 'tests/data/golden'
SEEDS = range(8)
PRECISIONS = {  # arguments of Lavit.from_pretrained
  'float32': {},
  'int8 weights': {'weights_dtype': 'int8'},
  'bfloat16 cache': {'cache_dtype': 'bfloat16'},
  'int8 cache': {'cache_dtype': 'int8'},
  'int8 weights and cache': {'weights_dtype': 'int8', 'cache_dtype': 'int8'},
}


def agreement(texts: Sequence[str], others: Sequence[str]) -> float:
  """The share of equal texts."""
  return captioning.mean(a == b for a, b in zip(texts, others, strict=True))


def compare_keep(examples: Sequence[Example]) -> dict:
  """Sampled patches beside the deterministic choice.

  Returns:
    The numbers of tokens of an image; the share of patches in common; the patches of one color,
    which show nothing but background, among all patches and among the tokens; captions, and how
    often they name the right background, by whether the deterministic choice has such a patch.
  """
  model = Lavit.from_pretrained(TINY)
  images = stack_images(examples)
  fixed = model.tokenize(images, seed=None)
  fixed_captions = model.caption(images, seed=None)
  sampled = [model.tokenize(images, seed=seed) for seed in SEEDS]
  captions = [model.caption(images, seed=seed) for seed in SEEDS]
  counts = np.stack([tokens.counts for tokens in sampled])
  common = []
  for tokens in sampled:
    union = (tokens.keep | fixed.keep).sum(-1)
    common.append((tokens.keep & fixed.keep).sum(-1) / union)

  plain = plain_patches(images, model.modules.vit.patch_size)
  plain_tokens = [plain & tokens.keep for tokens in sampled]
  fixed_plain_tokens = plain & fixed.keep
  has_plain_token = fixed_plain_tokens.any(-1)
  different_captions = [len(set(texts)) for texts in zip(*captions)]
  fixed_right = names_background(examples, fixed_captions)
  return {
    'deterministic_tokens': float(fixed.counts.mean()),
    'sampled_tokens': float(counts.mean()),
    'spread_of_a_picture': float(counts.std(0).mean()),
    'difference_to_deterministic': float((counts - fixed.counts).mean()),
    'spread_of_means': float(counts.mean(1).std()),
    'patches_in_common': float(np.mean(common)),
    'captions_as_deterministic': [agreement(texts, fixed_captions) for texts in captions],
    'captions_of_a_picture': captioning.mean(different_captions),
    'plain_patches': float(plain.sum(-1).mean()),
    'plain_tokens_deterministic': float(fixed_plain_tokens.sum(-1).mean()),
    'plain_tokens': float(np.mean([tokens.sum(-1).mean() for tokens in plain_tokens])),
    'no_plain_token_deterministic': float((~has_plain_token).mean()),
    'no_plain_token': [float((~tokens.any(-1)).mean()) for tokens in plain_tokens],
    'background_right_deterministic': captioning.mean(fixed_right),
    'background_right': [captioning.mean(names_background(examples, texts)) for texts in captions],
    'background_right_with_plain_token': captioning.mean(fixed_right[has_plain_token]),
    'background_right_without': captioning.mean(fixed_right[~has_plain_token]),
  }


def plain_patches(images: np.ndarray, patch_size: int) -> np.ndarray:
  """Which patches of uint8[B, S, S, 3] have one color, bool[B, N] in raster order."""
  side = images.shape[1] // patch_size
  grid = images.reshape(len(images), side, patch_size, side, patch_size, 3).swapaxes(2, 3)
  patches = grid.reshape(len(images), side * side, patch_size * patch_size, 3)
  return (patches.max(2) == patches.min(2)).all(-1)


def names_background(examples: Sequence[Example], captions: Sequence[str]) -> np.ndarray:
  """Which captions name the background's color, bool[B]."""
  right = []
  for example, caption in zip(examples, captions, strict=True):
    right.append(f'{example.facts.background} background' in caption)
  return np.array(right)


def losses(model: Lavit, examples: Sequence[Example]) -> dict[str, float]:
  """Mean losses of the true captions after their images, and of the codes after their captions."""
  vocabulary = model.modules.vocabulary
  images = stack_images(examples)
  texts = [model.tokenizer.encode(example.caption) for example in examples]
  features, counts = model.run(read, ('vit', 'tokenizer', 'understanding'), images, None)
  codes = model.tokenize(images, seed=None).ids
  num_slots = model.modules.num_patches
  caption_prompts = []
  code_prompts = []
  for i, (count, text) in enumerate(zip(np.asarray(counts), texts, strict=True)):
    slots = range(i * num_slots, i * num_slots + int(count))
    caption_prompts.append(
      [[vocabulary.image_start], slots, [vocabulary.image_end], text, [EOS_ID]]
    )
    image_ids = codes[i] + vocabulary.code_offset
    code_prompts.append([text, [vocabulary.image_start], image_ids, [vocabulary.image_end]])
  mean_loss = make_mean_loss(model)
  return {
    'caption_loss': mean_loss(caption_prompts, [len(text) + 1 for text in texts], features),
    'code_loss': mean_loss(code_prompts, [len(ids) + 1 for ids in codes], None),
  }


def make_mean_loss(model: Lavit) -> Callable[..., float]:
  """A function (prompts, suffix lengths, features) -> mean loss of the tokens in the suffixes."""
  llama, params = unroll_layers(model.modules.llama, model.params['llama'])
  variables = {'params': params}
  embed = functools.partial(llama.apply, variables, method='embed')

  @jax.jit
  def token_losses(embeddings, mask, ids):
    positions = sequence.prompt_positions(mask)
    attention_mask = sequence.prompt_mask(mask)
    cache = llama.init_cache(*mask.shape, model.cache_dtype)
    hidden, _ = llama.apply(variables, embeddings, positions, attention_mask, cache)
    logits = llama.apply(variables, hidden[:, :-1], method='logits')
    log_probs = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_probs, ids[:, 1:, None], axis=-1)[..., 0]

  def mean_loss(prompts, suffix_lengths, features):
    layout = sequence.layout_prompts(prompts, multiple=64)
    embeddings, mask, _ = sequence.embed_prompts(prompts, embed, features, multiple=64)
    values = np.asarray(token_losses(embeddings, mask, layout.ids))
    suffixes = [row[-length:] for row, length in zip(values, suffix_lengths, strict=True)]
    return float(np.concatenate(suffixes).mean())

  return mean_loss


def golden_model(
  weights_dtype: str | None = None, cache_dtype: str | None = None
) -> dict[str, float]:
  """Errors of the golden model with quantized weights or cache.

  Returns:
    The mean absolute error of its logits, in their standard deviations, and the share of equal
    tokens in its greedy captions.
  """
  sizes = json.loads((GOLDEN / 'language_model.json').read_text())
  golden = np.load(GOLDEN / 'language_model_io.npz')
  llama, params = load_golden_model(sizes)
  if weights_dtype:
    params = quantize_weights(params)
  variables = {'params': params}
  embed = functools.partial(llama.apply, variables, method='embed')
  ids = jnp.asarray(golden['forward_ids'], jnp.int32)
  mask = jnp.ones(ids.shape, bool)
  hidden, _ = llama.apply(
    variables,
    embed(ids),
    sequence.prompt_positions(mask),
    sequence.prompt_mask(mask),
    llama.init_cache(*ids.shape, cache_dtype),
  )
  logits = llama.apply(variables, hidden, method='logits')
  expected_logits = golden['forward_logits']
  error = np.abs(logits - expected_logits).mean() / expected_logits.std()

  features = [golden['caption_features_0'], golden['caption_features_1']]
  longest = max(map(len, features))
  prompts = []
  padded = []
  for i, rows in enumerate(features):
    slots = range(i * longest, i * longest + len(rows))
    prompts.append([[sizes['image_start_id']], slots, [sizes['image_end_id']]])
    padded.append(jnp.pad(rows, ((0, longest - len(rows)), (0, 0))))
  embeddings, mask, _ = sequence.embed_prompts(prompts, embed, jnp.stack(padded))
  output = decode.generate(
    llama,
    params,
    embeddings,
    mask,
    min_new_tokens=sizes['min_new_tokens'],
    max_new_tokens=sizes['max_new_tokens'],
    eos_id=sizes['eos_id'],
    suppress=jnp.arange(sizes['vocab_size']) >= sizes['text_vocab'],
    cache_dtype=cache_dtype,
  )
  expected_ids = golden['caption_greedy']
  equal = np.asarray(output.ids)[:, : expected_ids.shape[1]] == expected_ids
  return {'golden_error': float(error), 'golden_tokens_alike': float(equal.mean())}


def load_golden_model(sizes: dict[str, int]) -> tuple[Llama, dict]:
  """The golden language model, with its layers unrolled, and its parameters."""
  num_heads = sizes['num_attention_heads']
  llama = Llama(
    vocab_size=sizes['vocab_size'],
    hidden_size=sizes['hidden_size'],
    num_layers=sizes['num_hidden_layers'],
    num_heads=num_heads,
    num_kv_heads=num_heads,
    head_dim=sizes['hidden_size'] // num_heads,
    mlp_dim=sizes['intermediate_size'],
  )
  embeddings = jnp.zeros((1, 2, llama.hidden_size))
  positions = jnp.zeros((1, 2), jnp.int32)
  mask = jnp.ones((1, 1, 2, 2), bool)
  like = jax.eval_shape(llama.init, jax.random.key(0), embeddings, positions, mask)['params']
  state = load_file(GOLDEN / 'language_model.safetensors')
  params = mapping.from_state_dict(llama_rules(), state, like)
  return unroll_layers(llama, jax.tree.map(jnp.asarray, params))


def compare_precisions(examples: Sequence[Example]) -> dict[str, dict[str, float]]:
  """Losses and agreement with float32, for each of PRECISIONS."""
  images = stack_images(examples)
  questions = vqa.collect_questions(examples)
  question_images = images[[question.index for question in questions]]
  question_texts = [question.question for question in questions]
  results = {}
  reference_captions: list[str] = []
  reference_answers: list[str] = []
  for name, options in PRECISIONS.items():
    model = Lavit.from_pretrained(TINY, **options)
    captions = model.caption(images, seed=None)
    answers = model.answer(question_images, question_texts, seed=None)
    if name == 'float32':
      reference_captions = captions
      reference_answers = answers
    results[name] = losses(model, examples) | {
      'captions_alike': agreement(captions, reference_captions),
      'answers_alike': agreement(answers, reference_answers),
      **golden_model(**options),
    }
  return results


def main() -> None:
  """Measures and prints JSON."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--source', default='embedded')
  parser.add_argument('--count', type=int, default=128)
  parser.add_argument('--json', type=pathlib.Path)
  args = parser.parse_args()
  examples = corpus.examples(args.source, 'heldout/pair', 0, args.count)
  result = {
    'source': args.source,
    'count': args.count,
    'keep': compare_keep(examples),
    'precision': compare_precisions(examples),
  }
  print(json.dumps(result, indent=1))
  if args.json:
    args.json.write_text(json.dumps(result) + '\n')


if __name__ == '__main__':
  main()
