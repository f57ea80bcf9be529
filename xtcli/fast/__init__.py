"""Kernels of our own for GPUs. Each computes what a plain part computes, which remains the specification."""
