"""A LaVIT folder with all modules, and its conversion, which several files of tests read."""

import json

import jax
import numpy as np
import pytest
from torch_folders import DTYPES, TOKENIZER, run, whole_variant, write

from lavit_jax.models import lavit
from lavit_jax.weights.store import folder
from lavit_jax.weights.torch import name_tables
from lavit_jax.weights.torch.descriptions import descriptions
from lavit_jax.weights.torch.mapping import to_torch


@pytest.fixture(scope='session')
def states():
  """By module and torch name: an array."""
  with whole_variant():
    model = lavit.build('whole')
  rng = np.random.default_rng(0)
  arrays = {}
  for module, tree in name_tables.module_shapes(model, name_tables.TABLES).items():
    dtype = DTYPES.get(module, np.float32)
    params = jax.tree.map(
      lambda x, dtype=dtype: rng.normal(size=x.shape).astype(dtype), name_tables.as_tree(tree)
    )
    arrays[module] = to_torch(name_tables.TABLES[module](model)[0], params)
  return arrays


@pytest.fixture(scope='session')
def published(states, tmp_path_factory):
  """A LaVIT folder with all modules, an overlay, shards, several dtypes and computed tensors."""
  src = tmp_path_factory.mktemp('published') / 'LaVIT'
  encoder = {**states['tokenizer'], **states['understanding']}
  for name in encoder:  # the overlay replaces all of these but one
    if name.startswith(('causal_encoder', 'vit_proj')):
      encoder[name] = encoder[name] + 1
  visual = {
    name: x for name, x in states['understanding'].items() if name != 'causal_encoder.norm.bias'
  }
  llama = {
    **states['llama'],
    'model.layers.0.self_attn.rotary_emb.inv_freq': np.linspace(0, 1, 8, dtype=np.float32),
  }
  write(src / 'visual_tokenizer', 'eva_vitg_psz14', states['vit'])
  write(src / 'visual_tokenizer', 'tokenizer_encoder', encoder)
  write(src / 'visual_tokenizer', 'tokenizer_decoder', states['decoder'])
  write(src / 'visual_tokenizer', 'highres_tokenizer_decoder', states['highres_decoder'])
  write(src / 'language_model', 'model', llama, 200_000)
  write(src / 'language_model', 'visual_weight', visual)
  for prefix in ('', 'highres_'):
    for module in ('unet', 'vae'):
      where = src / f'{prefix}pixel_decoding' / module
      write(where, 'diffusion_pytorch_model', states[prefix + module])
  write(src / 'pixel_decoding', 'uncond_embeddings', states['uncond_embeddings'])
  write(
    src / 'pixel_decoding' / 'safety_checker',
    'model',
    {
      **states['safety_checker'],
      'vision_model.vision_model.embeddings.position_ids': np.arange(5)[None],
    },
  )
  with whole_variant():
    model = lavit.build('whole')
    described = [name for name in name_tables.TABLES if name not in ('vit', 'uncond_embeddings')]
    for path, content in descriptions(model, described, model.vocabulary.size).items():
      (src / path).parent.mkdir(parents=True, exist_ok=True)
      (src / path).write_text(json.dumps(content))
  folder.copy_tokenizer_files(TOKENIZER, src / 'language_model')
  return src


@pytest.fixture(scope='session')
def converted(published, tmp_path_factory):
  """(the conversion of `published`, its checkpoint); no test changes it."""
  checkpoint = tmp_path_factory.mktemp('converted') / 'checkpoint'
  with whole_variant():
    return run(published, checkpoint, variant=None), checkpoint
