"""A checkpoint of theirs -> an xt checkpoint.

    DST/ preset.yaml  model.safetensors  reference/config.json  [reference/kept.safetensors]  convert.json
         [tokenizer.json and its like]  manifest.json

`reference/` holds what the network does not need and the way back does: config.json as it was, and the
tensors that nothing reads.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xtcli.convert.casts import Cast
from xtcli.convert.checks import check, counted, label
from xtcli.convert.companions import Vocabulary, copy_companions, vocabulary
from xtcli.convert.engine import backward, same_bits, to_ours
from xtcli.convert.files import Source, Writer, open_source
from xtcli.convert.images import read_images
from xtcli.convert.pickles import unpickled
from xtcli.convert.plan import Claims, Plan
from xtcli.convert.preset import preset_yaml
from xtcli.convert.reading import CONFIG, find_family, read, read_json, skeleton
from xtcli.convert.report import Report
from xtcli.convert.verify import Sides
from xtcli.data.images import ImageConfig
from xtcli.errors import refuse

Commit = Callable[[Report, Callable[[Path], None], Callable[[Path], Mapping[str, Sides]]], None]
"""Makes the folder: takes the report, what writes the files into a folder, and what --verify compares then."""

REFERENCE = "reference"
KEPT = "kept"


@dataclass(frozen=True)
class Import:
    """A source that has been read and checked, and what it will become."""

    folder: Path
    source: Source
    values: Mapping[str, Any]
    plan: Plan
    claims: Claims
    like: Mapping[str, Tensor]
    cast: Cast
    vocabulary: Vocabulary
    images: ImageConfig | None

    def get(self, name: str) -> Tensor:
        """A tensor of theirs by the plan's name."""
        return self.source.read(self.claims.source[name])

    def dtype(self, names: tuple[str, ...]) -> torch.dtype:
        """The type that the tensors made of these will have."""
        return self.cast.type(self.source.entries[self.claims.source[names[0]]].dtype)


def import_checkpoint(
    folder: Path,
    family: str,
    cast: Cast,
    scratch: Path | None,
    commit: Commit,
    target: str,
) -> Report:
    """Read and check a checkpoint of theirs, and hand what writes ours to `commit`.

    scratch: where pickled weights may be rewritten; None refuses pickles.
    """
    values = read_json(folder / CONFIG)
    chosen = find_family(family, values, str(folder / CONFIG))
    with nullcontext(folder) if scratch is None else unpickled(folder, scratch) as weights:
        source = open_source(weights)
        if source is None:
            raise no_weights(folder)
        plan, claims = read(chosen, values, list(source.entries), str(folder))
        check(plan, claims, source, str(folder))
        plan = replace(plan, config=with_settings(plan.config, folder))
        like = skeleton(plan.config, str(folder))
        config: Any = plan.config
        beside = vocabulary(folder, config.vocab > 1), read_images(folder, config)
        job = Import(folder, source, values, plan, claims, like, cast, *beside)
        report = describe(job, target)
        commit(report, lambda inside: write(job, inside, report), lambda inside: {"": sides(job, inside)})
    return report


SETTINGS = {
    "start": "decoder_start_token_id",
    "first": "forced_bos_token_id",
    "last": "forced_eos_token_id",
}
"""Ids of a graph's config that the generation settings beside config.json may state."""


def with_settings(config: Any, folder: Path) -> Any:
    """The graph's config with what `generation_config.json` says of the ids that texts begin and end with."""
    file = folder / "generation_config.json"
    stated = read_json(file) if file.exists() else {}
    found = {name: stated.get(key) for name, key in SETTINGS.items() if name in type(config).model_fields}
    return config.model_copy(update={name: value for name, value in found.items() if isinstance(value, int)})


def sides(job: Import, inside: Path) -> Sides:
    """What --verify compares: the tensors as they will be, since a change of type is no divergence."""

    def theirs() -> dict[str, Tensor]:
        found = job.source.map()
        return {name: job.cast(name, found[given]) for name, given in job.claims.source.items()}

    return Sides(job.plan, job.values, lambda: whole(inside).map(), theirs)


def no_weights(folder: Path) -> Exception:
    """What to say of a folder without safetensors."""
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        return refuse(
            f"has its weights in a pickle ({pickles[0]}), which can run programs when it is read",
            "use --allow-pickle if you trust where it comes from",
            place=str(folder),
        )
    return refuse(
        "has no model.safetensors and no index of shards", "give the folder of a checkpoint", place=str(folder)
    )


def describe(job: Import, target: str) -> Report:
    """The report as far as it is known before anything is written."""
    claims = job.claims
    config: Any = job.plan.config
    for name in claims.source:
        if name not in claims.dropped and name not in claims.tied:
            job.cast.count(job.source.entries[claims.source[name]].dtype)
    return Report(
        family=job.plan.family.name,
        architecture=job.plan.form.name,
        to="xt",
        source=str(job.folder),
        target=target,
        tensors=len(job.source.entries),
        bytes=job.source.nbytes,
        dtypes=dict(counted(job.source)),
        ties=[f"{alias} = {main}" for alias, main in sorted(job.plan.ties.items())],
        drops=sorted(claims.dropped),
        kept=sorted(claims.kept),
        renamed=sorted(claims.renamed),
        retyped=job.cast.changed,
        heads=list(config.heads),
        tokenizer=job.vocabulary.made,
        missing=job.vocabulary.missing,
    )


def write(job: Import, inside: Path, report: Report) -> None:
    """All files but the manifest."""
    sizes = {
        name: (job.dtype(move.theirs), tuple(job.like[name].shape)) for move in job.plan.moves for name in move.ours
    }
    with Writer(inside, sizes) as writer:
        for move in job.plan.moves:
            for name, tensor in to_ours(move, job.get, job.like).items():
                writer.put(name, job.cast(name, tensor))
    (inside / REFERENCE).mkdir()
    _keep_config(job, inside / REFERENCE / CONFIG)
    held = {name: job.source.entries[job.claims.source[name]].shape for name in job.plan.kept(job.claims.source)}
    kept = {name: (job.dtype((name,)), shape) for name, shape in held.items()}
    if kept:
        with Writer(inside / REFERENCE, kept, KEPT) as writer:
            for name in kept:
                writer.put(name, job.cast(name, job.get(name)))
    report.companions = copy_companions(job.folder, inside) + job.vocabulary.write(inside)
    preset = preset_yaml(job.plan, job.values, job.folder.name, job.images)
    (inside / "preset.yaml").write_text(preset, encoding="utf-8")
    report.rounding = job.cast.rounding
    report.bit_exact = not job.cast.changed and unchanged(job, inside)


def _keep_config(job: Import, target: Path) -> None:
    """config.json byte for byte; where the type changes, with the new type."""
    key = next((key for key in ("dtype", "torch_dtype") if key in job.values), None)
    if job.cast.dtype is None or key is None:
        shutil.copyfile(job.folder / CONFIG, target)
    else:
        text = json.dumps({**job.values, key: label(job.cast.dtype)}, indent=2)
        target.write_text(text + "\n", encoding="utf-8")


def whole(inside: Path) -> Source:
    """The tensors that have been written."""
    written = open_source(inside)
    assert written is not None
    return written


def unchanged(job: Import, inside: Path) -> bool:
    """Whether what was written, read back, gives every byte of the source again."""
    written = whole(inside)
    for move in job.plan.moves:
        for name, tensor in zip(move.theirs, backward(move, written.read), strict=True):
            if not same_bits(tensor, job.get(name)):
                raise AssertionError(f"{name} came back changed")
    kept = open_source(inside / REFERENCE, KEPT)
    for name in kept.entries if kept else ():
        if kept is None or not same_bits(kept.read(name), job.get(name)):
            raise AssertionError(f"{name} came back changed")
    return True
