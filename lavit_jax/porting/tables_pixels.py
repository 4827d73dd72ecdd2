"""diffusers' names for the parameters of the U-Net and the VAE.

Our names follow diffusers' closely enough for one list of substitutions; the rows come from the parameter tree that a
config makes, so every size of both is covered.
"""

import re

import jax
import jax.numpy as jnp
from flax import traverse_util

from lavit_jax.models.unet import UNet
from lavit_jax.models.vae import AutoencoderKL
from lavit_jax.porting.engine import Row

NAMES = (
    (r'\b(down|up)_(\d+)_', r'\1_blocks/\2/'),
    (r'\bmid[_/]', 'mid_block/'),
    (r'\b(resnet|attention)_(\d+)', r'\1s/\2'),
    (r'\b(down|up)sample/', r'\1samplers/0/'),
    (r'\bblocks/', 'transformer_blocks/{i}/'),
    (r'\bff/proj', 'ff/net/0/proj'),
    (r'\bff/out', 'ff/net/2'),
    (r'\bto_out', 'to_out/0'),
    (r'(kernel|scale)$', 'weight'),
)
# What diffusers called the VAE's attention before it shared the U-Net's: the names in older files of SD 1.5.
OLD_ATTENTION = (('to_q', 'query'), ('to_k', 'key'), ('to_v', 'value'), ('to_out/0', 'proj_attn'))


def rows_unet(module: UNet) -> list[Row]:
    """Rows of diffusers' UNet2DConditionModel for a U-Net of this config."""
    side = 2 ** (len(module.block_out_channels) - 1)
    added = None
    if module.addition_time_embed_dim is not None:
        added = jnp.zeros((1, module.pooled_dim)), jnp.zeros((1, 6))
    tree = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, side, side, module.in_channels)), jnp.zeros(1),
                          jnp.zeros((1, 1, module.cross_attention_dim)), None, added)
    return _rows(tree['params'], NAMES, () if module.use_linear_projection else ('proj_in', 'proj_out'))


def rows_vae(module: AutoencoderKL, old_attention: bool = False) -> list[Row]:
    """Rows of diffusers' AutoencoderKL for a VAE of this config; `old_attention` for files of before diffusers 0.12."""
    side = module.factor
    tree = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))
    return _rows(tree['params'], NAMES + OLD_ATTENTION * old_attention, ())


def _rows(params, names, convolved: tuple[str, ...]) -> list[Row]:
    """One row a leaf; the layers in `convolved` are Dense here and 1x1 convolutions in diffusers."""
    rows = []
    for path, leaf in traverse_util.flatten_dict(params).items():
        flax_path = torch_name = '/'.join(path)
        for pattern, replacement in names:
            torch_name = re.sub(pattern, replacement, torch_name)
        if path[-1] != 'kernel':
            transform = 'copy'
        elif leaf.ndim == 4:
            transform = 'conv'
        else:
            transform = 'conv1x1_to_linear' if path[-2] in convolved else 'linear'
        rows.append(Row(torch_name.replace('/', '.'), flax_path, transform))
    return rows
