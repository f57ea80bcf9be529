"""Crashes: a process killed, or a file operation failing, at any moment of a save loses no checkpoint."""

from __future__ import annotations

import builtins
import ctypes
import errno
import io
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from small import small
from torch import Tensor

from xtcli.errors import UserError
from xtcli.runs import tensors
from xtcli.runs.checkpoint import load_checkpoint, newest
from xtcli.runs.folder import Damaged, clean, commit_folder, verify, write_atomically
from xtcli.runs.retention import prune
from xtcli.runs.tensors import load_weights

unix = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and signals")

OPERATIONS = [
    (os, name) for name in ("mkdir", "open", "fsync", "rename", "replace", "unlink", "rmdir", "chmod", "fdopen")
]
OPERATIONS += [(builtins, "open"), (io, "open"), (tensors, "save_file")]


@contextmanager
def failing(at: int, fail: Callable[[], None]) -> Iterator[list[str]]:
    """Call `fail` before the `at`-th file operation inside; gives the list of operations so far."""
    done: list[str] = []
    real = [(module, name, getattr(module, name)) for module, name in OPERATIONS]

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **options: Any) -> Any:
            done.append(name)
            if len(done) - 1 == at:
                fail()
            return function(*args, **options)

        return operation

    for module, name, function in real:
        setattr(module, name, wrap(name, function))
    try:
        yield done
    finally:
        for module, name, function in real:
            setattr(module, name, function)


def save_second(run: Path) -> None:
    """What a training process does at step 2: save, then delete the checkpoint of step 1."""
    prune(run, small(run, 2, 2.0), keep=1, best=None)


def forked(work: Callable[[], None]) -> int:
    """Run `work` in a child process and return how that ended; the child never returns into pytest."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def check_intact(run: Path) -> int:
    """The run's newest checkpoint loads with the right content, and saving goes on; returns its step."""
    seen: list[UserError] = []
    path = newest(run, trainer=True, warn=seen.append)
    step = int(path.name.removeprefix("step-"))
    loaded = load_checkpoint(path, trainer=True)
    assert not seen
    assert loaded.weights["weight"].eq(step).all() and loaded.trainer is not None
    assert loaded.trainer.tensors["m"].eq(step).all()
    clean(run / "checkpoints")
    assert not list(run.rglob("*.tmp-*"))
    save_second(run)
    assert sorted(os.listdir(run / "checkpoints")) == ["step-2"]
    return step


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("first")
    small(run, 1, 1.0)
    return run


@pytest.fixture(scope="module")
def operations(first: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    run = tmp_path_factory.mktemp("count") / "run"
    shutil.copytree(first, run)
    with failing(-1, lambda: None) as done:
        save_second(run)
    return done


@unix
def test_killed_at_every_operation(first: Path, operations: list[str], tmp_path: Path) -> None:
    assert operations.count("fsync") >= 9 and "rename" in operations and operations.count("save_file") == 2
    steps = []
    for at in range(len(operations)):
        run = tmp_path / str(at)
        shutil.copytree(first, run)

        def work(run: Path = run, at: int = at) -> None:
            with failing(at, lambda: os._exit(77)):
                save_second(run)

        assert forked(work) == 77
        steps.append(check_intact(run))
    assert steps == sorted(steps) and {1, 2} == set(steps)


@unix
def test_killed_inside_a_write(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(state: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        Path(path).write_bytes(b"half")
        os._exit(77)

    shutil.copytree(first, tmp_path / "run")
    monkeypatch.setattr(tensors, "save_file", torn)
    assert forked(lambda: save_second(tmp_path / "run")) == 77
    monkeypatch.undo()
    assert check_intact(tmp_path / "run") == 1


@unix
def test_killed_at_random_moments(first: Path, tmp_path: Path) -> None:
    dice = random.Random(time.time_ns())
    for number in range(8):
        run = tmp_path / str(number)
        shutil.copytree(first, run)
        child = os.fork()
        if child == 0:
            try:
                save_second(run)
            finally:
                os._exit(0)
        time.sleep(dice.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        check_intact(run)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC], ids=["I/O error", "disk full"])
def test_failing_at_every_operation(first: Path, operations: list[str], tmp_path: Path, number: int) -> None:
    def fail() -> None:
        raise OSError(number, os.strerror(number))

    full = 0
    for at in range(len(operations)):
        run = tmp_path / str(at)
        shutil.copytree(first, run)
        try:
            with failing(at, fail):
                save_second(run)
        except Damaged as error:
            # Verifying the new one could not read it, so nothing was deleted.
            assert os.strerror(number) in str(error) and (run / "checkpoints/step-1").is_dir()
        except UserError as error:
            assert number == errno.ENOSPC and "the disk is full" in str(error)
            assert not list(run.rglob("*.tmp-*"))
            full += 1
        except OSError as error:
            assert error.errno == number
        check_intact(run)
    assert full > 10 or number != errno.ENOSPC


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a small file system of its own")
def test_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()

    def work() -> None:
        libc, user, group = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
        new_user_and_mounts = 0x10020000
        if libc.unshare(new_user_and_mounts):
            os._exit(5)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        disk = tmp_path / "disk"
        if libc.mount(b"none", os.fsencode(disk), b"tmpfs", 0, b"size=96k"):
            os._exit(5)
        small(disk, 1, 1.0)
        for step in range(2, 9):
            try:
                small(disk, step, float(step))
            except UserError as error:
                good = "the disk is full" in str(error) and not list(disk.rglob("*.tmp-*"))
                last = newest(disk, trainer=True)
                os._exit(0 if good and last.name == f"step-{step - 1}" and load_weights(last) else 6)
        os._exit(7)

    code = forked(work)
    if code == 5:
        pytest.skip("this user may not mount")
    assert code == 0


def test_commit_never_overwrites(tmp_path: Path) -> None:
    commit_folder(tmp_path / "x", lambda folder: write_atomically(folder / "a", b"1"))
    with pytest.raises(FileExistsError):
        commit_folder(tmp_path / "x", lambda folder: write_atomically(folder / "a", b"2"))
    verify(tmp_path / "x")
    assert (tmp_path / "x/a").read_bytes() == b"1"
    assert sorted(os.listdir(tmp_path)) == ["x"]


@unix
def test_a_forked_worker_does_not_keep_a_dead_writers_folder(tmp_path: Path) -> None:
    """Cleaning spares what a live process writes, and takes it once that is dead, though its worker lives on."""
    ready, go = os.pipe()

    def work() -> None:
        def write(folder: Path) -> None:
            worker = os.fork()
            if worker == 0:
                time.sleep(30)
                os._exit(0)
            os.write(go, worker.to_bytes(8, "big"))
            time.sleep(30)

        commit_folder(tmp_path / "x", write)

    writer = os.fork()
    if writer == 0:
        work()
    worker = int.from_bytes(os.read(ready, 8), "big")
    time.sleep(0.1)
    assert clean(tmp_path) == []
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    gone = clean(tmp_path)
    os.kill(worker, signal.SIGKILL)
    assert len(gone) == 1 and os.listdir(tmp_path) == []


def test_cleaning_spares_other_names(tmp_path: Path) -> None:
    for name in ("x.tmp", "x.tmp-1", "notes.tmp-backup"):
        (tmp_path / name).mkdir()
    assert clean(tmp_path) == [] and clean(tmp_path / "none") == []
