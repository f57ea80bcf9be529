"""The embedded corpus: the source code and docstrings of the Python standard library on this machine.

Modules and packages in the order of their paths. Left out: tests, demos, installed packages, and files that
are tables rather than code (codecs, topics of pydoc, HTML entities, build settings).
"""

from __future__ import annotations

import sys
import sysconfig
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from xtcli.data.files import File, Files
from xtcli.errors import refuse

FOLDERS = set(
    "__phello__ __pycache__ demo dist-packages encodings ensurepip idle_test idlelib lib2to3 msilib pydoc_data "
    "site-packages test tests turtledemo".split()
)
MODULES = {"html/entities.py", "stringprep.py", "this.py", "antigravity.py", "__hello__.py"}
PREFIXES = ("_sysconfigdata", "config-", "_unicode_data")


def open_stdlib(columns: Sequence[str], limit: int | None) -> Files:
    """The standard library as a source; raises UserError where this Python has no source files."""
    if len(columns) > 1:
        raise refuse("stdlib is plain text, and pairs need two columns", "set data.source to a file with columns")
    root = Path(sysconfig.get_path("stdlib"))
    files = [File(path, "text", path.stat().st_size) for path in _modules(root)]
    files = [file for file in files if file.size]
    if not files:
        raise refuse(f"this Python has no source files in {root}", "set data=FOLDER", path="data.source")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return Files(files, columns, limit, f"stdlib (source of Python {version})", Counter())


def _modules(root: Path) -> list[Path]:
    found = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        name = "/".join(parts)
        hidden = any(part in FOLDERS or part.startswith((*PREFIXES, ".")) for part in parts)
        if not hidden and name not in MODULES:
            found.append((name, path))
    return [path for _, path in sorted(found)]
