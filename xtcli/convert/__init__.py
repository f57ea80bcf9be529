"""Conversion of checkpoints: theirs (a folder that transformers reads) to ours, and back, bit for bit.

    report = xtcli.convert(src, dst)                 report = xtcli.convert(src, dst, to="hf")

The package is callable because it has the name of what it does: `xtcli.convert` is the function and the place
where its parts live. Importing it does not import torch.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

    from xtcli.convert.report import Report

__all__ = ["convert"]


def convert(
    src: str | Path,
    dst: str | Path,
    family: str = "auto",
    to: Literal["xt", "hf"] = "xt",
    *,
    verify: bool = False,
    dtype: str | torch.dtype | None = None,
    dry_run: bool = False,
    allow_pickle: bool = False,
    force: bool = False,
) -> Report:
    """Convert the checkpoint in `src` into the folder `dst` and say what was done.

    family: a name of the table, or "auto" (the model_type of config.json). verify: compare outputs and modules
    with the reference, if transformers is installed. dtype: change the type of the weights. dry_run: read and
    check, write nothing. allow_pickle: read .bin and .pt in a child process. force: replace `dst`.

    Raises UserError for a source that does not fit, naming every tensor and option at fault; then, and when
    anything else goes wrong, nothing of `dst` is written and what was there before stays.
    """
    from xtcli.convert.job import run

    return run(Path(src), Path(dst), family, to, verify, dtype, dry_run, allow_pickle, force)


class _Callable(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return convert(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
