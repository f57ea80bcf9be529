"""Small labelled sets that a small model can learn, and presets of such models."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xtcli.config.preset import load_preset
from xtcli.train.start import new

GOOD, BAD = "great lovely superb".split(), "awful boring weak".split()
THINGS = "film book meal hotel show game".split()
NAMES, TOWNS = "anna boris clara david".split(), "paris rome oslo lima".split()

SMALL = """\
version: 1
about: {title: Small}
objective: classify
data: {source: rows.jsonl, validation: 0.25}
train: {steps: 60, batch: 16, lr: 5e-3, warmup: 5, schedule: linear, log_every: 20, validate_every: 0, sample_every: 0,
  save_every: 0, device: cpu, precision: fp32, keep: 1}
"""
BLOCK = "attn: {kind: attention, heads: 4}, ffn: {kind: mlp, hidden: 64}"
ENCODER = f"""\
tokenizer: {{kind: wordpiece, vocab: 300}}
model:
  kind: encoder
  vocab: 300
  dim: 32
  context: 48
  pad: 0
  embed: {{kind: tokens, positions: learned, segments: 2, norm: layer}}
  stack: {{layers: 1, norm: none, block: {{wiring: post, sublayers: {{{BLOCK}}}}}}}
  pooler: {{}}
  heads: {{sequence: {{}}}}
"""
DECODER = f"""\
tokenizer: {{kind: bpe, vocab: 300}}
model:
  kind: decoder
  vocab: 300
  dim: 32
  context: 48
  stack: {{layers: 1, position: rotary, block: {{sublayers: {{{BLOCK}}}}}}}
  heads: {{sequence: {{pick: last}}}}
"""
POSITION = "position: {kind: t5, buckets: 8, furthest: 20}"
CROSS = "cross: {kind: cross-attention, heads: 4}"
PAIR = f"""\
tokenizer: {{kind: unigram, vocab: 300}}
model:
  kind: encoder-decoder
  vocab: 300
  dim: 32
  context: 48
  pad: 0
  norm: rms
  encoder: {{stack: {{layers: 1, {POSITION}, block: {{sublayers: {{{BLOCK}}}}}}}}}
  decoder: {{stack: {{layers: 1, {POSITION}, block: {{sublayers: {{{BLOCK.replace("ffn", CROSS + ", ffn")}}}}}}}}}
  heads: {{sequence: {{pick: end}}}}
"""
PRESETS = {"small": ENCODER, "decoder": DECODER, "pair": PAIR}


def rows(task: str, count: int = 160, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of one task; what is right can be told from single words."""
    draw = random.Random(seed)
    return [MAKERS[task](draw) for _ in range(count)]


def _sequence(draw: random.Random) -> dict[str, Any]:
    good = draw.random() < 0.5
    text = f"the {draw.choice(THINGS)} was really {draw.choice(GOOD if good else BAD)}"
    return {"text": text, "label": "positive" if good else "negative"}


def _pair(draw: random.Random) -> dict[str, Any]:
    one, two = draw.choice([0, 1]), draw.choice([0, 1])
    return {"one": f"it was {(BAD, GOOD)[one][0]}", "two": f"she was {('sad', 'glad')[two]}", "label": one + 2 * two}


def _token(draw: random.Random) -> dict[str, Any]:
    words = [draw.choice(NAMES), "went", "to", draw.choice(TOWNS), *["again"] * draw.randrange(3)]
    return {"tokens": words, "tags": ["PER", "O", "O", "LOC", *["O"] * (len(words) - 4)]}


def _choice(draw: random.Random) -> dict[str, Any]:
    right = draw.randrange(3)
    texts = [f"a {draw.choice(GOOD if at == right else BAD)} {draw.choice(THINGS)}" for at in range(3)]
    return {"text": "which one ?", "choices": texts, "label": right}


def _several(draw: random.Random) -> dict[str, Any]:
    good, long = draw.random() < 0.5, draw.random() < 0.5
    text = f"it was {draw.choice(GOOD if good else BAD)} {('brief', 'long')[long]}"
    return {"text": text, "label": [name for name, holds in (("good", good), ("long", long)) if holds]}


def _numbers(draw: random.Random) -> dict[str, Any]:
    stars, words = draw.randrange(5), "no one two three four".split()
    return {"text": f"the {draw.choice(THINGS)} has {words[stars]} stars", "label": stars - 1.5}


def _extract(draw: random.Random) -> dict[str, Any]:
    name, town = draw.choice(NAMES), draw.choice(TOWNS)
    context = "it rains . " * draw.randrange(8) + f"{name} lives in {town} ." + " it rains ." * draw.randrange(8)
    answers = {"text": [town], "answer_start": [context.index(town)]}
    return {"question": f"where does {name} live ?", "context": context, "answers": answers}


MAKERS = {"sequence": _sequence, "pair": _pair, "token": _token, "choice": _choice, "extract": _extract}
MAKERS |= {"several": _several, "numbers": _numbers}


def write(folder: Path, records: Sequence[dict[str, Any]], name: str = "rows.jsonl") -> Path:
    """The rows as a file, and the presets beside it."""
    for preset, text in PRESETS.items():
        (folder / f"{preset}.yaml").write_text(SMALL + text, encoding="utf-8")
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def train(preset: Path, *overrides: str, out: Path, talk: list[str] | None = None) -> list[dict[str, Any]]:
    """Train in this process; returns the lines of metrics."""
    lines: list[dict[str, Any]] = []
    heard = [] if talk is None else talk
    code, _ = new(load_preset(preset, overrides), out=out, command=["xt"], record=lines.append, talk=heard.append)
    assert code == 0
    return lines
