"""Into which form of another system (interface_files.py) a checkpoint is written, and what of it.

A converted checkpoint gets the form that it came from. One that was trained here gets the form that
has a place for most of it:

    interface      image encoder  form                 what is left out
    linear         any            llava_v1             the image encoder
    mlp            EVA            llava_v1.5           the image encoder
    mlp            CLIP           llava_transformers
    qformer        EVA            blip2_transformers   blocks, norm and head that are not used
    emu            EVA            emu
    flamingo       any            openflamingo         image encoder and language model
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lavit_jax.errors import UserError
from lavit_jax.models import lavit
from lavit_jax.models.clip_vit import ClipViT
from lavit_jax.models.interfaces.flamingo import FlamingoInterface
from lavit_jax.weights.store import folder
from lavit_jax.weights.torch import formats, interface_files
from lavit_jax.weights.torch.formats import ModuleLocation
from lavit_jax.weights.torch.interface_files import WITH_QKV_BIAS, Options, Tables
from lavit_jax.weights.torch.interface_sizes import NAMES
from lavit_jax.weights.torch.names_blip2 import join_qkv_bias
from lavit_jax.weights.torch.pickle_files import BIN, PickleForm
from lavit_jax.weights.torch.tensors import LazyTensor

Specs = Mapping[str, jax.ShapeDtypeStruct]  # path of a leaf -> its shape and dtype
PICKLES = {  # forms whose published files are not `.bin`
  'openflamingo': PickleForm('.pt'),
  'emu': PickleForm('.pt'),
  'blip2': PickleForm('.pth', 'model'),
  'instructblip': PickleForm('.pth', 'model'),
}
TOWER = 'vision_tower.'  # of LLaVA in transformers 5


@dataclasses.dataclass(frozen=True)
class InterfaceTarget:
  """The form of an export.

  Attributes:
    form: see interface_files.py.
    stem: of its files.
    tables: by module: the rules of its names.
    model: of the checkpoint.
    trained_here: whether the checkpoint was trained here, and not converted.
    text_rows: of the embedding of the language model, if the form has no others; else None.
  """

  form: str
  stem: str
  tables: Tables
  model: lavit.LavitModules
  trained_here: bool
  text_rows: int | None

  @property
  def locations(self) -> dict[str, ModuleLocation]:
    """By module: its files, which all share."""
    return {module: ModuleLocation(module, '', (self.stem,)) for module in self.tables}

  @property
  def pickle_form(self) -> PickleForm:
    """How `--bin` writes the form."""
    return PICKLES.get(self.form, BIN)

  @property
  def settings(self) -> dict[str, dict[str, Any]]:
    """Those of a checkpoint that the result becomes."""
    settings = {group: dict(fields) for group, fields in self.model.settings.items()}
    if self._unused_blocks:
      settings.setdefault('vit', {})['num_layers'] = self._encoder_blocks
      settings.setdefault('interface', {})['cut'] = 0
    return settings

  @property
  def model_as_written(self) -> lavit.LavitModules:
    """The model of `settings`."""
    return lavit.build(self.model.variant, settings=self.settings)

  def written_leaves(self, module: str, specs: Specs) -> dict[str, jax.ShapeDtypeStruct]:
    """What of a module's leaves the form has a place for."""
    written = dict(specs)
    if module == 'vit' and self._is_blip2:
      for path in specs:
        if path.startswith(('norm/', 'head/')):
          del written[path]
        elif path.startswith('blocks/'):
          written[path] = _resized(specs[path], 0, self._encoder_blocks)
    if module == 'llama' and self.text_rows is not None:
      for path, axis in (('embedding', 0), ('head', 1)):
        written[path] = _resized(specs[path], axis, self.text_rows)
    return written

  def joined_tensors(
    self, src: pathlib.Path, names: Mapping[str, int], dtype: str | None
  ) -> dict[str, LazyTensor]:
    """The tensors that are made of two leaves: the biases of queries, keys and values.

    Args:
      src: the checkpoint.
      names: torch name of a bias of the image encoder -> its layer.
      dtype: of the result; None keeps the dtypes.
    """
    if self.form not in WITH_QKV_BIAS:
      return {}
    source = folder.open_params(src, 'vit', dtype)
    biases = {}
    for name, layer in names.items():
      kind = name.rsplit('.', 1)[-1]
      if kind in ('q_bias', 'v_bias'):
        path = f'blocks/attn/{kind}'
        biases[name] = np.asarray(source.read(path))[layer]  # a few kB
    return {
      name: LazyTensor(array.shape, array.dtype, lambda array=array: array, src)
      for name, array in join_qkv_bias(biases).items()
    }

  def notes(self, modules: Mapping[str, Any]) -> list[str]:
    """What of the checkpoint the form has no place for.

    Args:
      modules: of the checkpoint.
    """
    lines = []
    left_out = [module for module in modules if module not in self.tables]
    if left_out:
      lines.append(f'not written, since {self.form} has no place for it: {", ".join(left_out)}')
    if self._unused_blocks:
      lines.append(f'vit: the last {self._unused_blocks} blocks, which are not used, are left out')
    if self.text_rows is not None and 'llama' in self.tables:
      lines.append(f'llama: the first {self.text_rows} rows, those of the text, are written')
    return lines

  @property
  def _is_blip2(self) -> bool:
    return self.form in ('blip2_transformers', 'instructblip_transformers')

  @property
  def _unused_blocks(self) -> int:
    return self.model.tower.cut if self._is_blip2 else 0

  @property
  def _encoder_blocks(self) -> int:
    return self.model.vit.num_layers - self._unused_blocks


def choose_target(
  src: pathlib.Path, model: lavit.LavitModules, config: Mapping[str, Any]
) -> InterfaceTarget | None:
  """The form of a checkpoint's export; None if it is one of formats.py.

  Args:
    src: the checkpoint, for messages.
    model: of it.
    config: its description (`folder.read_config`).

  Raises:
    UserError: no form has a place for its interface.
  """
  metadata = config['metadata']
  kind = metadata.get('source', {}).get('kind', formats.LAVIT)
  if kind in NAMES:
    origin = metadata['interface']
    rows = model.vocabulary.text_size if metadata.get('grown') else None
    tables = interface_files.form_tables(kind, **origin['options'])
    return InterfaceTarget(kind, origin['stem'], tables, model, False, rows)
  if 'interface' not in config['parts']:
    return None
  chosen = _form_of_trained(model, 'llama' in config['parts'])
  if chosen is None:
    raise UserError(
      f'{src} has the interface {model.interface_name!r}, for which no published form has a place'
    )
  form, options, stem = chosen
  tables = interface_files.form_tables(form, **options)
  return InterfaceTarget(form, stem, tables, model, True, None)


def _form_of_trained(model: lavit.LavitModules, has_llama: bool) -> tuple[str, Options, str] | None:
  """Form, options and stem of the files for what was trained here; None if there is none."""
  is_clip = isinstance(model.vit, ClipViT)
  projector_file = formats.TRANSFORMERS[0] if has_llama else 'mm_projector'
  if model.interface_name == 'linear':
    return 'llava_v1', dict(llama=has_llama), projector_file
  if model.interface_name == 'mlp' and not is_clip:
    return 'llava_v1.5', dict(llama=has_llama), projector_file
  if model.interface_name == 'mlp':
    return 'llava_transformers', dict(tower=TOWER, llama=has_llama), formats.TRANSFORMERS[0]
  if model.interface_name == 'qformer' and not is_clip:
    return 'blip2_transformers', dict(llama=has_llama), formats.TRANSFORMERS[0]
  if model.interface_name == 'emu' and not is_clip:
    return 'emu', {}, 'Emu'
  if isinstance(model.interface, FlamingoInterface):
    return 'openflamingo', dict(layers='model.layers', every=model.interface.every), 'checkpoint'
  return None


def _resized(spec: jax.ShapeDtypeStruct, axis: int, size: int) -> jax.ShapeDtypeStruct:
  shape = list(spec.shape)
  shape[axis] = min(size, shape[axis])
  return jax.ShapeDtypeStruct(tuple(shape), spec.dtype)
