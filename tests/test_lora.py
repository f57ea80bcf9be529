"""Low-rank adapters: what they change, what they leave alone, and what is left when they are merged."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import ENCODER, lively, make

from xtcli.config.train import LoraConfig
from xtcli.errors import UserError
from xtcli.model import Model
from xtcli.parts.linear import Linear
from xtcli.train.lora import Adapted, adapt, find, merge, plain

VOCAB = 50
IDS = torch.arange(24).reshape(2, 12) % VOCAB


def lora(*on: str, **fields: object) -> LoraConfig:
    return LoraConfig.model_validate({"rank": 3, "alpha": 6.0} | fields | ({"on": on} if on else {}))


def learnt(model: Model, seed: int = 1) -> None:
    """Give every adapter weights as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora." in name:
                parameter.normal_(0, 0.1, generator=generator)


@pytest.mark.parametrize("name", ["learned", "multi-query", "rotary", "t5-bias", "shaw"])
@pytest.mark.parametrize("on", [("**.attn.q", "**.attn.v"), ("stack.**",), ("stack.blocks.0.*.{q,up}",)])
def test_merged_equals_unmerged_equals_tensors_by_name(name: str, on: tuple[str, ...]) -> None:
    model = lively(name, VOCAB)
    config = lora(*on)
    base = model(input_ids=IDS).logits
    adapt(model, config)
    # `up` starts from zero; a frozen bias of the scores may take another kernel.
    torch.testing.assert_close(model(input_ids=IDS).logits, base, atol=1e-5 if name == "t5-bias" else 0, rtol=0)
    learnt(model)
    unmerged = model(input_ids=IDS).logits
    assert not torch.allclose(unmerged, base, atol=1e-2)

    from_tensors = lively(name, VOCAB)
    from_tensors.load_state_dict(plain(model.state_dict(), config))
    merge(model)
    assert not any(isinstance(module, Adapted) for module in model.modules())
    assert model.state_dict().keys() == from_tensors.state_dict().keys()
    assert all(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(model(input_ids=IDS).logits, unmerged, atol=1e-5, rtol=1e-5)
    assert torch.equal(model(input_ids=IDS).logits, from_tensors(input_ids=IDS).logits)


def test_only_adapters_and_what_is_trained_whole_get_gradients() -> None:
    model = make("encoder", ENCODER, VOCAB)
    layers = adapt(model, lora("**.attn.q", whole=["heads.mlm"]))
    assert layers == ["stack.blocks.0.attn.q", "stack.blocks.1.attn.q"]
    learnt(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    touched = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    heads = {f"heads.mlm.{name}" for name, _ in model.heads["mlm"].named_parameters()}
    assert touched == {f"{layer}.lora.{end}" for layer in layers for end in ("up", "down")} | heads


def test_names_of_the_base_stay() -> None:
    model = lively("rotary", VOCAB)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapt(model, lora())
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {name.rpartition(".lora.")[2] for name in after.keys() - before.keys()} == {"up", "down"}


def test_adapters_depend_on_the_seed_alone() -> None:
    first, second, third = (lively("rotary", VOCAB) for _ in range(3))
    for model, seed in ((first, 7), (second, 7), (third, 8)):
        adapt(model, lora(), seed)
    down = "stack.blocks.1.attn.v.lora.down"
    assert torch.equal(first.state_dict()[down], second.state_dict()[down])
    assert not torch.equal(first.state_dict()[down], third.state_dict()[down])
    wide = torch.nn.ModuleList([Linear(400, 8, False)])
    adapt(wide, lora("0", rank=64))
    assert wide.state_dict()["0.lora.down"].std().item() == pytest.approx(400**-0.5, rel=0.02)


def test_a_shared_layer_gets_one_adapter() -> None:
    layer = Linear(4, 4, True)
    model = torch.nn.ModuleList([layer, layer])
    adapt(model, lora("*"))
    assert model[0] is model[1]
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 2
    state = plain(model.state_dict(), lora("*"))
    assert list(state) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert merge(model)[0] is model[1]


@pytest.mark.parametrize(("dtype", "atol"), [(torch.bfloat16, 0.1), (torch.float64, 1e-12)])
def test_other_types(dtype: torch.dtype, atol: float) -> None:
    model = lively("learned", VOCAB).to(dtype)
    adapt(model, lora())
    learnt(model)
    merged = merge(copy.deepcopy(model))
    assert {tensor.dtype for tensor in merged.state_dict().values()} == {dtype}
    torch.testing.assert_close(merged(input_ids=IDS).logits, model(input_ids=IDS).logits, atol=atol, rtol=0.05)


def test_dropout_is_for_training_alone() -> None:
    model = lively("learned", VOCAB, dropout=0.0)
    adapt(model, lora(dropout=0.5))
    learnt(model)
    assert torch.equal(model(input_ids=IDS).logits, model(input_ids=IDS).logits)
    model.train()
    assert not torch.equal(model(input_ids=IDS).logits, model(input_ids=IDS).logits)


PATHS = ["stack.blocks.0.attn.q", "stack.blocks.0.attn.o", "stack.blocks.11.attn.q", "heads.lm", "pooler.dense"]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("stack.blocks.0.attn.q", [0]),
        ("stack.blocks.*.attn.q", [0, 2]),
        ("stack.blocks.1?.attn.q", [2]),
        ("stack.blocks.[!0].attn.q", []),
        ("stack.blocks.[0-3].attn.{q,o}", [0, 1]),
        ("**.q", [0, 2]),
        ("**.attn.*", [0, 1, 2]),
        ("stack.**", [0, 1, 2]),
        ("**", [0, 1, 2, 3, 4]),
        ("*", []),
        ("*.dense", [4]),
        ("q", []),
        ("stack.blocks.0.attn+q", []),
    ],
)
def test_patterns(pattern: str, found: list[int]) -> None:
    assert find(pattern, PATHS) == [PATHS[index] for index in found]


@pytest.mark.parametrize(
    ("on", "remedy"),
    [
        ("stack.blocks.*.atn.q", "did you mean 'stack.blocks.*.attn.q'?"),
        ("stack.blocks.0.attn.w_q", "did you mean 'stack.blocks.0.attn.q'?"),
        ("**.atn.q", "did you mean '**.attn.q'?"),
        ("**.attn", "did you mean '**.attn.*'?"),
        ("stack.blocks.1", "did you mean 'stack.blocks.1.**'?"),
        ("encoder", "one is 'stack.blocks.0.attn.q'"),
    ],
)
def test_unknown_pattern(on: str, remedy: str) -> None:
    with pytest.raises(UserError) as caught:
        adapt(lively("learned", VOCAB), lora("**.q", on), place="mine.yaml:7:3")
    assert str(caught.value) == f"mine.yaml:7:3: train.lora.on: '{on}' names no linear layer of the model; {remedy}"


def test_all_that_is_wrong_is_said_and_nothing_is_changed() -> None:
    model = lively("learned", VOCAB)
    names = set(model.state_dict())
    with pytest.raises(UserError) as caught:
        adapt(model, lora("heads.lm.decodr", "**.q", whole=["heads.lm", "head"]))
    assert "names no module" in str(caught.value)
    with pytest.raises(UserError, match="decodr"):
        adapt(model, lora("heads.lm.decodr"))
    with pytest.raises(UserError, match="trains as they are"):
        adapt(model, lora("heads.lm.decoder", whole=["heads.lm"]))
    assert set(model.state_dict()) == names
    assert all(parameter.requires_grad for parameter in model.parameters())
