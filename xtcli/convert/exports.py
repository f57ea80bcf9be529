"""An xt checkpoint -> a checkpoint of theirs, by the same name rules read backwards.

config.json is the one that came with the weights where it still tells the truth; else what the config tree
says is written into it, or into a new one. Either way it is read again as an import
would, and must mean the network that the checkpoint holds.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xtcli.config.preset import load_preset
from xtcli.convert.adapters import merged
from xtcli.convert.casts import Cast
from xtcli.convert.checks import counted, label
from xtcli.convert.companions import TOKENIZER, copy_companions
from xtcli.convert.engine import forward, same_bits, to_theirs
from xtcli.convert.families import FAMILIES, by_name
from xtcli.convert.family import Family, Form
from xtcli.convert.files import Source, Writer, open_source
from xtcli.convert.images import write_images
from xtcli.convert.imports import KEPT, REFERENCE, Commit, whole
from xtcli.convert.members import joined, split
from xtcli.convert.members import settle as settle_members
from xtcli.convert.options import Unexpressed, dump, settle
from xtcli.convert.plan import Plan, make_plan
from xtcli.convert.reading import CONFIG, read_config, read_json, skeleton
from xtcli.convert.report import Report
from xtcli.convert.same import difference, unlike
from xtcli.convert.verify import Sides
from xtcli.data.tokenizers import Tokenizer
from xtcli.errors import Problem, UserError, did_you_mean, refuse
from xtcli.registry import Config, part_of, tree
from xtcli.runs.checkpoint import locate

START = "decoder_start_token_id"


@dataclass(frozen=True)
class Export:
    """A checkpoint of ours that has been read, and what it will become."""

    folder: Path
    source: Source
    kept: Source | None
    before: Mapping[str, Any]
    values: Mapping[str, Any]
    plan: Plan
    like: Mapping[str, Tensor]
    cast: Cast
    images: Any = None

    def get(self, name: str) -> Tensor:
        """A tensor of ours."""
        return self.source.read(name)

    def dtype(self, names: tuple[str, ...]) -> torch.dtype:
        """The type that the tensors made of these will have."""
        return self.cast.type(self.source.entries[self.source.ties.get(names[0], names[0])].dtype)


def export_checkpoint(path: Path, family: str, cast: Cast, commit: Commit, target: str) -> Report:
    """Read a checkpoint of ours and hand what writes theirs to `commit`."""
    folder = locate(path)
    preset = load_preset(folder).preset
    config = preset.model
    source = open_source(folder)
    if source is None:
        raise refuse("has no weights", place=str(folder))
    source = merged(source, preset.train.lora)
    found = part_of(config).members(config)
    if found:
        return export_members(found, source, folder, family, cast, commit, target)
    kept = open_source(folder / REFERENCE, KEPT) if (folder / REFERENCE).is_dir() else None
    before = read_json(folder / REFERENCE / CONFIG) if (folder / REFERENCE / CONFIG).exists() else {}
    job = prepare(config, source, folder, family, cast, kept, before, getattr(preset.objective, "labels", None))
    job = replace(job, images=getattr(preset.objective, "images", None))
    report = describe(job, target)
    commit(report, lambda inside: write(job, inside, report), lambda inside: {"": sides(job, inside)})
    return report


def prepare(
    config: Config,
    source: Source,
    folder: Path,
    family: str,
    cast: Cast,
    kept: Source | None = None,
    before: Mapping[str, Any] | None = None,
    labels: Sequence[str] | None = None,
) -> Export:
    """What a model becomes; raises UserError where no class of theirs expresses it, or a tensor does not fit."""
    before = before or {}
    like = skeleton(config, str(folder))
    form, values = find_form(config, family, before, str(folder))
    values = _labelled(values, labels)
    if not before:
        values = _spoken(values, form, config, folder)
    plan = make_plan(form[0], form[1], config, like)
    _check(source, kept, plan, like, folder)
    return Export(folder, source, kept, before, _typed(values, source, cast, not before), plan, like, cast)


def export_members(
    found: Mapping[str, tuple[Config, str]],
    source: Source,
    folder: Path,
    family: str,
    cast: Cast,
    commit: Commit,
    target: str,
) -> Report:
    """`export_checkpoint` of a graph that holds several models: a folder of theirs for each."""
    members = split(found, source, str(folder))
    family = _common_family([member.config for member in members.values()], family, str(folder))
    jobs = {name: prepare(member.config, member.source, folder, family, cast) for name, member in members.items()}
    reports = {name: describe(job, f"{target}/{name}") for name, job in jobs.items()}
    report = joined(reports, source, target)

    def write_all(inside: Path) -> None:
        for name, job in jobs.items():
            (inside / name).mkdir()
            write(job, inside / name, reports[name])
        settle_members(report, reports)

    commit(report, write_all, lambda inside: {name: sides(job, inside / name) for name, job in jobs.items()})
    return report


def _common_family(configs: Sequence[Config], family: str, place: str) -> str:
    """The first family that expresses all of the configs; `auto` where there is none."""
    for candidate in FAMILIES if family == "auto" else ():
        try:
            for config in configs:
                find_form(config, candidate.name, {}, place)
            return candidate.name
        except UserError:
            continue
    return family


def sides(job: Export, inside: Path) -> Sides:
    """What --verify compares: the tensors as they will be, since a change of type is no divergence."""

    def ours() -> dict[str, Tensor]:
        return {name: job.cast(name, tensor) for name, tensor in job.source.map().items()}

    return Sides(job.plan, job.values, ours, lambda: whole(inside).map())


def find_form(
    config: Any, family: str, before: Mapping[str, Any], place: str
) -> tuple[tuple[Family, Form], dict[str, Any]]:
    """The family and form that express a config tree, and the config.json that does; raises UserError if none can."""
    families = list(FAMILIES) if family == "auto" else [by_name()[family]]
    origin = before.get("model_type")
    families = [f for f in families if origin in f.types] or families
    stated = (before.get("architectures") or [None])[0]
    reasons: list[Problem] = []
    for candidate in families:
        for form in sorted(candidate.forms, key=lambda form: (form.name != stated, not form.fits(before))):
            if set(form.heads) != set(config.heads):
                continue
            try:
                return (candidate, form), express(
                    candidate, form, config, before if origin in candidate.types else {}, place
                )
            except Unexpressed as reason:
                reasons.append(Problem(f"{form.name} cannot express this model: {reason}", place))
    # A class for another kind of graph says nothing about what stands in the way.
    near = [reason for reason in reasons if f"model: is '{config.kind}'" not in reason.cause]
    reasons = near or reasons
    if not reasons:
        names = "+".join(config.heads) or "no"
        raise refuse(f"no class of {', '.join(f.title for f in families)} has {names} heads", place=place)
    raise UserError(*reasons)


def express(family: Family, form: Form, config: Config, before: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A config.json that means `config`; raises Unexpressed where there is none."""
    if before and not _differs(family, form, before, config, place):
        return dict(before)
    found: dict[str, Any] = {}
    dump(family.template(form), settle(tree(config)), found)
    fresh = {"architectures": [form.name], "model_type": family.types[0]}
    values = {**before, **found, **fresh}
    off = _differs(family, form, values, config, place)
    if off:
        raise Unexpressed(off)
    for key in found if before else ():
        # What the old file said, or left out, stays as long as it means the same.
        old = {name: value for name, value in values.items() if name != key}
        old |= {key: before[key]} if key in before else {}
        if not _differs(family, form, old, config, place):
            values = old
    return values


def _differs(family: Family, form: Form, values: Mapping[str, Any], config: Config, place: str) -> str:
    try:
        meant = read_config(family, form, values, f"{place}/{CONFIG}")
    except UserError as error:
        return str(error.problems[0])
    off = difference(config, meant)
    return off and (unlike(settle(tree(config)), settle(tree(meant))) or off)


def _check(source: Source, kept: Source | None, plan: Plan, like: Mapping[str, Tensor], folder: Path) -> None:
    """Raise UserError unless the files hold what the preset and the plan say."""
    problems = []
    names = {*source.entries, *source.ties}
    for name in sorted({*like} - names):
        problems.append(Problem(f"tensor '{name}' is missing", str(folder)))
    for name in sorted(names - {*like}):
        problems.append(
            Problem(f"tensor '{name}' has no place in the model", str(folder), remedy=did_you_mean(name, like))
        )
    for name in sorted(names & {*like}):
        shape = source.entries[source.ties.get(name, name)].shape
        if shape != tuple(like[name].shape):
            problems.append(
                Problem(f"tensor '{name}' has shape {shape}, the preset wants {tuple(like[name].shape)}", str(folder))
            )
    for name, entry in (kept.entries if kept else {}).items():
        if plan.kept([name]) != {name: entry.shape}:
            problems.append(
                Problem(f"kept tensor '{name}' {entry.shape} has no place in {plan.form.name}", str(folder))
            )
    if problems:
        raise UserError(*problems[:20])


def _labelled(values: dict[str, Any], names: Sequence[str] | None) -> dict[str, Any]:
    """config.json with the names of the labels that the model was trained on, where they are as many."""
    before = values.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    named = {str(number): name for number, name in enumerate(names or ())}
    if len(named) != len(before) or named == before:
        return values
    return values | {"id2label": named, "label2id": {name: int(number) for number, name in named.items()}}


def _spoken(values: dict[str, Any], form: tuple[Family, Form], config: Any, folder: Path) -> dict[str, Any]:
    """A new config.json with the ids that texts begin and end with, which the reference's own defaults would get wrong.

    They are the tokenizer's; a decoder whose start is left open starts with the padding, there as here.
    """
    found = dict(values)
    if (folder / TOKENIZER).is_file():
        special = Tokenizer.load(folder).special
        found = {f"{role}_token_id": special.get(role) for role in ("bos", "eos")} | found
    if found.get(START, 0) is None:
        found[START] = config.pad
    return values if _differs(*form, found, config, str(folder)) else found


def _typed(values: dict[str, Any], source: Source, cast: Cast, fresh: bool) -> dict[str, Any]:
    """config.json with the type of the weights, where it is new or the type is being changed."""
    types = {cast.type(entry.dtype) for entry in source.entries.values()}
    if len(types) != 1 or not (fresh or cast.dtype is not None):
        return values
    return values | {"torch_dtype" if "torch_dtype" in values else "dtype": label(types.pop())}


def describe(job: Export, target: str) -> Report:
    """The report as far as it is known before anything is written."""
    for entry in (*job.source.entries.values(), *(job.kept.entries.values() if job.kept else ())):
        job.cast.count(entry.dtype)
    kept = set(job.kept.entries) if job.kept else set()
    return Report(
        family=job.plan.family.name,
        architecture=job.plan.form.name,
        to="hf",
        source=str(job.folder),
        target=target,
        tensors=len(job.source.entries) + len(kept),
        bytes=job.source.nbytes + (job.kept.nbytes if job.kept else 0),
        dtypes=dict(counted(job.source)),
        ties=[f"{alias} = {main}" for alias, main in sorted(job.plan.ties.items())],
        kept=sorted(kept),
        invented=sorted(set(job.plan.dead) - kept),
        retyped=job.cast.changed,
    )


def write(job: Export, inside: Path, report: Report) -> None:
    """All files but the manifest."""
    sizes = {name: (job.dtype(move.ours), job.plan.shapes[name]) for move in job.plan.moves for name in move.theirs}
    usual = next(iter(sizes.values()))[0]
    kept = job.kept.entries if job.kept else {}
    sizes |= {name: (job.cast.type(entry.dtype), entry.shape) for name, entry in kept.items()}
    # Waves and counts keep the type that they are made in.
    invented = {name: job.plan.invented(name) for name in report.invented}
    invented = {name: value.to(usual) if value.is_floating_point() else value for name, value in invented.items()}
    sizes |= {name: (value.dtype, job.plan.dead[name]) for name, value in invented.items()}
    with Writer(inside, sizes) as writer:
        for move in job.plan.moves:
            for name, tensor in to_theirs(move, job.get).items():
                writer.put(name, job.cast(name, tensor))
        for name, entry in kept.items():
            writer.put(name, job.cast(name, entry.read()))
        for name, value in invented.items():
            writer.put(name, value)
    if job.values == job.before:
        shutil.copyfile(job.folder / REFERENCE / CONFIG, inside / CONFIG)
    else:
        (inside / CONFIG).write_text(json.dumps(job.values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    report.companions = copy_companions(job.folder, inside)
    report.missing = write_images(job.images, job.plan.config, inside)
    report.rounding = job.cast.rounding
    report.bit_exact = not job.cast.changed and unchanged(job, inside)


def unchanged(job: Export, inside: Path) -> bool:
    """Whether what was written, read back, gives every byte of the source again."""
    written = whole(inside)
    for move in job.plan.moves:
        for name, tensor in zip(move.ours, forward(move, written.read, job.like), strict=True):
            if not same_bits(tensor, job.get(name)):
                raise AssertionError(f"{name} came back changed")
    return True
