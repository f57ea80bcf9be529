"""The command line as a user meets it: what is printed, on which stream, with which exit code, and what is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from base_preset import BASE
from typer.testing import CliRunner

import xtcli
from xtcli import cli
from xtcli.errors import Problem, UserError

ROOT = Path(xtcli.__file__).parent.parent
ENV = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


def xt(*words: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "xtcli", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=ENV | env, timeout=120)


LIGHT = [
    ("--help",),
    ("--version",),
    ("inspect",),
    ("inspect", "--json"),
    ("inspect", "--help"),
    ("build", "--help"),
    ("train", "--help"),
    ("generate", "--help"),
    ("trian",),
    ("train", "gpt2-nno"),
    ("build", "gpt2-nno", "--dry-run"),
    ("inspect", "gpt2-nno"),
    ("inspect", "gpt2-nano", "bert-bse"),
    ("convert", "--help"),
    ("bench", "train", "--help"),
]


LIGHT_PROGRAM = """
import contextlib, io, json, os, sys
from xtcli.cli import app
from xtcli.errors import UserError

def run(words, environment):
    said = io.StringIO()
    os.environ.update(environment)
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
        with contextlib.suppress(UserError, SystemExit):
            app(words, prog_name="xt")
    for name in environment:
        del os.environ[name]
    heavy = {"torch", "datasets", "transformers", "matplotlib"} & {name.split(".")[0] for name in sys.modules}
    return said.getvalue(), sorted(heavy)

print(json.dumps([run(*each) for each in json.load(sys.stdin)]))
"""


def light(commands: list[tuple[list[str], dict[str, str]]]) -> list[tuple[str, list[str]]]:
    """What each command prints, and the heavy modules imported by then; one fresh process runs them in turn."""
    done = subprocess.run(
        [sys.executable, "-c", LIGHT_PROGRAM], input=json.dumps(commands), capture_output=True, text=True, env=ENV
    )
    assert done.returncode == 0, done.stderr
    return [(said, heavy) for said, heavy in json.loads(done.stdout)]


@pytest.fixture(scope="module")
def helped() -> dict[tuple[str, ...], list[str]]:
    """The heavy modules that are there after each of LIGHT."""
    found = light([(list(words), {}) for words in LIGHT])
    return dict(zip(LIGHT, (heavy for _, heavy in found), strict=True))


@pytest.mark.parametrize("words", LIGHT, ids=" ".join)
def test_help_listings_and_wrong_names_never_import_torch(
    words: tuple[str, ...], helped: dict[tuple[str, ...], list[str]]
) -> None:
    assert helped[words] == []


COMPLETIONS = [
    ("xt ", list(cli.COMMANDS)),
    ("xt inspect gpt2-n", ["gpt2-nano"]),
    ("xt build gpt2-small --size ", ["small", "medium", "large", "xl"]),
    ("xt train gpt2-n", ["gpt2-nano"]),
    ("xt train gpt2-small train.log", ["train.log_every="]),
    ("xt inspect --size me", []),
    ("xt inspect gpt2-small train.sch", ["train.schedule="]),
    ("xt inspect gpt2-small train.schedule=c", ["train.schedule=cosine", "train.schedule=constant"]),
    ("xt inspect gpt2-small model.norm.", ["model.norm.kind=", "model.norm.eps=", "model.norm.bias="]),
    ("xt inspect gpt2-small model.norm.kind=r", ["model.norm.kind=rms", "model.norm.kind=rms-scale"]),
    ("xt inspect llama-7b model.norm.", ["model.norm.kind=", "model.norm.eps=", "model.norm.offset="]),
    ("xt inspect tinyllama-1.1b model.stack.block.sublayers.ff", ["model.stack.block.sublayers.ffn."]),
    ("xt inspect gpt2-nano model.stack.block.sublayers.attn.kv", ["model.stack.block.sublayers.attn.kv_heads="]),
    ("xt inspect gpt2-small nothing.", []),
    ("xt inspect no-such-preset model.", []),
]


@pytest.fixture(scope="module")
def completed() -> dict[str, tuple[str, list[str]]]:
    """What is offered for each of COMPLETIONS, and the heavy modules that are there then."""
    lines = [line for line, _ in COMPLETIONS]
    words = [{"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)} for line in lines]
    found = light([([], {"_XT_COMPLETE": "complete_bash", **each}) for each in words])
    return dict(zip(lines, found, strict=True))


@pytest.mark.parametrize(("line", "expected"), COMPLETIONS, ids=lambda value: str(value)[:40])
def test_completion_knows_presets_sizes_and_keys(
    line: str, expected: list[str], completed: dict[str, tuple[str, list[str]]]
) -> None:
    said, heavy = completed[line]
    found = said.split()
    assert (found[: len(expected)] == expected) if line == "xt " else (found == expected)
    assert "torch" not in heavy


def test_help_starts_in_less_than_twice_the_time_of_a_bare_typer_program(tmp_path: Path) -> None:
    bare = tmp_path / "bare.py"
    bare.write_text(
        "import typer\napp = typer.Typer()\n@app.command()\ndef a(): 'a'\n@app.command()\ndef b(): 'b'\napp()\n"
    )

    def best(command: list[str]) -> float:
        def once() -> float:
            start = time.perf_counter()
            subprocess.run([sys.executable, *command, "--help"], capture_output=True, env=ENV, check=True)
            return time.perf_counter() - start

        return min(once() for _ in range(4))

    assert best(["-m", "xtcli"]) < 2 * best([str(bare)])


def test_help_lists_every_command() -> None:
    done = xt("--help")
    assert done.returncode == 0
    for name, entry in cli.COMMANDS.items():
        assert f"{name} " in done.stdout and entry.help in done.stdout


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_of_the_table_has_help_of_its_own(name: str) -> None:
    done = CliRunner().invoke(cli.app, [name, "--help"])
    assert done.exit_code == 0
    assert f"Usage: xt {name}" in done.stdout


def test_an_unknown_command_names_the_nearest() -> None:
    done = xt("insepct")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "No such command 'insepct'. Did you mean 'inspect'?" in done.stderr


def run_command(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    """Run `xt fail`, a command that raises `error`, through main()."""

    def command() -> None:
        raise error

    monkeypatch.setitem(sys.modules, "failing", SimpleNamespace(command=command))  # type: ignore[arg-type]
    monkeypatch.setitem(cli.COMMANDS, "fail", cli.Entry("failing", "Fails."))
    monkeypatch.setattr(cli, "app", _app_again())
    monkeypatch.setattr(sys, "argv", ["xt", "fail"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    out, err = capsys.readouterr()
    return int(str(caught.value.code)), out, err


def _app_again() -> object:
    import typer

    app = typer.Typer(cls=cli.LazyGroup, pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    return app


def test_mistakes_of_the_user_are_one_line_each_and_exit_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = UserError(Problem("is wrong", "f.yaml:1:2", "a.b", "write c"), "no\nplace \x1b[31m")
    assert run_command(monkeypatch, error, capsys) == (
        2,
        "",
        "f.yaml:1:2: a.b: is wrong; write c\nxt: no\\nplace \\x1b[31m\n",
    )


def test_a_flood_of_mistakes_is_cut(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _, _, err = run_command(monkeypatch, UserError(*(f"mistake {i}" for i in range(80))), capsys)
    assert len(err.splitlines()) == cli.MAX_SHOWN + 1
    assert err.endswith("xt: 30 more mistakes\n")


def test_an_error_keeps_its_own_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class NonFinite(UserError):
        exit_code = 3

    assert run_command(monkeypatch, NonFinite("the loss is NaN"), capsys)[0] == 3


def test_ctrl_c_exits_130_in_silence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(monkeypatch, KeyboardInterrupt(), capsys) == (130, "", "")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(monkeypatch, ZeroDivisionError("ours"), capsys)


def test_mistakes_of_a_file_reach_the_terminal_all_at_once(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(BASE.replace("dim: 96", "dmi: 96").replace("lr: 3e-4", "lr: fast"))
    done = xt("inspect", "mine.yaml", "modle.dim=3", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "mine.yaml:7:3: model.dmi: unknown key; did you mean 'dim'?\n"
        "mine.yaml:23:26: train.lr: should be a number, not the text 'fast'\n"
        "override 'modle.dim=3': modle.dim: unknown key; did you mean 'model.dim'?\n"
    )
