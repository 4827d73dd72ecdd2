"""The options that choose an interface: what follows from them, and what contradicts them.

They are `interface` of stage `lm`, and `detokenizer.condition`.

An interface of another system than LaVIT (models/interfaces) has no codes, so no images are drawn
unless it is Emu's, and another number of tokens an image, so pairs have another length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import FieldReference

from lavit_jax.errors import UserError
from lavit_jax.models import lavit
from lavit_jax.models.interfaces.variants import DRAWING, LAVIT, OTHERS
from lavit_jax.models.settings import CODES
from lavit_jax.training.config import derived
from lavit_jax.training.parameters import ParameterFolder, Settings
from lavit_jax.weights.store import folder

LAVIT_RATIO = 1 / 3  # share of the patches that are LaVIT's tokens: specification, Training

# --- Defaults ------------------------------------------------------------------------------------


def follow_interface(values: Mapping[str, Any], read_length: int) -> dict[str, Any]:
  """The values of a config, of which some follow its option `interface`.

  Args:
    values: of the config; `lm.num_rows`, `lm.row_length`, `lm.mean_length`, `data.sources`,
      `data.heldout` and `data.shares` are those of LaVIT's interface.
    read_length: `lm.mean_length` with LaVIT's interface if no images are to be drawn: the texts of
      pairs that are read may be longer.

  Returns:
    The same with references in place of these values: with an interface that draws nothing the
    share of images to draw is 0, and sources of them are left out; with any other than LaVIT's the
    slots of a step have the proportion of the mean length: there are fewer rows, and where the
    pieces of a batch allow no fewer, shorter ones.
    An unknown interface changes nothing, and is reported when the config is checked.
  """
  interface = FieldReference(values['interface'])
  variant = values['variant']
  num_rows = values['lm']['num_rows']
  length = values['lm']['mean_length']

  def mean_length(name: str) -> int:
    if name not in OTHERS:
      return length
    return _mean_length(variant, name, length if name in DRAWING else read_length)

  divisor = num_rows & -num_rows  # the power of two by which pieces of a batch divide it

  def halvings(name: str) -> int:
    """How often to halve `row_length`: there cannot be fewer rows than the divisor."""
    fewest = divisor * length / (num_rows * mean_length(name))
    return max(0, math.floor(math.log2(fewest)))

  def rows(name: str) -> int:
    return _round_up(2 ** halvings(name) * num_rows * mean_length(name) / length, divisor)

  def row_length(name: str) -> int:
    return values['lm']['row_length'] // 2 ** halvings(name)

  def draw_share(name: str) -> float:
    return 0.0 if _draws_nothing(name) else values['data']['shares']['draw']

  def sources(key: str) -> FieldReference:
    all_sources = values['data'][key]
    return derived(
      interface, lambda name: _without_drawing(all_sources) if _draws_nothing(name) else all_sources
    )

  data = dict(values['data'], sources=sources('sources'), heldout=sources('heldout'))
  data['shares'] = dict(data['shares'], draw=derived(interface, draw_share))
  packing = dict(
    num_rows=derived(interface, rows),
    row_length=derived(interface, row_length),
    mean_length=derived(interface, mean_length),
  )
  return dict(values, interface=interface, data=data, lm=dict(values['lm'], **packing))


def _draws_nothing(name: str) -> bool:
  return name in OTHERS and name not in DRAWING


def _mean_length(variant: str, name: str, of_lavit: int) -> int:
  """The mean length of pairs with another interface, whose texts are as long as with LaVIT's."""
  model = lavit.build(variant, settings={'interface': {'name': name}})
  return round(of_lavit - LAVIT_RATIO * model.num_patches + model.max_visual_tokens)


def _without_drawing(sources: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
  """The sources without those whose images are to be drawn."""
  return tuple(source for source in sources if source.get('use') != 'draw')


def _round_up(number: float, multiple: int) -> int:
  return multiple * -int(-number // multiple)


# --- Checks --------------------------------------------------------------------------------------


def check_drawing(
  interface: str,
  shares: Mapping[str, float],
  sources: Sequence[Mapping[str, Any]] = (),
  heldout: Sequence[Mapping[str, Any]] = (),
) -> None:
  """Checks that nothing is to be drawn with an interface that cannot.

  Raises:
    UserError: a share or a source has the use 'draw'.
  """
  if interface in DRAWING:
    return
  reason = f'interface={interface!r} has no codes, so its language model draws no images'
  if shares.get('draw', 0):
    raise UserError(f'data.shares.draw={shares["draw"]}: {reason}; give data.shares.draw=0')
  for key, all_sources in (('sources', sources), ('heldout', heldout)):
    for number, source in enumerate(all_sources):
      if source.get('use') == 'draw':
        raise UserError(
          f"data.{key}[{number}] has use 'draw': {reason}; give it use 'caption', or leave it out"
        )


def with_interface(
  settings: Settings, interface: str, folders: Sequence[ParameterFolder] = ()
) -> Settings:
  """The settings of a run with the interface of its config, whatever its folders had.

  Args:
    settings: of the folders and of the last checkpoint.
    interface: of the config.
    folders: that the run starts from.

  Raises:
    UserError: a folder of `init_from` has parameters of another interface.
  """
  others = {name: fields for name, fields in settings.items() if name != 'interface'}
  if interface == LAVIT:
    return others
  for source in folders:
    if 'interface' not in source.modules:
      continue
    stored = folder.read_settings(source.path).get('interface', {}).get('name')
    if stored != interface:
      raise UserError(
        f'init_from={source.path} has the interface {stored!r}, and the config has '
        f'interface={interface!r}; give --config.interface={stored}, or leave the folder out'
      )
  own = settings.get('interface', {})
  return {**others, 'interface': own if own.get('name') == interface else {'name': interface}}


def with_condition(
  settings: Settings, condition: str, folders: Sequence[ParameterFolder] = ()
) -> Settings:
  """The settings of a run of stage `detokenizer`, whose U-Net reads `condition`.

  Args:
    settings: of the folders and of the last checkpoint.
    condition: of the config.
    folders: that the run starts from.

  Raises:
    UserError: the U-Net of a folder of `init_from` reads another one; the interface of a folder is
      not the one whose vectors the U-Net should read.
  """
  for source in folders:
    if 'unet' not in source.modules:
      continue
    stored = folder.read_settings(source.path).get('condition', {}).get('name', CODES)
    if stored != condition:
      raise UserError(
        f'init_from={source.path} has a U-Net that reads {stored!r}, and the config has '
        f'detokenizer.condition={condition!r}; give --config.detokenizer.condition={stored}, or '
        'leave the folder out'
      )
  others = {name: fields for name, fields in settings.items() if name != 'condition'}
  if condition == CODES:
    return others
  chosen = {'name': condition}
  interface = others.setdefault('interface', chosen)
  if interface.get('name') != condition:
    raise UserError(
      f'detokenizer.condition={condition!r}: the interface of frozen is {interface["name"]!r}; '
      f'name the export of a run of stage lm with --config.interface={condition}'
    )
  return {**others, 'condition': chosen}
