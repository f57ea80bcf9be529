"""Replaced-token detection: samples, draws, losses, gradients, costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fakes import FakeSplit, documents
from references import ids, mask
from small_objectives import BERT, CLS, MASK, PAD, SEP, everything, mlm, unmasked
from torch.nn import functional as F

import xtcli
from xtcli.config.preset import load_preset
from xtcli.data.batch import IGNORE
from xtcli.errors import UserError
from xtcli.model import build, count
from xtcli.objectives import ReplacedTokens
from xtcli.parts.replacing import drawn
from xtcli.parts.scope import Refused


def objective(texts: list[list[int]], **options: Any) -> ReplacedTokens:
    config = ReplacedTokens.Config(**options)
    return ReplacedTokens(config, FakeSplit(text=texts), BERT, context=18, seed=options.pop("seed", 0))


def test_samples_are_masked_rows_with_draws_and_the_truth() -> None:
    made = objective(documents(12, 40))
    twin = mlm(documents(12, 40), context=18, mask=0.85, random=0.0)
    for epoch in (0, 3):
        for index in range(len(made)):
            sample, masked = made.sample(index, epoch), twin.sample(index, epoch)
            for name in ("input_ids", "targets.mlm"):
                assert sample[name].tolist() == masked[name].tolist()
            assert sample["targets.replaced"].tolist() == unmasked(masked)
            chosen = sample["targets.mlm"] != IGNORE
            assert ((sample["draws"] >= 0) == chosen).all()
            assert sample["draws"].max() < 2**31
            again = made.sample(index, epoch)
            assert all(np.array_equal(again[name], value) for name, value in sample.items())
    assert made.sample(0, 0)["draws"].tolist() != made.sample(0, 1)["draws"].tolist()


def test_of_the_chosen_tokens_85_percent_are_masked_and_the_rest_stay() -> None:
    made = objective([np.random.default_rng(0).integers(16, 200, size=40000).tolist()])
    batch = made.batch(np.arange(len(made)), np.zeros(len(made), dtype=np.int64))
    inputs, targets = batch.inputs["input_ids"], batch.targets["mlm"]
    chosen = targets != IGNORE
    assert abs(float((inputs[chosen] == MASK).float().mean()) - 0.85) < 0.02
    kept = chosen & (inputs != MASK)
    assert torch.equal(inputs[kept], targets[kept])


def test_padding_has_neither_draws_nor_a_truth() -> None:
    made = objective([[16, 17, 18], [20] * 12], pack="none")
    batch = everything(made)
    padding = batch.inputs["input_ids"] == PAD
    assert padding.any()
    assert (batch.inputs["draws"][padding] == -1).all()
    assert (batch.targets["replaced"][padding] == IGNORE).all()
    assert batch.supervised()["replaced"] == batch.tokens
    row = batch.targets["replaced"][0].tolist()
    assert row[0] == CLS
    assert row[4] == SEP


def test_draws_follow_the_probabilities() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 40) * 2
    numbers = torch.from_numpy(np.random.default_rng(1).integers(2**31, size=60000))
    counts = torch.bincount(drawn(logits.expand(60000, -1), numbers), minlength=40).double()
    expected = logits[0].double().softmax(-1) * 60000
    common = expected >= 5
    statistic = float(((counts - expected) ** 2 / expected)[common].sum())
    assert statistic < 80  # 39 degrees of freedom: 1 in 10,000
    edge = drawn(logits.expand(2, -1), torch.tensor([0, 2**31 - 1]))
    assert edge.tolist() == [0, 39]


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = torch.tensor([[-60.0, 0.0, -60.0, 0.0, -60.0]]).expand(1000, -1)
    numbers = torch.linspace(0, 2**31 - 1, 1000, dtype=torch.float64).long()
    found = drawn(logits, numbers)
    assert set(found.tolist()) == {1, 3}
    assert torch.equal(found, found.sort().values)


def test_large_vocabularies_are_drawn_from_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from xtcli.parts import replacing

    logits, numbers = torch.randn(17, 50), torch.randint(0, 2**31, (17,))
    whole = drawn(logits, numbers)
    monkeypatch.setattr(replacing, "ELEMENTS", 120)
    assert torch.equal(drawn(logits, numbers), whole)
    assert drawn(logits[:0], numbers[:0]).shape == (0,)


def small(*overrides: str, preset: str = "electra-base") -> Any:
    model = build(preset, "model.dropout=0.0", *overrides, tiny=True, seed=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def batch_of(rows: int = 6) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Inputs and targets of rows with some padding on the right."""
    truth, kept = ids(rows, 12), mask(rows, 12, "right").bool()
    generator = torch.Generator().manual_seed(7)
    chosen = (torch.rand(rows, 12, generator=generator) < 0.3) & kept
    draws = torch.randint(0, 2**31, (rows, 12), generator=generator).masked_fill(~chosen, -1)
    inputs = {"input_ids": truth.masked_fill(chosen, 4).masked_fill(~kept, 0), "attention_mask": kept, "draws": draws}
    return inputs, {"mlm": truth.masked_fill(~chosen, IGNORE), "replaced": truth.masked_fill(~kept, IGNORE)}


@pytest.mark.parametrize("preset", ["electra-small", "electra-base"])
def test_losses_are_those_of_two_models_that_share_an_embedding(preset: str) -> None:
    """The slow twin: each member as an encoder of its own, the corrupted text made by hand."""
    model = small(preset=preset)
    inputs, targets = batch_of()
    sides = {}
    for name, (config, prefix) in type(model).members(model.config).items():
        side = xtcli.model.construct(config).to_empty(device="cpu")
        own = model.state_dict()
        side.load_state_dict({key: own.get(prefix + key, own.get(key)) for key in side.state_dict()})
        sides[name] = side.eval()
    told = {"attention_mask": inputs["attention_mask"]}
    logits = sides["generator"](input_ids=inputs["input_ids"], **told).logits
    chosen = inputs["draws"] >= 0
    shown = inputs["input_ids"].clone()
    for row, place in chosen.nonzero().tolist():
        chances = (logits[row, place].double().softmax(-1) * 2**31).long().tolist()
        aim, total = int(inputs["draws"][row, place]) * sum(chances) >> 31, 0
        for token, chance in enumerate(chances):
            total += chance
            if total > aim:
                shown[row, place] = token
                break
    filled = F.cross_entropy(logits[chosen], targets["mlm"][chosen], reduction="sum")
    scores = sides["discriminator"](input_ids=shown, **told).logits
    real = inputs["attention_mask"]
    found = F.binary_cross_entropy_with_logits(
        scores[real], (shown != targets["replaced"])[real].float(), reduction="sum"
    )
    terms = model.losses(inputs, targets)
    assert (terms["mlm"].weight, terms["replaced"].weight) == (1.0, 50.0)
    assert (int(terms["mlm"].count), int(terms["replaced"].count)) == (int(chosen.sum()), int(real.sum()))
    torch.testing.assert_close(terms["mlm"].sum, filled, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(terms["replaced"].sum, found, atol=1e-4, rtol=1e-5)


def test_each_loss_has_a_gradient_where_it_should() -> None:
    model = small(preset="electra-small")
    inputs, targets = batch_of()
    terms = model.losses(inputs, targets)
    reached = {}
    for head, term in terms.items():
        model.zero_grad()
        term.sum.backward(retain_graph=True)
        reached[head] = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    own = {name for name, _ in model.named_parameters() if name.startswith(("generator.", "heads.mlm."))}
    shared = {name for name, _ in model.named_parameters() if name.startswith("embed.") and "project" not in name}
    rest = {name for name, _ in model.named_parameters()} - own - shared
    keys = {name for name, _ in model.named_parameters() if name.endswith("attn.k.bias")}
    assert reached["mlm"] | keys == own | shared | keys
    assert reached["replaced"] | keys == rest | shared | keys
    assert {"embed.project.weight", "generator.embed.project.weight"} <= rest | own


def test_draws_do_not_depend_on_how_a_batch_is_split() -> None:
    model = small()
    inputs, _ = batch_of()
    whole = model.hidden(**inputs).ids
    pieces = [model.hidden(**{name: value[at : at + 2] for name, value in inputs.items()}).ids for at in (0, 2, 4)]
    assert torch.equal(whole, torch.cat(pieces))
    assert torch.equal(whole[inputs["draws"] < 0], inputs["input_ids"][inputs["draws"] < 0])
    state = torch.get_rng_state()
    model.hidden(**inputs)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_draws_both_sides_read_the_text_as_it_is() -> None:
    model = small()
    text = ids(2, 9)
    out = model(input_ids=text, labels=torch.zeros_like(text))
    assert out.logits.shape == (2, 9)
    assert out.prediction_logits.shape == (2, 9, 512)
    scores = out.logits.flatten()
    torch.testing.assert_close(out.loss, F.binary_cross_entropy_with_logits(scores, torch.zeros_like(scores)))
    assert torch.equal(model.hidden(input_ids=text).ids, text)


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (("model.heads={replaced: {}}",), "have no 'mlm'"),
        (("model.heads={mlm: {}}",), "have no 'replaced'"),
        (("model.embed={kind: factorised, width: 16, project_after: sum}",), "shared up to its projection"),
        (("model.generator.stack.block.sublayers.attn.heads=5",), "5 heads do not divide dim 48"),
    ],
    ids=str,
)
def test_what_cannot_be_built_is_refused_with_the_reason(overrides: tuple[str, ...], wanted: str) -> None:
    with pytest.raises((UserError, Refused), match=wanted):
        build("electra-base", *overrides, tiny=True, device="meta")


def test_inspect_counts_both_towers() -> None:
    from xtcli.inspect.cost import measure_costs
    from xtcli.inspect.sight import look

    resolved = load_preset("electra-small", tiny=True)
    whole = measure_costs(resolved, length=64)
    model = build(resolved, device="meta")
    apart = 0.0
    for config, _ in type(model).members(model.config).values():
        preset = resolved.preset.model_copy(update={"model": config})
        alone = type(resolved)(preset, resolved.file, {})
        apart += measure_costs(alone, length=64).forward
    assert whole.forward == pytest.approx(apart)
    assert {view.stack for view in look(model, 32, 8).masks} == {"stack", "generator.stack"}
    assert count(model) == sum(p.numel() for p in model.parameters())
