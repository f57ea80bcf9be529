"""Greedy texts and beams against transformers' `generate`, for models with the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from tiny_models import make
from torch import Tensor

from xtcli.generate.beams import search
from xtcli.generate.decode import Row, Rules, Timing, decode
from xtcli.generate.feed import Feed
from xtcli.generate.sampling import Sampling
from xtcli.generate.stops import Text
from xtcli.model import Model

VOCAB, PAD, EOS = 53, 0, 1


class Silent:
    """A decoder of tokens that says nothing."""

    def push(self, token: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


def lively_reference(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.25, generator=generator)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, EOS
    return model.eval()


def gpt2() -> tuple[Model, Any]:
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=96, n_embd=32, n_layer=2, n_head=4, bos_token_id=EOS, eos_token_id=EOS
    )
    reference = lively_reference(transformers.GPT2LMHeadModel(config))
    attn = {"kind": "attention", "heads": 4}
    model = make(
        "decoder",
        {
            "embed": {"kind": "tokens", "positions": "learned"},
            "stack": {
                "layers": 2,
                "block": {"sublayers": {"attn": attn, "ffn": {"kind": "mlp", "hidden": 128, "act": "gelu_tanh"}}},
            },
            "heads": {"lm": {"tied": True}},
            "norm": {"kind": "layer", "eps": 1e-5},
            "context": 96,
        },
        VOCAB,
    )
    theirs = reference.transformer.state_dict()
    ours = {
        "embed.tokens.weight": theirs["wte.weight"],
        "embed.positions.table.weight": theirs["wpe.weight"],
        "stack.norm.weight": theirs["ln_f.weight"],
        "stack.norm.bias": theirs["ln_f.bias"],
    }
    for n in range(2):
        old, new = f"h.{n}.", f"stack.blocks.{n}."
        for kind in ("weight", "bias"):
            for name, piece in zip("qkv", theirs[f"{old}attn.c_attn.{kind}"].chunk(3, -1), strict=True):
                ours[f"{new}attn.{name}.{kind}"] = piece.t() if kind == "weight" else piece
            for name, path in (("attn.o", "attn.c_proj"), ("ffn.up", "mlp.c_fc"), ("ffn.down", "mlp.c_proj")):
                ours[f"{new}{name}.{kind}"] = theirs[f"{old}{path}.{kind}"].t()
            for name, path in (("attn", "ln_1"), ("ffn", "ln_2")):
                ours[f"{new}wiring.norm.{name}.{kind}"] = theirs[f"{old}{path}.{kind}"]
    model.load_state_dict(ours)
    return model, reference


def t5() -> tuple[Model, Any]:
    config = transformers.T5Config(
        vocab_size=VOCAB,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=PAD,
    )
    reference = lively_reference(transformers.T5ForConditionalGeneration(config))
    attn = {"kind": "attention", "heads": 4, "bias": False, "scale": 1.0}
    ffn = {"kind": "mlp", "hidden": 64, "act": "relu", "bias": False}
    position = {"kind": "t5", "buckets": 8, "furthest": 20}

    def side(**sublayers: Any) -> dict[str, Any]:
        return {"stack": {"layers": 2, "position": position, "block": {"sublayers": sublayers}}}

    model = make(
        "encoder-decoder",
        {
            "encoder": side(attn=attn, ffn=ffn),
            "decoder": side(attn=attn, cross=attn | {"kind": "cross-attention"}, ffn=ffn),
            "heads": {"lm": {"scale": "inverse-sqrt-dim"}},
            "pad": PAD,
            "norm": {"kind": "rms", "eps": 1e-6},
        },
        VOCAB,
    )
    theirs = reference.state_dict()
    ours = {"tokens.weight": theirs["shared.weight"]}
    for tower, names in (("encoder", ("attn", "ffn")), ("decoder", ("attn", "cross", "ffn"))):
        ours[f"{tower}.stack.norm.weight"] = theirs[f"{tower}.final_layer_norm.weight"]
        bias = f"{tower}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        ours[f"{tower}.stack.shared.biases.0.table.weight"] = theirs[bias]
        for n in range(2):
            for at, name in enumerate(names):
                old, new = f"{tower}.block.{n}.layer.{at}.", f"{tower}.stack.blocks.{n}."
                ours[f"{new}wiring.norm.{name}.weight"] = theirs[f"{old}layer_norm.weight"]
                inner = {"attn": "SelfAttention", "cross": "EncDecAttention", "ffn": "DenseReluDense"}[name]
                pairs = {"up": "wi", "down": "wo"} if name == "ffn" else {k: k for k in "qkvo"}
                for key, path in pairs.items():
                    ours[f"{new}{name}.{key}.weight"] = theirs[f"{old}{inner}.{path}.weight"]
    model.load_state_dict(ours)
    return model, reference


PAIRS = {"gpt2": gpt2, "t5": t5}
PROMPTS = [[5, 6, 7], [9], [20, 21, 22, 23, 24, 25, 26], [3, 3, 8]]


def theirs(reference: Any, prompts: Sequence[Sequence[int]], **settings: Any) -> list[list[int]]:
    """The new tokens that transformers writes, each prompt alone, up to the end token or the padding."""
    texts = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        out: Tensor = reference.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        skip = 1 if reference.config.is_encoder_decoder else len(prompt)
        for row in out[:, skip:].tolist():
            end = settings["eos_token_id"]
            texts.append(row[: row.index(end) + 1] if end in row else row)
    return texts


def feed(model: Model, prompts: list[list[int]], room: int) -> Feed:
    if hasattr(model, "encode"):
        return Feed(model, [[PAD]] * len(prompts), room, prompts)
    return Feed(model, prompts, room)


def rules(ends: Sequence[int], penalty: float = 1.0) -> Rules:
    return Rules(Sampling(temperature=0, repetition_penalty=penalty), frozenset(ends), VOCAB)


@pytest.mark.parametrize("penalty", [1.0, 1.4])
@pytest.mark.parametrize("family", PAIRS)
def test_greedy(family: str, penalty: float) -> None:
    model, reference = PAIRS[family]()
    settings: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "repetition_penalty": penalty}
    # Texts end at different lengths when a token of one of them is the end.
    for end in (EOS, theirs(reference, PROMPTS, eos_token_id=EOS, **settings)[0][7]):
        rows = [Row(n, Text(Silent()), 40, False) for n in range(len(PROMPTS))]
        with torch.no_grad():
            list(decode(feed(model, PROMPTS, 40), rows, 1, rules([end], penalty), Timing()))
        wanted = theirs(reference, PROMPTS, eos_token_id=end, **settings)
        assert [row.tokens for row in rows] == wanted
    assert wanted[0][-1] == end and len(wanted[0]) <= 8


@pytest.mark.parametrize(
    "settings", [(2, 1.0, 1.0), (4, 1.0, 1.0), (4, 0.0, 1.0), (4, 2.0, 1.0), (3, -1.0, 1.3)], ids=str
)
@pytest.mark.parametrize("room", [1, 4, 20])
@pytest.mark.parametrize("family", PAIRS)
def test_beams(family: str, room: int, settings: tuple[int, float, float]) -> None:
    width, length_penalty, penalty = settings
    model, reference = PAIRS[family]()
    shared: dict[str, Any] = {"max_new_tokens": room, "do_sample": False, "num_beams": width}
    shared |= {"num_return_sequences": width, "length_penalty": length_penalty, "repetition_penalty": penalty}
    ended, end = [], EOS
    for _ in range(3):
        budgets = [(room, False)] * len(PROMPTS)
        with torch.no_grad():
            found = search(feed(model, PROMPTS, room), budgets, width, length_penalty, rules([end], penalty), Timing())
        ours = [list(text.tokens) for prompt in found for text in prompt]
        assert ours == theirs(reference, PROMPTS, eos_token_id=end, **shared)
        ended += [text.finish for prompt in found for text in prompt]
        # The next round ends texts where one of these beams has just been.
        longest = max(ours, key=len)
        end = longest[len(longest) // 2]
    assert {"eos", "length"} <= set(ended)
