"""The Q-Former between an image encoder and a language model against transformers."""

import jax
import numpy as np
import pytest

from lavit_jax.models.interfaces.base import Context, VisualInterface
from lavit_jax.models.interfaces.qformer import QFormerInterface
from lavit_jax.models.interfaces.towers import Tower
from lavit_jax.models.vit import ViT
from lavit_jax.weights.torch import names_blip2 as names

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
from qformer_peers import (  # noqa: E402
  FEATURES,
  MASK,
  PAIRS,
  SIZES,
  TEXT,
  TORCH_FEATURES,
  TORCH_TEXT,
  VOCAB,
  config,
)
from torch_peers import arrays, close, numpy_state, port, randomize  # noqa: E402


def test_from_pixels_to_the_language_model():
  """BLIP-2 of transformers as a whole: its image encoder, norm, Q-Former and projection."""
  peer = transformers.Blip2ForConditionalGeneration(
    transformers.Blip2Config(**config(use_qformer_text_input=False))
  )
  randomize(peer)
  state = numpy_state(peer, rename=lambda name: name.removeprefix('model.'))
  for name, array in state.items():
    if name.endswith('qkv.bias'):
      array[12:24] = 0  # a view of the peer's own memory: EVA has no bias of keys
  split = names.split_qkv_bias(state)
  vit = ViT(16, 8, 12, num_layers=1, num_heads=2, head_dim=6, mlp_dim=8, output_dim=4)
  pixels = arrays((2, 16, 16, 3))[0]
  of_tower = ('vision_model.emb', 'vision_model.enc')
  tower_state = {name: x for name, x in split.items() if name.startswith(of_tower)}
  tower_params, unused = port(names.blip2_tower_rules(), tower_state, vit, pixels)
  assert not unused
  interface = QFormerInterface(llm_dim=20, **SIZES)
  others = {
    name: x for name, x in split.items() if not name.startswith((*of_tower, 'language_model'))
  }
  params, unused = port(names.blip2_transformers_rules(), others, interface, FEATURES[:2])
  assert not unused
  features = Tower(vit, keep_cls=True).features_of_pixels(tower_params, pixels)
  tokens = jax.jit(interface.apply)({'params': params}, features)
  with torch.no_grad():
    images = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    normed = peer.vision_model(images).last_hidden_state
    queries = peer.query_tokens.expand(2, -1, -1)
    out = peer.qformer(query_embeds=queries, encoder_hidden_states=normed)
    want = peer.language_projection(out.last_hidden_state)
  close(tokens.vectors, want)


@pytest.mark.parametrize('instructed', [False, True])
def test_interfaces_of_blip2_and_instructblip(instructed):
  if instructed:
    settings = transformers.InstructBlipConfig(**config())
    peer = transformers.InstructBlipForConditionalGeneration(settings)
  else:
    settings = transformers.Blip2Config(**config(use_qformer_text_input=False))
    peer = transformers.Blip2ForConditionalGeneration(settings)
  randomize(peer)
  vocabulary = dict(vocab_size=VOCAB, max_positions=10) if instructed else {}
  interface = QFormerInterface(llm_dim=20, **SIZES, **vocabulary)
  context = Context(instruction=TEXT, instruction_mask=MASK)
  state = numpy_state(
    peer,
    drop=('language_model', 'vision_model.emb', 'vision_model.enc'),
    rename=lambda name: name.removeprefix('model.'),
  )
  rules = names.blip2_transformers_rules(instructed)
  params, unused = port(rules, state, interface, FEATURES, context)
  assert unused <= {'qformer.embeddings.position_ids'} and isinstance(interface, VisualInterface)
  tokens = jax.jit(interface.apply)({'params': params}, FEATURES, context)
  with torch.no_grad():
    features = peer.vision_model.post_layernorm(TORCH_FEATURES)
    queries = peer.query_tokens.expand(PAIRS, -1, -1)
    if instructed:
      mask = np.concatenate([np.ones((PAIRS, 3)), MASK], 1)
      out = peer.qformer(
        input_ids=TORCH_TEXT,
        attention_mask=torch.from_numpy(mask).long(),
        query_embeds=queries,
        encoder_hidden_states=features,
      )
    else:
      out = peer.qformer(query_embeds=queries, encoder_hidden_states=features)
    want = peer.language_projection(out.last_hidden_state[:, :3])
  close(tokens.vectors, want)
  assert tokens.mask.shape == (PAIRS, interface.num_vectors(6)) and tokens.mask.all()
  if instructed:
    with pytest.raises(ValueError, match='needs Context.instruction'):
      interface.apply({'params': params}, FEATURES)
