"""The permitted values of each config option: one table for all of them.

Types are strict: `True` is no number, and nan and infinity are refused. What depends on other
options or on files is checked in run.py.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from lavit_jax.data import transforms
from lavit_jax.data.emoji import questions
from lavit_jax.errors import UserError
from lavit_jax.models.interfaces.variants import LAVIT, OTHERS
from lavit_jax.models.remat import REMAT_POLICIES
from lavit_jax.models.settings import CHAT_TEMPLATES, CONDITIONS
from lavit_jax.training.lora import BASE_DTYPES, BIASES
from lavit_jax.training.profiler import parse_steps
from lavit_jax.training.schedule import SCHEDULES

# --- Kinds of values -----------------------------------------------------------------------------


class Kind(Protocol):
  """What values an option may have."""

  def fault(self, value: Any) -> str:
    """What is wrong with a value, '' if nothing."""
    ...


class Number(NamedTuple):
  """A number in a range."""

  kind: type  # int or float
  low: float
  high: float = math.inf
  above: bool = False  # whether `low` itself is excluded
  below: bool = False  # whether `high` itself is excluded
  also: tuple = ()  # other values that are permitted

  def fault(self, value: Any) -> str:
    """What is wrong with a value, '' if nothing."""
    if self._is_permitted(value):
      return ''
    return f'must be {self.describe()}'

  def _is_permitted(self, value: Any) -> bool:
    for other in self.also:
      if value is other or (type(value) is type(other) and value == other):
        return True
    kinds = (int, np.integer) if self.kind is int else (int, float, np.integer, np.floating)
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, kinds):
      return False
    if not math.isfinite(value):
      return False
    above = value > self.low if self.above else value >= self.low
    below = value < self.high if self.below else value <= self.high
    return bool(above and below)

  def describe(self) -> str:
    """The range in words."""
    name = 'an integer' if self.kind is int else 'a number'
    text = f'{name} {"above" if self.above else "of at least"} {self.low:g}'
    if self.high < math.inf:
      text += f' and {"below" if self.below else "at most"} {self.high:g}'
    return text + ''.join(f', or {other}' for other in self.also)


class Choice(NamedTuple):
  """One of several texts."""

  values: tuple[str, ...]

  def fault(self, value: Any) -> str:
    """What is wrong with a value, '' if nothing."""
    if isinstance(value, str) and value in self.values:
      return ''
    return f'is unknown; choose {" or ".join(self.values)}'


class Text(NamedTuple):
  """A text; its content is checked where it is used."""

  empty: bool = True  # whether it may be empty

  def fault(self, value: Any) -> str:
    """What is wrong with a value, '' if nothing."""
    if not isinstance(value, str):
      return 'must be a text'
    return '' if value or self.empty else 'must not be empty'


class Flag(NamedTuple):
  """True or False."""

  def fault(self, value: Any) -> str:
    """What is wrong with a value, '' if nothing."""
    return '' if isinstance(value, bool) else 'must be true or false'


class Steps(NamedTuple):
  """'FIRST:LAST', or ''."""

  def fault(self, value: Any) -> str:
    """What is wrong with a value, '' if nothing."""
    if isinstance(value, str) and parse_steps(value) is not None:
      return ''
    return 'must give the first and the last step to trace, such as 10:12'


class Ascending(NamedTuple):
  """A list of positive integers, each larger than the one before; it may be empty."""

  def fault(self, value: Any) -> str:
    """What is wrong with a value, '' if nothing."""
    if isinstance(value, (tuple, list)):
      kinds = all(isinstance(size, int) and not isinstance(size, bool) for size in value)
      if kinds and all(a < b for a, b in zip((0, *value), value, strict=False)):
        return ''
    return 'must list ascending integers of at least 1, such as (104, 176), or be ()'


class Sources(NamedTuple):
  """A list of sources, whose options are checked in data/sources.py."""

  def fault(self, value: Any) -> str:
    """What is wrong with a value, '' if nothing."""
    if isinstance(value, (tuple, list)):
      return ''
    return "must be a list of sources, ({'format': ..., 'path': ...},)"


class Regexes(NamedTuple):
  """A list of regular expressions, or of (regular expression, factor)."""

  factors: Number | None = None

  def fault(self, value: Any) -> str:
    """What is wrong with a value, '' if nothing."""
    if not isinstance(value, (tuple, list)):
      return f'must be {self.describe()}'
    faults = (self._item_fault(item) for item in value)
    return next((fault for fault in faults if fault), '')

  def _item_fault(self, item: Any) -> str:
    regex = item
    if self.factors is not None:
      if not isinstance(item, (tuple, list)) or len(item) != 2:
        return f'must be {self.describe()}; {item!r} is not'
      regex, factor = item
      fault = self.factors.fault(factor)
      if fault:
        return f'has the factor {factor!r} for {regex!r}, which {fault}'
    if not isinstance(regex, str):
      return f'must be {self.describe()}; {item!r} is not'
    try:
      re.compile(regex)
    except re.error as error:
      return f'has {regex!r}, which is not a regular expression ({error})'
    return ''

  def describe(self) -> str:
    """The list in words."""
    if self.factors is None:
      return "a list of regular expressions, ('^vit/',)"
    return "a list of pairs, (('^vit/', 0.1),)"


# --- The table -----------------------------------------------------------------------------------

COUNT = Number(int, 0)
AT_LEAST_ONE = Number(int, 1)
SHARE = Number(float, 0, 1)
WEIGHT = Number(float, 0, 1e6)
DECAY = Number(float, 0, 1, below=True)
DTYPE = Choice(('float32', 'bfloat16'))
AXIS = Number(int, 1, also=(-1,))
KINDS = ('caption', 'answer', 'draw', 'text', 'chat')
TOWER_SIZES = ('hidden_size', 'num_layers', 'num_heads', 'num_kv_heads', 'head_dim', 'mlp_dim')

OPTIONS: dict[str, Kind] = {
  'stage': Text(empty=False),  # stages/ knows them
  'variant': Text(empty=False),  # models/ knows them
  'seed': Number(int, 0, 2**31 - 1),
  'batch_size': AT_LEAST_ONE,
  'num_steps': Number(int, 1, 2**31 - 1),
  'accumulate': AT_LEAST_ONE,
  'dtype': DTYPE,
  'remat': Choice(('none', *REMAT_POLICIES)),
  'merger_capacities': Ascending(),
  'mesh.data': AXIS,
  'mesh.fsdp': AXIS,
  'mesh.tensor': AXIS,
  'peak_tflops': Number(float, 0),
  'frozen': Text(),
  'init_from': Text(),
  'data.task': Choice(('images', 'contrastive', 'lm')),
  'data.source': Text(empty=False),
  'data.image_size': Number(int, 1, 16384),
  'data.scene_share': SHARE,
  'data.augment': Flag(),
  'data.num_threads': Number(int, 0, 4096),
  'data.sources': Sources(),
  'data.heldout': Sources(),
  'data.shards': AT_LEAST_ONE,
  'data.crop': Choice(tuple(transforms.CROPS)),
  'data.max_skipped': SHARE,
  'data.tokenizer_folder': Text(empty=False),
  'data.text_length': AT_LEAST_ONE,
  'data.max_images': Number(int, 1, 64),
  'data.chat_template': Choice(CHAT_TEMPLATES),
  **{f'data.shares.{kind}': WEIGHT for kind in KINDS},
  **{
    f'data.question_weights.{kind}': Number(float, 0, 1e6, above=True) for kind in questions.TYPES
  },
  'data.max_questions': AT_LEAST_ONE,
  'data.draw_text_weight': WEIGHT,
  'data.drop_text': SHARE,
  **{f'text_tower.{size}': AT_LEAST_ONE for size in TOWER_SIZES},
  'pixel_weight': WEIGHT,
  'place_weight': WEIGHT,
  'name_weight': WEIGHT,
  'kl_weight': WEIGHT,
  'edge_weight': WEIGHT,
  'tokenizer.keep_ratio': Number(float, 0, 1, above=True),
  'tokenizer.ratio_weight': WEIGHT,
  'tokenizer.decay': DECAY,
  'tokenizer.commitment_weight': WEIGHT,
  'tokenizer.quantize_from': COUNT,
  'tokenizer.revive_after': COUNT,
  'tokenizer.freeze_selector_from': Number(int, -1),
  'tokenizer.ratio_scope': Choice(('image', 'batch')),
  'tokenizer.ratio_of': Choice(('choices', 'probabilities')),
  'tokenizer.entropy_weight': WEIGHT,
  'tokenizer.entropy_from': Number(int, 0, 2**31 - 1),
  'tokenizer.cross_attention_from': COUNT,
  'tokenizer.selection': Choice(('learned', 'shuffled', 'fixed')),
  'tokenizer.selector_gradient': Choice(('published', 'counterfactual')),
  'detokenizer.condition': Choice(CONDITIONS),
  'detokenizer.drop_condition': SHARE,
  'detokenizer.guidance_scale': Number(float, 0, 100),
  'interface': Choice((LAVIT, *OTHERS)),
  'lm.num_rows': AT_LEAST_ONE,
  'lm.row_length': AT_LEAST_ONE,
  'lm.mean_length': AT_LEAST_ONE,
  'lm.loss_chunks': AT_LEAST_ONE,
  'lm.image_loss': Flag(),
  'lm.regression_weight': WEIGHT,
  'lm.max_overflow': SHARE,
  'lora.rank': COUNT,
  'lora.alpha': Number(float, 0, 1e6, above=True),
  'lora.dropout': DECAY,
  'lora.targets': Regexes(),
  'lora.modules_to_save': Regexes(),
  'lora.bias': Choice(BIASES),
  'lora.rslora': Flag(),
  'lora.base_dtype': Choice(BASE_DTYPES),
  'qformer.output_dim': AT_LEAST_ONE,
  'qformer.dropout_rate': DECAY,
  'optim.learning_rate': Number(float, 0, 1, above=True),
  'optim.schedule': Choice(SCHEDULES),
  'optim.warmup_steps': COUNT,
  'optim.rewarm_from': COUNT,
  'optim.final_fraction': SHARE,
  'optim.weight_decay': Number(float, 0, 10),
  'optim.b1': DECAY,
  'optim.b2': DECAY,
  'optim.mu_dtype': DTYPE,
  'optim.nu_dtype': DTYPE,
  'optim.clip_norm': Number(float, 0, 1e6, above=True, also=(None,)),
  'optim.ema_decay': DECAY,
  'optim.max_nonfinite': AT_LEAST_ONE,
  'optim.freeze': Regexes(),
  'optim.clip_groups': Regexes(),
  'optim.muon': Regexes(),
  'optim.lr_scale': Regexes(Number(float, 0, 1e3)),
  'log_every': AT_LEAST_ONE,
  'eval_every': COUNT,
  'eval_batches': COUNT,
  'picture_every': COUNT,
  'checkpoint_every': COUNT,
  'keep': AT_LEAST_ONE,
  'skip_damaged': Flag(),
  'profile': Steps(),
}


def check_values(values: Mapping[str, Any]) -> None:
  """Checks each option of a config on its own.

  Args:
    values: 'optim.learning_rate' -> 0.1, ...

  Raises:
    UserError: one is unknown, of another type, or out of its range; in one line, with the range.
  """
  for key, value in values.items():
    if key not in OPTIONS:
      near = difflib.get_close_matches(key, OPTIONS, n=1)
      hint = f'; did you mean {near[0]}?' if near else ''
      raise UserError(f'{key} is not a config option{hint}')
    fault = OPTIONS[key].fault(value)
    if fault:
      raise UserError(f'{key}={value!r} {fault}')
