"""Masks, biases and rotations: the grids against brute force, the pictures as they are printed, the PNG as a file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from xtcli.config.preset import load_preset
from xtcli.errors import UserError
from xtcli.inspect import figure, grids, picture, sight
from xtcli.model import construct, skeleton
from xtcli.parts.positions import alibi_slopes
from xtcli.registry import Config, Slot, find

ATTN = "model.stack.block.sublayers.attn"

RULES: list[tuple[Any, Any]] = [
    ("causal", lambda q, k: k <= q),
    ("full", lambda q, k: True),
    ({"kind": "window", "left": 3, "right": 1}, lambda q, k: -3 <= k - q <= 1),
    ({"kind": "window", "left": 4, "right": 4, "dilation": 2}, lambda q, k: abs(k - q) <= 4 and (k - q) % 2 == 0),
    ({"kind": "all", "of": ["causal", {"kind": "window", "left": 2}]}, lambda q, k: 0 <= q - k <= 2),
]


@pytest.mark.parametrize(("rule", "allowed"), RULES, ids=[str(rule)[:40] for rule, _ in RULES])
@pytest.mark.parametrize(("length", "cells"), [(12, 12), (12, 4), (13, 5)])
@pytest.mark.parametrize("band", [1, 10**6])
def test_a_grid_is_the_share_seen_of_each_cell(
    rule: Any, allowed: Any, length: int, cells: int, band: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grids, "BAND", band)
    grid, seen = grids.mask_grid(Slot("mask").validate(rule), length, cells)
    every = [[bool(allowed(q, k)) for k in range(length)] for q in range(length)]
    for row in range(cells):
        for column in range(cells):
            members = [
                every[q][k]
                for q in range(length)
                for k in range(length)
                if q * cells // length == row and k * cells // length == column
            ]
            assert grid[row, column].item() == pytest.approx(sum(members) / len(members))
    assert seen == pytest.approx(sum(map(sum, every)) / length**2)


def views(name: str, *overrides: str, length: int = 8, cells: int = 8, weights: Any = None) -> sight.Views:
    return sight.look(skeleton(load_preset(name, overrides, tiny=True)), length, cells, weights)


LOOKS: list[tuple[str, tuple[str, ...], list[str]]] = [
    (
        "gpt2-small",
        (),
        ["stack causal attn of layers 0-1", "embed.positions: learned, 128 places"],
    ),
    (
        "t5-small",
        (),
        [
            "encoder.stack full attn of layers 0-1",
            "decoder.stack causal attn of layers 0-1",
            "encoder.stack t5 attn of layers 0-1 rows numbered",
            "decoder.stack t5 attn of layers 0-1 rows numbered",
            "decoder.stack: cross of layers 0-1: every real key of the encoder's memory",
        ],
    ),
    ("llama-7b", (), ["stack causal attn of layers 0-1", "stack rotary attn of layers 0-1 8"]),
    (
        "bert-base",
        ("model.stack.position={kind: shaw, distance: 3}",),
        [
            "stack full attn of layers 0-1",
            "stack: attn of layers 0-1: position shaw depends on the queries",
            "embed.positions: learned, 128 places",
        ],
    ),
]


@pytest.mark.parametrize(("name", "overrides", "wanted"), LOOKS, ids=[item[0] for item in LOOKS])
def test_every_distinct_mask_and_position_is_found_with_its_layers(
    name: str, overrides: tuple[str, ...], wanted: list[str]
) -> None:
    found = views(name, *overrides)
    said = [f"{view.stack} {view.rule} {view.users}" for view in found.masks]
    said += [f"{view.stack} {view.kind} {view.users} {view.learned}" for view in found.biases]
    said += [f"{view.stack} {view.kind} {view.users} {view.pairs}" for view in found.turns]
    assert said + list(found.words) == wanted


def test_what_reads_images_is_shown_over_their_places() -> None:
    views = sight.look(skeleton(load_preset("x-captioner")), 512, 32)
    assert [(view.stack, view.length) for view in views.masks] == [("encoder.stack", 64), ("decoder.stack", 512)]


def test_layers_of_a_pattern_are_told_apart() -> None:
    def block(mask: Any) -> dict[str, Any]:
        return {"sublayers": {"attn": {"kind": "attention", "heads": 2, "mask": mask}}}

    stack = {
        "layers": 4,
        "pattern": ["near", "far"],
        "blocks": {"near": block({"kind": "window", "left": 1}), "far": block("causal")},
    }
    config: Config = find("graph", "decoder").Config.model_validate({"vocab": 5, "dim": 4, "stack": stack})  # type: ignore[attr-defined]
    found = sight.look(construct(config), 4, 4)
    assert [(view.rule, view.users) for view in found.masks] == [
        ("window(left=1, right=0, dilation=1)", "attn of layers 0, 2"),
        ("causal", "attn of layers 1, 3"),
    ]


def test_a_bias_is_that_of_its_formula() -> None:
    (bias,) = views("gpt2-small", "model.stack.position=alibi", length=6, cells=6).biases
    slopes = torch.tensor(alibi_slopes(4))
    steps = torch.arange(6).float()
    assert bias.query == 5 and bias.learned == ""
    torch.testing.assert_close(bias.keys, slopes[:, None] * (steps - 5))
    torch.testing.assert_close(bias.grid, slopes[0] * (steps[None, :] - steps[:, None]))


def test_a_trained_bias_is_read_from_its_checkpoint() -> None:
    table = torch.randn(32, 4)
    asked: list[str] = []

    def weights(name: str) -> Tensor:
        asked.append(name)
        return table.bfloat16()

    found = views("t5-small", length=5, cells=5, weights=weights)
    assert asked == [f"{side}.stack.shared.biases.0.table.weight" for side in ("encoder", "decoder")]
    decoder = found.biases[1]
    # The query at 4 sees its keys at the distances 4, 3, 2, 1 and 0, each with a row of its own.
    torch.testing.assert_close(decoder.keys, table.bfloat16().float()[[4, 3, 2, 1, 0]].T)
    assert decoder.learned == "trained"


def test_a_rotation_is_that_of_its_formula() -> None:
    (turn,) = views("llama-7b", length=7, cells=7).turns
    frequencies = 10000.0 ** (-torch.arange(0, 16, 2).float() / 16)
    torch.testing.assert_close(turn.grid, torch.cos(frequencies[:, None] * torch.arange(7)), atol=1e-6, rtol=0)
    assert turn.shortest == pytest.approx(2 * math.pi)
    assert turn.longest == pytest.approx(2 * math.pi / frequencies[-1].item(), rel=1e-4)


CAUSAL = """\
stack: mask causal (attn of layers 0-1): 56.2% of 8 x 8 pairs seen, queries down, keys across
  \u2588\u2584
  \u2588\u2588\u2588\u2584
  \u2588\u2588\u2588\u2588\u2588\u2584
  \u2588\u2588\u2588\u2588\u2588\u2588\u2588\u2584

embed.positions: learned, 128 places"""

WINDOW = """\
stack: mask window(left=1, right=0, dilation=1) (attn of layers 0-1): 8.2% of 24 x 24 pairs seen, queries down, keys across
  #
  .#
   .#
    .#
     .#
      .#
       .#
        .#

stack: bias alibi (attn of layers 0-1): added to the scores, -5.75 to 0; heads down, 24 keys across, for the query at 23
  head 0  ..::**#
  head 1 ****####
  head 2 ########
  head 3 ########

embed.positions: learned, 128 places"""


def test_pictures_as_printed() -> None:
    assert "\n".join(picture.lines(views("gpt2-small"))) == CAUSAL
    window = views("gpt2-small", f"{ATTN}.mask={{kind: window, left: 1}}", "model.stack.position=alibi", length=24)
    assert "\n".join(picture.lines(window, blocks=False)) == WINDOW


def test_shades_go_from_the_smallest_to_the_largest() -> None:
    assert picture.shade_lines(torch.tensor([[0.0, 1, 2, 3, 4]]), ["x"], blocks=False) == ["x  .:*#"]
    assert picture.shade_lines(torch.full((1, 3), 7.0), blocks=False) == [""]


@pytest.mark.parametrize(("size", "cells"), [((80, 24), 36), ((200, 60), 64), ((20, 10), 8), ((30, 50), 26)])
def test_a_picture_fits_its_terminal(size: tuple[int, int], cells: int) -> None:
    assert picture.cells(*size) == cells


@pytest.mark.parametrize(("encoding", "able"), [("utf-8", True), ("cp437", True), ("ascii", False), (None, False)])
def test_blocks_are_drawn_only_where_the_output_has_them(encoding: str | None, able: bool) -> None:
    assert picture.can_draw(encoding) is able


def test_a_png_is_drawn_of_every_view(tmp_path: Path) -> None:
    drawn = figure.draw_views(views("t5-small", length=64, cells=32), "t5-small")
    assert len([axis for axis in drawn.axes if axis.images]) == 6
    figure.save(drawn, tmp_path / "t5.png")
    assert (tmp_path / "t5.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("x.pdf", "the file 'x.pdf' does not end in .png; write --png x.pdf.png"),
        ("no/x.png", "--png: there is no folder 'no'; make it first"),
    ],
)
def test_files_that_cannot_be_pictures_are_refused(file: str, message: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        figure.check(Path(file))
    assert str(refused.value) == message
