"""What a pod would make of a program, found by compiling for it on a CPU."""
