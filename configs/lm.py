"""Stage 2: the language model learns to predict the next token, text or code, of [image, text], [text, image] and plain text.

    lavit train --config configs/lm.py:tiny --workdir runs/lm --config.frozen=runs/encoder/export,runs/tokenizer/export

Needs `vit` and `tokenizer`; exports `llama` and `understanding`. The large variants start from LLaMA: --config.init_from=FOLDER with `llama`, with or
without the visual ids. `data.shares`: shares of captions, answers, images to generate, plain text and (of sources) conversations; `data.question_weights`: frequencies of the types
of questions. A packed row has `row_length` tokens, a pair `mean_length` on average; `max_overflow`: the largest share of pairs that find no room.
`interface` `linear`, `mlp`, `resampler`, `flamingo`, `qformer` or `emu`: images are seen as in other systems (lavit_jax/models/interfaces). That needs `vit` alone,
exports `llama` and `interface`, and draws nothing, but for `emu` (`regression_weight`); what else follows, unless it is set: lavit_jax/training/interface_options.py. Data with `format='codes'` needs no module, and trains `llama` to draw: docs/guides/bulk.md. With `lora.rank`, adapters train beside the weights of a whole model in `frozen`; set optim.learning_rate, too: docs/guides/lora.md.
"""

from ml_collections import ConfigDict

from lavit_jax.data.emoji import questions
from lavit_jax.models import lavit
from lavit_jax.training.interface_options import follow_interface
from lavit_jax.training.lora import follow_adapters

MILLIONS = dict(caption=93, draw=100, text=21)  # pairs: specification, Training; plain text: our choice, no number is published
STEP = 34_816  # pairs of a step: our choice, not published
PASSES = 1  # times that each pair is seen: our choice, not published
SCHEDULES = {  # tiny and small: our choice
    'tiny': dict(batch_size=48, num_steps=5_000, text_length=64, num_rows=10, row_length=256, mean_length=49, read_length=53, loss_chunks=1, learning_rate=2e-3, warmup_steps=100, accumulate=1, remat='none', fsdp=1),
    'small': dict(batch_size=1024, num_steps=100_000, text_length=128, num_rows=128, row_length=1024, mean_length=110, loss_chunks=8, learning_rate=3e-4, warmup_steps=2_000, accumulate=1, remat='full', fsdp=8),
    'lavit_7b': dict(
        batch_size=STEP, num_steps=round(1e6 * PASSES * sum(MILLIONS.values()) / STEP),  # above; 6,147
        text_length=128, num_rows=2048, row_length=2048, loss_chunks=4, accumulate=8, remat='minimal', fsdp=128, warmup_steps=300,  # our choice
        learning_rate=5e-5, mean_length=110),  # our choice; length: rho = 1/3 of 256 patches (specification, Training), 22 tokens of a caption, 3 special ones
}
SOURCES = (  # data/sources.py; the data sets, 93 M and 100 M pairs: specification, Training; the 93 M are divided by size, the last has the rest
    dict(format='tars', path='gs://BUCKET/cc3m/{00000..00331}.tar', weight=3.3, use='caption'),  # specification, Training; weight: our choice
    dict(format='tars', path='gs://BUCKET/cc12m/{00000..01242}.tar', weight=12.4, use='caption'),  # specification, Training; weight: our choice
    dict(format='tars', path='gs://BUCKET/sbu/{00000..00099}.tar', weight=0.9, use='caption'),  # specification, Training; weight: our choice
    dict(format='tars', path='gs://BUCKET/blip-capfilt/{00000..07639}.tar', weight=76.4, use='caption'),  # specification, Training; weight: our choice
    dict(format='tars', path='gs://BUCKET/laion-aesthetics/{00000..09999}.tar', weight=100.0, use='draw'),  # specification, Training
    dict(format='parquet', path='gs://BUCKET/redpajama/*.parquet', weight=21.0, use='text'))  # specification, Training; weight: our choice
HELDOUT = (dict(format='tars', path='gs://BUCKET/blip-capfilt/{07640..07895}.tar', use='caption'),  # our choice: more files than a pod has hosts
           dict(format='tars', path='gs://BUCKET/laion-aesthetics/{10000..10255}.tar', use='draw'))  # our choice


def get_config(variant: str = 'tiny') -> ConfigDict:
  sizes = lavit.variant_config(variant)
  values = SCHEDULES[variant]
  large = variant != 'tiny'
  return ConfigDict(follow_adapters(follow_interface(dict(
      stage='lm', variant=variant, interface='lavit', batch_size=values['batch_size'], num_steps=values['num_steps'],  # above
      seed=0, accumulate=values['accumulate'], dtype='bfloat16' if large else 'float32', remat=values['remat'],  # above
      mesh=dict(data=-1, fsdp=values['fsdp'], tensor=1), peak_tflops=0.0, frozen='', init_from='',  # our choice
      merger_capacities=sizes['tokenizer'].get('capacities', ()),  # our choice: docs/performance.md
      data=dict(task='lm', image_size=sizes['vit']['image_size'], crop='none',  # specification, Image encoder: 224 x 224 pixels, resized to the square
          sources=SOURCES if large else (), heldout=HELDOUT if large else (), text_length=values['text_length'],  # above
          shards=512 if large else 8,  # our choice: shards of the sources, a multiple of `data` x `fsdp` of any mesh
          tokenizer_folder='lavit_jax/assets/tiny/language_model' if not large else 'tokenizer',  # specification, Vocabulary: LLaMA's tokenizer
          shares=dict(caption=0.38, answer=0.27, draw=0.33, text=0.02, chat=0.0), chat_template='lavit', max_images=1,  # our choice; the sources above have weights instead; template: specification, Inference
          question_weights=dict.fromkeys(questions.TYPES, 1.0) | {'what': 2.0, 'place': 4.0, 'position': 4.0, 'yes/no': 2.0},  # our choice
          max_questions=1 if large else 6, draw_text_weight=0.1, drop_text=0.1,  # our choice; guidance compares with a prompt without text: specification, Inference
          source='data', scene_share=0.5, augment=not large, num_threads=16 if large else 2, max_skipped=0.05),  # our choice
      lm={key: values[key] for key in ('num_rows', 'row_length', 'mean_length', 'loss_chunks')} | dict(image_loss=False, regression_weight=1.0, max_overflow=0.2),  # above; our choice; with `emu` all elements weigh alike: Sun et al. 2023, section 2.2
      lora=dict(rank=0, alpha=16.0, dropout=0.0, targets=('^llama/layers/', '^understanding/'), modules_to_save=(), bias='none', rslora=False, base_dtype='float32'),  # our choice
      optim=dict(learning_rate=values['learning_rate'], warmup_steps=values['warmup_steps'], final_fraction=0.05,  # above; our choice
          schedule='cosine', rewarm_from=0, weight_decay=0.05, b1=0.9, b2=0.95, mu_dtype='float32', nu_dtype='float32', clip_norm=1.0,  # our choice: training/schedule.py
          max_nonfinite=10, ema_decay=0.0, freeze=(), lr_scale=(), muon=() if large else ('^(llama|understanding|interface)/.*((attention|attn|mlp)/.*|/(query|kv|proj)/)kernel$',)),  # our choice
      log_every=50, eval_every=1000 if large else 250, eval_batches=8, picture_every=1000 if large else 500,  # our choice
      checkpoint_every=500, keep=2, skip_damaged=False, profile=''), read_length=values.get('read_length', values['mean_length'])))).lock()  # our choice
