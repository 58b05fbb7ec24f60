"""Correlation of all pairs of pixels, computed once per pair of frames.

Shapes: `B` batch, `C` feature channels, `h w` 1/8 grid, `N` B * h * w, `S` columns of the volume, `L` levels,
`r` radius, `K` points of a window.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .correlation_windows_raft import Box, find_windows, join_levels, pool_features, read_windows, spread_windows


class DenseCorrelation:
    """Correlation of all pairs of pixels, at `2**l` pixels of frame 2 together on level l (paper section 3.2).

    It is computed in float32 at least, whatever autocast or the features' type say: half precision overflows here and
    cannot tell neighbouring coordinates apart.

    Args:
        fmap1: `(B, C, h, w)`, features of frame 1.
        fmap2: `(B, C, h, w)`, features of frame 2.
        num_levels: Levels of the pyramid.
        radius: Radius of the lookup's window, in pixels of each level.
    """

    def __init__(self, fmap1: Tensor, fmap2: Tensor, num_levels: int, radius: int):
        self.radius = radius
        dtype = torch.promote_types(fmap1.dtype, torch.float32)
        with torch.autocast(fmap1.device.type, enabled=False):
            # Scaled before the product: of features there are few, of products h * w times as many.
            rows = (fmap1.to(dtype) / math.sqrt(fmap1.shape[1])).flatten(2).transpose(1, 2)  # (B, h*w, C)
            levels = pool_features(fmap2.to(dtype), num_levels)
            self.boxes = [Box(0, 0, level.shape[3], level.shape[2]) for level in levels]
            columns = join_levels(levels)  # (B, C, S)
            self.gradient = SharedGradient()
            if torch.compiler.is_compiling():  # a compiler cannot follow the shared gradient, and saves on its own
                self.volume = (rows @ columns).flatten(0, 1)  # (N, S)
            else:
                self.volume = _AllPairs.apply(rows, columns, self.gradient)

    def lookup(self, centroids: Tensor) -> Tensor:
        """Sample every pyramid level in a square window around each centroid.

        Args:
            centroids: `(B, 2, h, w)`, where each pixel of frame 1 lands in frame 2, as (x, y) in grid pixels
                (image pixels / 8). May lie outside the grid, where correlation reads as 0. They get no gradient.

        Returns:
            `(B, L * K, h, w)`. Level, then x offset, then y offset: channel `l * K + i * (2 * r + 1) + j` reads
            `centroid / 2**l + (i - r, j - r)`. Published weights depend on x coming before y.
        """
        batch, _, height, width = centroids.shape
        with torch.autocast(centroids.device.type, enabled=False):
            points = centroids.to(self.volume.dtype).permute(0, 2, 3, 1).reshape(-1, 2)
            if self.volume.requires_grad and not torch.compiler.is_compiling():
                windows = _Read.apply(self.volume, points, self.boxes, self.radius, self.gradient)
            else:
                windows = _read(self.volume, points, self.boxes, self.radius)
        return windows.reshape(batch, height, width, -1).permute(0, 3, 1, 2)


class SharedGradient:
    """The gradient of a volume, to which all lookups of a backward pass add.

    Left alone, autograd makes a gradient as large as the volume for each lookup, and adds it to the others.
    """

    def __init__(self) -> None:
        self.sum: Tensor | None = None

    def get(self, like: Tensor, shape: Sequence[int]) -> Tensor:
        """The sum so far, to add to."""
        if self.sum is None:
            self.sum = like.new_zeros(shape)
        return self.sum

    def take(self) -> Tensor | None:
        """The sum, once all have added to it; the next backward pass begins anew."""
        taken, self.sum = self.sum, None
        return taken


def _read(volume: Tensor, points: Tensor, boxes: list[Box], radius: int) -> Tensor:
    return read_windows(volume, *find_windows(points, boxes, radius, volume.shape[1] - 1))


class _AllPairs(torch.autograd.Function):
    """Rows `(B, h*w, C)` times columns `(B, C, S)`; the gradient of the volume `(N, S)` is the shared one."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Tensor, gradient: SharedGradient) -> Tensor:
        ctx.save_for_backward(rows, columns)
        ctx.set_materialize_grads(False)  # the lookups hand on none: theirs are in the shared gradient
        ctx.gradient = gradient
        return (rows @ columns).flatten(0, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, columns = ctx.saved_tensors
        grad = ctx.gradient.take()
        if grad is None:
            return None, None, None
        grad = grad.unflatten(0, rows.shape[:2])
        return grad @ columns.transpose(1, 2), rows.transpose(1, 2) @ grad, None


class _Read(torch.autograd.Function):
    """`_read`, whose backward pass adds to the shared gradient, and finds the windows again rather than keep them."""

    @staticmethod
    def forward(
        ctx: Any, volume: Tensor, points: Tensor, boxes: list[Box], radius: int, gradient: SharedGradient
    ) -> Tensor:
        ctx.save_for_backward(points)  # not the volume, which nobody needs once the flow is there
        ctx.boxes, ctx.radius, ctx.gradient, ctx.shape = boxes, radius, gradient, volume.shape
        return _read(volume, points, boxes, radius)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        # Nothing is returned that `once_differentiable` could make fail, and second derivatives would be wrong.
        if torch.is_grad_enabled():
            raise RuntimeError("the correlation has no second derivatives: call backward without create_graph")
        (points,) = ctx.saved_tensors
        found = find_windows(points, ctx.boxes, ctx.radius, ctx.shape[1] - 1)
        spread_windows(grad, *found, ctx.gradient.get(grad, ctx.shape))
        return None, None, None, None, None  # autograd runs `_AllPairs.backward` when every lookup has been here
