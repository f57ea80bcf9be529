"""Attention in chunks and by hashing, axial positions, feed-forwards in pieces: each against the formula it states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from references import PAD, describe, ids
from test_reformer import DECODER, converted, reference
from torch import Tensor

from xtcli.config.tiny import tiny
from xtcli.convert.engine import state_of
from xtcli.convert.families import by_name
from xtcli.convert.reading import read
from xtcli.data.tokenizers import Bytes
from xtcli.data.train_tokenizer import train
from xtcli.generate import Options, Sampling, generate
from xtcli.generate.feed import Feed
from xtcli.model import construct
from xtcli.parts import chunked
from xtcli.parts.chance import settled
from xtcli.parts.chunked import filled
from xtcli.parts.graphs import Graph
from xtcli.parts.lsh import usual_buckets
from xtcli.parts.scope import Refused
from xtcli.registry import find
from xtcli.train.transforms import compile_blocks

VOCAB = 67


def make(mixer: dict[str, Any], causal: bool = True, **more: Any) -> Graph:
    """A small model with every parameter random, in evaluation mode."""
    config = {
        "vocab": VOCAB,
        "dim": 32,
        "context": 64,
        "embed": {"kind": "tokens", "positions": "learned"},
        "stack": {"layers": 2, "block": {"sublayers": {"attn": mixer, "ffn": {"kind": "mlp", "hidden": 48}}}},
        "heads": {"lm": {}},
        **more,
    }
    cls = find("graph", "decoder" if causal else "encoder")
    model = construct(cls.Config.model_validate(config)).to_empty(device="cpu")
    model.initialise(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def words(rows: int, length: int) -> Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(3))


def compare(one: Graph, other: Graph, **given: Tensor) -> None:
    """Values and gradients of two models that have the same weights, at real places."""
    kept = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
    found = []
    for model in (one, other):
        model.zero_grad()
        states = model(**given).last_hidden_state[kept]
        (states * torch.linspace(-1, 1, states.shape[-1])).sum().backward()
        found.append((states.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (states, grads), (expected, wanted) = found
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-4)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, wanted[name], atol=1e-4, rtol=1e-4)


CHUNKS = {"chunk": 4, "before": 1, "after": 0}


@pytest.mark.parametrize(
    "more", [{}, {"kv_heads": 2, "qk_norm": "rms"}, {"memory": 3, "score": "talking-heads"}], ids=str
)
@pytest.mark.parametrize("length", [1, 4, 5, 19, 32])
@pytest.mark.parametrize("before", [0, 1])
def test_chunks_are_attention_under_a_mask(before: int, length: int, more: dict[str, Any]) -> None:
    chunks = {**CHUNKS, "before": before}
    fast = make({"kind": "chunked", "heads": 4, **chunks, **more})
    rule = {"kind": "all", "of": ["causal", {"kind": "chunks", **chunks}]}
    slow = make({"kind": "attention", "heads": 4, "mask": rule, **more})
    slow.load_state_dict(fast.state_dict())
    given = {"input_ids": words(3, length)}
    compare(fast, slow, **given)
    mask = torch.ones(3, length, dtype=torch.long)
    mask[1, length - length // 3 :], mask[2, : length // 3] = 0, 0
    compare(fast, slow, **given, attention_mask=mask)
    documents = (torch.arange(length) // 7).expand(3, -1)
    compare(fast, slow, **given, attention_mask=mask, document_ids=documents)


@pytest.mark.parametrize(
    ("before", "after", "length"), [(1, 0, 16), (1, 1, 16), (0, 2, 20), (2, 1, 16), (1, 1, 8), (3, 0, 8)]
)
def test_chunks_are_counted_in_a_circle(before: int, after: int, length: int) -> None:
    model = make({"kind": "chunked", "heads": 4, "chunk": 4, "before": before, "after": after}, causal=False)
    attn: Any = model.stack.blocks[0].attn
    x = torch.randn(2, length, 32, generator=torch.Generator().manual_seed(4))
    q, k, v = (attn.split(layer(x), 4) for layer in (attn.q, attn.k, attn.v))
    count = length // 4
    out = torch.zeros_like(q)
    for chunk in range(count):
        rows = slice(4 * chunk, 4 * chunk + 4)
        # A step of a whole round or more ends where it began.
        near = [(chunk + s) % count if abs(s) < count else chunk for s in range(-before, after + 1)]
        places = torch.tensor([4 * one + i for one in near for i in range(4)])
        weights = (q[:, :, rows] @ k[:, :, places].mT * 8**-0.5).softmax(-1)
        out[:, :, rows] = weights @ v[:, :, places]
    ctx = contexts(model, words(2, length))
    torch.testing.assert_close(attn(x, ctx), attn.o(out.transpose(1, 2).flatten(-2)), atol=1e-5, rtol=1e-4)


def contexts(model: Graph, tokens: Tensor) -> Any:
    """The context that the blocks of a model get."""
    found: list[Any] = []
    hook = model.stack.blocks[0].register_forward_pre_hook(lambda module, args: found.append(args[1]))
    model(input_ids=tokens)
    hook.remove()
    return found[0]


@pytest.mark.parametrize(
    ("length", "chunks", "expected"),
    [(3, [4], 3), (4, [4], 4), (5, [4], 8), (5, [4, 6], 12), (4, [4, 6], 4), (13, [4, 6], 24), (24, [4, 6], 24)],
)
def test_filling(length: int, chunks: list[int], expected: int) -> None:
    assert filled(length, chunks) == expected


@pytest.mark.parametrize(
    ("length", "chunk", "longest", "expected"),
    [(128, 64, 4096, (4,)), (4096, 64, 4096, (128,)), (8192, 64, 8192, (16, 16)), (36, 2, 36, (4, 8))],
)
def test_usual_number_of_buckets(length: int, chunk: int, longest: int, expected: tuple[int, ...]) -> None:
    assert usual_buckets(length, chunk, longest) == expected


HASHED = {"kind": "lsh", "heads": 4, "chunk": 4}


def test_one_bucket_of_everything_is_attention_to_all_but_oneself() -> None:
    """Two chunks that see each other see the whole text, however it is hashed."""
    model = make({**HASHED, "chunk": 8, "before": 1, "rounds": 1}, causal=False)
    attn: Any = model.stack.blocks[0].attn
    x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(4))
    q, v = (layer(x).unflatten(-1, (4, 8)).transpose(1, 2) for layer in (attn.qk, attn.v))
    scores = q @ (q / q.norm(dim=-1, keepdim=True)).mT
    weights = scores.masked_fill(torch.eye(16, dtype=torch.bool), float("-inf")).softmax(-1)
    expected = attn.o((weights @ v).transpose(1, 2).flatten(-2))
    torch.testing.assert_close(attn(x, contexts(model, words(2, 16))), expected, atol=1e-5, rtol=1e-4)


def test_similar_tokens_meet_though_they_are_far_apart() -> None:
    """Pairs of equal inputs, 500 places apart, score far above all others: hashing must bring them together."""
    model = make({**HASHED, "heads": 1, "chunk": 16, "rounds": 4, "buckets": 64}, causal=False)
    attn: Any = model.stack.blocks[0].attn
    half = 3 * torch.randn(1, 512, 32, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        attn.qk.weight.copy_(torch.eye(32))
        q = (attn.qk(torch.cat((half, half), 1))).unflatten(-1, (1, 32)).transpose(1, 2)
        buckets = attn.buckets(q, None, (64,), attn.rotations(32, q)).view(4, 2, 512)
    assert torch.equal(buckets[:, 0], buckets[:, 1])
    assert buckets.max() < 4 * 65 and len(buckets[0].unique()) > 40


def test_the_future_moves_nothing_but_the_order() -> None:
    """No value of a later token reaches an earlier one, in no chunk and no round."""
    model = make({**HASHED, "rounds": 3, "seed": 1})
    attn: Any = model.stack.blocks[0].attn
    ctx = contexts(model, words(1, 24))
    x = torch.randn(1, 24, 32, generator=torch.Generator().manual_seed(4), requires_grad=True)
    for place in (0, 7, 23):
        (grad,) = torch.autograd.grad(attn(x, ctx)[:, place].sum(), x)
        assert not grad[:, place + 1 :].any() and grad[:, place].any()


def test_a_seed_settles_the_rotations() -> None:
    tokens = words(2, 24)
    fixed, free = make({**HASHED, "seed": 5, "rounds": 2}), make({**HASHED, "rounds": 2})
    before = torch.get_rng_state()
    assert torch.equal(fixed(input_ids=tokens).logits, fixed(input_ids=tokens).logits)
    assert torch.equal(before, torch.get_rng_state())
    one, other = free(input_ids=tokens).logits, free(input_ids=tokens).logits
    assert not torch.equal(one, other)
    before = torch.get_rng_state()
    with settled(free):
        one = free(input_ids=tokens).logits
    with settled(free):
        assert torch.equal(one, free(input_ids=tokens).logits)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "mixer",
    [{**HASHED, "seed": 5, "rounds": 2}, {**HASHED, "buckets": [4, 2]}, {"kind": "chunked", "heads": 4, **CHUNKS}],
)
def test_compiles_without_a_graph_break(mixer: dict[str, Any]) -> None:
    model = make(mixer)
    tokens = words(2, 22)
    with settled(model):
        expected = model(input_ids=tokens).logits
    torch._dynamo.reset()
    compile_blocks(model, backend="eager", fullgraph=True)
    with settled(model):
        torch.testing.assert_close(model(input_ids=tokens).logits, expected)


def test_gradients_are_the_reference_s() -> None:
    """A step of training without dropout: the reference's own reversible backward pass, at its only length."""
    still = {"hidden_dropout_prob": 0.0, "local_attention_probs_dropout_prob": 0.0, "num_hashes": 2}
    theirs = reference((DECODER, still)).train()
    ours = converted(theirs).train()
    tokens = ids(2, 96)
    mask = torch.ones_like(tokens)
    mask[1, 70:] = 0
    given = {"input_ids": tokens.masked_fill(mask == 0, PAD), "attention_mask": mask}
    given["labels"] = tokens.masked_fill(mask == 0, -100)
    expected = theirs(**given, use_cache=False).loss
    expected.backward()
    found = ours(**given).loss
    found.backward()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    state = {name: p.grad for name, p in theirs.named_parameters()}
    config = describe(theirs) | {"num_buckets": None}
    plan, claims = read(by_name()["reformer"], config, list(theirs.state_dict()), "memory")
    wanted = state_of(plan, lambda name: state[claims.source[name]], ours.state_dict())
    for name, parameter in ours.named_parameters():
        size = max(1.0, wanted[name].abs().max().item())
        assert (parameter.grad - wanted[name]).abs().max().item() <= 2e-5 * size, name


@pytest.mark.parametrize("length", [1, 17, 32])
@pytest.mark.parametrize("training", [True, False])
def test_axial_positions_are_a_grid(training: bool, length: int) -> None:
    places = {"kind": "axial", "shape": [4, 8], "widths": [12, 20], "dropout": 0.4}
    model = make({"kind": "attention", "heads": 4}, embed={"kind": "tokens", "positions": places}, dropout=0.0)
    model.train(training)
    part: Any = model.embed.positions
    grid = torch.cat((part.axis_0[:, None].expand(-1, 8, -1), part.axis_1[None].expand(4, -1, -1)), -1).flatten(0, 1)
    torch.manual_seed(2)
    found = part(torch.zeros(3, length, 32), torch.arange(length)[None])
    if not training:
        assert torch.equal(found, grid[:length].expand(3, -1, -1)) and part.limit == 32
        return
    share = (found / grid[:length]).detach().mul(1e4).round() / 1e4
    assert {round(x, 3) for x in share.unique().tolist()} <= {0.0, round(1 / 0.6, 3)}
    for column in range(min(8, length)):
        assert (share[:, column::8] == share[:, column : column + 1, :1]).all()
    assert length == 1 or 0.0 in share


def test_axial_positions_start_with_their_own_deviation() -> None:
    places = {"kind": "axial", "shape": [64, 64], "widths": [8, 24], "std": 2.0}
    config = {"vocab": 9, "dim": 32, "embed": {"kind": "tokens", "positions": places}}
    config["stack"] = {"layers": 1, "block": {"sublayers": {"ffn": {"kind": "mlp", "hidden": 8}}}}
    whole = find("graph", "decoder").Config.model_validate(config)
    model = construct(whole).to_empty(device="cpu")
    model.initialise(0)
    assert abs(model.embed.positions.axis_1.std().item() - 2.0) < 0.1  # type: ignore[union-attr, operator]
    small: Any = tiny(whole)
    assert small.embed.positions.shape == (8, 16) and small.embed.positions.widths == (8, 24)


def test_feed_forwards_in_pieces() -> None:
    for kind in ("mlp", "glu"):
        parts = {"attn": {"kind": "attention", "heads": 4}, "ffn": {"kind": kind, "hidden": 48, "chunk": 5}}
        pieces = make({}, context=None, embed={"kind": "tokens"}, stack={"layers": 2, "block": {"sublayers": parts}})
        parts = {**parts, "ffn": {"kind": kind, "hidden": 48}}
        whole = make({}, context=None, embed={"kind": "tokens"}, stack={"layers": 2, "block": {"sublayers": parts}})
        compare(pieces, whole, input_ids=words(2, 17))
        kept = []
        for model in (pieces, whole):
            sizes: list[int] = []
            ffn: Any = model.stack.blocks[0].ffn
            x = torch.randn(2, 50, 32, requires_grad=True)

            def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
                sizes.append(tensor.numel())
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                ffn(x, None)
            kept.append(sum(sizes))
        assert kept[0] < kept[1] / 2


@pytest.mark.parametrize(
    ("mixer", "more", "cause"),
    [
        ({**HASHED, "heads": 5}, {}, "do not divide"),
        (HASHED, {"position": "rotary"}, "has no place for 'rotary'"),
        ({"kind": "chunked", "heads": 4}, {"position": "t5"}, "has no place for 't5'"),
        ({"kind": "chunked", "heads": 4, "score": "residual"}, {}, "no scores that another could carry on"),
    ],
)
def test_what_cannot_be_built_is_refused(mixer: dict[str, Any], more: dict[str, Any], cause: str) -> None:
    sublayers = {"attn": mixer, "ffn": {"kind": "mlp", "hidden": 48}}
    with pytest.raises(Refused) as refused:
        make({}, stack={"layers": 2, "block": {"sublayers": sublayers}, **more})
    assert any(cause in problem.cause for problem in refused.value.problems)


def test_hashed_text_is_read_anew_beyond_one_chunk() -> None:
    model = make({**HASHED, "chunk": 8, "seed": 2})
    tokens = words(2, 20)
    feed = Feed(model, tokens[:, :6].tolist(), 14)
    with torch.no_grad():
        seen = [feed.start()]
        for place in range(6, 20):
            cached = feed.state is not None
            assert cached == (place <= 8)
            seen.append(feed.step(tokens[:, place]))
        for number, logits in enumerate(seen):
            whole = model(input_ids=tokens[:, : 6 + number]).logits[:, -1]
            torch.testing.assert_close(logits, whole, atol=1e-5, rtol=1e-4)
    assert feed.uncached == 9
    state = model.new_state(2, 20)
    model(input_ids=tokens[:, :12], state=state)
    with pytest.raises(ValueError, match="read the whole text"):
        model(input_ids=tokens[:, 12:13], state=state)


@pytest.mark.parametrize(
    "mixer", [{**HASHED, "seed": 5, "rounds": 2, "before": 2}, {"kind": "chunked", "heads": 4, **CHUNKS}]
)
def test_slabs_change_nothing(mixer: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(mixer)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, 21:] = 0
    given = {"input_ids": words(2, 30), "attention_mask": mask, "document_ids": (torch.arange(30) // 11).expand(2, -1)}
    expected = model(**given).logits
    for slab in (1, 700):
        monkeypatch.setattr(chunked, "SLAB", slab)
        torch.testing.assert_close(model(**given).logits, expected, atol=1e-5, rtol=1e-4)


BYTES = train(Bytes.Config(), [])
MIXED: dict[str, Any] = {
    "kind": "reversible",
    "layers": 2,
    "pattern": ["near", "alike"],
    "blocks": {
        "near": {
            "sublayers": {"attn": {"kind": "chunked", "heads": 4, **CHUNKS}, "ffn": {"kind": "mlp", "hidden": 48}}
        },
        "alike": {"sublayers": {"attn": HASHED, "ffn": {"kind": "mlp", "hidden": 48}}},
    },
}


@pytest.mark.parametrize("kind", ["chunked", "mixed"])
def test_a_prompt_among_others_is_continued_as_alone(kind: str) -> None:
    more: dict[str, Any] = {"vocab": BYTES.vocab, "heads": {"lm": {"tied": False}}}
    model = make({"kind": "chunked", "heads": 4, **CHUNKS}, **more, **({"stack": MIXED} if kind == "mixed" else {}))
    options = Options(max_tokens=15, sampling=Sampling(temperature=0))
    prompts = ["def ", "x", "The quick brown", "abcd"]
    state = torch.get_rng_state()
    together = generate(model, BYTES, prompts, options)
    assert torch.equal(state, torch.get_rng_state())
    assert bool(together.notes) == (kind == "mixed") and all("reads the whole text" in n for n in together.notes)
    for prompt, written in zip(prompts, together.written, strict=True):
        assert generate(model, BYTES, [prompt], options).written[0].tokens == written.tokens


def test_masks_among_others_are_filled_as_alone() -> None:
    tokenizer = train(Bytes.Config(special={"mask": "[MASK]"}), [])
    model = make({}, causal=False, vocab=tokenizer.vocab, heads={"lm": {"tied": False}}, stack=MIXED)
    prompts = ["a [MASK] b", "The quick [MASK] fox jumps", "[MASK]"]
    together = generate(model, tokenizer, prompts).filled
    for prompt, filled_in in zip(prompts, together, strict=True):
        (alone,) = generate(model, tokenizer, [prompt]).filled
        assert alone.text == filled_in.text
        for one, other in zip(alone.masks[0], filled_in.masks[0], strict=True):
            assert one.token == other.token and abs(one.probability - other.probability) < 1e-5
