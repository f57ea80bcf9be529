"""gpt-fast, from the user's own copy of it: LLaMA's structure written as its generate.py does.

A static cache, the prompt in one eager pass, then one token at a time by a step that torch.compile captures into a
graph (mode reduce-overhead, fullgraph, coordinate descent tuning) with attention in plain tensors. The likeliest token
is taken; its own sampling would do more work.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from xtcli.bench.peers import Unmatched, llamas, load
from xtcli.bench.peers.exported import Exported


class Writer:
    """Its decoding loop; the host sees no token before the end."""

    def __init__(self, model: Any, prompts: list[list[int]], room: int, device: torch.device) -> None:
        self.model, self.ids = model, torch.tensor(prompts, device=device)
        with torch.device(device):
            model.setup_caches(max_batch_size=len(prompts), max_seq_length=self.ids.shape[1] + room)
        self.step: Any = _likeliest
        if device.type == "cuda":
            import torch._inductor as inductor

            options = inductor.list_mode_options("reduce-overhead")
            options |= {"coordinate_descent_tuning": True, "triton.unique_kernel_names": True}
            self.step = torch.compile(_likeliest, options=options, fullgraph=True)

    @torch.no_grad()
    def write(self, new: int) -> list[list[int]]:
        """The new tokens of each row."""
        device, length = self.ids.device, self.ids.shape[1]
        token = _likeliest(self.model, self.ids, torch.arange(length, device=device)).clone()
        place = torch.tensor([length], device=device, dtype=torch.int)
        made = [token]
        for _ in range(new - 1):
            with sdpa_kernel(SDPBackend.MATH):
                token = self.step(self.model, token, place).clone()
            place += 1
            made.append(token)
        return torch.cat(made, 1).tolist()


def _likeliest(model: Any, ids: Tensor, places: Tensor) -> Tensor:
    """The likeliest token behind ids (B, T) at `places` (T,): (B, 1)."""
    return model(ids, places)[:, -1].argmax(-1, keepdim=True)  # type: ignore[no-any-return]


def write(
    given: Exported,
    prompts: list[list[int]],
    start: int | None,
    room: int,
    device: torch.device,
    dtype: torch.dtype,
    path: Path,
) -> dict[str, Writer]:
    """Its model with the weights of ours; raises Unmatched."""
    llamas.check(given)
    code = load(path, "Transformer", "ModelArgs")
    size = llamas.sizes(given)
    args = code.ModelArgs(
        block_size=size["context"],
        vocab_size=size["vocab"],
        n_layer=size["layers"],
        n_head=size["heads"],
        dim=size["dim"],
        intermediate_size=size["hidden"],
        n_local_heads=size["groups"],
        rope_base=size["theta"],
        norm_eps=size["eps"],
    )
    with torch.device("meta"):
        theirs = code.Transformer(args)
    theirs = theirs.to_empty(device=device).to(dtype).eval()
    own = theirs.state_dict()
    table, norm, head = llamas.ends(given)
    with torch.no_grad():
        for name, source in (("tok_embeddings", table), ("norm", norm), ("output", head)):
            own.pop(f"{name}.weight").copy_(source)
        for at, layer in enumerate(llamas.layers(given, size["layers"])):
            turned = (_paired(layer["q"], size["heads"]), _paired(layer["k"], size["groups"]), layer["v"])
            places = {"attention.wqkv": torch.cat(turned), "attention.wo": layer["o"]}
            places |= {"feed_forward.w1": layer["gate"], "feed_forward.w3": layer["up"]}
            places |= {"feed_forward.w2": layer["down"]}
            places |= {"attention_norm": layer["norm_attn"], "ffn_norm": layer["norm_ffn"]}
            for name, source in places.items():
                own.pop(f"layers.{at}.{name}.weight").copy_(source)
    if own:
        raise Unmatched(f"it has a tensor '{next(iter(own))}' that this model has not")
    return {"": Writer(theirs, prompts, room, device)}


def _paired(weight: Tensor, heads: int) -> Tensor:
    """Rows of a projection whose rotation turns halves of a head against each other, for one that turns neighbours."""
    halves = weight.unflatten(0, (heads, 2, -1))
    turned: Tensor = halves.transpose(1, 2).reshape(weight.shape)
    return turned
