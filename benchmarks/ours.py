"""Our side of inference.py for pictures: the variant `small` on random weights. No PyTorch here."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from weights import DRAWING_GUIDANCE, STEPS, Weights, drawing_inputs

from lavit_jax.inference import compiled
from lavit_jax.models import diffusion, lavit
from lavit_jax.models.initialization import init_params
from lavit_jax.weights.torch import mapping
from lavit_jax.weights.torch.names_diffusion import unet_rules
from lavit_jax.weights.torch.names_visual import tokenizer_rules, vit_rules

SMALL = lavit.build('small')


def filled(part: str, rows: list[mapping.NameRule]) -> dict:
  """The parameters of a part, of the weights that its PyTorch names have."""
  like = jax.eval_shape(functools.partial(init_params, SMALL, names=(part,)), jax.random.key(0))[
    part
  ]
  state = {name: Weights(name, shape) for name, shape in mapping.torch_shapes(rows, like).items()}
  return mapping.from_torch(rows, state, like, lambda _, x: jnp.asarray(x))


def drawing() -> Callable[[], np.ndarray]:
  """Ten guided steps; -> latents [1, h, w, 4]."""
  params = filled('unet', unet_rules(SMALL.unet))

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


def tokenizing(images: np.ndarray) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
  """Images uint8[B, H, W, 3] to codes [B, N] and keep [B, N], the most probable patches."""
  parts = dict(vit=filled('vit', vit_rules()), tokenizer=filled('tokenizer', tokenizer_rules()))
  return lambda: [np.asarray(x) for x in compiled.tokenize(SMALL, parts, jnp.asarray(images), None)]
