"""Kernels in CUDA C++: how they are built and chosen; on a GPU that they are for, against those of window.py."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from xtcli.fast.hopper import build, slopes

pytest.importorskip("triton")

from xtcli.fast import window
from xtcli.fast.heads import apart

HERE = torch.cuda.is_available() and build.suits(torch.cuda.current_device())
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

    def compile_one(library: Any, source: str) -> bytes:
        made.append(source)
        return f"{source} by {library.minor}".encode()

    monkeypatch.setenv("XT_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "_compile", compile_one)
    for minor, sources in ((0, "aba"), (1, "a")):
        monkeypatch.setattr(build, "compiler", lambda minor=minor: Compiler(minor))
        assert [build.compiled(source) for source in sources] == [f"{x} by {minor}".encode() for x in sources]
    assert made == ["a", "b", "a"]
    files = list((tmp_path / "kernels").iterdir())
    assert len(files) == 3 and {file.suffix for file in files} == {".cubin"}


def test_a_cache_that_cannot_be_written_costs_time_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XT_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(build, "compiler", lambda: Compiler(0))
    monkeypatch.setattr(build, "_compile", lambda *_: b"code")
    assert build.compiled("source") == b"code"


def test_without_the_compiler_that_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "compiler", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    build.missed.cache_clear()
    for length in (512, 576):
        assert slopes.kernel.__wrapped__(0, length, 0, False, "float") is None
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and "libnvrtc.so.13" in said[0] and "slower ones are used" in said[0]


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
    assert not slopes.takes(q, k, left, right, None, False)


@pytest.mark.parametrize("near", [None, False, True])
def test_what_the_kernel_is_handed(near: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strides in elements for the kernel, in bytes for the units that copy tiles; one angle for all rows is no step."""
    handed: list[Any] = []
    described: list[list[int]] = []

    class Kernel:
        def __init__(self, code: bytes, name: str, threads: int, memory: int) -> None:
            handed.append((code.decode().splitlines()[:3], name, threads, memory))

        def __call__(self, blocks: int, stream: int, *arguments: Any) -> None:
            handed.append((blocks, stream, arguments))

    def call(name: str, made: Any, kind: int, rank: int, address: Any, sizes: Any, steps: Any, *rest: Any) -> None:
        described.append([address.value, *sizes, *steps, *rest[0], *rest[1]])

    monkeypatch.setattr(slopes, "_map", slopes._map.__wrapped__)
    monkeypatch.setattr(slopes, "Kernel", Kernel)
    monkeypatch.setattr(slopes, "call", call)
    monkeypatch.setattr(slopes, "compiled", str.encode)
    monkeypatch.setattr(slopes, "processors", lambda device: 4)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=77))
    monkeypatch.setattr(slopes, "kernel", slopes.kernel.__wrapped__)
    joint = torch.zeros(2 * 512, 3 * 3 * 64, dtype=torch.bfloat16)
    q, k, v = apart(joint, 512, 3, 3)
    y = torch.zeros(2, 512, 3, 64, dtype=torch.bfloat16).transpose(1, 2)
    ends, angles = torch.zeros(2, 3, 512), torch.zeros(1 if near else 2, 1, 512, 32)
    turn = None if near is None else (angles, angles, near)
    sums = slopes.slopes_into(q, k, v, y, q, k, v, y, ends, 600, 0, 0.125, turn, True)
    assert sums is not None and sums.shape == (2 * 8, 3 * 3 * 64)
    (defined, name, threads, _), (blocks, stream, arguments) = handed
    turned = {None: 0, False: 1, True: 2}[near]
    assert defined == [f"#define TURN {turned}", "#define SUMS 1", "#define ANGLE float"]
    assert (name, threads, blocks, stream) == ("slopes", 512, 4, 77)
    assert len(arguments) == 8 and [words[0] for words in described[:3]] == [x.data_ptr() for x in (q, k, v)]
    assert described[0][1:] == [64, 512, 3, 2, 9 * 64 * 2, 64 * 2, 512 * 9 * 64 * 2, 64, 64, 1, 1, 1, 1, 1, 1]
    assert described[3][1:8] == [64, 512, 3, 2, 3 * 64 * 2, 64 * 2, 512 * 3 * 64 * 2]
    work = arguments[-1]
    assert (work.o_row, work.o_head, work.o_token) == (512 * 3 * 64, 64, 3 * 64)
    assert (work.heads, work.length, work.left, work.right, work.items) == (3, 512, 600, 0, 6)
    assert near is None or work.by_angle == (0 if near else 512 * 32)
    assert work.ends == ends.data_ptr()
    assert work.scale == pytest.approx(0.125 * 1.4426950408889634) and work.slope == 0.125


def given(batch: int, heads: int, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A joint buffer, its queries, keys and values, and the slope of what comes out."""
    generator = torch.Generator("cuda").manual_seed(length + heads)
    joint = torch.randn(batch * length, 3 * heads * 64, generator=generator, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn(batch, length, heads, 64, generator=generator, device="cuda", dtype=torch.bfloat16)
    return joint, *apart(joint, length, heads, heads), dy.transpose(1, 2)


@on_hopper
@pytest.mark.parametrize("turn", [None, False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("batch", "heads", "length", "right"),
    [
        (33, 12, 1024, 0),
        (3, 5, 512, 0),
        (12, 12, 512, 512),
        (1, 1, 576, 0),
        (40, 10, 640, 640),
        # Passes of one tile between others.
        (5, 30, 960, 0),
        (47, 9, 704, 0),
    ],
)
def test_slopes_are_those_of_the_two_kernels(
    batch: int, heads: int, length: int, right: int, turn: bool | None, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    assert slopes.takes(q, k, 768, 0, None, False)
    y = torch.ops.xt.attend_window(*own, None, None, 768, 0, 0.125)[0]
    for mine, theirs in zip(torch.autograd.grad(y, own, dy), wanted, strict=True):
        assert (mine.float() - theirs).norm() < 5e-3 * theirs.norm()
