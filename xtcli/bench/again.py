"""`--rerun FILE`: the configuration of a result file measured once more, under the same conditions or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from xtcli.bench import attention, generation, race, results, training
from xtcli.config.train import TrainConfig
from xtcli.errors import refuse
from xtcli.train.device import Place, choose


def repeat(before: Mapping[str, Any], place_of_file: str, talk: Callable[[str], None]) -> dict[str, Any]:
    """The new result; raises UserError, before any work where that can be told, when it could not be compared."""
    kind, facts = before["kind"], before["config"]
    if kind == "attention":
        config = attention.Config.read(facts)
        place = _place(config.device, config.dtype, before, place_of_file)
        now = attention.run(config, place, talk)
    elif kind == "generate":
        asked = generation.Config.read(facts)
        place = _place(asked.device, asked.dtype, before, place_of_file)
        now = generation.run(asked, place, talk)
    elif kind == "train":
        now = training.run(training.Config.read(facts), talk)
    elif kind == "race":
        now = race.run(race.Config.read(facts), talk)
    else:
        raise refuse(f"'{place_of_file}' holds a result of kind {kind}, which this xt does not measure")
    results.check_conditions(before, now, place_of_file)
    return now


def _place(device: str, dtype: str, before: Mapping[str, Any], file: str) -> Place:
    place = choose(TrainConfig.model_validate({"device": device, "precision": dtype}))
    here = {"device": place.name, "dtype": place.precision}
    results.check_conditions(before, {"conditions": {**before["conditions"], **here}}, file)
    return place
