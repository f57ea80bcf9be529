"""Sizes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Config:
    name: str
    block_size: int
    vocab_size: int
    padding_multiple: int
    n_layer: int
    n_head: int
    n_query_groups: int
    n_embd: int
    intermediate_size: int
    rotary_percentage: float
    rope_base: int
    parallel_residual: bool
    bias: bool
    norm_class_name: str
    norm_eps: float
    mlp_class_name: str
