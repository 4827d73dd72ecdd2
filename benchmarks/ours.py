"""Our side of inference.py for pictures: the variant `small` on random weights. No PyTorch here."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lavit_jax.inference import diffusion, programs
from lavit_jax.models import lavit
from lavit_jax.models.initial import initial_parts
from lavit_jax.porting import engine
from lavit_jax.porting.tables_pixels import unet_rows
from lavit_jax.porting.tables_visual import tokenizer_rows, vit_rows
from weights import DRAWING_GUIDANCE, STEPS, Weights, drawing_inputs

SMALL = lavit.build('small')


def filled(part: str, rows: list[engine.Row]) -> dict:
  """The parameters of a part, of the weights that its PyTorch names have."""
  like = jax.eval_shape(functools.partial(initial_parts, SMALL, names=(part,)), jax.random.key(0))[part]
  state = {name: Weights(name, shape) for name, shape in engine.torch_shapes(rows, like).items()}
  return engine.from_torch(rows, state, like, lambda _, x: jnp.asarray(x))


def drawing() -> Callable[[], np.ndarray]:
  """Ten guided steps; -> latents [1, h, w, 4]."""
  params = filled('unet', unet_rows(SMALL.unet))

  @jax.jit
  def draw(params, noise, condition, null):
    return diffusion.sample(functools.partial(SMALL.unet.apply, {'params': params}), noise, condition, null, steps=STEPS,
                            guidance_scale=DRAWING_GUIDANCE)

  return lambda: np.asarray(draw(params, *drawing_inputs()))


def tokenizing(images: np.ndarray) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
  """Images uint8[B, H, W, 3] to codes [B, N] and keep [B, N], the most probable patches."""
  parts = dict(vit=filled('vit', vit_rows()), tokenizer=filled('tokenizer', tokenizer_rows()))
  return lambda: [np.asarray(x) for x in programs.tokenize(SMALL, parts, jnp.asarray(images), None)]
