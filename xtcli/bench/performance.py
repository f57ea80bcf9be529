"""`xt bench all`: the cases behind docs/performance.md, each a command of its own, into one file.

A case runs in a process of its own, so that its first step is that of a fresh start, what it took is given back, and
one that takes too long can be ended. The file is written after each case; what it holds already is not measured again.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from xtcli.bench import results
from xtcli.bench.peers import KNOWN
from xtcli.bench.tables import Table
from xtcli.errors import did_you_mean, refuse
from xtcli.inspect import units

Talk = Callable[[str], None]


@dataclass(frozen=True)
class Case:
    """One command of `xt bench`. limit: seconds. memory: GiB of the GPU that must be free. `goals`: side -> how many
    times as long as ours it should take at least; its peers are those of the command."""

    name: str
    title: str
    words: str
    device: Literal["cuda", "cpu"]
    limit: int
    memory: int = 0
    goals: Mapping[str, float] = field(default_factory=dict)

    @property
    def peers(self) -> list[str]:
        """The peers by name, in the order of the goals."""
        return list(dict.fromkeys(side.partition(",")[0] for side in self.goals))


SPARSE = "--mask causal --mask full --mask window --mask block-sparse --mask sliding-global"
CASES = (
    Case(
        "train-gpt2", "Training GPT-2, 124M: 32 x 1,024 tokens",
        "train gpt2-small model.dropout=0.0 --batch 32 --length 1024 --steps 40 --loop",
        "cuda", 150, 50, {"nanogpt": 1.30},
    ),
    Case(
        "train-llama", "Training a 1.1B LLaMA: 8 x 2,048 tokens",
        "train tinyllama-1.1b --batch 8 --length 2048 --steps 20",
        "cuda", 220, 75, {"litgpt": 1.15},
    ),
    Case(
        "train-llama-bf16", "Training a 1.1B LLaMA in bfloat16 alone: 8 x 2,048 tokens",
        "train tinyllama-1.1b train.precision=bf16-true --batch 8 --length 2048 --steps 20",
        "cuda", 220, 75, {"litgpt": 1.15},
    ),
    Case(
        "decode-llama", "Writing with a 1.1B LLaMA: 1 x 128 + 256 tokens",
        "generate tinyllama-1.1b --prompt 128 --new 256 --repeats 3 --dtype bf16 --int8",
        "cuda", 200, 20, {"gpt-fast": 1.45, "transformers, static cache": 2.5},
    ),
    Case(
        "decode-llama-32", "Writing with a 1.1B LLaMA: 32 x 128 + 256 tokens",
        "generate tinyllama-1.1b --batch 32 --prompt 128 --new 256 --repeats 3 --dtype bf16",
        "cuda", 120, 30, {"transformers, static cache": 2.5},
    ),
    Case(
        "decode-gpt2", "Writing with GPT-2, 124M: 1 x 128 + 256 tokens",
        "generate gpt2-small --prompt 128 --new 256 --repeats 3 --dtype bf16",
        "cuda", 120, 10, {"transformers, static cache": 2.5},
    ),
    Case(
        "train-bert", "Training BERT, 110M: 32 x 512 tokens",
        "train bert-base --batch 32 --length 512 --steps 30",
        "cuda", 120, 40, {"transformers": 1.3},
    ),
    Case(
        "train-t5", "Training T5, 60M: 32 x 512 tokens, and as many to write",
        "train t5-small --batch 32 --length 512 --steps 30",
        "cuda", 120, 40, {"transformers": 1.3},
    ),
    Case(
        "attention-64", "Attention over 8,192 tokens, heads of 64",
        f"attention --seq 8192 --batch 4 --heads 16 --head-dim 64 --limit 60 {SPARSE}", "cuda", 120, 40,
    ),
    Case(
        "attention-128", "Attention over 8,192 tokens, heads of 128",
        "attention --seq 8192 --batch 4 --heads 16 --head-dim 128 --limit 60 --mask causal --mask window",
        "cuda", 120, 60,
    ),
    Case(
        "attention-long", "Attention over 32,768 tokens",
        f"attention --seq 32768 --batch 1 --heads 16 --head-dim 64 --limit 60 {SPARSE}", "cuda", 120, 40,
    ),
    Case(
        "cpu-train", "Training a small GPT-2 on two cores: 8 x 256 tokens",
        "train gpt2-nano --device cpu --dtype fp32 --batch 8 --length 256 --steps 30 --loop",
        "cpu", 180, 0, {"nanogpt": 1.1, "transformers": 1.2},
    ),
    Case(
        "cpu-decode", "Writing with GPT-2, 124M, on two cores: 1 x 128 + 64 tokens, fp32",
        "generate gpt2-small --device cpu --dtype fp32 --prompt 128 --new 64 --repeats 7",
        "cpu", 180, 0, {"transformers, dynamic cache": 1.5},
    ),
)  # fmt: skip


def run(cases: Sequence[str], peers: Sequence[str], out: Path, talk: Talk) -> dict[str, Any]:
    """Measure what `out` does not hold yet, or the cases that are named; the whole of it."""
    wanted = _wanted(cases)
    given = _given(peers)
    found = results.read(out) if out.exists() else results.result("all", {}, {}, {"cases": {}})
    if found["kind"] != "all":
        raise refuse(f"'{out}' holds a result of kind {found['kind']}", "give another file, or none that exists")
    for case in wanted:
        if not cases and "result" in found["cases"].get(case.name, {}):
            talk(f"{case.name}: measured already; --case {case.name} measures it again")
            continue
        talk(f"{case.name}: xt bench {case.words}")
        found["cases"][case.name] = _measure(case, given, talk)
        results.write(out, found)
    return found


def _wanted(names: Sequence[str]) -> list[Case]:
    known = {case.name: case for case in CASES}
    for name in names:
        if name not in known:
            raise refuse(f"there is no case '{name}'", did_you_mean(name, known), place="--case")
    if names:
        return [known[name] for name in names]
    import torch

    here = "cuda" if torch.cuda.is_available() else "cpu"
    return [case for case in CASES if case.device == here]


def _given(words: Sequence[str]) -> dict[str, str]:
    """The peers on the command line, by name."""
    from xtcli.bench.peers import chosen

    found = {}
    for word in words:
        name = word.partition("=")[0]
        uses = KNOWN[name].uses if name in KNOWN else ("train",)
        chosen([word], uses[0])
        found[name] = word
    return found


def _measure(case: Case, given: Mapping[str, str], talk: Talk) -> dict[str, Any]:
    """The entry of one case: its command and its result, or why it has none."""
    entry: dict[str, Any] = {"title": case.title, "command": f"xt bench {case.words}", "goals": dict(case.goals)}
    reason = _unfit(case)
    if reason:
        talk(f"{case.name}: {reason}")
        return entry | {"skipped": reason}
    named = [name for name in case.peers if name in given]
    missing = [name for name in case.peers if name not in given]
    for name in named:
        entry["command"] += f" --against {name}{'=PATH' if '=' in given[name] else ''}"
    if missing:
        entry["without"] = missing
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "part.json"
        words = [*shlex.split(case.words), *(word for name in named for word in ("--against", given[name]))]
        reason = _command([*words, "--out", str(part)], case.limit, talk)
        if reason is not None:
            return entry | {"skipped": reason}
        return entry | {"result": json.loads(part.read_bytes())}


def _unfit(case: Case) -> str | None:
    """Why this machine cannot run a case."""
    import torch

    if case.device == "cuda":
        if not torch.cuda.is_available():
            return "needs an NVIDIA GPU"
        free = torch.cuda.mem_get_info()[0] / 2**30
        if free < case.memory:
            return f"needs {case.memory} GiB of the GPU, {free:.0f} are free"
    return None


def _command(words: Sequence[str], limit: int, talk: Talk) -> str | None:
    """Run `xt bench` with these words and pass on what it says; why it failed, if it did."""
    late = threading.Event()
    process = subprocess.Popen(
        [sys.executable, "-m", "xtcli", "bench", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )

    def end() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(limit, end)
    timer.start()
    last = ""
    try:
        assert process.stderr is not None
        for line in process.stderr:
            talk(f"  {line.rstrip()}")
            last = line.strip() or last
        code = process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:
            process.kill()
            process.wait()
    if late.is_set():
        return f"took longer than {limit} s"
    return None if code == 0 else f"ended with code {code}: {last}"


def performance_tables(found: Mapping[str, Any]) -> list[Table]:
    """All comparisons in one table, then what each case measured."""
    made = [summary(found)]
    for _, title, tables in by_case(found):
        made += [Table(title), *tables]
    return made


def by_case(found: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], str, list[Table]]]:
    """Entry, title and tables of each case in the order of CASES."""
    from xtcli.bench.report import tables

    order = [case.name for case in CASES]
    names = sorted(found["cases"], key=lambda name: order.index(name) if name in order else len(order))
    made = []
    for name in names:
        entry = found["cases"][name]
        inner = (
            tables(entry["result"]) if "result" in entry else [Table("", notes=[f"Not measured: {entry['skipped']}."])]
        )
        if entry.get("without"):
            inner.append(Table("", notes=[f"Without {', '.join(entry['without'])}: not given with --peers."]))
        made.append((entry, entry["title"], inner))
    return made


def summary(found: Mapping[str, Any]) -> Table:
    """One row for each comparison that has been made."""
    rows = []
    for entry, title, _ in by_case(found):
        lines = entry.get("result", {}).get("rows", [])
        sides = [row for row in lines if "side" in row]
        for row in sides:
            if "ratio" not in row:
                continue
            goal = entry["goals"].get(row["side"])
            rows.append(
                (
                    title,
                    f"{row['tok_s'] * row['ratio']:,.0f}",
                    row["side"],
                    f"{row['tok_s']:,.0f}",
                    f"{row['ratio']:.2f} x",
                    "-" if goal is None else f"{goal:.2f} x",
                    entry["result"]["conditions"]["device"],
                )
            )
    columns = ("work", "xt tok/s", "beside", "its tok/s", "xt to it", "wanted", "on")
    return Table("", columns, rows, [] if rows else ["No comparison has been made yet."])


def page(found: Mapping[str, Any]) -> str:
    """docs/performance.md."""
    parts = [
        "# How fast it is",
        "This page is made from a result file; it is not written by hand:",
        "    xt bench all --out docs/performance.json --peers transformers --peers litgpt \\\n"
        "        --peers nanogpt=PATH --peers gpt-fast=PATH\n"
        "    xt bench --show docs/performance.json --markdown > docs/performance.md",
        "Each case is a command of its own. Both sides of a comparison have the same weights and tokens, in one "
        "process, and take turns; medians after warm-up. Training is timed over steps as the loop takes them, with a "
        "wait for the device only between blocks of them. A ratio is the speed of `xt` to that of the other: above 1 "
        "`xt` is faster.",
        "## Comparisons",
        summary(found).markdown(),
    ]
    for entry, title, tables in by_case(found):
        parts += [f"## {title}", f"    {entry['command']}"]
        if "result" in entry:
            parts.append(_made_on(entry["result"]))
        parts += [table.markdown() for table in tables]
    return "\n\n".join(part for part in parts if part) + "\n"


def _made_on(result: Mapping[str, Any]) -> str:
    """Device and versions, those of peers too, in a sentence."""
    facts = result["environment"]
    devices = [str(device["name"]) for device in facts["devices"]]
    machine = devices[0] if devices else f"{facts['cpu']['name']}, {units.plural(facts['threads']['torch'], 'thread')}"
    packages = ", ".join(
        f"{name} {version}" for name, version in facts["packages"].items() if name in ("torch", "triton")
    )
    cuda = f", CUDA {facts['cuda']}" if devices else ""
    name, *edited = str(facts.get("commit") or "").split("-", 1)
    commit = f", commit {name[:10]}{' with changes' if edited else ''}" if name else ""
    beside = ", ".join(f"{name} {version}" for name, version in result.get("peers", {}).items())
    return f"{machine}; {packages}{cuda}, Python {facts['python']}{commit}{'; beside ' if beside else ''}{beside}."
