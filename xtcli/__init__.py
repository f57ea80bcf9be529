"""xt: describe, build, train, generate from and convert any documented transformer.

    model = xtcli.build("presets/gpt2-small.yaml", "model.dim=512", seed=0)
    model = xtcli.load("run1/")
    out = model(input_ids=..., attention_mask=...)
    report = xtcli.convert("checkpoint/", "converted/")

Importing this does not import torch; the first use of a name below does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xtcli.convert import convert
    from xtcli.model import build, load

__all__ = ["__version__", "build", "convert", "load"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in ("build", "load"):
        import xtcli.model

        return getattr(xtcli.model, name)
    if name == "convert":
        # Importing the package makes it an attribute of this one; it is callable.
        return importlib.import_module("xtcli.convert")
    raise AttributeError(f"module 'xtcli' has no attribute '{name}'")
