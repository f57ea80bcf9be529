"""Every option of the x-transformers README as a change of a small model's config, for tests that combine them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

DIM, VOCAB, HEADS = 16, 29, 2
KINDS = ("decoder", "encoder", "encoder-decoder")
ORDER = ("residual", "talking-heads", "softcap", "top-k", "entmax")
Tree = dict[str, Any]


def base(kind: str) -> Tree:
    """A model without options."""
    attention = {"kind": "attention", "heads": HEADS, "bias": False}
    sublayers: Tree = {"attn": attention, "ffn": {"kind": "mlp", "hidden": 24}}
    side: Tree = {"stack": {"layers": 2, "position": [], "block": {"wiring": {"kind": "pre"}, "sublayers": sublayers}}}
    tree: Tree = {"vocab": VOCAB, "dim": DIM, "context": 24, "pad": 0, "heads": {"lm": {"tied": False}}}
    if kind != "encoder-decoder":
        return tree | side | ({"heads": {"mlm": {"tied": False}}} if kind == "encoder" else {})
    writes = copy.deepcopy(side)
    cross = {"kind": "cross-attention", "heads": HEADS, "bias": False}
    writes["stack"]["block"]["sublayers"] = {"attn": copy.deepcopy(attention), "cross": cross, "ffn": sublayers["ffn"]}
    return tree | {"encoder": side, "decoder": writes}


def sides(tree: Tree) -> list[Tree]:
    """The maps that hold a stack."""
    return [tree[name] for name in ("encoder", "decoder")] if "encoder" in tree else [tree]


def blocks(tree: Tree) -> list[Tree]:
    return [side["stack"]["block"] for side in sides(tree)]


def attentions(tree: Tree, name: str = "attn") -> Iterator[Tree]:
    for block in blocks(tree):
        if name in block["sublayers"]:
            yield block["sublayers"][name]


@dataclass(frozen=True)
class Option:
    """`slot` is the place that it fills: two of one slot cannot be written down at once; None shares its place."""

    name: str
    apply: Callable[[Tree], None]
    slot: str | None = None
    kinds: tuple[str, ...] = KINDS


def attention(**fields: Any) -> Callable[[Tree], None]:
    def apply(tree: Tree) -> None:
        for name in ("attn", "cross"):
            for node in attentions(tree, name):
                node.update(copy.deepcopy(fields))

    return apply


def score(kind: str, *, cross: bool = False, **fields: Any) -> Callable[[Tree], None]:
    def apply(tree: Tree) -> None:
        for name in ("cross",) if cross else ("attn",) if kind == "residual" else ("attn", "cross"):
            for node in attentions(tree, name):
                node.setdefault("score", []).append({"kind": kind, **fields})

    return apply


def position(kind: str, **fields: Any) -> Callable[[Tree], None]:
    def apply(tree: Tree) -> None:
        for side in sides(tree):
            side["stack"]["position"].append({"kind": kind, **fields})

    return apply


def wiring(kind: str, **fields: Any) -> Callable[[Tree], None]:
    def apply(tree: Tree) -> None:
        for block in blocks(tree):
            block["wiring"].update({"kind": kind, **fields})

    return apply


def feed_forward(**fields: Any) -> Callable[[Tree], None]:
    def apply(tree: Tree) -> None:
        for block in blocks(tree):
            for name in ("pre_ffn", "ffn"):
                if name in block["sublayers"]:
                    block["sublayers"][name].update(fields)

    return apply


def stack(**fields: Any) -> Callable[[Tree], None]:
    def apply(tree: Tree) -> None:
        for side in sides(tree):
            side["stack"].update(copy.deepcopy(fields))

    return apply


def norm(kind: str) -> Callable[[Tree], None]:
    return lambda tree: tree.update(norm=kind)


def absolute(kind: str) -> Callable[[Tree], None]:
    def apply(tree: Tree) -> None:
        for side in sides(tree):
            side.setdefault("embed", {"kind": "tokens"})["positions"] = kind

    return apply


def macaron(tree: Tree) -> None:
    for block in blocks(tree):
        block["wiring"]["scale"] = {"pre_ffn": 0.5, "ffn": 0.5}
        block["sublayers"] = {"pre_ffn": dict(block["sublayers"]["ffn"]), **block["sublayers"]}


def drop_path(tree: Tree) -> None:
    for block in blocks(tree):
        block["wiring"]["drop_path"] = 0.2


def memory_tokens(tree: Tree) -> None:
    for side in sides(tree):
        side["memory_tokens"] = 3


def continuous(tree: Tree) -> None:
    tree.setdefault("embed", {}).update(kind="continuous", width=5)
    tree["heads"] = {"continuous": {"width": 5}}


def cross_alone(tree: Tree) -> None:
    node = tree["decoder"]["stack"]["block"]["sublayers"]
    node["cross"]["required"] = True
    del node["attn"]
    if "order" in tree["decoder"]["stack"]:
        tree["decoder"]["stack"]["order"]["front"] = "cross"


def tied(tree: Tree) -> None:
    words = [name for name in tree["heads"] if name != "continuous"] or ["lm"]
    tree["heads"] = {name: {"tied": True} for name in words}


def apart(tree: Tree) -> None:
    tree["share_tokens"] = False


ONE = ("decoder", "encoder")
PAIR = ("encoder-decoder",)
OPTIONS = (
    Option("persistent keys", attention(memory=2)),
    Option("memory tokens", memory_tokens),
    Option("layer norm", norm("layer"), "norm"),
    Option("scale norm", norm("scale"), "norm"),
    Option("rms norm", norm("rms"), "norm"),
    Option("simple rms norm", norm("simple-rms"), "norm"),
    Option("glu gelu", feed_forward(kind="glu", act="gelu"), "ffn"),
    Option("glu silu", feed_forward(kind="glu", act="silu", bias=False), "ffn"),
    Option("glu bilinear", feed_forward(kind="glu", act="identity"), "ffn"),
    Option("relu squared", feed_forward(act="relu2"), "ffn"),
    Option("rezero", wiring("rezero"), "wiring"),
    Option("rezero by sublayer", wiring("rezero", per="sublayer"), "wiring"),
    Option("post-norm", wiring("post"), "wiring"),
    Option("sandwich norm", wiring("sandwich-norm"), "wiring"),
    Option("parallel", wiring("parallel"), "wiring"),
    Option("parallel, one norm", wiring("parallel-shared"), "wiring"),
    Option("gated residual", wiring("gated"), "wiring"),
    Option("gated residual, cell", wiring("gated-cell"), "wiring"),
    Option("top-k", score("top-k", k=3)),
    Option("entmax", score("entmax")),
    Option("talking heads", score("talking-heads")),
    Option("softcap", score("softcap", cap=5.0)),
    Option("residual attention", score("residual")),
    Option("residual cross attention", score("residual", cross=True), None, PAIR),
    Option("attention on attention", attention(out="gated"), "out"),
    Option("attention on attended", attention(out="gated-attended"), "out"),
    Option("sandwich order", stack(order={"kind": "sandwich", "ends": 1})),
    Option("macaron", macaron),
    Option("stochastic depth", drop_path),
    Option("t5 bias", position("t5", buckets=8, furthest=16)),
    Option("alibi", position("alibi")),
    Option("rotary", position("rotary")),
    Option("distance mlp", position("distance-mlp", hidden=8)),
    Option("distance vectors", position("shaw", distance=4, key_term=True)),
    Option("infused", position("infused")),
    Option("tupe", position("tupe")),
    Option("learned places", absolute("learned"), "absolute"),
    Option("sinusoidal places", absolute("sinusoidal"), "absolute"),
    Option("recurrence", stack(recurrence={"length": 8})),
    Option("reversible", stack(kind="reversible", join="mean"), "stack"),
    Option("reversible, end to end", stack(kind="reversible", join="concat"), "stack"),
    Option("one key head", attention(kv_heads=1)),
    Option("wide heads", attention(head_dim=12)),
    Option("cosine attention", attention(qk_norm="unit", scale=4.0)),
    Option("continuous", continuous, None, ONE),
    Option("tied logits", tied),
    Option("tables apart", apart, None, PAIR),
    Option("cross attender", cross_alone, None, PAIR),
)


def combined(kind: str, chosen: tuple[Option, ...]) -> Tree:
    """The config of a graph with these options; several scores make a chain, several positions stand together."""
    tree = base(kind)
    for option in sorted(chosen, key=OPTIONS.index):
        option.apply(tree)
    for node in (*attentions(tree), *attentions(tree, "cross")):
        scores = sorted(node.pop("score", []), key=lambda one: ORDER.index(one["kind"]))
        if scores:
            node["score"] = scores[0] if len(scores) == 1 else {"kind": "chain", "of": scores}
    for side in sides(tree):
        places = side["stack"].pop("position")
        if places:
            side["stack"]["position"] = places[0] if len(places) == 1 else {"kind": "all", "of": places}
    return tree
