"""Train steps and decoding, compiled on a CPU for TPU pods that the machine does not have."""
