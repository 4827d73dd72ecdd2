"""Stage 2 with adapters: what trains, and that it is the stage with the merged weights."""

import chex
import jax
import jax.numpy as jnp
import nano
import numpy as np
import pytest

from lavit_jax.errors import UserError
from lavit_jax.models import lora
from lavit_jax.models.int8 import Int8
from lavit_jax.training.stages.base import frozen_params
from lavit_jax.training.train_step import abstract_inputs, make_init
from lavit_jax.weights.store.arrays import flatten, unflatten
from lavit_jax.weights.torch import adapters
from lavit_jax.weights.torch.adapters import Adapters, ModuleAdapter

nano.install()
OPTIONS = dict(
  lora__rank=3,
  lora__alpha=6.0,
  lora__targets=('q_proj', '^llama/.*/down/', '^understanding/', '^vit/.*/(qkv|fc1)/'),
  lora__modules_to_save=('lm_head',),
  lora__bias='lora_only',
)
SCALE = 2.0


def test_state_and_gradients_are_of_the_adapters_alone():
  """Shapes alone: nothing is compiled. With an int8 base, gradients pass through it."""
  run = nano.run('lm', **OPTIONS, lora__base_dtype='int8', lora__dropout=0.1)
  loaded, batch = abstract_inputs(run)
  init, _ = make_init(run, loaded)
  state = jax.eval_shape(init, jax.random.key(0), loaded)
  frozen = frozen_params(run.stage, loaded)
  names = {module: set(flatten(tree)) for module, tree in state.params.items()}
  query = 'layers/attention/query/lora'
  down = 'layers/mlp/down/lora'
  factors = {f'{layer}/{factor}' for layer in (query, down) for factor in 'ab'}
  assert names['llama'] == {'head', *factors}
  assert len(names['understanding']) == 3 * 9  # A, B and bias of each kernel
  assert names['vit'] == {
    f'blocks/{layer}/lora/{f}' for layer in ('attn/qkv', 'mlp/fc1') for f in 'ab'
  } | {'blocks/mlp/fc1/bias'}
  assert 'head' not in frozen['llama']
  kernels = {
    path: leaf for path, leaf in flatten(frozen['llama']).items() if path.endswith('kernel')
  }
  assert len(kernels) == 7 and all(isinstance(leaf, Int8) for leaf in kernels.values())
  types = {module: {leaf.dtype for leaf in jax.tree.leaves(frozen[module])} for module in frozen}
  assert types['tokenizer'] == {jnp.float32.dtype}
  assert types['understanding'] == {jnp.bfloat16.dtype, jnp.float32.dtype}
  # Two moments of each, and nothing of the weights beside them.
  count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
  moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
  assert sum(leaf.size for leaf in moments) == 2 * count

  def loss(params, batch):
    return run.stage.loss(params, frozen_zeros, {}, batch, jax.random.key(1), True)[0]

  frozen_zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), frozen)
  gradient = jax.eval_shape(jax.grad(loss), state.params, batch)
  assert jax.tree.structure(gradient) == jax.tree.structure(state.params)


def test_another_interface_trains_in_full_and_is_saved_whole(tmp_path):
  run = nano.run('lm', interface='mlp', lora__rank=2)
  assert run.stage.modules.needs == ('vit', 'llama') and run.stage.modules.takes == ('interface',)
  loaded, _ = abstract_inputs(run)
  params, _ = jax.eval_shape(run.stage.init, jax.random.key(0), loaded)
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), params)
  modules = {
    'llama': ModuleAdapter(params['llama'], 8.0, dict(peft_type='LORA', r=2, lora_alpha=16.0)),
    'interface': ModuleAdapter(params['interface'], 1.0, {}),
  }
  settings = {'interface': {'name': 'mlp'}}
  adapters.save_adapters(tmp_path / 'a', run.model, Adapters(modules, dict(settings=settings)))
  found = adapters.load_adapters(tmp_path / 'a', run.model)
  assert adapters.with_settings({}, found.info) == settings
  for name, adapter in modules.items():
    assert found.modules[name].scale == adapter.scale
    chex.assert_trees_all_equal(found.modules[name].trained, adapter.trained)


@pytest.mark.parametrize(
  'names, message',
  [
    (dict(lora__targets=('q_prj',)), "lora.targets: 'q_prj' names nothing in llama, .* q_proj"),
    (dict(lora__modules_to_save=('lm_hed',)), "lora.modules_to_save: 'lm_hed' names nothing"),
  ],
)
def test_names_of_nothing_are_refused(names, message):
  with pytest.raises(UserError, match=message):
    nano.run('lm', lora__rank=2, **names)


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


@pytest.mark.slow
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
          expected = SCALE * np.einsum('...io,...ro->...ir', expected, b)
          expected = expected.sum(-3) if b.ndim > a.ndim else expected
        else:
          a = a[:, None] if b.ndim > a.ndim else a
          expected = SCALE * np.einsum('...ir,...io->...ro', a, expected)
      bound = 1e-4 * max(1e-3, np.abs(expected).max())
      np.testing.assert_allclose(found, expected, rtol=0, atol=bound, err_msg=f'{module}/{path}')
      counts[module] += 1
  # Two kernels and the head; all 8 kernels of the merger and its projection, and their biases; two
  # kernels, of which fc1 has a bias.
  assert counts == {'llama': 2 * 2 + 1, 'understanding': 3 * 9, 'vit': 2 * 2 + 1}
