"""transformers' Q-Former with the parts of its first stage, small, and inputs of both."""

import re

import jax.numpy as jnp
import numpy as np
import torch
import transformers
from torch_peers import arrays, randomize
from transformers.models.bert import modeling_bert as bert

SIZES = dict(num_queries=3, hidden_size=16, num_layers=4, num_heads=2, mlp_dim=24)
VOCAB, PAIRS, WORDS, DECODE_ID = 30, 4, 5, 29
FEATURES = arrays((PAIRS, 6, 12))[0]
TEXT = np.random.default_rng(1).integers(1, DECODE_ID, (PAIRS, WORDS)).astype(np.int32)
MASK = np.arange(WORDS) < np.array([5, 3, 4, 2])[:, None]
TORCH_FEATURES, TORCH_TEXT = torch.from_numpy(FEATURES), torch.from_numpy(TEXT).long()
OUR_TEXT, OUR_MASK = jnp.asarray(TEXT), jnp.asarray(MASK)  # `at` needs them


def config(**qformer):
  sizes = dict(
    hidden_size=16,
    num_hidden_layers=4,
    num_attention_heads=2,
    intermediate_size=24,
    encoder_hidden_size=12,
    vocab_size=VOCAB,
    max_position_embeddings=10,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
  )
  return dict(
    vision_config=dict(
      hidden_size=12,
      intermediate_size=8,
      num_hidden_layers=1,
      num_attention_heads=2,
      image_size=16,
      patch_size=8,
      layer_norm_eps=1e-6,
    ),
    qformer_config=sizes | qformer,
    text_config=dict(
      model_type='opt',
      vocab_size=VOCAB,
      hidden_size=20,
      word_embed_proj_dim=20,
      num_hidden_layers=1,
      num_attention_heads=2,
      ffn_dim=8,
    ),
    num_query_tokens=3,
    image_text_hidden_size=8,
  )


class Stage1(torch.nn.Module):
  """transformers' retrieval model, BERT's head of words, and the temperature."""

  def __init__(self):
    super().__init__()
    settings = transformers.Blip2Config(**config(use_qformer_text_input=True))
    settings._attn_implementation = 'eager'
    self.blip = transformers.Blip2ForImageTextRetrieval(settings)
    self.blip.qformer.config._attn_implementation = 'eager'
    self.head = bert.BertLMPredictionHead(
      transformers.BertConfig(vocab_size=VOCAB, hidden_size=16, layer_norm_eps=1e-12)
    )
    self.temp = torch.nn.Parameter(torch.tensor(0.0))
    randomize(self)
    self.head.decoder.weight = self.blip.embeddings.word_embeddings.weight
    self.head.decoder.bias = self.head.bias
    with torch.no_grad():
      self.temp.fill_(0.3)  # at 0.07 the softmax of random features is almost hard

  def state(self):
    """The state dict with LAVIS's names, from what PyTorch calls its parameters here."""
    state = {}
    for name, tensor in self.named_parameters():
      state[lavis_name(name)] = tensor
    return {name: tensor for name, tensor in state.items() if not name.startswith('vision_model')}

  def norm(self, features):
    return self.blip.vision_model.post_layernorm(features)

  def run(self, features, ids=None, mask=None, causal=False, queries=True, **options):
    """Hidden states of the Q-Former; masks add -10000."""
    tokens = self.blip.query_tokens.expand(len(TEXT if ids is None else ids), -1, -1)
    count = 3 if queries else 0
    if ids is None:
      embedded = tokens
    else:
      embedded = self.blip.embeddings(input_ids=ids, query_embeds=tokens if queries else None)
    length = embedded.shape[1]
    allowed = torch.ones(len(embedded), 1, length, length)
    if mask is not None:
      allowed[..., count:] *= torch.from_numpy(mask)[:, None, None].float()
    if causal:
      for query in range(length):
        allowed[:, :, query, max(count, query + 1) :] = 0
    return self.blip.qformer(
      query_embeds=embedded,
      query_length=count,
      attention_mask=(1 - allowed) * -10000.0,
      encoder_hidden_states=features if queries else None,
      **options,
    )


def lavis_name(name):
  """The name that LAVIS has for a parameter of `Stage1`."""
  substitutions = (
    (r'^blip\.', ''),
    (r'^vision_model\.post_layernorm', 'ln_vision'),
    (r'^embeddings\.', 'Qformer.bert.embeddings.'),
    (r'^qformer\.layernorm', 'Qformer.bert.embeddings.LayerNorm'),
    (r'^qformer\.encoder', 'Qformer.bert.encoder'),
    (r'attention\.attention\.', 'attention.self.'),
    (r'^(vision|text)_projection', r'\1_proj'),
    (r'^head\.', 'Qformer.cls.predictions.'),
  )
  for pattern, replacement in substitutions:
    name = re.sub(pattern, replacement, name)
  return name
