"""Old names of the user's API that still work, each with a DeprecationWarning.

`api_method` also reports keywords that never existed.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

from lavit_jax.inference.generation_config import check_names
from lavit_jax.renamed_keywords import rename_keywords

P = ParamSpec('P')
R = TypeVar('R')

RENAMED_KEYWORDS = {
  'beams': 'num_beams',
  'cache': 'cache_dtype',
  'decoder_guidance': 'decoder_guidance_scale',
  'guidance': 'guidance_scale',
  'judge': 'check_answerable',
  'max_tokens': 'max_new_tokens',
  'min_tokens': 'min_new_tokens',
  'model': 'modules',
  'negative': 'negative_prompt',
  'num_samples': 'num_return_sequences',
  'parts': 'params',
  'rescale': 'guidance_rescale',
  'sample': 'do_sample',
  'start': 'init_images',
  'steps': 'num_inference_steps',
  'tile': 'vae_tile_size',
  'weights': 'weights_dtype',
  'words': 'tokenizer',
}


def api_method(
  options: type | None = None, *, outputs: str | None = None, positional: Sequence[str] = ()
) -> Callable[[Callable[P, R]], Callable[P, R]]:
  """Makes a method take the old names of its keywords, and check the names of all.

  Args:
    options: the TypedDict of its `**` parameter, if it has one.
    outputs: the method that returns the details, which `details=True` stood for.
    positional: keywords that were positional after the present ones, in their old order.

  Returns:
    A decorator. The method raises UserError for a keyword that is unknown.
  """

  def decorate(method: Callable[P, R]) -> Callable[P, R]:
    parameters = list(inspect.signature(method).parameters.values())[1:]
    allowed = [x.name for x in parameters if x.kind is not inspect.Parameter.VAR_KEYWORD]
    allowed += options.__annotations__ if options else []
    renamed = {
      old: new for old, new in RENAMED_KEYWORDS.items() if new in allowed and old not in allowed
    }
    num_args = 1 + sum(x.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for x in parameters)

    call: Callable[..., R] = method

    @functools.wraps(method)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
      keywords = rename_keywords(kwargs, renamed)
      if num_args < len(args) <= num_args + len(positional):
        names = positional[: len(args) - num_args]
        _warn(f'{", ".join(names)} by position; use keywords')
        keywords = dict(zip(names, args[num_args:], strict=True)) | keywords
        return call(*args[:num_args], **keywords)
      if outputs and 'details' in keywords:
        _warn(f'details=True; call {outputs}')
        if keywords.pop('details'):
          return getattr(args[0], outputs)(*args[1:], **keywords)
      check_names(keywords, allowed)
      return call(*args, **keywords)

    setattr(wrapper, 'allowed_keywords', tuple(allowed))  # noqa: B010
    return wrapper

  return decorate


def renamed_attribute(old: str, new: str) -> Any:
  """A read-only attribute under its old name."""

  def get(self: Any) -> Any:
    _warn(f'.{old}; use .{new}')
    return getattr(self, new)

  return property(get, doc=f'The old name of `{new}`.')


class DeprecatedNames:
  """The attributes and methods of `Lavit` under their old names."""

  model = renamed_attribute('model', 'modules')
  parts = renamed_attribute('parts', 'params')
  words = renamed_attribute('words', 'tokenizer')
  cache = renamed_attribute('cache', 'cache_dtype')
  settings = renamed_attribute('settings', 'defaults')

  def draw(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The old name of `decode_images`."""
    _warn('draw(...); call decode_images')
    return self.decode_images(*args, **kwargs)


def _warn(message: str) -> None:
  warnings.warn(f'deprecated: {message}', DeprecationWarning, stacklevel=3)
