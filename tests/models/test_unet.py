"""The U-Net against diffusers, on random weights."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.models.unet import UNet
from lavit_jax.weights.torch import mapping
from lavit_jax.weights.torch.names_diffusion import unet_rules, unet_shapes

torch = pytest.importorskip('torch')
diffusers = pytest.importorskip('diffusers')

SD15 = UNet(
  block_out_channels=(16, 32),
  layers_per_block=2,
  down_block_attention=(True, False),
  transformer_layers=(1, 1),
  num_heads=(4, 4),
  cross_attention_dim=24,
  norm_num_groups=8,
)
TINY = UNet(  # one level, since gradients of it compile several times
  block_out_channels=(8,),
  layers_per_block=1,
  down_block_attention=(True,),
  transformer_layers=(1,),
  num_heads=(2,),
  cross_attention_dim=12,
  norm_num_groups=4,
)
SDXL = UNet(
  block_out_channels=(16, 32, 48),
  layers_per_block=1,
  down_block_attention=(False, True, True),
  transformer_layers=(1, 2, 3),
  num_heads=(2, 4, 6),
  cross_attention_dim=24,
  norm_num_groups=8,
  use_linear_projection=True,
  addition_time_embed_dim=8,
  pooled_dim=20,
)
SDXL_FULL = UNet(
  block_out_channels=(320, 640, 1280),
  down_block_attention=(False, True, True),
  transformer_layers=(1, 2, 10),
  num_heads=(5, 10, 20),
  cross_attention_dim=2048,
  use_linear_projection=True,
  addition_time_embed_dim=256,
  pooled_dim=1280,
)


def peer(module):
  """diffusers' model of the same config."""

  def blocks(direction, attention):
    return tuple(
      f'CrossAttn{direction}Block2D' if has else f'{direction}Block2D' for has in attention
    )

  added = {}
  if module.addition_time_embed_dim is not None:
    added = dict(
      addition_embed_type='text_time',
      addition_time_embed_dim=module.addition_time_embed_dim,
      projection_class_embeddings_input_dim=module.pooled_dim + 6 * module.addition_time_embed_dim,
    )
  return diffusers.UNet2DConditionModel(
    block_out_channels=module.block_out_channels,
    layers_per_block=module.layers_per_block,
    down_block_types=blocks('Down', module.down_block_attention),
    up_block_types=blocks('Up', module.down_block_attention[::-1]),
    transformer_layers_per_block=module.transformer_layers,
    attention_head_dim=module.num_heads,
    cross_attention_dim=module.cross_attention_dim,
    norm_num_groups=module.norm_num_groups,
    use_linear_projection=module.use_linear_projection,
    **added,
  ).eval()


@functools.cache
def ported(module):
  """(diffusers' model with changed parameters, its state, our variables)."""
  model = peer(module)
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for p in model.parameters():
      p += 0.05 * torch.randn(p.shape, generator=generator)
  state = {name: p.numpy() for name, p in model.state_dict().items()}
  params = mapping.from_state_dict(unet_rules(module), state, unet_shapes(module))
  return model, state, {'params': params}


def inputs(module, batch=2, height=8, width=12, rows=7):
  rng = np.random.default_rng(0)
  added = None
  if module.addition_time_embed_dim is not None:
    pooled = rng.standard_normal((batch, module.pooled_dim), np.float32)
    added = (pooled, rng.integers(0, 1024, (batch, 6)).astype(np.float32))
  latents = rng.standard_normal((batch, height, width, 4), np.float32)
  context = rng.standard_normal((batch, rows, module.cross_attention_dim), np.float32)
  return latents, np.array([3, 741]), context, added


def nchw(x):
  return torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy())


MASK = np.array([[1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 0, 0, 0]], bool)


@pytest.mark.parametrize(
  'module,mask', [(SD15, None), (SD15, MASK), (SDXL, MASK)], ids=['sd15', 'sd15-mask', 'sdxl-mask']
)
def test_parity_with_diffusers(module, mask):
  model, _, params = ported(module)
  latents, t, context, added = inputs(module)
  condition = added and dict(
    text_embeds=torch.from_numpy(added[0]), time_ids=torch.from_numpy(added[1])
  )
  with torch.no_grad():
    want = model(
      nchw(latents),
      torch.from_numpy(t),
      torch.from_numpy(context),
      added_cond_kwargs=condition,
      encoder_attention_mask=None if mask is None else torch.from_numpy(mask),
    ).sample
  got = jax.jit(module.apply)(params, latents, t, context, mask, added)
  assert got.dtype == jnp.float32
  assert np.std(want.numpy()) > 0.1
  np.testing.assert_allclose(got, np.moveaxis(want.numpy(), 1, -1), rtol=0, atol=1e-4)


@pytest.mark.parametrize('module', [SD15, SDXL], ids=['sd15', 'sdxl'])
def test_weights_return_to_diffusers_bit_for_bit(module):
  _, state, params = ported(module)
  back = mapping.to_torch(unet_rules(module), params['params'])
  assert back.keys() == state.keys()
  for name in state:
    np.testing.assert_array_equal(back[name], state[name], err_msg=name, strict=True)


@pytest.mark.parametrize(
  'module,size', [(UNet(), 859_520_964), (SDXL_FULL, 2_567_463_684)], ids=['sd15', 'sdxl']
)
def test_full_size_covers_every_weight_of_diffusers(module, size):
  shapes = unet_shapes(module)
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == size
  with torch.device('meta'):
    want = {name: tuple(p.shape) for name, p in peer(module).state_dict().items()}
  assert mapping.torch_shapes(unet_rules(module), shapes) == want


def test_masked_rows_have_no_influence():
  _, _, params = ported(TINY)
  latents, t, context, _ = inputs(TINY, height=2, width=2)
  changed = np.where(MASK[..., None], context, 100.0)
  apply = jax.jit(TINY.apply)
  got = apply(params, latents, t, context, MASK)
  np.testing.assert_array_equal(got, apply(params, latents, t, changed, MASK))
  seen = np.ones_like(MASK)
  assert not np.allclose(
    apply(params, latents, t, context, seen), apply(params, latents, t, changed, seen)
  )
  short = apply(params, latents, t, context[:, MASK[1]], np.ones((2, MASK[1].sum()), bool))
  np.testing.assert_allclose(got[1], short[1], atol=1e-5)


def test_bfloat16_follows_float32():
  module = TINY.clone(dtype=jnp.bfloat16)
  assert {leaf.dtype for leaf in jax.tree.leaves(unet_shapes(module))} == {jnp.dtype('float32')}
  _, _, params = ported(TINY)
  latents, t, context, _ = inputs(TINY, height=2, width=2)
  got, want = (jax.jit(m.apply)(params, latents, t, context, MASK) for m in (module, TINY))
  assert got.dtype == jnp.float32 and np.isfinite(got).all()
  assert 0 < np.abs(got - want).max() < 0.1 * np.abs(want).max()


def gradient(module):
  """Of the sum of squares of a prediction, by every parameter of TINY."""
  _, _, params = ported(TINY)
  latents, t, context, _ = inputs(TINY, height=2, width=2)
  loss = jax.jit(
    jax.grad(lambda params: jnp.square(module.apply(params, latents, t, context)).sum())
  )
  return jax.tree.leaves(loss(params)), str(loss.trace(params).jaxpr)


@pytest.fixture(scope='module')
def plain_gradient():
  return gradient(TINY)


@pytest.mark.parametrize('remat', ['full', 'minimal'])
def test_remat_changes_no_gradient(remat, plain_gradient):
  want, plain = plain_gradient
  got, program = gradient(TINY.clone(remat=remat))
  assert 'remat' in program and 'remat' not in plain
  for a, b in zip(got, want):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max())


@pytest.mark.parametrize(
  'change,message',
  [
    (dict(num_heads=(4,)), 'num_heads=(4,) must have 2 entries'),
    (dict(cross_attention_dim=32), 'context is 24 wide'),
    (dict(addition_time_embed_dim=8), 'added='),
    (dict(norm_num_groups=5), '16 channels do not divide'),
  ],
)
def test_errors_name_the_field(change, message):
  latents, t, context, _ = inputs(SD15)
  with pytest.raises(ValueError, match=re.escape(message)):
    jax.eval_shape(SD15.clone(**change).init, jax.random.key(0), latents, t, context)


def test_latents_must_halve():
  latents, t, context, _ = inputs(SD15, height=7)
  with pytest.raises(ValueError, match='multiples of 2'):
    jax.eval_shape(SD15.init, jax.random.key(0), latents, t, context)
