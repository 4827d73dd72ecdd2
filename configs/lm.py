"""Stage 2: the language model learns the next word or code, of [image, text], [text, image] and plain text.

    lavit train --config configs/lm.py:tiny --workdir runs/lm --config.frozen=runs/encoder/export,runs/tokenizer/export

Needs `vit` and `tokenizer`; exports `llama` and `understanding`. The large variants start from LLaMA: --config.init_from=FOLDER with `llama`, which
may lack the visual ids. `data.shares` are those of captions, answers, drawings and plain text, `data.question_weights` how often a type of question
is asked; a packed row holds `row_length` tokens, a pair is expected to have `mean_length`, `overflow` counts pairs without room (at most `max_overflow`).
"""

from ml_collections import ConfigDict

from lavit_jax.data.emoji import questions
from lavit_jax.models import lavit

MILLIONS = dict(caption=93, draw=100, text=21)  # pairs: specification, Training; plain text: our choice, for no number is published
STEP, PASSES = 34_816, 1  # pairs of a step, and how often each is seen: our choice, for neither is published
SCHEDULES = {  # tiny and small: our choice
    'tiny': dict(batch_size=64, num_steps=4_600, text_length=48, num_rows=10, row_length=256, mean_length=35, loss_chunks=1, learning_rate=2e-3,
                 warmup_steps=100, accumulate=1, remat='none', fsdp=1),
    'small': dict(batch_size=1024, num_steps=100_000, text_length=128, num_rows=128, row_length=1024, mean_length=110, loss_chunks=8,
                  learning_rate=3e-4, warmup_steps=2_000, accumulate=1, remat='full', fsdp=8),
    'lavit_7b': dict(
        batch_size=STEP, num_steps=round(1e6 * PASSES * sum(MILLIONS.values()) / STEP),  # above; 6,147
        text_length=128, num_rows=2048, row_length=2048, loss_chunks=4, accumulate=8, remat='minimal', fsdp=128, warmup_steps=300,  # our choice
        learning_rate=5e-5, mean_length=110),  # our choice; the length is rho = 1/3 of 256 patches (specification, Training), 22 words of a caption and 3 marks
}
SOURCES = (  # data/sources.py; which, and 93 M and 100 M of them: specification, Training; each one's part of the 93: its size, of the last the rest
    dict(format='tars', path='gs://BUCKET/cc3m/{00000..00331}.tar', weight=3.3, use='caption'),  # specification, Training; weight: our choice
    dict(format='tars', path='gs://BUCKET/cc12m/{00000..01242}.tar', weight=12.4, use='caption'),  # specification, Training; weight: our choice
    dict(format='tars', path='gs://BUCKET/sbu/{00000..00099}.tar', weight=0.9, use='caption'),  # specification, Training; weight: our choice
    dict(format='tars', path='gs://BUCKET/blip-capfilt/{00000..07639}.tar', weight=76.4, use='caption'),  # specification, Training; weight: our choice
    dict(format='tars', path='gs://BUCKET/laion-aesthetics/{00000..09999}.tar', weight=100.0, use='draw'),  # specification, Training
    dict(format='parquet', path='gs://BUCKET/redpajama/*.parquet', weight=21.0, use='text'))  # specification, Training; weight: our choice
HELDOUT = (dict(format='tars', path='gs://BUCKET/blip-capfilt/{07640..07895}.tar', use='caption'),  # our choice: more than a pod has hosts
           dict(format='tars', path='gs://BUCKET/laion-aesthetics/{10000..10255}.tar', use='draw'))  # our choice


def get_config(variant: str = 'tiny') -> ConfigDict:
  size, row, large = lavit.variant_config(variant)['vit']['image_size'], SCHEDULES[variant], variant != 'tiny'
  config = ConfigDict(dict(
      stage='lm', variant=variant, batch_size=row['batch_size'], num_steps=row['num_steps'],  # above
      seed=0, accumulate=row['accumulate'], dtype='bfloat16' if large else 'float32', remat=row['remat'],  # above
      mesh=dict(data=-1, fsdp=row['fsdp'], tensor=1), peak_tflops=0.0, frozen='', init_from='',  # our choice
      data=dict(
          task='lm', image_size=size, crop='none',  # specification, Image encoder: 224 pixels a side, straight to the square
          sources=SOURCES if large else (), heldout=HELDOUT if large else (), text_length=row['text_length'],  # above
          shards=512 if large else 8,  # our choice: of the sources, a multiple of the pieces of a batch on any mesh
          tokenizer_folder='lavit_jax/assets/tiny/language_model' if not large else 'tokenizer',  # specification, Vocabulary: LLaMA's words
          shares=dict(caption=0.36, answer=0.38, draw=0.24, text=0.02),  # our choice; sources above say it themselves
          question_weights=dict.fromkeys(questions.TYPES, 1.0) | {'what': 2.0, 'position': 3.0, 'yes/no': 2.0},  # our choice
          draw_text_weight=0.1, drop_text=0.1,  # our choice; that guidance compares with no text: specification, Inference
          source='data', scene_share=0.45, num_threads=16 if large else 2, max_skipped=0.05),  # our choice
      lm={k: row[k] for k in ('num_rows', 'row_length', 'mean_length', 'loss_chunks')} | dict(image_loss=False, max_overflow=0.2),  # above; our choice
      optim=dict(
          learning_rate=row['learning_rate'], warmup_steps=row['warmup_steps'], final_fraction=0.05,  # above; our choice
          schedule='cosine', rewarm_from=0,  # our choice: training/schedule.py
          weight_decay=0.05, b1=0.9, b2=0.95, mu_dtype='float32', nu_dtype='float32', clip_norm=1.0,  # our choice
          max_nonfinite=10, ema_decay=0.0, freeze=(), lr_scale=()),  # our choice
      log_every=50, eval_every=1000 if large else 250, eval_batches=8, picture_every=1000 if large else 500,  # our choice
      checkpoint_every=500, keep=2, skip_damaged=False, profile=''))  # our choice
  return config.lock()
