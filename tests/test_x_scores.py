"""What goes wrong inside attention if one does not look: zeros, ties, borders, chains, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attentions import DIM, LENGTH, ROWS, TALK, TOP, chain, config, drawn, make
from slow_attention import entmax
from torch import Tensor

from xtcli.errors import UserError
from xtcli.inspect.sight import look
from xtcli.model import construct
from xtcli.parts.entmax import entmax15
from xtcli.parts.scope import Refused
from xtcli.parts.scores import ORDER
from xtcli.registry import find
from xtcli.train.transforms import checkpoint_blocks, compile_blocks


def test_entmax_by_hand() -> None:
    found = entmax15(torch.tensor([[0.0, 2.0], [0.0, 1.9], [-1e30, 0.0], [-torch.inf, 0.0], [3.0, 3.0]]))
    assert found[0].tolist() == [0.0, 1.0]
    assert found[1, 0] > 0
    assert found[2].tolist() == found[3].tolist() == [0.0, 1.0]
    assert found[4].tolist() == pytest.approx([0.5, 0.5])
    lowest = torch.finfo(torch.float32).min
    assert torch.equal(entmax15(torch.tensor([[1.0, lowest, 0.5]])), entmax15(torch.tensor([[1.0, -torch.inf, 0.5]])))


@pytest.mark.parametrize("spread", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("length", [1, 2, 17, 400])
def test_entmax_sums_to_one_and_is_the_root(length: int, spread: float) -> None:
    z = (drawn(5, length) * spread).double()
    found = entmax15(z)
    torch.testing.assert_close(found.sum(-1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(found, torch.stack([entmax(row) for row in z]), atol=1e-9, rtol=1e-9)
    hidden = torch.arange(length) % 3 == 1
    half = entmax15(z.masked_fill(hidden, -torch.inf))
    assert half[:, hidden].eq(0).all()
    torch.testing.assert_close(half[:, ~hidden], entmax15(z[:, ~hidden]))


def test_entmax_gradient_is_numeric_gradient() -> None:
    z = drawn(4, 7).double().requires_grad_()
    assert torch.autograd.gradcheck(entmax15, z)


def score_of(option: dict[str, Any]) -> Any:
    return make(config(option), True).stack.blocks[0].attn.score


def test_top_k_ranks_visible_keys_only_and_keeps_ties() -> None:
    score = score_of({"score": TOP})
    scores = torch.tensor([[[[1.0, 3.0, 3.0, 3.0, 9.0]]]])
    hidden = torch.tensor([[[[False, False, False, False, True]]]])
    assert score.weights(scores, hidden)[0, 0, 0].tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3, 0])
    only = torch.tensor([[[[False, True, True, True, True]]]])
    assert score.weights(scores, only)[0, 0, 0].tolist() == [1, 0, 0, 0, 0]
    scores.requires_grad_()
    score.weights(scores, hidden).square().sum().backward()
    assert scores.grad is not None and scores.grad[..., 0].item() == scores.grad[..., 4].item() == 0


def test_talking_heads_begin_as_heads_that_do_not_talk() -> None:
    plain, talking = (make(config({}), True), make(config({"score": TALK}), True))
    own = {name: p for name, p in talking.named_parameters() if ".score." not in name}
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            own[name].copy_(parameter)
        for block in talking.stack.blocks:
            block.attn.score.draw(lambda *_: pytest.fail("identity needs no random numbers"))
    x = drawn(ROWS, LENGTH, DIM).double()
    heard, told = (model.double()(inputs_embeds=x).last_hidden_state for model in (talking, plain))
    torch.testing.assert_close(heard, told, rtol=1e-10, atol=1e-10)


def test_fresh_values() -> None:
    option = {"memory": 40, "score": {"kind": TALK, "start": "normal"}}
    whole = config(option, "tupe", dim=48, vocab=5) | {"norm": "scale"}
    whole["stack"]["block"]["sublayers"]["attn"]["heads"] = 16
    whole["stack"]["norm"] = "inherit"
    model = construct(find("graph", "encoder").Config.model_validate(whole)).to_empty(device="cpu")
    model.initialise(0)
    attn = model.stack.blocks[0].attn
    for drawn_from_one in (attn.memory.k, attn.memory.v, attn.score.pre, attn.score.post):
        assert drawn_from_one.std().item() == pytest.approx(1, abs=0.15)
    assert model.stack.norm.weight.item() == pytest.approx(48**0.5)
    assert model.stack.shared.biases[0].theta_to.eq(0).all()


def test_scale_norm_by_hand() -> None:
    model = make(config({}) | {"norm": "scale"}, True)
    norm = model.stack.blocks[0].wiring.norm.attn
    x = drawn(5, DIM)
    wanted = torch.stack([row / row.square().sum().sqrt() * norm.weight.item() for row in x])
    torch.testing.assert_close(norm(x), wanted)
    assert norm(torch.zeros(1, DIM)).eq(0).all()


def test_simple_rms_and_unit_norms_by_hand() -> None:
    whole = config({"qk_norm": {"kind": "unit", "groups": 2}}) | {"norm": "simple-rms"}
    model = make(whole, True)
    block = model.stack.blocks[0]
    x = drawn(5, DIM)
    torch.testing.assert_close(block.wiring.norm.attn(x).square().mean(-1), torch.ones(5))
    torch.testing.assert_close(block.attn.q_norm(drawn(5, 4)).unflatten(-1, (2, 2)).norm(dim=-1), torch.ones(5, 2))


def test_chains_of_both_towers_are_their_own_even_when_blocks_are_computed_again() -> None:
    attn = {"kind": "attention", "heads": 2, "score": "residual"}
    cross = {**attn, "kind": "cross-attention"}
    side = {"stack": {"layers": 3, "block": {"sublayers": {"attn": attn}}}}
    both = {**side, "stack": {"layers": 3, "block": {"sublayers": {"attn": attn, "cross": cross}}}}
    whole = {"vocab": 11, "dim": 8, "pad": 0, "encoder": side, "decoder": both, "heads": {"lm": {}}}
    ids = torch.arange(10).reshape(2, 5)
    found = []
    for again in (False, True):
        model = construct(find("graph", "encoder-decoder").Config.model_validate(whole)).to_empty(device="cpu")
        model.initialise(0)
        if again:
            assert checkpoint_blocks(model) == 6
        model(input_ids=ids, decoder_input_ids=ids.flip(1), labels=ids).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, msg=lambda text, name=name: f"{name}: {text}")


def test_a_layer_that_is_passed_over_does_not_break_the_chain() -> None:
    option = {"score": "residual"}
    model = make(config(option, cross=True), True)
    alone = make(config(option), True)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in alone.named_parameters():
            parameter.copy_(own[name])
    x = drawn(ROWS, LENGTH, DIM)
    assert torch.equal(model(inputs_embeds=x).last_hidden_state, alone(inputs_embeds=x).last_hidden_state)


def test_deep_chains_compile() -> None:
    whole = config({"score": chain("residual", TALK, TOP, "entmax")["score"], "memory": 2})
    whole["stack"]["layers"] = 12
    model = make(whole, True, 0.1)
    x = drawn(ROWS, LENGTH, DIM)
    wanted = model(inputs_embeds=x).last_hidden_state
    torch._dynamo.reset()
    compile_blocks(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(model(inputs_embeds=x).last_hidden_state, wanted)


def test_fused_and_plain_agree_beside_persistent_keys() -> None:
    model = make(config({"memory": 2, "kv_heads": 1}, "t5"), True)
    x = drawn(ROWS, LENGTH, DIM)
    grads, values = [], []
    for fused in (True, False):
        for block in model.stack.blocks:
            assert block.attn.score.fused
            block.attn.fused = fused
        model.zero_grad()
        out = model(inputs_embeds=x).last_hidden_state
        out.square().sum().backward()
        values.append(out)
        grads.append([p.grad for n, p in model.named_parameters() if n != "embed.tokens.weight"])
    torch.testing.assert_close(values[0], values[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grads[0], grads[1], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("causal", [True, False], ids=["decoder", "encoder"])
def test_untied_places_end_and_memory_tokens_do_not_take_them(causal: bool) -> None:
    model = make(config({}, "tupe", memory_tokens=3), causal)
    assert model.limit == 16
    assert model(inputs_embeds=drawn(1, 16, DIM)).last_hidden_state.shape == (1, 16, DIM)
    with pytest.raises(UserError, match="the text has 17 tokens, the model's positions end at 16"):
        model(inputs_embeds=drawn(1, 17, DIM))


def test_the_summary_token_behind_memory_tokens_is_the_one_that_is_reset() -> None:
    model = make(config({}, "tupe", memory_tokens=3), False)
    bias = model.stack.shared.biases[0]
    seen: list[Tensor] = []
    scores = bias.scores
    bias.scores = lambda *given: seen.append(scores(*given)) or seen[-1]
    model(inputs_embeds=drawn(1, 5, DIM))
    found = seen[0][0]
    assert found[:, 3].eq(bias.theta_from[:, None]).all()
    assert found[:, [0, 1, 2, 4, 5, 6, 7], 3].eq(bias.theta_to[:, None]).all()
    assert not found[:, 0, :3].eq(bias.theta_from[:, None]).any()


def test_inspect_says_what_cannot_be_drawn() -> None:
    several = {"kind": "all", "of": ["infused", "tupe", {"kind": "shaw", "distance": 3}]}
    model = make(config({"memory": 2}, several, cross=True), True)
    assert look(model, 8, 4).words == (
        "stack: attn of layers 0-1: position tupe is learned, a checkpoint shows it",
        "stack: attn of layers 0-1: position shaw depends on the queries",
        "stack: attn of layers 0-1: 2 persistent keys, which every query sees",
        "stack: cross of layers 0-1: every real key of the encoder's memory",
        "stack: cross of layers 0-1: 2 persistent keys, which every query sees",
    )
    assert look(model, 8, 4, model.state_dict().__getitem__).biases[0].kind == "tupe"


def recurrent(option: dict[str, Any], position: Any = "none") -> dict[str, Any]:
    whole = config(option, position)
    whole["stack"]["recurrence"] = {"length": 4}
    return whole


def reversible(option: dict[str, Any]) -> dict[str, Any]:
    whole = config(option)
    whole["stack"]["kind"] = "reversible"
    whole["stack"]["block"]["sublayers"]["ffn"] = {"kind": "mlp", "hidden": 8}
    return whole


UNEQUAL = {
    "pattern": ["a", "b"],
    "blocks": {
        "a": {"sublayers": {"attn": {"kind": "attention", "heads": 3, "score": "residual"}}},
        "b": {"sublayers": {"attn": {"kind": "attention", "heads": 2, "score": "residual"}}},
    },
}
REFUSED = [
    ("two normals", config(chain("softmax", "entmax")), True, "both stand at one place"),
    ("twice", config(chain(TALK, TALK)), True, "both stand at one place"),
    ("rank before mixing", config(chain(TOP, TALK)), True, f"'talking-heads' comes before; the order is {ORDER}"),
    ("carry after mixing", config(chain(TALK, "residual")), True, "'residual' comes before"),
    ("softmax first", config(chain("softmax", TOP)), True, "'top-k' comes before"),
    ("chain in a chain", config(chain(chain(TOP)["score"])), True, "a chain holds no chain"),
    ("silent heads", config({"score": {"kind": TALK, "pre": False, "post": False}}), True, "mix neither"),
    ("unequal heads", config({}) | {"stack": {"layers": 2, **UNEQUAL}}, True, "scores of 3 heads"),
    ("reset in a decoder", config({}, {"kind": "tupe", "reset": True}), True, "no summary token"),
    ("places without an end", config({}, "tupe") | {"context": None}, True, "need model.context"),
    ("rotation in tupe", config({}, {"kind": "tupe", "relative": "rotary"}), True, "'rotary' is no bias"),
    ("two rotations", config({}, {"kind": "all", "of": ["rotary", "rotary"]}), True, "2 positions of kind 'rotary'"),
    ("inherit in all", config({}, {"kind": "all", "of": ["rotary", "inherit"]}), True, "'inherit' cannot be one"),
    ("places and recurrence", recurrent({}, "tupe"), True, "begin anew in each segment"),
    ("reversible and carried", reversible({"score": "residual"}), True, "no scores can be carried"),
    (
        "chunks carried",
        config({"kind": "chunked", "chunk": 4, "score": "residual"}),
        True,
        "has no scores that another",
    ),
    ("odd groups", config({"qk_norm": {"kind": "unit", "groups": 3}}), True, "3 groups do not divide a width of 4"),
]


@pytest.mark.parametrize(("whole", "causal", "reason"), [pytest.param(*case[1:], id=case[0]) for case in REFUSED])
def test_what_cannot_combine_is_refused_with_the_reason(whole: dict[str, Any], causal: bool, reason: str) -> None:
    with pytest.raises((Refused, ValueError)) as caught:
        make(whole, causal)
    assert reason in str(caught.value)
