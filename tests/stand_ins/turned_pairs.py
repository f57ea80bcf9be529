"""A small decoder with the interface of gpt-fast's model.py, for tests: neighbours of a head turn, keys stay in a cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class ModelArgs:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    dim: int
    intermediate_size: int
    n_local_heads: int
    rope_base: float
    norm_eps: float


class Norm(nn.RMSNorm):
    pass


class Mixer(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args, self.width = args, args.dim // args.n_head
        self.wqkv = nn.Linear(args.dim, (args.n_head + 2 * args.n_local_heads) * self.width, bias=False)
        self.wo = nn.Linear(args.dim, args.dim, bias=False)

    def setup(self, rows: int, slots: int) -> None:
        shape = (rows, self.args.n_local_heads, slots, self.width)
        self.register_buffer("keys", torch.zeros(shape), persistent=False)
        self.register_buffer("values", torch.zeros(shape), persistent=False)

    def forward(self, x: Tensor, places: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.wqkv(x).unflatten(-1, (-1, self.width)).transpose(1, 2).split(
            [self.args.n_head, self.args.n_local_heads, self.args.n_local_heads], 1
        )  # fmt: skip
        q, k = (turned(one, places, self.args.rope_base) for one in (q, k))
        self.keys[:, :, places], self.values[:, :, places] = k, v
        y = F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=mask, enable_gqa=True)
        return self.wo(y.transpose(1, 2).flatten(2))


def turned(x: Tensor, places: Tensor, base: float) -> Tensor:
    width = x.shape[-1]
    angle = places[:, None] / base ** (torch.arange(0, width, 2) / width)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


class Inner(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.intermediate_size, bias=False)
        self.w3 = nn.Linear(args.dim, args.intermediate_size, bias=False)
        self.w2 = nn.Linear(args.intermediate_size, args.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Layer(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.attention, self.feed_forward = Mixer(args), Inner(args)
        self.attention_norm, self.ffn_norm = (Norm(args.dim, args.norm_eps) for _ in range(2))

    def forward(self, x: Tensor, places: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), places, mask)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(Layer(args) for _ in range(args.n_layer))
        self.norm = Norm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)

    def setup_caches(self, max_batch_size: int, max_seq_length: int) -> None:
        self.slots = max_seq_length
        for layer in self.layers:
            layer.attention.setup(max_batch_size, max_seq_length)

    def forward(self, ids: Tensor, places: Tensor) -> Tensor:
        mask = torch.arange(self.slots) <= places[:, None]
        x = self.tok_embeddings(ids)
        for layer in self.layers:
            x = layer(x, places, mask)
        return self.output(self.norm(x))
