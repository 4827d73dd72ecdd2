"""CLIP's tower and LLaVA's projections against transformers."""

import jax
import numpy as np
import pytest

from lavit_jax.models.clip_vit import ClipViT
from lavit_jax.models.interfaces.base import VisualInterface
from lavit_jax.models.interfaces.projections import LinearProjection, MlpProjection
from lavit_jax.models.interfaces.towers import Tower
from lavit_jax.weights.torch import names_interfaces as names
from lavit_jax.weights.torch.names_visual import clip_rules

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
from torch_peers import arrays, close, numpy_state, port, randomize  # noqa: E402

CLIP = ClipViT(16, 8, 24, num_layers=3, num_heads=4, mlp_dim=40)
PIXELS = arrays((2, 16, 16, 3))[0]
TORCH_PIXELS = torch.from_numpy(PIXELS.transpose(0, 3, 1, 2).copy())


def clip_config():
  return transformers.CLIPVisionConfig(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=16,
    patch_size=8,
  )


@pytest.fixture(scope='module')
def clip():
  """The peer and the parameters."""
  peer = randomize(transformers.CLIPVisionModel(clip_config()))
  params, unused = port(clip_rules(), numpy_state(peer), CLIP, PIXELS)
  assert not unused
  return peer, params


def test_every_block_of_clip(clip):
  peer, params = clip
  features, state = CLIP.apply({'params': params}, PIXELS, mutable='intermediates')
  want = peer(TORCH_PIXELS, output_hidden_states=True)
  stream = state['intermediates']['blocks']['stream'][0]
  for layer in range(3):
    close(stream[layer], want.hidden_states[layer + 1])
  close(features, want.last_hidden_state)


@pytest.mark.parametrize('cut', [0, 1])
@pytest.mark.parametrize('keep_cls', [False, True])
@pytest.mark.parametrize('final_norm', [False, True])
def test_a_tower_is_cut_as_told(clip, cut, keep_cls, final_norm):
  peer, params = clip
  tower = Tower(CLIP, cut, keep_cls, final_norm)
  got = tower.features_of_pixels(params, PIXELS)
  want = peer(TORCH_PIXELS, output_hidden_states=True).hidden_states[-1 - cut]
  want = peer.post_layernorm(want) if final_norm else want
  close(got, want if keep_cls else want[:, 1:])
  assert got.shape[1] == tower.num_features


def test_a_cut_leaves_a_block(clip):
  with pytest.raises(ValueError, match='cut=3'):
    Tower(CLIP, cut=3).features_of_pixels(clip[1], PIXELS)


def test_llava_from_transformers():
  """The tower's features as LLaVA selects them, through its projector."""
  config = transformers.LlavaConfig(
    vision_config=clip_config(),
    text_config=transformers.LlamaConfig(
      vocab_size=8,
      hidden_size=20,
      intermediate_size=8,
      num_hidden_layers=1,
      num_attention_heads=2,
    ),
    vision_feature_layer=-2,
    vision_feature_select_strategy='default',
  )
  peer = randomize(transformers.LlavaForConditionalGeneration(config), scale=0.5)
  state = numpy_state(peer, rename=lambda name: name.removeprefix('model.'))
  state = {name: x for name, x in state.items() if not name.startswith(('language', 'lm_head'))}
  projection = MlpProjection(20)
  features = np.zeros((2, 4, 24), np.float32)
  projector = {name: x for name, x in state.items() if name.startswith('multi_modal')}
  params, _ = port(names.llava_transformers_rules(), projector, projection, features)
  tower = {name: x for name, x in state.items() if name.startswith('vision_tower')}
  tower_params, _ = port(names.llava_tower_rules('vision_tower.'), tower, CLIP, PIXELS)
  assert state.keys() == projector.keys() | tower.keys()

  features = Tower(CLIP, cut=1).features_of_pixels(tower_params, PIXELS)
  tokens = projection.apply({'params': params}, features)
  want = peer.get_image_features(TORCH_PIXELS)
  want = getattr(want, 'pooler_output', want)
  want = torch.stack(list(want)) if isinstance(want, (list, tuple)) else want
  close(tokens.vectors, want)
  assert tokens.mask.all() and tokens.mask.shape == (2, projection.num_vectors(4))


@pytest.mark.parametrize(
  'module, rules, peer',
  [
    (LinearProjection(20), names.llava_linear_rules(), torch.nn.Linear(24, 20)),
    (
      MlpProjection(20),
      names.llava_mlp_rules(),
      torch.nn.Sequential(torch.nn.Linear(24, 20), torch.nn.GELU(), torch.nn.Linear(20, 20)),
    ),
  ],
)
def test_projections_of_the_authors_files(module, rules, peer):
  features = arrays((2, 5, 24))[0]
  state = numpy_state(randomize(peer), rename=lambda name: f'model.mm_projector.{name}')
  params, unused = port(rules, state, module, features)
  assert not unused and isinstance(module, VisualInterface)
  close(module.apply({'params': params}, features).vectors, peer(torch.from_numpy(features)))


def test_gradients_of_a_projection():
  module = MlpProjection(20)
  features, weights = arrays((2, 5, 24), (2, 5, 20))
  linear = torch.nn.Linear
  peer = randomize(torch.nn.Sequential(linear(24, 20), torch.nn.GELU(), linear(20, 20)))
  rename = 'model.mm_projector.{}'.format
  params, _ = port(names.llava_mlp_rules(), numpy_state(peer, rename=rename), module, features)
  (peer(torch.from_numpy(features)) * torch.from_numpy(weights)).sum().backward()
  grads = jax.grad(lambda p: (module.apply({'params': p}, features).vectors * weights).sum())(
    params
  )
  close(grads['fc1']['kernel'].T, peer[0].weight.grad)
  close(grads['fc2']['bias'], peer[2].bias.grad)
