"""Every kind of every slot, put into a small model, and what each such model must do.

A new part is tested by being registered: its required fields carry examples, and the table below puts
each kind of a slot where that slot is.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
import yaml

from xtcli.errors import UserError
from xtcli.generate.feed import aligned
from xtcli.model import construct
from xtcli.parts.graphs import Graph
from xtcli.parts.scope import Refused
from xtcli.registry import example, find, kinds, tree
from xtcli.train.transforms import compile_blocks

VOCAB, LENGTH = 67, 24


def base(causal: bool) -> dict[str, Any]:
    heads = {"lm": {}} if causal else {"mlm": {}}
    return {
        "vocab": VOCAB,
        "dim": 64,
        "context": 32,
        "pad": VOCAB - 1,
        "embed": {"kind": "tokens", "positions": "learned"},
        "stack": {
            "layers": 2,
            "block": {
                "sublayers": {"attn": {"kind": "attention", "heads": 4}, "ffn": {"kind": "mlp", "hidden": 96}},
            },
        },
        "heads": heads,
    }


PLACES = {
    "norm": ("norm",),
    "init": ("init",),
    "absolute": ("embed", "positions"),
    "embed": ("embed",),
    "position": ("stack", "position"),
    "scaling": ("stack", "position", "scaling"),
    "stack": ("stack",),
    "order": ("stack", "order"),
    "wiring": ("stack", "block", "wiring"),
    "mask": ("stack", "block", "sublayers", "attn", "mask"),
    "score": ("stack", "block", "sublayers", "attn", "score"),
    "out": ("stack", "block", "sublayers", "attn", "out"),
    "ffn": ("stack", "block", "sublayers", "ffn"),
    "router": ("stack", "block", "sublayers", "ffn", "router"),
    "expert": ("stack", "block", "sublayers", "ffn", "expert"),
    "mixer": ("stack", "block", "sublayers", "attn"),
    "transform": ("heads", "lm", "transform"),
}
"""Slot -> where its kinds go in the small model."""

ELSEWHERE = {"graph", "head", "objective", "tokenizer", "auxiliary", "distance"}
"""Slots with tables of their own, below or in other files."""


OWN_MIXERS = {"n-gram": "n-gram", "two-stream": "two-stream"}
"""Kinds of stacks whose attentions must be of a kind of their own."""


def put(config: dict[str, Any], path: tuple[str, ...], node: Any) -> dict[str, Any]:
    config = copy.deepcopy(config)
    at = config
    for key in path[:-1]:
        if not isinstance(at.get(key), dict):
            at[key] = {"kind": "rotary"} if key == "position" else {}
        at = at[key]
    at[path[-1]] = node
    return config


def reads_tokens(embed: type[Any]) -> bool:
    """Whether tokens enter; embeddings of other inputs have tables of their own."""
    return getattr(embed, "tokens", ...) is not None


def cases() -> list[Any]:
    found = []
    for slot, path in PLACES.items():
        for kind, cls in kinds(slot).items():
            if (slot, kind) == ("norm", "inherit") or (slot == "embed" and not reads_tokens(cls)):
                continue
            node = {"kind": kind, **example(cls.Config)}
            for causal in (True, False) if slot != "transform" else (True,):
                config = base(causal)
                if slot in ("router", "expert"):
                    mixture = find("ffn", "moe").Config
                    config = put(config, PLACES["ffn"], {"kind": "moe", **example(mixture)})
                whole = {**config["stack"], **node} if slot == "stack" else node
                if hasattr(cls, "within"):
                    outer, name = cls.within
                    around = {"kind": name, **example(find(outer, name).Config)}
                    config = put(config, PLACES[outer], {**config["stack"], **around})
                if not causal and "entities" in (kind, config["stack"].get("kind")):
                    # The last layer's entities matter to this head alone.
                    config["heads"]["mep"] = {}
                if slot == "stack" and kind in OWN_MIXERS:
                    whole = put(whole, ("block", "sublayers", "attn"), {"kind": OWN_MIXERS[kind], "heads": 4})
                found.append(pytest.param(causal, put(config, path, whole), id=f"{slot}-{kind}-{causal}"))
    extras = {
        "gqa": (("stack", "block", "sublayers", "attn", "kv_heads"), 2),
        "mqa": (("stack", "block", "sublayers", "attn", "kv_heads"), 1),
        "wide-heads": (("stack", "block", "sublayers", "attn", "head_dim"), 24),
        "qk-norm": (("stack", "block", "sublayers", "attn", "qk_norm"), "rms"),
        "depth-scale": (("stack", "block", "sublayers", "attn", "scale_by_depth"), True),
        "key-term": (("stack", "position"), {"kind": "shaw", "distance": 5, "key_term": True}),
        "alibi-of-keys": (
            ("stack", "position"),
            {"kind": "alibi", "places": "counted", "scaled": True, "rounded": True},
        ),
        "persistent-keys": (("stack", "block", "sublayers", "attn", "memory"), 3),
        "interleaved": (("stack", "position"), {"kind": "rotary", "layout": "interleaved", "fraction": 0.5}),
        "offset": (("embed", "positions"), {"kind": "learned", "offset": 2}),
        "segments": (("embed", "segments"), 2),
        "memory-tokens": (("memory_tokens",), 5),
        "token-segments": (("embed", "segments"), "tokens"),
        "pattern": (
            ("stack",),
            {
                "layers": 3,
                "position": "rotary",
                "pattern": ["near", "far"],
                "blocks": {
                    "near": {
                        "sublayers": {
                            "attn": {
                                "kind": "attention",
                                "heads": 4,
                                "mask": {"kind": "window", "left": 3},
                            },
                            "ffn": {"kind": "glu", "hidden": 64},
                        }
                    },
                    "far": {"sublayers": {"attn": {"kind": "attention", "heads": 2, "position": "none"}}},
                },
            },
        ),
    }
    for name, (path, node) in extras.items():
        found.append(pytest.param(True, put(base(True), path, node), id=f"extra-{name}"))
    return found


def make(causal: bool, config: dict[str, Any], seed: int = 0) -> Graph:
    """A small model with every parameter random, gains and biases too; skips what only a decoder with memory takes."""
    config = dict(config)
    attn = config["stack"].get("block", {}).get("sublayers", {}).get("attn", {})
    if getattr(find("mixer", attn.get("kind", "attention")), "reads_memory", False):
        config["memory"] = 48
    cls = find("graph", "decoder" if causal else "encoder")
    try:
        skeleton = construct(cls.Config.model_validate(config))
    except Refused as refused:
        words = ("sees both ways", "shows keys behind") if causal else ("reads from left to right alone",)
        if not any(word in problem.cause for word in words for problem in refused.problems):
            raise
        pytest.skip(str(refused))
    model = skeleton.to_empty(device="cpu")
    model.initialise(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


@cache
def _made(causal: bool, config: str) -> Graph:
    return make(causal, json.loads(config))


def made(causal: bool, config: dict[str, Any]) -> Graph:
    """The small model of a case, made once; for tests that leave it as it is."""
    return _made(causal, json.dumps(config))


def inputs(model: Graph, rows: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    given = {"input_ids": torch.randint(0, VOCAB - 1, (rows, LENGTH), generator=generator)}
    if getattr(model.config, "memory", None):
        given["encoder_hidden_states"] = torch.randn(rows, 7, model.config.memory, generator=generator)
    return given


def logits(model: Graph, **given: torch.Tensor) -> torch.Tensor:
    return model(**given).logits


CASES = cases()


@pytest.mark.parametrize("slot", sorted(set(PLACES) | ELSEWHERE))
def test_every_slot_has_a_table(slot: str) -> None:
    assert kinds(slot)


def test_no_slot_is_left_out() -> None:
    from xtcli.registry import slots

    assert set(slots()) == set(PLACES) | ELSEWHERE


@pytest.mark.parametrize(("causal", "config"), CASES)
def test_round_trips_through_yaml(causal: bool, config: dict[str, Any]) -> None:
    cls = find("graph", "decoder" if causal else "encoder").Config
    whole = cls.model_validate(config)
    plain = yaml.safe_load(yaml.safe_dump(tree(whole)))
    del plain["kind"]
    assert cls.model_validate(plain) == whole


@pytest.mark.parametrize(("causal", "config"), CASES)
def test_gradient_reaches_every_parameter(causal: bool, config: dict[str, Any]) -> None:
    model = make(causal, config)
    given = inputs(model)
    if model.config.embed.segments is not None:
        given["token_type_ids"] = given["input_ids"] % 2
    if "global_attention_mask" in model.accepts:
        given["global_attention_mask"] = given["input_ids"] % 5 == 0
    if "entity_ids" in model.accepts:
        given["entity_ids"] = torch.arange(8).reshape(2, 4)
        given["entity_position_ids"] = torch.arange(32)[:, None].expand(-1, 2).reshape(2, 4, 8)
        given["entity_token_type_ids"] = given["entity_ids"] % 2
    if "target_mapping" in model.accepts:
        given["target_mapping"] = torch.eye(LENGTH).expand(2, LENGTH, LENGTH)
    targets = {next(iter(model.heads)): given["input_ids"].roll(-1, 1)}
    if "mep" in model.heads:
        targets["mep"] = given["entity_ids"]
    terms = model.losses(given, targets)
    torch.stack([term.mean() for term in terms.values()]).sum().backward()
    bare = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # The key bias adds the same to every score of a query, which a softmax cannot see.
    assert not [name for name in bare if not name.endswith(("attn.k.bias", "attn.k_global.bias"))], bare


@pytest.mark.parametrize(("causal", "config"), [c for c in CASES if c.values[0]])
def test_future_is_unseen(causal: bool, config: dict[str, Any]) -> None:
    model = made(causal, config)
    given = inputs(model)
    before = logits(model, **given)
    changed = dict(given, input_ids=given["input_ids"].clone())
    changed["input_ids"][:, LENGTH // 2 :] = (changed["input_ids"][:, LENGTH // 2 :] + 1) % VOCAB
    after = logits(model, **changed)
    half = LENGTH // 2
    if any(getattr(module, "rounds", False) for module in model.modules()):
        torch.testing.assert_close(before[:, :half], after[:, :half], atol=1e-5, rtol=1e-5)
    else:
        assert torch.equal(before[:, :half], after[:, :half])
    assert not torch.allclose(before[:, half:], after[:, half:])


def length_dependent(model: Graph) -> bool:
    """Whether a rotation depends on the length so far, which makes every step see other angles."""
    return any(getattr(module, "static", True) is False for module in model.modules())


@pytest.mark.parametrize(("causal", "config"), [c for c in CASES if c.values[0]])
@pytest.mark.parametrize("chunks", [(LENGTH,), (9, 1, 5, 1, 8), (1,) * LENGTH])
def test_decoding_in_steps_equals_one_pass(causal: bool, config: dict[str, Any], chunks: tuple[int, ...]) -> None:
    model = made(causal, config)
    given = inputs(model)
    if length_dependent(model):
        given["input_ids"] = given["input_ids"][:, :16]
        chunks = tuple(c for c, seen in zip(chunks, torch.tensor(chunks).cumsum(0).tolist(), strict=True) if seen <= 16)
    whole = logits(model, **given)
    state = model.new_state(2, LENGTH)
    ids = given.pop("input_ids")
    parts = []
    for chunk in chunks:
        at = state.length
        parts.append(logits(model, input_ids=ids[:, at : at + chunk], state=state, **given))
    if parts:
        stepped = torch.cat(parts, dim=1)
        # Float32 sums in another order: an error of 1e-5 of the largest logit, which without norms is far from 1.
        scale = max(1.0, whole.abs().max().item())
        torch.testing.assert_close(stepped, whole[:, : stepped.shape[1]], atol=1e-5 * scale, rtol=1e-5)


def hides(model: Graph) -> bool:
    """Whether a mask can keep places apart."""
    return all(getattr(module, "hides", True) for module in model.modules())


@pytest.mark.parametrize(("causal", "config"), CASES)
def test_padding_on_the_right_changes_nothing(causal: bool, config: dict[str, Any]) -> None:
    model = made(causal, config)
    given = inputs(model)
    short = {name: value[:, :13] if name == "input_ids" else value for name, value in given.items()}
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[:, 13:] = 0
    if not hides(model):
        pytest.skip("padding is mixed in by definition")
    padded = model(**given, attention_mask=mask).last_hidden_state[:, :13]
    if length_dependent(model):
        pytest.skip("the angles depend on the padded length by definition")
    torch.testing.assert_close(padded, model(**short).last_hidden_state, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize(("causal", "config"), CASES)
def test_packed_documents_are_alone(causal: bool, config: dict[str, Any]) -> None:
    model = made(causal, config)
    given = inputs(model)
    ids = given.pop("input_ids")
    cut = 10
    documents = torch.tensor([[0] * cut + [1] * (LENGTH - cut)] * 2)
    places = torch.cat((torch.arange(cut), torch.arange(LENGTH - cut)))[None]
    if not hides(model):
        with pytest.raises(UserError, match="mixes"):
            model(input_ids=ids, document_ids=documents, position_ids=places, **given)
        return
    packed = model(input_ids=ids, document_ids=documents, position_ids=places, **given).last_hidden_state
    if length_dependent(model):
        pytest.skip("the angles depend on the packed length by definition")
    if aligned(model):
        pytest.skip("what a token sees depends on the slot that it is packed into")
    for part, first, last in ((packed[:, :cut], 0, cut), (packed[:, cut:], cut, LENGTH)):
        alone = model(input_ids=ids[:, first:last], **given).last_hidden_state
        torch.testing.assert_close(part, alone, atol=5e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def compiler() -> Iterator[None]:
    """A compiler that keeps what it has made, for any number of models: their losses and norms are alike."""
    torch._dynamo.reset()
    kept = {"recompile_limit": 1000, "accumulated_recompile_limit": 1000, "automatic_dynamic_shapes": False}
    with torch._dynamo.config.patch(kept):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("causal", "config"), [c for c in CASES if c.values[0]])
@pytest.mark.usefixtures("compiler")
def test_blocks_compile_without_a_graph_break(causal: bool, config: dict[str, Any]) -> None:
    model = make(causal, config)
    given = inputs(model)
    expected = model.losses(given, {"lm": given["input_ids"]})["lm"].sum
    compile_blocks(model, backend="eager", fullgraph=True)
    found = model.losses(given, {"lm": given["input_ids"]})["lm"].sum
    torch.testing.assert_close(found, expected)


def test_equal_blocks_share_compiled_code() -> None:
    from torch._dynamo.testing import CompileCounter

    config = base(True)
    config["stack"]["layers"] = 6
    model = make(True, config)
    torch._dynamo.reset()
    counter = CompileCounter()
    compile_blocks(model, backend=counter, fullgraph=True)
    for _ in range(3):
        given = inputs(model)
        model.losses(given, {"lm": given["input_ids"]})["lm"].sum.backward()
    assert counter.frame_count == 3  # one block, the last norm, one loss


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("compiled", [False, True])
def test_rotations_hand_back_what_their_formula_does(layout: str, compiled: bool) -> None:
    from xtcli.parts import rotary

    plain = {"half": rotary.turn_half, "interleaved": rotary.turn_interleaved}[layout]
    own = rotary.TURNS[layout]
    if compiled:
        own = torch.compile(own, backend="aot_eager", fullgraph=True)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 3, 5, 10, generator=generator, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(1, 1, 5, 4, generator=generator, dtype=torch.float64)
    aim = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    cos, sin = 1.3 * angles.cos(), 1.3 * angles.sin()
    results = [turn(x, cos, sin) for turn in (own, plain)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad((result * aim).sum(), x) for result in results))
