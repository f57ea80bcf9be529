"""Measurements: attention kernels, training, generation, and races of architectures. Everything here imports torch."""
