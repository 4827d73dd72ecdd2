"""Old names of `lavit_jax.weights.store.folder`."""

from lavit_jax.weights.store.folder import load_params as load_parts
from lavit_jax.weights.store.folder import save_params as save_parts

__all__ = ['load_parts', 'save_parts']
