"""The names that the library peft gives to adapters, and the kernels that may have one.

A kernel whose rule is `model.layers.{i}.self_attn.q_proj.weight` has the adapters

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight   [r, I]
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight   [O, r]

Those of modules that are no language model have the same form by the names of their own files. A
kernel of n products (attention.QKV) is one [n * O, I] there, and so has one A for all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from lavit_jax.errors import UserError
from lavit_jax.models.lavit import LavitModules
from lavit_jax.weights.torch.name_rules import TRANSFORMS, NameRule
from lavit_jax.weights.torch.name_tables import TABLES, name_rules

PREFIX = 'base_model.model.'
PRODUCTS = ('linear', 'qkv', 'kv')  # transforms of kernels by which a layer multiplies its input
MODULES = ('llama', 'understanding', 'vit')  # those that may have adapters


def leaf_rules(model: LavitModules, module: str) -> dict[str, NameRule]:
  """By path: the rule of each leaf of a module; {} for one without a table."""
  if module not in TABLES:
    return {}
  rules = name_rules(model, module)[0]
  return {rule.leaf: rule for rule in rules if rule.leaf is not None}


def is_adaptable(rule: NameRule) -> bool:
  """Whether a leaf is a kernel that may have an adapter."""
  is_kernel = (rule.leaf or '').endswith('/kernel')
  return is_kernel and rule.transform in PRODUCTS and not rule.optional


def matches(target: str, module: str, rule: NameRule) -> bool:
  """Whether a target names a leaf.

  Args:
    target: a regex that is searched in the path, such as '^llama/.*/query/kernel$'; or the end of
      the PyTorch name of its layer, as peft takes it: 'q_proj' or 'self_attn.q_proj'.
    module: of the leaf.
    rule: of the leaf.
  """
  layer = '.' + layer_name(rule)
  return layer.endswith(f'.{target}') or bool(re.search(target, f'{module}/{rule.leaf}'))


def find_leaves(
  option: str, targets: Iterable[str], rules: dict[str, dict[str, NameRule]]
) -> list[tuple[str, str]]:
  """(module, path) of the leaves that any of the targets names.

  Args:
    option: for messages.
    targets: see `matches`.
    rules: by module and path: of the leaves that may be named.

  Raises:
    UserError: a target names none.
  """
  leaves = []
  targets = list(targets)
  matched = set()
  for module, of_module in rules.items():
    for path, rule in of_module.items():
      hits = [target for target in targets if matches(target, module, rule)]
      matched.update(hits)
      if hits:
        leaves.append((module, path))
  for target in targets:
    if target not in matched:
      known = sorted(
        {layer_name(rule).rpartition('.')[2] for of in rules.values() for rule in of.values()}
      )
      raise UserError(
        f'{option}: {target!r} names nothing in {", ".join(rules)}; give a regular expression of '
        f"paths such as '^llama/layers/', or names of layers: {', '.join(known)}"
      )
  return leaves


def layer_name(rule: NameRule) -> str:
  """'model.layers.{i}.self_attn.q_proj' of the rule of its weight."""
  return rule.name.rpartition('.')[0]


def tensor_names(rule: NameRule, layer: int | None) -> tuple[str, str]:
  """The names of A and B of a kernel, or of one layer of it."""
  name = rule.name if layer is None else rule.layer_name(layer)
  name = PREFIX + name.removesuffix('.weight')
  return f'{name}.lora_A.weight', f'{name}.lora_B.weight'


def to_peft(rule: NameRule, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(a [I, r], b [r, O] or [n, r, O]) -> (A [r, I], B [O, r] or [n * O, r])."""
  return a.T, TRANSFORMS[rule.transform].to_torch(b)


def from_peft(rule: NameRule, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The inverse of `to_peft`."""
  return a.T, TRANSFORMS[rule.transform].to_flax(b)
