"""Inference over eight virtual devices says and draws what one device does."""

import json
import os
import subprocess
import sys

import pytest

from lavit_jax.inference.pipeline import Lavit
from lavit_jax.errors import UserError

SCRIPT = '''
import json, sys
import jax, numpy as np
from pathlib import Path
from lavit_jax import Lavit

out = []
photos = [Path('lavit_jax/assets/demo') / f'0{n}.png' for n in (1, 2)]
for mesh in (None, dict(data=2, fsdp=2, tensor=2)):
  model = Lavit.from_pretrained('lavit_jax/assets/tiny', mesh=mesh, weights=sys.argv[1] or None)
  told = model.caption(photos)
  tokens = model.tokenize(photos)
  codes = model.sample_codes([[photos[0], 'on a red background']])
  drawn = model.draw(codes, steps=2)
  placed = {len(x.sharding.device_set) for x in jax.tree.leaves(model.parts['llama'])}
  split = sum(not x.sharding.is_fully_replicated for x in jax.tree.leaves(model.parts['llama']))
  out.append(dict(told=told, tokens=[x.tolist() for x in tokens.ids], codes=[x.tolist() for x in codes], drawn=drawn.tolist(),
                  placed=sorted(placed), split=split))
print(json.dumps(out))
'''


@pytest.mark.slow
@pytest.mark.parametrize('weights', ['', 'int8'])
def test_a_mesh_says_what_one_device_says(weights):
  env = {**os.environ, 'XLA_FLAGS': '--xla_force_host_platform_device_count=8', 'JAX_PLATFORMS': 'cpu'}
  done = subprocess.run([sys.executable, '-c', SCRIPT, weights], env=env, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr[-3000:]
  one, many = json.loads(done.stdout.splitlines()[-1])
  assert one['placed'] == [1] and many['placed'] == [8] and many['split'] > 20
  assert one['told'] == many['told'] and one['tokens'] == many['tokens'] and one['codes'] == many['codes']
  far = [abs(a - b) for x, y in zip(one['drawn'], many['drawn']) for p, q in zip(x, y) for u, v in zip(p, q) for a, b in zip(u, v)]
  assert max(far) <= 2 and sum(d > 0 for d in far) < 0.02 * len(far)  # rounding to bytes


def test_a_mesh_that_does_not_fit(tiny_folder):
  with pytest.raises(UserError, match='mesh: data=1, fsdp=1, tensor=3 does not fit'):
    Lavit.from_pretrained(tiny_folder, mesh=dict(tensor=3))
