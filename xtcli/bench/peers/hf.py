"""transformers: the class that `xt convert --to hf` would name, in the same process.

Trained as its users write the loop: float32 weights under autocast, fused AdamW, torch.compile of the whole model
where ours compiles. Written with `generate`, greedy, over a dynamic cache, and on a GPU over a static one too, which
`generate` compiles by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from xtcli.bench.peers import Unmatched
from xtcli.bench.peers.exported import Exported
from xtcli.bench.peers.stepped import Setting, Stepped, described, groups
from xtcli.data.batch import IGNORE, Batch

LABELS = {"nsp": "next_sentence_label"}
"""Head -> the argument that takes its targets; the others answer `labels`."""


def model(given: Exported, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Their model with these weights; raises Unmatched where the class has other tensors."""
    import transformers

    transformers.logging.set_verbosity_error()
    cls: Any = getattr(transformers, given.architecture)
    config = cls.config_class.from_dict(dict(given.values))
    attention = "sdpa" if getattr(cls, "_supports_sdpa", False) else "eager"
    with torch.device(device):
        made: nn.Module = cls._from_config(config, attn_implementation=attention, torch_dtype=dtype)
    missing, unexpected = made.load_state_dict(dict(given.tensors), strict=False)
    tied: Any = made._tied_weights_keys or ()
    missing = [name for name in missing if name not in given.free and name not in tied]
    if missing or unexpected:
        raise Unmatched(f"{given.architecture} has other tensors: {', '.join([*missing, *unexpected][:3])}")
    made.tie_weights()  # type: ignore[operator]
    # Not from_pretrained, so that training mode is what a new module has.
    return made.eval()


def train(ours: Setting, given: Exported, compiled: bool, path: None) -> Stepped:
    """The same network under the same optimizer, clipping, number format and compiler."""
    config, place = ours.config, ours.place
    theirs = model(given, place.device, torch.float32).train()
    causal = ours.causal and "decoder_input_ids" not in ours.batch.inputs
    whole = sum(ours.batch.supervised().values())
    shares = ours.batch.split(ours.plan.micro_batch)
    parts = [(arguments(share, causal), sum(share.supervised().values()) / whole) for share in shares]
    optimizer = torch.optim.AdamW(
        groups(theirs, config.weight_decay), lr=config.lr, betas=config.betas, eps=config.eps, fused=True
    )
    call: Any = torch.compile(theirs) if compiled else theirs
    return Stepped(
        given.architecture,
        theirs,
        optimizer,
        parts,
        loss=lambda **inputs: call(**inputs).loss,
        plain=lambda **inputs: theirs(**inputs).loss,
        rate=ours.rate,
        clip=config.clip,
        amp=place.amp,
        note=f"{described(place, compiled)}, {attention_of(theirs)} attention, AdamW fused",
    )


def attention_of(theirs: nn.Module) -> str:
    """Which of its attentions a model runs: a class without PyTorch's fused one writes its scores out."""
    return str(theirs.config._attn_implementation)  # type: ignore[union-attr]


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


class Writer:
    """Their `generate`, greedy; `cache` is static or None for their usual one."""

    def __init__(self, model: Any, prompts: list[list[int]], start: int | None, cache: str | None) -> None:
        self.model, self.both = model.eval(), start is not None
        self.ids = torch.tensor(prompts, device=model.device)
        self.extra: dict[str, Any] = {} if cache is None else {"cache_implementation": cache}
        self.extra |= {} if start is None else {"decoder_start_token_id": start}

    def write(self, new: int) -> list[list[int]]:
        """The new tokens of each row."""
        made: Tensor = self.model.generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            do_sample=False,
            max_new_tokens=new,
            min_new_tokens=new,
            eos_token_id=None,
            pad_token_id=0,
            **self.extra,
        )
        before = 1 if self.both else self.ids.shape[1]
        return made[:, before:].tolist()


def write(
    given: Exported,
    prompts: list[list[int]],
    start: int | None,
    room: int,
    device: torch.device,
    dtype: torch.dtype,
    path: None,
) -> dict[str, Writer]:
    """The ways in which they write, by what tells them apart."""
    theirs = model(given, device, dtype)
    found = {"dynamic cache": Writer(theirs, prompts, start, None)}
    if device.type == "cuda":
        found["static cache"] = Writer(theirs, prompts, start, "static")
    return found
