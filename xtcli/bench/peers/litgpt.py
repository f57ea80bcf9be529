"""litgpt, the package: LLaMA's structure trained as `litgpt pretrain` does.

Weights, gradients and optimizer state in bfloat16 where ours multiplies in it ("bf16-true"), torch.compile of the whole
model, fused AdamW on a GPU, clipping, and its cross-entropy in chunks.
"""

from __future__ import annotations

from typing import Any

import torch

from xtcli.bench.peers import Unmatched, llamas
from xtcli.bench.peers.exported import Exported
from xtcli.bench.peers.stepped import Setting, Stepped
from xtcli.errors import refuse

MULTIPLE = 64


def train(ours: Setting, given: Exported, compiled: bool, path: None) -> Stepped:
    """Its model with the weights of ours; raises Unmatched."""
    try:
        from litgpt.config import Config
        from litgpt.model import GPT
        from litgpt.utils import chunked_cross_entropy
    except ImportError as error:
        raise refuse(f"litgpt cannot be imported: {error}", "install what it needs", place="--against") from None

    llamas.check(given)
    if "lm_head.weight" not in given.tensors:
        raise Unmatched("its head has a matrix of its own, this one's is the token table")
    config, place, size = ours.config, ours.place, llamas.sizes(given)
    made = Config(
        name="same sizes",
        block_size=size["context"],
        vocab_size=size["vocab"],
        padding_multiple=MULTIPLE,
        n_layer=size["layers"],
        n_head=size["heads"],
        n_query_groups=size["groups"],
        n_embd=size["dim"],
        intermediate_size=size["hidden"],
        rotary_percentage=1.0,
        rope_base=int(size["theta"]),
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=size["eps"],
        mlp_class_name="LLaMAMLP",
    )
    with torch.device(place.device):
        theirs = GPT(made)
    own = theirs.state_dict()
    table, norm, head = llamas.ends(given)
    with torch.no_grad():
        for name, source in (("transformer.wte", table), ("transformer.ln_f", norm), ("lm_head", head)):
            own.pop(f"{name}.weight").zero_()[: source.shape[0]].copy_(source)
        for at, layer in enumerate(llamas.layers(given, size["layers"])):
            joined = torch.cat((layer["q"], layer["k"], layer["v"]))
            places = {"norm_1": layer["norm_attn"], "attn.qkv": joined, "attn.proj": layer["o"]}
            places |= {"norm_2": layer["norm_ffn"], "mlp.fc_1": layer["gate"], "mlp.fc_2": layer["up"]}
            places["mlp.proj"] = layer["down"]
            for name, source in places.items():
                own.pop(f"transformer.h.{at}.{name}.weight").copy_(source)
    if own:
        raise Unmatched(f"it has a tensor '{next(iter(own))}' that this model has not")
    theirs.to(place.dtype).train()
    gpu = place.device.type == "cuda"
    rates: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    optimizer = torch.optim.AdamW(theirs.parameters(), **rates, weight_decay=config.weight_decay, fused=gpu)
    whole = sum(ours.batch.supervised().values())
    parts = [
        ({"idx": rows.inputs["input_ids"], "targets": rows.targets["lm"]}, sum(rows.supervised().values()) / whole)
        for rows in ours.batch.split(ours.plan.micro_batch)
    ]
    call = torch.compile(theirs) if compiled else theirs
    kind = place.precision.removesuffix("-true")
    return Stepped(
        "GPT",
        theirs,
        optimizer,
        parts,
        loss=lambda idx, targets: chunked_cross_entropy(call(idx), targets),
        plain=lambda idx, targets: chunked_cross_entropy(theirs(idx), targets),
        rate=ours.rate,
        clip=config.clip,
        note=f"{kind} weights and state, {'compiled whole' if compiled else 'not compiled'}, "
        f"AdamW{' fused' if gpu else ''}",
    )
