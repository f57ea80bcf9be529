"""Attention with a bias of the distance, in Triton's interpreter: values and all gradients against the plain twin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_graphs import block, ids, make, seq2seq
from torch import Tensor

from xtcli.parts import routes, slides
from xtcli.parts.attention import Attention

pytest.importorskip("triton")

BATCH, HEADS = 2, 2
PADDING = {"none": None, "right": (99, 21), "left": (-13, 0)}
"""Tokens of each row, those on the right where there is a minus."""


def coded(padding: tuple[int, int] | None, length: int, causal: bool) -> Tensor | None:
    if padding is None:
        return None
    place = torch.arange(length)
    return slides.coded(torch.stack([place < n if n >= 0 else place >= length + n for n in padding]), causal)


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize(("length", "width", "causal"), [(35, 16, False), (35, 16, True), (32, 32, False)])
def test_values_and_gradients(
    length: int, width: int, causal: bool, padding: str, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xtcli.fast import distance

    for name, size in {"FORWARD": (32, 16, 4, 1), "QUERIES": (16, 32, 4, 1), "KEYS": (32, 16, 4, 1)}.items():
        monkeypatch.setattr(distance, name, size)
    monkeypatch.setattr(distance, "BIAS", (32, 32, 4, 1))
    generator = torch.Generator().manual_seed(length)
    drawn = [torch.randn(BATCH, length, HEADS, width, generator=generator) for _ in range(4)]
    q, k, v, dy = (x.transpose(1, 2) for x in drawn)
    row = torch.randn(HEADS, 2 * length - 1, generator=generator)
    code, seed, scale = coded(PADDING[padding], length, causal), torch.tensor([(17 << 40) + 5]), 0.4
    given = (code, seed, causal, scale, rate)
    leaves = [x.detach().requires_grad_() for x in (q, k, v, row)]
    wanted = distance.attend_plainly(*leaves, *given)
    slopes = torch.autograd.grad(wanted, leaves, dy)
    found, ends = distance.forward(q, k, v, row * distance.LOG2E, *given)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    made = distance.backward(dy, q, k, v, row * distance.LOG2E, code, seed, found, ends, causal, scale, rate)
    for one, other in zip(made, slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_as_many_weights_are_dropped_as_are_asked_for_and_others_by_each_seed() -> None:
    from xtcli.fast.distance import kept

    masks = [kept(torch.tensor([seed]), (2, 3, 64), 0.1) for seed in (1, 2, 1 << 40)]
    for mask in masks:
        share = 1.0 - mask.double().mean()
        assert abs(share - 0.1) < 4 * (0.09 / mask.numel()) ** 0.5
        assert abs(1.0 - mask[0, 0].double().mean() - 0.1) < 4 * (0.09 / 64**2) ** 0.5
    for one, other in ((0, 1), (0, 2), (1, 2)):
        both = (~masks[one] & ~masks[other]).double().mean()
        assert abs(both - 0.01) < 4 * (0.01 / masks[0].numel()) ** 0.5


@pytest.fixture
def here() -> Any:
    """The operators on the CPU, in Triton's interpreter."""
    from xtcli.fast import distance

    library = torch.library.Library("xtcli", "IMPL")
    library.impl("distance", distance.forward, "CPU")
    library.impl("distance_slopes", distance.backward, "CPU")
    yield
    library._destroy()


def test_operators_say_what_they_give(here: Any) -> None:
    q, k, v = (torch.randn(2, 20, 4, 16).transpose(1, 2).requires_grad_() for _ in range(3))
    row, code = torch.randn(39, 4).t().requires_grad_(), coded((20, 7), 20, True)
    given = (q, k, v, row, code, torch.tensor([5]), True, 0.3, 0.1)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    assert set(torch.library.opcheck(torch.ops.xtcli.distance.default, given, test_utils=tests).values()) == {"SUCCESS"}


@pytest.mark.parametrize("padded", [False, True])
def test_a_model_of_two_stacks_learns_the_same(padded: bool, monkeypatch: pytest.MonkeyPatch, here: Any) -> None:
    """Loss and the gradient of every parameter; without a bias of all pairs."""
    model = make("encoder-decoder", seq2seq(dim=64))
    mask = torch.ones(2, 11, dtype=torch.long)
    if padded:
        mask[1, 6:] = 0
    inputs = {"input_ids": ids(), "decoder_input_ids": ids(seed=1), "attention_mask": mask}
    inputs |= {"decoder_attention_mask": mask}
    found: list[list[Tensor]] = []
    calls: list[slides.Sliding] = []

    def attend(*given: Any) -> Tensor:
        calls.append(given[3])
        return real(*given)

    real = slides.attend
    monkeypatch.setattr(slides, "attend", attend)
    for way in (False, True):
        monkeypatch.setattr(routes, "by_distance", lambda *given, way=way: way)
        term = model.losses(inputs, {"lm": ids(seed=2).masked_fill(mask == 0, -100)})["lm"]
        found.append([term.sum, *torch.autograd.grad(term.sum, list(model.parameters()))])
    assert [one.causal for one in calls] == [False] * 2 + [True] * 3
    assert all((one.code is not None) is padded for one in calls)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "slides_there"),
    [
        ({}, True),
        ({"kv_heads": 2}, False),
        ({"head_dim": 24}, False),
        ({"qk_norm": "rms"}, False),
        ({"memory": 3}, False),
        ({"score": "entmax"}, False),
        ({"position": "alibi"}, False),
        ({"position": {"kind": "all", "of": ["rotary", "t5"]}}, False),
    ],
    ids=str,
)
def test_heads_that_the_kernels_do_not_take_keep_their_way(changes: dict[str, Any], slides_there: bool) -> None:
    config = seq2seq(dim=64, encoder={"stack": {"layers": 1, "position": "t5", "block": block(scale=1.0, **changes)}})
    stack: Any = make("encoder-decoder", config).encoder.stack
    (attention,) = (module for module in stack.modules() if isinstance(module, Attention))
    assert stack.shared.views[attention.view].sliding is slides_there
