"""FLOPs, state and memory against computations that share no code with them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from presets import DISTINCT
from xtcli.config.preset import Resolved, load_preset
from xtcli.errors import UserError
from xtcli.inspect import cost, memory
from xtcli.inspect.cost import Costs, measure_costs, synthetic
from xtcli.model import build, count, skeleton
from xtcli.parts.attention import Attention
from xtcli.parts.context import KeyValues
from xtcli.parts.patches import Patches
from xtcli.registry import kinds
from xtcli.train.counting import Alive, Kernels
from xtcli.train.plan import measure

PRESETS = DISTINCT


@cache
def measured(name: str) -> Costs:
    """The costs of a preset in tiny form at 32 tokens, or at all its places where it has a fixed number of them."""
    found = load_preset(name, tiny=True)
    fixed = any(isinstance(module, Patches) for module in skeleton(found).modules())
    return measure_costs(found, length=None if fixed else 32)


def test_flops_of_gpt2_small_in_closed_form() -> None:
    d, layers, vocab, length = 768, 12, 50257, 1024
    forward = layers * (2 * 12 * d * d + 4 * length * d) + 2 * vocab * d
    found = measure_costs(load_preset("gpt2-small"))
    assert found.length == length and found.forward == forward and found.training == 3 * forward
    shorter = measure_costs(load_preset("gpt2-small"), length=100)
    assert shorter.forward == forward - layers * 4 * (length - 100) * d


def test_heads_that_read_masked_places_alone_train_on_their_share() -> None:
    found = load_preset("bert-base", ["train.context=null", "objective.next_sentence=false", "model.heads={mlm: {}}"])
    costs = measure_costs(found, length=100)
    d, vocab = 768, 30522
    head = 2 * d * d + 2 * d * vocab
    pooler = 2 * d * d / 100
    body = 12 * (2 * 12 * d * d + 4 * 100 * d) + pooler
    assert costs.forward == pytest.approx(body + head)
    assert costs.training == pytest.approx(3 * (body + 0.15 * head))


@pytest.mark.parametrize("name", PRESETS)
def test_flops_equal_those_of_an_operator_level_counter(name: str) -> None:
    """A real forward pass, attention written out, counted by PyTorch: within 1 %."""
    found = load_preset(name, tiny=True)
    costs = measured(name)
    model = build(found)
    batch = synthetic(model, 1, costs.length)
    written_out = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with written_out, torch.no_grad(), FlopCounterMode(display=False) as counter:
        hidden = model.hidden(**batch.inputs)
        for kind, head in model.heads.items():
            head.outputs(model.read_by(kind, hidden))  # type: ignore[operator]
    assert costs.forward * costs.tokens == pytest.approx(counter.get_total_flops(), rel=0.01)


def _stacks(resolved: Resolved) -> list[Mapping[str, Any]]:
    model = resolved.to_tree()["model"]
    return [model["decoder"]["stack"] if "decoder" in model else model["stack"]]


def _attentions(resolved: Resolved) -> list[tuple[str, Mapping[str, Any]]]:
    """(sublayer's kind, its config) for each layer of the stack that writes."""
    model = resolved.to_tree()["model"]
    stack = model["decoder"]["stack"] if "decoder" in model else model["stack"]
    sublayers = stack["block"]["sublayers"].values()
    return [(item["kind"], item | {"dim": model["dim"]}) for item in sublayers for _ in range(stack["layers"])]


def _writes(name: str) -> bool:
    """Whether a preset's model goes on with a text, and so keeps a state."""
    return load_preset(name).to_tree()["model"]["kind"] in ("decoder", "encoder-decoder")


@pytest.mark.parametrize("name", [name for name in PRESETS if _writes(name)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_state_is_two_times_heads_times_width_for_each_layer(name: str, precision: str) -> None:
    resolved = load_preset(name, tiny=True)
    width = {"fp32": 4, "bf16": 2}[precision]
    wanted = {"attention": 0, "cross-attention": 0}
    if any("pattern" in side and side["pattern"] for side in _stacks(resolved)):
        pytest.skip("blocks of several kinds, whose states their own tests measure")
    if {kind for kind, _ in _attentions(resolved)} & {*kinds("mixer")} - {*wanted, "mamba", "time-mix", "channel-mix"}:
        pytest.skip("states of other kinds, which their own tests measure")
    if resolved.preset.model.kind == "decoder" and resolved.preset.model.stack.recurrence is not None:  # type: ignore[attr-defined]
        pytest.skip("a memory of one size")
    for kind, item in _attentions(resolved):
        if kind in wanted:
            wanted[kind] += (
                2 * (item["kv_heads"] or item["heads"]) * (item["head_dim"] or item["dim"] // item["heads"]) * width
            )
    state = measured(name).use[precision].state
    assert state is not None
    fixed = sum(_recurrent(kind, item, width) for kind, item in _attentions(resolved))
    assert (state.token, state.source, state.fixed) == (wanted["attention"], wanted["cross-attention"], fixed)


def _recurrent(kind: str, item: Mapping[str, Any], width: int) -> int:
    """Bytes of a state of one size; what is summed over a whole text is float32."""
    if kind == "mamba":
        return int(item["inner"]) * ((item["kernel"] - 1) * width + 4 * item["state"])
    if kind == "time-mix":
        return int(item["dim"]) * width + 3 * 4 * int(item["width"] or item["dim"])
    return int(item["dim"]) * width if kind == "channel-mix" else 0


def test_an_encoder_keeps_no_state() -> None:
    use = measure_costs(load_preset("bert-base", tiny=True)).use["fp32"]
    assert use.state is None and use.states == 0


def test_a_state_that_stops_growing_and_one_that_never_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mixed(KeyValues):
        """A cache of at most 8 tokens and a vector of 10 float64."""

    def new_state(self: Attention, batch: int, capacity: int, device: Any, dtype: Any) -> Mixed:
        made = Mixed.new(batch, self.groups, min(capacity, 8), self.head_dim, device, dtype)
        made.extra = {"vector": [torch.zeros(batch, 10, dtype=torch.float64, device=device)]}  # type: ignore[attr-defined]
        return made

    monkeypatch.setattr(Attention, "new_state", new_state)
    model = skeleton(load_preset("gpt2-small", tiny=True))
    layers, token = 2, 2 * 64 * 4
    assert memory.measure_state(model, 32) == memory.State(0, 0, layers * (8 * token + 80))
    assert memory.measure_state(model, 8) == memory.State(layers * token, 0, layers * 80)


def test_alive_follows_what_is_in_use() -> None:
    kept = torch.empty(100, device="meta")
    with Alive([kept]) as alive:
        a = kept + 1
        assert (alive.now, alive.peak) == (400, 400)
        b = a.reshape(10, 10).t()
        assert alive.now == 400
        a = a * 2
        assert (alive.now, alive.peak) == (800, 800)
        del b
        assert (alive.now, alive.peak) == (400, 800)
        kept.t()
    assert (alive.now, alive.peak) == (400, 800)


CALLS = [
    {},
    {"is_causal": True},
    {"attn_mask": torch.ones(1, 1, 16, 24, dtype=torch.bool)},
    {"attn_mask": torch.zeros(1, 4, 16, 24)},
]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("options", CALLS, ids=("plain", "causal", "mask", "bias"))
def test_attention_on_meta_costs_what_the_real_kernel_costs(groups: int, options: dict[str, Any]) -> None:
    def run(device: str) -> tuple[int, int, torch.Size]:
        q = torch.empty(2, 4, 16, 8, device=device, requires_grad=True)
        k, v = (torch.empty(2, groups, 24, 8, device=device, requires_grad=True) for _ in range(2))
        given = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in options.items()}
        saved: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            kept.append(tensor)
            return tensor

        kept: list[torch.Tensor] = []
        counter = FlopCounterMode(display=False)
        with Kernels(), counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = F.scaled_dot_product_attention(q, k, v, enable_gqa=groups != 4, **given)
        return counter.get_total_flops(), sum(saved.values()), out.shape

    flops, kept, shape = run("meta")
    assert flops == 4 * 2 * 4 * 16 * 24 * 8 and shape == (2, 4, 16, 8)
    scores = 2 * 4 * 16 * 24 * 4
    mask = options["attn_mask"].nbytes if "attn_mask" in options else 0
    inputs = 4 * (2 * 4 * 16 * 8 + 2 * 2 * groups * 24 * 8)
    assert kept == inputs + mask + 4 * (2 * 4 * 16 * 8 + 2 * 4 * 16)
    assert kept - mask < scores + inputs


def test_attention_with_dropout_is_written_out_on_the_cpu_alone() -> None:
    q = torch.empty(1, 1, 64, 2, device="meta", requires_grad=True)
    sizes = {}
    for device in ("cpu", "cuda"):
        saved: list[int] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t
        )
        with Kernels(device), hooks:
            F.scaled_dot_product_attention(q, q, q, dropout_p=0.1)
        sizes[device] = max(saved)
    assert sizes == {"cpu": 64 * 64, "cuda": 64 * 2}


@pytest.mark.parametrize("name", ["gpt2-small", "tinyllama-1.1b", "t5-small", "bert-base"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_planned_activations_are_those_that_a_real_step_keeps(name: str, dtype: torch.dtype) -> None:
    found = load_preset(name, ["model.dropout=0.0", *_no_inner_dropout(name)], tiny=True)
    model = build(found)
    batch = synthetic(model, 1, 48)
    kept: dict[int, tuple[Any, int]] = {}
    owned = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    # What autocast copies of the weights is planned with the weights.
    weights = {shape for parameter in model.parameters() for shape in (parameter.shape, parameter.shape[::-1])}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned and (tensor.dtype == torch.float32 or tensor.shape not in weights):
            kept[storage._cdata] = (storage, storage.nbytes())
        return tensor

    narrow = dtype != torch.float32
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", dtype, narrow):
        model.hidden(**batch.inputs)
    real = sum(size for _, size in kept.values())
    assert measure(skeleton(found), batch, dtype, "cpu").activations == pytest.approx(real, rel=0.1)


def _no_inner_dropout(name: str) -> list[str]:
    if not name.startswith("t5"):
        return []
    sides = [f"model.{side}.stack" for side in ("encoder", "decoder")]
    return [f"{side}.{key}=0.0" for side in sides for key in ("dropout", "block.sublayers.ffn.dropout")]


def test_memory_grows_with_batch_and_length() -> None:
    found = load_preset("gpt2-small", tiny=True)
    small, rows, long = (measure_costs(found, batch=b, length=n).use["fp32"] for b, n in ((1, 16), (4, 16), (1, 64)))
    for larger in (rows, long):
        assert small.inference < larger.inference and small.training.peak < larger.training.peak
    assert rows.states == 4 * small.states and small.weights == rows.weights == 4 * count(skeleton(found))


def test_recomputation_takes_less_memory() -> None:
    plain, recomputed = (
        measure_costs(load_preset("gpt2-small", [f"train.checkpointing={value}"])).use["fp32"].training.peak
        for value in ("false", "true")
    )
    assert recomputed < plain


PRINTED = """\
FLOPs per token, forward   311.3 kFLOP  in a text of 64 tokens
FLOPs per token, training  933.9 kFLOP  in a text of 64 tokens

2 texts of 64 tokens, each with an answer of as many               fp32       bf16
weights                                                         1.0 MiB  514.0 KiB
state per token                                       1,024 B (1.0 KiB)      512 B
state per source token                                1,024 B (1.0 KiB)      512 B
state in all                                                  257.1 KiB  129.1 KiB
memory for inference                                            """


def test_costs_as_printed() -> None:
    text = "\n".join(cost.lines(measure_costs(load_preset("t5-small", tiny=True), batch=2, length=64)))
    assert text.startswith(PRINTED)


def test_a_length_beyond_the_positions_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"--length: 129 tokens do not fit into 128 positions; use 128 or less, or raise"
    ):
        measure_costs(load_preset("gpt2-small", tiny=True), length=129)
