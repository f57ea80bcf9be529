"""nanoGPT, from the user's own copy of it: one training loop, as its train.py runs.

Autocast in the number format of our products, torch.compile of the whole model where ours compiles, its own optimizer
(AdamW, fused on a GPU), clipping, and its vocabulary filled up to a multiple of 64 on a GPU, as its default does. Its
feed-forward has the exact GELU alone: where ours is the tanh form the first losses differ by less than what bfloat16
rounds.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import torch
from torch import Tensor

from xtcli.bench.peers import Unmatched, load
from xtcli.bench.peers.exported import Exported
from xtcli.bench.peers.stepped import Setting, Stepped, described
from xtcli.data.batch import IGNORE

MULTIPLE = 64
TURNED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
"""Weights that the exported form has as (in, out)."""


def train(ours: Setting, given: Exported, compiled: bool, path: Path) -> Stepped:
    """Its model with the weights of ours; raises Unmatched."""
    if given.architecture != "GPT2LMHeadModel":
        raise Unmatched(f"it is a GPT-2 with a language-model head, this is {given.architecture}")
    values = given.values
    given.must(activation_function=("gelu_new", "gelu", "gelu_pytorch_tanh"), layer_norm_epsilon=1e-5)
    given.must(n_inner=(None, 4 * values["n_embd"]), scale_attn_weights=(True, None), tie_word_embeddings=(True, None))
    given.must(scale_attn_by_inverse_layer_idx=(False, None), add_cross_attention=(False, None))
    rates = {values[name] for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    if len(rates) > 1:
        raise Unmatched(f"it has one rate of dropout, here are {sorted(rates)}")
    code = load(path, "GPT", "GPTConfig")
    config, place, vocab = ours.config, ours.place, values["vocab_size"]
    gpu = place.device.type == "cuda"
    # It tells its size on stdout.
    with contextlib.redirect_stdout(io.StringIO()):
        sizes = code.GPTConfig(
            block_size=values["n_positions"],
            vocab_size=-(-vocab // MULTIPLE) * MULTIPLE if gpu else vocab,
            n_layer=values["n_layer"],
            n_head=values["n_head"],
            n_embd=values["n_embd"],
            dropout=rates.pop(),
            bias=True,
        )
        theirs = code.GPT(sizes)
        _fill(theirs.state_dict(), given)
        theirs.to(place.device)
        optimizer = theirs.configure_optimizers(config.weight_decay, config.lr, config.betas, place.device.type)
    parts = []
    whole = sum(ours.batch.supervised().values())
    for share in ours.batch.split(ours.plan.micro_batch):
        targets = share.targets["lm"]
        inputs = {"idx": share.inputs["input_ids"], "targets": targets.masked_fill(targets == IGNORE, -1)}
        parts.append((inputs, sum(share.supervised().values()) / whole))
    turns = "" if values["activation_function"] == "gelu" else ", the exact GELU in place of the tanh form"
    call = torch.compile(theirs) if compiled else theirs
    note = f"{described(place, compiled)}, its AdamW{' fused' if gpu else ''}"
    return Stepped(
        "GPT",
        theirs.train(),
        optimizer,
        parts,
        loss=lambda **inputs: call(**inputs)[1],
        plain=lambda **inputs: theirs(**inputs)[1],
        rate=ours.rate,
        clip=config.clip,
        amp=place.amp,
        note=f"{note}, vocabulary of {sizes.vocab_size:,}{turns}",
    )


def _fill(own: dict[str, Tensor], given: Exported) -> None:
    """Write the weights into its tensors; rows that only fill up the vocabulary stay zero."""
    left = dict(given.tensors)
    with torch.no_grad():
        for name, tensor in own.items():
            if name == "lm_head.weight":
                continue
            if name not in left:
                raise Unmatched(f"it has a tensor '{name}' that this model has not")
            source = left.pop(name)
            source = source.t() if name.endswith(TURNED) else source
            tensor.zero_()[: source.shape[0]].copy_(source)
    if left:
        raise Unmatched(f"it has no tensor '{next(iter(left))}'")
