"""Mamba and RWKV: scans against loops, the reference, padding, states of constant size, texts step by step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import opens_cleanly, save
from references import VOCAB, ids, mask, noise, randomise
from test_parity import TOLERANCE, converted, difference
from torch import Tensor

from xtcli.config.preset import load_preset
from xtcli.convert import convert
from xtcli.errors import UserError
from xtcli.generate.feed import Feed
from xtcli.inspect.memory import measure_state
from xtcli.model import Model, build, construct, save_model
from xtcli.parts import scans
from xtcli.parts import wkv as wkvs
from xtcli.registry import find

MAMBA: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 2, "use_cache": False}
RWKV: dict[str, Any] = MAMBA | {"context_length": 64, "num_hidden_layers": 3}


def wide(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def flags(length: int, share: float, seed: int) -> Tensor:
    return torch.rand(2, length, generator=torch.Generator().manual_seed(seed)) < share


LENGTHS = [1, 2, 17, 31, 32, 33, 64, 100]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("budget", [2**23, 2000])
def test_selective_scan_is_the_loop(length: int, documents: bool, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients; with a small budget the chunks go through in several pieces."""
    monkeypatch.setattr(scans, "BUDGET", budget)
    given = [
        wide(2, length, 6),
        wide(2, length, 6, seed=1).exp(),
        wide(2, length, 4, seed=2),
        wide(2, length, 4, seed=3),
    ]
    given += [-wide(6, 4, seed=4).exp(), wide(2, 6, 4, seed=5)]
    given = [value.requires_grad_() for value in given]
    opens = flags(length, 0.8, 6) if documents else None

    def run(scan: Callable[..., Any]) -> list[Tensor]:
        y, last = scan(*given, opens)
        return [y, last, *torch.autograd.grad(y.sin().sum() + last.cos().sum(), given)]

    for ours, loop in zip(run(scans.selective), run(scans.selective_steps), strict=True):
        torch.testing.assert_close(ours, loop, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("size", [1.0, 100.0])
def test_wkv_is_the_loop(length: int, documents: bool, padding: bool, size: float) -> None:
    """Values and gradients, also where keys are so large that their exponentials are not numbers."""
    k, v, decay = size * wide(2, length + 1, 6), wide(2, length + 1, 6, seed=1), -wide(6, seed=2).exp()
    state = (wide(2, 6, seed=4), wide(2, 6, seed=5).exp(), size * wide(2, 6, seed=6))
    given = [value.requires_grad_() for value in (k, v, decay, wide(6, seed=3), *state[:2])]
    opens = flags(length + 1, 0.8, 6) if documents else None
    real = flags(length + 1, 0.7, 7) if padding else None
    if real is not None:
        # What a state of nothing but padding holds means nothing: a real token ends each text.
        real[:, -1] = True
    seen = torch.ones(2, length + 1, dtype=torch.bool) if real is None else real

    def run(scan: Callable[..., Any]) -> list[Tensor]:
        y, (n, d, m) = scan(*given[:4], (*given[4:], state[2]), real, opens)
        loss = y[seen].sin().sum() + (n / d).cos().sum() + (d.log() + m).sin().sum()
        return [y[seen], n / d, d.log() + m, *torch.autograd.grad(loss, given)]

    for ours, loop in zip(run(wkvs.wkv), run(wkvs.wkv_steps), strict=True):
        assert bool(ours.isfinite().all())
        torch.testing.assert_close(ours, loop, atol=1e-9, rtol=1e-9)


def reference(name: str, options: dict[str, Any], seed: int = 0) -> Any:
    """The reference with random weights; decays and mixes are of a size that leaves something of the past."""
    cls = getattr(transformers, name)
    sizes = MAMBA if name.startswith("Mamba") else RWKV
    model = randomise(cls(cls.config_class(**sizes | json.loads(json.dumps(options)))), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.uniform_(-1.0, 1.5, generator=generator)
            elif name.endswith(("x_proj.weight", "in_proj.weight")):
                # Outputs near 1: what errors are measured against.
                parameter.mul_(0.5)
            elif "time_mix" in name:
                parameter.uniform_(0.1, 0.9, generator=generator)
            elif name.endswith("time_decay"):
                parameter.uniform_(-3.0, 0.5, generator=generator)
    return model.eval()


def ours_of(model: Any) -> Model:
    """Our model with weights of its own, taken before the reference divides its own when it first evaluates."""
    family = "mamba" if type(model).__name__.startswith("Mamba") else "rwkv"
    made = converted(model, family)
    for parameter in made.parameters():
        parameter.data = parameter.data.clone()
    return made


CASES: list[tuple[str, dict[str, Any]]] = [
    ("MambaModel", {}),
    ("MambaForCausalLM", {}),
    ("MambaForCausalLM", {"use_cache": True}),
    ("MambaForCausalLM", {"tie_word_embeddings": False, "layer_norm_epsilon": 0.01}),
    ("MambaForCausalLM", {"use_bias": True, "use_conv_bias": False}),
    ("MambaForCausalLM", {"state_size": 5, "conv_kernel": 2, "expand": 3, "time_step_rank": 7}),
    ("MambaForCausalLM", {"expand": 1.5, "conv_kernel": 6, "num_hidden_layers": 3}),
    ("MambaForCausalLM", {"conv_kernel": 1}),
    ("MambaForCausalLM", {"residual_in_fp32": False, "hidden_act": "gelu"}),
    ("MambaForCausalLM", {"rescale_prenorm_residual": True, "time_step_init_scheme": "constant", "pad_token_id": None}),
    ("RwkvModel", {}),
    ("RwkvForCausalLM", {}),
    ("RwkvForCausalLM", {"use_cache": True}),
    ("RwkvForCausalLM", {"rescale_every": 1, "layer_norm_epsilon": 0.01}),
    ("RwkvForCausalLM", {"rescale_every": 2, "num_hidden_layers": 5}),
    ("RwkvForCausalLM", {"rescale_every": 0}),
    ("RwkvForCausalLM", {"attention_hidden_size": 40, "intermediate_size": 32}),
    ("RwkvForCausalLM", {"tie_word_embeddings": True, "num_hidden_layers": 2, "context_length": 8}),
]


def feeds(model: Any) -> dict[str, dict[str, Tensor]]:
    # With a cache the reference takes a first token for one of each row: it makes rows x rows of them.
    lengths = (3, 17, 70) if model.config.use_cache else (1, 3, 17, 70)
    found = {f"length {length}": {"input_ids": ids(2, length)} for length in lengths}
    found["embeds"] = {"inputs_embeds": noise(2, 9, 24)}
    right = mask(3, 12, "right")
    found["padded right"] = {"input_ids": ids(3, 12), "attention_mask": right}
    if type(model).__name__.startswith("Mamba"):
        # The other reference takes no notice of masks: there the row alone is what must come out, see below.
        found["padded left"] = {"input_ids": ids(3, 12), "attention_mask": mask(3, 12, "left")}
        holes = right.clone()
        holes[:, 3] = 0
        found["padded inside"] = {"input_ids": ids(3, 12), "attention_mask": holes}
    if type(model).__name__.endswith("LM"):
        labels = ids(4, 9).masked_fill(torch.arange(9) % 4 == 1, -100)
        found["loss"] = {"input_ids": ids(4, 9, 5), "labels": labels}
    return found


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_equals_the_reference(name: str, options: dict[str, Any]) -> None:
    theirs = reference(name, options)
    ours = ours_of(theirs)
    for feed, given in feeds(theirs).items():
        found = difference(theirs, ours, given)
        off = {
            n: value for n, value in found.items() if not value <= TOLERANCE and not n.startswith(("state", "cache"))
        }
        assert not off, (feed, off)
        assert any(n.startswith("hidden_states") for n in found)


@pytest.mark.parametrize("every", [1, 2])
def test_training_mode_halves_nothing(every: int) -> None:
    """In training the reference's weights are whole; ours never change."""
    theirs = reference("RwkvForCausalLM", {"rescale_every": every})
    ours = ours_of(theirs)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    given = {"input_ids": ids(2, 17)}
    for mode in (True, False, True):
        off = difference(theirs.train(mode), ours.train(mode), given)
        assert max(off.values()) <= TOLERANCE, off
    assert all(torch.equal(before[name], tensor) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize("name", ["MambaForCausalLM", "RwkvForCausalLM"])
def test_long_texts_equal_the_reference(name: str) -> None:
    theirs = reference(name, {})
    off = difference(theirs, ours_of(theirs), {"input_ids": ids(1, 400)})
    assert max(value for n, value in off.items() if not n.startswith(("state", "cache"))) <= 1e-4


FILES = [("MambaModel", {}), ("MambaForCausalLM", {}), ("RwkvModel", {}), ("RwkvForCausalLM", {})]
FILES += [
    ("MambaForCausalLM", {"use_bias": True, "tie_word_embeddings": False}),
    ("RwkvForCausalLM", {"rescale_every": -1}),
    ("RwkvForCausalLM", {"rescale_every": 1, "attention_hidden_size": 40}),
]


@pytest.mark.parametrize(("name", "options"), FILES, ids=str)
def test_there_and_back(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = reference(name, options)
    source = save(model, tmp_path / "source")
    there = convert(source, tmp_path / "there", verify=True)
    assert (there.architecture, there.bit_exact) == (name, True)
    assert convert(tmp_path / "there", tmp_path / "back", to="hf").bit_exact
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "back" / file).read_bytes() == (source / file).read_bytes()
    opens_cleanly(tmp_path / "back", type(model))


@pytest.mark.parametrize(
    ("preset", "name"), [("mamba-130m", "MambaForCausalLM"), ("rwkv-4-169m-pile", "RwkvForCausalLM")]
)
def test_a_preset_becomes_a_checkpoint_of_theirs(preset: str, name: str, tmp_path: Path) -> None:
    resolved = load_preset(preset, tiny=True)
    ours = build(resolved).eval()
    save_model(ours, tmp_path / "ours", resolved.to_yaml())
    assert convert(tmp_path / "ours", tmp_path / "theirs", to="hf").architecture == name
    opened = opens_cleanly(tmp_path / "theirs", getattr(transformers, name))
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=ids(2, 9)).logits, opened(ids(2, 9)).logits, atol=2e-5, rtol=1e-5)
    convert(tmp_path / "theirs", tmp_path / "again")
    again: Any = load_preset(tmp_path / "again").preset.model
    assert type(again.stack.block.sublayers) is dict


def test_released_config_of_mamba(tmp_path: Path) -> None:
    source = save(reference("MambaForCausalLM", {}), tmp_path / "source")
    stated = json.loads((source / "config.json").read_text())
    early = {"d_model": 24, "d_inner": 48, "n_layer": 2, "rms_norm": True, "ssm_cfg": {}, "fused_add_norm": True}
    (source / "config.json").write_text(json.dumps(stated | early))
    convert(source, tmp_path / "there")
    (source / "config.json").write_text(json.dumps(stated | {"ssm_cfg": {"layer": "Mamba2"}}))
    with pytest.raises(UserError, match=r"ssm_cfg.*does not express"):
        convert(source, tmp_path / "other")


def model_of(name: str) -> Model:
    return ours_of(reference(name, {}))


NAMES = ["MambaForCausalLM", "RwkvForCausalLM"]
PROMPTS = [[5, 9, 2], [7], list(range(20, 40)), [3] * 11]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunks", [(36,), (1,) * 36, (9, 1, 1, 20, 5), (2, 34)], ids=str)
def test_cached_is_uncached(name: str, chunks: tuple[int, ...]) -> None:
    model, text = model_of(name), ids(2, 36)
    state, at, made = model.new_state(2, 36), 0, []  # type: ignore[operator]
    with torch.no_grad():
        whole = model(input_ids=text).logits
        for size in chunks:
            made.append(model(input_ids=text[:, at : at + size], state=state).logits)
            at += size
    torch.testing.assert_close(torch.cat(made, 1), whole, atol=1e-5, rtol=0)


def follow(model: Model, prompts: list[list[int]], more: Tensor, rows: list[int] | None = None) -> Tensor:
    """The last logits of prompts that `more` (B, steps) follows; half way only `rows` are kept."""
    feed = Feed(model, prompts, more.shape[1] + 1)
    with torch.no_grad():
        last = feed.start()
        for step, column in enumerate(more.unbind(1)):
            if rows is not None and step >= more.shape[1] // 2:
                if step == more.shape[1] // 2:
                    feed.select(torch.tensor(rows))
                column = column[rows]
            last = feed.step(column)
    return last


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [None, [2, 0, 0, 3]], ids=str)
def test_a_row_in_a_batch_is_the_row_alone(name: str, rows: list[int] | None) -> None:
    """Prompts are padded on the left, which touches no state; beams choose rows of it."""
    model, more = model_of(name), ids(4, 12, 7)
    together = follow(model, PROMPTS, more, rows)
    for at, row in enumerate(rows or range(4)):
        text = torch.tensor([PROMPTS[row] + more[row].tolist()])
        with torch.no_grad():
            alone = model(input_ids=text).logits[0, -1]
        torch.testing.assert_close(together[at], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_padding_on_the_left_is_nothing(name: str) -> None:
    model, kept = model_of(name), mask(3, 12, "left")
    text = ids(3, 12)
    with torch.no_grad():
        padded = model(input_ids=text, attention_mask=kept).logits
        for row in range(3):
            alone = model(input_ids=text[row : row + 1, kept[row].bool()]).logits[0]
            torch.testing.assert_close(padded[row, kept[row].bool()], alone, atol=1e-5, rtol=0)


def test_padding_anywhere_does_not_touch_time() -> None:
    """Time mix and channel mix pass over padding between tokens as well, in chunks as in steps."""
    model, kept = model_of("RwkvForCausalLM"), torch.ones(2, 20, dtype=torch.long)
    kept[0, 4:9], kept[1, 15:] = 0, 0
    text = ids(2, 20)
    state = model.new_state(2, 21)  # type: ignore[operator]
    with torch.no_grad():
        model(input_ids=text, attention_mask=kept, state=state)
        after = model(input_ids=text[:, :1], state=state).logits
        for row in range(2):
            alone = torch.cat((text[row, kept[row].bool()], text[row, :1]))[None]
            torch.testing.assert_close(after[row, 0], model(input_ids=alone).logits[0, -1], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("preset", "numbers"),
    [
        ("mamba-130m", 24 * 1536 * (3 + 16)),
        ("rwkv-4-169m-pile", 12 * 768 * 5),
    ],
)
def test_a_state_has_one_size(preset: str, numbers: int) -> None:
    state = measure_state(build(preset, device="meta"), 512)
    assert state is not None
    assert (state.token, state.fixed) == (0, 4 * numbers)


def recurrent(wiring: str, **sublayers: Any) -> Model:
    config = {
        "vocab": 40,
        "dim": 32,
        "norm": "rms",
        "stack": {"layers": 2, "block": {"wiring": wiring, "sublayers": sublayers}},
        "heads": {"lm": {}},
    }
    model = construct(find("graph", "decoder").Config.model_validate(config)).to_empty(device="cpu")
    model.initialise(0)
    return model.eval()


def test_a_wide_stream_keeps_what_16_bits_lose() -> None:
    narrow, wide_ = (
        recurrent(kind, mixer={"kind": "mamba", "inner": 48}).to(torch.bfloat16) for kind in ("pre", "pre-wide")
    )
    given = {"input_ids": ids(1, 20) % 40}
    assert narrow(**given).last_hidden_state.dtype == torch.bfloat16
    assert wide_(**given).last_hidden_state.dtype == torch.float32
    assert wide_(**given).logits.dtype == torch.bfloat16


def test_mixers_stand_beside_attention() -> None:
    """A state of one size and a cache that grows, in one block."""
    attn = {"kind": "attention", "heads": 4}
    model = recurrent("pre", attn=attn, mixer={"kind": "mamba", "inner": 48}, mixer_2="time-mix")
    text = ids(2, 20) % 40
    state = model.new_state(2, 20)  # type: ignore[operator]
    with torch.no_grad():
        whole = model(input_ids=text).logits
        parts = [model(input_ids=text[:, at : at + 1], state=state).logits for at in range(20)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{}, {"rescale_every": 1, "num_hidden_layers": 4}], ids=str)
def test_states_travel_between_calls_as_the_reference_s_do(options: dict[str, Any]) -> None:
    """Ours from ours, ours from theirs, as a list and as one tensor; the text after them is as if read at once."""
    theirs = reference("RwkvForCausalLM", options)
    ours = ours_of(theirs)
    first, then = ids(2, 24), ids(2, 7, 9)
    with torch.no_grad():
        left, mine = theirs(first, use_cache=True).state, ours(input_ids=first).state
        torch.testing.assert_close(mine, left, atol=2e-5, rtol=1e-5)
        whole = ours(input_ids=torch.cat((first, then), 1)).logits[:, 24:]
        # The reference writes into what it is given.
        expected = theirs(then, state=[tensor.clone() for tensor in left], use_cache=True)
        for given in (mine, torch.stack(mine), tuple(left)):
            out = ours(input_ids=then, state=given)
            torch.testing.assert_close(out.logits, expected.logits, atol=2e-5, rtol=1e-5)
            torch.testing.assert_close(out.logits, whole, atol=2e-5, rtol=1e-5)
            torch.testing.assert_close(out.state, expected.state, atol=2e-5, rtol=1e-5)
        assert "state" not in ours(input_ids=first, use_cache=False)
    assert "state" not in ours.train()(input_ids=first)
    with pytest.raises(ValueError, match="3 tensors were given, the model remembers 5"):
        ours(input_ids=then, state=mine[:3])
    with pytest.raises(ValueError, match=r"\(1, 24, \d\), not \(2, 24, \d\)"):
        ours(input_ids=then, state=[tensor[:1] for tensor in mine])
