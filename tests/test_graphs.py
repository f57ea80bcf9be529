"""Whole graphs: heads, losses, names in and out, encoder and decoder together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from xtcli.errors import UserError
from xtcli.model import construct
from xtcli.parts.graphs import Graph
from xtcli.registry import example, find, kinds

VOCAB = 53


def block(cross: bool = False, **attention: Any) -> dict[str, Any]:
    sublayers: dict[str, Any] = {"attn": {"kind": "attention", "heads": 4, **attention}}
    if cross:
        sublayers["cross"] = {"kind": "cross-attention", "heads": 4, **attention}
    sublayers["ffn"] = {"kind": "mlp", "hidden": 64}
    return {"sublayers": sublayers}


def encoder(**changes: Any) -> dict[str, Any]:
    config = {
        "vocab": VOCAB,
        "dim": 32,
        "context": 40,
        "pad": 0,
        "embed": {"kind": "tokens", "positions": "learned", "segments": 2, "norm": "inherit"},
        "stack": {"layers": 2, "norm": "none", "block": {"wiring": "post", **block()}},
        "pooler": {},
    }
    return config | changes


def seq2seq(**changes: Any) -> dict[str, Any]:
    config = {
        "vocab": VOCAB,
        "dim": 32,
        "pad": 0,
        "norm": "rms",
        "encoder": {"stack": {"layers": 2, "position": "t5", "block": block(scale=1.0, bias=False)}},
        "decoder": {"stack": {"layers": 3, "position": "t5", "block": block(True, scale=1.0, bias=False)}},
        "heads": {"lm": {"scale": "inverse-sqrt-dim"}},
    }
    return config | changes


def make(kind: str, config: dict[str, Any]) -> Graph:
    model = construct(find("graph", kind).Config.model_validate(config)).to_empty(device="cpu")
    model.initialise(0)
    return model.eval()


def ids(rows: int = 2, length: int = 11, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


LABELS = {
    "lm": {"labels": ids()},
    "continuous": {"labels": torch.ones(2, 11, 32)},
    "mlm": {"labels": torch.where(ids() % 3 == 0, ids(), -100)},
    "nsp": {"next_sentence_label": torch.tensor([0, 1])},
    "sop": {"sentence_order_label": torch.tensor([0, 1])},
    "replaced": {"labels": ids() % 2},
    "sequence": {"labels": torch.tensor([0, 1])},
    "token": {"labels": ids() % 2},
    "span": {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 99])},
    "choice": {"labels": torch.tensor([1])},
    "summary": {"mc_labels": torch.tensor([1])},
}
"""Head -> labels as a caller gives them; every head has an entry, and so a test."""

ELSEWHERE = {"adaptive", "answers", "entity", "entity-span", "mep", "pixels"}
"""Heads of models that read no text, or more than a text, or have labels of their own: they have tests of their own."""


@pytest.mark.parametrize("kind", sorted(set(kinds("head")) - ELSEWHERE))
def test_head_gives_outputs_and_a_loss_that_reaches_it(kind: str) -> None:
    model = make("encoder", encoder(heads={kind: example(kinds("head")[kind].Config)}))
    given = ids()[None] if kind in ("choice", "summary") else ids()
    out = model(input_ids=given, **LABELS[kind])
    loss = out.loss if out.loss is not None else out.mc_loss
    assert torch.isfinite(loss) and loss > 0
    loss.backward()
    # One bias for all choices moves every score alike, which the softmax over choices cannot see.
    seen = [
        p for name, p in model.heads.named_parameters() if name not in ("choice.classifier.bias", "summary.dense.bias")
    ]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in seen)
    bare = model(input_ids=given)
    assert bare.loss is None and "loss" not in bare
    for name, value in bare.items():
        torch.testing.assert_close(value, out[name])


STRANGE = [(kind, given) for kind in LABELS for given in LABELS if LABELS[given].keys() - LABELS[kind].keys()]
"""A head, and another whose labels it does not all read."""


@pytest.mark.parametrize(("kind", "given"), STRANGE)
def test_labels_that_no_head_reads_are_refused(kind: str, given: str) -> None:
    """By the names that transformers' model of the one head takes: no loss is asked for in vain."""
    model = make("encoder", encoder(heads={kind: example(kinds("head")[kind].Config)}))
    unread = min(LABELS[given].keys() - LABELS[kind].keys())
    with pytest.raises(TypeError, match=f"{unread}.*{kind}|no input {unread}"):
        model(input_ids=ids()[None] if kind in ("choice", "summary") else ids(), **LABELS[given])


def test_labels_for_a_model_without_heads_are_refused() -> None:
    for model in (make("encoder", encoder(heads={})), make("encoder-decoder", seq2seq(heads={}))):
        with pytest.raises(TypeError, match="no head of this model reads labels; its heads: none"):
            model(input_ids=ids(), labels=ids())


def test_losses_of_several_heads_add_up() -> None:
    heads = {"mlm": {"output": "prediction_logits"}, "nsp": {}}
    model = make("encoder", encoder(heads=heads))
    out = model(input_ids=ids(), **LABELS["mlm"], **LABELS["nsp"])
    ce = torch.nn.functional.cross_entropy
    words = ce(out.prediction_logits.flatten(0, 1), LABELS["mlm"]["labels"].flatten())
    order = ce(out.seq_relationship_logits, LABELS["nsp"]["next_sentence_label"])
    torch.testing.assert_close(out.loss, words + order)


def test_tied_head_has_no_matrix_of_its_own() -> None:
    tied = make("encoder", encoder(heads={"lm": {"tied": True}}))
    untied = make("encoder", encoder(heads={"lm": {"tied": False}}))
    count = [sum(p.numel() for p in model.parameters()) for model in (tied, untied)]
    assert count[1] - count[0] == VOCAB * 32


def test_causal_labels_are_shifted_inside() -> None:
    config = encoder(heads={"lm": {}})
    del config["pooler"]
    model = make("decoder", config)
    out = model(input_ids=ids(), labels=ids())
    aligned = model.losses({"input_ids": ids()[:, :-1]}, {"lm": ids()[:, 1:]})["lm"].mean()
    torch.testing.assert_close(out.loss, aligned)


@pytest.mark.parametrize("pick", ["first", "last", "mean", "pooled"])
def test_sequence_vector_ignores_padding(pick: str) -> None:
    model = make("encoder", encoder(heads={"sequence": {"pick": pick}}))
    short = ids(1, 7)
    padded = torch.cat((short, torch.zeros(1, 4, dtype=torch.long)), dim=1)
    mask = (padded != 0).long()
    torch.testing.assert_close(
        model(input_ids=padded, attention_mask=mask).logits, model(input_ids=short).logits, atol=1e-6, rtol=1e-5
    )


def test_decoder_reads_source_and_ignores_its_padding() -> None:
    model = make("encoder-decoder", seq2seq())
    source, target = ids(2, 9), ids(2, 6, seed=1)
    out = model(input_ids=source, decoder_input_ids=target)
    padded = torch.cat((source, torch.zeros(2, 3, dtype=torch.long)), dim=1)
    masked = model(input_ids=padded, attention_mask=(padded != 0).long(), decoder_input_ids=target)
    torch.testing.assert_close(masked.logits, out.logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(input_ids=source.flip(1), decoder_input_ids=target).logits, out.logits)


def test_decoder_steps_equal_one_pass() -> None:
    model = make("encoder-decoder", seq2seq())
    source, target = ids(2, 9), ids(2, 6, seed=1)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    whole = model(input_ids=source, attention_mask=mask, decoder_input_ids=target).logits
    memory = model.encode(source, mask)
    state = model.new_state(2, 6)
    steps = [
        model(encoder_outputs=memory, attention_mask=mask, decoder_input_ids=target[:, i : i + 1], state=state).logits
        for i in range(6)
    ]
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-5, rtol=1e-5)


def test_labels_alone_are_shifted_right() -> None:
    model = make("encoder-decoder", seq2seq(start=5))
    labels = ids(2, 6, seed=1)
    labels[1, 4:] = -100
    inputs = torch.tensor([[5, *row[:-1]] for row in labels.tolist()]).masked_fill_(
        torch.tensor([[False, *(v == -100 for v in row[:-1])] for row in labels.tolist()]), 0
    )
    out = model(input_ids=ids(), labels=labels)
    torch.testing.assert_close(out.logits, model(input_ids=ids(), decoder_input_ids=inputs).logits)


def test_state_rows_can_be_chosen() -> None:
    config = encoder(heads={"lm": {}})
    del config["pooler"]
    model = make("decoder", config)
    state = model.new_state(2, 20)
    model(input_ids=ids(), state=state)
    state.select(torch.tensor([1, 1, 0]))
    following = torch.tensor([[3], [4], [3]])
    found = model(input_ids=following, state=state).logits[:, -1]
    rows = ids()[[1, 1, 0]]
    expected = model(input_ids=torch.cat((rows, following), 1)).logits[:, -1]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "config", "paths"),
    [
        ("encoder", encoder(stack={"layers": 2, "block": block(heads=5)}), ["model.stack.block.sublayers.attn.heads"]),
        (
            "encoder",
            encoder(stack={"layers": 2, "block": block(heads=4, kv_heads=3)}, heads={"nsp": {}}, pooler=None),
            ["model.stack.block.sublayers.attn.kv_heads", "model.heads.nsp"],
        ),
        ("encoder", encoder(stack={"layers": 1, "block": block(True)}), ["model.stack.block.sublayers.cross"]),
        ("encoder", encoder(context=None), ["model.embed.positions"]),
    ],
)
def test_impossible_builds_name_every_path(kind: str, config: dict[str, Any], paths: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        construct(find("graph", kind).Config.model_validate(config))
    assert [problem.path for problem in caught.value.problems] == paths


def test_same_seed_same_weights_and_other_seed_others() -> None:
    def weights(seed: int) -> torch.Tensor:
        model = construct(find("graph", "encoder").Config.model_validate(encoder(heads={"mlm": {}})))
        model.to_empty(device="cpu").initialise(seed)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize(("residual", "share"), [(True, 4**-0.5), (False, 1.0)])
def test_residual_matrices_start_smaller(residual: bool, share: float) -> None:
    config = encoder(heads={"mlm": {}}, init={"kind": "normal", "std": 0.02, "residual": residual}, dim=128)
    model = make("encoder", config)
    block_one = model.stack.blocks[0]
    assert block_one.attn.q.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block_one.attn.o.weight.std().item() == pytest.approx(0.02 * share, rel=0.05)


def test_fan_in_matches_its_formula() -> None:
    model = make("encoder-decoder", seq2seq(init="fan_in", dim=128))
    attention = model.decoder.stack.blocks[0].attn
    assert model.tokens.weight.std().item() == pytest.approx(1.0, rel=0.05)
    assert attention.q.weight.std().item() == pytest.approx((128 * 32) ** -0.5, rel=0.05)
    assert attention.k.weight.std().item() == pytest.approx(128**-0.5, rel=0.05)


def test_tokens_beyond_the_positions_are_refused() -> None:
    model = make("encoder", encoder(heads={"mlm": {}}))
    with pytest.raises(UserError, match="41 tokens, the model's positions end at 40"):
        model(input_ids=ids(1, 41))
