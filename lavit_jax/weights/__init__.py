"""Parameters on disk: our own checkpoints, PyTorch files, and the way between them."""
