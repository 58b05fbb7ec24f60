"""Correlations computed when they are looked up, in memory that grows with the pixels, not with their square."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .correlation_windows_raft import Box, find_windows, join_levels, pool_features, read_windows, spread_windows

TILE = 16  # grid pixels: neighbours that look up together; larger tiles mean fewer and larger products, of more pixels


class OnDemandCorrelation:
    """The same, where the volume of all pairs would not fit: each lookup computes what it reads.

    Neighbours look at windows that overlap. So a tile of frame 1 is correlated with the smallest rectangle of frame 2
    that holds the windows of its pixels, on each level: a product of matrices for each tile, of which little is
    wasted where the flow varies little, and which is the volume's part of that tile at the worst.

    The rectangles depend on the flow: every lookup waits for the device once. Arguments are those of
    `DenseCorrelation`, and so are values and gradients, to rounding.
    """

    def __init__(self, fmap1: Tensor, fmap2: Tensor, num_levels: int, radius: int):
        self.radius = radius
        dtype = torch.promote_types(fmap1.dtype, torch.float32)
        with torch.autocast(fmap1.device.type, enabled=False):
            self.features1 = fmap1.to(dtype) / math.sqrt(fmap1.shape[1])
            self.levels = pool_features(fmap2.to(dtype), num_levels)

    def lookup(self, centroids: Tensor) -> Tensor:
        """As `DenseCorrelation.lookup`."""
        with torch.autocast(centroids.device.type, enabled=False):
            return _LookUpTiles.apply(centroids.to(self.features1.dtype), self.radius, self.features1, *self.levels)


@dataclass(frozen=True)
class Tile:
    """Pixels of frame 1 that look up together, and what they may read."""

    sample: int
    rows: slice
    columns: slice
    boxes: list[Box]

    def crops(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Each box's part of its level: views `(1, C, height, width)` of `(B, C, ., .)`."""
        sample = slice(self.sample, self.sample + 1)
        return [
            level[sample, :, box.top : box.top + box.height, box.left : box.left + box.width]
            for level, box in zip(levels, self.boxes, strict=True)
        ]

    def of(self, maps: Tensor) -> Tensor:
        """The tile's part of `(B, C, h, w)`, as a view `(C, ., .)`."""
        return maps[self.sample, :, self.rows, self.columns]

    def find_windows(self, centroids: Tensor, radius: int, last: int) -> tuple[Tensor, Tensor]:
        return find_windows(self.of(centroids).flatten(1).T, self.boxes, radius, last)


def make_tiles(centroids: Tensor, levels: Sequence[Tensor], radius: int) -> list[Tile]:
    """Cut frame 1 into tiles, and find for each which rectangle of every level holds its windows."""
    batch, _, height, width = centroids.shape
    # Not a number could be anywhere: its tile reads everything, so that what is beside it is right.
    low = -F.max_pool2d(-centroids.nan_to_num(nan=-math.inf), TILE, ceil_mode=True)
    high = F.max_pool2d(centroids.nan_to_num(nan=math.inf), TILE, ceil_mode=True)
    bounds = []
    for level, features in enumerate(levels):
        size = low.new_tensor([features.shape[3], features.shape[2]])[:, None, None]
        first = ((low / 2**level).floor() - radius).clamp(min=0).minimum(size - 1)
        end = ((high / 2**level).floor() + radius + 2).minimum(size).maximum(first + 1)
        bounds.append(torch.cat([first, end - first], dim=1))
    # (B, rows, columns, L, 4)
    rectangles = torch.stack(bounds, dim=1).permute(0, 3, 4, 1, 2).long().tolist()
    return [
        Tile(b, slice(TILE * i, TILE * (i + 1)), slice(TILE * j, TILE * (j + 1)), [Box(*box) for box in boxes])
        for b, rows in enumerate(rectangles)
        for i, row in enumerate(rows)
        for j, boxes in enumerate(row)
    ]


class _LookUpTiles(torch.autograd.Function):
    """A lookup tile by tile; the backward pass computes each tile's volume again rather than keep it."""

    @staticmethod
    def forward(ctx: Any, centroids: Tensor, radius: int, features1: Tensor, *levels: Tensor) -> Tensor:
        ctx.save_for_backward(centroids, features1, *levels)
        ctx.radius = radius
        batch, _, height, width = centroids.shape
        side = 2 * radius + 1
        windows = features1.new_empty(batch, height, width, len(levels) * side**2)
        for tile in make_tiles(centroids, levels, radius):
            columns = join_levels(tile.crops(levels))[0]
            volume = tile.of(features1).flatten(1).T @ columns
            found = tile.find_windows(centroids, radius, columns.shape[1] - 1)
            part = windows[tile.sample, tile.rows, tile.columns]
            part.copy_(read_windows(volume, *found).reshape(part.shape))
        return windows.permute(0, 3, 1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        centroids, features1, *levels = ctx.saved_tensors
        grad_features1 = torch.empty_like(features1)
        grad_levels = [torch.zeros_like(level) for level in levels]
        for tile in make_tiles(centroids, levels, ctx.radius):
            columns = join_levels(tile.crops(levels))[0]
            features = tile.of(features1)
            found = tile.find_windows(centroids, ctx.radius, columns.shape[1] - 1)
            grad_volume = columns.new_zeros(features[0].numel(), columns.shape[1])
            spread_windows(tile.of(grad).flatten(1).T, *found, grad_volume)
            tile.of(grad_features1).copy_((columns @ grad_volume.T).reshape(features.shape))
            grad_columns, begin = features.flatten(1) @ grad_volume, 0
            for crop in tile.crops(grad_levels):
                size = crop[0, 0].numel()
                crop += grad_columns[:, begin : begin + size].reshape(crop.shape)
                begin += size
        return None, None, grad_features1, *grad_levels
