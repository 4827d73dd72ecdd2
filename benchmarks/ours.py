"""The JAX side of inference.py for images: the variant `small`, random weights. No PyTorch here."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from weights import DRAWING_GUIDANCE, STEPS, Weights, drawing_inputs

from lavit_jax.inference import compiled
from lavit_jax.models import diffusion, lavit, vit
from lavit_jax.models.initialization import init_params
from lavit_jax.weights.torch import mapping
from lavit_jax.weights.torch.names_diffusion import unet_rules
from lavit_jax.weights.torch.names_visual import tokenizer_rules, vit_rules

SMALL = lavit.build('small')


def module_params(module: str, rules: list[mapping.NameRule]) -> dict:
  """The parameters of a module, with the weights of its PyTorch names."""
  init = functools.partial(init_params, SMALL, names=(module,))
  like = jax.eval_shape(init, jax.random.key(0))[module]
  shapes = mapping.torch_shapes(rules, like)
  state = {name: Weights(name, shape) for name, shape in shapes.items()}
  return mapping.from_state_dict(rules, state, like, lambda _, x: jnp.asarray(x))


def drawing() -> Callable[[], np.ndarray]:
  """A function that makes ten guided steps; returns latents f32[1, h, w, 4]."""
  params = module_params('unet', unet_rules(SMALL.unet))

  @jax.jit
  def draw(params, noise, condition, null):
    return diffusion.sample_latents(
      functools.partial(SMALL.unet.apply, {'params': params}),
      noise,
      condition,
      null,
      steps=STEPS,
      guidance_scale=DRAWING_GUIDANCE,
    )

  return lambda: np.asarray(draw(params, *drawing_inputs()))


def patch_features(images: np.ndarray) -> jax.Array:
  """The features f32[B, N, D] of images uint8[B, H, W, 3]."""
  variables = {'params': module_params('vit', vit_rules())}
  return jax.jit(SMALL.vit.apply)(variables, vit.preprocess(images))[:, 1:]


def tokenizing(
  images: np.ndarray, modules: lavit.LavitModules | None = None
) -> Callable[[], list[np.ndarray]]:
  """A function that tokenizes images uint8[B, H, W, 3] with the most probable patches.

  It returns codes i32[B, N] and keep bool[B, N]. The modules are those of `small`.
  """
  params = {
    'vit': module_params('vit', vit_rules()),
    'tokenizer': module_params('tokenizer', tokenizer_rules()),
  }

  def tokenize():
    outputs = compiled.tokenize(modules or SMALL, params, jnp.asarray(images), None)
    return [np.asarray(x) for x in outputs]

  return tokenize
