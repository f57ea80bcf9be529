"""What the peers of LLaMA's structure share: what they must not be asked for, and where weights stand."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from xtcli.bench.peers import Unmatched
from xtcli.bench.peers.exported import Exported


def check(given: Exported) -> None:
    """Raise Unmatched unless it is LLaMA's plain structure."""
    if given.architecture != "LlamaForCausalLM":
        raise Unmatched(f"only LLaMA's structure is compared, this is {given.architecture}")
    given.must(hidden_act="silu", attention_bias=(False, None), mlp_bias=(False, None), rope_scaling=None)
    given.must(attention_dropout=(0.0, None))
    values = given.values
    width = values["hidden_size"] // values["num_attention_heads"]
    given.must(head_dim=(None, width))


def sizes(given: Exported) -> dict[str, Any]:
    """layers, heads, groups, dim, hidden, vocab, context, theta, eps."""
    values = given.values
    return {
        "layers": values["num_hidden_layers"],
        "heads": values["num_attention_heads"],
        "groups": values.get("num_key_value_heads") or values["num_attention_heads"],
        "dim": values["hidden_size"],
        "hidden": values["intermediate_size"],
        "vocab": values["vocab_size"],
        "context": values["max_position_embeddings"],
        "theta": values.get("rope_theta", 10000.0),
        "eps": values["rms_norm_eps"],
    }


def layers(given: Exported, count: int) -> list[dict[str, Tensor]]:
    """The matrices and norms of each layer: q k v o, gate up down, norm_attn norm_ffn."""
    names = {name: f"self_attn.{name}_proj" for name in "qkvo"}
    names |= {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    names |= {"norm_attn": "input_layernorm", "norm_ffn": "post_attention_layernorm"}
    tensors = given.tensors
    return [{key: tensors[f"model.layers.{at}.{name}.weight"] for key, name in names.items()} for at in range(count)]


def ends(given: Exported) -> tuple[Tensor, Tensor, Tensor]:
    """The token table, the last norm and the head's matrix."""
    table = given.tensors["model.embed_tokens.weight"]
    return table, given.tensors["model.norm.weight"], given.tensors.get("lm_head.weight", table)
