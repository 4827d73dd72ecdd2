"""A stage whose parameters are low-rank adapters (models/lora.py) beside its modules' weights.

Optimizer, gradients, averages and checkpoints then have the adapters alone, and the weights are
read as those of earlier stages are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lavit_jax.models import lora
from lavit_jax.models.initialization import init_params
from lavit_jax.models.int8 import Int8
from lavit_jax.models.lavit import LavitModules
from lavit_jax.models.lora import LORA
from lavit_jax.training.lora import BaseWeights, LoraOptions, find_adapted
from lavit_jax.training.stages.base import ROW, ModuleNames, Stage, Tree, initialize_params
from lavit_jax.weights.store.arrays import flatten, unflatten
from lavit_jax.weights.torch import adapter_names
from lavit_jax.weights.torch.name_rules import NameRule

DROPOUT = 0x10  # folded into the key of a step


def module_names(modules: ModuleNames) -> ModuleNames:
  """The modules that a stage with adapters reads: a whole model, but for another interface.

  The adapters stand beside weights that exist; another interface than LaVIT's trains in full, and
  may begin anew.
  """
  beside = tuple(name for name in modules.takes if name in adapter_names.MODULES)
  takes = tuple(name for name in modules.takes if name not in beside)
  return ModuleNames(needs=modules.needs + beside, takes=takes)


def adapt(stage: Stage, options: LoraOptions, model: LavitModules) -> Stage:
  """The stage whose parameters are adapters, and what trains in full.

  Its parameters are {module: trained tree} as in models/lora.py. Another interface than LaVIT's
  trains in full.

  Args:
    stage: of the language model.
    options: with a rank above 0.
    model: the modules.

  Raises:
    UserError: an option names nothing.
  """
  adapted = find_adapted(options, model)
  modules = module_names(stage.modules)
  own = stage.modules.takes  # what the stage trains without adapters
  scale = options.scale

  def init(key: Array, loaded: Mapping[str, Tree]) -> tuple[Tree, Any]:
    trained: dict[str, Tree] = {}
    if modules.takes:
      trained |= initialize_params(
        init_params(model, key, modules.takes), _only(loaded, modules.takes)
      )
    flat: dict[str, dict[str, Any]] = {module: {} for module in adapted.modules}
    leaves = {module: flatten(loaded[module]) for module in adapted.modules}
    for module, path in adapted.in_full:
      flat[module][path] = jnp.asarray(leaves[module][path], jnp.float32)
    for number, (module, path) in enumerate(adapted.kernels):
      rule = adapter_names.leaf_rules(model, module)[path]
      own_key = jax.random.fold_in(key, number)
      adapter = init_adapter(own_key, leaves[module][path], rule, options.rank)
      layer = path.removesuffix('kernel') + LORA
      flat[module] |= {f'{layer}/{name}': factor for name, factor in adapter.items()}
    return trained | {module: unflatten(own) for module, own in flat.items()}, {}

  def attach(params, frozen, key=None):
    """All modules with what trains, as the stage's own (params, frozen)."""
    whole = dict(frozen)
    for number, (module, trained) in enumerate(sorted(params.items())):
      if module not in frozen:
        whole[module] = trained
        continue
      module_key = None if key is None else jax.random.fold_in(key, number)
      whole[module] = lora.attach(frozen[module], trained, scale, module_key, options.dropout)
    return _only(whole, own), {name: tree for name, tree in whole.items() if name not in own}

  def loss(params, frozen, state, batch, key, train):
    dropout_key = None
    if train and options.dropout:
      dropout_key = jax.random.fold_in(key, DROPOUT)
      if ROW in batch:  # other ones in each piece of a batch
        dropout_key = jax.random.fold_in(dropout_key, batch[ROW][0])
    own_params, own_frozen = attach(params, frozen, dropout_key)
    return stage.loss(own_params, own_frozen, state, batch, key, train)

  def draw(params, frozen, state, batch, key):
    assert stage.draw is not None
    return stage.draw(*attach(params, frozen), state, batch, key)

  def export(params, state):
    del state
    return params

  return stage._replace(
    modules=modules,
    init=init,
    loss=loss,
    export=export,
    draw=None if stage.draw is None else draw,
    base=BaseWeights(options.base_dtype, adapted.in_full),
  )


def init_adapter(key: Array, kernel: Any, rule: NameRule, rank: int) -> dict[str, Array]:
  """A fresh adapter of a kernel, which changes nothing yet.

  A is uniform in +-1 / sqrt(I), as peft's; B is zero.

  Args:
    key: of the adapter.
    kernel: [..., I, O], or an Int8 of it; or its shapes.
    rule: of the kernel's name.
    rank: r.
  """
  if isinstance(kernel, Int8):
    *leading, outputs, inputs = kernel.values.shape
  else:
    *leading, inputs, outputs = kernel.shape
  stack = leading[:1] if rule.is_stack else []
  bound = inputs**-0.5
  a = jax.random.uniform(key, (*stack, inputs, rank), jnp.float32, -bound, bound)
  return dict(a=a, b=jnp.zeros((*leading, rank, outputs)))


def _only(tree: Mapping[str, Tree], names: Collection[str]) -> dict[str, Tree]:
  return {name: tree[name] for name in names if name in tree}
