"""The first stage of BLIP-2's Q-Former, for stage `lm` with interface `qformer`: images and captions, without a language model.

    lavit train --config configs/qformer.py:tiny --workdir runs/qformer1 --config.frozen=runs/encoder/export
    lavit train --config configs/lm.py:tiny --workdir runs/qformer2 --config.frozen=runs/encoder/export --config.interface=qformer \
        --config.init_from=runs/qformer1/export

Needs `vit`; exports `interface`. Negatives come from the whole batch, so `accumulate` must be 1. All rows are captions: `data.shares` has no other use.
"""

from ml_collections import ConfigDict

from lavit_jax.models import lavit

SCHEDULES = {  # tiny and small: our choice
    'tiny': dict(batch_size=64, num_steps=1_500, text_length=32, learning_rate=5e-4, warmup_steps=100, output_dim=64, fsdp=1),
    'small': dict(batch_size=1024, num_steps=50_000, text_length=64, learning_rate=1e-4, warmup_steps=2_000, output_dim=256, fsdp=8),
    'lavit_7b': dict(
        batch_size=1536, num_steps=round(250_000 * 1680 / 1536),  # BLIP-2, section 3.4: 250,000 steps of 1,680; here a multiple of `shards`
        learning_rate=1e-4, warmup_steps=2_000,  # BLIP-2, section 3.4
        output_dim=256, text_length=32, fsdp=16),  # the published code; fsdp: our choice
}
SOURCES = (dict(format='tars', path='gs://BUCKET/blip-capfilt/{00000..12899}.tar', use='caption'),)  # BLIP-2, section 3.4: 129 M, CapFilt's captions
HELDOUT = (dict(format='tars', path='gs://BUCKET/blip-capfilt/{12900..13155}.tar', use='caption'),)  # our choice


def get_config(variant: str = 'tiny') -> ConfigDict:
  sizes = lavit.variant_config(variant)
  values = SCHEDULES[variant]
  large = variant != 'tiny'
  return ConfigDict(dict(
      stage='qformer', variant=variant, batch_size=values['batch_size'], num_steps=values['num_steps'],  # above
      seed=0, accumulate=1, dtype='bfloat16' if large else 'float32', remat='minimal' if large else 'none',  # our choice
      mesh=dict(data=-1, fsdp=values['fsdp'], tensor=1), peak_tflops=0.0, frozen='', init_from='',  # our choice
      data=dict(task='lm', image_size=sizes['vit']['image_size'], crop='random' if large else 'none',  # BLIP-2, section 3.4; no flip
          sources=SOURCES if large else (), heldout=HELDOUT if large else (), text_length=values['text_length'],  # above
          shards=512 if large else 8,  # our choice: shards of the sources, a multiple of `data` x `fsdp` of any mesh
          tokenizer_folder='lavit_jax/assets/tiny/language_model' if not large else 'tokenizer',  # our choice
          shares=dict(caption=1.0, answer=0.0, draw=0.0, text=0.0),  # BLIP-2, section 3.2: captions
          source='data', scene_share=0.45, augment=not large, num_threads=16 if large else 2, max_skipped=0.05),  # our choice
      qformer=dict(output_dim=values['output_dim'], dropout_rate=0.1),  # above; the published code
      optim=dict(learning_rate=values['learning_rate'], warmup_steps=values['warmup_steps'], final_fraction=0.1,  # above; the published code: 1e-5
          schedule='cosine', rewarm_from=0, weight_decay=0.05, b1=0.9, b2=0.98, mu_dtype='float32', nu_dtype='float32',  # BLIP-2, section 3.4
          clip_norm=1.0, max_nonfinite=10, ema_decay=0.0, freeze=(), lr_scale=(), muon=(), clip_groups=()),  # our choice: training/schedule.py
      log_every=50, eval_every=1000 if large else 250, eval_batches=8, picture_every=1000 if large else 500,  # our choice
      checkpoint_every=500, keep=2, skip_damaged=False, profile='')).lock()  # our choice
