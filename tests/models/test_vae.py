"""The VAE against diffusers, on random weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.models.vae import (
  AutoencoderKL,
  decode_tiled,
  postprocess,
  preprocess,
  sample_latents,
)
from lavit_jax.weights.torch import mapping
from lavit_jax.weights.torch.names_diffusion import vae_rules, vae_shapes

torch = pytest.importorskip('torch')
diffusers = pytest.importorskip('diffusers')

VAE = AutoencoderKL(block_out_channels=(16, 24, 32), layers_per_block=1, norm_num_groups=8)
encode = jax.jit(lambda params, pixels: VAE.apply({'params': params}, pixels, method='encode'))
decode = jax.jit(lambda params, latents: VAE.apply({'params': params}, latents, method='decode'))


def peer(module):
  """diffusers' model of the same config."""
  levels = len(module.block_out_channels)
  return diffusers.AutoencoderKL(
    block_out_channels=module.block_out_channels,
    layers_per_block=module.layers_per_block,
    norm_num_groups=module.norm_num_groups,
    latent_channels=module.latent_channels,
    down_block_types=('DownEncoderBlock2D',) * levels,
    up_block_types=('UpDecoderBlock2D',) * levels,
  ).eval()


@pytest.fixture(scope='module')
def ported():
  """(diffusers' model with changed parameters, its state, our parameters)."""
  model = peer(VAE)
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for p in model.parameters():
      p += 0.05 * torch.randn(p.shape, generator=generator)
  state = {name: p.numpy() for name, p in model.state_dict().items()}
  return model, state, mapping.from_state_dict(vae_rules(VAE), state, vae_shapes(VAE))


def nchw(x):
  return torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy())


def test_encode_matches_diffusers(ported):
  model, _, params = ported
  pixels = np.random.default_rng(0).uniform(-1, 1, (2, 24, 16, 3)).astype(np.float32)
  with torch.no_grad():
    want = model.encode(nchw(pixels)).latent_dist
  mean, logvar = encode(params, pixels)
  assert mean.shape == (2, 6, 4, 4) and np.std(mean) > 0.1
  np.testing.assert_allclose(mean, np.moveaxis(want.mean.numpy(), 1, -1), rtol=0, atol=1e-4)
  np.testing.assert_allclose(logvar, np.moveaxis(want.logvar.numpy(), 1, -1), rtol=0, atol=1e-4)


def test_decode_matches_diffusers(ported):
  model, _, params = ported
  latents = np.random.default_rng(1).standard_normal((2, 6, 4, 4), np.float32)
  with torch.no_grad():
    want = model.decode(nchw(latents)).sample
  got = decode(params, latents)
  assert got.shape == (2, 24, 16, 3) and np.std(got) > 0.1
  np.testing.assert_allclose(got, np.moveaxis(want.numpy(), 1, -1), rtol=0, atol=1e-4)


def test_tiles_match_diffusers(ported):
  model, _, params = ported
  # Tiles begin at 0, 6, 12 and at 0, 6.
  latents = np.random.default_rng(2).standard_normal((2, 20, 14, 4), np.float32)
  model.tile_latent_min_size = 8
  model.tile_sample_min_size = 32
  decode_tile = functools.partial(decode, params)
  got = jax.jit(lambda latents: decode_tiled(decode_tile, latents, 4, 8))(latents)

  def torch_decode(x):
    with torch.no_grad():
      return np.moveaxis(model.decode(nchw(x)).sample.numpy(), 1, -1)

  model.enable_tiling()
  want = torch_decode(latents)
  model.disable_tiling()
  whole = torch_decode(latents)
  last = torch_decode(latents[:, 12:, 6:])
  assert np.abs(want - whole).max() > 0.05  # a tile does not see the others
  # That of diffusers has more tiles, from 18 and from 12 on.
  np.testing.assert_allclose(got[:, :72, :48], want[:, :72, :48], rtol=0, atol=1e-4)
  # The last tile, behind its fade.
  np.testing.assert_allclose(got[:, 56:, 32:], last[:, 8:, 8:], rtol=0, atol=1e-4)


@pytest.mark.parametrize('side', [5, 8, 9, 14, 15, 26])
def test_tiles_cover_an_image_and_add_up_to_one(side):
  def ones(latents):
    return jnp.ones((1, latents.shape[1] * 2, latents.shape[2] * 2, 3))

  out = decode_tiled(ones, jnp.zeros((1, side, 11, 4)), 2, 8)
  np.testing.assert_allclose(out, jnp.ones((1, 2 * side, 22, 3)), atol=1e-6)


def test_memory_is_that_of_one_tile(ported):
  _, _, params = ported
  latents = jax.ShapeDtypeStruct((1, 64, 64, 4), jnp.float32)
  decode_whole = functools.partial(decode, params)

  def memory(function):
    return jax.jit(function).lower(latents).compile().memory_analysis().temp_size_in_bytes

  tiled = memory(lambda x: decode_tiled(decode_whole, x, 4, 16))
  assert tiled < memory(decode_whole) / 5


def test_an_image_of_one_tile_is_decoded_whole(ported):
  _, _, params = ported
  latents = np.random.default_rng(3).standard_normal((1, 6, 8, 4), np.float32)
  np.testing.assert_allclose(
    decode_tiled(functools.partial(decode, params), latents, 4, 8),
    decode(params, latents),
    atol=1e-5,
  )


def test_weights_return_to_diffusers_bit_for_bit(ported):
  _, state, params = ported
  back = mapping.to_torch(vae_rules(VAE), params)
  assert back.keys() == state.keys()
  for name in state:
    np.testing.assert_array_equal(back[name], state[name], err_msg=name, strict=True)


def test_old_attention_names_load_into_the_same_tree(ported):
  _, state, params = ported
  names = {'to_q': 'query', 'to_k': 'key', 'to_v': 'value', 'to_out.0': 'proj_attn'}
  for new, old in names.items():
    state = {name.replace(new, old): array for name, array in state.items()}
  assert 'encoder.mid_block.attentions.0.proj_attn.weight' in state
  jax.tree.map(
    np.testing.assert_array_equal,
    mapping.from_state_dict(vae_rules(VAE, old_attention=True), state, vae_shapes(VAE)),
    params,
  )


def test_full_size_covers_every_weight_of_diffusers():
  module = AutoencoderKL()
  shapes = vae_shapes(module)
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 83_653_863
  with torch.device('meta'):
    want = {name: tuple(p.shape) for name, p in peer(module).state_dict().items()}
  assert mapping.torch_shapes(vae_rules(module), shapes) == want


def test_sampled_latents_have_the_encoders_mean_and_variance():
  mean = jnp.full((1, 64, 64, 4), 3.0)
  logvar = jnp.full((1, 64, 64, 4), np.log(0.25))
  np.testing.assert_array_equal(sample_latents(mean, logvar), mean)
  drawn = sample_latents(mean, logvar, jax.random.key(0))
  np.testing.assert_allclose((drawn.mean(), drawn.std()), (3, 0.5), atol=0.02)


def test_logvar_is_clipped(ported):
  _, _, params = ported
  bias = np.array([0.0] * 4 + [-100.0, 100.0, 0.0, 0.0], np.float32)
  quant_conv = params['quant_conv'] | {'bias': bias}
  _, logvar = encode(params | {'quant_conv': quant_conv}, jnp.zeros((2, 24, 16, 3)))
  np.testing.assert_array_equal(logvar[..., :2], np.broadcast_to([-30.0, 20.0], (2, 6, 4, 2)))


def test_every_byte_survives_pre_and_postprocessing():
  images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
  pixels = preprocess(images)
  assert pixels.min() == -1 and pixels.max() == 1
  np.testing.assert_array_equal(postprocess(pixels), images)
  np.testing.assert_array_equal(postprocess(jnp.array([-7.0, 7.0])), [0, 255])


def test_bfloat16_follows_float32(ported):
  _, _, params = ported
  pixels = jax.random.uniform(jax.random.key(1), (1, 8, 8, 3), minval=-1)
  got, want = (
    jax.jit(m.apply)({'params': params}, pixels)[0] for m in (VAE.clone(dtype=jnp.bfloat16), VAE)
  )
  assert got.dtype == jnp.float32 and np.isfinite(got).all()
  assert 0 < np.abs(got - want).max() < 0.1 * np.abs(want).max()


def test_sides_must_divide():
  with pytest.raises(ValueError, match='multiples of 4'):
    jax.eval_shape(VAE.init, jax.random.key(0), jnp.zeros((1, 10, 8, 3)))
