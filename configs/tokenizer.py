"""Stage 1: the dynamic visual tokenizer. It learns to reconstruct the features of an image from few codes.

    lavit train --config configs/tokenizer.py:tiny --workdir runs/tokenizer --config.frozen=runs/encoder/export

Needs `vit`; exports `tokenizer` and `decoder`. k-means initializes the codebook at step `quantize_from`. If that is too early, the tokens of
an image become copies of each other (metric `distinct_tokens`). An unused code moves after `revive_after` batches (0: never).

The selector: lavit_7b and small train it by the published formulas, and freeze it when quantization begins
(`freeze_selector_from` -1). With these, a small model learns no selection; tiny has others (docs/selection.md).
"""

from ml_collections import ConfigDict

from lavit_jax.models import lavit

PUBLISHED_SELECTOR = dict(
    ratio_scope='image', ratio_of='choices',  # specification, Training: the ratio's error is of each image's drawn mask
    selector_gradient='published', entropy_weight=0.0, entropy_from=0, selection='learned', cross_attention_from=0,  # specification, Training and Merger
    freeze_selector_from=-1)  # our choice, and one report (specification, Training)
TINY_SELECTOR = dict(  # our choice; it never freezes
    ratio_scope='batch', ratio_of='probabilities', selector_gradient='counterfactual', entropy_weight=0.06, entropy_from=300,
    selection='learned', freeze_selector_from=1_000_000_000, cross_attention_from=600)
SCHEDULES = {  # tiny and small: our choice
    'tiny': dict(batch_size=64, num_steps=1_500, learning_rate=1e-3, warmup_steps=60, quantize_from=900, revive_after=100, fsdp=1),
    'small': dict(batch_size=2048, num_steps=50_000, learning_rate=2e-4, warmup_steps=2_000, quantize_from=10_000, revive_after=100, fsdp=8),
    'lavit_7b': dict(
        batch_size=2048, num_steps=50_000,  # paper, section 4.1: so 102 M images
        learning_rate=2e-4, warmup_steps=2_000, fsdp=64,  # our choice
        quantize_from=10_000, revive_after=100),  # our choice; quantization that starts later: the author (specification, Training)
}

SOURCES = (dict(format='tars', path='gs://BUCKET/laion400m/{00000..09999}.tar'),)  # specification, Training: about 100 M
HELDOUT = (dict(format='tars', path='gs://BUCKET/laion400m/{41152..41407}.tar'),)  # our choice: more files than a pod has hosts


def get_config(variant: str = 'tiny') -> ConfigDict:
  sizes = lavit.variant_config(variant)
  values = SCHEDULES[variant]
  large = variant != 'tiny'
  selector = PUBLISHED_SELECTOR if large else TINY_SELECTOR
  config = ConfigDict(dict(
      stage='tokenizer', variant=variant, batch_size=values['batch_size'], num_steps=values['num_steps'],  # above
      seed=0, accumulate=1, dtype='bfloat16' if large else 'float32', remat='minimal' if large else 'none',  # our choice
      mesh=dict(data=-1, fsdp=values['fsdp'], tensor=1), peak_tflops=0.0, frozen='', init_from='',  # our choice
      merger_capacities=sizes['tokenizer'].get('capacities', ()),  # our choice: docs/performance.md
      data=dict(
          task='images', image_size=sizes['vit']['image_size'], crop='none',  # specification, Image encoder: 224 x 224 pixels, resized to the square
          sources=SOURCES if large else (), heldout=HELDOUT if large else (),  # above
          shards=512 if large else 8,  # our choice: shards of the sources, a multiple of `data` x `fsdp` of any mesh
          source='data', scene_share=0.4, augment=not large, num_threads=16 if large else 2, max_skipped=0.05),  # our choice
      tokenizer=dict(
          keep_ratio=1 / 3, ratio_weight=2.0, decay=0.99,  # specification, Training: rho, lambda, decay of the codebook
          commitment_weight=1.0 if large else 1 / 16, quantize_from=values['quantize_from'], revive_after=values['revive_after'],  # our choice
          **selector),  # above
      optim=dict(
          schedule='cosine', rewarm_from=0, max_nonfinite=10,  # our choice: training/schedule.py
          learning_rate=values['learning_rate'], warmup_steps=values['warmup_steps'], final_fraction=0.05, weight_decay=0.05,  # our choice
          b1=0.9, b2=0.98, mu_dtype='float32', nu_dtype='float32', clip_norm=1.0, ema_decay=0.0,  # our choice
          lr_scale=() if large else (('^tokenizer/selector/', 5.0),),  # our choice
          clip_groups=() if large else ('^tokenizer/selector/', '^tokenizer/merger/'), muon=(),  # our choice
          freeze=('^decoder/(context_proj|pool)',)),  # they belong to stage 1b
      log_every=50, eval_every=1000 if large else 250, eval_batches=8, picture_every=1000 if large else 500,  # our choice
      checkpoint_every=500, keep=2, skip_damaged=False, profile=''))  # our choice
  return config.lock()
