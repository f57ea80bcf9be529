"""What the user wrote of a command: which options, and the whole of it as it can be given again."""

from __future__ import annotations

import shlex

import typer


def given(ctx: typer.Context) -> list[str]:
    """Names of the parameters that the user wrote."""
    sources = {param.name: ctx.get_parameter_source(param.name or "") for param in ctx.command.params}
    return [name for name, source in sources.items() if name and source is not None and source.name == "COMMANDLINE"]


def unused(ctx: typer.Context, read: set[str]) -> list[str]:
    """Options that the user wrote and that a task does not read."""
    return ["--" + name.replace("_", "-") for name in given(ctx) if name not in read]


def again(ctx: typer.Context) -> str:
    """The command as it was given; prompts of several lines are left to the user."""
    words = [f"xt {ctx.command.name}"]
    for param in ctx.command.params:
        value = ctx.params.get(param.name or "")
        if param.name not in given(ctx) or param.name == "as_json":
            continue
        if isinstance(value, bool):
            words.append(param.opts[0] if value else param.secondary_opts[0])
            continue
        for one in value if isinstance(value, list | tuple) else [value]:
            text = str(one)
            words.append(f"{param.opts[0]} {shlex.quote(text) if text.isprintable() else '...'}")
    return " ".join(words)
