"""The VAE against diffusers, on random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.models.vae import AutoencoderKL, postprocess, preprocess, sample_latents
from lavit_jax.porting import engine
from lavit_jax.porting.tables_pixels import vae_rows, vae_shapes

torch = pytest.importorskip('torch')
diffusers = pytest.importorskip('diffusers')

VAE = AutoencoderKL(block_out_channels=(16, 24, 32), layers_per_block=1, norm_num_groups=8)
encode = jax.jit(lambda params, pixels: VAE.apply({'params': params}, pixels, method='encode'))
decode = jax.jit(lambda params, latents: VAE.apply({'params': params}, latents, method='decode'))


def peer(module):
  """diffusers' model of the same config."""
  levels = len(module.block_out_channels)
  return diffusers.AutoencoderKL(
      block_out_channels=module.block_out_channels, layers_per_block=module.layers_per_block,
      norm_num_groups=module.norm_num_groups, latent_channels=module.latent_channels,
      down_block_types=('DownEncoderBlock2D',) * levels, up_block_types=('UpDecoderBlock2D',) * levels).eval()


@pytest.fixture(scope='module')
def ported():
  """(diffusers' model with every parameter moved off its initial value, its state, our parameters)."""
  model, generator = peer(VAE), torch.Generator().manual_seed(0)
  with torch.no_grad():
    for p in model.parameters():
      p += 0.05 * torch.randn(p.shape, generator=generator)
  state = {name: p.numpy() for name, p in model.state_dict().items()}
  return model, state, engine.from_torch(vae_rows(VAE), state, vae_shapes(VAE))


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


def test_weights_return_to_diffusers_bit_for_bit(ported):
  _, state, params = ported
  back = engine.to_torch(vae_rows(VAE), params)
  assert back.keys() == state.keys()
  for name in state:
    np.testing.assert_array_equal(back[name], state[name], err_msg=name, strict=True)


def test_old_attention_names_load_into_the_same_tree(ported):
  _, state, params = ported
  names = {'to_q': 'query', 'to_k': 'key', 'to_v': 'value', 'to_out.0': 'proj_attn'}
  for new, old in names.items():
    state = {name.replace(new, old): array for name, array in state.items()}
  assert 'encoder.mid_block.attentions.0.proj_attn.weight' in state
  jax.tree.map(np.testing.assert_array_equal, engine.from_torch(vae_rows(VAE, old_attention=True), state, vae_shapes(VAE)), params)


def test_full_size_covers_every_weight_of_diffusers():
  module = AutoencoderKL()
  shapes = vae_shapes(module)
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 83_653_863
  with torch.device('meta'):
    want = {name: tuple(p.shape) for name, p in peer(module).state_dict().items()}
  assert engine.torch_shapes(vae_rows(module), shapes) == want


def test_sampled_latents_have_the_encoders_mean_and_variance():
  mean, logvar = jnp.full((1, 64, 64, 4), 3.), jnp.full((1, 64, 64, 4), np.log(0.25))
  np.testing.assert_array_equal(sample_latents(mean, logvar), mean)
  drawn = sample_latents(mean, logvar, jax.random.key(0))
  np.testing.assert_allclose((drawn.mean(), drawn.std()), (3, 0.5), atol=0.02)


def test_logvar_is_clipped(ported):
  _, _, params = ported
  quant_conv = params['quant_conv'] | {'bias': np.array([0.] * 4 + [-100., 100., 0., 0.], np.float32)}
  _, logvar = encode(params | {'quant_conv': quant_conv}, jnp.zeros((2, 24, 16, 3)))
  np.testing.assert_array_equal(logvar[..., :2], np.broadcast_to([-30., 20.], (2, 6, 4, 2)))


def test_every_byte_survives_pre_and_postprocessing():
  images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
  pixels = preprocess(images)
  assert pixels.min() == -1 and pixels.max() == 1
  np.testing.assert_array_equal(postprocess(pixels), images)
  np.testing.assert_array_equal(postprocess(jnp.array([-7., 7.])), [0, 255])


def test_bfloat16_follows_float32(ported):
  _, _, params = ported
  pixels = jax.random.uniform(jax.random.key(1), (1, 8, 8, 3), minval=-1)
  got, want = (jax.jit(m.apply)({'params': params}, pixels)[0] for m in (VAE.clone(dtype=jnp.bfloat16), VAE))
  assert got.dtype == jnp.float32 and np.isfinite(got).all()
  assert 0 < np.abs(got - want).max() < 0.1 * np.abs(want).max()


def test_sides_must_divide():
  with pytest.raises(ValueError, match='multiples of 4'):
    jax.eval_shape(VAE.init, jax.random.key(0), jnp.zeros((1, 10, 8, 3)))
