"""Norms beside the residual stream: kernels in Triton's interpreter, and models whose wirings use them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from xtcli.config.preset import load_preset
from xtcli.fast import norms
from xtcli.model import Model, build
from xtcli.parts.norms import LayerNorm, RMSNorm
from xtcli.train.fused import fuse_norms
from xtcli.train.transforms import compile_blocks

pytest.importorskip("triton")

KINDS = {
    "layer": LayerNorm.Config(),
    "layer without bias": LayerNorm.Config(bias=False),
    "rms": RMSNorm.Config(),
    "rms from one": RMSNorm.Config(offset=1.0),
}


def made(kind: str, width: int, dtype: torch.dtype = torch.float32) -> Any:
    """A norm with drawn parameters."""
    config: Any = KINDS[kind]
    scope: Any = SimpleNamespace(dim=width)
    norm: Any = (LayerNorm if kind.startswith("layer") else RMSNorm)(config, scope)
    generator = torch.Generator().manual_seed(width)
    with torch.no_grad():
        for weight in norm.parameters():
            weight += 0.3 * torch.randn(weight.shape, generator=generator)
    return norm.to(dtype)


def drawn(count: int, *shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(shape[0])
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    # The interpreter cuts bits off where a GPU rounds.
    level = {torch.float32: 2e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}[dtype]
    torch.testing.assert_close(found.float(), wanted.float(), rtol=level, atol=4 * level)


CUTS = [(1, None, 4, 2, 1), (4, 32, 1, 1, 1), (2, 16, 2, 0, 2)]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width"), [(5, 48), (4, 33), (1, 8), (0, 8)])
@pytest.mark.parametrize("kind", KINDS)
def test_kernels(kind: str, rows: int, width: int, dtype: torch.dtype, cut: tuple[Any, ...]) -> None:
    from xtcli.fast import normkernels

    at_once, piece, warps, programs, stages = cut
    forth = normkernels.Cut(at_once, piece or normkernels.forward_cut(width).piece, warps, programs, 1)
    back = forth._replace(programs=max(programs, 1), stages=stages)
    norm = norms.norm_of(made(kind, width))
    gain, bias, eps, offset, centred = (x.detach() if isinstance(x, Tensor) else x for x in norm)
    x, y, dn, dm, ds = drawn(5, rows, width, dtype=dtype)
    s, n, stats = normkernels.forward(x, y, gain, bias, eps, offset, centred, forth)
    assert s is not None and s.dtype == n.dtype == dtype and stats.dtype == torch.float32
    close(s, x + y, dtype)
    wanted, wanted_stats = norms.norm(s, gain, bias, eps, offset, centred)
    close(n, wanted, dtype)
    torch.testing.assert_close(stats, wanted_stats, rtol=1e-5, atol=1e-6)
    none, alone, _ = normkernels.forward(s, None, gain, bias, eps, offset, centred, forth)
    assert none is None
    torch.testing.assert_close(alone, n, rtol=0, atol=0)
    for more in ((None, ds), (dm, None), (None, None)):
        slope, sums = normkernels.backward(dn, *more, s, gain, stats, offset, bias is not None, cut=back)
        theirs, their_sums = norms.norm_back(dn, *more, s, gain, stats, offset, bias is not None)
        close(slope, theirs, dtype)
        torch.testing.assert_close(sums, their_sums, rtol=1e-5, atol=1e-5)
    # What is written may be cut off differently: its sums are those of what the kernel wrote.
    for more, summed in (((None, ds), "ds"), ((None, None), "dx")):
        slope, sums = normkernels.backward(dn, *more, s, gain, stats, offset, bias is not None, summed, back)
        theirs, their_sums = norms.norm_back(dn, *more, s, gain, stats, offset, bias is not None)
        close(slope, theirs, dtype)
        last = (ds if summed == "ds" else slope).float().sum(0)
        torch.testing.assert_close(sums, torch.cat((their_sums, last[None])), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_cuts_chosen_for_widths(kind: str) -> None:
    from xtcli.fast import normkernels

    for width in (64, 768, 1536, 5120):
        norm = norms.norm_of(made(kind, width))
        gain, bias, *numbers = (x.detach() if isinstance(x, Tensor) else x for x in norm)
        x, dn, ds = drawn(3, 5, width)
        _, n, stats = normkernels.forward(x, None, gain, bias, *numbers)
        wanted, _ = norms.norm(x, gain, bias, *numbers)
        close(n, wanted, x.dtype)
        found = normkernels.backward(dn, None, ds, x, gain, stats, norm.offset, bias is not None)
        for mine, theirs in zip(
            found, norms.norm_back(dn, None, ds, x, gain, stats, norm.offset, bias is not None), strict=True
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_many_lines_of_sums() -> None:
    from xtcli.fast import normkernels

    (lines,) = drawn(1, 150, 2, 40)
    torch.testing.assert_close(normkernels.total(lines), lines.sum(0), rtol=1e-5, atol=1e-5)


def plain_steps(norm: Any, x: Tensor, y: Tensor, turn: Tensor) -> Tensor:
    """A stream that is normed, added to, normed behind sums."""
    x = x + (norm(x) @ turn).sin()
    s = x + y
    x = s + (norm(s) @ turn).sin()
    n = norm(x + y)
    return norm(n + (n @ turn).sin())  # type: ignore[no-any-return]


def own_steps(norm: Any, x: Tensor, y: Tensor, turn: Tensor) -> Tensor:
    given = norms.norm_of(norm)
    x, n = norms.passed(x, given)
    x = x + (n @ turn).sin()
    s, n = norms.added(x, y, given)
    x = s + (n @ turn).sin()
    n, m = norms.behind(x, y, given)
    return norms.normed(n, (m @ turn).sin(), given)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind: str, backend: str | None) -> None:
    norm = made(kind, 24, torch.float64)
    x, y, aim = (one.double().requires_grad_() for one in drawn(3, 2, 5, 24))
    (turn,) = drawn(1, 24, 24, dtype=torch.float64)
    learnt = [x, y, *norm.parameters()]
    wanted = plain_steps(norm, x, y, turn)
    steps: Any = own_steps if backend is None else torch.compile(own_steps, backend=backend, fullgraph=True)
    found = steps(norm, x, y, turn)
    torch.testing.assert_close(found, wanted)
    slopes = torch.autograd.grad((wanted * aim).sum(), learnt)
    for mine, theirs in zip(torch.autograd.grad((found * aim).sum(), learnt), slopes, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_in_16_bits_beside_parameters_in_32(kind: str) -> None:
    norm = made(kind, 24)
    x, y = (one.requires_grad_() for one in drawn(2, 2, 5, 24, dtype=torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        s, n = norms.added(x, y, norms.norm_of(norm))
        wanted = norm(x + y)
    assert s.dtype == n.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(n, wanted, rtol=2**-7, atol=2**-9)
    slopes = torch.autograd.grad((s + n).float().square().sum(), [x, y, *norm.parameters()])
    assert [slope.dtype for slope in slopes[:2]] == [torch.bfloat16] * 2
    assert all(slope.dtype == torch.float32 for slope in slopes[2:])


def shaken(name: str, *overrides: str) -> Model:
    """A small model in which nothing is 0 or 1."""
    model = build(load_preset(name, list(overrides), tiny=True), seed=1).double()
    with torch.no_grad():
        for number, weight in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(number)
            weight += 0.1 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return model


def answers(model: Model) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Hidden states and the gradients of all parameters, with the same random numbers each time."""
    inputs: dict[str, Any] = model.blank(2, 16)
    generator = torch.Generator().manual_seed(5)
    for key, value in inputs.items():
        if key.endswith("input_ids"):
            inputs[key] = torch.randint(model.vocab, value.shape, generator=generator)
    torch.manual_seed(7)
    states = model.hidden(**inputs).states
    aim = torch.randn(states.shape, generator=generator, dtype=states.dtype)
    learnt = [weight for weight in model.parameters() if weight.requires_grad]
    return states, torch.autograd.grad((states * aim).sum(), learnt, allow_unused=True)


NAMES = {"gpt2-nano": 2, "llama-7b": 2, "bert-base": 2, "t5-small": 4}
CHANGES = {
    "plain": ["model.dropout=0"],
    "dropout": ["model.dropout=0.2"],
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", NAMES)
def test_models(name: str, change: str, compiled: bool) -> None:
    model = shaken(name, *CHANGES[change]).train()
    states, slopes = answers(model)
    assert fuse_norms(model) == NAMES[name]
    assert fuse_norms(model) == 0
    if compiled:
        torch._dynamo.reset()
        compile_blocks(model, backend="aot_eager")
    found, mine = answers(model)
    torch.testing.assert_close(found, states, rtol=1e-9, atol=1e-9)
    for one, other in zip(mine, slopes, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
    if compiled and change == "dropout":
        return  # what is compiled for another length and for evaluation has no dropout
    with torch.no_grad():
        model.eval()
        inputs = model.blank(1, 8)
        assert torch.isfinite(model.hidden(**inputs).states).all()


@pytest.mark.parametrize("name", ["transfo-xl-wt103", "falcon-40b", "x-rezero", "xlnet-base-cased"])
def test_other_wirings_stay(name: str) -> None:
    model = build(load_preset(name, tiny=True), seed=1)
    kinds = [type(module) for module in model.modules()]
    assert fuse_norms(model) == 0
    assert [type(module) for module in model.modules()] == kinds


def test_equal_blocks_share_what_is_compiled() -> None:
    from torch._dynamo.utils import counters

    found = []
    for layers in (2, 4):
        torch._dynamo.reset()
        counters.clear()
        model = shaken("gpt2-nano", "model.dropout=0", f"model.stack.layers={layers}").train()
        assert fuse_norms(model) == layers
        compile_blocks(model, backend="aot_eager")
        answers(model)
        found.append(int(counters["stats"]["unique_graphs"]))
        assert not counters["graph_break"]
    assert found[0] == found[1]
    torch._dynamo.reset()


def test_parameters_keep_their_names() -> None:
    model: nn.Module = build(load_preset("gpt2-nano", tiny=True), seed=1)
    names = [name for name, _ in model.named_parameters()]
    fuse_norms(model)
    assert [name for name, _ in model.named_parameters()] == names
