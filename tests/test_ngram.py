"""Streams that predict tokens ahead: what each sees, that steps equal a whole pass, the loss, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from references import ids, noise
from test_parity import TOLERANCE, converted
from test_prophetnet import CAUSAL, GENERATION, reference
from torch.nn import functional as F
from transformers.models.prophetnet import modeling_prophetnet as peer

from xtcli.config.preset import load_preset
from xtcli.errors import UserError
from xtcli.inspect import sight
from xtcli.model import build, construct, skeleton
from xtcli.parts.ngram import one_sided
from xtcli.parts.outputs import cross_entropy
from xtcli.parts.scope import Refused
from xtcli.registry import find


@pytest.mark.parametrize("chunks", [(20,), (7, 1, 9, 3), (1,) * 20])
@pytest.mark.parametrize("name", [GENERATION, CAUSAL])
def test_every_stream_is_the_same_in_steps(name: str, chunks: tuple[int, ...]) -> None:
    ours: Any = converted(reference(name, {"ngram": 3}), "prophetnet")
    target = ids(2, 20, 5)
    given = {"encoder_hidden_states": noise(2, 7, 24)} if name == CAUSAL else {"input_ids": ids(2, 9)}
    key = "input_ids" if name == CAUSAL else "decoder_input_ids"
    state = ours.new_state(2, 20)
    with torch.no_grad():
        whole = ours(**given, **{key: target})
        parts = [ours(**given, **{key: part}, state=state) for part in target.split(list(chunks), 1)]
    found = torch.cat([part.logits for part in parts], 1)
    torch.testing.assert_close(found, whole.logits, atol=TOLERANCE, rtol=1e-5)
    found = torch.cat([part.logits_ngram for part in parts], 2)
    torch.testing.assert_close(found, whole.logits_ngram, atol=TOLERANCE, rtol=1e-5)


def test_what_each_stream_sees() -> None:
    """In a model of one layer stream i at place t depends on tokens up to t - i, and on the first token."""
    ours: Any = converted(
        reference(CAUSAL, {"ngram": 3, "num_decoder_layers": 1, "add_cross_attention": False}), "prophetnet"
    )
    vectors = noise(1, 8, 24).requires_grad_()
    out = ours(inputs_embeds=vectors)
    answers = torch.cat((out.logits[:, None], out.logits_ngram), 1)[0]
    for stream in range(3):
        for place in range(8):
            (slope,) = torch.autograd.grad(answers[stream, place].square().sum(), vectors, retain_graph=True)
            read = [token for token in range(8) if slope[0, token].abs().max() > 0]
            assert read == sorted({0, *range(place - stream + 1)}), (stream, place)


def test_packed_documents_are_alone_in_every_stream() -> None:
    ours: Any = converted(reference(CAUSAL, {"ngram": 3, "add_cross_attention": False}), "prophetnet")
    first, second = ids(2, 7), ids(2, 9, 5)
    documents = torch.tensor([[0] * 7 + [1] * 9] * 2)
    places = torch.cat((torch.arange(7), torch.arange(9)))[None]
    with torch.no_grad():
        packed = ours(input_ids=torch.cat((first, second), 1), document_ids=documents, position_ids=places)
        for text, begin in ((first, 0), (second, 7)):
            alone = ours(input_ids=text)
            part = slice(begin, begin + text.shape[1])
            torch.testing.assert_close(packed.logits[:, part], alone.logits, atol=TOLERANCE, rtol=1e-5)
            torch.testing.assert_close(packed.logits_ngram[:, :, part], alone.logits_ngram, atol=TOLERANCE, rtol=1e-5)


@pytest.mark.parametrize(("buckets", "furthest"), [(32, 128), (8, 20), (8, 16), (6, 12), (7, 30), (2, 3)])
def test_distances_fall_into_the_reference_s_buckets(buckets: int, furthest: int) -> None:
    steps = torch.arange(-3, 300)
    wanted = peer.compute_relative_buckets(buckets, furthest, -steps)
    assert torch.equal(one_sided(steps, buckets, furthest), wanted.long())


def test_the_loss_is_the_mean_of_the_streams_by_weight() -> None:
    source, target = ids(2, 9), ids(2, 6, 5)

    def loss(**head: float) -> tuple[float, list[float]]:
        options = ["model.decoder.stack.streams=3", *(f"model.heads.lm.{k}={v}" for k, v in head.items())]
        resolved = load_preset("prophetnet-large", options, tiny=True)
        ours: Any = build(resolved).eval()
        with torch.no_grad():
            out = ours(input_ids=source, labels=target)
            terms = ours.losses({"input_ids": source, "decoder_input_ids": ours.shift_right(target)}, {"lm": target})
        assert float(terms["lm"].mean()) == pytest.approx(float(out.loss))
        each = [out.logits, *out.logits_ngram.unbind(1)]
        smoothing = head.get("smoothing", 0.0)
        return float(out.loss), [float(cross_entropy(logits, target, smoothing).mean()) for logits in each]

    whole, (first, second, third) = loss()
    assert whole == pytest.approx((first + second + third) / 3)
    whole, (first, second, third) = loss(further=0.5)
    assert whole == pytest.approx((first + 0.5 * (second + third)) / 2)
    whole, (first, second, third) = loss(further=0.0, smoothing=0.2)
    assert whole == pytest.approx(first)


def test_smoothing_spreads_a_share_of_each_target() -> None:
    logits, targets = noise(5, 7), torch.tensor([0, 3, -100, 6, 2])
    logs = F.log_softmax(logits, -1)[targets != -100]
    named = -logs.gather(1, targets[targets != -100][:, None]).sum()
    found = cross_entropy(logits, targets, 0.3)
    torch.testing.assert_close(found.sum, 0.7 * named - 0.3 * logs.mean(-1).sum())
    assert found.count == 4


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.decoder.stack.block.sublayers.attn={kind: attention, heads: 2}", "has one stream"),
        ("model.decoder.stack.block.sublayers.attn.furthest=8", "must exceed the 8 exact distances"),
        ("model.decoder.embed={kind: factorised, width: 64, positions: learned}", "enter as vectors"),
        ("model.encoder.stack.block.sublayers.attn={kind: n-gram, heads: 2}", "left to right alone"),
        ("model.decoder.stack.block.sublayers.attn.memory=2", "in a way of its own"),
        ("model.decoder.memory_tokens=4", "chooses among the keys"),
    ],
)
def test_what_the_streams_cannot_do_is_refused(override: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        build("prophetnet-large", override, tiny=True, device="meta")


def test_streams_remember_no_segment() -> None:
    block = {"sublayers": {"attn": {"kind": "n-gram", "heads": 2}}}
    for kind in ("n-gram", "blocks"):
        stack = {"kind": kind, "layers": 1, "block": block, "recurrence": {"length": 8}}
        config = find("graph", "decoder").Config.model_validate({"vocab": 32, "dim": 64, "stack": stack})
        with pytest.raises(Refused, match="remember nothing of the segment before"):
            construct(config)


def test_the_picture_is_that_of_the_text() -> None:
    found = sight.look(skeleton(load_preset("prophetnet-large", tiny=True)), 8, 8)
    causal = [view for view in found.masks if view.rule.startswith("causal")]
    assert len(causal) == 1
    assert torch.equal(causal[0].grid > 0, torch.ones(8, 8).tril() > 0)
    assert any("stream i of those that predict sees the text" in words for words in found.words)
