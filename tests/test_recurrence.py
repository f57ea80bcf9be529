"""Segment recurrence as an option of any stack of attentions; waves of the distance against their definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from xtcli.model import construct
from xtcli.parts.graphs import Graph
from xtcli.parts.scope import Refused
from xtcli.parts.waves import slide
from xtcli.registry import find

VOCAB, LENGTH = 67, 24
POSITIONS = ("wave", "t5", "rotary", "alibi", "infused", "none", "shaw")


def config(position: Any, recurrence: Any, wiring: str = "pre", **attn: Any) -> dict[str, Any]:
    place = {"kind": "shaw", "distance": 5} if position == "shaw" else position
    sublayers = {"attn": {"kind": "attention", "heads": 4, **attn}, "ffn": {"kind": "mlp", "hidden": 40}}
    return {
        "vocab": VOCAB,
        "dim": 32,
        "stack": {
            "layers": 2,
            "position": place,
            "recurrence": recurrence,
            "block": {"wiring": wiring, "sublayers": sublayers},
        },
        "heads": {"lm": {}},
    }


def make(tree: dict[str, Any], kind: str = "decoder") -> Graph:
    model: Graph = construct(find("graph", kind).Config.model_validate(tree)).to_empty(device="cpu")
    model.initialise(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def text(rows: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(3))


def in_segments(model: Graph, ids: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, Any]:
    mems, parts, at = None, [], 0
    for size in sizes:
        out = model(input_ids=ids[:, at : at + size], mems=mems)
        mems, at = out.mems, at + size
        parts.append(out.logits)
    return torch.cat(parts, 1), mems


@pytest.mark.parametrize("wiring", ["pre", "post", "sandwich-norm", "parallel", "parallel-shared", "rezero", "gated"])
@pytest.mark.parametrize("position", POSITIONS)
def test_segments_that_forget_nothing_are_one_pass(position: str, wiring: str) -> None:
    model = make(config(position, {"length": 64}, wiring))
    whole = model(input_ids=text()).logits
    parts, mems = in_segments(model, text(), (9, 1, 6, 8))
    torch.testing.assert_close(parts, whole, atol=2e-5, rtol=1e-5)
    assert [memory.shape for memory in mems] == [(LENGTH, 2, 32)] * 2
    assert not any(memory.requires_grad for memory in mems)


@pytest.mark.parametrize("position", POSITIONS)
def test_what_is_forgotten_is_what_the_band_of_segments_hides(position: str) -> None:
    """Query i of a segment that begins at b sees from b - M on: one pass under that mask (not a band of fixed width)."""
    keep, size = 5, 8
    model = make(config(position, {"length": keep}))
    parts, _ = in_segments(model, text(), (size,) * 3)
    torch.testing.assert_close(parts, slowly(model, text(), keep, size), atol=2e-5, rtol=1e-5)


def slowly(model: Graph, ids: Tensor, keep: int, size: int) -> Tensor:
    """One pass over the whole text in which each segment's queries see from `keep` places before it on."""
    begins = torch.arange(LENGTH) // size * size
    seen = (torch.arange(LENGTH)[None] <= torch.arange(LENGTH)[:, None]) & (
        torch.arange(LENGTH)[None] >= begins[:, None] - keep
    )
    stack: Any = model.stack
    places = torch.arange(LENGTH)
    if any(type(module).__name__ == "Infused" for module in model.modules()):
        # Places begin behind the memory: those of the first segment are its own.
        places = places - begins + torch.clamp(begins, max=keep)
        pytest.skip("places of a pass over all segments are not those that each segment counts")
    shared = stack.shared
    prepare = shared.prepare

    def hiding(x: Tensor, ctx: Any) -> Any:
        from dataclasses import replace

        from xtcli.parts.context import Visible

        made = prepare(x, ctx)
        views = tuple(
            Visible(seen if v.mask is None or v.mask.dtype == torch.bool else v.mask.masked_fill(~seen, float("-inf")))
            for v in made.visible
        )
        return replace(made, visible=views)

    shared.prepare = hiding
    try:
        return model(input_ids=ids).logits
    finally:
        shared.prepare = prepare


@pytest.mark.parametrize("start", ["empty", "zeros"])
@pytest.mark.parametrize("position", POSITIONS)
def test_steps_with_a_state_are_one_pass_and_rows_are_alone(position: str, start: str) -> None:
    model = make(config(position, {"length": 8, "start": start}))
    whole = model(input_ids=text()).logits
    state, parts = model.new_state(2, LENGTH), []
    for at, stop in ((0, 9), (9, 10), (10, 15), (15, 24)):
        parts.append(model(input_ids=text()[:, at:stop], state=state).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-5, rtol=1e-5)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :5] = 0
    places = torch.stack([torch.arange(LENGTH), (torch.arange(LENGTH) - 5).clamp(min=0)])
    alone = model(input_ids=text()[1:, 5:]).logits[0]
    padded = model(input_ids=text(), attention_mask=mask, position_ids=places).logits[1, 5:]
    torch.testing.assert_close(padded, alone, atol=2e-5, rtol=1e-5)
    state = model.new_state(2, LENGTH)
    first = model(input_ids=text()[:, :12], attention_mask=mask[:, :12], position_ids=places[:, :12], state=state)
    state.select(torch.tensor([1, 1, 0]))
    rows = text()[[1, 1, 0], 12:]
    then = model(input_ids=rows, position_ids=places[[1, 1, 0], 12:], state=state).logits
    torch.testing.assert_close(first.logits[1, 5:], alone[:7], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(then[1], alone[7:], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(then[2], whole[0, 12:], atol=2e-5, rtol=1e-5)


def test_a_memory_is_the_input_before_the_norm_and_is_normed_as_the_input_is() -> None:
    model = make(config("none", {"length": 4}))
    stack: Any = model.stack
    seen: list[Tensor] = []
    stack.blocks[0].wiring.norm["attn"].register_forward_hook(lambda module, given, out: seen.append(given[0]))
    old = [torch.randn(4, 2, 32), torch.randn(4, 2, 32)]
    out = model(input_ids=text()[:, :3], mems=torch.stack(old))
    entered = model.embed(text()[:, :3], None, None, _ctx(model))
    torch.testing.assert_close(seen[0], old[0].transpose(0, 1))
    torch.testing.assert_close(seen[1], entered)
    torch.testing.assert_close(out.mems[0], torch.cat((old[0][3:], entered.transpose(0, 1))))


def _ctx(model: Any) -> Any:
    from xtcli.parts.context import Ctx

    places = torch.arange(3)[None]
    return Ctx(positions=places, keys=places, table=model.table())


def test_gradients_stop_at_memories_and_reach_everything_else() -> None:
    model = make(config("wave", {"length": 8}))
    first = model(input_ids=text()[:, :8])
    terms = model.losses({"input_ids": text()[:, 8:16], "mems": first.mems}, {"lm": text()[:, 9:17]})
    terms["lm"].mean().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())


@pytest.mark.parametrize(
    ("queries", "keys", "distances"), [(1, 1, 1), (1, 9, 9), (5, 5, 5), (4, 11, 11), (5, 5, 9), (3, 7, 9)]
)
def test_sliding_is_picking_by_distance(queries: int, keys: int, distances: int) -> None:
    scores = torch.randn(2, 3, queries, distances, dtype=torch.float64, requires_grad=True)
    i, j = torch.arange(queries)[:, None], torch.arange(keys)[None]
    where = queries - 1 - i + j
    made = (where < distances).expand(queries, keys)
    picked = scores.gather(-1, where.clamp(max=distances - 1).expand(2, 3, queries, keys))
    found = slide(scores, keys)
    assert torch.equal(found[..., made], picked[..., made])
    weights = torch.randn(queries, keys, dtype=torch.float64) * made
    grads = [
        torch.autograd.grad((made_by * weights).sum(), scores, retain_graph=True)[0] for made_by in (found, picked)
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
@pytest.mark.parametrize("clamp", [None, 3])
def test_waves_are_their_formula(kind: str, clamp: int | None) -> None:
    tree = config({"kind": "wave", "clamp": clamp}, {"length": 8}, bias=False)
    tree["heads"] = {"lm": {}}
    model = make(tree, kind)
    attention: Any = model.stack.blocks[0].attn  # type: ignore[union-attr, index]
    given: list[Any] = []
    attention.relative.register_forward_pre_hook(lambda module, inputs: None)
    relative, scores = attention.relative, attention.relative.scores
    relative.scores = lambda q, k, ctx: given.append((q, k, ctx)) or scores(q, k, ctx)
    model(input_ids=text()[:, :6], mems=[torch.randn(5, 2, 32)] * 2)
    q, k, ctx = given[0]
    expected = torch.empty(2, 4, 6, 11)
    frequencies = 10000.0 ** (-torch.arange(0, 32, 2) / 32)
    for i in range(6):
        for j in range(11):
            distance = float(5 + i - j) if clamp is None else max(-clamp, min(clamp, 5 + i - j))
            r = torch.cat(((distance * frequencies).sin(), (distance * frequencies).cos()))
            r = relative.r(r).reshape(4, 8)
            near = (k[:, :, j] * relative.biases.content).sum(-1)
            expected[:, :, i, j] = (near + ((q[:, :, i] + relative.biases.place) * r).sum(-1)) * 8**-0.5
    found = scores(q, k, ctx)
    made = (torch.arange(11)[None] <= torch.arange(6)[:, None] + 5) if kind == "decoder" else torch.ones(6, 11).bool()
    torch.testing.assert_close(found[..., made], expected[..., made], atol=1e-5, rtol=1e-5)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"embed": {"kind": "tokens", "positions": "learned"}, "context": 32}, "absolute positions begin anew"),
    ({"embed": {"kind": "tokens", "positions": "sinusoidal"}}, "absolute positions begin anew"),
]


@pytest.mark.parametrize(("change", "said"), REFUSED)
def test_what_cannot_recur_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(Refused, match=said):
        make(config("none", {"length": 4}) | change)


def test_mixers_that_remember_nothing_are_refused() -> None:
    tree = config("none", {"length": 4})
    tree["stack"]["block"]["sublayers"]["mixer"] = {"kind": "fourier"}
    with pytest.raises(Refused, match="keeps no memory of earlier segments"):
        make(tree, "encoder")


def test_both_sides_of_an_encoder_decoder_are_refused() -> None:
    side = {"stack": config("none", {"length": 4})["stack"]}
    with pytest.raises(Refused, match="carries nothing on to the next"):
        make({"vocab": VOCAB, "dim": 32, "pad": 0, "encoder": side, "decoder": side}, "encoder-decoder")


def test_memories_of_a_model_that_keeps_none_are_refused() -> None:
    model = make(config("none", None))
    with pytest.raises(TypeError, match="no input mems"):
        model(input_ids=text(), mems=[torch.zeros(2, 2, 32)] * 2)
    with pytest.raises(ValueError, match="1 mems were given, the model has 2"):
        make(config("none", {"length": 4}))(input_ids=text(), mems=[torch.zeros(2, 2, 32)])


def test_each_attention_of_a_block_has_a_memory_of_its_own() -> None:
    tree = config("t5", {"length": 40})
    block = tree["stack"]["block"]["sublayers"]
    tree["stack"]["block"]["sublayers"] = {"attn": block["attn"], "ffn": block["ffn"], "attn_2": block["attn"]}
    model = make(tree)
    parts, mems = in_segments(model, text(), (8, 8, 8))
    assert len(mems) == 4
    torch.testing.assert_close(parts, model(input_ids=text()).logits, atol=2e-5, rtol=1e-5)


def test_a_recurrent_block_compiles_without_a_graph_break() -> None:
    from xtcli.train.transforms import compile_blocks

    model = make(config("wave", {"length": 8}))
    mems = [torch.randn(8, 2, 32), torch.randn(8, 2, 32)]
    expected = model(input_ids=text(), mems=mems)
    torch._dynamo.reset()
    compile_blocks(model, backend="eager", fullgraph=True)
    found = model(input_ids=text(), mems=mems)
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.mems, expected.mems)
    assert isinstance(model.stack, nn.Module)
