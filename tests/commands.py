"""`xt` run in this process: what it prints and exits with, without the seconds in which a process of its own imports torch."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import traceback
from pathlib import Path
from unittest.mock import patch

from xtcli import cli


def xt(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`xt WORDS` from the folder `cwd`, through the `main` that a process would run."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(cwd or Path()),
        patch.object(sys, "argv", ["xt", *words]),
        patch.dict(os.environ),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code: str | int | None = 1
        try:
            cli.main()
        except SystemExit as left:
            code = left.code
        except Exception:
            traceback.print_exc()
    assert isinstance(code, int)
    return subprocess.CompletedProcess(["xt", *words], code, out.getvalue(), err.getvalue())
