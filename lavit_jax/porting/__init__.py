"""Old names of `lavit_jax.weights.torch.api`, as README documented them."""

from lavit_jax.weights.torch.api import from_torch, to_torch, torch_settings

__all__ = ['from_torch', 'to_torch', 'torch_settings']
