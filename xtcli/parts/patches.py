"""Images cut into patches, in the place of tokens, and images made of states.

    embed `patches`   x = dropout([class; norm(W n(patch) + b)] + positions)     (B, C, H, W) -> (B, N + 1, D)
    head `pixels`     each state becomes a square of pixels; loss |image - pixels| where a patch was masked

Dosovitskiy et al. 2020, arXiv:2010.11929; Xie et al. 2021 (SimMIM), arXiv:2111.09886. Patches stand row by row. What a
patch holds is laid out as (channel, row, column), which makes W the kernel of a convolution whose stride is its size,
or as (row, column, channel): the two are not the same weights. What is left of an image at its right and lower edge,
where the patch does not divide it, is not read, as a convolution does not read it.

Axes: C channels, H x W pixels, P = p_h p_w pixels of a patch, N patches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, Strict
from torch import Tensor, nn
from torch.nn import functional as F

from xtcli import registry
from xtcli.errors import refuse
from xtcli.parts import norms
from xtcli.parts.context import Ctx
from xtcli.parts.embed import AbsoluteSlot, Embedding, LearnedPlaces
from xtcli.parts.heads import Head, Hidden, Labels
from xtcli.parts.linear import Draw, Linear, widen
from xtcli.parts.norms import NormSlot, make_norm
from xtcli.parts.outputs import IGNORE, Term
from xtcli.parts.scope import Impossible, Scope
from xtcli.registry import field, part

Pixels = Annotated[int, Field(gt=0)]
Size = Pixels | Annotated[tuple[Pixels, Pixels], Strict(False)]
"""A side of a square, or height and width."""

PIXELS, MASKED, INTERPOLATE = "pixel_values", "bool_masked_pos", "interpolate_pos_encoding"


def sides(size: Any) -> tuple[int, int]:
    """Height and width."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


@part("embed", "patches")
class Patches(Embedding):
    """A projection of the patches of `pixel_values` (B, C, H, W), with a class vector in front and positions.

    `bool_masked_pos` (B, N), where there is a mask vector: patches that it stands for. `interpolate_pos_encoding`:
    images of other sizes are read with learned positions between the learned ones (bicubic).
    `image` and `patch` are (height, width), `grid` the patches of a column and of a row, `places` what x has of them.
    """

    tokens = None
    limit = None
    places: int

    class Config(registry.Config):
        """Patches of an image, projected to dim."""

        image: Size = field("height and width of the images in pixels, or one number for both", example=12, tiny=32)
        patch: Size = field("height and width of a patch in pixels, or one number for both", example=4, tiny=8)
        channels: int = field("numbers of a pixel", 3, gt=0)
        order: Literal["channel-row-column", "row-column-channel"] = field(
            "how the numbers of a patch are laid out", "channel-row-column"
        )
        bias: bool = field("adds a bias to the projection", True)
        before: NormSlot = field("norm of the numbers of a patch", norms.NONE)
        norm: NormSlot = field("norm of the projected patch", norms.NONE)
        class_vector: bool = field("a learned vector stands in front, at place 0", True)
        mask_vector: bool = field("a learned vector stands for patches that are masked", False)
        positions: AbsoluteSlot = field("absolute positions", LearnedPlaces.Config())
        dropout: float | None = field("dropout of the sum; null = model.dropout", None, ge=0, lt=1)

    def __init__(self, config: Config, scope: Scope, shares: bool = False) -> None:
        super().__init__()
        self.image, self.patch, self.channels = sides(config.image), sides(config.patch), config.channels
        self.grid = (self.image[0] // self.patch[0], self.image[1] // self.patch[1])
        if not all(self.grid):
            cause = f"{_size(self.patch)} pixels are more than the image's {_size(self.image)}"
            raise Impossible("patch", cause, "make patches smaller than the image")
        self.front = int(config.class_vector)
        self.places = self.front + self.grid[0] * self.grid[1]
        self.rows_first = config.order == "row-column-channel"
        self.reads = (PIXELS, INTERPOLATE, MASKED) if config.mask_vector else (PIXELS, INTERPOLATE)
        numbers = self.patch[0] * self.patch[1] * self.channels
        self.before = make_norm(scope, "before", config.before, dim=numbers)
        self.project = Linear(numbers, scope.dim, config.bias)
        self.norm = make_norm(scope, "norm", config.norm)
        self.class_vector = nn.Parameter(torch.empty(scope.dim)) if config.class_vector else None
        self.mask_vector = nn.Parameter(torch.empty(scope.dim)) if config.mask_vector else None
        self.positions = scope.make("positions", config.positions, context=self.places)
        self.dropout = nn.Dropout(scope.dropout if config.dropout is None else config.dropout)

    def draw(self, normal: Draw) -> None:
        """The class vector as small as positions are; the mask vector 0."""
        if self.class_vector is not None:
            normal(self.class_vector, 0.02)
        if self.mask_vector is not None:
            self.mask_vector.zero_()

    def size(
        self, ids: Tensor | None, vectors: Tensor | None, extras: Mapping[str, Tensor]
    ) -> tuple[int, int, torch.device]:
        """Rows and places of `pixel_values`; raises UserError for images of another size, ValueError without any."""
        pixels = extras.get(PIXELS)
        if pixels is None or ids is not None or vectors is not None:
            raise ValueError("this architecture reads pixel_values, neither input_ids nor inputs_embeds")
        if pixels.dim() != 4:
            raise ValueError(f"pixel_values has shape {tuple(pixels.shape)}, expected (rows, channels, height, width)")
        rows, channels, height, width = pixels.shape
        if channels != self.channels:
            raise refuse(f"the image has {channels} channels, the model reads {self.channels}", "convert the image")
        if extras.get(INTERPOLATE) is None or not bool(extras[INTERPOLATE]):
            if (height, width) != self.image:
                cause = f"the image is {_size((height, width))} pixels, the model reads {_size(self.image)}"
                raise refuse(cause, "resize the image, or pass interpolate_pos_encoding=True")
        elif height < self.patch[0] or width < self.patch[1]:
            raise refuse(f"the image is {_size((height, width))} pixels, a patch {_size(self.patch)}", "enlarge it")
        return rows, self.front + (height // self.patch[0]) * (width // self.patch[1]), pixels.device

    def blank(self, rows: int, length: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Black images, whatever `length` is."""
        return {PIXELS: torch.zeros(rows, self.channels, *self.image, dtype=dtype, device=device)}

    def cut(self, pixels: Tensor) -> Tensor:
        """Images (B, C, H, W) -> their patches (B, N, P C)."""
        (high, wide), (height, width) = self.patch, pixels.shape[2:]
        rows, columns = height // high, width // wide
        pixels = pixels[:, :, : rows * high, : columns * wide]
        # (B, C, rows, p_h, columns, p_w)
        pieces = pixels.unflatten(3, (columns, wide)).unflatten(2, (rows, high))
        order = (0, 2, 4, 3, 5, 1) if self.rows_first else (0, 2, 4, 1, 3, 5)
        laid: Tensor = pieces.permute(order).flatten(3).flatten(1, 2)
        return laid

    def forward(self, ids: Tensor | None, vectors: Tensor | None, segments: Tensor | None, ctx: Ctx) -> Tensor:
        """pixel_values (B, C, H, W) -> (B, T, D)."""
        if segments is not None:
            raise ValueError("token_type_ids were given, but this architecture has no segments")
        pixels = ctx.extras[PIXELS]
        x = self.norm(self.project(self.before(self.cut(pixels.to(self.project.weight.dtype)))))
        masked = ctx.extras.get(MASKED)
        if masked is not None and self.mask_vector is not None:
            x = torch.where(masked.flatten(1).bool()[..., None], self.mask_vector.to(x.dtype), x)
        if self.class_vector is not None:
            x = torch.cat((self.class_vector.to(x.dtype).expand(x.shape[0], 1, -1), x), dim=1)
        if tuple(pixels.shape[2:]) == self.image:
            x = self.positions(x, ctx.positions)
        else:
            x = x + self.between(pixels.shape[2] // self.patch[0], pixels.shape[3] // self.patch[1])
        return self.dropout(x)  # type: ignore[no-any-return]

    def between(self, rows: int, columns: int) -> Tensor:
        """Positions (1, T, D) of another grid, drawn from the learned ones."""
        table = getattr(self.positions, "table", None)
        if table is None:
            raise ValueError("images of other sizes are read with learned positions alone")
        learned = table.weight[self.positions.offset :]
        grid = learned[self.front :].t().unflatten(1, self.grid)[None]
        wide = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
        return torch.cat((learned[: self.front], wide[0].flatten(1).t()))[None]


@part("head", "pixels")
class PixelOutput(Head):
    """Images (B, C, H, W) under `reconstruction`, from the states of a square grid of patches.

    A state becomes side x side pixels of each channel. The loss is the mean absolute difference over the pixels of
    the patches that are supervised: targets (B, N), IGNORE leaves a patch out. What they are measured against are
    the model's own `pixel_values`.
    """

    label = MASKED
    unit = "absolute error"

    class Config(registry.Config):
        """Pixels for each patch."""

        side: int = field("height and width, in pixels, of what a state becomes", gt=0, example=4, tiny=8)
        channels: int = field("numbers of a pixel", 3, gt=0)
        front: int = field("states in front that stand for no patch", 1, ge=0)

    def __init__(self, config: Config, scope: Scope) -> None:
        super().__init__()
        self.side, self.channels, self.front = config.side, config.channels, config.front
        self.decoder = Linear(scope.dim, config.side**2 * config.channels, True, "head")

    def outputs(self, hidden: Hidden) -> dict[str, Tensor]:
        made = self.decoder(hidden.states[:, self.front :])
        grid = math.isqrt(made.shape[1])
        if grid**2 != made.shape[1]:
            raise ValueError(f"{made.shape[1]} patches are no square, and the head makes square images")
        # (B, rows, columns, C, side, side) -> (B, C, rows, side, columns, side)
        pieces = made.unflatten(2, (self.channels, self.side, self.side)).unflatten(1, (grid, grid))
        return {"reconstruction": pieces.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)}

    def loss(self, hidden: Hidden, targets: Tensor) -> Term:
        made, pixels = widen(self.outputs(hidden)["reconstruction"]), hidden.extras[PIXELS]
        if made.shape != pixels.shape:
            cause = f"an image of {_size(pixels.shape[2:])} pixels is answered by one of {_size(made.shape[2:])}"
            raise refuse(cause, "set side to the size of a patch, which must divide the image")
        grid = made.shape[-1] // self.side
        apart = (made - pixels).abs().mean(1).unflatten(2, (grid, self.side)).unflatten(1, (grid, self.side))
        wanted = targets.flatten(1) != IGNORE
        return Term((apart.mean((2, 4)).flatten(1) * wanted).sum(), wanted.sum())

    def targets(self, labels: Labels, causal: bool) -> Tensor | None:
        masked = labels.get(self.label)
        return None if masked is None else torch.where(masked.flatten(1).bool(), 0, IGNORE)


def _size(size: Any) -> str:
    return f"{size[0]} x {size[1]}"
