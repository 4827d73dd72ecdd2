"""Weights in and out: PyTorch folders <-> parameter trees and our own folder of Orbax checkpoints."""

from lavit_jax.porting.api import from_torch, to_torch, torch_settings

__all__ = ['from_torch', 'to_torch', 'torch_settings']
