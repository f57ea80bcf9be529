"""Triton's interpreter without work that changes nothing, which is half of what it does.

the language   is patched at the launch of a kernel, and again, with the same, at each call of a function from it
overflows      of integers are computed for assertions that the interpreter leaves out unless it debugs
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from triton import language
from triton.runtime import interpreter

patch = getattr(interpreter, "_patch_lang", None)
reads: dict[Any, tuple[bool, bool]] = {}
there: set[tuple[bool, bool]] = set()


class Nothing:
    """What is left to restore where nothing was patched."""

    def restore(self) -> None:
        pass


def patch_once(function: Any) -> Any:
    """Patch the modules of the language that a function reads, unless the running launch has done so."""
    if function not in reads:
        values = function.__globals__.values()
        reads[function] = (any(v is language for v in values), any(v is language.core for v in values))
    if reads[function] in there:
        return Nothing()
    scope = patch(function)
    there.add(reads[function])
    restore = scope.restore

    def end() -> None:
        there.clear()
        restore()

    scope.restore = end
    return scope


def spare() -> None:
    """Make the interpreter of this process leave both out; one that is built otherwise stays as it is."""
    if patch is None or not hasattr(interpreter, "_LangPatchScope"):
        return
    interpreter._patch_lang = patch_once
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)
