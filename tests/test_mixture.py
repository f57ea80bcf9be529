"""Mixtures of experts: the grouped form against a dense loop, routes, losses of routers, and how batches may be split."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from xtcli.config.preset import load_preset
from xtcli.model import construct, count, count_active, skeleton
from xtcli.parts import experts as grouped
from xtcli.parts.context import Ctx, Ledger
from xtcli.parts.experts import blanked, grouped_linear
from xtcli.parts.graphs import Graph
from xtcli.parts.moe import MixtureOfExperts
from xtcli.parts.scope import Refused
from xtcli.registry import find
from xtcli.train.start import new

VOCAB, DIM, EXPERTS = 67, 16, 5
TOP_2: dict[str, Any] = {"kind": "top-k", "choose": 2}
ALL = {"kind": "top-k", "choose": EXPERTS, "renormalise": False}
ROOMY = {"kind": "capacity", "capacity": 64}
TIGHT = {"kind": "capacity", "capacity": 2, "bias": True}
ROUTERS = {"top-2": TOP_2, "all": ALL, "roomy": ROOMY, "tight": TIGHT}


def build(router: dict[str, Any], expert: dict[str, Any] | None = None, kind: str = "blocks", **changes: Any) -> Graph:
    """A small decoder with experts, its weights random."""
    ffn = {"kind": "moe", "experts": EXPERTS, "router": router, "expert": expert or {"kind": "glu", "hidden": 12}}
    config = {
        "vocab": VOCAB,
        "dim": DIM,
        "norm": "rms",
        "stack": {
            "kind": kind,
            "layers": 2,
            "position": "rotary",
            "block": {"sublayers": {"attn": {"kind": "attention", "heads": 2}, "ffn": ffn}},
        },
        "heads": {"lm": {"tied": False}},
    }
    model = construct(find("graph", "decoder").Config.model_validate(config | changes)).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.4, generator=generator)
    return model


def layers(model: Graph) -> list[MixtureOfExperts]:
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]


def context(rows: int, length: int, keep: Tensor | None = None, state: Any = None) -> Ctx:
    places = torch.arange(length)[None]
    return Ctx(places, places, keep=keep, state=state, ledger=Ledger())


def dense(layer: MixtureOfExperts, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """Every expert over every token, what was not chosen times nothing."""
    run: Any = layer.experts
    total = torch.zeros_like(x)
    for number in range(EXPERTS):

        def linear(part: Any, y: Tensor, number: int = number) -> Tensor:
            return F.linear(y, part.weight[number], None if part.bias is None else part.bias[number])

        inner = run.act(linear(run.gate, x)) * linear(run.up, x) if hasattr(run, "gate") else run.act(linear(run.up, x))
        share = (weights * (experts == number)).sum(-1, keepdim=True)
        total = total + share * linear(run.down, inner)
    return total


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("expert", ["mlp", "glu"])
@pytest.mark.parametrize("router", ROUTERS)
def test_grouped_equals_dense(router: str, expert: str, bias: bool) -> None:
    model = build(ROUTERS[router], {"kind": expert, "hidden": 12, "bias": bias})
    fast, slow = layers(model.double())[0], copy.deepcopy(layers(model)[0])
    x = torch.randn(3, 11, DIM, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    found = fast(one, context(3, 11))
    routes = slow.router(other, None, context(3, 11))
    expected = dense(slow, other, routes.experts, routes.weights)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    weight = torch.randn(found.shape, dtype=torch.double, generator=torch.Generator().manual_seed(2))
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(one.grad, other.grad, atol=1e-12, rtol=1e-10)
    for (name, a), b in zip(fast.named_parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-12, rtol=1e-10, msg=name)


def test_products_pass_gradcheck_and_leave_the_rest_zero() -> None:
    x = torch.randn(7, 3, dtype=torch.double, requires_grad=True)
    weight = torch.randn(4, 2, 3, dtype=torch.double, requires_grad=True)
    counts = torch.tensor([2, 0, 3, 1])
    assert torch.autograd.gradcheck(lambda x, w: grouped_linear(x, w, counts), (x, weight))
    assert not grouped_linear(x, weight, counts)[6].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("counts", [(9, 4, 0, 7), (0, 0, 24, 0), (5, 1, 3, 2)], ids=str)
def test_the_kernel_for_all_experts_equals_the_loop(counts: tuple[int, ...], dtype: torch.dtype) -> None:
    """Values and both gradients; the kernel says nothing of rows behind the last, and takes experts without rows."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((24, 16), (4, 8, 16), (24, 8))
    x, weight, dy = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    number = torch.tensor(counts)
    found = blanked(grouped.linear_at_once(x, weight, number), number)
    torch.testing.assert_close(found, grouped.linear_by_one(x, weight, number), rtol=1e-2, atol=1e-5)
    back = blanked(grouped.linear_at_once(dy, weight.transpose(1, 2), number), number)
    torch.testing.assert_close(back, grouped.linear_by_one(dy, weight.transpose(1, 2), number), rtol=1e-2, atol=1e-5)
    outer = grouped.outer_at_once(dy, x, number)
    torch.testing.assert_close(outer, grouped.outer_by_one(dy, x, number), rtol=2e-2, atol=1e-5)
    assert outer[torch.tensor(counts) > 0].any() and not outer[torch.tensor(counts) == 0].any()


@pytest.mark.parametrize("router", ROUTERS)
def test_nothing_but_the_loop_of_products_reads_values_on_the_host(router: str) -> None:
    """On the meta device there are none: what asks for a value raises."""
    layer = layers(build(ROUTERS[router]))[0].to("meta")
    x = torch.randn(2, 8, DIM, device="meta", requires_grad=True)
    places = torch.arange(8, device="meta")[None]
    layer(x, Ctx(places, places, ledger=Ledger())).sum().backward()
    assert x.grad is not None and layer.experts.up.weight.grad is not None  # type: ignore[union-attr]


def test_a_token_without_room_goes_past() -> None:
    model = build(TIGHT)
    layer: Any = layers(model)[0]
    x = torch.randn(2, 20, DIM)
    ctx = context(2, 20)
    y = layer(x, ctx)
    (experts,) = ctx.ledger.read("router_experts")
    past = experts[..., 0] == EXPERTS
    assert past.any() and not y[past].any() and y[~past].any(-1).all()
    for row in experts[..., 0]:
        taken = torch.bincount(row[row < EXPERTS], minlength=EXPERTS)
        assert int(taken.max()) == 2
    # First come, first served: what goes past wanted an expert that two tokens before it had filled.
    best = layer.router.classifier(x).argmax(-1)
    for row, place in past.nonzero().tolist():
        assert int((best[row, :place] == best[row, place]).sum()) >= 2


def test_padding_takes_no_room_unless_told() -> None:
    x = torch.randn(1, 12, DIM)
    keep = torch.ones(1, 12, dtype=torch.bool)
    keep[:, :5] = False
    for padding in (False, True):
        layer = layers(build(TIGHT | {"padding": padding}))[0]
        alone = layer(x[:, 5:], context(1, 7))
        behind = layer(x, context(1, 12, keep))[:, 5:]
        assert torch.allclose(alone, behind, atol=1e-6) is not padding


@pytest.mark.parametrize("chunks", [(24,), (9, 1, 5, 1, 8), (1,) * 24])
def test_room_runs_out_in_steps_as_in_one_pass(chunks: tuple[int, ...]) -> None:
    model = build({"kind": "capacity", "capacity": 3}).eval()
    ids = torch.randint(0, VOCAB, (3, 24), generator=torch.Generator().manual_seed(4))
    whole = model(input_ids=ids).logits
    state = model.new_state(3, 24)  # type: ignore[operator]
    stepped = torch.cat([model(input_ids=part, state=state).logits for part in ids.split(list(chunks), 1)], 1)
    torch.testing.assert_close(stepped, whole, atol=2e-5, rtol=1e-5)
    roomy = build({"kind": "capacity", "capacity": 64}).eval()
    assert not torch.allclose(roomy(input_ids=ids).logits, whole, atol=1e-3)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_reversible_stack_routes_again_as_it_did(router: str) -> None:
    ids = torch.randint(0, VOCAB, (2, 20), generator=torch.Generator().manual_seed(6))
    found = []
    for keeps in (True, False):
        model = build(ROUTERS[router], kind="reversible", auxiliary={"balance": {"weight": 1.0}}).double()
        model.stack.keeps = keeps  # type: ignore[attr-defined]
        terms = model.losses({"input_ids": ids}, {"lm": ids})
        sum(term.weight * term.mean() for term in terms.values()).backward()  # type: ignore[union-attr]
        found.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_jitter_moves_routes_in_training_alone() -> None:
    layer = layers(build(TOP_2 | {"jitter": 0.5}))[0]
    x = torch.randn(2, 9, DIM)
    trained = [layer.train()(x, context(2, 9)) for _ in range(2)]
    still = [layer.eval()(x, context(2, 9)) for _ in range(2)]
    assert not torch.equal(*trained) and torch.equal(*still)


MASK = torch.ones(4, 10, dtype=torch.long)
MASK[1, 6:] = MASK[2, 8:] = 0


def step(ids: Tensor, mask: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return {"input_ids": ids, "attention_mask": mask}, {"lm": ids.masked_fill(mask == 0, -100)}


def gradients(model: Graph, sizes: tuple[int, ...], mask: Tensor = MASK) -> dict[str, Tensor]:
    """Gradients of one step over four rows, summed over micro-batches of these sizes as the training loop does."""
    ids = torch.randint(0, VOCAB, mask.shape, generator=torch.Generator().manual_seed(5))
    inputs, targets = step(ids, mask)
    counts = {"lm": int((targets["lm"] != -100).sum())} | model.units(inputs)
    model.zero_grad()
    for rows in torch.arange(4).split(list(sizes)):
        terms = model.losses({k: v[rows] for k, v in inputs.items()}, {k: v[rows] for k, v in targets.items()})
        sum(term.weight * term.sum / counts[name] for name, term in terms.items()).backward()  # type: ignore[union-attr]
    return {name: p.grad.clone() for name, p in model.named_parameters()}  # type: ignore[union-attr]


SPLIT: list[tuple[str, dict[str, Any], bool]] = [
    ("balance", {"over": "rows"}, True),
    ("balance", {"over": "rows", "padding": True, "dropped": "first"}, True),
    ("balance", {"over": "batch"}, False),
    ("router-z", {}, True),
    ("router-z", {"padding": True}, True),
]


@pytest.mark.parametrize("router", ["top-2", "tight"])
@pytest.mark.parametrize(("kind", "fields", "same"), SPLIT, ids=str)
def test_gradients_of_any_split_are_those_of_the_batch(
    kind: str, fields: dict[str, Any], same: bool, router: str
) -> None:
    model = build(ROUTERS[router], auxiliary={kind: {"weight": 5.0, **fields}})
    whole = gradients(model, (4,))
    bare = gradients(build(ROUTERS[router]), (4,))
    name = "stack.blocks.0.ffn.router.classifier.weight"
    assert not torch.allclose(whole[name], bare[name], atol=1e-3)
    for sizes in ((1, 1, 1, 1), (3, 1), (1, 2, 1)):
        split = gradients(model, sizes)
        off = max(float((split[name] - grad).abs().max()) for name, grad in whole.items())
        assert (off < 1e-5) is same, off


def test_balance_over_the_batch_weighs_micro_batches_by_their_tokens() -> None:
    model = build(TOP_2, auxiliary={"balance": {"over": "batch", "weight": 1.0}})
    ids = torch.randint(0, VOCAB, (4, 10), generator=torch.Generator().manual_seed(5))
    inputs, targets = step(ids, MASK)
    assert model.units(inputs) == {"balance": 34}
    shares = []
    for row in range(4):
        term = model.losses({k: v[row : row + 1] for k, v in inputs.items()}, {"lm": targets["lm"][row : row + 1]})
        shares.append(int(term["balance"].count))
    assert shares == [10, 6, 8, 10]


def test_balance_is_the_formula() -> None:
    model = build(TOP_2, auxiliary={"balance": {"over": "batch"}, "router-z": {}})
    ids = torch.randint(0, VOCAB, (4, 10), generator=torch.Generator().manual_seed(5))
    out = model(input_ids=ids, attention_mask=MASK)
    real = MASK.bool().flatten()
    logits = torch.cat([layer[real] for layer in out.router_logits])  # (layers x text, E)
    probs = logits.softmax(-1)
    chosen = F.one_hot(probs.topk(2, -1).indices, EXPERTS).sum(1).float()
    torch.testing.assert_close(out.aux_loss, EXPERTS * (chosen.mean(0) * probs.mean(0)).sum())
    torch.testing.assert_close(out.z_loss, logits.logsumexp(-1).square().mean())


def test_even_routes_have_a_balance_of_one_for_each_choice() -> None:
    model = build(TOP_2, auxiliary={"balance": {}})
    for layer in layers(model):
        layer.router.classifier.weight.data.zero_()  # type: ignore[union-attr]
    out = model(input_ids=torch.zeros(2, 9, dtype=torch.long))
    torch.testing.assert_close(out.aux_loss, torch.tensor(2.0))


def test_a_plain_call_says_what_it_is_asked_for() -> None:
    ids = torch.randint(0, VOCAB, (2, 9))
    for shown in (True, False):
        model = build(TOP_2, auxiliary={"balance": {"weight": 0.5, "shown": shown}}).eval()
        plain, asked, bare = (model(input_ids=ids, labels=ids, output_router_logits=w) for w in (None, True, False))
        assert ("aux_loss" in plain) is shown and "aux_loss" in asked and "aux_loss" not in bare
        torch.testing.assert_close(asked.loss, bare.loss + 0.5 * asked.aux_loss)
        assert len(asked.router_logits) == 2 and bare.router_logits is None
        # Training reads it either way.
        assert "balance" in model.losses({"input_ids": ids}, {"lm": ids})


@pytest.mark.parametrize(
    ("changes", "path", "cause"),
    [
        ({"router": TOP_2 | {"choose": 9}}, "model.stack.block.sublayers.ffn.router.choose", "9 of 5 experts"),
        ({"ffn": {"kind": "mlp", "hidden": 8}}, "model.auxiliary.balance", "no layer of the model has a router"),
    ],
)
def test_what_cannot_be_built_is_refused(changes: dict[str, Any], path: str, cause: str) -> None:
    with pytest.raises(Refused) as caught:
        if "router" in changes:
            build(changes["router"])
        else:
            block = {"sublayers": {"attn": {"kind": "attention", "heads": 2}, **changes}}
            build(TOP_2, stack={"layers": 1, "block": block}, auxiliary={"balance": {}})
    assert [(problem.path, problem.cause) for problem in caught.value.problems] == [(path, cause)]


def test_active_parameters() -> None:
    model = skeleton(load_preset("mixtral-8x7b"))
    assert count(model) == 46702792704
    assert count_active(model) == 12879925248
    assert count_active(skeleton(load_preset("gpt2-nano"))) == count(skeleton(load_preset("gpt2-nano")))


def test_training_logs_the_losses_of_routers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text").mkdir()
    for number in range(8):
        (tmp_path / "text" / f"{number}.txt").write_text("many words, and more words again. " * 40)
    quick = [f"data={tmp_path / 'text'}", "train.steps=3", "train.log_every=1", "train.batch=4", "train.save_every=0"]
    quick += ["tokenizer={kind: bytes, special: {pad: '<pad>', eos: '</s>'}}", "train.sample_every=0"]
    quick += ["train.validate_every=0", "data.validation=0.2", "model.dropout=0", "train.sample_tokens=2"]
    found = []
    for micro in (1, 4):
        lines: list[dict[str, Any]] = []
        options = [*quick, f"train.micro_batch={micro}", "model.auxiliary.balance.over=rows"]
        resolved = load_preset("mixtral-8x7b", options, tiny=True)
        code, _ = new(resolved, out=tmp_path / str(micro), command=["xt"], record=lines.append, talk=lambda text: None)
        assert code == 0
        steps = [line for line in lines if "losses" in line]
        assert len(steps) == 3
        for line in steps:
            assert set(line["losses"]) == {"lm", "balance"}
            assert line["loss"] == pytest.approx(line["losses"]["lm"] + 0.02 * line["losses"]["balance"], abs=1e-6)
        # Validation measures what the model predicts.
        assert all("val_losses" not in line for line in lines)
        found.append([line["losses"] for line in steps])
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, abs=2e-5)
