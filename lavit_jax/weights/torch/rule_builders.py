"""Builds the rules of common layers, and rules from rules."""

from __future__ import annotations

from lavit_jax.weights.torch.name_rules import NameRule

# --- Layers ----------------------------------------------------------------------------------


def linear_rules(name: str, leaf: str | None = None) -> list[NameRule]:
  """A Linear of torch is a Dense of Flax."""
  leaf = leaf or name.replace('.', '/')
  return [
    NameRule(f'{name}.weight', f'{leaf}/kernel', 'linear'),
    NameRule(f'{name}.bias', f'{leaf}/bias'),
  ]


def norm_rules(name: str, leaf: str | None = None) -> list[NameRule]:
  """A LayerNorm."""
  leaf = leaf or name.replace('.', '/')
  return [NameRule(f'{name}.weight', f'{leaf}/scale'), NameRule(f'{name}.bias', f'{leaf}/bias')]


def mlp_rules() -> list[NameRule]:
  """`Mlp`, under the names of timm and of CLIP."""
  return [*linear_rules('mlp.fc1'), *linear_rules('mlp.fc2')]


def fused_attention_rules(name: str, leaf: str | None = None) -> list[NameRule]:
  """Self-attention with one projection for query, key and value."""
  leaf = leaf or name
  return [
    NameRule(f'{name}.qkv.weight', f'{leaf}/qkv/kernel', 'qkv'),
    NameRule(f'{name}.qkv.bias', f'{leaf}/qkv/bias', 'qkv_bias'),
    *linear_rules(f'{name}.proj', f'{leaf}/proj'),
  ]


def attention_rules(name: str, leaf: str | None = None) -> list[NameRule]:
  """Cross-attention with a projection each for query, key and value."""
  leaf = leaf or name
  return [
    *linear_rules(f'{name}.query', f'{leaf}/query'),
    *linear_rules(f'{name}.key', f'{leaf}/key'),
    *linear_rules(f'{name}.value', f'{leaf}/value'),
    *linear_rules(f'{name}.proj', f'{leaf}/proj'),
  ]


# --- Rules from rules ------------------------------------------------------------------------


def nested_rules(name: str, leaf: str, rules: list[NameRule]) -> list[NameRule]:
  """Rules one level down on both sides: with these prefixes."""
  deeper = []
  for rule in rules:
    path = None if rule.leaf is None else f'{leaf}{rule.leaf}'
    deeper.append(rule._replace(name=f'{name}{rule.name}', leaf=path))
  return deeper


def optional(rules: list[NameRule]) -> list[NameRule]:
  """Rules that a file may lack."""
  return [rule._replace(optional=True) for rule in rules]


def of_other_module(rules: list[NameRule]) -> list[NameRule]:
  """Names that the file may hold for another module."""
  return [rule._replace(leaf=None) for rule in rules]
