"""Memory tokens, vectors in the place of tokens, contexts and shared tables, each against a slow twin."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from x_models import ATTENTION, DIM, FFN, LENGTH, VOCAB, agree, context, fresh, model_of, normed, random
from x_options import base

from xtcli.errors import UserError
from xtcli.parts.scope import Refused


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


@pytest.mark.parametrize("position", ["t5", "alibi", "rotary", {"kind": "shaw", "distance": 6}])
def test_padding_behind_memory_tokens_does_not_count_in_an_encoder_decoder(position: Any) -> None:
    tree = base("encoder-decoder")
    for side in ("encoder", "decoder"):
        tree[side] |= {"memory_tokens": 3}
        tree[side]["stack"]["position"] = position
    model = fresh("encoder-decoder", tree)
    ids, mask = torch.arange(LENGTH)[None], torch.tensor([[0] * 4 + [1] * LENGTH])
    padded = F.pad(ids, (4, 0))
    found = model(input_ids=padded, attention_mask=mask, decoder_input_ids=padded, decoder_attention_mask=mask)
    torch.testing.assert_close(found.logits[:, 4:], model(input_ids=ids, decoder_input_ids=ids).logits)


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


AHEAD = {"kind": "window", "left": 2, "right": 2}


@pytest.mark.parametrize(
    "mask", ["full", AHEAD, {"kind": "any", "of": ["causal", AHEAD]}, {"kind": "all", "of": [AHEAD]}]
)
def test_a_decoder_is_not_shown_what_it_is_to_predict(mask: Any) -> None:
    sublayers = {"attn": ATTENTION | {"mask": mask}, "ffn": FFN}
    with pytest.raises(Refused, match=r"attn\.mask: '\w+' shows keys behind the query"):
        model_of("decoder", sublayers=sublayers)
    assert model_of("encoder", sublayers=sublayers, heads={"mlm": {}})


def test_rules_within_a_rule_inherit() -> None:
    near, joined = ({"kind": "window", "left": 2}, {"kind": "all", "of": ["inherit", {"kind": "window", "left": 2}]})
    ids = torch.arange(LENGTH)[None]
    found = [
        model_of("decoder", sublayers={"attn": ATTENTION | {"mask": mask}, "ffn": FFN})(input_ids=ids).logits
        for mask in (near, joined)
    ]
    torch.testing.assert_close(*found)
