"""Stage 1: the dynamic visual tokenizer. Features become as few codes as are needed to rebuild them.

    lavit train --config configs/tokenizer.py:tiny --workdir runs/tokenizer --config.frozen=runs/encoder/export

Needs `vit`; exports `tokenizer` and `decoder`. The first `quantize_from` steps are without quantisation; then k-means starts the
codebook and the selector stops (`freeze_selector_from` -1), because it would go on to buy back with more tokens what quantisation
costs. `revive_after`: a code that so many batches have passed by moves onto a badly described token (0: never).
"""

from ml_collections import ConfigDict

from lavit_jax.models import lavit

SCHEDULES = {  # the large ones as published: 50 K steps of 2048 images
    'tiny': dict(batch_size=64, num_steps=1_000, learning_rate=1e-3, warmup_steps=60, quantize_from=300, revive_after=100, fsdp=1),
    'small': dict(batch_size=2048, num_steps=50_000, learning_rate=2e-4, warmup_steps=2_000, quantize_from=10_000, revive_after=100, fsdp=8),
    'lavit_7b': dict(batch_size=2048, num_steps=50_000, learning_rate=2e-4, warmup_steps=2_000, quantize_from=10_000, revive_after=100, fsdp=64),
}

SOURCES = (  # data/sources.py
    dict(format='tars', path='gs://BUCKET/laion400m/{00000..41407}.tar', weight=3.0),
    dict(format='tars', path='gs://BUCKET/cc12m/{00000..01242}.tar', weight=1.0),
)
HELDOUT = (dict(format='tars', path='gs://BUCKET/laion400m/{41408..41454}.tar'),)


def get_config(variant: str = 'tiny') -> ConfigDict:
  size, row = lavit.row(variant)['vit']['image_size'], SCHEDULES[variant]
  large = variant != 'tiny'
  config = ConfigDict(dict(
      stage='tokenizer', variant=variant, seed=0, batch_size=row['batch_size'], num_steps=row['num_steps'], accumulate=1,
      dtype='bfloat16' if large else 'float32', remat='minimal' if large else 'none',
      mesh=dict(data=-1, fsdp=row['fsdp'], tensor=1), peak_tflops=0.0,
      frozen='', init_from='',
      data=dict(
          task='images', source='data', image_size=size, scene_share=0.3, num_threads=16 if large else 2,
          sources=SOURCES if large else (), heldout=HELDOUT if large else (), crop='none', max_skipped=0.05),
      tokenizer=dict(
          keep_ratio=1 / 3, ratio_weight=2.0, commitment_weight=1.0, decay=0.99, quantize_from=row['quantize_from'],
          freeze_selector_from=-1, revive_after=row['revive_after']),
      optim=dict(
          learning_rate=row['learning_rate'], warmup_steps=row['warmup_steps'], final_fraction=0.05, weight_decay=0.05,
          b1=0.9, b2=0.98, mu_dtype='float32', clip_norm=1.0, ema_decay=0.0, freeze=('^decoder/(context_proj|pool)',), lr_scale=()),
      log_every=50, eval_every=1000 if large else 250, eval_batches=8, picture_every=1000 if large else 500, checkpoint_every=500, keep=2,
      skip_damaged=False, profile=''))
  return config.lock()
