"""Attention in a window, in Triton's interpreter, against the specification; models on either route."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.attentions import config, make
from xtcli.parts import blockmasks, kernels, masks, routes, windows
from xtcli.parts.context import Ctx, Visible
from xtcli.parts.kernels import plain
from xtcli.parts.masks import AllOf, Window
from xtcli.parts.scores import Sizes, Softmax
from xtcli.registry import Config

pytest.importorskip("triton")

SOFTMAX: Any = Softmax(Softmax.Config(), None, Sizes(4))  # type: ignore[arg-type]


def window(left: int, right: int = 0) -> Config:
    return Window.Config(left=left, right=right)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels on the CPU, with float32 and small tiles."""
    from xtcli.fast import window as own

    monkeypatch.setattr(windows, "runs_on", lambda device: True)
    monkeypatch.setattr(windows, "KINDS", (torch.float32,))
    for table, size in {
        "FORWARD": (32, 16, 4, 1),
        "QUERIES": (16, 32, 4, 1),
        "KEYS": (32, 16, 4, 1),
        "KEYS_OF_GROUPS": (32, 16, 4, 1),
    }.items():
        monkeypatch.setattr(own, table, dict.fromkeys(windows.WIDTHS, size))
    blockmasks._of_rule_alone.cache_clear()


def texts(length: int, pad: str, packed: bool) -> Ctx:
    places = torch.arange(length)[None]
    keep = None
    if pad != "none":
        keep = torch.ones(2, length, dtype=torch.bool)
        keep[0, : length // 2] = pad == "right"
        keep[0, length // 2 :] = pad == "left"
    if pad == "holes":
        keep = torch.rand(2, length, generator=torch.Generator().manual_seed(0)) > 0.5
    documents = ((places + 5) // 40 - 1).expand(2, -1) if packed else None
    return Ctx(positions=places, keys=places, keep=keep, documents=documents)


def heads(groups: int, length: int, width: int) -> tuple[list[Tensor], Tensor]:
    """Laid out as projections leave them, and the slope of what comes out; four heads of 32, two of other widths."""
    count = 4 if width == 32 else 2
    generator = torch.Generator().manual_seed(length + width)
    q, k, v, dy = (
        torch.randn(2, length, number, width, generator=generator).transpose(1, 2)
        for number in (count, groups, groups, count)
    )
    return [x.requires_grad_() for x in (q, k, v)], dy


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("rule", "length", "width", "groups", "pad", "packed"),
    [
        (window(40), 128, 16, 2, "none", False),
        (window(31), 97, 32, 2, "none", False),
        (window(0), 64, 16, 1, "none", False),
        (window(500), 100, 16, 2, "none", False),
        (window(20, 45), 130, 64, 1, "none", False),
        (window(0, 9), 96, 128, 2, "none", False),
        (AllOf.Config(of=(window(50), window(33, 4))), 96, 16, 2, "none", False),
        (window(40), 96, 16, 2, "left", False),
        (window(40), 97, 16, 1, "right", False),
        (window(3, 2), 97, 16, 2, "holes", False),
        (window(24, 24), 100, 16, 2, "left", True),
        (window(60), 128, 16, 2, "none", True),
    ],
)
def test_values_and_gradients(rule: Config, length: int, width: int, groups: int, pad: str, packed: bool) -> None:
    ctx = texts(length, pad, packed)
    given, dy = heads(groups, length, width)
    blocks = blockmasks.of_rule(rule, ctx, 2)
    near = blocks.near(width, torch.float32)
    assert near is not None
    found = blockmasks.attend(*given, blocks, 0.3)
    wanted = plain(*given, masks.render(rule, ctx, length, None, dense=True), 0.3, 0.0, SOFTMAX)
    torch.testing.assert_close(found, wanted, atol=5e-6, rtol=2e-5)
    slopes = torch.autograd.grad(wanted, given, dy)
    for mine, theirs in zip(torch.autograd.grad(found, given, dy), slopes, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("causal", "groups", "length"), [(True, 4, 64), (True, 2, 128), (False, 2, 64)])
def test_short_texts_are_windows(causal: bool, groups: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernels.OURS, "cpu", windows)
    monkeypatch.setattr(windows, "SHORT_WIDTH", 32)
    given, dy = heads(groups, length, 32)
    seen = Visible(causal=causal)
    assert windows.takes(*given, seen, 0.0)
    found, wanted = kernels.fused(*given, seen, 0.3, 0.0), kernels.pytorchs(*given, seen, 0.3, 0.0)
    torch.testing.assert_close(found, wanted, atol=5e-6, rtol=2e-5)
    slopes = torch.autograd.grad(wanted, given, dy)
    for mine, theirs in zip(torch.autograd.grad(found, given, dy), slopes, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("heads", "groups", "length", "width", "causal", "dropout", "grad", "ours"),
    [
        (12, 12, 1024, 64, True, 0.0, True, True),
        (12, 12, 1088, 64, True, 0.0, True, False),
        (12, 4, 2048, 64, True, 0.0, True, True),
        (12, 4, 2112, 64, True, 0.0, True, False),
        (12, 12, 1024, 64, False, 0.0, True, True),
        (12, 12, 1088, 64, False, 0.0, True, False),
        (12, 4, 512, 64, False, 0.0, True, True),
        (12, 4, 576, 64, False, 0.0, True, False),
        (12, 12, 1000, 64, True, 0.0, True, False),
        (12, 12, 1024, 128, True, 0.0, True, False),
        (12, 12, 1024, 64, True, 0.1, True, False),
        (12, 12, 1024, 64, True, 0.0, False, False),
    ],
)
def test_texts_that_are_short(
    heads: int, groups: int, length: int, width: int, causal: bool, dropout: float, grad: bool, ours: bool
) -> None:
    q = torch.empty(1, heads, length, width, requires_grad=grad)
    k = torch.empty(1, groups, length, width)
    assert windows.takes(q, k, k, Visible(causal=causal), dropout) is ours
    assert not windows.takes(q, k, k, Visible(mask=torch.ones(length, length, dtype=torch.bool)), dropout)
    assert not windows.takes(q, k[:, :, :64], k[:, :, :64], Visible(), dropout)


@pytest.mark.usefixtures("here")
def test_queries_that_see_nothing_get_nothing() -> None:
    ctx = texts(64, "left", False)
    blocks = blockmasks.around(5, 1, None, ctx.keep, ctx, 16)
    given, dy = heads(2, 64, 16)
    y = blockmasks.attend(*given, blocks, 0.3)
    assert bool((y[0, :, :27] == 0).all()) and bool((y[0, :, 27:] != 0).any())
    slopes = torch.autograd.grad(y, given, dy)
    assert all(bool(torch.isfinite(slope).all()) for slope in slopes)
    assert bool((slopes[0][0, :, :27] == 0).all()) and bool((slopes[1][0, :, :32] == 0).all())


def test_heads_that_lie_otherwise() -> None:
    import xtcli.fast.window  # noqa: F401 - the operator is entered there

    near = windows.Near(9, 3, None)
    joint = torch.randn(1, 48, 3, 2, 16, generator=torch.Generator().manual_seed(0))
    q, k, v = (x.transpose(1, 2) for x in joint.unbind(2))
    y = near.attend(q, k, v, 0.2)
    assert y.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(near.attend(*(x.contiguous() for x in (q, k, v)), 0.2), y)
    odd = torch.randn(2, 1, 48, 33, generator=torch.Generator().manual_seed(0))[..., 1:17]
    torch.testing.assert_close(near.attend(odd, odd, odd, 0.2), near.attend(*(odd.contiguous(),) * 3, 0.2))


@pytest.mark.usefixtures("here")
def test_compiles_whole() -> None:
    given, dy = heads(2, 97, 16)
    blocks = blockmasks.of_rule(window(30), texts(97, "right", False), 2)
    wanted = blockmasks.attend(*given, blocks, 0.3)
    compiled: Any = torch.compile(
        lambda q, k, v: blockmasks.attend(q, k, v, blocks, 0.3), backend="aot_eager", fullgraph=True
    )
    found = compiled(*given)
    assert found.stride() == wanted.stride()
    torch.testing.assert_close(found, wanted)
    mine, theirs = (torch.autograd.grad(y, given, dy, retain_graph=True) for y in (found, wanted))
    torch.testing.assert_close(mine, theirs)


def counted_calls(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[str]:
    """Which of these ways to attend in a window are gone, one entry a call."""
    calls: list[str] = []

    def counted(name: str) -> Any:
        attend = getattr(windows.Near, name)

        def counts(*given: Any) -> Tensor:
            calls.append(name)
            made: Tensor = attend(*given)
            return made

        return counts

    for name in names:
        monkeypatch.setattr(windows.Near, name, counted(name))
    return calls


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("causal", "attention"),
    [
        (True, {"heads": 2, "kv_heads": 1, "mask": {"kind": "window", "left": 40}}),
        (False, {"kind": "local", "radius": 20, "heads": 2, "kv_heads": 1}),
        (False, {"kind": "sliding-global", "radius": 20, "heads": 2, "kv_heads": 1, "globals": "first"}),
    ],
    ids=["window", "local", "global"],
)
@pytest.mark.parametrize("pad", ["none", "left"])
def test_models_agree_on_both_routes(
    causal: bool, attention: dict[str, Any], pad: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted_calls(monkeypatch, "attend", "attend_beside")
    model = make(config({**attention, "head_dim": 16}, context=128, dropout=0.0), causal, spread=0.3)
    ids = torch.randint(11, (2, 128), generator=torch.Generator().manual_seed(5))
    keep = texts(128, pad, False).keep
    given = {"input_ids": ids} | ({} if keep is None else {"attention_mask": keep})

    def run() -> tuple[Tensor, list[Tensor]]:
        hidden = model(**given).last_hidden_state[torch.ones_like(ids, dtype=torch.bool) if keep is None else keep]
        parameters = [p for p in model.parameters() if p.requires_grad]
        return hidden, list(torch.autograd.grad(hidden.square().sum(), parameters))

    wanted, slopes = run()
    assert not calls
    monkeypatch.setattr(routes, "suits", lambda x: True)
    found, mine = run()
    assert calls
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mine, slopes, atol=2e-4, rtol=2e-3)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("how", ["given", "padded", "twos", "documents", "none"])
def test_global_tokens_agree_on_both_routes(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three in one row and one in the other, by a mask of their own or by twos; the first of rows of documents."""
    attention = {"kind": "sliding-global", "radius": 9, "heads": 2, "kv_heads": 2, "head_dim": 16, "globals": "first"}
    model = make(config(attention, context=100, dropout=0.0), False, spread=0.3)
    generator = torch.Generator().manual_seed(5)
    given = {"input_ids": torch.randint(11, (2, 100), generator=generator)}
    marked, keep = torch.zeros(2, 100, dtype=torch.long), torch.ones(2, 100, dtype=torch.long)
    marked[0, [2, 50, 97]] = marked[1, 60] = 1
    keep[1, 80:] = 0
    if how in ("given", "padded"):
        given["global_attention_mask"] = marked
    if how == "none":
        given["global_attention_mask"] = torch.zeros_like(marked)
    if how in ("padded", "twos"):
        given["attention_mask"] = keep + (marked if how == "twos" else 0)
    if how == "documents":
        given["document_ids"] = (torch.arange(100)[None] // 40).expand(2, -1)

    def run() -> tuple[Tensor, list[Tensor]]:
        hidden = model(**given).last_hidden_state[keep.bool() if "attention_mask" in given else torch.ones(2, 100) > 0]
        parameters = [p for p in model.parameters() if p.requires_grad]
        return hidden, [
            x for x in torch.autograd.grad(hidden.square().sum(), parameters, allow_unused=True) if x is not None
        ]

    calls = counted_calls(monkeypatch, "attend_beside")
    wanted, slopes = run()
    assert not calls
    monkeypatch.setattr(routes, "suits", lambda x: True)
    found, mine = run()
    assert bool(calls) == (how != "none")
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mine, slopes, atol=2e-4, rtol=2e-3)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("groups", "pad", "packed"), [(2, "none", False), (1, "left", False), (2, "holes", True)])
def test_keys_besides_a_window(groups: int, pad: str, packed: bool) -> None:
    """Three marked keys in one row and one in the other, against a stored mask."""
    length = 100
    ctx = texts(length, pad, packed)
    marked = torch.zeros(2, length, dtype=torch.bool)
    marked[0, [2, 50, 97]] = marked[1, 60] = True
    if ctx.keep is not None:
        marked &= ctx.keep
    count = int(marked.sum(1).max())
    slots = torch.arange(length)
    places = torch.where(marked, slots, length).sort(1).values[:, :count]
    seen = (places < length)[:, None, None, :]
    if ctx.documents is not None:
        theirs = ctx.documents.expand(2, -1).gather(1, places.clamp(max=length - 1))
        seen = seen & (ctx.documents[:, None, :, None] == theirs[:, None, None, :])
    near = blockmasks.around(9, 1, marked, ctx.keep, ctx, 16, (places, seen)).near(16, torch.float32)
    assert near is not None and near.beside is not None
    given, dy = heads(groups, length, 16)
    pairs = ((slots[:, None] - slots[None, :]).abs() <= 9) | marked[:, None, :]
    if ctx.keep is not None:
        pairs = pairs & ctx.keep[:, None, :]
    if ctx.documents is not None:
        pairs = pairs & (ctx.documents[:, :, None] == ctx.documents[:, None, :])
    some = pairs.any(-1)[:, None, :, None]
    wanted = plain(*given, Visible(mask=pairs[:, None] | ~some), 0.3, 0.0, SOFTMAX) * some
    # What marked queries find elsewhere stands in their places.
    elsewhere = torch.randn(2, dy.shape[1], count, 16, generator=torch.Generator().manual_seed(9)).requires_grad_()
    index = places[:, None, :, None].expand_as(elsewhere)
    wanted = torch.nn.functional.pad(wanted, (0, 0, 0, 1)).scatter(2, index, elsewhere)[:, :, :-1]
    found = near.attend_beside(*given, 0.3, elsewhere)
    torch.testing.assert_close(found, wanted, atol=5e-6, rtol=2e-5)
    slopes = torch.autograd.grad(wanted, (*given, elsewhere), dy)
    for mine, others in zip(torch.autograd.grad(found, (*given, elsewhere), dy), slopes, strict=True):
        torch.testing.assert_close(mine, others, atol=1e-5, rtol=1e-4)


def test_many_keys_besides_a_window_are_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "runs_on", lambda device: True)
    monkeypatch.setattr(windows, "BESIDE", 2)
    ctx, marked = texts(64, "none", False), torch.zeros(2, 64, dtype=torch.bool)
    for count, fits in ((2, True), (3, False)):
        beside = torch.zeros(2, count, dtype=torch.long), torch.ones(2, 1, 1, count, dtype=torch.bool)
        blocks = blockmasks.around(9, 1, marked, None, ctx, 16, beside)
        assert (blocks.near(16, torch.bfloat16) is not None) is fits
        assert (blocks.mask is None) is fits
    other = blockmasks.around(9, 1, None, ctx.keep, texts(64, "left", False), 24)
    assert other.mask is not None and other.near(24, torch.bfloat16) is None
    alone = blockmasks.around(9, 1, None, texts(64, "left", False).keep, texts(64, "left", False), 16)
    with pytest.raises(AssertionError, match="a window alone"):
        blockmasks.attend(*heads(2, 64, 8)[0], alone, 0.3)


def test_what_is_no_window_is_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "runs_on", lambda device: True)
    device = torch.device("cpu")
    dilated = Window.Config(left=8, dilation=2)
    for rule in (masks.CAUSAL, masks.FULL, dilated):
        assert windows.of_rule(rule, device, None, None) is None
    near = windows.of_rule(window(8), device, None, None)
    assert near is not None and near.takes(32, torch.bfloat16)
    assert not near.takes(24, torch.bfloat16) and not near.takes(32, torch.float32)
    mask = blockmasks.of_rule(window(8), texts(64, "none", False), 1).mask
    biased = blockmasks.Blocks(mask, scores=lambda score, *_: score, window=near)
    assert biased.near(32, torch.bfloat16) is None
    assert blockmasks.attend(*heads(2, 64, 8)[0], blockmasks.Blocks(mask, window=near), 0.3) is not None
