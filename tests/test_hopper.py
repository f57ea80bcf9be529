"""Kernels in CUDA C++: how they are built and chosen; on a GPU that they are for, against those of window.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from xtcli.fast.hopper import build, slopes

HERE = torch.cuda.is_available() and build.runs_on(torch.cuda.current_device())
on_hopper = pytest.mark.skipif(not HERE, reason="needs a GPU of compute capability 9.0")


class Compiler:
    """NVRTC that knows its version alone."""

    def __init__(self, minor: int) -> None:
        self.minor = minor

    def nvrtcVersion(self, major: Any, minor: Any) -> int:
        major._obj.value, minor._obj.value = 13, self.minor
        return 0


def test_what_was_compiled_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def compile_one(library: Any, source: str, flags: Any) -> bytes:
        made.append(source)
        return f"{source} by {library.minor}".encode()

    monkeypatch.setenv("XT_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "_compile", compile_one)
    for minor, sources in ((0, "aba"), (1, "a")):
        monkeypatch.setattr(build, "compiler", lambda minor=minor: Compiler(minor))
        assert [build.compiled(source) for source in sources] == [f"{x} by {minor}".encode() for x in sources]
    assert made == ["a", "b", "a"]
    assert len(list(tmp_path.glob("kernels/*.cubin"))) == 3 and not list(tmp_path.glob("kernels/*.part"))


def test_a_cache_that_cannot_be_written_costs_time_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XT_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(build, "compiler", lambda: Compiler(0))
    monkeypatch.setattr(build, "_compile", lambda *_: b"code")
    assert build.compiled("source") == b"code"


def test_without_the_compiler_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "compiler", lambda: None)
    with pytest.raises(build.Failed, match=r"libnvrtc\.so\.13"):
        build.compiled("source")


def test_all_files_are_there_and_fit_in_shared_memory() -> None:
    text = slopes.source(1, True, "float")
    assert text.startswith("#define TURN 1\n#define SUMS 1\n#define ANGLE float\n")
    assert text.count('extern "C" __global__') == 1
    assert slopes.memory(slopes.MOST) <= 232448


@pytest.mark.parametrize(
    ("shape", "groups", "left", "right", "fits"),
    [
        ((2, 12, 1024, 64), 12, 1024, 0, True),
        ((2, 12, 512, 64), 12, 511, 511, True),
        ((2, 12, 512, 64), 12, 510, 0, False),
        ((2, 12, 512, 64), 12, 512, 100, False),
        ((2, 12, 448, 64), 12, 448, 0, False),
        ((2, 12, 1000, 64), 12, 1000, 0, False),
        ((2, 12, 1088, 64), 12, 1088, 0, False),
        ((2, 12, 1024, 128), 12, 1024, 0, False),
        ((2, 12, 1024, 64), 4, 1024, 0, False),
    ],
)
def test_what_it_is_for(shape: tuple[int, ...], groups: int, left: int, right: int, fits: bool) -> None:
    q = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    k = torch.empty(shape[0], groups, *shape[2:], dtype=torch.bfloat16, device="meta")
    assert slopes.fits(q, k, left, right, None) is fits
    assert not slopes.fits(q.half(), k.half(), left, right, None)
    assert not slopes.takes(q, k, left, right, None)


def given(batch: int, heads: int, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A joint buffer, its queries, keys and values, and the slope of what comes out."""
    from xtcli.fast.heads import apart

    generator = torch.Generator("cuda").manual_seed(length + heads)
    joint = torch.randn(batch * length, 3 * heads * 64, generator=generator, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn(batch, length, heads, 64, generator=generator, device="cuda", dtype=torch.bfloat16)
    return joint, *apart(joint, length, heads, heads), dy.transpose(1, 2)


@on_hopper
@pytest.mark.parametrize("turn", [None, False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("batch", "heads", "length", "right"),
    [(33, 12, 1024, 0), (3, 5, 512, 0), (12, 12, 512, 512), (1, 1, 576, 0), (40, 10, 640, 640), (5, 30, 960, 0)],
)
def test_slopes_are_those_of_the_two_kernels(
    batch: int, heads: int, length: int, right: int, turn: bool | None, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xtcli.fast import window
    from xtcli.fast.heads import apart

    joint, q, k, v, dy = given(batch, heads, length)
    angles = None
    if turn is not None:
        angle = torch.rand(1 + (batch - 1) * turn, 1, length, 32, device="cuda")
        angles = (angle.cos(), angle.sin(), turn)
    y, ends = window.forward(q, k, v, None, None, length, right, 0.125)

    def run(takes: bool) -> tuple[Tensor, Tensor | None]:
        monkeypatch.setattr(slopes, "takes", lambda *_: takes)
        made = torch.full_like(joint, float("nan"))
        into = apart(made, length, heads, heads)
        sums = window.slopes_into(*into, dy, q, k, v, None, None, y, ends, length, right, 0.125, angles, biased)
        return made, sums

    (wanted, wanted_sums), (found, sums), (again, _) = run(False), run(True), run(True)
    assert torch.equal(found, again)
    torch.testing.assert_close(found, wanted, atol=2e-2, rtol=2**-7)
    assert (found.float() - wanted.float()).norm() < 1e-4 * wanted.float().norm()
    assert (sums is None) == (wanted_sums is None) == (not biased)
    if sums is not None and wanted_sums is not None:
        torch.testing.assert_close(sums.sum(0), wanted_sums.sum(0), atol=1e-2, rtol=1e-4)


@on_hopper
def test_slopes_are_those_of_plain_attention() -> None:
    _, q, k, v, dy = given(22, 12, 768)
    leaves = [x.detach().float().requires_grad_() for x in (q, k, v)]
    plain = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True)
    wanted = torch.autograd.grad(plain, leaves, dy.float())
    own = [x.detach().requires_grad_() for x in (q, k, v)]
    assert slopes.takes(q, k, 768, 0, None)
    y = torch.ops.xt.attend_window(*own, None, None, 768, 0, 0.125)[0]
    for mine, theirs in zip(torch.autograd.grad(y, own, dy), wanted, strict=True):
        assert (mine.float() - theirs).norm() < 5e-3 * theirs.norm()
