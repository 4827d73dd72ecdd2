"""Name tables of the interfaces at their published sizes, by shape alone."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.models.clip_vit import ClipViT
from lavit_jax.models.interfaces.base import Context
from lavit_jax.models.interfaces.emu import EmuInterface
from lavit_jax.models.interfaces.gated_cross_attention import GatedLayers, RowImages
from lavit_jax.models.interfaces.projections import LinearProjection, MlpProjection
from lavit_jax.models.interfaces.qformer import QFormerInterface
from lavit_jax.models.interfaces.qformer_pretraining import QFormerPretraining
from lavit_jax.models.interfaces.resampler import PerceiverResampler
from lavit_jax.weights.torch import names_blip2
from lavit_jax.weights.torch import names_interfaces as names
from lavit_jax.weights.torch.mapping import PortingError, torch_shapes

EVA = jax.ShapeDtypeStruct((1, 257, 1408), jnp.float32)
CLIP = jax.ShapeDtypeStruct((1, 256, 1024), jnp.float32)
QFORMER = dict(num_queries=32, hidden_size=768, num_layers=12, num_heads=12, mlp_dim=3072)
BERT_VOCABULARY = 30523  # with the decode token
TEXT = jax.ShapeDtypeStruct((1, 4), jnp.int32)


def shapes_of(module, *inputs, **options):
  def init(*inputs):
    return module.init(jax.random.key(0), *inputs, **options)

  return jax.eval_shape(init, *inputs)['params']


def count(shapes):
  return sum(math.prod(shape) for shape in shapes.values())


def test_resampler_has_63_million():
  module = PerceiverResampler(64, num_layers=6, num_heads=8, head_dim=64, mlp_dim=4096)
  shapes = torch_shapes(names.resampler_rules(), shapes_of(module, CLIP))
  assert shapes['perceiver.latents'] == (64, 1024)
  assert shapes['perceiver.layers.5.0.to_kv.weight'] == (1024, 1024)
  assert shapes['perceiver.layers.0.0.to_q.weight'] == (512, 1024)
  assert shapes['perceiver.layers.0.0.to_out.weight'] == (1024, 512)
  assert shapes['perceiver.layers.0.1.1.weight'] == (4096, 1024)
  attention = 2 * 1024 * 512 + 1024 * 1024 + 4 * 1024
  feed_forward = 2 * 1024 * 4096 + 2 * 1024
  assert count(shapes) == 6 * (attention + feed_forward) + 64 * 1024 + 2 * 1024 == 63_019_008


@pytest.mark.parametrize('every, last', [(1, 31), (4, 31)])
def test_gated_layers_stand_before_the_last_of_their_group(every, last):
  """OpenFlamingo-9B: MPT-7B, 4096 wide, 32 layers."""
  gated = GatedLayers(32 // every, 4096, 8, 64, 4 * 4096, every)
  x = jax.ShapeDtypeStruct((1, 4, 4096), jnp.float32)
  images = RowImages(
    jax.ShapeDtypeStruct((1, 1, 64, 1024), jnp.float32), jax.ShapeDtypeStruct((1, 4), jnp.int32)
  )
  shapes = torch_shapes(names.gated_rules('transformer.blocks', every), shapes_of(gated, x, images))
  layers = {int(name.split('.')[3]) for name in shapes}
  assert layers == set(range(every - 1, 32, every)) and max(layers) == last
  prefix = f'lang_encoder.transformer.blocks.{last}.gated_cross_attn_layer.'
  names_of_one = {n.removeprefix(prefix): s for n, s in shapes.items() if n.startswith(prefix)}
  assert names_of_one == {
    'attn_gate': (1,),
    'ff_gate': (1,),
    'attn.norm.weight': (4096,),
    'attn.norm.bias': (4096,),
    'attn.to_q.weight': (512, 4096),
    'attn.to_kv.weight': (1024, 1024),
    'attn.to_out.weight': (4096, 512),
    'ff.0.weight': (4096,),
    'ff.0.bias': (4096,),
    'ff.1.weight': (16384, 4096),
    'ff.3.weight': (4096, 16384),
  }


def test_qformer_has_187_million():
  """The first stage as LAVIS has it, less ViT and tied head; the second without text."""
  module = QFormerPretraining(**QFORMER, vocab_size=BERT_VOCABULARY)
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), (1, 2)))
  tree = shapes_of(module, EVA, TEXT, TEXT, keys, decode_id=30522)
  shapes = torch_shapes(names_blip2.blip2_pretraining_rules(), tree)
  width = 768
  dense = width * width + width
  mlp = 2 * width * 3072 + 3072 + width + 2 * width
  attention = 4 * dense + 2 * width
  crossing = 2 * dense + 2 * (1408 * width + width) + 2 * width
  layers = 12 * (attention + 2 * mlp) + 6 * crossing
  embeddings = (BERT_VOCABULARY + 512 + 32) * width + 2 * width
  heads = 2 * (width * 256 + 256) + 2 * width + 2 + 1
  word_head = dense + 2 * width + BERT_VOCABULARY
  assert count(shapes) == layers + embeddings + heads + word_head + 2 * 1408
  assert round(count(shapes) / 1e6) == 187
  assert {name for name in shapes if '.crossattention.self.key.weight' in name} == {
    f'Qformer.bert.encoder.layer.{i}.crossattention.self.key.weight' for i in range(0, 12, 2)
  }
  assert shapes['query_tokens'] == (1, 32, 768) and shapes['temp'] == ()

  second = torch_shapes(
    names_blip2.blip2_rules('opt_proj'), shapes_of(QFormerInterface(2560, **QFORMER), EVA)
  )
  assert second['opt_proj.weight'] == (2560, 768)
  without_text = layers - 12 * mlp + 32 * width + 2 * width + 2 * 1408
  assert count(second) == without_text + 768 * 2560 + 2560
  assert not any('.intermediate.' in name or 'word_embeddings' in name for name in second)


@pytest.mark.parametrize('text', [False, True])
def test_qformer_of_transformers_at_full_size(text):
  transformers = pytest.importorskip('transformers')
  torch = pytest.importorskip('torch')
  small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
  prefix = 'InstructBlip' if text else 'Blip2'
  config = getattr(transformers, f'{prefix}Config')(
    vision_config=dict(hidden_size=1408, intermediate_size=8, num_hidden_layers=1),
    qformer_config=dict(vocab_size=BERT_VOCABULARY),
    text_config=dict(model_type='opt', vocab_size=8, ffn_dim=8, word_embed_proj_dim=16, **small),
  )
  with torch.device('meta'):
    peer = getattr(transformers, f'{prefix}ForConditionalGeneration')(config)
  want = {}
  for name, parameter in peer.named_parameters():
    name = name.removeprefix('model.')
    if not name.startswith(('language_model', 'vision_model.emb', 'vision_model.enc')):
      want[name] = tuple(parameter.shape)
  module = QFormerInterface(16, **QFORMER, vocab_size=BERT_VOCABULARY if text else 0)
  context = Context(instruction=TEXT) if text else Context()
  tree = jax.eval_shape(
    lambda features, context: module.init(jax.random.key(0), features, context), EVA, context
  )['params']
  assert torch_shapes(names_blip2.blip2_transformers_rules(text), tree) == want


def test_emu_at_full_size():
  module = EmuInterface(
    5120, num_tokens=32, hidden_size=768, num_layers=12, num_heads=12, head_dim=64, mlp_dim=3072
  )
  shapes = torch_shapes(names.emu_rules(), shapes_of(module, EVA))
  block = 'cformer.cformer.block.11.layer.'
  assert shapes[f'{block}1.EncDecAttention.k.weight'] == (768, 1408)
  assert shapes[f'{block}2.DenseReluDense.wi.weight'] == (3072, 768)
  assert shapes['cformer.causal_tokens'] == (1, 32, 768)
  assert shapes['cformer.projection.weight'] == (5120, 768)
  bias = 'cformer.cformer.block.0.layer.0.SelfAttention.relative_attention_bias.weight'
  assert shapes[bias] == (32, 12)
  per_block = 6 * 768**2 + 2 * 1408 * 768 + 2 * 768 * 3072 + 3 * 768
  rest = 32 * 12 + 768 + 32 * 768 + 2 * 1408 + 768 * 5120 + 5120
  assert shapes['decoder.lm.stu_regress_head.weight'] == (5120, 5120)
  assert count(shapes) == 12 * per_block + rest + 5120**2


def test_llava_at_full_size():
  linear = torch_shapes(names.llava_linear_rules(), shapes_of(LinearProjection(4096), CLIP))
  assert linear == {
    'model.mm_projector.weight': (4096, 1024),
    'model.mm_projector.bias': (4096,),
  }
  mlp = torch_shapes(names.llava_mlp_rules(), shapes_of(MlpProjection(4096), CLIP))
  assert mlp['model.mm_projector.2.weight'] == (4096, 4096)
  clip = ClipViT(224, 14, 1024, 24, 16, 4096)
  tree = shapes_of(clip, jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))
  for prefix in names.LLAVA_TOWERS:
    shapes = torch_shapes(names.llava_tower_rules(prefix), tree)
    # CLIP ViT-L/14 has 303,966,208 with its projection of 768 x 1024.
    assert count(shapes) == 303_179_776
    assert shapes[f'{prefix}embeddings.patch_embedding.weight'] == (1024, 3, 14, 14)


def test_tied_tensors_are_split_and_repeated():
  embedding, bias = np.ones((4, 2), np.float32), np.zeros(4, np.float32)
  state = {
    'Qformer.bert.embeddings.word_embeddings.weight': embedding,
    'Qformer.cls.predictions.bias': bias,
  }
  repeated = names_blip2.repeat_tied(state)
  assert repeated.keys() == state.keys() | names_blip2.BLIP2_TIED.keys()
  assert names_blip2.split_tied(repeated).keys() == state.keys()
  repeated['Qformer.cls.predictions.decoder.weight'] = 2 * embedding
  with pytest.raises(PortingError, match='decoder.weight differs from .*word_embeddings'):
    names_blip2.split_tied(repeated)


def test_biases_of_keys_must_be_zero():
  bias = np.arange(6, dtype=np.float32)
  name = 'vision_model.encoder.layers.0.self_attn.qkv.bias'
  with pytest.raises(PortingError, match='has a bias for the keys'):
    names_blip2.split_qkv_bias({name: bias})
  bias[2:4] = 0
  joined = names_blip2.join_qkv_bias(names_blip2.split_qkv_bias({name: bias}))
  assert joined.keys() == {name} and np.array_equal(joined[name], bias)
