"""Masks by blocks: the same as stored ones, pair by pair; models on either route agree in values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.attentions import config, make
from xtcli.parts import blockmasks, blocksparse, masks, routes
from xtcli.parts.blocklists import Listed
from xtcli.parts.context import Ctx, Visible
from xtcli.parts.kernels import fused, plain
from xtcli.parts.masks import CAUSAL, FULL, AllOf, AnyOf, Window
from xtcli.parts.scores import Sizes, Softmax
from xtcli.registry import Config, find
from xtcli.train.transforms import compile_blocks

pytest.importorskip("triton")

CPU = torch.device("cpu")
CHUNKS = find("mask", "chunks").Config


def window(left: int, right: int = 0, dilation: int = 1) -> Config:
    return Window.Config(left=left, right=right, dilation=dilation)


RULES: dict[str, Config] = {
    "causal": CAUSAL,
    "full": FULL,
    "window": window(130),
    "both sides": window(20, 300),
    "dilated": window(300, 5, 3),
    "causal window": AllOf.Config(of=(CAUSAL, window(200, 9))),
    "causal holes": AllOf.Config(of=(CAUSAL, window(400, 0, 2))),
    "strided": AnyOf.Config(of=(window(3), window(900, 0, 128))),
    "chunks": CHUNKS(chunk=100, before=1, after=1),
    "long chunks": CHUNKS(chunk=300, before=0),
}


def padding(kind: str, length: int) -> Tensor | None:
    """Three rows, one of them (mostly) whole."""
    keep = torch.ones(3, length, dtype=torch.bool)
    if kind == "left":
        keep[0, : length // 2 + 40], keep[1, :5] = False, False
    elif kind == "right":
        keep[0, length // 2 :], keep[2, -7:] = False, False
    elif kind == "holes":
        keep = torch.rand(3, length, generator=torch.Generator().manual_seed(0)) > 0.5
    return None if kind == "none" else keep


def texts(length: int, pad: str, packed: bool) -> Ctx:
    places = torch.arange(length)[None]
    cuts = torch.rand(3, length, generator=torch.Generator().manual_seed(1)) < 1 / 150
    documents = cuts.long().cumsum(1) if packed else None
    return Ctx(positions=places, keys=places, keep=padding(pad, length), documents=documents)


@pytest.mark.parametrize("length", [384, 500])
@pytest.mark.parametrize("packed", [False, True], ids=["one text", "documents"])
@pytest.mark.parametrize("pad", ["none", "left", "right", "holes"])
@pytest.mark.parametrize("name", RULES)
def test_a_mask_by_blocks_shows_the_pairs_of_a_stored_one(name: str, pad: str, packed: bool, length: int) -> None:
    ctx = texts(length, pad, packed)
    found = blockmasks.dense(blockmasks.of_rule(RULES[name], ctx, 3), torch.float32, 3, 4).mask
    wanted = masks.render(RULES[name], ctx, length, None, dense=True).mask
    assert found is not None and wanted is not None
    assert torch.equal(found.expand(3, 1, -1, -1), wanted.expand(3, 1, -1, -1))


@pytest.mark.parametrize(("name", "blocks"), [("causal", 10), ("window", 9), ("both sides", 13), ("causal window", 9)])
def test_blocks_that_nobody_sees_are_passed_over(name: str, blocks: int) -> None:
    mask = blockmasks.of_rule(RULES[name], texts(512, "none", False), 3).mask
    assert int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()) == blocks


def test_whole_blocks_are_not_asked_pair_by_pair() -> None:
    mask = blockmasks.of_rule(CAUSAL, texts(512, "none", False), 3).mask
    assert int(mask.full_kv_num_blocks.sum()) == 6


def test_the_end_of_a_text_is_looked_for_pair_by_pair() -> None:
    mask = blockmasks.of_rule(FULL, texts(500, "none", False), 1).mask
    assert int(mask.full_kv_num_blocks.sum()) == 9
    assert int(mask.kv_num_blocks.sum()) == 7


def test_documents_and_padding_leave_blocks_out() -> None:
    places = torch.arange(512)[None]
    documents = (places // 128).expand(2, -1)
    mask = blockmasks.of_rule(FULL, Ctx(positions=places, keys=places, documents=documents), 2).mask
    assert int(mask.full_kv_num_blocks.sum()) == 8 and int(mask.kv_num_blocks.sum()) == 0
    keep = (places < 130).expand(2, -1)
    mask = blockmasks.of_rule(CAUSAL, Ctx(positions=places, keys=places, keep=keep), 2).mask
    assert int(mask.full_kv_num_blocks.sum()) == 2 * 3 and int(mask.kv_num_blocks.sum()) == 2 * 4


SOFTMAX: Any = Softmax(Softmax.Config(), None, Sizes(4))  # type: ignore[arg-type]


def heads(groups: int, length: int, width: int = 8) -> tuple[list[Tensor], Tensor]:
    """Queries, keys and values, and the slope of what comes out."""
    generator = torch.Generator().manual_seed(2)
    q, k, v, dy = (torch.randn(3, count, length, width, generator=generator) for count in (4, groups, groups, 4))
    return [x.requires_grad_() for x in (q, k, v)], dy


@pytest.mark.parametrize("packed", [False, True], ids=["one text", "documents"])
@pytest.mark.parametrize("pad", ["none", "left", "right"])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("name", ["causal", "full", "window", "dilated", "chunks"])
def test_every_route_agrees_with_the_specification(name: str, groups: int, pad: str, packed: bool) -> None:
    length, rule = 300, RULES[name]
    ctx = texts(length, pad, packed)
    given, dy = heads(groups, length)
    wanted = plain(*given, masks.render(rule, ctx, length, None, dense=True), 0.3, 0.0, SOFTMAX)
    slopes = torch.autograd.grad(wanted, given, dy)
    stored = masks.render(rule, ctx, length, None, dense=False)
    for visible in (stored, Visible(blocks=blockmasks.of_rule(rule, ctx, 3))):
        y = fused(*given, visible, 0.3, 0.0)
        torch.testing.assert_close(y, wanted, atol=2e-6, rtol=2e-5)
        for mine, theirs in zip(torch.autograd.grad(y, given, dy), slopes, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


@pytest.fixture
def kernel_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention on the CPU, in tensors: without gradients, which it has on a GPU alone."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(blockmasks, "KERNEL", ("cpu",))
    monkeypatch.setattr(blockmasks, "_compiled", lambda: flex_attention)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.usefixtures("kernel_here")
@pytest.mark.parametrize(("name", "pad", "packed"), [("window", "left", True), ("chunks", "none", False)])
def test_the_kernel_is_handed_what_the_stored_mask_says(name: str, pad: str, packed: bool) -> None:
    ctx = texts(300, pad, packed)
    given, _ = heads(2, 300, 16)
    wanted = plain(*given, masks.render(RULES[name], ctx, 300, None, dense=True), 0.3, 0.0, SOFTMAX)
    with torch.no_grad():
        given = [x.detach() for x in given]
        found = fused(*given, Visible(blocks=blockmasks.of_rule(RULES[name], ctx, 3)), 0.3, 0.0)
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=2e-5)


def test_weights_cannot_be_dropped_from_a_mask_by_blocks() -> None:
    given, _ = heads(4, 300)
    with pytest.raises(AssertionError, match="no weights to drop"):
        fused(*given, Visible(blocks=blockmasks.of_rule(CAUSAL, texts(300, "none", False), 3)), 0.3, 0.1)


LENGTH = 300
ALIBI = {"kind": "alibi", "scaled": True}
MODELS: dict[str, tuple[bool, dict[str, Any], tuple[str, ...]]] = {
    # name: (causal, attention, padding)
    "window": (True, {"heads": 4, "kv_heads": 2, "mask": {"kind": "window", "left": 40}}, ("none", "left", "right")),
    "causal": (True, {}, ("left", "right")),
    "encoder": (False, {"qk_norm": "rms"}, ("none",)),
    "alibi": (True, {"position": "alibi"}, ("none", "left", "right")),
    "alibi both sides": (False, {"position": {"kind": "alibi", "places": "counted"}}, ("none", "left", "right")),
    "alibi window": (True, {"position": ALIBI, "mask": {"kind": "window", "left": 40}}, ("none", "right")),
    "chunks": (False, {"mask": {"kind": "chunks", "chunk": 50, "after": 1}}, ("none", "right")),
    "local": (False, {"kind": "local", "radius": 20, "kv_heads": 1}, ("none", "left", "right")),
    "gaps": (False, {"kind": "local", "radius": 20, "dilation": 3}, ("none", "right")),
    "sliding-global": (False, {"kind": "sliding-global", "radius": 20, "globals": "first"}, ("none", "left", "right")),
    "block-sparse": (
        False,
        {"kind": "block-sparse", "block": 16, "random": 2, "heads": 4, "kv_heads": 2},
        ("none", "right"),
    ),
    "drawn": (False, {"kind": "block-sparse", "block": 16, "random": 2, "drawn": "always"}, ("none", "left", "right")),
    "not drawn": (False, {"kind": "block-sparse", "block": 16, "random": 0}, ("none", "left", "right")),
}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often a kernel was asked; what it would make is made of stored masks."""
    calls: list[int] = []

    def counting(attend: Any) -> Any:
        def counts(*given: Any) -> Tensor:
            calls.append(1)
            made: Tensor = attend(*given)
            return made

        return counts

    monkeypatch.setattr(blockmasks, "attend", counting(blockmasks.attend))
    monkeypatch.setattr(Listed, "attend", counting(Listed.attend))
    monkeypatch.setattr(blocksparse, "runs_on", lambda device: True)
    monkeypatch.setattr("xtcli.fast.blocks.attend", None)
    return calls


@pytest.mark.parametrize("packed", [False, True], ids=["one text", "documents"])
@pytest.mark.parametrize(("name", "pad"), [(name, pad) for name in MODELS for pad in MODELS[name][2]])
def test_models_agree_on_both_routes(
    name: str, pad: str, packed: bool, monkeypatch: pytest.MonkeyPatch, counted: list[int]
) -> None:
    causal, attention, _ = MODELS[name]
    model = make(config(attention, context=LENGTH, dropout=0.0), causal, spread=0.3)
    ctx = texts(LENGTH, pad, packed)
    ids = torch.randint(11, (3, LENGTH), generator=torch.Generator().manual_seed(5))
    given = {"input_ids": ids, "attention_mask": ctx.keep, "document_ids": ctx.documents}
    given = {key: value for key, value in given.items() if value is not None}
    real = torch.ones_like(ids, dtype=torch.bool) if ctx.keep is None else ctx.keep

    def run() -> tuple[Tensor, list[Tensor]]:
        hidden = model(**given).last_hidden_state[real]
        weigh = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(6))
        parameters = [p for p in model.parameters() if p.requires_grad]
        return hidden, list(torch.autograd.grad((hidden * weigh).sum(), parameters, allow_unused=True))

    wanted, slopes = run()
    assert not counted
    monkeypatch.setattr(routes, "suits", lambda x: True)
    found, mine = run()
    plain_one = name in ("causal", "encoder") and pad == "none" and not packed
    assert bool(counted) != plain_one
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    for one, other in zip(mine, slopes, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize(
    "attention",
    [
        {"dropout": 0.1},
        {"memory": 2},
        {"score": "entmax"},
        {"position": {"kind": "shaw", "distance": 4}},
        {"position": "t5"},
        {"position": {"kind": "alibi", "rounded": True}},
        {"position": {"kind": "all", "of": ["alibi", "t5"]}},
    ],
    ids=str,
)
def test_what_the_kernel_cannot_do_keeps_its_stored_mask(
    attention: dict[str, Any], monkeypatch: pytest.MonkeyPatch, counted: list[int]
) -> None:
    monkeypatch.setattr(routes, "suits", lambda x: True)
    model = make(config({"mask": {"kind": "window", "left": 40}, **attention}, context=LENGTH, dropout=0.0), True)
    assert not any(view.blocks for view in model.stack.shared.views)  # type: ignore[union-attr]
    model.train()(input_ids=torch.zeros(1, LENGTH, dtype=torch.long))
    assert not counted


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("kernel_here")
def test_blocks_compile_once_whatever_the_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "suits", lambda x: True)
    model = make(config({"mask": {"kind": "window", "left": 40}, "head_dim": 16}, context=LENGTH, dropout=0.0), True)
    expected, made = [], []
    feeds = [{"input_ids": torch.full((3, LENGTH), n), "attention_mask": padding("left", LENGTH)} for n in range(3)]
    feeds[1]["attention_mask"] = padding("holes", LENGTH)
    graphs: list[int] = []

    def counter(graph: Any, inputs: Any) -> Any:
        graphs.append(1)
        return graph

    with torch.no_grad():
        expected = [model(**feed).last_hidden_state for feed in feeds]
        compile_blocks(model, backend=counter, fullgraph=True)
        made = [model(**feed).last_hidden_state for feed in feeds]
    assert len(graphs) == 1
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-4)


def test_only_training_on_a_gpu_asks_for_blocks() -> None:
    long = torch.zeros(1, routes.LEAST, 8, dtype=torch.bfloat16)
    assert not routes.suits(long)
    gpu = torch.zeros(1, routes.LEAST, 8, dtype=torch.bfloat16, device="meta")
    assert not routes.suits(gpu)


def test_what_a_recorded_pass_reads_is_never_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(blockmasks, "_read", [])
    kept: list[Any] = blockmasks._read
    for recording in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda recording=recording: recording)
        found = blockmasks.of_rule(window(77), texts(384, "none", False), 1)
        assert kept == ([found] if recording else [])
