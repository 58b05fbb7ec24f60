"""Visual similarity of the pixels of two frames (paper section 3.2), and the grid geometry of flow.

A volume holds the correlation of pixels of frame 1 with pixels of frame 2: one row for each pixel of frame 1, one
column for each pixel of frame 2 on every pyramid level. Two classes compute it with one interface: `DenseCorrelation`
computes all of it once per pair, `OnDemandCorrelation` computes what each lookup reads. For the coarser levels, the
paper averages correlations over frame 2; correlating with averaged features is the same, in one matrix product.

Shapes: `B` batch, `C` feature channels, `h w` 1/8 grid, `N` rows and `S` columns of a volume, `L` levels, `r` radius,
`W` 2 * r + 2, `K` points of a window, (2 * r + 1) ** 2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging

from .memory_raft import device_memory

logger = logging.get_logger(__name__)

ALIGNMENT = 16  # columns: rows of a volume begin where vector instructions load fastest
TILE = 16  # grid pixels: side of the tiles that look up together; larger ones mean fewer products, of more columns


# ---- Grid geometry ----


def pixel_grid(batch: int, height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make the coordinates of every grid point, `(batch, 2, height, width)` as (x, y)."""
    y, x = torch.meshgrid(
        torch.arange(height, dtype=dtype, device=device),
        torch.arange(width, dtype=dtype, device=device),
        indexing="ij",
    )
    return torch.stack([x, y]).expand(batch, 2, height, width)


def warp(maps: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """Warp maps of frame 2 to frame 1: sample them bilinearly where flow moves each pixel of frame 1.

    Args:
        maps: `(B, C, H, W)` floating point, of frame 2.
        flow: `(B, 2, H, W)`, from frame 1 to frame 2, in pixels.

    Returns:
        The warped maps `(B, C, H, W)`; and `(B, H, W)` bool, False where a pixel leaves the frame by more than half a
        pixel. Outside of the frame, the value at its edge is sampled.
    """
    batch, _, height, width = maps.shape
    target = pixel_grid(batch, height, width, flow.dtype, flow.device) + flow
    size = target.new_tensor([width, height]).reshape(1, 2, 1, 1)
    inside = ((target >= -0.5) & (target <= size - 0.5)).all(1)
    # MPS has no padding_mode="border", so the edge is repeated first, and nothing beyond that is sampled. NaN is not
    # inside, and must not reach the sampling.
    maps = F.pad(maps, (1, 1, 1, 1), mode="replicate")
    target = target.nan_to_num(0.0).clamp(min=target.new_zeros(()), max=size - 1) + 1
    grid = ((2 * target + 1) / (size + 2) - 1).to(maps.dtype)  # -1 and 1 are the outer edges of the padded frame
    warped = F.grid_sample(maps, grid.permute(0, 2, 3, 1), mode="bilinear", padding_mode="zeros", align_corners=False)
    return warped, inside


# ---- The choice between the two implementations ----


def make_correlation(
    kind: str, fmap1: Tensor, fmap2: Tensor, num_levels: int, radius: int
) -> "DenseCorrelation | OnDemandCorrelation":
    """Make the correlation of two frames.

    Args:
        kind: `"dense"`, `"on_demand"`, or `"auto"`: dense while its volume, and the gradient of it if there is one,
            takes no more than half of the free memory.
        fmap1, fmap2, num_levels, radius: The arguments of `DenseCorrelation`.

    Raises:
        ValueError: `kind` is none of these.
    """
    if kind == "auto":
        kind = choose_implementation(fmap1, fmap2, num_levels)
    if kind not in IMPLEMENTATIONS:
        raise ValueError(f"correlation must be auto or one of {', '.join(IMPLEMENTATIONS)}; got {kind!r}")
    return IMPLEMENTATIONS[kind](fmap1, fmap2, num_levels, radius)


def choose_implementation(fmap1: Tensor, fmap2: Tensor, num_levels: int) -> str:
    """Choose `"dense"` or `"on_demand"` by the memory that the volume of all pairs takes."""
    if torch.compiler.is_compiling():  # the memory that is free now must not be compiled into a graph
        return "dense"
    batch, _, height, width = fmap1.shape
    trains = torch.is_grad_enabled() and (fmap1.requires_grad or fmap2.requires_grad)
    needed = dense_bytes(fmap1, num_levels, trains)
    # Training looks at the total memory, so that a resumed run computes as before, whatever else fills the memory.
    free, total = device_memory(fmap1.device)
    limit = total / 4 if trains else free / 2
    kind = "dense" if needed <= limit else "on_demand"
    logger.debug(
        "correlation of %d x %d x %d grid pixels: %s, as the volume of all pairs takes %.2f GB of at most %.2f GB",
        batch, height, width, kind, needed / 1e9, limit / 1e9,
    )  # fmt: skip
    return kind


def dense_bytes(fmap1: Tensor, num_levels: int, trains: bool) -> int:
    """Bytes of the volume of all pairs of features `(B, C, h, w)`, and of its gradient if there is one."""
    batch, _, height, width = fmap1.shape
    columns = sum((height >> level) * (width >> level) for level in range(num_levels))
    return batch * height * width * columns * max(fmap1.element_size(), 4) * (2 if trains else 1)


# ---- The pyramid of frame 2, and windows in it ----


def pool_features(fmap: Tensor, num_levels: int) -> list[Tensor]:
    """Average features `(B, C, h, w)` over 2**l x 2**l pixels: level l is `(B, C, h // 2**l, w // 2**l)`."""
    levels = [fmap]
    for _ in range(num_levels - 1):
        levels.append(F.avg_pool2d(levels[-1], kernel_size=2, stride=2))
    return levels


def whole_levels(height: int, width: int, num_levels: int, device: torch.device) -> Tensor:
    """Make the rectangles (left, top, width, height) of whole levels `(L, 4)`, without waiting for the device."""
    scales = 2 ** torch.arange(num_levels, device=device)
    sides = [torch.full_like(scales, side).div(scales, rounding_mode="floor") for side in (width, height)]
    return torch.stack([torch.zeros_like(scales), torch.zeros_like(scales), *sides], dim=1)


def flatten_pyramid(levels: Sequence[Tensor]) -> Tensor:
    """Concatenate the pixels of all levels, each `(B, C, height, width)`, and zeros as columns `(B, C, S)`.

    At least the last column is zero. `window_indices` makes everything outside of frame 2 read that one.
    """
    columns = torch.cat([level.flatten(2) for level in levels], dim=2)
    return F.pad(columns, (0, ALIGNMENT - columns.shape[2] % ALIGNMENT))


class ColumnLayout(NamedTuple):
    """What `window_indices` needs to know of the columns of a volume.

    Everything is for all levels at once, x and y too: on a GPU, launching an operation takes longer than any of them.

    Attributes:
        scales: `(L, 1)`, pixels of level 0 in a pixel of each level.
        offsets: `(L, 2, W)`, the pixels of a patch, (x, y), from the one that holds the centroid, in the rectangles.
        sizes: `(L, 2, 1)`, width and height of the rectangles.
        strides: `(L, 2, 1)`, how many columns lie between neighboring pixels.
        starts: `(L, 2, 1)`, the first column of each level, under y.
    """

    scales: Tensor
    offsets: Tensor
    sizes: Tensor
    strides: Tensor
    starts: Tensor


def column_layout(boxes: Tensor, radius: int) -> ColumnLayout:
    """Lay out the columns of a volume.

    Args:
        boxes: `(L, 4)` int64: for each level, the rectangle (left, top, width, height) that the columns hold, one
            level after the other, in pixels of that level.
        radius: Radius of the windows, in pixels of each level.
    """
    corners, sizes = boxes[..., None].split(2, dim=1)  # (L, 2, 1) each
    widths, areas = sizes[:, :1], sizes.prod(dim=1, keepdim=True)
    return ColumnLayout(
        scales=2 ** torch.arange(len(boxes), device=boxes.device)[:, None],
        offsets=torch.arange(-radius, radius + 2, device=boxes.device) - corners,
        sizes=sizes,
        strides=torch.cat([torch.ones_like(widths), widths], dim=1),
        starts=torch.cat([torch.zeros_like(areas), areas.cumsum(dim=0) - areas], dim=1),
    )


def window_indices(centroids: Tensor, layout: ColumnLayout, zero_column: int) -> tuple[Tensor, Tensor]:
    """Compute which columns of a volume the windows around centroids consist of (paper section 3.2).

    All points of a window have the same distance to the pixels around them. So a window of (2 r + 1)**2 points is read
    from a patch of W**2 = (2 r + 2)**2 pixels, interpolated by two fractions.

    Args:
        centroids: `(N, 2)`, (x, y) in pixels of level 0.
        layout: Of the volume's columns.
        zero_column: Index of the last column, which holds zeros.

    Returns:
        Indices of columns `(N, L, W, W)`, x before y; and fractions `(N, L, 2, 1, 1)` in [0, 1], (x, y), by which the
        points of a window lie beyond the pixels of the patch.
    """
    centers = centroids[:, None] / layout.scales  # (N, L, 2)
    corners = centers.floor()
    pixels = corners.long()[..., None] + layout.offsets  # (N, L, 2, W)
    inside = (pixels >= 0) & (pixels < layout.sizes)
    # The sum of both is beyond the last column where either x or y is outside.
    x, y = torch.where(inside, pixels * layout.strides + layout.starts, zero_column).unbind(2)
    columns = x[..., :, None] + y[..., None, :]
    return columns.clamp_(max=zero_column), (centers - corners)[..., None, None]


def gather_windows(volume: Tensor, columns: Tensor, fractions: Tensor) -> Tensor:
    """Read a volume `(N, S)` at the `window_indices`, interpolating bilinearly: `(N, L * K)`."""
    patches = volume.gather(1, columns.flatten(1)).reshape(columns.shape)
    patches = torch.lerp(patches[..., :-1], patches[..., 1:], fractions[:, :, 1])
    patches = torch.lerp(patches[..., :-1, :], patches[..., 1:, :], fractions[:, :, 0])
    return patches.flatten(1)


def scatter_windows(grad: Tensor, columns: Tensor, fractions: Tensor, grad_volume: Tensor) -> None:
    """Backward pass of `gather_windows`: given `grad` `(N, L * K)`, add to `grad_volume` `(N, S)` in place."""
    side = columns.shape[-1] - 1
    grad = grad.reshape(*columns.shape[:2], side, side)
    fraction_x, fraction_y = fractions[:, :, 0], fractions[:, :, 1]
    grad = F.pad(grad * (1 - fraction_x), (0, 0, 0, 1)) + F.pad(grad * fraction_x, (0, 0, 1, 0))
    grad = F.pad(grad * (1 - fraction_y), (0, 1)) + F.pad(grad * fraction_y, (1, 0))
    grad_volume.scatter_add_(1, columns.flatten(1), grad.flatten(1))


# ---- Dense: all pairs, once per pair of frames ----


class DenseCorrelation:
    """Correlation of all pairs of pixels, with 2**l x 2**l pixels of frame 2 averaged on level l (paper section 3.2).

    It is computed in float32 at least, under autocast and with half-precision features too: half precision overflows
    here, and cannot represent the coordinates of neighboring pixels of a wide image.

    Args:
        fmap1: `(B, C, h, w)`, features of frame 1.
        fmap2: `(B, C, h, w)`, features of frame 2.
        num_levels: Levels of the pyramid.
        radius: Radius of the lookup's window, in pixels of each level.
    """

    def __init__(self, fmap1: Tensor, fmap2: Tensor, num_levels: int, radius: int):
        dtype = torch.promote_types(fmap1.dtype, torch.float32)
        with torch.autocast(fmap1.device.type, enabled=False):
            # Equation 1, divided by sqrt(C) as in princeton-vl/RAFT: the products of all pairs. Features are scaled
            # rather than products, of which there are h * w times as many.
            rows = (fmap1.to(dtype) / math.sqrt(fmap1.shape[1])).flatten(2).transpose(1, 2)  # (B, h*w, C)
            levels = pool_features(fmap2.to(dtype), num_levels)
            boxes = whole_levels(fmap2.shape[2], fmap2.shape[3], num_levels, fmap2.device)
            self.layout = column_layout(boxes, radius)
            columns = flatten_pyramid(levels)  # (B, C, S)
            self.gradient = SharedGradient()
            if torch.compiler.is_compiling():  # a compiler cannot follow the shared gradient, and saves memory itself
                self.volume = (rows @ columns).flatten(0, 1)  # (N, S)
            else:
                self.volume = _AllPairs.apply(rows, columns, self.gradient)

    def lookup(self, centroids: Tensor) -> Tensor:
        """Sample every pyramid level in a square window around each centroid (equation 2).

        The paper bounds the L1 norm of the offsets. princeton-vl/RAFT and published weights read the whole square.

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
                windows = _LookUp.apply(self.volume, points, self.layout, self.gradient)
            else:
                windows = _look_up(self.volume, points, self.layout)
        return windows.reshape(batch, height, width, -1).permute(0, 3, 1, 2)


def _look_up(volume: Tensor, points: Tensor, layout: ColumnLayout) -> Tensor:
    return gather_windows(volume, *window_indices(points, layout, volume.shape[1] - 1))


# ---- On demand: what a lookup reads ----


class OnDemandCorrelation:
    """Correlation in memory that grows with the pixels, not with their square: each lookup computes what it reads.

    The windows of neighboring pixels overlap. So each tile of frame 1 is correlated with the smallest rectangle of
    frame 2 that holds the windows of its pixels, on each level. This is one matrix product per tile. Little of it is
    wasted where the flow varies little, and at worst it is the tile's part of the dense volume.

    The sizes of the rectangles depend on the flow, so every lookup waits for the device once. Arguments, values and
    gradients are those of `DenseCorrelation`, to rounding.
    """

    def __init__(self, fmap1: Tensor, fmap2: Tensor, num_levels: int, radius: int):
        self.radius = radius
        dtype = torch.promote_types(fmap1.dtype, torch.float32)
        with torch.autocast(fmap1.device.type, enabled=False):
            self.features1 = fmap1.to(dtype) / math.sqrt(fmap1.shape[1])
            self.levels = pool_features(fmap2.to(dtype), num_levels)

    def lookup(self, centroids: Tensor) -> Tensor:
        """Sample as `DenseCorrelation.lookup` does: `(B, 2, h, w)` to `(B, L * K, h, w)`."""
        with torch.autocast(centroids.device.type, enabled=False):
            return _LookUpTiles.apply(centroids.to(self.features1.dtype), self.radius, self.features1, *self.levels)


@dataclass(frozen=True)
class Tile:
    """Pixels of frame 1 that look up together, and for each level the rectangle of frame 2 that they read."""

    sample: int
    rows: slice
    columns: slice
    boxes: Tensor  # (L, 4), as for `column_layout`
    boxes_on_host: list[list[int]]

    def crop(self, maps: Tensor) -> Tensor:
        """Crop maps of frame 1 `(B, C, h, w)` to the tile: a view `(C, ., .)`."""
        return maps[self.sample, :, self.rows, self.columns]

    def crop_levels(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Crop every level of frame 2 `(B, C, ., .)` to its rectangle: views `(1, C, height, width)`."""
        sample = slice(self.sample, self.sample + 1)
        return [
            level[sample, :, top : top + height, left : left + width]
            for level, (left, top, width, height) in zip(levels, self.boxes_on_host, strict=True)
        ]

    def window_indices(self, centroids: Tensor, radius: int, zero_column: int) -> tuple[Tensor, Tensor]:
        """Compute `window_indices` of the tile's part of `centroids` `(B, 2, h, w)`, in its rectangles."""
        return window_indices(self.crop(centroids).flatten(1).T, column_layout(self.boxes, radius), zero_column)


def make_tiles(centroids: Tensor, levels: Sequence[Tensor], radius: int) -> list[Tile]:
    """Cut frame 1 into tiles, each with the rectangle of every level that holds the windows of its pixels."""
    batch, _, height, width = centroids.shape
    # NaN could be anywhere: its tile reads every pixel of frame 2, so that the pixels beside it are right.
    low = -F.max_pool2d(-centroids.nan_to_num(nan=-math.inf), TILE, ceil_mode=True)
    high = F.max_pool2d(centroids.nan_to_num(nan=math.inf), TILE, ceil_mode=True)
    bounds = []
    for level, features in enumerate(levels):
        size = low.new_tensor([features.shape[3], features.shape[2]])[:, None, None]
        first = ((low / 2**level).floor() - radius).clamp(min=0).minimum(size - 1)
        end = ((high / 2**level).floor() + radius + 2).minimum(size).maximum(first + 1)
        bounds.append(torch.cat([first, end - first], dim=1))
    # (B, rows, columns, L, 4)
    boxes = torch.stack(bounds, dim=1).permute(0, 3, 4, 1, 2).long()
    return [
        Tile(b, slice(TILE * i, TILE * (i + 1)), slice(TILE * j, TILE * (j + 1)), boxes[b, i, j], on_host)
        for b, rows in enumerate(boxes.tolist())
        for i, row in enumerate(rows)
        for j, on_host in enumerate(row)
    ]


class _LookUpTiles(torch.autograd.Function):
    """A lookup tile by tile, whose backward pass recomputes each tile's volume instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, centroids: Tensor, radius: int, features1: Tensor, *levels: Tensor) -> Tensor:
        ctx.save_for_backward(centroids, features1, *levels)
        ctx.radius = radius
        batch, _, height, width = centroids.shape
        side = 2 * radius + 1
        windows = features1.new_empty(batch, height, width, len(levels) * side**2)
        for tile in make_tiles(centroids, levels, radius):
            columns = flatten_pyramid(tile.crop_levels(levels))[0]
            volume = tile.crop(features1).flatten(1).T @ columns
            indices = tile.window_indices(centroids, radius, columns.shape[1] - 1)
            part = windows[tile.sample, tile.rows, tile.columns]
            part.copy_(gather_windows(volume, *indices).reshape(part.shape))
        return windows.permute(0, 3, 1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        centroids, features1, *levels = ctx.saved_tensors
        grad_features1 = torch.empty_like(features1)
        grad_levels = [torch.zeros_like(level) for level in levels]
        for tile in make_tiles(centroids, levels, ctx.radius):
            columns = flatten_pyramid(tile.crop_levels(levels))[0]
            features = tile.crop(features1)
            indices = tile.window_indices(centroids, ctx.radius, columns.shape[1] - 1)
            grad_volume = columns.new_zeros(features[0].numel(), columns.shape[1])
            scatter_windows(tile.crop(grad).flatten(1).T, *indices, grad_volume)
            tile.crop(grad_features1).copy_((columns @ grad_volume.T).reshape(features.shape))
            grad_columns, begin = features.flatten(1) @ grad_volume, 0
            for crop in tile.crop_levels(grad_levels):
                size = crop[0, 0].numel()
                crop += grad_columns[:, begin : begin + size].reshape(crop.shape)
                begin += size
        return None, None, grad_features1, *grad_levels


IMPLEMENTATIONS: dict[str, type[DenseCorrelation | OnDemandCorrelation]] = {
    "dense": DenseCorrelation,
    "on_demand": OnDemandCorrelation,
}


# ---- The gradient of the dense volume ----


class SharedGradient:
    """The gradient of a volume, to which all lookups of a backward pass add.

    Autograd itself would make a gradient as large as the volume for each lookup, and add them up.
    """

    def __init__(self) -> None:
        self.sum: Tensor | None = None

    def get(self, like: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the sum so far, to be added to in place; it begins as zeros of `shape` with the type of `like`."""
        if self.sum is None:
            self.sum = like.new_zeros(shape)
        return self.sum

    def take(self) -> Tensor | None:
        """Return the sum after all lookups have added to it, and reset it for the next backward pass."""
        taken, self.sum = self.sum, None
        return taken


class _AllPairs(torch.autograd.Function):
    """Rows `(B, h*w, C)` times columns `(B, C, S)`; the gradient of the volume `(N, S)` is the shared one."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Tensor, gradient: SharedGradient) -> Tensor:
        ctx.save_for_backward(rows, columns)
        ctx.set_materialize_grads(False)  # lookups return no gradient of the volume: it is in the shared one
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


class _LookUp(torch.autograd.Function):
    """`_look_up`, whose backward pass adds to the shared gradient and recomputes the indices rather than keep them."""

    @staticmethod
    def forward(ctx: Any, volume: Tensor, points: Tensor, layout: ColumnLayout, gradient: SharedGradient) -> Tensor:
        ctx.save_for_backward(points)  # not the volume, of which the backward pass needs the shape only
        ctx.layout, ctx.gradient, ctx.shape = layout, gradient, volume.shape
        return _look_up(volume, points, layout)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        # `once_differentiable` has no effect where no gradient is returned, and second derivatives would be wrong.
        if torch.is_grad_enabled():
            raise RuntimeError("the correlation has no second derivatives: call backward without create_graph")
        (points,) = ctx.saved_tensors
        indices = window_indices(points, ctx.layout, ctx.shape[1] - 1)
        scatter_windows(grad, *indices, ctx.gradient.get(grad, ctx.shape))
        return None, None, None, None  # autograd calls `_AllPairs.backward` after the backward of every lookup
