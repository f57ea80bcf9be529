"""The device that a command line names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xtcli.errors import refuse

if TYPE_CHECKING:
    import torch


def device_of(name: str) -> torch.device:
    """The device of that name, with `auto` the fastest; raises UserError for one that is not there."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    present = ["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
    present += ["mps"] * torch.backends.mps.is_available()
    try:
        device = torch.device(name)
    except RuntimeError:
        raise refuse(f"'{name}' is no device", f"this machine has: {', '.join(present)}", place="--device") from None
    if device.type == "cuda" and device.index is None and "cuda:0" in present:
        device = torch.device("cuda", torch.cuda.current_device())
    if str(device) not in present:
        cause = f"there is no device '{name}' on this machine"
        raise refuse(cause, f"this PyTorch ({torch.__version__}) finds: {', '.join(present)}", place="--device")
    return device
