"""From config.json and the names of a file to a config tree and a plan: family, form, and what both must agree on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from xtcli.convert.families import by_name
from xtcli.convert.family import COMMON_FIXED, COMMON_NEUTRAL, Family, Form
from xtcli.convert.options import Options, load
from xtcli.convert.plan import Claims, Plan, claim, explain, make_plan
from xtcli.errors import Problem, UserError, did_you_mean, nearest, refuse
from xtcli.model import construct
from xtcli.parts.scope import Refused
from xtcli.registry import Config, Slot

CONFIG = "config.json"
CONFIG_LIMIT = 64 * 2**20


def read_json(path: Path) -> dict[str, Any]:
    """A map from a JSON file; duplicate keys and anything that is no map are refused."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"key '{next(key for key in keys if keys.count(key) > 1)}' stands twice")
        return found

    try:
        if path.stat().st_size > CONFIG_LIMIT:
            raise ValueError("it is too large")
        found = json.loads(path.read_bytes(), object_pairs_hook=once)
    except FileNotFoundError:
        raise refuse(f"has no {path.name}", "give the folder of a checkpoint", place=str(path.parent)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise refuse(f"cannot be read as JSON ({error})", place=str(path)) from None
    if not isinstance(found, dict):
        raise refuse("is no map of options", place=str(path))
    return found


def no_family(name: str) -> UserError:
    """What to say of a family that does not exist: the nearest, and all."""
    known = sorted({*by_name(), "auto"})
    near = nearest(name, known)
    listed = f"known: {', '.join(known)}"
    return refuse(f"there is no family '{name}'", f"did you mean '{near}'? {listed}" if near else listed)


def find_family(name: str, values: Mapping[str, Any], place: str) -> Family:
    """The family of that name, or with `auto` the one that config.json's `model_type` means."""
    known = by_name()
    stated = values.get("model_type")
    if stated is not None and not isinstance(stated, str):
        raise refuse(f"model_type is {stated!r}, not text", place=place)
    if name == "auto":
        if stated is None:
            raise refuse("states no model_type", f"name the family: {', '.join(sorted(known))}", place=place)
        if stated not in known:
            raise refuse(
                f"model_type '{stated}' is no family that xt converts", did_you_mean(stated, known), place=place
            )
        return known[stated]
    family = known[name]
    if stated is not None and stated not in family.types:
        raise refuse(f"is of model_type '{stated}', not of family '{name}'", "use the family 'auto'", place=place)
    return family


def read_config(family: Family, form: Form, values: Mapping[str, Any], place: str) -> Config:
    """The graph's config that a config.json means for one form; raises UserError with every mistake."""
    return _read(family, form, Options(values, place))


def _read(family: Family, form: Form, options: Options) -> Config:
    values, place = options.values, options.place
    tree = load(family.template(form), options)
    fixed = {**COMMON_FIXED, **family.fixed}
    for key, value in values.items():
        if key in fixed and not any(value == allowed and type(value) is type(allowed) for allowed in fixed[key]):
            options.refuse(key, f"is {value!r}, which xt does not express", f"only {fixed[key][0]!r} converts")
        elif key not in fixed and key not in options.used and key not in family.neutral | COMMON_NEUTRAL:
            known = {*options.used, *family.neutral, *COMMON_NEUTRAL, *fixed}
            options.refuse(key, f"is no option of {family.title} that xt knows", did_you_mean(key, known))
    if options.problems:
        raise UserError(*options.problems)
    try:
        return Slot("graph").validate(tree)
    except ValidationError as error:
        raise UserError(
            *(
                Problem(
                    f"{item['msg'].lower()}, got {item['input']!r}",
                    place,
                    options.keys_of(".".join(map(str, ("model", *item["loc"])))),
                )
                for item in error.errors()
            )
        ) from None


def skeleton(config: Config, place: str, keys: Callable[[str], str] = str) -> dict[str, Tensor]:
    """The tensors of a config's model on the meta device, by name; `keys` names the options of an entry at fault."""
    try:
        return dict(construct(config).state_dict())
    except Refused as refused:
        raise UserError(*(Problem(p.cause, place, keys(p.path), p.remedy) for p in refused.problems)) from None


def forms(family: Family, values: Mapping[str, Any], place: str) -> list[Form]:
    """The forms that config.json allows: those of its `architectures`, or all; of these the ones that fit, if any."""
    found = _named(family, values, place)
    return [form for form in found if form.fits(values)] or found


def _named(family: Family, values: Mapping[str, Any], place: str) -> list[Form]:
    stated = values.get("architectures")
    if stated is None or stated == []:
        return list(family.forms)
    if not isinstance(stated, list) or len(stated) != 1 or not isinstance(stated[0], str):
        raise refuse(f"architectures is {stated!r}", "it must name one class", place=place)
    found = [form for form in family.forms if form.name == stated[0]]
    if not found:
        names = {form.name for form in family.forms}
        raise refuse(
            f"architecture '{stated[0]}' is none that xt converts", did_you_mean(stated[0], names), place=place
        )
    return found


def read(family: Family, values: Mapping[str, Any], names: Sequence[str], place: str) -> tuple[Plan, Claims]:
    """The plan of the form that config.json and the names of the file mean, and the file's claims.

    The first form that the file fits is taken; where it fits none, the mistakes of the nearest one are raised.
    """
    refused: UserError | None = None
    closest: tuple[Plan, Claims] | None = None
    for form in forms(family, values, f"{place}/{CONFIG}"):
        try:
            options = Options(values, f"{place}/{CONFIG}")
            config = _read(family, form, options)
            plan = make_plan(family, form, config, skeleton(config, options.place, options.keys_of))
        except UserError as error:
            refused = refused or error
            continue
        except RuntimeError as error:
            if "overflow" not in str(error):
                raise
            # Nothing is allocated on the meta device, but PyTorch counts the bytes.
            refused = refused or refuse(f"asks for a tensor beyond all memory ({error})", place=f"{place}/{CONFIG}")
            continue
        claims = claim(plan, names)
        if not claims.faults:
            return plan, claims
        if closest is None or claims.faults < closest[1].faults:
            closest = plan, claims
    if closest is not None:
        # A form whose options are refused may be the one that the file is of.
        raise UserError(*(refused.problems if refused is not None else ()), *explain(*closest, place))
    assert refused is not None
    raise refused
