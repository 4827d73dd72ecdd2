"""The VAE against diffusers, on random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.models.vae import AutoencoderKL, postprocess, preprocess, sample_latents
from lavit_jax.porting import engine
from lavit_jax.porting.tables_pixels import rows_vae

torch = pytest.importorskip('torch')
diffusers = pytest.importorskip('diffusers')

VAE = AutoencoderKL(block_out_channels=(16, 24, 32), layers_per_block=1, norm_num_groups=8)


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
    return model, state, engine.from_torch(rows_vae(VAE), state, None)


def nchw(x):
    return torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy())


def test_encode_matches_diffusers(ported):
    model, _, params = ported
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 24, 16, 3)).astype(np.float32)
    with torch.no_grad():
        want = model.encode(nchw(pixels)).latent_dist
    mean, logvar = VAE.apply({'params': params}, pixels, method='encode')
    assert mean.shape == (2, 6, 4, 4) and np.std(mean) > 0.1
    np.testing.assert_allclose(mean, np.moveaxis(want.mean.numpy(), 1, -1), rtol=0, atol=1e-4)
    np.testing.assert_allclose(logvar, np.moveaxis(want.logvar.numpy(), 1, -1), rtol=0, atol=1e-4)


def test_decode_matches_diffusers(ported):
    model, _, params = ported
    latents = np.random.default_rng(1).standard_normal((2, 6, 4, 4), np.float32)
    with torch.no_grad():
        want = model.decode(nchw(latents)).sample
    got = VAE.apply({'params': params}, latents, method='decode')
    assert got.shape == (2, 24, 16, 3) and np.std(got) > 0.1
    np.testing.assert_allclose(got, np.moveaxis(want.numpy(), 1, -1), rtol=0, atol=1e-4)


def test_weights_return_to_diffusers_bit_for_bit(ported):
    _, state, params = ported
    back = engine.to_torch(rows_vae(VAE), params)
    assert back.keys() == state.keys()
    for name in state:
        np.testing.assert_array_equal(back[name], state[name], err_msg=name, strict=True)


def test_old_attention_names_load_into_the_same_tree(ported):
    _, state, params = ported
    names = {'to_q': 'query', 'to_k': 'key', 'to_v': 'value', 'to_out.0': 'proj_attn'}
    for new, old in names.items():
        state = {name.replace(new, old): array for name, array in state.items()}
    assert 'encoder.mid_block.attentions.0.proj_attn.weight' in state
    jax.tree.map(np.testing.assert_array_equal, engine.from_torch(rows_vae(VAE, old_attention=True), state, None), params)


def test_full_size_covers_every_weight_of_diffusers():
    module = AutoencoderKL()
    params = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))['params']
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 83_653_863
    with torch.device('meta'):
        assert {row[0] for row in rows_vae(module)} == peer(module).state_dict().keys()


def test_sampled_latents_have_the_encoders_mean_and_variance():
    mean, logvar = jnp.full((1, 64, 64, 4), 3.), jnp.full((1, 64, 64, 4), np.log(0.25))
    np.testing.assert_array_equal(sample_latents(mean, logvar), mean)
    drawn = sample_latents(mean, logvar, jax.random.key(0))
    np.testing.assert_allclose((drawn.mean(), drawn.std()), (3, 0.5), atol=0.02)


def test_logvar_is_clipped():
    params = VAE.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    params['params']['quant_conv']['bias'] = jnp.array([0.] * 4 + [-100., 100., 0., 0.])
    _, logvar = VAE.apply(params, jnp.zeros((1, 8, 8, 3)), method='encode')
    np.testing.assert_array_equal(logvar[..., :2], np.broadcast_to([-30., 20.], (1, 2, 2, 2)))


def test_every_byte_survives_pre_and_postprocessing():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    pixels = preprocess(images)
    assert pixels.min() == -1 and pixels.max() == 1
    np.testing.assert_array_equal(postprocess(pixels), images)
    np.testing.assert_array_equal(postprocess(jnp.array([-7., 7.])), [0, 255])


def test_bfloat16_is_finite():
    module = VAE.clone(dtype=jnp.bfloat16)
    pixels = jax.random.uniform(jax.random.key(1), (1, 8, 8, 3), minval=-1)
    params = module.init(jax.random.key(0), pixels)
    got, want = (m.apply(params, pixels)[0] for m in (module, VAE))
    assert got.dtype == jnp.float32 and np.isfinite(got).all()
    assert 0 < np.abs(got - want).max() < 0.1 * np.abs(want).max()


def test_sides_must_divide():
    with pytest.raises(ValueError, match='multiples of 4'):
        jax.eval_shape(VAE.init, jax.random.key(0), jnp.zeros((1, 10, 8, 3)))
