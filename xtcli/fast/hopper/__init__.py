"""Kernels of our own in CUDA C++, for what Triton has no words for, on GPUs of NVIDIA's Hopper generation.

build   from source to a function that can be launched: compiled once by NVIDIA's compiler library, kept in the cache
slopes  the way back of attention over short texts: slopes of queries, keys and values by one kernel
"""
