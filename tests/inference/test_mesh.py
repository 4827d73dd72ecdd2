"""Inference on eight virtual devices, which share rows and heads, equals that on one."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from lavit_jax.errors import UserError
from lavit_jax.inference.pipeline import Lavit

SCRIPT = """
import dataclasses, json, sys
import jax, jax.numpy as jnp
from pathlib import Path
from lavit_jax import Lavit
from lavit_jax.data.images import read_images
from lavit_jax.inference.slot_decoder import SlotDecoder, TextSequence
from lavit_jax.weights.torch.api import from_torch

weights, heads = sys.argv[1] or None, int(sys.argv[2])
folder = Path('lavit_jax/assets/tiny')
module_names = (
  'vit', 'tokenizer', 'understanding', 'decoder', 'llama', 'unet', 'uncond_embeddings', 'vae'
)
one = Lavit.from_pretrained(folder, weights_dtype=weights)
llama = one.modules.llama
params = {name: from_torch(folder, name, variant='tiny') for name in module_names}
attention = params['llama']['layers']['attention']
width = (heads - llama.num_heads) * llama.head_dim  # of the new heads, whose output is dropped
for name in ('query', 'key', 'value'):
  attention[name]['kernel'] = jnp.pad(attention[name]['kernel'], [(0, 0), (0, 0), (0, width)])
attention['proj']['kernel'] = jnp.pad(attention['proj']['kernel'], [(0, 0), (0, width), (0, 0)])
modules = dataclasses.replace(one.modules, llama=llama.clone(num_heads=heads, num_kv_heads=heads))
mesh = dict(data=2, fsdp=2, tensor=2)
many = Lavit(modules, params, one.tokenizer, weights_dtype=weights, mesh=mesh)

rows = set()
constrain = jax.lax.with_sharding_constraint
jax.lax.with_sharding_constraint = lambda x, shardings: rows.add(len(x)) or constrain(x, shardings)
images = [Path('lavit_jax/assets/demo') / f'0{n}.png' for n in (1, 2, 3, 4)]
results = []


def continue_in_slots(model):
  decoder = SlotDecoder(model, num_slots=2, prompt_tokens=64, new_tokens=6)
  waiting = [
    TextSequence([image], temperature=t, min_new_tokens=2, max_new_tokens=6)
    for image, t in zip(read_images(images, model.modules.image_size), (0.0, 1.0, 0.0, 1.0))
  ]
  tokens = {id(sequence): [] for sequence in waiting}
  order = list(tokens)
  while waiting or decoder.num_active:
    joining, waiting = waiting[: decoder.num_free], waiting[decoder.num_free :]
    for token in (decoder.join(joining) if joining else []) + (
      decoder.advance() if decoder.num_active else []
    ):
      tokens[id(token.sequence)].append(token.id)
  return [tokens[key] for key in order]


for model in (one, many):
  captions = model.caption(images)
  tokens = model.tokenize(images)
  # With the unconditional prompts of guidance, these are four rows.
  codes = model.sample_codes([[images[0], 'on a red background'], ['an owl']])
  decoded = model.decode_images(tokens.ids, num_inference_steps=2)
  leaves = jax.tree.leaves(model.params['llama'])
  results.append(dict(
    captions=captions,
    tokens=[ids.tolist() for ids in tokens.ids],
    codes=[ids.tolist() for ids in codes],
    decoded=decoded.tolist(),
    devices=sorted({len(leaf.sharding.device_set) for leaf in leaves}),
    sharded=sum(not leaf.sharding.is_fully_replicated for leaf in leaves),
    rows=sorted(rows),
    slots=continue_in_slots(model),
  ))
print(json.dumps(results))
"""


@pytest.mark.slow
@pytest.mark.parametrize('weights, heads', [('', 8), ('int8', 5)])
def test_a_mesh_computes_what_one_device_computes(weights, heads):
  """With eight heads, two devices along `tensor` have four each; with five, two and a half.

  The heads beyond those of the tiny checkpoint change nothing. Rows are split four ways.
  """
  env = {
    **os.environ,
    'XLA_FLAGS': '--xla_force_host_platform_device_count=8',
    'JAX_PLATFORMS': 'cpu',
  }
  done = subprocess.run(
    [sys.executable, '-c', SCRIPT, weights, str(heads)],
    env=env,
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  one, many = json.loads(done.stdout.splitlines()[-1])
  assert one['devices'] == [1]
  assert many['devices'] == [8]
  assert many['sharded'] > 20
  assert one['rows'] == []
  assert 4 in many['rows']
  for key in ('captions', 'tokens', 'codes', 'slots'):
    assert one[key] == many[key]
  difference = np.abs(np.array(one['decoded']) - np.array(many['decoded']))
  assert difference.max() <= 2  # rounding to bytes
  assert (difference > 0).mean() < 0.02


def test_a_mesh_that_does_not_fit(shallow_folder):
  with pytest.raises(UserError, match='mesh: data=1, fsdp=1, tensor=3 does not fit'):
    Lavit.from_pretrained(shallow_folder, mesh=dict(tensor=3))
