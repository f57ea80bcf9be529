"""ALBERT against the reference: every class, every option; files there and back; shared blocks and their states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import opens_cleanly, rewrite, same, save, tensors
from encoders import feeds, reference
from references import ids
from test_parity import TOLERANCE, converted, difference

from xtcli.config.preset import load_preset
from xtcli.convert import convert
from xtcli.errors import UserError
from xtcli.model import Model, construct, load
from xtcli.parts.scope import Refused
from xtcli.registry import find

PRETRAINING, MASKED, MODEL = "AlbertForPreTraining", "AlbertForMaskedLM", "AlbertModel"
SEQUENCE, TOKEN = "AlbertForSequenceClassification", "AlbertForTokenClassification"
CHOICE, ANSWERING = "AlbertForMultipleChoice", "AlbertForQuestionAnswering"
RELATIVE = ({"position_embedding_type": kind} for kind in ("relative_key", "relative_key_query"))
DROPPED = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3, "classifier_dropout_prob": 0.4}

CASES: list[tuple[str, dict[str, Any]]] = [
    (MODEL, {}),
    (MODEL, {"add_pooling_layer": False, "num_hidden_layers": 5, "num_hidden_groups": 2}),
    (PRETRAINING, {}),
    (PRETRAINING, {"num_hidden_layers": 6, "num_hidden_groups": 2, "inner_group_num": 3}),
    (PRETRAINING, {"num_labels": 3, "tie_word_embeddings": False}),
    (MASKED, {"num_hidden_layers": 3, "num_hidden_groups": 3}),
    (MASKED, {"num_hidden_layers": 7, "num_hidden_groups": 3, "inner_group_num": 2}),
    *((MASKED, {"hidden_act": name}) for name in ("gelu", "relu", "silu")),
    *((MASKED, kind) for kind in RELATIVE),
    (MASKED, {"position_embedding_type": "relative_key", "num_hidden_layers": 4, "num_hidden_groups": 2}),
    (MASKED, {"tie_word_embeddings": False, "embedding_size": 24}),
    (MASKED, {"layer_norm_eps": 0.01, "type_vocab_size": 3, "chunk_size_feed_forward": 1, **DROPPED}),
    (SEQUENCE, {"num_labels": 3}),
    (SEQUENCE, {"num_labels": 1}),
    (SEQUENCE, {"num_labels": 5, "problem_type": "multi_label_classification"}),
    (CHOICE, {}),
    (TOKEN, {"num_labels": 4}),
    (TOKEN, {"classifier_dropout_prob": None, "hidden_dropout_prob": 0.3}),
    (ANSWERING, {}),
    (MASKED, {"pad_token_id": None}),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_equals_the_reference(name: str, options: dict[str, Any]) -> None:
    theirs = reference(name, options)
    ours = converted(theirs, "albert")
    for feed, given in feeds(theirs).items():
        off = {key: value for key, value in difference(theirs, ours, given).items() if not value <= TOLERANCE}
        assert not off, (feed, off)


def test_dropouts_are_read() -> None:
    model = converted(reference(SEQUENCE, DROPPED), "albert")
    assert model.embed.dropout.p == model.stack.blocks[0].wiring.dropout.p == 0.2
    # The reference adds what its feed-forwards make whole.
    assert model.stack.blocks[0].wiring.dropouts["ffn"].p == 0.0
    assert model.stack.blocks[0].attn.rate == 0.3
    assert model.heads["sequence"].dropout.p == 0.4
    token = converted(reference(TOKEN, {"classifier_dropout_prob": None, "hidden_dropout_prob": 0.25}), "albert")
    assert token.heads["token"].dropout.p == 0.25


FILES = [
    (MODEL, {}),
    (MODEL, {"add_pooling_layer": False}),
    (PRETRAINING, {"num_hidden_layers": 4, "num_hidden_groups": 2, "inner_group_num": 2}),
    (MASKED, {"position_embedding_type": "relative_key"}),
    (MASKED, {"tie_word_embeddings": False}),
    (SEQUENCE, {"num_labels": 3}),
    (CHOICE, {}),
    (TOKEN, {"classifier_dropout_prob": None}),
    (ANSWERING, {}),
]


@pytest.mark.parametrize(("name", "options"), FILES, ids=str)
def test_there_and_back(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = reference(name, options)
    source = save(model, tmp_path / "source")
    there = convert(source, tmp_path / "there", verify=True)
    assert (there.family, there.architecture, there.bit_exact) == ("albert", name, True)
    assert convert(tmp_path / "there", tmp_path / "back", to="hf").bit_exact
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "back" / file).read_bytes() == (source / file).read_bytes()
    pooling = {key: value for key, value in options.items() if key == "add_pooling_layer"}
    opens_cleanly(tmp_path / "back", type(model), **pooling)
    load(tmp_path / "there")
    asked = load_preset(tmp_path / "there").preset.objective
    assert getattr(asked, "sentence_order", False) == (name == PRETRAINING)


def test_a_released_file_has_a_pooler_and_a_second_bias(tmp_path: Path) -> None:
    whole = tensors(save(reference(PRETRAINING, {}), tmp_path / "source"))
    config = json.loads((tmp_path / "source/config.json").read_text())
    released = {"down_scale_factor": 1, "gap_size": 0, "net_structure_type": 0, "num_memory_blocks": 0}
    (tmp_path / "source/config.json").write_text(json.dumps(config | released | {"architectures": [MASKED]}))
    bias = {"predictions.decoder.bias": whole["predictions.bias"].clone()}
    rewrite(tmp_path / "source", lambda found: found | bias)
    report = convert(tmp_path / "source", tmp_path / "there")
    assert (report.architecture, len(report.kept)) == (MASKED, 4)
    convert(tmp_path / "there", tmp_path / "back", to="hf")
    assert same(tensors(tmp_path / "back"), whole)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"position_embedding_type": "rotary"}, "position_embedding_type"),
        ({"hidden_act": "softplus"}, "hidden_act"),
        ({"layer_sharing": True}, "layer_sharing"),
        ({"num_hidden_groups": 3}, "3 groups do not fit into 2 steps"),
    ],
    ids=str,
)
def test_what_it_does_not_express_is_refused_by_name(change: dict[str, Any], wanted: str, tmp_path: Path) -> None:
    source = save(reference(MASKED, {}), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=wanted):
        convert(source, tmp_path / "there")
    assert not (tmp_path / "there").exists()


def small(causal: bool, **stack: Any) -> Model:
    """A small model of shared blocks, every parameter random."""
    block = {"sublayers": {"attn": {"kind": "attention", "heads": 2}, "ffn": {"kind": "mlp", "hidden": 24}}}
    tree = {
        "vocab": 61,
        "dim": 16,
        "context": 32,
        "embed": {"kind": "factorised", "width": 8, "positions": "learned"},
        "stack": {"kind": "grouped", "block": block, **stack},
        "heads": {"lm": {"transform": "dense", "bias": True}} if causal else {"mlm": {}},
    }
    model = construct(find("graph", "decoder" if causal else "encoder").Config.model_validate(tree))
    model.to_empty(device="cpu").initialise(0)
    return model.eval()


@pytest.mark.parametrize(
    ("stack", "order"),
    [
        ({"layers": 3}, (0, 0, 0)),
        ({"layers": 4, "groups": 2}, (0, 0, 1, 1)),
        ({"layers": 5, "groups": 2}, (0, 0, 0, 1, 1)),
        ({"layers": 7, "groups": 3, "inner": 2}, (0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5)),
    ],
    ids=str,
)
def test_blocks_run_in_the_order_of_their_groups(stack: dict[str, Any], order: tuple[int, ...]) -> None:
    model = small(False, **stack)
    ran: list[int] = []
    for number, block in enumerate(model.stack.blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    out = model(input_ids=ids(2, 9), output_hidden_states=True)
    assert tuple(ran) == order
    assert len(out.hidden_states) == stack["layers"] + 1


@pytest.mark.parametrize("stack", [{"layers": 3}, {"layers": 5, "groups": 2, "inner": 2}], ids=str)
def test_each_run_of_a_block_has_a_cache_of_its_own(stack: dict[str, Any]) -> None:
    model = small(True, **stack)
    text = ids(3, 11)
    with torch.no_grad():
        whole = model(input_ids=text).logits
        state = model.new_state(3, 11)
        assert len(state.blocks) == stack["layers"] * stack.get("inner", 1)
        steps = [model(input_ids=text[:, at : at + 1], state=state).logits for at in range(8)]
        state.select(torch.tensor([2, 0]))
        rest = model(input_ids=text[[2, 0], 8:], state=state).logits
    torch.testing.assert_close(torch.cat(steps, 1), whole[:, :8], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rest, whole[[2, 0], 8:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("after", ["tokens", "sum", "norm", "dropout"])
def test_the_projection_stands_where_it_is_told_to(after: str) -> None:
    tree = {
        "vocab": 61,
        "dim": 16,
        "context": 32,
        "dropout": 0.0,
        "embed": {
            "kind": "factorised",
            "width": 8,
            "positions": "learned",
            "segments": 2,
            "norm": "inherit",
            "project_after": after,
            "project_bias": after != "sum",
        },
        "stack": {"layers": 1, "block": {"sublayers": {"ffn": {"kind": "mlp", "hidden": 8}}}},
        "heads": {"mlm": {}},
    }
    model = construct(find("graph", "encoder").Config.model_validate(tree)).to_empty(device="cpu")
    model.initialise(0)
    embed = model.embed
    for parameter in embed.parameters():
        torch.nn.init.normal_(parameter)
    text, kinds = ids(2, 9), torch.tensor([[0] * 4 + [1] * 5] * 2)
    inputs: list[torch.Tensor] = []
    model.stack.blocks[0].register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    model(input_ids=text, token_type_ids=kinds)
    steps = {
        "tokens": lambda _: embed.tokens.weight[text],
        "sum": lambda x: x + embed.positions.table.weight[:9] + embed.segments.weight[kinds],
        "norm": lambda x: torch.nn.functional.layer_norm(x, x.shape[-1:], embed.norm.weight, embed.norm.bias),
        "dropout": lambda x: x,
    }
    x = torch.empty(0)
    for name, step in steps.items():
        x = step(x)
        if name == after:
            x = x @ embed.project.weight.T
            x = x if embed.project.bias is None else x + embed.project.bias
    torch.testing.assert_close(inputs[0], x, atol=1e-5, rtol=1e-5)
    assert model.heads["mlm"].dense.weight.shape == (8, 16)


def test_a_bare_head_cannot_be_tied_to_a_narrow_table() -> None:
    tree = {
        "vocab": 61,
        "dim": 16,
        "embed": {"kind": "factorised", "width": 8},
        "stack": {"layers": 1, "block": {"sublayers": {"ffn": {"kind": "mlp", "hidden": 8}}}},
        "heads": {"lm": {}},
    }
    with pytest.raises(Refused, match="the states are 16 wide, the token table's rows 8"):
        construct(find("graph", "decoder").Config.model_validate(tree))
