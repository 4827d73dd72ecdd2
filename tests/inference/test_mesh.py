"""Inference over eight virtual devices says and draws what one device does, its rows and its heads split between them."""

import json
import os
import subprocess
import sys

import pytest

from lavit_jax.errors import UserError
from lavit_jax.inference.pipeline import Lavit

SCRIPT = """
import dataclasses, json, sys
import jax, jax.numpy as jnp
from pathlib import Path
from lavit_jax import Lavit
from lavit_jax.porting import from_torch

weights, heads = sys.argv[1] or None, int(sys.argv[2])
folder, parts = Path('lavit_jax/assets/tiny'), ('vit', 'tokenizer', 'understanding', 'decoder', 'llama', 'unet', 'uncond_embeddings', 'vae')
one = Lavit.from_pretrained(folder, weights_dtype=weights)
llama, trees = one.modules.llama, {name: from_torch(folder, name, variant='tiny') for name in parts}
attention, more = trees['llama']['layers']['attention'], (heads - llama.num_heads) * llama.head_dim
for name in ('query', 'key', 'value'):
  attention[name]['kernel'] = jnp.pad(attention[name]['kernel'], [(0, 0), (0, 0), (0, more)])
attention['proj']['kernel'] = jnp.pad(attention['proj']['kernel'], [(0, 0), (0, more), (0, 0)])  # what the new heads say is not heard
model = dataclasses.replace(one.modules, llama=llama.clone(num_heads=heads, num_kv_heads=heads))
many = Lavit(model, trees, one.tokenizer, weights_dtype=weights, mesh=dict(data=2, fsdp=2, tensor=2))

rows, constrain = set(), jax.lax.with_sharding_constraint
jax.lax.with_sharding_constraint = lambda x, places: rows.add(len(x)) or constrain(x, places)
photos, out = [Path('lavit_jax/assets/demo') / f'0{n}.png' for n in (1, 2, 3, 4)], []
for model in (one, many):
  told = model.caption(photos)
  tokens = model.tokenize(photos)
  codes = model.sample_codes([[photos[0], 'on a red background'], ['an owl']])  # with the prompts of the guidance these are four rows
  drawn = model.decode_images(tokens.ids, num_inference_steps=2)
  held = jax.tree.leaves(model.params['llama'])
  out.append(dict(told=told, tokens=[x.tolist() for x in tokens.ids], codes=[x.tolist() for x in codes], drawn=drawn.tolist(),
                  placed=sorted({len(x.sharding.device_set) for x in held}), split=sum(not x.sharding.is_fully_replicated for x in held),
                  rows=sorted(rows)))
print(json.dumps(out))
"""


@pytest.mark.slow
@pytest.mark.parametrize('weights, heads', [('', 8), ('int8', 5)])
def test_a_mesh_says_what_one_device_says(weights, heads):
  """The tiny checkpoint, and the same with three more heads that change nothing: two devices along `tensor` have four each, or two and a half.
  Rows are split four ways; of a text two under guidance are four."""
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
  assert (
    one['placed'] == [1]
    and many['placed'] == [8]
    and many['split'] > 20
    and one['rows'] == []
    and 4 in many['rows']
  )
  assert (
    one['told'] == many['told']
    and one['tokens'] == many['tokens']
    and one['codes'] == many['codes']
  )
  far = [
    abs(a - b)
    for x, y in zip(one['drawn'], many['drawn'])
    for p, q in zip(x, y)
    for u, v in zip(p, q)
    for a, b in zip(u, v)
  ]
  assert max(far) <= 2 and sum(d > 0 for d in far) < 0.02 * len(far)  # rounding to bytes


def test_a_mesh_that_does_not_fit(tiny_folder):
  with pytest.raises(UserError, match='mesh: data=1, fsdp=1, tensor=3 does not fit'):
    Lavit.from_pretrained(tiny_folder, mesh=dict(tensor=3))
