"""LaVIT in JAX and Flax: pictures and words in one sequence, read and drawn by one language model.

    from lavit_jax import Lavit
    model = Lavit.from_pretrained('lavit_jax/assets/tiny')
    model.caption(['cat.png'])

The folders are the data flow: `models` (what is learned), `data`, `training`, `weights`, `inference`, `evaluation`, `compile`, `apps`, `cli`.
"""

from lavit_jax import renames

__version__ = '0.1.0'
__all__ = ['Lavit']
renames.install()


def __getattr__(name):
  """Imports the pipeline, and with it jax, only when somebody asks for it: `lavit --help` stays instant."""
  if name == 'Lavit':
    from lavit_jax.inference.pipeline import Lavit

    return Lavit
  raise AttributeError('module %r has no attribute %r' % (__name__, name))
