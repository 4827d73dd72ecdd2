"""The user's API: from images and texts to texts and images.

    model = Lavit.from_pretrained('lavit_jax/assets/tiny')
    model.caption(['cat.png', photo])                   # ['cat on a red background', ...]
    model.answer(['cat.png'], ['What is this?'])        # ['cat']
    model.generate(['pizza on a blue background'])      # uint8[1, 64, 64, 3]
    model.synthesize([[Path('cat.png'), 'on a red background']])
    model.reconstruct(['cat.png'])

Each task is a few compiled programs (compiled.py, image_decoder.py). Batches are padded to powers
of two and prompts to multiples of N, so that few shapes compile. The parameters of a module are
read when a task first needs them. Defaults are those of the published results (specification,
Inference).

The results of a batch are fetched in one transfer while the device computes the next. Two more
transfers tell the host how many tokens there are: the number of tokens of each image, before a
caption's or an answer's prompt gets its shape; and codes, before they are decoded or become part of
a prompt.

Axes: B images, N patches.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from lavit_jax import sharding
from lavit_jax.data.chat import TEMPLATES
from lavit_jax.data.text import TextTokenizer
from lavit_jax.errors import UserError
from lavit_jax.inference.deprecated import DeprecatedNames, api_method
from lavit_jax.inference.image_tasks import ImageTasks
from lavit_jax.inference.text_tasks import TextTasks
from lavit_jax.local_paths import expand_home
from lavit_jax.models import lavit
from lavit_jax.models.interfaces.variants import LAVIT
from lavit_jax.weights.loader import CheckpointInfo, LazyParams, open_checkpoint
from lavit_jax.weights.torch.adapters import load_adapters, read_info, with_settings

DTYPES = (None, 'float32', 'bfloat16', 'float16')
WEIGHTS_DTYPES = (None, 'int8')
CACHE_DTYPES = (None, 'bfloat16', 'int8')


class Lavit(TextTasks, ImageTasks, DeprecatedNames):
  """A model with its parameters and its tokenizer.

  Images are whatever `data.images.read_image` reads: paths, bytes, PIL images, arrays. Wrong input
  raises UserError, NaN or infinity in a result NotFinite (faults.py).

  Which patches of an image become tokens is sampled, as in training and in the published results,
  by a key of `seed` and the index of the image. With seed=None, `tokenize`, `caption` and `answer`
  keep the most probable patches instead. A `seed` may be an `IndexedSeed`, for a part of a longer
  run.

  A method `..._outputs` returns the result of the method without the suffix, with details.
  """

  @api_method(positional=('weights_dtype', 'cache_dtype', 'safety_checker', 'mesh'))
  def __init__(
    self,
    modules: lavit.LavitModules,
    params: Mapping[str, Any] | LazyParams | CheckpointInfo,
    tokenizer: TextTokenizer | str | os.PathLike,
    *,
    weights_dtype: str | None = None,
    cache_dtype: str | None = None,
    safety_checker: bool = True,
    mesh: Mesh | Mapping[str, int] | None = None,
  ):
    """Makes a model of loaded parts; `from_pretrained` opens a folder.

    Args:
      modules: the Flax modules.
      params: {module name: parameters}, at least of the modules that the tasks need; or the
        `params` of another model, with their mesh and dtype.
      tokenizer: or the folder of its files, which are read when a task first needs them.
      weights_dtype: see `from_pretrained`.
      cache_dtype: see `from_pretrained`.
      safety_checker: see `from_pretrained`.
      mesh: see `from_pretrained`.

    Raises:
      UserError: an unknown dtype; a mesh that does not fit the devices; a mesh or a dtype for the
        `params` of another model.
    """
    _check_choice('weights_dtype', weights_dtype, WEIGHTS_DTYPES)
    _check_choice('cache_dtype', cache_dtype, CACHE_DTYPES)
    if not isinstance(params, LazyParams):
      if mesh is not None and not isinstance(mesh, Mesh):
        sizes = dict.fromkeys(sharding.AXES, 1) | dict(mesh)
        mesh = sharding.make_mesh(sizes, jax.local_devices())
      params = LazyParams(modules, params, weights_dtype, mesh)
    elif weights_dtype is not None or mesh is not None:
      raise UserError(
        'the params of another model have their weights_dtype and mesh; leave both out, or open '
        'the checkpoint again'
      )
    super().__init__(modules, params, tokenizer, cache_dtype, safety_checker)

  @classmethod
  @api_method(
    positional=('mesh', 'dtype', 'variant', 'weights_dtype', 'cache_dtype', 'safety_checker')
  )
  def from_pretrained(
    cls,
    folder: str | os.PathLike,
    *,
    mesh: Mesh | Mapping[str, int] | None = None,
    dtype: str | None = None,
    variant: str | None = None,
    weights_dtype: str | None = None,
    cache_dtype: str | None = None,
    safety_checker: bool = True,
    adapter: str | os.PathLike | None = None,
  ) -> Lavit:
    """Opens a checkpoint: one of lavit_jax (weights/store) or of PyTorch (weights/torch).

    Args:
      folder: of the checkpoint. The parameters of a module are read when they are first needed. Of
        a folder in a store, such as gs://BUCKET/model, all is copied to this machine first.
      mesh: the devices to shard the model over: a mesh with the axes of `sharding.AXES`, or the
        sizes of some of them, such as {'tensor': 8}; None uses one device.
      dtype: of computation and of parameters, except for the tokenizer and the VAEs: 'float32',
        'bfloat16' or 'float16'; None is bfloat16 on accelerators and float32 on CPUs, where that is
        faster.
      variant: the expected variant, or None.
      weights_dtype: of the language model's weights: 'int8' (models/int8.py); None for `dtype`.
      cache_dtype: of the language model's keys and values: 'bfloat16' or 'int8'; None for `dtype`.
      safety_checker: whether images that the checkpoint's safety checker flags are returned black,
        with a line in the log.
      adapter: a folder of adapters, as for `load_adapter`.

    Raises:
      UserError: the folder is missing, damaged, or of another variant; an unknown dtype; the mesh
        does not fit the devices; or as `load_adapter`.
    """
    _check_choice('dtype', dtype, DTYPES)
    checkpoint = open_checkpoint(_on_this_machine(folder), variant)
    compute_dtype = dtype or ('float32' if jax.default_backend() == 'cpu' else 'bfloat16')
    settings = checkpoint.settings
    if adapter is not None:
      adapter = _on_this_machine(adapter)
      brought = with_settings(settings, read_info(adapter))
      settings = {**brought, 'chat': settings.get('chat', {})}  # by load_adapter, so that it can go
    modules = lavit.build(checkpoint.variant, compute_dtype, settings=settings)
    model = cls(
      modules,
      checkpoint,
      checkpoint.tokenizer_folder,
      weights_dtype=weights_dtype,
      cache_dtype=cache_dtype,
      safety_checker=safety_checker,
      mesh=mesh,
    )
    if adapter is not None:
      model.load_adapter(adapter)
    return model

  def load_adapter(self, folder: str | os.PathLike) -> None:
    """Puts adapters beside the parameters, which stay in memory as they are.

    They take the place of those that were loaded before, with their template of conversations.
    `unload_adapter` removes them. A warning in the log says if they were trained beside other
    numbers than those of this checkpoint.

    Args:
      folder: RUN/export of a run with `lora.rank`, or a folder of the library peft, here or in a
        store.

    Raises:
      UserError: it is no such folder, is damaged, or is of another model.
    """
    folder = _on_this_machine(folder)
    info = read_info(folder)
    settings = with_settings(self.modules.settings, info)
    brought = info.get('settings', {}).get('interface', {}).get('name', LAVIT)
    if info and brought != self.modules.interface_name:
      raise UserError(
        f'{folder} is for the interface {brought!r}, and this model has '
        f'{self.modules.interface_name!r}; open the checkpoint by from_pretrained(adapter=...)'
      )
    self.params.use_adapters(load_adapters(folder, self.modules))
    self.chat_template = TEMPLATES[settings.get('chat', {}).get('template', LAVIT)]

  def unload_adapter(self) -> None:
    """Removes the adapters that `load_adapter` put beside the parameters."""
    self.params.use_adapters(None)
    self.chat_template = TEMPLATES[self.modules.chat_template]


def _on_this_machine(folder: str | os.PathLike) -> str:
  """The path of a folder, of which one in a store is copied."""
  path = expand_home(folder)
  if '://' not in path:
    return path
  from lavit_jax.weights.store import remote  # fsspec takes a while to import

  return remote.fetch(path)


def _check_choice(name: str, value: str | None, choices: tuple[str | None, ...]) -> None:
  if value not in choices:
    raise UserError(f'{name}={value!r} is not known; choose one of {", ".join(map(repr, choices))}')
