"""Times, counts and lengths as they are written on the command line."""

from __future__ import annotations

from xtcli.errors import refuse


def seconds(text: str | None) -> float | None:
    """30s, 5m, 1h, or a plain number of seconds."""
    return _amount(text, {"s": 1, "m": 60, "h": 3600}, "--budget", "30s, 5m or 1h")


def count(text: str | None) -> int | None:
    """500k, 10M, or a plain number of tokens."""
    found = _amount(text, {"k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9}, "--tokens", "500k or 10M")
    return None if found is None else max(int(found), 1)


def _amount(text: str | None, units: dict[str, int], option: str, like: str) -> float | None:
    """A number with one of these units, or without; raises UserError for what is no budget."""
    if text is None:
        return None
    number, factor = (text[:-1], units[text[-1]]) if text and text[-1] in units else (text, 1)
    try:
        amount = float(number) * factor
    except ValueError:
        amount = 0.0
    if not 0 < amount < float("inf"):
        raise refuse(f"'{text}' is no budget", f"write {like}", place=option)
    return amount


def lengths(text: str) -> list[int]:
    """1024, or several: 1024,2048."""
    try:
        found = [int(word) for word in text.replace("_", "").split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 2:
        raise refuse(f"'{text}' is not a length", "write --seq 8192 or --seq 1024,2048", place="--seq")
    return found
