"""What a TPU pod would need for a program, found by compiling for the pod on a CPU."""
