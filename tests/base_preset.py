"""A preset file for tests: two sizes, every section, line numbers that tests count on."""

from __future__ import annotations

BASE = """\
version: 1
about: {title: Base, year: 2019}
size: small
model:
  kind: decoder
  vocab: 1000
  dim: 96
  context: 256
  norm: {kind: layer, eps: 1e-6}
  embed: {kind: tokens, positions: learned}
  stack:
    layers: 6
    block:
      sublayers:
        attn: {kind: attention, heads: 6}
        ffn: {kind: mlp, hidden: 384, act: relu}
  heads: {lm: {tied: true}}
sizes:
  small: {}
  big: {model.dim: 192, model.stack.layers: 8, model.norm: rms}
objective: clm
tokenizer: bytes
train: {steps: 1000, lr: 3e-4}
expect: {parameters: {small: 11, big: 22}}
"""
FFN = "model.stack.block.sublayers.ffn"
ATTN = "model.stack.block.sublayers.attn"
