"""XLNet against the reference: every class, every option, both streams, memories in and out; files there and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from checkpoints import opens_cleanly, save
from fakes import FakeSplit, FakeTokenizer, tokens
from memories import flat, off
from references import PAD, ids, mask, noise, randomise
from test_generate_reference import Silent, theirs
from test_parity import TOLERANCE, converted
from torch import Tensor

from xtcli.config.preset import load_preset
from xtcli.convert import convert
from xtcli.errors import UserError
from xtcli.generate.beams import search
from xtcli.generate.decode import Row, Rules, Timing, decode
from xtcli.generate.sampling import Sampling
from xtcli.generate.stops import Text
from xtcli.generate.streams import feed_for
from xtcli.model import build, load, save_model
from xtcli.objectives import Permutation

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "d_model": 32,
    "n_head": 4,
    "d_inner": 40,
    "n_layer": 2,
    "mem_len": 8,
    "pad_token_id": PAD,
}
LM, MODEL = "XLNetLMHeadModel", "XLNetModel"
SEQUENCE, CHOICE = "XLNetForSequenceClassification", "XLNetForMultipleChoice"
TOKEN, SIMPLE, BEAMS = "XLNetForTokenClassification", "XLNetForQuestionAnsweringSimple", "XLNetForQuestionAnswering"

CASES: list[tuple[str, dict[str, Any]]] = [
    (MODEL, {}),
    (MODEL, {"attn_type": "uni"}),
    (LM, {}),
    (LM, {"attn_type": "uni", "clamp_len": 3}),
    (LM, {"attn_type": "uni", "same_length": True}),
    (LM, {"same_length": True, "clamp_len": 4}),
    (LM, {"bi_data": True}),
    (LM, {"bi_data": True, "clamp_len": 3}),
    (LM, {"mem_len": None}),
    (LM, {"mem_len": 0, "reuse_len": 4}),
    (LM, {"mem_len": 3, "reuse_len": 5}),
    (LM, {"use_mems_eval": False}),
    (LM, {"use_cache": False}),
    (LM, {"pad_token_id": None}),
    (LM, {"untie_r": False, "use_mems_train": True, "initializer_range": 0.1, "dropout": 0.3}),
    (LM, {"tie_word_embeddings": False}),
    (LM, {"ff_activation": "relu", "layer_norm_eps": 0.01, "n_layer": 3, "n_head": 2}),
    (LM, {"ff_activation": "gelu_new", "chunk_size_feed_forward": 1}),
    (LM, {"ff_activation": "silu"}),
    (SEQUENCE, {"num_labels": 3}),
    (SEQUENCE, {"num_labels": 1, "summary_type": "first"}),
    (SEQUENCE, {"num_labels": 32, "summary_proj_to_labels": True}),
    (SEQUENCE, {"summary_type": "mean", "summary_activation": "relu"}),
    (SEQUENCE, {"summary_type": "cls_index", "summary_activation": None}),
    (SEQUENCE, {"summary_use_proj": False, "summary_first_dropout": 0.2, "summary_last_dropout": 0.3}),
    (SEQUENCE, {"num_labels": 4, "problem_type": "multi_label_classification", "d_head": 8}),
    (CHOICE, {}),
    (CHOICE, {"summary_type": "mean", "summary_use_proj": False}),
    (TOKEN, {"num_labels": 5}),
    (SIMPLE, {}),
    (BEAMS, {}),
    (BEAMS, {"start_n_top": 3, "end_n_top": 2, "layer_norm_eps": 0.01}),
]


def reference(name: str, options: dict[str, Any], seed: int = 0) -> Any:
    cls = getattr(transformers, name)
    model = randomise(cls(cls.config_class(**SIZES | json.loads(json.dumps(options)))), seed)
    # Projections by head are drawn as if their last axis were the one they sum over.
    for parameter in model.parameters():
        if parameter.dim() == 3 and parameter.shape[0] > 2:
            parameter.data *= 0.5
    return model


def mems(model: Any, rows: int, length: int, seed: int = 7) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    layers, width = model.config.n_layer, model.config.d_model
    return [torch.randn(length, rows, width, generator=generator) for _ in range(layers)]


def order(rows: int, length: int) -> Tensor:
    """A mask of random orders in which a few places come first for all."""
    ranks = torch.stack([torch.randperm(length, generator=torch.Generator().manual_seed(row)) for row in range(rows)])
    ranks = (ranks - 3).clamp(min=-1)
    return ((ranks[:, None, :] >= ranks[:, :, None]) & (ranks[:, None, :] >= 0)).float()


def mapping(rows: int, places: list[int], length: int) -> Tensor:
    made = torch.zeros(rows, len(places), length)
    made[:, torch.arange(len(places)), torch.tensor(places)] = 1
    return made


def feeds(model: Any) -> dict[str, dict[str, Any]]:
    name, config = type(model).__name__, model.config
    rows = 1 if config.attn_type == "uni" else 2  # the reference adds masks to a causal one in one row only
    found: dict[str, dict[str, Any]] = {f"length {n}": {"input_ids": ids(2, n)} for n in (6, 17, 40)}
    if name != BEAMS:
        found["length 1"] = {"input_ids": ids(2, 1)}
    for length in (1, 8, 13):
        found[f"mems {length}"] = {"input_ids": ids(2, 6), "mems": mems(model, 2, length)}
    found["stacked"] = {"input_ids": ids(2, 6), "mems": torch.stack(mems(model, 2, 8))}
    found["asked"] = {"input_ids": ids(2, 6), "use_mems": True}
    found["not asked"] = {"input_ids": ids(2, 6), "use_mems": False}
    found["embeds"] = {"inputs_embeds": noise(2, 9, config.d_model)}
    types = torch.tensor([[0] * 4 + [1] * 5, [2] * 2 + [1] * 7])
    found["types"] = {"input_ids": ids(2, 9), "token_type_ids": types}
    found["types and mems"] = {"input_ids": ids(2, 9), "token_type_ids": types, "mems": mems(model, 2, 5)}
    for side in ("right", "left"):
        kept = mask(4, 12, side)[:: 3 if rows == 2 else 4][:rows] if rows == 2 else mask(2, 12, side)[1:]
        text = ids(rows, 12).masked_fill(kept == 0, PAD)
        found[f"padded {side}"] = {"input_ids": text, "attention_mask": kept}
        found[f"hidden {side}"] = {"input_ids": text, "input_mask": 1.0 - kept.float()}
        found[f"padded {side} mems"] = {"input_ids": text, "attention_mask": kept, "mems": mems(model, rows, 4)}
    found["order"] = {"input_ids": ids(rows, 9), "perm_mask": order(rows, 9)}
    if name in (LM, MODEL):
        targets = {"perm_mask": order(rows, 9), "target_mapping": mapping(rows, [7, 2, 5], 9)}
        found["targets"] = {"input_ids": ids(rows, 9)} | targets
        found["targets, all"] = {"input_ids": ids(rows, 9), "target_mapping": torch.eye(9).expand(rows, 9, 9)}
        found["targets, mixed"] = {
            "input_ids": ids(rows, 9),
            "target_mapping": torch.rand(rows, 4, 9, generator=torch.Generator().manual_seed(2)),
        }
        found["targets, blind"] = {
            "input_ids": ids(rows, 5),
            "perm_mask": torch.ones(rows, 5, 5),
            "target_mapping": mapping(rows, [0, 3], 5),
        }
        given = {"token_type_ids": types[:rows], "mems": mems(model, rows, 6)}
        found["everything"] = {"input_ids": ids(rows, 9)} | targets | given
        if name == LM:
            words = torch.tensor([[4, -100, 9], [5, 6, 7]])[:rows]
            found["loss of targets"] = found["everything"] | {"labels": words}
            found["loss"] = {"input_ids": ids(2, 9), "labels": ids(2, 9, 4).masked_fill(torch.arange(9) % 4 == 1, -100)}
    return found | labelled(name, config)


def labelled(name: str, config: Any) -> dict[str, dict[str, Any]]:
    if name == SEQUENCE:
        count = config.num_labels
        many = count == 1 or config.problem_type
        labels = torch.ones(2, count) if many else torch.tensor([1, 0])
        return {"loss": {"input_ids": ids(2, 9), "labels": labels}}
    if name == TOKEN:
        return {"loss": {"input_ids": ids(2, 9), "labels": ids(2, 9).remainder(5)}}
    if name == CHOICE:
        given = {"input_ids": ids(6, 9).reshape(2, 3, 9), "labels": torch.tensor([2, 0])}
        kept = mask(6, 9, "left").reshape(2, 3, 9)
        return {
            "loss": given,
            "choices": given | {"attention_mask": kept, "token_type_ids": ids(6, 9).remainder(2).reshape(2, 3, 9)},
            "hidden choices": given | {"input_mask": 1.0 - kept.float()},
        }
    if name == SIMPLE:
        places = {"start_positions": torch.tensor([0, 9]), "end_positions": torch.tensor([3, 30])}
        return {"loss": {"input_ids": ids(2, 9)} | places}
    if name == BEAMS:
        places = {"start_positions": torch.tensor([0, 7]), "end_positions": torch.tensor([3, 8])}
        barred = {"p_mask": torch.tensor([[1.0] + [0.0] * 7 + [1.0]] * 2)}
        inner = {"start_positions": torch.tensor([1, 5]), "end_positions": torch.tensor([3, 7])}
        cls = {"cls_index": torch.tensor([8, 2])}
        return {
            "barred": {"input_ids": ids(2, 9)} | barred,
            "cls": {"input_ids": ids(2, 9)} | cls,
            "loss": {"input_ids": ids(2, 9)} | places,
            "barred loss": {"input_ids": ids(2, 9)} | inner | barred | cls,
            "no answer": {"input_ids": ids(2, 9), "is_impossible": torch.tensor([1.0, 0.0])} | places | cls,
        }
    return {}


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_equals_the_reference(name: str, options: dict[str, Any]) -> None:
    model = reference(name, options)
    ours = converted(model, "xlnet")
    for feed, given in feeds(model).items():
        if name == CHOICE and given.get("input_ids", torch.zeros(1)).dim() < 3:
            given = {key: grouped(key, value) for key, value in given.items()}
        real = given.get("attention_mask")
        if real is None and "input_mask" in given:
            real = 1 - given["input_mask"]
        real = None if real is None else real.flatten(0, -2)
        wrong = off(model, ours, given, TOLERANCE, real)
        assert not wrong, (feed, wrong)


def grouped(name: str, value: Any) -> Any:
    """One question with all rows for choices."""
    texts = ("input_ids", "attention_mask", "token_type_ids", "input_mask", "inputs_embeds")
    return value[None] if name in texts else value


def test_segments_hand_on_what_the_reference_s_do() -> None:
    model = reference(LM, {"reuse_len": 6, "attn_type": "uni"})
    ours = converted(model, "xlnet")
    there: Any = None
    here: Any = None
    text = ids(2, 40)
    for at, width in ((0, 8), (8, 1), (9, 20), (29, 11)):
        part = text[:, at : at + width]
        with torch.no_grad():
            expected, found = model(part, mems=there), ours(input_ids=part, mems=here)
        for name, value in flat(expected).items():
            torch.testing.assert_close(flat(found)[name], value, atol=TOLERANCE, rtol=1e-5)
        there, here = expected.mems, found.mems


FILES = [
    (MODEL, {}),
    (LM, {"mem_len": None}),
    (LM, {"tie_word_embeddings": False}),
    (SEQUENCE, {"num_labels": 3}),
    (SEQUENCE, {"summary_use_proj": False}),
    (CHOICE, {}),
    (TOKEN, {}),
    (SIMPLE, {}),
    (BEAMS, {}),
]


@pytest.mark.parametrize(("name", "options"), FILES, ids=str)
def test_there_and_back(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = reference(name, options)
    source = save(model, tmp_path / "source")
    there = convert(source, tmp_path / "there", verify=True)
    assert (there.family, there.architecture, there.bit_exact) == ("xlnet", name, True)
    assert convert(tmp_path / "there", tmp_path / "back", to="hf").bit_exact
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "back" / file).read_bytes() == (source / file).read_bytes()
    opened = opens_cleanly(tmp_path / "back", type(model))
    text = ids(2, 9) if name != CHOICE else ids(2, 9)[None]
    assert not off(opened, load(tmp_path / "there").eval(), {"input_ids": text}, TOLERANCE)


@pytest.mark.parametrize("preset", ["xlnet-base-cased", "xlnet-large-cased"])
def test_a_preset_becomes_a_checkpoint_of_theirs(preset: str, tmp_path: Path) -> None:
    resolved = load_preset(preset, tiny=True)
    ours = build(resolved).eval()
    save_model(ours, tmp_path / "ours", resolved.to_yaml())
    assert convert(tmp_path / "ours", tmp_path / "theirs", to="hf").architecture == LM
    opened = opens_cleanly(tmp_path / "theirs", transformers.XLNetLMHeadModel)
    assert not off(opened, ours, {"input_ids": ids(2, 9)}, TOLERANCE)


@pytest.mark.parametrize(
    ("option", "value"),
    [("d_head", 5), ("summary_proj_to_labels", True), ("attn_type", "tri"), ("summary_type", "attn"), ("ext_len", 3)],
)
def test_options_that_we_do_not_express_are_refused_by_name(option: str, value: Any, tmp_path: Path) -> None:
    source = save(reference(SEQUENCE, {}), tmp_path / "source")
    stated = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(stated | {option: value}))
    with pytest.raises(UserError, match=option):
        convert(source, tmp_path / "there")


PROMPTS = [[5, 6, 7], [9], [20, 21, 22, 23, 24, 25, 26], [3, 3, 8]]
END = 1


def written(model: Any, prompts: list[list[int]], room: int, beams: int, end: int) -> list[list[int]]:
    rules = Rules(Sampling(temperature=0), frozenset([end]), 61)
    feed = feed_for(model)(model, prompts, room)
    with torch.no_grad():
        if beams == 1:
            rows = [Row(n, Text(Silent()), room, False) for n in range(len(prompts))]
            list(decode(feed, rows, 1, rules, Timing()))
            return [row.tokens for row in rows]
        found = search(feed, [(room, False)] * len(prompts), beams, 1.0, rules, Timing())
    return [list(texts[0].tokens) for texts in found]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"mem_len": None}, {"mem_len": 5, "clamp_len": 4}, {"attn_type": "uni"}, {"use_mems_eval": False}],
    ids=str,
)
def test_texts_are_the_reference_s_and_a_row_in_a_batch_is_that_row_alone(options: dict[str, Any], beams: int) -> None:
    if beams > 1 and "attn_type" in options:
        pytest.skip("the reference adds masks to a causal one in one row only")
    model = reference(LM, options)
    model.generation_config.pad_token_id = PAD
    wanted = []
    ours = converted(model, "xlnet")
    for end in (END, None):
        end = end if end is not None else wanted[0][4]
        settings: dict[str, Any] = {"max_new_tokens": 12, "num_beams": beams, "do_sample": False, "eos_token_id": end}
        wanted = theirs(model, PROMPTS, **settings)
        assert written(ours, PROMPTS, 12, beams, end) == wanted
    assert feed_for(ours)(ours, PROMPTS, 3).uncached == (7 if options.get("use_mems_eval") is False else None)


def test_steps_are_what_the_memories_of_a_fresh_reading_give() -> None:
    """Logits after any number of steps equal those of the same steps taken anew, row by row."""
    model = converted(reference(LM, {"mem_len": None}), "xlnet")
    text = [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]]
    with torch.no_grad():
        feed = feed_for(model)(model, [row[:2] for row in text], 8)
        steps = [feed.start(), *(feed.step(torch.tensor([row[at] for row in text])) for at in range(2, 6))]
        for row in range(2):
            alone = feed_for(model)(model, [text[row][:2]], 8)
            again = [alone.start(), *(alone.step(torch.tensor([text[row][at]])) for at in range(2, 6))]
            torch.testing.assert_close(
                torch.cat(again), torch.stack([step[row] for step in steps]), atol=1e-5, rtol=1e-5
            )


def objective(texts: list[list[int]], context: int = 32, **options: Any) -> Permutation:
    tokenizer = FakeTokenizer(pad=0, unk=1, eos=3, cls=4, sep=5)
    facts = {name: options.pop(name) for name in ("reuse", "backwards") if name in options}
    config = Permutation.Config(**options)
    return Permutation(config, FakeSplit(text=texts), tokenizer, context=context, seed=0, **facts)


TEXTS = [tokens(60, 20), tokens(90, 100), tokens(50, 150)]


@pytest.mark.parametrize(
    "options", [{}, {"reuse": 12}, {"reuse": 12, "carry": True}, {"carry": True}, {"targets": 0.3}]
)
def test_samples_are_what_the_paper_says(options: dict[str, Any]) -> None:
    made = objective(TEXTS, **dict(options))
    stream = 32 if options == {"carry": True} else options.get("reuse", 0)
    follows = spans = 0
    for index in range(len(made)):
        one = made.sample(index, 0)
        ids_, hidden, mapping_ = one["input_ids"], one["perm_mask"], one["target_mapping"]
        assert {key: value.tolist() for key, value in one.items()} == {
            key: value.tolist() for key, value in made.sample(index, 0).items()
        }
        places = mapping_.argmax(1)
        assert (mapping_.sum(1) == 1).all()
        assert np.unique(places).size == places.size == max(1, round(32 * options.get("targets", 1 / 6)))
        assert (ids_[places] == one["targets.lm"]).all()
        assert (one["targets.lm"] >= 10).all() or 3 in one["targets.lm"]
        special = np.zeros(32, dtype=bool)
        if stream < 32:
            special = (ids_ == 5) | (ids_ == 4)
            special[:stream] = False
            assert special.sum() == 3
            assert special[-2:].all()
        chosen = np.isin(np.arange(32), places)
        spans += int((np.diff(places) == 1).sum())
        for begin, end in ((0, stream), (stream, 32)):
            inner = hidden[begin:end, begin:end]
            late = (chosen | special)[begin:end]
            # What is neither target nor special is seen by all, and sees nothing else.
            assert (inner[:, ~late] == 0).all()
            assert (inner[np.ix_(~late, late)] == 1).all()
            # Targets stand in an order: of two, one sees the other; none sees itself.
            order_ = inner[np.ix_(chosen[begin:end], chosen[begin:end])]
            assert (order_ + order_.T == 1 + np.eye(len(order_), dtype=int)).all()
            assert sorted(order_.sum(1).tolist()) == list(range(1, len(order_) + 1))
            assert (inner[special[begin:end], special[begin:end]] == 0).all()
        # The stream does not see the texts behind it, which see all of it.
        assert (hidden[:stream, stream:] == 1).all()
        assert (hidden[stream:, :stream] == 0).all()
        if stream < 32:
            types = one["token_type_ids"]
            assert (types[:stream] == 0).all()
            assert types[-1] == 2
            cut = stream + int(np.flatnonzero(ids_[stream:] == 5)[0])
            assert (np.diff(types[stream:-1]) >= 0).all()
            assert types[cut] == 0
            assert types[cut + 1] == 1
            follows += int(ids_[cut + 1] == ids_[cut - 1] + 1 or 3 in ids_[cut - 1 : cut + 2])
        if stream and index:
            assert (ids_[0] == made.sample(index - 1, 0)["input_ids"][stream - 1] + 1) or 3 in (
                ids_[0],
                made.sample(index - 1, 0)["input_ids"][stream - 1],
            )
    assert spans > 0
    assert made.sample(1, 0)["perm_mask"].tolist() != made.sample(1, 1)["perm_mask"].tolist()
    if stream < 32:
        assert 0 < follows < len(made)


def test_rows_that_are_read_from_the_end() -> None:
    made = objective(TEXTS, both_ways=True, backwards=True, reuse=12)
    half = len(made) // 2
    forward, back = made.sample(0, 0), made.sample(half, 0)
    assert (forward["backwards"], back["backwards"]) == (0, 1)
    assert (np.diff(forward["input_ids"][:12]) == 1).all()
    assert (np.diff(back["input_ids"][1:12]) == -1).all()
    batch = made.batch(np.array([0, half]), np.array([0, 0]))
    assert batch.inputs["backwards"].tolist() == [0, 1]
    assert batch.inputs["perm_mask"].shape == (2, 32, 32)
    assert batch.targets["lm"].shape == (2, 5)


def test_what_the_objective_cannot_do_is_refused() -> None:
    for options, said in (
        ({"both_ways": True}, "mirrored"),
        ({"both_ways": True, "backwards": True, "carry": True}, "turn around"),
        ({"context": 6}, "no room"),
        ({"context": 500}, "one block takes"),
    ):
        with pytest.raises(UserError, match=said):
            objective(TEXTS, **options)


def test_rows_read_backwards_have_the_distances_negated() -> None:
    resolved = load_preset("xlnet-base-cased", ["model.stack.position={kind: wave, mirrored: true}"], tiny=True)
    model = build(resolved).eval()
    text = torch.randint(0, 200, (3, 9))
    with torch.no_grad():
        ahead = model(input_ids=text, backwards=torch.zeros(3, dtype=torch.long)).logits
        turned = model(input_ids=text.flip(1), backwards=torch.ones(3, dtype=torch.long)).logits
    torch.testing.assert_close(turned.flip(1), ahead, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="3 rows have no half"):
        model(input_ids=text)
