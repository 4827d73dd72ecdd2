"""Stage 2: the language model learns the next word or code, of [image, text], [text, image] and plain text.

    lavit train --config configs/lm.py:tiny --workdir runs/lm --config.frozen=runs/encoder/export,runs/tokenizer/export

Needs `vit` and `tokenizer`; exports `llama` and `understanding`. The large variants start from LLaMA: --config.init_from=FOLDER with
`llama`, whose vocabulary may lack the visual ids. `data.shares` are the shares of captions and answers ([image, text]), drawings
([text, image]) and plain text, `data.question_weights` how often a question of each type is asked against a picture's others; a row of
the packed batch holds `row_length` tokens, and `overflow` counts pairs that found no room.
"""

from ml_collections import ConfigDict

from lavit_jax.data import questions
from lavit_jax.models import lavit

SCHEDULES = {  # tiny and small: our choice
    'tiny': dict(batch_size=64, num_steps=4_600, text_length=48, num_rows=10, row_length=256, loss_chunks=1,
                 learning_rate=2e-3, warmup_steps=100),
    'small': dict(batch_size=1024, num_steps=100_000, text_length=128, num_rows=320, row_length=1024, loss_chunks=8,
                  learning_rate=3e-4, warmup_steps=2_000),
    'lavit_7b': dict(
        batch_size=34_816, num_steps=100_000, text_length=128, num_rows=2048, row_length=2048, loss_chunks=4,  # our choice
        learning_rate=5e-5, warmup_steps=2_000),  # our choice
}

# data/sources.py; `shares` chooses between caption and draw. Published (REFERENCE 3): 93 M pairs of Conceptual Captions, SBU and BLIP-CapFilt
# for captions, 100 M of LAION-Aesthetics to draw, RedPajama as text.
SOURCES = (
    dict(format='tars', path='gs://BUCKET/laion400m/{00000..41407}.tar', weight=0.7),  # our choice
    dict(format='tars', path='gs://BUCKET/cc12m/{00000..01242}.tar', weight=0.2),  # our choice
    dict(format='parquet', path='gs://BUCKET/c4/*.parquet', weight=0.1, use='text'),  # our choice
)
HELDOUT = (dict(format='tars', path='gs://BUCKET/laion400m/{41408..41454}.tar'),)  # our choice


def get_config(variant: str = 'tiny') -> ConfigDict:
  size, row = lavit.row(variant)['vit']['image_size'], SCHEDULES[variant]
  large = variant != 'tiny'
  config = ConfigDict(dict(
      stage='lm', variant=variant, batch_size=row['batch_size'], num_steps=row['num_steps'],  # above
      seed=0, accumulate=1, dtype='bfloat16' if large else 'float32', remat='full' if large else 'none',  # our choice
      mesh=dict(data=-1, fsdp=128 if large else 1, tensor=1), peak_tflops=0.0, frozen='', init_from='',  # our choice
      data=dict(
          task='lm', image_size=size, crop='none',  # REFERENCE 2: 224 pixels a side, straight to the square
          sources=SOURCES if large else (), heldout=HELDOUT if large else (), text_length=row['text_length'],  # above
          shards=512 if large else 8,  # our choice: of the sources, a multiple of the pieces of a batch on any mesh
          tokenizer_folder='lavit_jax/assets/tiny/language_model' if not large else 'tokenizer',  # REFERENCE 1: LLaMA's words
          shares=dict(caption=0.36, answer=0.38, draw=0.24, text=0.02),  # our choice; of sources only caption and draw count
          question_weights=dict.fromkeys(questions.TYPES, 1.0) | {'what': 2.0, 'position': 3.0, 'yes/no': 2.0},  # our choice
          draw_text_weight=0.1, drop_text=0.1,  # our choice; that guidance compares with no text: REFERENCE 4
          source='data', scene_share=0.45, num_threads=16 if large else 2, max_skipped=0.05),  # our choice
      lm=dict(num_rows=row['num_rows'], row_length=row['row_length'], loss_chunks=row['loss_chunks'], image_loss=False),  # our choice
      optim=dict(
          learning_rate=row['learning_rate'], warmup_steps=row['warmup_steps'], final_fraction=0.05, weight_decay=0.05,  # our choice
          b1=0.9, b2=0.95, mu_dtype='float32', clip_norm=1.0, ema_decay=0.0, freeze=(), lr_scale=()),  # our choice
      log_every=50, eval_every=1000 if large else 250, eval_batches=8, picture_every=1000 if large else 500,  # our choice
      checkpoint_every=500, keep=2, skip_damaged=False, profile=''))  # our choice
  return config.lock()
