"""Kernels of our own for CPUs, in C. Each computes what a plain part computes, which remains the specification.

build         the library: compiled once on each machine for its CPU, kept in the user's cache
attention     attention and its slopes, for training and for reading prompts
parted        parts of a joint product, whose slopes lie together
pointwise     GELU and its slope
feedforward   two products with a GELU between them
crossentropy  the loss of logits and its slope
decode        a step of decoding in one call

Where there is no compiler, no Linux or no OpenMP, everything runs on PyTorch's operators.
"""
