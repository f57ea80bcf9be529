"""Options around attention, each against a slow twin written from its paper's formula: values and gradients.

Options inside attention have theirs in test_x_attention.py, all of them together in test_x_combinations.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from xtcli.errors import UserError
from xtcli.model import construct
from xtcli.parts.context import Ctx
from xtcli.parts.graphs import Graph
from xtcli.parts.scope import Refused
from xtcli.parts.stack import Block, Stack
from xtcli.registry import find

DIM, LENGTH, VOCAB = 16, 7, 31
ATTENTION = {"kind": "attention", "heads": 2}
FFN = {"kind": "mlp", "hidden": 24}


def model_of(kind: str = "decoder", wiring: Any = "pre", seed: int = 0, **changes: Any) -> Graph:
    """A small model in double precision with every parameter random."""
    sublayers = changes.pop("sublayers", {"attn": ATTENTION, "ffn": FFN})
    stack = {"layers": 2, "block": {"wiring": wiring, "sublayers": sublayers}, **changes.pop("stack", {})}
    config = {"vocab": VOCAB, "dim": DIM, "context": 16, "stack": stack, "heads": {"lm": {}}, **changes}
    return fresh(kind, config, seed)


def fresh(kind: str, config: dict[str, Any], seed: int = 0) -> Graph:
    model = construct(find("graph", kind).Config.model_validate(config)).to_empty(device="cpu")
    model.initialise(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.double().eval()


def random(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def context(x: Tensor, **more: Any) -> Ctx:
    """The context of one pass over x (B, T, D)."""
    places = torch.arange(x.shape[1])[None]
    return Ctx(positions=places, keys=places, **more)


def agree(ours: Callable[[], Tensor], theirs: Callable[[], Tensor], leaves: list[Tensor]) -> None:
    """Equal values, and equal gradients of every leaf."""
    a, b = ours(), theirs()
    torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)
    weight = random(*a.shape, seed=9)
    ga = torch.autograd.grad((a * weight).sum(), leaves)
    gb = torch.autograd.grad((b * weight).sum(), leaves)
    for one, other in zip(ga, gb, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-8)
        assert one.abs().sum() > 0


class Toy(nn.Module):
    """A sublayer whose branch is easy to write down: tanh(x W)."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(random(DIM, DIM, seed=seed) / 4)

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        return torch.tanh(x @ self.weight)


def normed(x: Tensor, norm: Any) -> Tensor:
    """Layer normalisation from its definition."""
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / ((x - mean) ** 2).mean(-1, keepdim=True).add(norm.eps).sqrt() * norm.weight + norm.bias


def pre(x: Tensor, f: dict[str, Toy], w: Any) -> Tensor:
    for name, sublayer in f.items():
        x = x + torch.tanh(normed(x, w.norm[name]) @ sublayer.weight)
    return x


def post(x: Tensor, f: dict[str, Toy], w: Any) -> Tensor:
    for name, sublayer in f.items():
        x = normed(x + torch.tanh(x @ sublayer.weight), w.norm[name])
    return x


def macaron(x: Tensor, f: dict[str, Toy], w: Any) -> Tensor:
    x = x + 0.5 * torch.tanh(normed(x, w.norm["pre_ffn"]) @ f["pre_ffn"].weight)
    x = x + torch.tanh(normed(x, w.norm["attn"]) @ f["attn"].weight)
    return x + 0.5 * torch.tanh(normed(x, w.norm["ffn"]) @ f["ffn"].weight)


def macaron_post(x: Tensor, f: dict[str, Toy], w: Any) -> Tensor:
    x = normed(x + 0.5 * torch.tanh(x @ f["pre_ffn"].weight), w.norm["pre_ffn"])
    x = normed(x + torch.tanh(x @ f["attn"].weight), w.norm["attn"])
    return normed(x + 0.5 * torch.tanh(x @ f["ffn"].weight), w.norm["ffn"])


def sandwich_norm(x: Tensor, f: dict[str, Toy], w: Any) -> Tensor:
    for name, sublayer in f.items():
        x = x + normed(torch.tanh(normed(x, w.norm[name]) @ sublayer.weight), w.out[name])
    return x


def parallel(x: Tensor, f: dict[str, Toy], w: Any) -> Tensor:
    return x + sum(torch.tanh(normed(x, w.norm[name]) @ sublayer.weight) for name, sublayer in f.items())


def parallel_shared(x: Tensor, f: dict[str, Toy], w: Any) -> Tensor:
    return x + sum(torch.tanh(normed(x, w.norm) @ sublayer.weight) for sublayer in f.values())


def rezero(x: Tensor, f: dict[str, Toy], w: Any) -> Tensor:
    for sublayer in f.values():
        x = x + w.alpha[0] * torch.tanh(x @ sublayer.weight)
    return x


def rezero_each(x: Tensor, f: dict[str, Toy], w: Any) -> Tensor:
    for number, sublayer in enumerate(f.values()):
        x = x + w.alpha[number] * torch.tanh(x @ sublayer.weight)
    return x


def gated(x: Tensor, f: dict[str, Toy], w: Any) -> Tensor:
    for name, sublayer in f.items():
        gate = w.gate[name]
        wr, wz, wg = gate.of_branch.weight.chunk(3)
        ur, uz = gate.of_stream.weight.chunk(2)
        y = torch.tanh(normed(x, w.norm[name]) @ sublayer.weight).clamp(min=0)
        r = 1 / (1 + torch.exp(-(y @ wr.T + x @ ur.T)))
        z = 1 / (1 + torch.exp(-(y @ wz.T + x @ uz.T - gate.shut)))
        h = torch.tanh(y @ wg.T + (r * x) @ gate.of_reset.weight.T)
        x = (1 - z) * x + z * h
    return x


def gated_cell(x: Tensor, f: dict[str, Toy], w: Any) -> Tensor:
    """What torch's own cell makes of branch and stream."""
    for name, sublayer in f.items():
        gate = w.gate[name]
        y = torch.tanh(normed(x, w.norm[name]) @ sublayer.weight)
        weights = (gate.of_branch.weight, gate.of_stream.weight, gate.of_branch.bias, gate.of_stream.bias)
        cell = torch._VF.gru_cell(y.reshape(-1, DIM), x.reshape(-1, DIM), *weights)  # type: ignore[attr-defined]
        x = cell.reshape(x.shape)
    return x


TWO, THREE = ("attn", "ffn"), ("pre_ffn", "attn", "ffn")
HALVES = {"pre_ffn": 0.5, "ffn": 0.5}


@pytest.mark.parametrize(
    ("wiring", "names", "twin"),
    [
        ("pre", TWO, pre),
        ("post", TWO, post),
        ({"kind": "pre", "scale": HALVES}, THREE, macaron),
        ({"kind": "post", "scale": HALVES}, THREE, macaron_post),
        ("sandwich-norm", TWO, sandwich_norm),
        ("parallel", THREE, parallel),
        ("parallel-shared", THREE, parallel_shared),
        ("rezero", TWO, rezero),
        ({"kind": "rezero", "per": "sublayer"}, TWO, rezero_each),
        ("gated", TWO, gated),
        ("gated-cell", TWO, gated_cell),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_wiring_is_its_formula(wiring: Any, names: tuple[str, ...], twin: Callable[..., Tensor]) -> None:
    sublayers = {name: ATTENTION if name == "attn" else FFN for name in names}
    block = next(m for m in model_of(wiring=wiring, sublayers=sublayers).modules() if isinstance(m, Block))
    toys = {name: Toy(seed) for seed, name in enumerate(names)}
    x = random(2, LENGTH, DIM).requires_grad_()
    leaves = [x, *block.wiring.parameters(), *(toy.weight for toy in toys.values())]
    agree(lambda: block.wiring(x, toys, context(x)), lambda: twin(x, toys, block.wiring), leaves)


def test_a_fresh_rezero_is_the_identity_and_its_alphas_learn() -> None:
    config = {"vocab": VOCAB, "dim": DIM, "context": 16, "heads": {"lm": {"tied": False}}}
    stack = {"layers": 2, "norm": "none", "block": {"wiring": "rezero", "sublayers": {"attn": ATTENTION, "ffn": FFN}}}
    model = construct(find("graph", "decoder").Config.model_validate(config | {"stack": stack}))
    model.to_empty(device="cpu").initialise(0)
    ids = torch.arange(LENGTH)[None]
    hidden = model.hidden(input_ids=ids)
    torch.testing.assert_close(hidden.states, model.embed.tokens(ids))  # type: ignore[operator, union-attr]
    model.losses({"input_ids": ids}, {"lm": ids.roll(-1)})["lm"].mean().backward()
    for name, parameter in model.stack.named_parameters():
        assert (parameter.grad.abs().sum() > 0) == ("alpha" in name), name  # type: ignore[union-attr]


def test_fresh_gates_are_nearly_shut() -> None:
    model = construct(
        find("graph", "decoder").Config.model_validate(
            {
                "vocab": VOCAB,
                "dim": DIM,
                "stack": {"layers": 1, "block": {"wiring": "gated", "sublayers": {"ffn": FFN}}},
            }
        )
    )
    model.to_empty(device="cpu").initialise(0)
    gate = model.stack.blocks[0].wiring.gate["ffn"]  # type: ignore[index, union-attr]
    assert gate.shut.tolist() == [2.0] * DIM
    x, y = random(1, 3, DIM).float(), torch.zeros(1, 3, DIM)
    torch.testing.assert_close(gate(x, y), x * (1 - 1 / (1 + math.e**2)), atol=0.1, rtol=0.0)


def test_rows_go_past_a_sublayer_as_often_as_said_and_none_when_evaluated() -> None:
    block = next(
        m for m in model_of(wiring={"kind": "pre", "drop_path": 0.25}).modules() if isinstance(m, Block)
    ).train()
    torch.manual_seed(0)
    y = torch.ones(20000, 1, 1)
    kept = block.wiring.path(y)  # type: ignore[union-attr, operator]
    assert kept.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert abs(kept.mean().item() - 1.0) < 0.01
    assert torch.equal(block.eval().wiring.path(y), y)  # type: ignore[union-attr, operator]


@pytest.mark.parametrize(
    ("layers", "ends", "names", "expected"),
    [
        (16, 6, ("attn", "ffn"), "aaaaaa" + "af" * 10 + "ffffff"),
        (6, 6, ("attn", "ffn"), "aaaaaaffffff"),
        (3, 0, ("attn", "ffn"), "afafaf"),
        (3, 1, ("attn", "cross", "ffn"), "aacfacff"),
        (3, 2, ("pre_ffn", "attn", "ffn"), "aapafff"),
    ],
)
def test_sandwich_order_is_the_papers_string(layers: int, ends: int, names: tuple[str, ...], expected: str) -> None:
    made = {"attn": ATTENTION, "cross": {"kind": "cross-attention", "heads": 2}, "ffn": FFN, "pre_ffn": FFN}
    wiring = {"kind": "pre", "scale": HALVES} if "pre_ffn" in names else "pre"
    model = model_of(
        wiring=wiring,
        sublayers={name: made[name] for name in names},
        stack={"layers": layers, "order": {"kind": "sandwich", "ends": ends}},
        memory=DIM,
    )
    assert isinstance(model.stack, Stack)
    assert "".join(name[0] for block in model.stack.blocks for name in block.names) == expected  # type: ignore[union-attr]
    x = random(1, LENGTH, DIM)
    ctx = context(x, memory=random(1, 5, DIM, seed=6))
    y = x
    shared = model.stack.shared.prepare(x, ctx)
    for block in model.stack.blocks:
        for name in block.names:  # type: ignore[union-attr]
            part = getattr(block, name)
            weight = 0.5 if name in HALVES and "pre_ffn" in names else 1.0
            y = y + weight * part(normed(y, block.wiring.norm[name]), shared)  # type: ignore[union-attr, index]
    torch.testing.assert_close(model.stack(x, ctx), normed(y, model.stack.norm))


@pytest.mark.parametrize(
    ("stack", "words"),
    [
        ({"layers": 2, "order": {"kind": "sandwich", "ends": 3}}, "3 ends do not fit 2 layers"),
        ({"order": {"kind": "sandwich", "ends": 1, "front": "atn"}}, "did you mean 'attn'"),
        (
            {
                "block": None,
                "blocks": {"a": {"sublayers": {"attn": ATTENTION}}},
                "pattern": ["a"],
                "order": {"kind": "sandwich", "ends": 1},
            },
            "both say what stands where",
        ),
    ],
)
def test_orders_that_cannot_be_are_refused(stack: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        model_of(stack=stack)


def test_scale_of_a_sublayer_that_is_not_there_is_refused() -> None:
    with pytest.raises(Refused, match=r"wiring\.scale: the block has no sublayer 'fnn'; did you mean 'ffn'"):
        model_of(wiring={"kind": "pre", "scale": {"fnn": 0.5}})


@pytest.mark.parametrize("position", ["none", "t5", "rotary"])
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_memory_tokens_are_vectors_in_front_that_are_cut_off(kind: str, position: str) -> None:
    """The twin is given the vectors as part of its text."""
    changes: dict[str, Any] = {"stack": {"position": position}}
    model, twin = model_of(kind, memory_tokens=3, **changes), model_of(kind, **changes)
    twin.load_state_dict({name: v for name, v in model.state_dict().items() if not name.startswith("prefix")})
    ids = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    words = model.embed.tokens(ids)  # type: ignore[operator, union-attr]
    front: Tensor = model.prefix.vectors  # type: ignore[assignment, union-attr]

    def slow() -> Tensor:
        with_front = torch.cat((front.expand(2, -1, -1), words), dim=1)
        return twin(inputs_embeds=with_front).last_hidden_state[:, 3:]

    agree(lambda: model(inputs_embeds=words).last_hidden_state, slow, [front, words])
    seen = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert {tuple(states.shape) for states in seen} == {(2, LENGTH, DIM)}


def test_memory_tokens_are_seen_through_any_window_and_in_every_document() -> None:
    near = {**ATTENTION, "mask": {"kind": "window", "left": 1}}
    model = model_of(memory_tokens=2, sublayers={"attn": near}, stack={"layers": 1})
    ids = torch.arange(LENGTH)[None]
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    model(input_ids=ids, document_ids=documents).last_hidden_state[0, -1].sum().backward()
    assert (model.prefix.vectors.grad.abs().sum(-1) > 0).all()  # type: ignore[union-attr]
    words = model.embed.tokens.weight.grad.abs().sum(-1)[:LENGTH] > 0  # type: ignore[union-attr]
    assert words.tolist() == [False] * 5 + [True] * 2


def test_memory_tokens_of_a_decoder_do_not_read_and_those_of_an_encoder_do() -> None:
    for kind in ("decoder", "encoder"):
        model = model_of(kind, memory_tokens=2, stack={"layers": 2})
        kept: list[Tensor] = []
        model.stack.register_forward_hook(lambda module, given, out, kept=kept: kept.append(out[:, :2].detach()))
        for ids in (torch.arange(LENGTH)[None], torch.arange(LENGTH).flip(0)[None]):
            model(input_ids=ids)
        assert torch.equal(*kept) == (kind == "decoder")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stack": {"recurrence": {"length": 4}}}, "between a text and what is remembered of it"),
        ({"sublayers": {"attn": {"kind": "local", "heads": 2, "radius": 2}}}, "chooses among the keys by itself"),
        (
            {"sublayers": {"attn": {"kind": "sliding-global", "heads": 2, "radius": 2}}},
            "have no place in global_attention_mask",
        ),
    ],
)
def test_memory_tokens_are_refused_where_not_all_could_see_them(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(Refused, match=words):
        model_of("encoder", memory_tokens=2, **changes)


@pytest.mark.parametrize("position", ["t5", "distance-mlp", "alibi", "rotary", {"kind": "shaw", "distance": 6}])
def test_padding_between_memory_tokens_and_words_does_not_count(position: Any) -> None:
    model = model_of(memory_tokens=3, stack={"position": position})
    ids = torch.arange(LENGTH)[None]
    padded, mask = F.pad(ids, (4, 0)), torch.tensor([[0] * 4 + [1] * LENGTH])
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    found = model(input_ids=padded, attention_mask=mask, position_ids=places).last_hidden_state[:, 4:]
    torch.testing.assert_close(found, model(input_ids=ids).last_hidden_state)


def test_documents_cannot_be_packed_behind_memory_tokens_that_read() -> None:
    model = model_of("encoder", memory_tokens=2)
    with pytest.raises(UserError, match="read the whole row"):
        model(input_ids=torch.zeros(1, 4, dtype=torch.long), document_ids=torch.zeros(1, 4, dtype=torch.long))


def test_continuous_model_is_its_formula() -> None:
    model = model_of(
        "decoder", embed={"kind": "continuous", "width": 5}, heads={"continuous": {"width": 6}}, stack={"layers": 1}
    )
    values = random(2, LENGTH, 5).requires_grad_()
    into, out = model.embed.project, model.heads["continuous"].project  # type: ignore[union-attr]

    def slow() -> Tensor:
        x = values @ into.weight.T + into.bias  # type: ignore[union-attr, operator]
        return model.stack(x, context(x)) @ out.weight.T + out.bias  # type: ignore[union-attr, operator]

    leaves = [values, *into.parameters(), *out.parameters()]  # type: ignore[union-attr, operator]
    agree(lambda: model(input_values=values).predictions, slow, leaves)
    wanted = random(2, LENGTH, 6, seed=8)
    wanted[0, 2:] = -100
    term = model.losses({"input_values": values}, {"continuous": wanted})["continuous"]
    apart = (model(input_values=values).predictions - wanted)[wanted != -100]
    torch.testing.assert_close(term.mean(), (apart**2).mean())
    shifted = model(input_values=values, labels=wanted).loss
    apart = (model(input_values=values).predictions[:, :-1] - wanted[:, 1:])[wanted[:, 1:] != -100]
    torch.testing.assert_close(shifted, (apart**2).mean())


def test_continuous_model_without_widths_reads_and_writes_vectors_as_they_are() -> None:
    model = model_of("encoder", embed="continuous", heads={"continuous": {}})
    values = random(2, LENGTH, DIM)
    torch.testing.assert_close(model(input_values=values).predictions, model.stack(values, context(values)))


def test_continuous_input_is_refused_where_it_cannot_be() -> None:
    with pytest.raises(Refused, match=r"heads\.lm\.tied: there is no token table"):
        model_of(embed={"kind": "continuous", "width": 5})
    model = model_of(embed={"kind": "continuous", "width": 5}, heads={"continuous": {"width": 5}})
    with pytest.raises(ValueError, match=r"expected \(rows, places, 5\)"):
        model(input_values=random(2, LENGTH, 4))
    with pytest.raises(ValueError, match="reads input_values"):
        model(input_ids=torch.zeros(1, 3, dtype=torch.long))


def test_cross_attender_reads_the_context_alone() -> None:
    cross = {"kind": "cross-attention", "heads": 1, "required": True}
    model = model_of(
        "encoder", embed="continuous", heads={}, memory=12, sublayers={"cross": cross}, stack={"layers": 1}
    )
    nodes, around = random(2, 3, DIM).requires_grad_(), random(2, 5, 12, seed=7).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    block = model.stack.blocks[0]  # type: ignore[index, union-attr]

    def slow() -> Tensor:
        part, x = block.cross, normed(nodes, block.wiring.norm["cross"])  # type: ignore[union-attr, index]
        rows = []
        for row in range(2):
            real = around[row, : int(mask[row].sum())]
            q, k, v = (p(z) for p, z in ((part.q, x[row]), (part.k, real), (part.v, real)))
            rows.append(nodes[row] + part.o(F.softmax(q @ k.T / math.sqrt(DIM), -1) @ v))
        return normed(torch.stack(rows), model.stack.norm)

    def fast() -> Tensor:
        out = model(input_values=nodes, encoder_hidden_states=around, encoder_attention_mask=mask)
        return out.last_hidden_state  # type: ignore[no-any-return]

    agree(fast, slow, [nodes, around])
    with pytest.raises(UserError, match="'cross' reads a memory, and none was given"):
        model(input_values=nodes)


@pytest.mark.parametrize(("shared", "tied", "tables"), [(True, False, 1), (True, True, 1), (False, False, 2)])
def test_token_tables_of_both_sides_are_one_where_shared(shared: bool, tied: bool, tables: int) -> None:
    cross = {"kind": "cross-attention", "heads": 2}
    side = {"stack": {"layers": 1, "block": {"sublayers": {"attn": ATTENTION, "ffn": FFN}}}}
    reads = {"stack": {"layers": 1, "block": {"sublayers": {"attn": ATTENTION, "cross": cross, "ffn": FFN}}}}
    config = {"vocab": VOCAB, "dim": DIM, "encoder": side, "decoder": reads, "share_tokens": shared}
    model = fresh("encoder-decoder", config | {"pad": 0, "heads": {"lm": {"tied": tied}}})
    found = [name for name, p in model.named_parameters() if p.shape == (VOCAB, DIM) and "heads" not in name]
    assert len(found) == tables
    assert (model.heads["lm"].decoder is None) == tied  # type: ignore[union-attr]
    source, target = torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5]])
    model.hidden(source, target).states.square().sum().backward()
    if shared:
        used = model.tokens.weight.grad.abs().sum(-1) > 0  # type: ignore[union-attr]
        assert used.nonzero().flatten().tolist() == [1, 2, 3, 4, 5]
