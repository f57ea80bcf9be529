"""The C kernels for CPUs against PyTorch's operators, and how the library comes to be there or not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_fast_oncpu import CHANGED, PLANNED, PROMPT, made
from torch import Tensor
from torch.nn import functional as F

from xtcli.fast.cpu import attention, build, crossentropy, decode, feedforward, parted, pointwise
from xtcli.fast.oncpu import Lean
from xtcli.fast.plan import plan
from xtcli.generate.engine import undisturbed
from xtcli.parts import kernels
from xtcli.parts.activations import ACTIVATIONS
from xtcli.parts.context import Visible
from xtcli.parts.losses import slab_terms, usual_terms
from xtcli.parts.outputs import IGNORE

needs_library = pytest.mark.skipif(build.library() is None, reason="no C compiler, or no OpenMP runtime")

Case = tuple[int, int, int, int, int, int, str]
CASES: list[Case] = [
    # batch, heads, groups, queries, keys, width, mask
    (2, 4, 4, 37, 37, 32, "causal"),
    (1, 4, 2, 100, 100, 48, "causal"),
    (2, 2, 1, 193, 193, 16, "causal"),
    (1, 2, 2, 64, 64, 128, "causal"),
    (1, 1, 1, 16, 16, 256, "causal"),
    (2, 2, 2, 75, 75, 64, "none"),
    (1, 3, 3, 50, 33, 80, "none"),
    (2, 4, 2, 60, 60, 32, "keys"),
    (2, 4, 2, 60, 45, 32, "pairs"),
    (2, 4, 4, 49, 70, 64, "added"),
    (2, 3, 3, 20, 20, 32, "heads"),
]


@pytest.fixture
def all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (attention, crossentropy, pointwise, decode):
        monkeypatch.setattr(module, "LEAST", 0)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def drawn(case: Case, seed: int = 0) -> tuple[list[Tensor], Visible, Tensor]:
    """q, k, v as they come from a joined product, a mask, and a slope of the output."""
    batch, heads, groups, queries, keys, width, mask = case
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q = normal(batch, queries, heads, width).transpose(1, 2)
    k, v = normal(batch, keys, 2, groups, width).permute(2, 0, 3, 1, 4)
    visible = Visible(causal=mask == "causal")
    if mask == "keys":
        seen = torch.rand(batch, 1, 1, keys, generator=generator) < 0.7
        visible = Visible(seen | (torch.arange(keys) == 0))
    elif mask == "pairs":
        seen = torch.rand(1, 1, queries, keys, generator=generator) < 0.5
        visible = Visible(seen | (torch.arange(keys) == 3))
    elif mask == "added":
        visible = Visible(normal(1, heads, queries, keys).masked_fill(torch.arange(keys) > 60, float("-inf")))
    elif mask == "heads":
        visible = Visible(normal(batch, heads, 1, keys))
    given = [one.detach().requires_grad_() for one in (q, k, v)]
    return given, visible, normal(batch, queries, heads, width).transpose(1, 2)


def plainly(q: Tensor, k: Tensor, v: Tensor, visible: Visible, scale: float) -> Tensor:
    grouped = k.shape[1] != q.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, visible.mask, is_causal=visible.causal, scale=scale, enable_gqa=grouped
    )


@needs_library
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_and_its_slopes(case: Case, all_sizes: None, two_threads: None) -> None:
    given, visible, slope = drawn(case)
    assert attention.takes(*given, visible, 0.0)
    found = attention.attend(*given, visible, 0.3)
    expected = plainly(*given, visible, 0.3)
    torch.testing.assert_close(found, expected, atol=4e-6, rtol=1e-5)
    ours, theirs = (torch.autograd.grad(y, given, slope) for y in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@needs_library
def test_attention_is_routed_to_the_kernels(all_sizes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    given, visible, _ = drawn(CASES[0])
    called: list[Any] = []
    usual = attention.attend
    monkeypatch.setattr(attention, "attend", lambda *rest: called.append(rest) or usual(*rest))
    torch.testing.assert_close(kernels.fused(*given, visible, 0.3, 0.0), plainly(*given, visible, 0.3))
    assert called
    kernels.fused(*given, visible, 0.3, 0.5)
    assert len(called) == 1


@needs_library
def test_a_query_that_sees_nothing_gets_nothing(all_sizes: None) -> None:
    given, _, slope = drawn(CASES[-1])
    visible = Visible(torch.arange(20)[None, None, :, None] != 7)
    found = attention.attend(*given, visible, 0.3)
    assert not found[:, :, 7].any() and found[:, :, 8].any()
    for one in torch.autograd.grad(found, given, slope):
        assert one.isfinite().all()


@needs_library
def test_what_is_no_number_stays_none(all_sizes: None) -> None:
    given, visible, _ = drawn(CASES[0])
    with torch.no_grad():
        given[0][0, 0, 9, 3] = float("nan")
        assert attention.attend(*given, visible, 0.3)[0, 0, 9].isnan().all()
        given[0][0, 0, 9, 3] = float("inf")
        assert attention.attend(*given, visible, 0.3)[0, 0, 9].isnan().all()


@needs_library
def test_large_scores_overflow_nothing(all_sizes: None) -> None:
    given, visible, slope = drawn(CASES[0])
    big = [(one.detach() * 30).requires_grad_() for one in given]
    found, expected = attention.attend(*big, visible, 1.0), plainly(*big, visible, 1.0)
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-3)
    assert all(one.isfinite().all() for one in torch.autograd.grad(found, big, slope))


@needs_library
def test_threads_change_no_bit(all_sizes: None, two_threads: None) -> None:
    given, visible, slope = drawn((3, 4, 2, 130, 130, 32, "causal"))
    found = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        y = attention.attend(*given, visible, 0.3)
        found.append((y, *torch.autograd.grad(y, given, slope)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@needs_library
def test_other_attentions_are_left_to_pytorch(all_sizes: None) -> None:
    given, visible, _ = drawn(CASES[0])
    q, k, v = given
    assert attention.takes(q, k, v, visible, 0.0)
    assert not attention.takes(q, k, v, visible, 0.1)
    assert not attention.takes(*(one.double() for one in given), visible, 0.0)  # type: ignore[call-arg]
    assert not attention.takes(q[..., :24], k[..., :24], v[..., :24], visible, 0.0)
    assert not attention.takes(q[:, :, :1], k, v, Visible(), 0.0)
    assert not attention.takes(q, k, v, Visible(torch.zeros(1, 4, 37, 37, requires_grad=True)), 0.0)
    assert not attention.takes(q, k, v.transpose(2, 3).contiguous().transpose(2, 3), visible, 0.0)
    with torch._subclasses.FakeTensorMode():
        fake = [torch.empty(2, 4, 37, 32) for _ in range(3)]
        assert not attention.takes(*fake, visible, 0.0)


@needs_library
@pytest.mark.parametrize("count", [16, 17, 8192 * 2 + 5])
@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh"])
def test_gelu_and_its_slope(kind: str, count: int, all_sizes: None) -> None:
    x = (torch.linspace(-9, 9, count) ** 3 / 81).requires_grad_()
    slope = torch.linspace(-1, 2, count)
    assert pointwise.takes(x)
    found = ACTIVATIONS[kind](x)
    assert found.grad_fn is not None and "Gelu" in found.grad_fn.name() and "Backward0" not in found.grad_fn.name()
    expected = F.gelu(x.double(), approximate="tanh" if kind == "gelu_tanh" else "none")
    torch.testing.assert_close(found, expected.float(), atol=1e-6, rtol=1e-6)
    ours, theirs = (torch.autograd.grad(y, x, slope.to(y.dtype))[0] for y in (found, expected))
    torch.testing.assert_close(ours, theirs, atol=4e-6, rtol=1e-5)


@needs_library
@pytest.mark.parametrize("rows", [(2, 5), (3, 33)])
@pytest.mark.parametrize("act", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("out_bias", [True, False])
def test_a_feed_forward_and_its_slopes(
    act: str, rows: tuple[int, int], out_bias: bool, all_sizes: None, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ffn = f"model.stack.block.sublayers.ffn={{kind: mlp, hidden: 96, act: {act}, out_bias: {str(out_bias).lower()}}}"
    mlp: Any = made("gpt2-small", ffn).stack.blocks[0].ffn  # type: ignore[union-attr, index]
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(*rows, mlp.up.in_features, generator=generator).requires_grad_()
    given, found = [x, *mlp.parameters()], []
    for on in (True, False):
        with monkeypatch.context() as inner:
            if not on:
                inner.setattr(feedforward, "takes", lambda *rest: False)
                inner.setattr(pointwise, "takes", lambda x: False)
            y = mlp.inner(x)
        assert ("Inner" in y.grad_fn.next_functions[0][0].name()) == on
        found.append((y, *torch.autograd.grad(y.square().sum(), given)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@needs_library
def test_a_feed_forward_that_someone_watches_calls_its_layers(all_sizes: None) -> None:
    mlp: Any = made("gpt2-small").stack.blocks[0].ffn  # type: ignore[union-attr, index]
    seen: list[Tensor] = []
    mlp.up.register_forward_hook(lambda module, given, y: seen.append(y))
    mlp.inner(torch.randn(2, 40, mlp.up.in_features))
    assert len(seen) == 1


@needs_library
@pytest.mark.parametrize("groups", [4, 2])
def test_slopes_of_a_joint_product_lie_together(groups: int, all_sizes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(5)
    joint = torch.randn(2, 40, (4 + 2 * groups) * 16, generator=generator).requires_grad_()
    copied: list[Any] = []
    usual = torch.cat
    monkeypatch.setattr(torch, "cat", lambda *rest: copied.append(rest) or usual(*rest))
    found = []
    for split in (parted.parted, lambda y, sizes: y.split(sizes, -1)):
        q, k, v = split(joint, [64, 16 * groups, 16 * groups])
        heads = [one.unflatten(-1, (-1, 16)).transpose(1, 2) for one in (q, k, v)]
        y = attention.attend(*heads, Visible(causal=True), 0.25)
        found.append(torch.autograd.grad(y.square().sum(), joint)[0])
    assert torch.equal(*found) and not copied


def test_parts_that_lie_elsewhere_are_put_together() -> None:
    whole = torch.arange(60.0).view(2, 3, 10)
    a, b, c = whole.split([2, 5, 3], -1)
    for parts in ((a, b, c), (b, c), (a, c, b), (c, a), (a, b.clone(), c), (whole[:1, :, :5], whole[1:, :, 5:])):
        assert torch.equal(parted.together(parts), torch.cat(parts, -1))
    assert parted.together((a, b, c)).data_ptr() == whole.data_ptr()
    rows = whole.view(6, 10)
    assert parted.together((rows[:, :4], rows[:, 4:])).data_ptr() == whole.data_ptr()


@needs_library
@pytest.mark.parametrize("width", [5, 32, 258])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_loss_of_logits_and_its_slope(width: int, smoothing: float, all_sizes: None, two_threads: None) -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(67, width, generator=generator) * torch.logspace(-2, 2, 67)[:, None]
    targets = torch.randint(width, (67,), generator=generator)
    targets[::9] = IGNORE
    assert crossentropy.takes(logits, targets, None, width) and not crossentropy.takes(logits, targets, 30.0, width)
    found = usual_terms(logits, targets, None, smoothing, width)
    expected = slab_terms(logits, targets, None, smoothing, width)
    torch.testing.assert_close(found[0], expected[0], atol=1e-4, rtol=1e-6)
    torch.testing.assert_close(found[1], expected[1], atol=1e-6, rtol=1e-5)


@needs_library
def test_a_target_beyond_the_vocabulary_is_refused(all_sizes: None) -> None:
    with pytest.raises(IndexError, match="1 targets are outside of a vocabulary of 5"):
        usual_terms(torch.zeros(3, 5), torch.tensor([0, 5, 4]), None, 0.0, 5)


@needs_library
@pytest.mark.parametrize(("name", "override"), [*((name, None) for name in PLANNED), *CHANGED], ids=str)
def test_a_step_is_that_of_the_operators(
    name: str, override: str | None, all_sizes: None, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(name, *([] if override is None else [override]))
    ids, found = torch.tensor([[0, 0, 0, *PROMPT]]), []
    slots = torch.arange(8)
    for least in (0, 2**60):
        monkeypatch.setattr(decode, "LEAST", least)
        with undisturbed(model):
            state = model.new_state(1, 16)
            places, mask = (slots - 3).clamp(min=0)[None], (slots >= 3)[None]
            model.hidden(input_ids=ids, state=state, attention_mask=mask, position_ids=places)
            step = Lean(plan(model, 16), 1, 16)
            assert (step.native is None) == (least > 0)
            step.begin(state, torch.tensor([7]), 8, torch.tensor([[3]]))
            logits = []
            for token in (7, 11, 2):
                step.tokens.fill_(token)
                logits.append(step.logits())
                step.slots.add_(1)
        found.append(torch.cat(logits))
    torch.testing.assert_close(*found, atol=2e-5, rtol=1e-4)


@needs_library
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "gelu_fast", "quick_gelu", "relu", "relu2", "identity"])
def test_every_activation_of_a_step(act: str, all_sizes: None) -> None:
    model = made("x-glu", f"model.stack.block.sublayers.ffn.act={act}")
    step = Lean(plan(model, 8), 1, 8)
    step.tokens.fill_(5)
    found = step.logits()
    step.native = None
    torch.testing.assert_close(found, step.logits(), atol=2e-5, rtol=1e-4)


@needs_library
def test_a_step_beyond_its_slots_is_refused(all_sizes: None) -> None:
    step = Lean(plan(made("gpt2-small"), 8), 1, 8)
    for name, value in (("slots", 8), ("tokens", 10**6), ("tokens", -1)):
        before = getattr(step, name).clone()
        getattr(step, name).fill_(value)
        with pytest.raises(IndexError):
            step.logits()
        getattr(step, name).copy_(before)


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and a library that is not known yet."""
    monkeypatch.setenv("XT_CACHE", str(tmp_path))
    build.library.cache_clear()
    yield tmp_path / "kernels"
    build.library.cache_clear()


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err


@needs_library
def test_the_library_is_compiled_once(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build.library() is not None
    assert said(capsys) == "xt: compiling kernels for this CPU (once) ...\n"
    build.library.cache_clear()
    assert build.library() is not None and not said(capsys)
    assert len(list(fresh.glob("*.so"))) == 1 and not list(fresh.glob("*.part"))


@needs_library
def test_a_damaged_file_is_compiled_anew(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compiler = next(path for name in build.COMPILERS if (path := build.shutil.which(name)))
    fresh.mkdir()
    (fresh / f"{build._key(compiler)}.so").write_bytes(b"half a file")
    assert build.library() is not None
    assert "compiling" in said(capsys)


@needs_library
def test_a_cache_that_cannot_be_written_is_done_without(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fresh.write_text("no folder")
    assert build.library() is not None
    assert "compiling" in said(capsys)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems are not asked for a compiler")
def test_without_a_compiler_everything_runs(
    fresh: Path, all_sizes: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "COMPILERS", ("no-such-compiler",))
    given, visible, _ = drawn(CASES[0])
    assert kernels.fused(*given, visible, 0.3, 0.0).shape == given[0].shape
    assert ACTIVATIONS["gelu"](given[0]).shape == given[0].shape
    assert Lean(plan(made("gpt2-small"), 8), 1, 8).native is None
    message = "xt: no C compiler: PyTorch's operators are used, which are slower on a CPU; install gcc\n"
    assert said(capsys) in (message, "")


@needs_library
def test_a_compiler_that_fails_fails_no_run(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "badcc"
    bad.write_text("#!/bin/sh\necho 'x.c:1: error: no such thing' >&2\nexit 1\n")
    bad.chmod(0o755)
    monkeypatch.setattr(build, "COMPILERS", (str(bad),))
    assert build.library() is None
    assert "PyTorch's operators are used: x.c:1: error: no such thing" in said(capsys)


@needs_library
def test_of_two_processes_one_compiles(fresh: Path) -> None:
    code = "from xtcli.fast.cpu import build; import torch; assert build.library() is not None"
    runs = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = [run.communicate()[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], told
    assert sorted(told) == ["", "xt: compiling kernels for this CPU (once) ...\n"]
