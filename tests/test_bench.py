"""Timing, cases, result files: what a benchmark rests on."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace

import pytest
import torch

from xtcli.bench import attention, cases, kernels, results, timing
from xtcli.errors import UserError
from xtcli.parts.kernels import plain
from xtcli.registry import part_of
from xtcli.train.device import Place

CPU = torch.device("cpu")
PLACE = Place(CPU, "CPU, 1 threads", "fp32")


def test_ten_milliseconds_read_as_ten() -> None:
    times = timing.measure(lambda: time.sleep(0.01), CPU)
    assert times.median == pytest.approx(0.01, rel=0.05)
    assert len(times.raw) >= 20
    assert times.p5 <= times.median <= times.p95


def test_the_first_call_stands_apart() -> None:
    calls: list[int] = []

    def slow_at_first() -> None:
        calls.append(1)
        time.sleep(0.2 if len(calls) == 1 else 0.002)

    times = timing.measure(slow_at_first, CPU)
    assert times.extra == pytest.approx(0.198, abs=0.03)
    assert max(times.raw) < 0.1


def test_a_long_call_is_repeated_less_and_the_note_says_so() -> None:
    times = timing.measure(lambda: time.sleep(0.05), CPU, budget=0.3)
    assert 3 <= len(times.raw) < 20
    # A sleep may last longer than it was asked to.
    assert re.search(r"^\d repeats: one takes 0\.0[5-9]\d? s", times.note)
    once = timing.measure(lambda: time.sleep(0.05), CPU, budget=0.04)
    assert re.fullmatch(r"1 repeat: it takes 0\.0[5-9]\d? s", once.note)
    assert len(once.raw) == 1


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1.0), (0.5, 3.0), (1.0, 5.0), (0.05, 1.2)])
def test_quantile(share: float, expected: float) -> None:
    assert timing.quantile([5.0, 1.0, 2.0, 4.0, 3.0], share) == pytest.approx(expected)


def test_peak_of_a_call_on_the_cpu_counts_what_is_alive_together() -> None:
    x = torch.zeros(1000)

    def call() -> None:
        y = x + 1
        del y
        _ = (x * 2, x * 3)

    assert timing.peak_bytes(call, CPU, [x]) == 3 * 4000


PAIRS = {"causal": 8 * 9 // 2, "full": 64, "{kind: window, left: 2}": 1 + 2 + 3 * 6}


@pytest.mark.parametrize("text", PAIRS)
def test_visible_pairs(text: str) -> None:
    (case,) = cases.chosen_cases([text])
    assert cases.pairs(case.rule, 8) == PAIRS[text]
    shape = cases.Shape(3, 2, 2, 8, 16)
    assert cases.flops(case, shape) == (4 * 16 * PAIRS[text] * 6, 10 * 16 * PAIRS[text] * 6)


@pytest.mark.parametrize("case", cases.all_cases(), ids=lambda case: case.name)
@pytest.mark.parametrize("name", ["xt", "flash", "math"])
def test_kernels_agree_with_the_specification(name: str, case: cases.Case) -> None:
    shape = cases.Shape(2, 4, 2, 40, 16)
    if kernels.never(name, case, CPU):
        assert case.mixer is not None or not part_of(case.score).fused
        return
    q, k, v, _ = cases.inputs(shape, CPU, torch.float32, 0)
    ready = kernels.make(name, case, shape, CPU, torch.float32, 2**40)
    seen = cases.visible(case, shape, CPU, torch.float32)
    with ready.context():
        made = ready.attend(q, k, v)
    expected = plain(q, k, v, seen, cases.scale(shape), 0.0, cases.score_of(case, shape, CPU))
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["alibi", "t5"])
def test_the_bias_by_distance_is_the_bias(name: str) -> None:
    (case,) = cases.chosen_cases([name])
    shape = cases.Shape(1, 4, 4, 12, 8)
    whole = cases.visible(case, shape, CPU, torch.float32).mask
    table = cases.bias_by_distance(case, shape, CPU)
    assert whole is not None and table is not None
    for q in range(12):
        torch.testing.assert_close(whole[0, :, q, : q + 1], table[:, 11 - q :])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("windw", "there is no attention 'windw'; did you mean 'window'?"),
        ("{kind: windw}", "did you mean 'window'?"),
        ("{kind: window, left: -1}", "--mask: left: Input should be greater than or equal to 0"),
        ("{kind: window, width: 3, left: 1}", "width: Extra inputs are not permitted"),
    ],
)
def test_wrong_masks_are_refused(text: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        cases.chosen_cases([text])
    assert words in str(caught.value)


def small(**more: object) -> attention.Config:
    base = attention.settle([32, 64], PLACE, batch=1, heads=2, kv_heads=None, head_dim=8, limit=30.0)
    return replace(base, **more)  # type: ignore[arg-type]


def test_attention_is_measured_on_every_kernel_or_the_reason_is_told() -> None:
    found = attention.run(small(masks=("causal", "softcap")), PLACE, lambda text: None)
    ran = {(row["case"], row["kernel"], row["seq"]) for row in found["rows"] if "forward" in row}
    assert ran == {(c, n, s) for s in (32, 64) for c, n in
                   (("causal", "xt"), ("causal", "flash"), ("causal", "math"), ("causal", "plain"), ("softcap", "plain"))}  # fmt: skip
    why = {row["kernel"]: row["skipped"] for row in found["rows"] if row.get("skipped")}
    assert why["flex"] == why["cudnn"] == "needs an NVIDIA GPU"
    assert why["math"] == "PyTorch's kernels have only the ordinary softmax"
    row = found["rows"][0]
    assert row["forward"]["tflop_per_s"] == pytest.approx(
        row["flop"]["forward"] / row["forward"]["median_ms"] / 1e9, rel=1e-6
    )
    assert not any(row.get("wrong") for row in found["rows"])
    assert set(found["growth"]["causal xt"]) == {"time", "memory"}
    json.dumps(found)


def test_growth_is_the_exponent() -> None:
    assert attention.slope([(1024, 3.0), (2048, 12.0), (4096, 48.0)]) == pytest.approx(2.0)


def test_too_large_cases_are_left_out_with_the_reason() -> None:
    (case,) = cases.chosen_cases(["causal"])
    with pytest.raises(kernels.Cannot, match=r"needs about .* GiB of memory"):
        kernels.make("plain", case, cases.Shape(4, 16, 16, 8192, 64), CPU, torch.float32, 2**30)


def result(**conditions: object) -> dict[str, object]:
    same = {"device": "CPU", "dtype": "fp32", "tokens_per_step": 8} | conditions
    return results.result("train", {"seed": 0}, same, {"rows": [{"name": "a", "step": {"median_ms": 2.0}}]})


def test_result_files_come_back(tmp_path) -> None:
    results.write(tmp_path / "r.json", result())
    assert results.read(tmp_path / "r.json") == json.loads(json.dumps(result()))
    assert results.beside(result(), result()) == [("a step", "2 ms", "2 ms", "+0.0 %")]
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.parametrize("change", [{"device": "H100"}, {"dtype": "bf16"}, {"tokens_per_step": 16}])
def test_other_conditions_are_not_compared(change) -> None:
    with pytest.raises(UserError, match="only results of the same device"):
        results.check_conditions(result(), result(**change), "r.json")


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"xt_bench": 99}'])
def test_what_is_no_result_is_refused(tmp_path, text: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(UserError, match=r"r\.json"):
        results.read(tmp_path / "r.json")


def timed(case: str, kernel: str, ms: float) -> dict[str, object]:
    return {"case": case, "kernel": kernel, "seq": 64, "forward": {"median_ms": ms}, "backward": {"median_ms": 2 * ms}}


def test_ours_is_set_beside_the_fastest_other_kernel_and_few_keys_beside_all() -> None:
    rows = [timed("causal", "xt", 2.2), timed("causal", "cudnn", 2.0), timed("causal", "flash", 3.0)]
    rows += [timed("window", "xt", 0.5), timed("block-sparse", "own", 0.4), timed("full", "xt", 4.0)]
    rows.append({"case": "causal", "kernel": "flex", "seq": 64, "skipped": "needs an NVIDIA GPU"})
    (found,) = attention.behind(rows)
    assert found == {"case": "causal", "seq": 64, "best": "cudnn", "times_best": pytest.approx(1.1)}
    names = ("causal", "full", "window", "block-sparse", "local")
    sparse = {case.name: case.dense for case in cases.all_cases() if case.name in names and case.dense is not None}
    assert sparse == {"window": "causal", "block-sparse": "full", "local": "full"}
    gained = {each["case"]: (each["kernel"], each["times_faster"]) for each in attention.gains(rows, sparse)}
    assert gained == {"window": ("cudnn", pytest.approx(4.0)), "block-sparse": ("xt", pytest.approx(10.0))}
