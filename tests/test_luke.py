"""LUKE against the reference: every class, every option, with and without entities; files there and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import opens_cleanly, same, save, tensors
from references import VOCAB, ids, mask, noise, randomise
from test_parity import converted, difference
from torch import Tensor

from xtcli.convert import convert
from xtcli.errors import UserError
from xtcli.model import Model, construct
from xtcli.parts.context import Ctx
from xtcli.registry import find
from xtcli.train.transforms import compile_blocks

PAD, ENTITIES = 1, 23
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "entity_vocab_size": ENTITIES,
    "hidden_size": 24,
    "entity_emb_size": 10,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 50,
    "pad_token_id": PAD,
}
TOLERANCE = 2e-5


def reference(name: str, options: dict[str, Any]) -> Any:
    said = SIZES | json.loads(json.dumps(options))
    more = {key: said.pop(key) for key in ("add_pooling_layer",) if key in said}
    cls = getattr(transformers, name)
    return randomise(cls(cls.config_class(**said), **more))


def whole(high: int, *shape: int, seed: int = 4) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def mentions(rows: int, count: int, width: int, length: int) -> dict[str, Tensor]:
    """Entities at some places; the last mention of each row is empty, others are shorter than `width`."""
    places = whole(length, rows, count, width)
    places[:, ::2, width - 1 :] = -1
    if count > 1:
        places[:, -1] = -1
    return {"entity_ids": whole(ENTITIES, rows, count), "entity_position_ids": places}


def labels(name: str, config: Any, entities: int) -> dict[str, Tensor]:
    """For four texts of nine tokens."""
    words = whole(VOCAB, 4, 9).masked_fill(torch.arange(9) % 4 == 1, -100)
    match name.removeprefix("Luke"):
        case "ForMaskedLM":
            hidden = whole(ENTITIES, 4, entities).masked_fill(torch.arange(entities) % 3 == 1, -100)
            return {"labels": words} | ({"entity_labels": hidden} if entities else {})
        case "ForEntityClassification" | "ForEntityPairClassification":
            return {"labels": whole(config.num_labels, 4)}
        case "ForEntitySpanClassification":
            return {"labels": whole(config.num_labels, 4, entities)}
        case "ForTokenClassification":
            return {"labels": words.clamp(max=config.num_labels - 1)}
        case "ForMultipleChoice":
            return {"labels": torch.tensor([1, 0])}
        case "ForQuestionAnswering":
            return {"start_positions": torch.tensor([0, 3, 8, 9]), "end_positions": torch.tensor([2, 3, 30, 1])}
        case "ForSequenceClassification":
            if config.problem_type == "multi_label_classification":
                return {"labels": whole(2, 4, config.num_labels).float()}
            number = config.num_labels == 1 or config.problem_type == "regression"
            shape = (4, config.num_labels)
            return {"labels": noise(*shape) if number else whole(config.num_labels, 4)}
    return {}


def feeds(name: str, config: Any) -> dict[str, dict[str, Tensor]]:
    reads = "Entity" in name
    found: dict[str, dict[str, Tensor]] = {}
    for length, count in ((1, 2), (17, 5), (48, 2)):
        found[f"length {length}"] = {"input_ids": ids(2, length)} | mentions(2, count, 3, length)
    found["types"] = {
        "input_ids": ids(2, 9),
        "token_type_ids": torch.tensor([[0] * 4 + [1] * 5, [1] * 9]),
        "entity_token_type_ids": whole(2, 2, 4),
    } | mentions(2, 4, 2, 9)
    found["places"] = {"input_ids": ids(2, 9), "position_ids": torch.arange(9)[None].expand(2, -1) + 5}
    found["places"] |= mentions(2, 3, 1, 50)
    found["embeds"] = {"inputs_embeds": noise(2, 9, 24)} | mentions(2, 3, 4, 9)
    found["loss"] = {"input_ids": ids(4, 9)} | mentions(4, 3, 4, 9) | labels(name, config, 3)
    for side in ("right", "left"):
        kept = mask(4, 12, side)
        found[f"padded {side}"] = {"input_ids": ids(4, 12).masked_fill(kept == 0, PAD), "attention_mask": kept}
        found[f"padded {side}"] |= mentions(4, 5, 3, 12)
        found[f"both padded {side}"] = found[f"padded {side}"] | {"entity_attention_mask": mask(4, 5, side)}
    found["padded entities"] = {"input_ids": ids(4, 9), "entity_attention_mask": mask(4, 5, "right")}
    found["padded entities"] |= mentions(4, 5, 3, 9)
    for given in found.values():
        if name.endswith("SpanClassification"):
            shape = given["entity_ids"].shape
            length = given.get("input_ids", given.get("inputs_embeds")).shape[1]  # type: ignore[union-attr]
            given["entity_start_positions"] = whole(length, *shape, seed=5)
            given["entity_end_positions"] = whole(length, *shape, seed=6)
    if name.endswith(("EntityClassification", "PairClassification")):
        shape = (4, config.num_labels)
        found["several labels"] = found["loss"] | {"labels": whole(2, *shape)}
    if name.endswith("SpanClassification"):
        found["several labels"] = found["loss"] | {"labels": whole(2, 4, 3, config.num_labels)}
    if not reads:
        kept = mask(4, 12, "right")
        found["no entities"] = {"input_ids": ids(2, 17)}
        found["none, padded"] = {"input_ids": ids(4, 12).masked_fill(kept == 0, PAD), "attention_mask": kept}
        found["none, loss"] = {"input_ids": ids(4, 9)} | labels(name, config, 0)
    if name.endswith("MultipleChoice"):
        found = {
            feed: {key: value if key == "labels" else value.unflatten(0, (-1, 2)) for key, value in given.items()}
            for feed, given in found.items()
        }
    return found


def compare(name: str, theirs: Any, ours: Any) -> float:
    """The largest difference over all feeds; outputs at padded entities mean nothing."""
    worst = 0.0
    for feed, given in feeds(name, theirs.config).items():
        given = {key: value.clone() for key, value in given.items()}
        off = difference(theirs, ours, given)
        assert all(value <= TOLERANCE for value in off.values()), (feed, off)
        worst = max(worst, *off.values())
    return worst


ACTIVATIONS = ("gelu_new", "relu", "silu", "tanh")
CASES: list[tuple[str, dict[str, Any]]] = [
    ("LukeModel", {}),
    ("LukeModel", {"add_pooling_layer": False}),
    ("LukeModel", {"use_entity_aware_attention": False}),
    ("LukeModel", {"entity_emb_size": 24, "num_attention_heads": 3}),
    ("LukeModel", {"entity_emb_size": 40, "num_hidden_layers": 1}),
    ("LukeForMaskedLM", {}),
    ("LukeForMaskedLM", {"use_entity_aware_attention": False}),
    ("LukeForMaskedLM", {"tie_word_embeddings": False}),
    ("LukeForMaskedLM", {"entity_emb_size": 24, "type_vocab_size": 3, "chunk_size_feed_forward": 1}),
    ("LukeForMaskedLM", {"layer_norm_eps": 0.01, "num_hidden_layers": 3, "initializer_range": 0.1}),
    *(("LukeForMaskedLM", {"hidden_act": name}) for name in ACTIVATIONS),
    ("LukeForEntityClassification", {}),
    ("LukeForEntityClassification", {"num_labels": 5, "use_entity_aware_attention": False}),
    ("LukeForEntityPairClassification", {"num_labels": 4}),
    ("LukeForEntityPairClassification", {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3}),
    ("LukeForEntitySpanClassification", {}),
    ("LukeForEntitySpanClassification", {"num_labels": 5, "entity_emb_size": 24}),
    ("LukeForSequenceClassification", {"num_labels": 3, "classifier_dropout": 0.3}),
    ("LukeForSequenceClassification", {"num_labels": 1}),
    ("LukeForSequenceClassification", {"num_labels": 3, "problem_type": "regression"}),
    ("LukeForSequenceClassification", {"num_labels": 5, "problem_type": "multi_label_classification"}),
    ("LukeForTokenClassification", {"num_labels": 4}),
    ("LukeForQuestionAnswering", {}),
    ("LukeForMultipleChoice", {}),
    ("LukeForMultipleChoice", {"use_entity_aware_attention": False, "classifier_dropout": 0.0}),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_equals_the_reference(name: str, options: dict[str, Any]) -> None:
    theirs = reference(name, options)
    compare(name, theirs, converted(theirs, "luke"))


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_files_come_back_byte_for_byte(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    theirs = reference(name, options)
    source = save(theirs, tmp_path / "source")
    report = convert(source, tmp_path / "ours", family="auto", verify=True)
    assert report.verified is not None and report.verified["worst"] < TOLERANCE
    convert(tmp_path / "ours", tmp_path / "back", to="hf")
    assert same(tensors(source), tensors(tmp_path / "back"))
    more = {key: value for key, value in options.items() if key == "add_pooling_layer"}
    opens_cleanly(tmp_path / "back", type(theirs), **more)


def test_published_options_without_effect_are_taken(tmp_path: Path) -> None:
    source = save(reference("LukeForMaskedLM", {}), tmp_path / "source")
    config = source / "config.json"
    said = {"bert_model_name": "roberta-base", "position_embedding_type": "absolute", "cls_entity_prediction": False}
    config.write_text(json.dumps(json.loads(config.read_text()) | said))
    convert(source, tmp_path / "ours", family="auto")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"entity_bias": True}))
    with pytest.raises(UserError, match="entity_bias"):
        convert(source, tmp_path / "again", family="auto")


def tree(**changes: Any) -> dict[str, Any]:
    """A small model with entities; `changes` are of its stack."""
    attn = {"kind": "entity-aware", "heads": 4}
    stack = {
        "kind": "entities",
        "layers": 2,
        "entities": {"vocab": 9, "width": 8},
        "block": {"sublayers": {"attn": attn, "ffn": {"kind": "mlp", "hidden": 48}}},
    }
    return {"vocab": 67, "dim": 32, "context": 32, "stack": stack | changes, "heads": {"mlm": {}, "mep": {}}}


def make(config: dict[str, Any], graph: str = "encoder") -> Model:
    model = construct(find("graph", graph).Config.model_validate(config)).to_empty(device="cpu")  # type: ignore[attr-defined]
    model.initialise(0)
    return model.double().eval()  # type: ignore[no-any-return]


def given() -> dict[str, Tensor]:
    found = {"input_ids": whole(67, 2, 12), "attention_mask": mask(2, 12, "right")}
    entities = {"entity_ids": whole(9, 2, 4), "entity_position_ids": whole(12, 2, 4, 3)}
    return found | entities | {"entity_attention_mask": mask(2, 4, "right")}


def four_products(attn: Any, x: Tensor, ctx: Ctx) -> Tensor:
    """Entity-aware attention as the paper writes it: scores of each pair of kinds by themselves."""
    cut = x.shape[1] - ctx.behind
    words, entities = x[:, :cut], x[:, cut:]
    k, v = attn.split(attn.k(x), attn.groups), attn.split(attn.v(x), attn.groups)
    k, v = (one.repeat_interleave(attn.heads // attn.groups, 1) for one in (k, v))
    rows = []
    for asks, to_words, to_entities in ((words, attn.q, attn.q_entity), (entities, attn.entity_q_word, attn.entity_q)):
        parts = [
            attn.split(query(asks), attn.heads) @ keys.transpose(-1, -2)
            for query, keys in ((to_words, k[:, :, :cut]), (to_entities, k[:, :, cut:]))
        ]
        rows.append(torch.cat(parts, -1))
    scores = torch.cat(rows, 2) * attn.scale
    if ctx.keep is not None:
        scores = scores.masked_fill(~ctx.keep[:, None, None], float("-inf"))
    return attn.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kv_heads", [None, 2, 1])
@pytest.mark.parametrize("padded", [False, True])
def test_two_faces_are_four_products(kv_heads: int | None, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tree()
    config["stack"]["block"]["sublayers"]["attn"]["kv_heads"] = kv_heads
    model, inputs = make(config), given()
    if not padded:
        inputs = {name: value for name, value in inputs.items() if not name.endswith("mask")}
    targets = {"mlm": inputs["input_ids"], "mep": inputs["entity_ids"]}

    def run() -> tuple[Tensor, list[Tensor]]:
        terms = model.losses(inputs, targets)
        loss = terms["mlm"].mean() + terms["mep"].mean()
        return loss, list(torch.autograd.grad(loss, list(model.parameters())))

    loss, gradients = run()
    attn: Any = model.stack.blocks[0].attn  # type: ignore[union-attr, index]
    monkeypatch.setattr(type(attn), "forward", four_products)
    slow, expected = run()
    torch.testing.assert_close(loss, slow)
    for found, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-7)


def test_padded_and_absent_entities_change_nothing() -> None:
    model, inputs = make(tree()), given()
    inputs["entity_attention_mask"] = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0]])
    short = {name: value[:, :2] if name.startswith("entity") else value for name, value in inputs.items()}
    whole_, cut = model(**inputs), model(**short)
    kept = inputs["attention_mask"].bool()
    torch.testing.assert_close(whole_.last_hidden_state[kept], cut.last_hidden_state[kept])
    torch.testing.assert_close(whole_.entity_last_hidden_state[:, :2], cut.entity_last_hidden_state)
    alone = model(input_ids=inputs["input_ids"])
    assert alone.entity_last_hidden_state is None and alone.entity_logits is None and alone.logits is not None
    hidden = model(**short, output_hidden_states=True)
    assert [one.shape for one in hidden.entity_hidden_states] == [(2, 2, 32)] * 3
    assert [one.shape for one in hidden.hidden_states] == [(2, 12, 32)] * 3


def test_blocks_with_entities_compile_without_a_graph_break() -> None:
    model, inputs = make(tree()), given()
    expected = model(**inputs).entity_logits
    torch._dynamo.reset()
    compile_blocks(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(model(**inputs).entity_logits, expected)


BLOCK = tree()["stack"]["block"]
REFUSED: list[tuple[dict[str, Any], str]] = [
    (tree(position="rotary"), "entities have no place in the row"),
    (tree(position={"kind": "t5", "buckets": 8, "furthest": 20}), "entities have no place in the row"),
    (tree(position={"kind": "shaw", "distance": 5}), "entities have no place in the row"),
    (
        tree(
            block={
                "sublayers": {
                    "attn": {"kind": "entity-aware", "heads": 4, "mask": {"kind": "window", "left": 2, "right": 2}}
                }
            }
        ),
        "sees keys by their place",
    ),
    (tree(block={"sublayers": {"mixer": {"kind": "fourier"}}}), "mixes places by their order"),
    (tree(block={"sublayers": {"attn": {"kind": "entity-aware", "heads": 4, "memory": 2}}}), "in a way of its own"),
    (tree(recurrence={"length": 4}), "runs blocks more than once"),
    (tree() | {"memory_tokens": 2}, "memory tokens have no place in entity_"),
    (tree() | {"stack": {"layers": 2, "block": BLOCK}}, "there are no entities in this stack"),
    (
        tree() | {"stack": {"layers": 2, "block": {"sublayers": {"attn": {"kind": "attention", "heads": 4}}}}},
        "it reads entities, and the model has none",
    ),
]


@pytest.mark.parametrize(("config", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_entities_cannot_stand_behind_is_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make(config)


def test_a_decoder_reads_no_entities() -> None:
    with pytest.raises(UserError, match="sees both ways"):
        make(tree() | {"heads": {"lm": {}}}, "decoder")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"entity_ids": None}, ValueError, "without entity_ids"),
        ({"entity_position_ids": None}, ValueError, "entity_position_ids none"),
        ({"document_ids": torch.zeros(2, 12, dtype=torch.long)}, UserError, "a row of its own"),
        ({"entity_ids": None, "entity_position_ids": None, "entity_attention_mask": None}, ValueError, "no entity_ids"),
    ],
)
def test_inputs_that_do_not_belong_together_are_refused(change: Any, error: type[Exception], words: str) -> None:
    inputs = {name: value for name, value in (given() | change).items() if value is not None}
    with pytest.raises(error, match=words):
        make(tree())(**inputs, entity_labels=whole(9, 2, 4))
