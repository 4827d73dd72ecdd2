"""Matches the modules of a source with a variant, or lists all that does not match."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import jax

from lavit_jax.models import lavit
from lavit_jax.weights.torch import name_tables
from lavit_jax.weights.torch.formats import SourceModule
from lavit_jax.weights.torch.mapping import MappingPlan, PortingError, make_plan, torch_shapes
from lavit_jax.weights.torch.state_dict_names import EMBEDDING, HEAD
from lavit_jax.weights.torch.tensors import LazyTensor


class MappedModule(NamedTuple):
  """A module that matches the model.

  Attributes:
    plan: how tensors become leaves.
    state: torch name -> tensor.
    table: the index of the name table that matches.
  """

  plan: MappingPlan
  state: dict[str, LazyTensor]
  table: int


def map_modules(
  model: lavit.LavitModules,
  sources: list[SourceModule],
  allow_missing: str = '',
  mixed: bool = False,
) -> dict[str, MappedModule]:
  """Matches every module with the model.

  A language model may have embeddings for the text alone: the result then has these, and training
  adds the others.

  Args:
    model: of the variant.
    sources: the modules.
    allow_missing: regex of torch names that may be missing.
    mixed: layers of one stack may have several floating types, since the result will have one.

  Raises:
    PortingError: lists all that is wrong with any of the modules.
  """
  shapes = name_tables.module_shapes(model, [source.module for source in sources])
  mapped = {}
  problems = []
  for source in sources:
    module = source.module
    if module not in shapes:
      problems.append(f'{module}: the variant {model.variant!r} has no such module')
      continue
    like = name_tables.as_tree(shapes[module])
    state = source.merged
    if module == 'llama' and EMBEDDING in state:
      vocab_size = state[EMBEDDING].shape[0]
      if vocab_size == model.vocabulary.text_size:
        like = {**like, **vocabulary_shapes(like, vocab_size)}
      elif vocab_size != model.vocabulary.size:
        problems.append(_wrong_vocabulary(model, vocab_size))
        continue
    table = name_tables.choose_table(model, module, state)
    rules = name_tables.name_rules(model, module)[table]
    try:
      plan = make_plan(rules, state, like, allow_missing, mixed)
    except PortingError as error:
      problems += [f'{module}: {problem}' for problem in error.problems]
    else:
      mapped[module] = MappedModule(plan, state, table)
  if problems:
    raise PortingError(f'checkpoint and variant {model.variant!r} do not fit', problems)
  return mapped


def vocabulary_shapes(like: Mapping, vocab_size: int) -> dict[str, jax.ShapeDtypeStruct]:
  """Embedding [V, H] and head [H, V] of a language model with this vocabulary."""
  embedding = like['embedding']
  width = embedding.shape[1]
  return dict(
    embedding=jax.ShapeDtypeStruct((vocab_size, width), embedding.dtype),
    head=jax.ShapeDtypeStruct((width, vocab_size), embedding.dtype),
  )


def _wrong_vocabulary(model: lavit.LavitModules, vocab_size: int) -> str:
  text_size = model.vocabulary.text_size
  return (
    f'llama: wrong rows: the vocabulary has {vocab_size}; supported are {text_size} (the text '
    f'alone: the rows of the visual tokens are added) and {model.vocabulary.size} (with them). To '
    "remove rows that a <pad> token added, call transformers' "
    f'resize_token_embeddings({text_size}) before save_pretrained'
  )


def find_variant(sources: list[SourceModule]) -> str:
  """The variant that matches the most modules, then the most tensors; the larger of equals.

  `map_modules` lists what does not match.
  """

  def complete_modules(variant: str) -> int:
    """How many modules in a row match, up to the first that does not: the rest is not traced."""
    model = lavit.build(variant)
    counts = (_count_matches(model, source) for source in sources)
    return sum(1 for _ in itertools.takewhile(lambda count: count[0] == count[1], counts))

  def matching_tensors(variant: str) -> int:
    model = lavit.build(variant)
    return sum(_count_matches(model, source)[0] for source in sources)

  complete = {variant: complete_modules(variant) for variant in reversed(lavit.VARIANTS)}
  most = max(complete.values())
  candidates = [variant for variant, count in complete.items() if count == most]
  return candidates[0] if len(candidates) == 1 else max(candidates, key=matching_tensors)


def _count_matches(model: lavit.LavitModules, source: SourceModule) -> tuple[int, int]:
  """How many tensors have the variant's shapes, of how many that the variant has.

  The vocabulary does not count, since two sizes of it are read.
  """
  shapes = name_tables.module_shapes(model, [source.module])
  if not shapes:
    return 0, 1
  state = source.merged
  table = name_tables.choose_table(model, source.module, state)
  rules = name_tables.name_rules(model, source.module)[table]
  expected = torch_shapes(rules, name_tables.as_tree(shapes[source.module]))
  shared = [name for name in expected if name in state and name not in (EMBEDDING, HEAD)]
  same = [name for name in shared if state[name].shape == expected[name]]
  return len(same), len(shared)
