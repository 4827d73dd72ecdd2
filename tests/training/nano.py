"""A variant that trains in a second, and its config for each stage; as a script, one training: nano.py STAGE WORKDIR [key=value ...]."""

import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[2]
NANO = dict(
    text_vocab_size=2048,
    vit=dict(image_size=32, patch_size=8, hidden_size=32, num_layers=2, num_heads=2, head_dim=16, mlp_dim=64, output_dim=16),
    tokenizer=dict(hidden_size=32, num_layers=1, num_heads=2, mlp_dim=64, codebook_size=16, code_dim=8),
    decoder=dict(num_layers=1, context_dims=(16,)),
    llama=dict(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16, mlp_dim=64),
    unet=dict(block_out_channels=(16,), layers_per_block=1, down_block_attention=(True,), transformer_layers=(1,), num_heads=(2,),
              cross_attention_dim=16, norm_num_groups=4),
    vae=dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, scaling_factor=1.0),
    uncond_rows=1,
)


def install() -> None:
  """Adds the variant to the table."""
  from lavit_jax.models import lavit
  lavit.VARIANTS['nano'] = NANO


def config(stage: str, **changes):
  """The page of a stage for this variant; `changes` by dotted key with '__' for the dot."""
  from lavit_jax.training.config import load_config
  config = load_config(f'{ROOT}/configs/{stage}.py:tiny')
  data = dict(data__source='embedded', data__image_size=32)
  if config.data.task != 'images':
    data['data__tokenizer_folder'] = f'{ROOT}/lavit_jax/assets/tiny/tokenizer'
  small = dict(variant='nano', batch_size=8, num_steps=4, log_every=1, eval_every=0, picture_every=0, checkpoint_every=0,
               optim__warmup_steps=2, **data)
  if stage == 'encoder':
    small['text_tower'] = dict(hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16, mlp_dim=64)
  if stage == 'lm':
    small |= dict(lm__num_rows=8, lm__row_length=128)
  with config.unlocked():
    config.update_from_flattened_dict({key.replace('__', '.'): value for key, value in {**small, **changes}.items()})
  return config


if __name__ == '__main__':
  import ast

  from lavit_jax.training.loop import train
  install()
  stage, workdir, *pairs = sys.argv[1:]
  train(config(stage, **{key: ast.literal_eval(value) for key, _, value in (pair.partition('=') for pair in pairs)}), workdir)
