"""Evaluation of a checkpoint on held-out images of the emoji data set."""
