"""The options inside attention: each and in combination as the papers write them, values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from slow_attention import Case, attention, bucket, entmax
from torch import Tensor

from xtcli.errors import UserError
from xtcli.inspect.sight import look
from xtcli.model import construct
from xtcli.parts.entmax import entmax15
from xtcli.parts.graphs import Graph
from xtcli.parts.scope import Refused
from xtcli.parts.scores import ORDER
from xtcli.registry import find
from xtcli.train.transforms import checkpoint_blocks, compile_blocks

DIM, HEADS, LENGTH, ROWS, LAYERS, WIDE = 12, 3, 6, 2, 2, 8
TIGHT = {"atol": 2e-6, "rtol": 2e-6}
"""Softmax and entmax are float32 at least; angles are float32 whatever the model, and then the bound is looser."""
TOP, TALK = {"kind": "top-k", "k": 2}, "talking-heads"


def chain(*stages: Any) -> dict[str, Any]:
    return {"score": {"kind": "chain", "of": list(stages)}}


OPTIONS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "wide": {"score": "softmax-wide"},
    "softcap": {"score": {"kind": "softcap", "cap": 0.7}},
    "top-k": {"score": TOP},
    "top-more-than-there-are": {"score": {"kind": "top-k", "k": 99}},
    "entmax": {"score": "entmax"},
    "talking-heads": {"score": TALK},
    "talking-before": {"score": {"kind": TALK, "post": False}},
    "talking-after": {"score": {"kind": TALK, "pre": False, "start": "normal"}},
    "residual": {"score": "residual"},
    "residual-mean": {"score": {"kind": "residual", "mean": True}},
    "memory": {"memory": 2},
    "gated": {"out": "gated"},
    "gated-attended": {"out": "gated-attended"},
    "cosine": {"qk_norm": "unit", "scale": 10.0},
    "top-k-entmax": chain(TOP, "entmax"),
    "talking-entmax": chain(TALK, "entmax"),
    "residual-talking-capped-top-k-entmax": chain("residual", TALK, {"kind": "softcap", "cap": 2.0}, TOP, "entmax"),
    "residual-top-k": chain("residual", TOP),
    "residual-talking-wide": chain("residual", TALK, "softmax-wide"),
    "grouped-talking-memory": {"kv_heads": 1, "memory": 3, "score": TALK},
    "memory-top-k-entmax-gated": {"memory": 2, "out": "gated", **chain(TOP, "entmax")},
    "memory-residual-cosine": {"memory": 2, "score": "residual", "qk_norm": "unit", "scale": 3.0},
    "grouped-memory": {"kv_heads": 1, "memory": 2, "out": "gated-attended"},
}
TUPE_T5 = {"kind": "tupe", "relative": {"kind": "t5", "buckets": 8, "furthest": 5}, "norm": "none"}
POSITIONS: dict[str, Any] = {
    "t5": {"kind": "t5", "buckets": 8, "furthest": 5},
    "alibi": "alibi",
    "rotary": "rotary",
    "infused": "infused",
    "distance-mlp": {"kind": "distance-mlp", "hidden": 5, "depth": 2},
    "distance-mlp-log": {"kind": "distance-mlp", "hidden": 5, "depth": 1, "log": True},
    "tupe": {"kind": "tupe", "norm": "none"},
    "tupe-ordered": {"kind": "tupe", "norm": "none", "reset": False},
    "tupe-t5": TUPE_T5,
    "rotary-t5": {"kind": "all", "of": ["rotary", {"kind": "t5", "buckets": 8, "furthest": 5}]},
    "infused-alibi-rotary": {"kind": "all", "of": ["infused", "alibi", "rotary"]},
    "alibi-tupe-t5": {"kind": "all", "of": ["alibi", TUPE_T5]},
}
EVERYTHING = {"memory": 2, "out": "gated", **chain("residual", TALK, TOP, "entmax")}
CASES = [
    *((name, option, "none") for name, option in OPTIONS.items()),
    *((name, {}, position) for name, position in POSITIONS.items()),
    *((f"everything-{name}", EVERYTHING, position) for name, position in POSITIONS.items()),
]


def config(option: dict[str, Any], position: Any = "none", *, cross: bool = False, **more: Any) -> dict[str, Any]:
    attn = {"kind": "attention", "heads": HEADS, **option}
    sublayers = {"attn": attn}
    if cross:
        sublayers["cross"] = {**attn, "kind": "cross-attention"}
        more["memory"] = WIDE
    stack = {"layers": LAYERS, "position": position, "norm": "none", "block": {"sublayers": sublayers}}
    return {"vocab": 11, "dim": DIM, "context": 16, "norm": "none", "stack": stack} | more


def make(whole: dict[str, Any], causal: bool, spread: float = 0.6) -> Graph:
    """A model with every parameter random."""
    cls = find("graph", "decoder" if causal else "encoder")
    model: Graph = construct(cls.Config.model_validate(whole)).to_empty(device="cpu")
    model.initialise(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return model.eval()


def bias_of(position: Any, weights: dict[str, Tensor], at: str, causal: bool) -> Any:
    """The bias of a position kind as a function of (head, query, key)."""
    position = {"kind": position} if isinstance(position, str) else position
    kind = position["kind"]
    if kind in ("none", "rotary", "infused"):
        return None
    if kind == "all":
        members = [m for m in position["of"] if bias_of(m, weights, at, causal)]
        names = [at] if len(members) == 1 else [f"{at}of.{n}." for n in range(len(members))]
        found = [bias_of(m, weights, name, causal) for m, name in zip(members, names, strict=True)]
        return (lambda h, i, j: sum(one(h, i, j) for one in found)) if found else None
    if kind == "t5":
        return lambda h, i, j: weights[f"{at}table.weight"][bucket(j - i, 8, 5, causal), h]
    if kind == "alibi":
        slopes = [2**-4, 2**-8, 2**-2]
        return lambda h, i, j: torch.tensor(slopes[h] * (-abs(j - i)))
    if kind == "distance-mlp":

        def network(h: int, i: int, j: int) -> Tensor:
            x = torch.tensor([float(j - i)], dtype=torch.float64)
            x = x.sign() * (1 + x.abs()).log() if position.get("log") else x
            last = position["depth"]
            for n in range(last + 1):
                x = weights[f"{at}layers.{n}.weight"] @ x + weights[f"{at}layers.{n}.bias"]
                x = x if n == last else x / (1 + (-x).exp())
            return x[h]

        return network
    inner = bias_of(position.get("relative", "none"), weights, at + "relative.", causal)
    width = DIM // HEADS
    reset = position.get("reset", not causal)

    def untied(h: int, i: int, j: int) -> Tensor:
        if reset and i == 0:
            return weights[at + "theta_from"][h]
        if reset and j == 0:
            return weights[at + "theta_to"][h]
        own = slice(h * width, (h + 1) * width)
        q, k = (
            (weights[f"{at}{name}.weight"] @ weights[f"{at}table.weight"][place] + weights[f"{at}{name}.bias"])[own]
            for name, place in (("q", i), ("k", j))
        )
        score = q @ k / (2 * width) ** 0.5
        return score if inner is None else score + inner(h, i, j)

    return untied


def reference(model: Graph, option: dict[str, Any], position: Any, causal: bool, given: dict[str, Tensor]) -> Any:
    """The last hidden states and the weights, float64, with a graph."""
    weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    text = str(position)
    flags = {"infused": "infused" in text, "rotary": "rotary" in text}
    scale = 2**-0.5 if "tupe" in text else 1.0
    x = given["inputs_embeds"].double().requires_grad_()
    leaf, keep, carried = x, given.get("attention_mask"), {}
    memory, memory_keep = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")
    bias = bias_of(position, weights, "stack.shared.biases.0.", causal)

    def seen(row: int, i: int, j: int) -> bool:
        padded = keep is not None and not keep[row, j]
        return (j <= i if causal else True) and (not padded or (i == j and not bool(keep[row, i])))

    for layer in range(LAYERS):
        own = Case(option | flags, weights, f"stack.blocks.{layer}.attn.", HEADS, bias, scale, carried)
        x = x + attention(own, x, x, seen, "self")
        if memory is not None:
            other = Case(option, weights, f"stack.blocks.{layer}.cross.", HEADS, carried=carried)
            x = x + attention(
                other, x, memory.double(), lambda row, i, j: memory_keep is None or bool(memory_keep[row, j]), "cross"
            )
    return x, weights, leaf


def compare(model: Graph, option: dict[str, Any], position: Any, causal: bool, given: dict[str, Tensor]) -> None:
    wanted, weights, leaf = reference(model, option, position, causal, given)
    model.double()
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
    inputs["inputs_embeds"].requires_grad_()
    found = model(**inputs).last_hidden_state
    real = given.get("attention_mask", torch.ones(ROWS, LENGTH)).bool()
    # Padding rows are never used; a query there may see itself or more.
    loose = {"atol": 2e-4, "rtol": 2e-4} if any(word in str(position) for word in ("rotary", "infused")) else TIGHT
    torch.testing.assert_close(found[real], wanted[real], **loose)
    pull = torch.randn(found[real].shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (found[real] * pull).sum().backward()
    (wanted[real] * pull).sum().backward()
    torch.testing.assert_close(inputs["inputs_embeds"].grad, leaf.grad, **loose)
    for name, parameter in model.named_parameters():
        if name == "embed.tokens.weight":
            continue
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in (parameter, weights[name])]
        torch.testing.assert_close(*grads, **loose, msg=lambda text, name=name: f"{name}: {text}")


def drawn(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("option", "position"), [pytest.param(o, p, id=n) for n, o, p in CASES])
@pytest.mark.parametrize("causal", [True, False], ids=["decoder", "padded-encoder"])
def test_is_what_the_papers_write(option: dict[str, Any], position: Any, causal: bool) -> None:
    model = make(config(option, position), causal)
    given = {"inputs_embeds": drawn(ROWS, LENGTH, DIM)}
    if not causal:
        given["attention_mask"] = torch.tensor([[1] * LENGTH, [1] * 4 + [0] * 2])
    compare(model, option, position, causal, given)


@pytest.mark.parametrize("option", [pytest.param(o, id=n) for n, o in OPTIONS.items()])
def test_cross_attention_is_what_the_papers_write(option: dict[str, Any]) -> None:
    model = make(config(option, cross=True), True)
    given = {
        "inputs_embeds": drawn(ROWS, LENGTH, DIM),
        "encoder_hidden_states": drawn(ROWS, 4, WIDE, seed=4),
        "encoder_attention_mask": torch.tensor([[1] * 4, [0, 1, 1, 0]]),
    }
    compare(model, option, "none", True, given)


STEPS = [
    *((name, option, "none") for name, option in OPTIONS.items()),
    *((f"everything-{name}", EVERYTHING, position) for name, position in POSITIONS.items()),
]


@pytest.mark.parametrize(("option", "position"), [pytest.param(o, p, id=n) for n, o, p in STEPS])
def test_decoding_in_steps_equals_one_pass(option: dict[str, Any], position: Any) -> None:
    """Self- and cross-attention, with padding on the left, from a prompt shorter than k."""
    model = make(config(option, position, cross=True), True, 0.3)
    x, memory = drawn(ROWS, LENGTH, DIM), drawn(ROWS, 4, WIDE, seed=4)
    mask = torch.tensor([[1] * LENGTH, [0] + [1] * (LENGTH - 1)])
    places = (mask.cumsum(1) - 1).clamp(min=0)
    more = {"encoder_hidden_states": memory}
    with torch.no_grad():
        whole = model(inputs_embeds=x, attention_mask=mask, position_ids=places, **more).last_hidden_state
        state, parts, at = model.new_state(ROWS, LENGTH), [], 0
        for size in (2, 1, 2, 1):
            fed = {"inputs_embeds": x[:, at : at + size], "position_ids": places[:, at : at + size]}
            at += size
            parts.append(model(**fed, attention_mask=mask[:, :at], state=state, **more).last_hidden_state)
    torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("option", [pytest.param(o, id=n) for n, o in OPTIONS.items()])
def test_the_future_is_unseen(option: dict[str, Any]) -> None:
    """Also by the threshold of top-k, by tau of entmax and by heads that mix."""
    model = make(config(option, "t5"), True)
    x = drawn(ROWS, LENGTH, DIM)
    later = x.clone()
    later[:, 3:] += 5 * drawn(ROWS, LENGTH - 3, DIM, seed=9)
    with torch.no_grad():
        one, two = (model(inputs_embeds=given).last_hidden_state for given in (x, later))
    assert torch.equal(one[:, :3], two[:, :3])
    assert not torch.allclose(one[:, 3:], two[:, 3:])


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
    x = drawn(ROWS, LENGTH, DIM)
    torch.testing.assert_close(talking(inputs_embeds=x).last_hidden_state, plain(inputs_embeds=x).last_hidden_state)


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
    ("odd groups", config({"qk_norm": {"kind": "unit", "groups": 3}}), True, "3 groups do not divide a width of 4"),
]


@pytest.mark.parametrize(("whole", "causal", "reason"), [pytest.param(*case[1:], id=case[0]) for case in REFUSED])
def test_what_cannot_combine_is_refused_with_the_reason(whole: dict[str, Any], causal: bool, reason: str) -> None:
    with pytest.raises((Refused, ValueError)) as caught:
        make(whole, causal)
    assert reason in str(caught.value)
