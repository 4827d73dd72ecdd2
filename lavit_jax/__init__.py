"""LaVIT in JAX and Flax: one language model that reads and generates images and text.

    from lavit_jax import Lavit
    model = Lavit.from_pretrained('lavit_jax/assets/tiny')
    model.caption(['cat.png'])

The packages follow the data flow: `models`, `data`, `weights`, `training`, `inference`,
`evaluation`, `compile`, `apps`, `cli`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lavit_jax import renames

if TYPE_CHECKING:
  from lavit_jax.inference.pipeline import Lavit as Lavit

__version__ = '0.1.0'
__all__ = ['Lavit']
renames.install()


def __getattr__(name: str) -> Any:
  """Imports `Lavit`, and with it jax, only when it is used: `lavit --help` does not wait for it."""
  if name == 'Lavit':
    from lavit_jax.inference.pipeline import Lavit

    return Lavit
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
