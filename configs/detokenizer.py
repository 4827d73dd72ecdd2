"""Stage 1b: the U-Net learns to generate images from tokens.

    lavit train --config configs/detokenizer.py:tiny --workdir runs/detokenizer \\
        --config.frozen=runs/encoder/export,runs/autoencoder/export,runs/tokenizer/export

Needs `vit`, `tokenizer`, `decoder` (only its context heads train) and `vae`; exports `unet`, `decoder` and `uncond_embeddings`.
`condition` `emu`: the U-Net reads the vectors of Emu's interface. That needs `vit`, `interface` (of stage `lm`) and `vae`, and exports `unet` alone.
The large variants start from Stable Diffusion: --config.init_from=FOLDER with `unet` and `uncond_embeddings`.
"""

from ml_collections import ConfigDict, FieldReference

from lavit_jax.models import lavit
from lavit_jax.training.config import derived

SCHEDULES = {  # tiny and small: our choice
    'tiny': dict(batch_size=32, num_steps=6_000, image_size=64, learning_rate=1e-3, warmup_steps=100, fsdp=1),
    'small': dict(batch_size=512, num_steps=20_000, image_size=512, learning_rate=1e-4, warmup_steps=1_000, fsdp=8),
    'lavit_7b': dict(
        num_steps=20_000,  # paper, section 4.1
        image_size=512,  # specification, Image decoders: the output of Stable Diffusion 1.5
        batch_size=2048, learning_rate=1e-4, warmup_steps=1_000, fsdp=64),  # our choice
}

SOURCES = (dict(format='tars', path='gs://BUCKET/laion400m/{00000..09999}.tar'),)  # specification, Training: the images of stage 1
HELDOUT = (dict(format='tars', path='gs://BUCKET/laion400m/{41152..41407}.tar'),)  # our choice: more files than a pod has hosts


def get_config(variant: str = 'tiny') -> ConfigDict:
  sizes = lavit.variant_config(variant)  # an unknown variant is an error that names the nearest one
  values = SCHEDULES[variant]
  large = variant != 'tiny'
  condition = FieldReference('codes')
  heads_alone = derived(condition, lambda name: ('^decoder/(?!context_proj|pool)',) if name == 'codes' else ())
  config = ConfigDict(dict(
      stage='detokenizer', variant=variant, batch_size=values['batch_size'], num_steps=values['num_steps'],  # above
      seed=0, accumulate=1, dtype='bfloat16' if large else 'float32', remat='full' if large else 'none',  # our choice
      mesh=dict(data=-1, fsdp=values['fsdp'], tensor=1), peak_tflops=0.0, frozen='', init_from='',  # our choice
      merger_capacities=sizes['tokenizer'].get('capacities', ()),  # our choice: docs/performance.md
      data=dict(
          task='images', image_size=values['image_size'], crop='none',  # specification, Image decoders: resized to the square
          sources=SOURCES if large else (), heldout=HELDOUT if large else (),  # above
          shards=512 if large else 8,  # our choice: shards of the sources, a multiple of `data` x `fsdp` of any mesh
          source='data', scene_share=0.3, num_threads=16 if large else 2, max_skipped=0.05),  # our choice
      detokenizer=dict(
          condition=condition,  # specification, Training
          drop_condition=0.1,  # our choice; dropping it sometimes: specification, Training
          guidance_scale=3.0),  # our choice, for the sample images of a run
      optim=dict(
          schedule='cosine', rewarm_from=0, max_nonfinite=10,  # our choice: training/schedule.py
          learning_rate=values['learning_rate'], warmup_steps=values['warmup_steps'], final_fraction=0.05, weight_decay=0.01,  # our choice
          b1=0.9, b2=0.99, mu_dtype='float32', nu_dtype='float32', clip_norm=1.0,  # our choice
          ema_decay=0.999 if large else 0.99, lr_scale=(),  # our choice
          freeze=heads_alone),  # specification, Training: the tokenizer is frozen; training its context heads is our choice
      log_every=50, eval_every=1000 if large else 250, eval_batches=8, picture_every=1000 if large else 500,  # our choice
      checkpoint_every=500, keep=2, skip_damaged=False, profile=''))  # our choice
  return config.lock()
