"""Stage 1: the dynamic visual tokenizer. Features become as few codes as are needed to rebuild them.

    lavit train --config configs/tokenizer.py:tiny --workdir runs/tokenizer --config.frozen=runs/encoder/export

Needs `vit`; exports `tokenizer` and `decoder`. The first `quantize_from` steps are without quantisation; then k-means starts the
codebook and the selector stops (`freeze_selector_from` -1), because it would go on to buy back with more tokens what quantisation
costs. `revive_after`: a code that so many batches have passed by moves onto a badly described token (0: never).
"""

from ml_collections import ConfigDict

from lavit_jax.models import lavit

SCHEDULES = {  # tiny and small: our choice
    'tiny': dict(batch_size=64, num_steps=1_000, learning_rate=1e-3, warmup_steps=60, quantize_from=300, revive_after=100, fsdp=1),
    'small': dict(batch_size=2048, num_steps=50_000, learning_rate=2e-4, warmup_steps=2_000, quantize_from=10_000, revive_after=100, fsdp=8),
    'lavit_7b': dict(
        batch_size=2048, num_steps=50_000,  # paper, section 4.1: so 102 M images
        learning_rate=2e-4, warmup_steps=2_000, fsdp=64,  # our choice
        quantize_from=10_000, revive_after=100),  # our choice; that quantisation comes later: the author (specification, Training)
}

SOURCES = (dict(format='tars', path='gs://BUCKET/laion400m/{00000..09999}.tar'),)  # specification, Training: about 100 M
HELDOUT = (dict(format='tars', path='gs://BUCKET/laion400m/{41152..41407}.tar'),)  # our choice: more tars than a pod has hosts


def get_config(variant: str = 'tiny') -> ConfigDict:
  size, row = lavit.variant_config(variant)['vit']['image_size'], SCHEDULES[variant]
  large = variant != 'tiny'
  config = ConfigDict(dict(
      stage='tokenizer', variant=variant, batch_size=row['batch_size'], num_steps=row['num_steps'],  # above
      seed=0, accumulate=1, dtype='bfloat16' if large else 'float32', remat='minimal' if large else 'none',  # our choice
      mesh=dict(data=-1, fsdp=row['fsdp'], tensor=1), peak_tflops=0.0, frozen='', init_from='',  # our choice
      data=dict(
          task='images', image_size=size, crop='none',  # specification, Image encoder: 224 pixels a side, straight to the square
          sources=SOURCES if large else (), heldout=HELDOUT if large else (),  # above
          shards=512 if large else 8,  # our choice: of the sources, a multiple of the pieces of a batch on any mesh
          source='data', scene_share=0.3, num_threads=16 if large else 2, max_skipped=0.05),  # our choice
      tokenizer=dict(
          keep_ratio=1 / 3, ratio_weight=2.0, decay=0.99,  # specification, Training: rho, lambda, the codebook's decay
          commitment_weight=1.0, quantize_from=row['quantize_from'], revive_after=row['revive_after'],  # our choice
          freeze_selector_from=-1),  # our choice, and one report (specification, Training)
      optim=dict(
          schedule='cosine', rewarm_from=0, max_nonfinite=10,  # our choice: training/schedule.py
          learning_rate=row['learning_rate'], warmup_steps=row['warmup_steps'], final_fraction=0.05, weight_decay=0.05,  # our choice
          b1=0.9, b2=0.98, mu_dtype='float32', nu_dtype='float32', clip_norm=1.0, ema_decay=0.0, lr_scale=(),  # our choice
          freeze=('^decoder/(context_proj|pool)',)),  # they belong to stage 1b
      log_every=50, eval_every=1000 if large else 250, eval_batches=8, picture_every=1000 if large else 500,  # our choice
      checkpoint_every=500, keep=2, skip_damaged=False, profile=''))  # our choice
  return config.lock()
