"""The same network in transformers, with the same weights, trained and asked in the same process.

The weights travel as a checkpoint that `xt convert --to hf` would write, in a temporary folder. What no conversion
family expresses has no reference, and `Unmatched` says why.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xtcli.bench.stepping import Bench
from xtcli.config.preset import Resolved
from xtcli.convert import convert
from xtcli.data.batch import IGNORE, Batch
from xtcli.errors import UserError, refuse
from xtcli.model import Model, save_model

REFERENCE = "transformers"
LABELS = {"nsp": "next_sentence_label"}
"""Head -> the argument that takes its targets; the others answer `labels`."""


class Unmatched(Exception):
    """The reference cannot express this model."""


def check_installed(against: str | None) -> None:
    """Refuse to compare where there is nothing to compare with."""
    if against is None:
        return
    if against != REFERENCE:
        raise refuse(f"there is no reference '{against}'", f"write --against {REFERENCE}", place="--against")
    if importlib.util.find_spec(REFERENCE) is None:
        raise refuse("transformers is not installed", "pip install transformers==4.57.6", place="--against")


def reference(model: Model, resolved: Resolved, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, str]:
    """Their model with the weights of ours, and the name of its class; raises Unmatched."""
    import transformers

    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as place:
        ours, theirs = Path(place) / "ours", Path(place) / "theirs"
        save_model(model, ours, resolved.to_yaml())
        try:
            report = convert(ours, theirs, to="hf")
        except UserError as error:
            causes = "; ".join(problem.cause for problem in error.problems[:2])
            raise Unmatched(causes) from None
        cls = getattr(transformers, report.architecture)
        made = cls.from_pretrained(str(theirs), attn_implementation=_attention(cls), torch_dtype=dtype)
    found: nn.Module = made.to(device)
    return found, report.architecture


def _attention(cls: Any) -> str:
    return "sdpa" if getattr(cls, "_supports_sdpa", False) else "eager"


class Trained:
    """The reference under the same optimizer, clipping, number format and compiler; `losses` are noted."""

    def __init__(self, ours: Bench, compiled: bool) -> None:
        config, place = ours.trainer.config, ours.place
        self.place, self.clip = place, config.clip
        self.model, self.architecture = reference(ours.model, ours.resolved, place.device, torch.float32)
        self.model.train()
        self.losses: list[float] = []
        causal = ours.model.causal and "decoder_input_ids" not in ours.batch.inputs
        whole = sum(ours.batch.supervised().values())
        shares = ours.batch.split(ours.plan.micro_batch)
        self.parts = [(arguments(share, causal), sum(share.supervised().values()) / whole) for share in shares]
        decayed = [p for p in self.model.parameters() if p.ndim >= 2]
        plain = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        self.rate, self.count = ours.trainer.rate, 0
        self.call: Callable[..., Any] = torch.compile(self.model) if compiled else self.model

    def check(self) -> float:
        """The loss of the first micro-batch without dropout."""
        self.model.eval()
        with torch.no_grad(), self.place.amp():
            loss = float(self.model(**self.parts[0][0]).loss)
        self.model.train()
        return loss

    def step(self) -> None:
        """One optimizer step, as users of transformers write it."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.count)
        total = torch.zeros((), device=self.place.device)
        for given, weight in self.parts:
            with self.place.amp():
                loss = self.call(**given).loss * weight
            loss.backward()
            total += loss.detach()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(float(total))
        self.count += 1


def arguments(batch: Batch, causal: bool) -> dict[str, Tensor]:
    """A batch as transformers takes it: its causal models shift the labels themselves."""
    given = dict(batch.inputs)
    for head, target in batch.targets.items():
        name = LABELS.get(head, "labels")
        if causal and head == "lm":
            first = torch.full_like(target[:, :1], IGNORE)
            target = torch.cat([first, target[:, :-1]], 1)
        given[name] = target
    return given


def agree(ours: float, theirs: float, precision: str) -> bool:
    """Whether two first losses are those of the same network."""
    return abs(ours - theirs) <= (1e-3 if precision == "fp32" else 3e-2) * max(abs(theirs), 1.0)
