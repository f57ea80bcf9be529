"""A small decoder whose heads turn by halves."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from litgpt.config import Config


class Mixer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.width = config, config.n_embd // config.n_head
        self.qkv = nn.Linear(config.n_embd, (config.n_head + 2 * config.n_query_groups) * self.width, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        sizes = [self.config.n_head, self.config.n_query_groups, self.config.n_query_groups]
        q, k, v = self.qkv(x).unflatten(-1, (-1, self.width)).transpose(1, 2).split(sizes, 1)
        q, k = (turned(one, self.config.rope_base) for one in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.proj(y.transpose(1, 2).flatten(2))


def turned(x: Tensor, base: float) -> Tensor:
    width = x.shape[-1]
    angle = torch.arange(x.shape[2])[:, None] / base ** (torch.arange(0, width, 2) / width)
    first, second = x.chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class Inner(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.fc_1 = nn.Linear(config.n_embd, config.intermediate_size, bias=False)
        self.fc_2 = nn.Linear(config.n_embd, config.intermediate_size, bias=False)
        self.proj = nn.Linear(config.intermediate_size, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.silu(self.fc_1(x)) * self.fc_2(x))


class Layer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = (nn.RMSNorm(config.n_embd, config.norm_eps) for _ in range(2))
        self.attn, self.mlp = Mixer(config), Inner(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        rows = -(-config.vocab_size // config.padding_multiple) * config.padding_multiple
        layers = nn.ModuleList(Layer(config) for _ in range(config.n_layer))
        table, norm = nn.Embedding(rows, config.n_embd), nn.RMSNorm(config.n_embd, config.norm_eps)
        self.transformer = nn.ModuleDict({"wte": table, "h": layers, "ln_f": norm})
        self.lm_head = nn.Linear(config.n_embd, rows, bias=False)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.transformer.wte(idx)
        for layer in self.transformer.h:
            x = layer(x)
        return self.lm_head(self.transformer.ln_f(x))
