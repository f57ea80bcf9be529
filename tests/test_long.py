"""Attention over few keys against the same over all pairs, dense and written out: values, gradients, documents, padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from xtcli.errors import UserError
from xtcli.model import Model, construct
from xtcli.parts import bands
from xtcli.parts.blocksparse import draws
from xtcli.parts.positions import bucket
from xtcli.registry import find
from xtcli.train.transforms import compile_blocks

VOCAB, LENGTH, HEADS, WIDTH = 67, 61, 4, 32
T5 = {"kind": "t5", "buckets": 8, "furthest": 20}


def encoder(attn: dict[str, Any], position: Any = "none", layers: int = 1, **more: Any) -> Model:
    """An encoder of such attentions, every parameter random; without norms and feed-forwards between."""
    config = {
        "vocab": VOCAB,
        "dim": WIDTH,
        "context": 128,
        "pad": 0,
        "norm": "none",
        "embed": {"kind": "tokens", "positions": "counted"},
        "stack": {"layers": layers, "position": position, "block": {"sublayers": {"attn": {"heads": HEADS} | attn}}},
        "heads": {"mlm": {}},
    } | more
    model = construct(find("graph", "encoder").Config.model_validate(config)).to_empty(device="cpu")
    model.initialise(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def ids(rows: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(2))


def keep(length: int = LENGTH) -> Tensor:
    kept = torch.ones(2, length, dtype=torch.long)
    kept[1, 40:] = 0
    return kept


def parts(attn: Any, x: Tensor, suffix: str = "") -> tuple[Tensor, Tensor, Tensor]:
    def split(name: str) -> Tensor:
        heads: Tensor = getattr(attn, name + suffix)(x).unflatten(-1, (HEADS, -1))
        return heads.transpose(1, 2)

    return split("q"), split("k"), split("v")


def softmax(scores: Tensor, seen: Tensor) -> Tensor:
    return scores.masked_fill(~seen, -1e30).softmax(-1) * seen


def near(length: int, radius: int, dilation: int = 1) -> Tensor:
    step = torch.arange(length)[None] - torch.arange(length)[:, None]
    return (step.abs() <= radius * dilation) & (step % dilation == 0)


def window(model: Any, attn: Any, x: Tensor, real: Tensor, radius: int, dilation: int) -> Tensor:
    q, k, v = parts(attn, x)
    seen = near(x.shape[1], radius, dilation) & real[:, None, None, :]
    scores = q @ k.transpose(-1, -2) * attn.scale
    if model.stack.shared.biases:
        step = torch.arange(x.shape[1])[None] - torch.arange(x.shape[1])[:, None]
        scores = scores + model.stack.shared.biases[0].table(bucket(step, 8, 20, True)).permute(2, 0, 1)
    return softmax(scores, seen) @ v


def with_globals(model: Any, attn: Any, x: Tensor, real: Tensor, radius: int, dilation: int, marked: Tensor) -> Tensor:
    q, k, v = parts(attn, x)
    seen = (near(x.shape[1], radius, dilation) | marked[:, None, None, :]) & real[:, None, None, :]
    y = softmax(q @ k.transpose(-1, -2) * attn.scale, seen) @ v
    q, k, v = parts(attn, x, "_global")
    everywhere = softmax(q @ k.transpose(-1, -2) * attn.scale, real[:, None, None, :]) @ v
    return torch.where((marked & real)[:, None, :, None], everywhere, y)


def sides(model: Any, attn: Any, x: Tensor, real: Tensor, radius: int, block: int) -> Tensor:
    q, k, v = parts(attn, x)
    rows = []
    for row, kept in zip(x, real, strict=True):
        length = int(kept.sum())
        count = length // block
        owner = [min(place // block, count - 1) for place in range(length)]
        sums = torch.stack([row[[i for i in range(length) if owner[i] == g]].sum(0) for g in range(count)])
        more = parts(attn, attn.side_norm(sums)[None])
        bias, side = (table.table for table in model.stack.shared.biases)
        n = int(kept.sum())
        qs, ks, vs = (one[len(rows), :, :n] for one in (q, k, v))
        step = torch.arange(n)[None] - torch.arange(n)[:, None]
        scores = qs @ ks.transpose(-1, -2) * attn.scale + bias(bucket(step, 8, 20, True)).permute(2, 0, 1)
        scores = scores.masked_fill(~near(n, radius), -1e30)
        apart = torch.arange(count)[None] - torch.tensor(owner)[:, None]
        others = qs @ more[1][0].transpose(-1, -2) * attn.scale + side(bucket(apart, 8, 20, True)).permute(2, 0, 1)
        weights = torch.cat((scores, others), -1).softmax(-1)
        y = weights @ torch.cat((vs, more[2][0]), 1)
        rows.append(torch.nn.functional.pad(y, (0, 0, 0, x.shape[1] - n)))
    return torch.stack(rows)


def blocks(model: Any, attn: Any, x: Tensor, real: Tensor, size: int, random: int, drawn: bool) -> Tensor:
    q, k, v = parts(attn, x)
    length = x.shape[1]
    count = -(-length // size)
    times = torch.zeros(HEADS, count, count)
    for i in range(count):
        if i in (0, count - 1):
            times[:, i] = 1
            continue
        for j in {0, i - 1, i, i + 1, count - 1}:
            times[:, i, j] = 1
        for head in range(HEADS):
            for j in draws(0, HEADS, count, random)[head, i - 1].tolist() if drawn else [0] * random:
                times[head, i, j] += 1
    pairs = times.repeat_interleave(size, 1).repeat_interleave(size, 2)[:, :length, :length]
    scores = (q @ k.transpose(-1, -2) * attn.scale).exp() * pairs * real[:, None, None, :]
    return scores / scores.sum(-1, keepdim=True) @ v


Slow = Callable[[Any, Any, Tensor, Tensor], Tensor]
MARKED = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(9)) < 0.1

CASES: dict[str, tuple[dict[str, Any], Any, Slow]] = {
    "local": ({"kind": "local", "radius": 5}, "none", lambda m, a, x, r: window(m, a, x, r, 5, 1)),
    "local with a bias": ({"kind": "local", "radius": 7}, T5, lambda m, a, x, r: window(m, a, x, r, 7, 1)),
    "local with gaps": (
        {"kind": "local", "radius": 4, "dilation": 3},
        "none",
        lambda m, a, x, r: window(m, a, x, r, 4, 3),
    ),
    "local, wide": ({"kind": "local", "radius": 40}, T5, lambda m, a, x, r: window(m, a, x, r, 40, 1)),
    "global": (
        {"kind": "sliding-global", "radius": 3},
        "none",
        lambda m, a, x, r: with_globals(m, a, x, r, 3, 1, MARKED),
    ),
    "global with gaps": (
        {"kind": "sliding-global", "radius": 2, "dilation": 4},
        "none",
        lambda m, a, x, r: with_globals(m, a, x, r, 2, 4, MARKED),
    ),
    "global, wide": (
        {"kind": "sliding-global", "radius": 30},
        "none",
        lambda m, a, x, r: with_globals(m, a, x, r, 30, 1, MARKED),
    ),
    "sides": (
        {"kind": "transient-global", "radius": 4, "block": 6, "side_norm": "rms"},
        T5,
        lambda m, a, x, r: sides(m, a, x, r, 4, 6),
    ),
    "sides in runs": (
        {"kind": "transient-global", "radius": 6, "block": 3, "side_norm": "rms"},
        T5,
        lambda m, a, x, r: sides(m, a, x, r, 6, 3),
    ),
    "blocks": (
        {"kind": "block-sparse", "block": 5, "random": 2},
        "none",
        lambda m, a, x, r: blocks(m, a, x, r, 5, 2, False),
    ),
    "blocks, drawn": (
        {"kind": "block-sparse", "block": 5, "random": 3, "drawn": "always"},
        "none",
        lambda m, a, x, r: blocks(m, a, x, r, 5, 3, True),
    ),
    "blocks alone": (
        {"kind": "block-sparse", "block": 4, "random": 0},
        "none",
        lambda m, a, x, r: blocks(m, a, x, r, 4, 0, False),
    ),
}


def run(model: Model, attn: Any, x: Tensor, kept: Tensor) -> Tensor:
    """One attention, in its stack."""
    extras = {"global_attention_mask": MARKED.long()} if model.accepts else {}
    seen: list[Tensor] = []
    handle = attn.register_forward_hook(lambda module, given, y: seen.append(y))
    model(inputs_embeds=x, attention_mask=kept, position_ids=torch.zeros(1, LENGTH, dtype=torch.long), **extras)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("slab", [2**24, 1500], ids=["whole", "slabs"])
@pytest.mark.parametrize("name", CASES)
def test_few_keys_are_all_pairs_masked(name: str, slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bands.SLAB, "cpu", slab)
    config, position, slow = CASES[name]
    model = encoder(config, position)
    attn: Any = model.stack.blocks[0].attn
    given = torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(5))
    place = model.embed.positions.table.weight[0]
    kept = keep()
    found, wanted = {}, {}
    for results, way in ((found, None), (wanted, slow)):
        x = (given - place).detach().requires_grad_()
        if way is None:
            y = run(model, attn, x, kept)
        else:
            y = attn.o(way(model, attn, x + place, kept.bool()).transpose(1, 2).flatten(-2))
        results["y"] = y * kept[..., None]
        used = {n: p for n, p in model.named_parameters() if n.startswith("stack")}
        grads = torch.autograd.grad((results["y"] ** 2).sum(), [x, *used.values()], allow_unused=True)
        results |= {"x": grads[0]} | dict(zip(used, grads[1:], strict=True))
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert (value is None) == (found[key] is None), key
        # A bias of the keys adds the same to all scores of a query, which a softmax cannot see.
        if value is not None and not key.endswith(("k.bias", "k_global.bias")):
            scale = max(1.0, float(value.abs().max()))
            torch.testing.assert_close(found[key], value, atol=1e-5 * scale, rtol=1e-4, msg=f"{name} {key}")


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("blocks")])
def test_documents_in_one_row_are_alone(name: str) -> None:
    config, position, _ = CASES[name]
    model = encoder(config, position, layers=2)
    text, cut = ids(1), 25
    marked = {"global_attention_mask": MARKED[1:].long()} if model.accepts else {}
    documents = (torch.arange(LENGTH) >= cut).long()[None]
    packed = model(input_ids=text, document_ids=documents, **marked).last_hidden_state
    for first, last in ((0, cut), (cut, LENGTH)):
        own = {key: value[:, first:last] for key, value in marked.items()}
        alone = model(input_ids=text[:, first:last], **own).last_hidden_state
        torch.testing.assert_close(packed[:, first:last], alone, atol=2e-5, rtol=1e-4)


def test_blocks_do_not_see_other_documents() -> None:
    for drawn in ("training", "always"):
        model = encoder({"kind": "block-sparse", "block": 4, "random": 1, "drawn": drawn}, layers=2)
        text, cut = ids(1), 25
        documents = (torch.arange(LENGTH) >= cut).long()[None]
        before = model(input_ids=text, document_ids=documents).last_hidden_state
        text[:, cut:] = text[:, cut:] % (VOCAB - 1) + 1
        after = model(input_ids=text, document_ids=documents).last_hidden_state
        assert torch.equal(before[:, :cut], after[:, :cut])
        assert not torch.allclose(before[:, cut:], after[:, cut:])


def test_random_blocks_are_drawn_by_layer_and_seen_once() -> None:
    for count in (12, 30):
        first, second = draws(0, 4, count, 3), draws(1, 4, count, 3)
        assert torch.equal(first, draws(0, 4, count, 3))
        assert not torch.equal(first, second)
        assert not torch.equal(first[0], first[1])
        for head in range(4):
            for row in range(1, count - 1):
                chosen = first[head, row - 1].tolist()
                assert len(set(chosen)) == 3
                assert not {0, row - 1, row, row + 1, count - 1} & set(chosen)


def test_random_blocks_act_in_training_alone() -> None:
    model = encoder({"kind": "block-sparse", "block": 4, "random": 2})
    text = ids()
    used = model(input_ids=text).last_hidden_state
    trained = model.train()(input_ids=text).last_hidden_state
    assert torch.equal(trained, model(input_ids=text).last_hidden_state)
    assert not torch.allclose(used, trained)
    assert torch.equal(used, model.eval()(input_ids=text).last_hidden_state)


@pytest.mark.parametrize("name", ["local with a bias", "global", "sides", "blocks"])
def test_layers_compile_without_a_graph_break(name: str) -> None:
    config, position, _ = CASES[name]
    model = encoder(config, position, layers=2)
    given = {"input_ids": ids()} | ({"global_attention_mask": MARKED.long()} if model.accepts else {})
    expected = model(**given).last_hidden_state
    torch._dynamo.reset()
    compile_blocks(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(model(**given).last_hidden_state, expected)


def test_numbers_for_each_layer() -> None:
    model: Any = encoder({"kind": "sliding-global", "radius": [2, 5], "dilation": [3, 1]}, layers=2)
    found = [(one.attn.rule.left, one.attn.rule.dilation) for one in model.stack.blocks]
    assert found == [(6, 3), (5, 1)]
    assert len(model.stack.shared.layouts) == 2


WRONG: dict[str, tuple[dict[str, Any], Any, str]] = {
    "too few": ({"kind": "local", "radius": [2]}, "none", "has 1 numbers, and the stack has more layers"),
    "zero": ({"kind": "local", "radius": 0}, "none", "0 is less than 1"),
    "gaps": ({"kind": "local", "radius": 2, "dilation": 2}, T5, "needs windows without gaps"),
    "pairs": ({"kind": "local", "radius": 2}, {"kind": "shaw", "distance": 4}, "need all pairs"),
    "globals": ({"kind": "sliding-global", "radius": 2}, T5, "attention has no positions here"),
    "blocks": ({"kind": "block-sparse"}, T5, "has no positions of kind 't5'"),
    "score": ({"kind": "local", "radius": 2, "score": "entmax"}, "none", "makes its weights in a way of its own"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_refused(name: str) -> None:
    config, position, message = WRONG[name]
    with pytest.raises(UserError, match=message):
        encoder(config, position, layers=2)


def test_defaults_of_global_tokens() -> None:
    text = ids(1, 20)
    text[0, [5, 6, 19]] = 66
    text[0, [1, 9]] = 3
    usual = {"none": [], "first": [0], "before-separator": [0, 1, 2, 3, 4], "after-separator": list(range(7, 20))}
    for kind, places in usual.items():
        attn = {"kind": "sliding-global", "radius": 2}
        model = encoder(attn | {"globals": kind, "separator": 66})
        marked = torch.zeros(1, 20, dtype=torch.long)
        marked[0, places] = 1
        with torch.no_grad():
            given = model(input_ids=text, global_attention_mask=marked).last_hidden_state
            torch.testing.assert_close(model(input_ids=text).last_hidden_state, given)
    with pytest.raises(ValueError, match="two or three"):
        model(input_ids=ids(1, 20).clamp(max=65))
    text[0, 6] = 3
    marked = (torch.arange(20) > 5).long()[None]
    given = model(input_ids=text, global_attention_mask=marked).last_hidden_state
    torch.testing.assert_close(model(input_ids=text).last_hidden_state, given)


def test_places_are_counted_from_the_ids() -> None:
    model: Any = encoder({"kind": "attention"}, pad=3)
    places = model.embed.positions.counted
    caught: list[Tensor] = []
    model.embed.positions.counted = lambda ctx: caught.append(places(ctx)) or caught[-1]
    text = torch.tensor([[3, 3, 9, 8, 7, 3], [9, 9, 9, 3, 9, 9]])
    model(input_ids=text)
    model(inputs_embeds=torch.zeros(1, 3, WIDTH))
    model(input_ids=text, position_ids=torch.arange(6)[None])
    model(input_ids=text, document_ids=torch.tensor([[0, 0, 0, 1, 1, 1]] * 2), position_ids=torch.arange(6)[None])
    assert [found.tolist() for found in caught] == [
        [[3, 3, 4, 5, 6, 3], [4, 5, 6, 3, 7, 8]],
        [[4, 5, 6]],
        [[0, 1, 2, 3, 4, 5]],
        [[3, 3, 4, 4, 5, 3], [4, 5, 6, 3, 4, 5]],
    ]
