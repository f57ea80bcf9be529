"""pydantic's error types in plain words: what a value should be, what it is, what to write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic.fields import FieldInfo

from xtcli.config.document import number_or_text
from xtcli.config.emit import flow
from xtcli.errors import did_you_mean, nearest

WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "none_required": "null",
    "dict_type": "a map",
    "mapping_type": "a map",
    "model_type": "a map",
    "model_attributes_type": "a map",
    "tuple_type": "a list",
    "list_type": "a list",
    "finite_number": "a finite number",
}
LIMITS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
    "multiple_of": ("a multiple of", "multiple_of"),
}
LENGTHS = {
    "too_short": ("at least", "min_length"),
    "too_long": ("at most", "max_length"),
    "string_too_short": ("at least", "min_length"),
    "string_too_long": ("at most", "max_length"),
}
WORDS_FOR_BOOL = {"no": "false", "off": "false", "n": "false", "yes": "true", "on": "true", "y": "true"}


def sentence(error: Mapping[str, Any], beside: Sequence[Mapping[str, Any]], info: FieldInfo | None) -> tuple[str, str]:
    """Cause and remedy of one pydantic error. `beside`: all errors at its path; `info`: the field that is missing."""
    kind, context, value = error["type"], error.get("ctx", {}), error["input"]
    if kind == "missing":
        name = error["loc"][-1]
        if isinstance(name, int):
            return "is a list that ends too early", f"entry {name + 1} is missing"
        meaning = f" ({info.description})" if info and info.description else ""
        return f"has no '{name}'{meaning}", f"add {name}: ..."
    if kind in WANTED:
        names = [*_choices(beside), *_types(beside)]
        cause = f"should be {' or '.join(names)}, not {_shown(value)}"
        return cause, _remedy_for_type(names, value)
    if kind == "literal_error":
        cause = f"should be {' or '.join([context['expected'], *_types(beside)])}, not {_shown(value)}"
        best = nearest(value, _quoted(context["expected"])) if isinstance(value, str) else None
        return cause, _remedy_for_type(_types(beside), value) or (f"did you mean '{best}'?" if best else "")
    if kind in LIMITS:
        words, key = LIMITS[kind]
        return f"should be {words} {_number(context[key])}, not {_shown(value)}", ""
    if kind in LENGTHS:
        words, key = LENGTHS[kind]
        count = context[key]
        if isinstance(value, str):
            return (
                ("is an empty text", "give it a value")
                if not value
                else (f"should have {words} {count} characters", "")
            )
        return f"should have {words} {count} entries, not {len(value)}", ""
    return _custom(kind, context, value, error["msg"])


def _types(beside: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the members of a union wanted, each once."""
    return list(dict.fromkeys(WANTED[error["type"]] for error in beside if error["type"] in WANTED))


def _choices(beside: Sequence[Mapping[str, Any]]) -> list[str]:
    return [error["ctx"]["expected"] for error in beside if error["type"] == "literal_error"]


def _custom(kind: str, context: Mapping[str, Any], value: Any, message: str) -> tuple[str, str]:
    """The errors that slots and validators raise themselves."""
    if kind == "slot_kind_unknown":
        name = value if isinstance(value, str) else value["kind"]
        return f"there is no kind of {context['slot']} named '{name}'", did_you_mean(str(name), context["kinds"])
    if kind == "slot_kind_missing":
        close = next((key for key in value if nearest(str(key), ["kind"])), None)
        if close:
            return f"unknown key '{close}'", "did you mean 'kind'?"
        return "has no 'kind'", f"add kind: one of {context['kinds']}"
    if kind == "slot_type":
        return f"should be a kind of {context['slot']} or a map with 'kind', not {_shown(value)}", ""
    if kind in ("value_error", "assertion_error"):
        cause, _, remedy = str(context["error"]).partition("; ")
        return cause, remedy
    cause, _, remedy = message.removeprefix("Input ").partition("; ")
    return cause[:1].lower() + cause[1:], remedy


def _remedy_for_type(names: list[str], value: Any) -> str:
    if isinstance(value, str):
        if "true or false" in names and value.lower() in WORDS_FOR_BOOL:
            return f"did you mean {WORDS_FOR_BOOL[value.lower()]}?"
        if "true or false" in names and nearest(value.lower(), ["true", "false"]):
            return f"did you mean {nearest(value.lower(), ['true', 'false'])}?"
        if _as_number(value) is not None and {"a number", "a whole number"} & set(names):
            return "remove the quotes"
    if isinstance(value, float) and "a whole number" in names and value.is_integer():
        return f"did you mean {int(value)}?"
    if "text" in names and isinstance(value, int | float):
        return f"quote it: '{flow(value)}'"
    if "a list" in names and isinstance(value, str):
        return f"write [{flow(value)}]"
    return ""


def _as_number(text: str) -> Any:
    try:
        value = number_or_text(text)
    except ValueError:
        return None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return f"the text '{value if len(value) <= 40 else value[:37] + '...'}'"
    if isinstance(value, Mapping):
        return (
            f"a map ({', '.join(map(str, list(value)[:3]))}{', ...' if len(value) > 3 else ''})"
            if value
            else "an empty map"
        )
    if isinstance(value, list | tuple):
        text = flow(value)
        return f"the list {text}" if len(text) <= 40 else f"a list of {len(value)}"
    return flow(value)


def _number(value: Any) -> str:
    return flow(int(value) if isinstance(value, float) and value.is_integer() else value)


def _quoted(expected: str) -> list[str]:
    return [word.strip("'\"") for word in expected.replace(" or ", ", ").split(", ")]
