"""ProphetNet against the reference: every class, every option; files there and back; texts.

The reference is corrected in one place. Where more than one place is decoded at once it gathers the relative scores of
the predict streams with axes (place, stream, head) read as (stream, head, place), so that what it answers at a place
depends on how many follow. Its cached steps of one token, where both orders are the same, are what the weights were
trained for; `test_steps_of_the_uncorrected_reference` holds ours against those.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import opens_cleanly, save
from references import END, PAD, VOCAB, ids, mask, noise, randomise
from test_generate_reference import Silent, theirs
from test_parity import TOLERANCE, converted, difference
from torch import Tensor

from xtcli.config.preset import load_preset
from xtcli.convert import convert
from xtcli.convert.families.prophetnet import PROPHETNET
from xtcli.convert.same import difference as difference_of_configs
from xtcli.errors import UserError
from xtcli.generate.beams import search
from xtcli.generate.decode import Row, Rules, Timing, decode
from xtcli.generate.feed import Feed
from xtcli.generate.sampling import Sampling
from xtcli.generate.stops import Text
from xtcli.model import build, save_model

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 32,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 3,
    "max_position_embeddings": 50,
    "num_buckets": 8,
    "relative_max_distance": 20,
    "pad_token_id": 0,
    "decoder_start_token_id": 2,
    "eos_token_id": END,
    "bos_token_id": 1,
}
GENERATION, MODEL, CAUSAL = "ProphetNetForConditionalGeneration", "ProphetNetModel", "ProphetNetForCausalLM"
ENCODER, DECODER = "ProphetNetEncoder", "ProphetNetDecoder"
UNEVEN = {"num_encoder_layers": 1, "num_decoder_layers": 3, "num_encoder_attention_heads": 2}
FAR_PAD = {"pad_token_id": PAD, "max_position_embeddings": 111, "decoder_start_token_id": PAD}
SMOOTH = {"eps": 0.1, "ngram": 3}


def reference(name: str, options: dict[str, Any], seed: int = 0) -> Any:
    cls = getattr(transformers, name)
    return randomise(cls(cls.config_class(**SIZES | json.loads(json.dumps(options)))), seed)


@pytest.fixture
def corrected() -> Iterator[None]:
    """The reference with relative scores of the predict streams in the right order; why, see above."""
    with PROPHETNET.runnable():
        yield


CASES: list[tuple[str, dict[str, Any]]] = [
    (MODEL, {}),
    (MODEL, {"ngram": 3, "relative_max_distance": 9, "decoder_start_token_id": None, **UNEVEN}),
    (GENERATION, {}),
    (GENERATION, {"ngram": 1}),
    (GENERATION, {"ngram": 4, "num_buckets": 32, "relative_max_distance": 128}),
    (GENERATION, {"num_buckets": 6, "relative_max_distance": 12}),
    *((GENERATION, {"activation_function": name}) for name in ("relu", "gelu_new", "silu")),
    (GENERATION, UNEVEN),
    (GENERATION, FAR_PAD),
    (GENERATION, {"tie_word_embeddings": False}),
    (GENERATION, {"disable_ngram_loss": True}),
    (GENERATION, SMOOTH),
    (GENERATION, {"eps": 0.2, "disable_ngram_loss": True, "ngram": 3}),
    (GENERATION, {"dropout": 0.2, "attention_dropout": 0.3, "activation_dropout": 0.4, "init_std": 0.1}),
    (CAUSAL, {}),
    (CAUSAL, {"add_cross_attention": False, **SMOOTH}),
    (CAUSAL, {"tie_word_embeddings": False, "disable_ngram_loss": True, "use_cache": False, **FAR_PAD}),
    (ENCODER, {}),
    (ENCODER, UNEVEN | FAR_PAD),
    (DECODER, {}),
    (DECODER, {"add_cross_attention": False, "ngram": 3, **FAR_PAD}),
]


class Arranged:
    """A model whose outputs of several streams have the places in the second axis, as all others do."""

    def __init__(self, model: Any, streams: int) -> None:
        self.model, self.streams = model, streams

    def __call__(self, **given: Any) -> dict[str, Any]:
        return {name: self.arrange(name, value) for name, value in self.model(**given).items() if value is not None}

    def arrange(self, name: str, value: Any) -> Any:
        if name == "logits_ngram":
            return value.transpose(1, 2)
        if "ngram" not in name:
            return value
        if isinstance(value, tuple):
            return tuple(self.arrange(name, one) for one in value)
        return value.unflatten(1, (self.streams, -1)).transpose(1, 2)


def feeds(model: Any) -> dict[str, dict[str, Tensor]]:
    name, empty = type(model).__name__, model.config.pad_token_id
    found: dict[str, dict[str, Tensor]] = {}
    for length in (1, 17, 47):
        found[f"length {length}"] = {"input_ids": ids(2, length)}
    for side in ("right", "left"):
        kept = mask(3, 12, side)
        found[f"padded {side}"] = {"input_ids": ids(3, 12).masked_fill(kept == 0, empty), "attention_mask": kept}
    found["embeds"] = {"inputs_embeds": noise(2, 9, 24)}
    words = ids(4, 9, 3).masked_fill(torch.arange(9) % 4 == 1, -100)
    if name in (CAUSAL, DECODER):
        if name == CAUSAL:
            found["loss"] = {"input_ids": ids(4, 9), "labels": words}
        if model.config.add_cross_attention:
            memory = {"encoder_hidden_states": noise(2, 7, 24), "encoder_attention_mask": mask(2, 7, "right")}
            found["memory"] = found["length 17"] | memory
        return found
    if name == ENCODER:
        return found | {"too long": {"input_ids": ids(2, 53)}}
    for length, given in zip((8, 47, 1), list(found.values())[:3], strict=True):
        given["decoder_input_ids"] = ids(2, length, 5)
    for side in ("right", "left"):
        kept = mask(3, 8, side)
        target = {"decoder_input_ids": ids(3, 8, 5).masked_fill(kept == 0, empty), "decoder_attention_mask": kept}
        found[f"padded {side}"] |= {"decoder_input_ids": ids(3, 8, 5)}
        found[f"decoded {side}"] = found[f"padded {side}"] | target
    found["embeds"]["decoder_inputs_embeds"] = noise(2, 6, 24)
    found["too long"] = {"input_ids": ids(2, 53), "decoder_input_ids": ids(2, 8, 5)}
    if name == GENERATION:
        found["loss"] = {"input_ids": ids(4, 9), "labels": words}
    return found


@pytest.mark.usefixtures("corrected")
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_equals_the_reference(name: str, options: dict[str, Any]) -> None:
    # The reference's cache has as many layers as its encoder.
    model = reference(name, {"use_cache": False, **options})
    ours = converted(model, "prophetnet")
    for feed, given in feeds(model).items():
        pair: Any = [Arranged(one, model.config.ngram) for one in (model, ours)]
        off = {name: value for name, value in difference(*pair, given).items() if not value <= TOLERANCE}
        assert not off, (feed, off)


def test_steps_of_the_uncorrected_reference() -> None:
    """One token at a time, with a cache: stream 0 equals our whole pass. The reference's whole pass does not, which is
    why the other tests correct it (see the top of this file)."""
    model = reference(GENERATION, {"ngram": 3})
    ours = converted(model, "prophetnet")
    source, target = ids(2, 11), ids(2, 14, 5)
    with torch.no_grad():
        memory = model.prophetnet.encoder(source)
        cache, steps = None, []
        for place in range(14):
            out = model(
                encoder_outputs=memory,
                decoder_input_ids=target[:, place : place + 1],
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
            steps.append(out.logits)
        found = ours(input_ids=source, decoder_input_ids=target).logits
        at_once = model(input_ids=source, decoder_input_ids=target, use_cache=False).logits
    torch.testing.assert_close(found, torch.cat(steps, 1), atol=TOLERANCE, rtol=1e-5)
    assert (at_once - found).abs().max() > 1e-2


FILES = [
    (MODEL, {}),
    (GENERATION, {}),
    (GENERATION, {"tie_word_embeddings": False, "disable_ngram_loss": True, **SMOOTH}),
    (GENERATION, FAR_PAD),
    (CAUSAL, {}),
    (CAUSAL, {"add_cross_attention": False}),
    (ENCODER, {}),
    (DECODER, {"ngram": 3}),
]


@pytest.mark.parametrize(("name", "options"), FILES, ids=str)
def test_there_and_back(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = reference(name, options)
    source = save(model, tmp_path / "source")
    there = convert(source, tmp_path / "there", verify=True)
    assert (there.family, there.architecture, there.bit_exact) == ("prophetnet", name, True)
    assert convert(tmp_path / "there", tmp_path / "back", to="hf").bit_exact
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "back" / file).read_bytes() == (source / file).read_bytes()
    opens_cleanly(tmp_path / "back", type(model))


@pytest.mark.usefixtures("corrected")
def test_a_preset_becomes_a_checkpoint_of_theirs(tmp_path: Path) -> None:
    resolved = load_preset("prophetnet-large", ["model.heads.lm.smoothing=0.1"], tiny=True)
    ours = build(resolved).eval()
    save_model(ours, tmp_path / "ours", resolved.to_yaml())
    assert convert(tmp_path / "ours", tmp_path / "theirs", to="hf").architecture == GENERATION
    opened = opens_cleanly(tmp_path / "theirs", transformers.ProphetNetForConditionalGeneration)
    with torch.no_grad():
        given: dict[str, Any] = {"input_ids": ids(2, 9), "labels": ids(2, 7, 5)}
        found, wanted = ours(**given), opened(**given)
    torch.testing.assert_close(found.logits, wanted.logits, atol=TOLERANCE, rtol=1e-5)
    torch.testing.assert_close(found.loss, wanted.loss, atol=TOLERANCE, rtol=1e-5)
    convert(tmp_path / "theirs", tmp_path / "again")
    again: Any = load_preset(tmp_path / "again").preset
    assert not difference_of_configs(again.model, resolved.preset.model)
    assert again.objective.kind == "masked-spans"


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("pad_token_id", None, "pad_token_id.*is none"),
        ("pad_token_id", 49, "max_position_embeddings.*is 50"),
        ("ngram", 0, "ngram: input should be greater than 0"),
        ("encoder_layerdrop", 0.1, "encoder_layerdrop"),
        ("activation_function", "gelu_none", "activation_function"),
        ("relative_max_distance", 4, "must exceed the 4 exact distances"),
    ],
)
def test_options_that_we_do_not_express_are_refused_by_name(option: str, value: Any, said: str, tmp_path: Path) -> None:
    source = save(reference(GENERATION, {}), tmp_path / "source")
    stated = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(stated | {option: value}))
    with pytest.raises(UserError, match=said):
        convert(source, tmp_path / "there")


def test_texts_end_where_positions_do() -> None:
    ours: Any = converted(reference(GENERATION, {}), "prophetnet")
    with pytest.raises(UserError, match="49 tokens, the model's positions end at 48"):
        ours(input_ids=ids(2, 9), decoder_input_ids=ids(2, 49))
    with pytest.raises(UserError, match="49 tokens do not fit"):
        ours.new_state(2, 49)


PROMPTS = [[5, 6, 7], [9], [20, 21, 22, 23, 24, 25, 26], [3, 3, 8]]


@pytest.mark.parametrize("room", [1, 5, 20])
@pytest.mark.parametrize("beams", [1, 3])
def test_texts_are_the_reference_s(beams: int, room: int) -> None:
    """The reference decodes each prompt alone, ours all at once."""
    reference_model = reference(GENERATION, {})
    settings: dict[str, Any] = {"max_new_tokens": room, "num_beams": beams, "do_sample": False, "eos_token_id": END}
    wanted = theirs(reference_model, PROMPTS, **settings)
    model = converted(reference_model, "prophetnet")
    rules = Rules(Sampling(temperature=0), frozenset([END]), VOCAB)
    feed = Feed(model, [[2]] * len(PROMPTS), room, PROMPTS)
    with torch.no_grad():
        if beams == 1:
            rows = [Row(n, Text(Silent()), room, False) for n in range(len(PROMPTS))]
            list(decode(feed, rows, 1, rules, Timing()))
            found = [row.tokens for row in rows]
        else:
            texts = search(feed, [(room, False)] * len(PROMPTS), beams, 1.0, rules, Timing())
            found = [list(prompt[0].tokens) for prompt in texts]
    assert found == wanted


def test_a_batch_of_prompts_writes_what_each_writes_alone() -> None:
    """The decoder alone, whose prompts are padded on the left: the first token of each is the one always seen."""
    model = converted(reference(CAUSAL, {"ngram": 3}), "prophetnet")
    rules = Rules(Sampling(temperature=0), frozenset([END]), VOCAB)

    def written(prompts: list[list[int]]) -> list[list[int]]:
        rows = [Row(n, Text(Silent()), 12, False) for n in range(len(prompts))]
        with torch.no_grad():
            list(decode(Feed(model, prompts, 12), rows, 1, rules, Timing()))
        return [list(row.tokens) for row in rows]

    assert written(PROMPTS) == [written([prompt])[0] for prompt in PROMPTS]
