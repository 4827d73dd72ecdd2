"""The modules of the model, as Flax Linen modules and pure functions."""
