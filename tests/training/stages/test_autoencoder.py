"""The exported autoencoder has standardized latents."""

import nano
import numpy as np
from nano import apply_module

from lavit_jax.models import lavit
from lavit_jax.training.stages import autoencoder

nano.install()
MODEL = lavit.build('nano')


def test_a_standardized_autoencoder_is_the_same_with_unit_latents(parts):
  images = np.random.default_rng(1).uniform(-1, 1, (16, 16, 16, 3)).astype(np.float32)
  mean, logvar = map(np.asarray, apply_module(MODEL.vae, parts['vae'], images, method='encode'))
  half = np.float32(0.5)
  moments = autoencoder.Moments(
    half * mean.mean((0, 1, 2)), half * np.square(mean).mean((0, 1, 2)), half
  )
  new = autoencoder.standardize_latents(parts['vae'], moments, 0.25)
  new_mean, new_logvar = map(np.asarray, apply_module(MODEL.vae, new, images, method='encode'))
  np.testing.assert_allclose(0.25 * new_mean.std((0, 1, 2)), 1, rtol=1e-3)
  np.testing.assert_allclose(new_mean.mean((0, 1, 2)), 0, atol=1e-3)
  deviation = mean.std((0, 1, 2))
  np.testing.assert_allclose(
    np.exp(new_logvar / 2) * 0.25 * deviation, np.exp(logvar / 2), rtol=1e-3
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
  images = np.random.default_rng(1).uniform(-1, 1, (16, 16, 16, 3)).astype(np.float32)
  mean = np.asarray(apply_module(model, parts['vae'], images, method='encode')[0])
  moments = autoencoder.Moments(
    mean.mean((0, 1, 2)), np.square(mean).mean((0, 1, 2)), np.float32(1)
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
