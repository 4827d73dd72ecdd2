"""The image encoder of the tiny variant, contrastive on images and captions. Larger variants use EVA-CLIP.

    lavit train --config configs/encoder.py:tiny --workdir runs/encoder

Exports `vit`.
"""

from ml_collections import ConfigDict

from lavit_jax.errors import UserError
from lavit_jax.models import lavit


def get_config(variant: str = 'tiny') -> ConfigDict:
  lavit.variant_config(variant)  # an unknown variant is an error that names the nearest one
  if variant != 'tiny':
    raise UserError(f'configs/encoder.py trains tiny only, not {variant!r}: the encoders of larger variants are ported')
  config = ConfigDict(dict(
      stage='encoder', variant=variant, seed=0, batch_size=64, num_steps=6_000, accumulate=1,
      dtype='float32', remat='none', mesh=dict(data=-1, fsdp=1, tensor=1), peak_tflops=0.0,
      frozen='', init_from='',
      data=dict(task='contrastive', source='data', tokenizer_folder='lavit_jax/assets/tiny/language_model', text_length=48, image_size=64,
                scene_share=0.4, augment=True, num_threads=2),
      text_tower=dict(hidden_size=128, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=32, mlp_dim=384),
      pixel_weight=2.0, place_weight=1.0, name_weight=1.0,
      optim=dict(
          schedule='cosine', rewarm_from=0, max_nonfinite=10,
          learning_rate=1e-3, warmup_steps=100, final_fraction=0.01, weight_decay=0.1, b1=0.9, b2=0.98, mu_dtype='float32',
          nu_dtype='float32', clip_norm=1.0, ema_decay=0.99, freeze=('^text/head$',), lr_scale=(),
          muon=('^(vit|text)/.*(attn|attention|mlp)/.*kernel$',)),
      log_every=50, eval_every=600, eval_batches=8, picture_every=1200, checkpoint_every=500, keep=2,
      skip_damaged=False, profile=''))
  return config.lock()
