"""Stage 1b: the condition, the target of the scheduler, drawn images."""

import jax
import jax.numpy as jnp
import nano
import numpy as np
import pytest
from nano import apply_module

from lavit_jax.models import lavit
from lavit_jax.models.initialization import init_params
from lavit_jax.training.stages import build_stage

nano.install()
MODEL = lavit.build('nano')


@pytest.fixture(scope='module')
def detokenizer(parts):
  def losses(drop):
    stage = nano.run('detokenizer', detokenizer__drop_condition=drop).stage
    params, state = nano.init_stage(stage, parts)
    return (
      stage,
      params,
      nano.jit(
        lambda params, batch: stage.loss(params, parts, state, batch, jax.random.key(1), True)[0]
      ),
    )

  return losses


def test_the_condition_is_dropped(detokenizer, batch):
  """The context head matters only where the condition is not dropped."""
  for drop, matters in ((1.0, False), (0.0, True)):
    _, params, loss = detokenizer(drop)
    head = jax.tree.map(jnp.zeros_like, params['decoder']['context_proj_0'])
    other = {**params, 'decoder': {**params['decoder'], 'context_proj_0': head}}
    assert (loss(params, batch) != loss(other, batch)) == matters


def test_the_unet_reads_the_vectors_of_an_interface(parts, batch):
  run = nano.run('detokenizer', detokenizer__condition='emu', detokenizer__drop_condition=0.0)
  assert run.stage.modules.required == ('vit', 'interface', 'vae') and not run.optimizer.freeze
  assert run.model.unet.cross_attention_dim == 32  # as wide as the language model
  shapes = jax.eval_shape(lambda: init_params(run.model, jax.random.key(0), ('interface', 'unet')))
  rng = np.random.default_rng(0)
  fresh = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), shapes)
  params = {'unet': fresh['unet']}
  assert list(run.stage.export(params, {})) == ['unet']

  @nano.jit
  def loss(interface):
    frozen = dict(vit=parts['vit'], vae=parts['vae'], interface=interface)
    value, (state, metrics) = run.stage.loss(params, frozen, {}, batch, jax.random.key(1), True)
    assert state == {} and list(metrics) == ['latent_std']
    return value

  blank = dict(
    fresh['interface'], vit_proj=jax.tree.map(np.zeros_like, fresh['interface']['vit_proj'])
  )
  assert abs(loss(fresh['interface']) - loss(blank)) > 1e-3


@pytest.mark.parametrize('kind', ['epsilon', 'v_prediction', 'sample'])
def test_the_detokenizer_learns_the_target_of_the_scheduler(parts, batch, kind):
  """The loss of a U-Net that gives zeros is the square of the target, under the settings."""
  from diffusers import DDIMScheduler

  vae = dict(
    scaling_factor=0.5, latents_mean=[0.3, -0.2, 0.1, 0.4], latents_std=[1.5, 0.5, 2.0, 0.8]
  )
  scheduler = dict(
    prediction_type=kind,
    beta_schedule='linear',
    beta_start=1e-4,
    beta_end=0.02,
    num_train_timesteps=50,
    rescale_betas_zero_snr=True,
  )
  run = nano.run('detokenizer')
  model = lavit.build('nano', settings=dict(vae=vae, scheduler=scheduler))
  stage = build_stage('detokenizer', run.options, model, run.layout)
  params, state = nano.init_stage(
    stage, {name: parts[name] for name in ('unet', 'decoder', 'uncond_embeddings')}
  )
  params['unet'] = {
    **params['unet'],
    'conv_out': jax.tree.map(jnp.zeros_like, params['unet']['conv_out']),
  }
  frozen = {name: parts[name] for name in ('vit', 'tokenizer', 'vae')}
  value, _ = nano.jit(stage.loss, static_argnums=5)(
    params, frozen, state, batch, jax.random.key(5), True
  )

  fold_rows = jax.vmap(jax.random.fold_in, (None, 0))
  keys = nano.jit(jax.vmap(fold_rows, (0, None)))(
    jax.random.split(jax.random.key(5), 5), np.arange(8)
  )
  normal = nano.jit(jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:])))
  mean, logvar = apply_module(
    MODEL.vae, parts['vae'], batch['image'] / np.float32(127.5) - 1, method='encode'
  )
  mean, logvar, draw = (np.asarray(x, np.float64) for x in (mean, logvar, normal(keys[0])))
  latents = mean + np.exp(logvar / 2) * draw
  # As StableDiffusionXLImg2ImgPipeline.
  latents = (latents - vae['latents_mean']) * vae['scaling_factor'] / vae['latents_std']
  t = np.asarray(nano.jit(jax.vmap(lambda key: jax.random.randint(key, (), 0, 50)))(keys[3]))
  noise = np.asarray(normal(keys[4]), np.float64)
  alpha = DDIMScheduler(**scheduler).alphas_cumprod.double().numpy()[t][:, None, None, None]
  target = dict(
    epsilon=noise, v_prediction=alpha**0.5 * noise - (1 - alpha) ** 0.5 * latents, sample=latents
  )[kind]
  assert float(value) == pytest.approx(np.square(target).mean(), rel=1e-4)


def test_detokenizer_draws(parts, batch):
  stage = nano.run('detokenizer').stage
  params, state = nano.init_stage(stage, parts)
  rows = nano.jit(lambda: stage.draw(params, parts, state, batch, jax.random.key(1), num_steps=2))()
  assert [(row.shape, row.dtype) for row in rows] == [((8, 32, 32, 3), jnp.uint8)] * 3
