"""The exported autoencoder has standardized latents."""

import jax
import jax.numpy as jnp
import nano
import numpy as np

from lavit_jax.models import lavit
from lavit_jax.training.stages import autoencoder
from lavit_jax.training.stages.base import (
  apply_module,
)

nano.install()
MODEL = lavit.build('nano')


def test_a_standardized_autoencoder_is_the_same_with_unit_latents(parts):
  images = jax.random.uniform(jax.random.key(1), (16, 16, 16, 3), minval=-1, maxval=1)
  mean, logvar = apply_module(MODEL.vae, parts['vae'], images, method='encode')
  one = jnp.float32(0.5)
  moments = autoencoder.Moments(
    one * mean.mean((0, 1, 2)), one * jnp.square(mean).mean((0, 1, 2)), one
  )
  new = autoencoder.standardize_latents(parts['vae'], moments, 0.25)
  new_mean, new_logvar = apply_module(MODEL.vae, new, images, method='encode')
  np.testing.assert_allclose(0.25 * new_mean.std((0, 1, 2)), 1, rtol=1e-3)
  np.testing.assert_allclose(new_mean.mean((0, 1, 2)), 0, atol=1e-3)
  deviation = mean.std((0, 1, 2))
  np.testing.assert_allclose(
    jnp.exp(new_logvar / 2) * 0.25 * deviation, jnp.exp(logvar / 2), rtol=1e-3
  )
  np.testing.assert_allclose(
    apply_module(MODEL.vae, new, new_mean, method='decode'),
    apply_module(MODEL.vae, parts['vae'], mean, method='decode'),
    atol=1e-4,
  )


def test_standardized_latents_fit_the_factors_of_the_vae(parts):
  settings = dict(
    scaling_factor=0.5, latents_mean=[0.3, -0.2, 0.1, 0.4], latents_std=[1.5, 0.5, 2.0, 0.8]
  )
  model = lavit.build('nano', settings=dict(vae=settings)).vae
  images = jax.random.uniform(jax.random.key(1), (16, 16, 16, 3), minval=-1, maxval=1)
  mean, _ = apply_module(model, parts['vae'], images, method='encode')
  moments = autoencoder.Moments(
    mean.mean((0, 1, 2)), jnp.square(mean).mean((0, 1, 2)), jnp.float32(1)
  )
  new = autoencoder.standardize_latents(
    parts['vae'], moments, model.scaling_factor, *model.moments()
  )
  new_mean, _ = apply_module(model, new, images, method='encode')
  np.testing.assert_allclose(model.to_unet(new_mean).mean((0, 1, 2)), 0, atol=1e-3)
  np.testing.assert_allclose(model.to_unet(new_mean).std((0, 1, 2)), 1, rtol=1e-3)
  np.testing.assert_allclose(
    apply_module(model, new, new_mean, method='decode'),
    apply_module(model, parts['vae'], mean, method='decode'),
    atol=1e-4,
  )
