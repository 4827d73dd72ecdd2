"""Stage 2 with adapters: what trains, and that it is the stage with the merged weights."""

import jax
import nano
import numpy as np
import pytest

from lavit_jax.models import lora
from lavit_jax.training.stages.base import frozen_params
from lavit_jax.weights.store.arrays import flatten, unflatten

nano.install()
OPTIONS = dict(
  lora__rank=3,
  lora__alpha=6.0,
  lora__targets=('q_proj', '^llama/.*/down/', '^understanding/', '^vit/.*/(qkv|fc1)/'),
  lora__modules_to_save=('lm_head',),
  lora__bias='lora_only',
)
SCALE = 2.0


@pytest.fixture(scope='module')
def adapted(parts):
  """The stage, its frozen parameters, and parameters at which all adapters have an effect."""
  stage = nano.run('lm', **OPTIONS).stage
  params, _ = nano.init_stage(stage, parts)
  rng = np.random.default_rng(1)

  def move(path, leaf):
    scale = 0.3 if path[-1].key == 'b' else 0.0
    return np.asarray(leaf) + rng.normal(0, scale, leaf.shape).astype(np.float32)

  return stage, frozen_params(stage, parts), jax.tree_util.tree_map_with_path(move, params)


def gradients(stage, params, frozen, batch):
  """(loss, gradient by the path of a leaf), by parameters and by those of the image encoder."""

  def loss(params, vit, batch):
    frozen_now = dict(frozen, vit=vit)
    return stage.loss(params, frozen_now, {}, batch, jax.random.key(1), True)[0]

  program = nano.jit(jax.value_and_grad(loss, (0, 1)))
  value, gradient = jax.device_get(program(params, frozen['vit'], batch))
  return value, gradient


def test_loss_and_gradients_are_those_of_the_merged_weights(parts, batch, adapted):
  """By the chain rule: dA = s dW B^T, dB = s A^T dW; computed without adapters."""
  stage, frozen, params = adapted
  value, (gradient, _) = gradients(stage, params, frozen, batch)
  merged = {}
  for module in ('llama', 'understanding', 'vit'):
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(parts[module]).items()}
    trained = flatten(params[module])
    leaves |= {path: leaf for path, leaf in trained.items() if '/lora/' not in path}
    for path, adapter in lora.adapters(params[module]):
      kernel = path.removesuffix('lora') + 'kernel'
      a, b = (adapter[name].astype(np.float64) for name in 'ab')
      change = SCALE * np.einsum('...ir,...ro->...io', a[:, None] if b.ndim > a.ndim else a, b)
      leaves[kernel] = (leaves[kernel] + change).astype(np.float32)
    merged[module] = unflatten(leaves)
  plain = nano.run('lm').stage
  own = {name: merged[name] for name in ('llama', 'understanding')}
  reference, (of_own, of_vit) = gradients(plain, own, {**parts, 'vit': merged['vit']}, batch)
  assert value == pytest.approx(reference, rel=1e-5)
  whole = {**of_own, 'vit': of_vit}
  counts = {}
  for module, tree in gradient.items():
    full = flatten(whole[module])
    trained = flatten(params[module])
    counts[module] = 0
    for path, found in flatten(tree).items():
      layer, _, name = path.rpartition('lora/')
      expected = full[path] if not layer else full[f'{layer}kernel'].astype(np.float64)
      if layer:
        a, b = trained[f'{layer}lora/a'], trained[f'{layer}lora/b']
        if name == 'a':
          products = 'nio,nro->ir' if b.ndim > a.ndim and a.ndim == 2 else None
          expected = SCALE * np.einsum('...io,...ro->...ir', expected, b)
          expected = expected.sum(-3) if b.ndim > a.ndim else expected
          assert products is None
        else:
          a = a[:, None] if b.ndim > a.ndim else a
          expected = SCALE * np.einsum('...ir,...io->...ro', a, expected)
      bound = 1e-4 * max(1e-3, np.abs(expected).max())
      np.testing.assert_allclose(found, expected, rtol=0, atol=bound, err_msg=f'{module}/{path}')
      counts[module] += 1
  # Two kernels and the head; all 8 kernels of the merger and its projection, and their biases; two
  # kernels, of which fc1 has a bias.
  assert counts == {'llama': 2 * 2 + 1, 'understanding': 3 * 9, 'vit': 2 * 2 + 1}
