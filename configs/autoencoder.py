"""The KL-autoencoder of the tiny variant. Larger variants use the one of Stable Diffusion.

    lavit train --config configs/autoencoder.py:tiny --workdir runs/autoencoder

Exports `vae`. Its latents have mean 0 and standard deviation 1.
"""

from ml_collections import ConfigDict

from lavit_jax.errors import UserError
from lavit_jax.models import lavit


def get_config(variant: str = 'tiny') -> ConfigDict:
  lavit.variant_config(variant)  # an unknown variant is an error that names the nearest one
  if variant != 'tiny':
    raise UserError(f'configs/autoencoder.py trains tiny only, not {variant!r}: the autoencoders of larger variants are ported')
  config = ConfigDict(dict(
      stage='autoencoder', variant=variant, seed=0, batch_size=8, num_steps=4_000, accumulate=1,
      dtype='float32', remat='none', mesh=dict(data=-1, fsdp=1, tensor=1), peak_tflops=0.0,
      frozen='', init_from='',
      data=dict(
          task='images', source='data', image_size=64, scene_share=0.3, num_threads=2,
          sources=(), heldout=(), shards=8, crop='none', max_skipped=0.05),
      kl_weight=1e-4, edge_weight=0.5,
      optim=dict(
          schedule='cosine', rewarm_from=0, max_nonfinite=10,
          learning_rate=1e-3, warmup_steps=200, final_fraction=0.01, weight_decay=0.0, b1=0.9, b2=0.99, mu_dtype='float32',
          nu_dtype='float32', clip_norm=1.0, ema_decay=0.999, freeze=(), lr_scale=()),
      log_every=50, eval_every=1000, eval_batches=8, picture_every=2000, checkpoint_every=500, keep=2,
      skip_damaged=False, profile=''))
  return config.lock()
