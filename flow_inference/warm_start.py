"""Warm start: the flow of a pair moved along itself is the initial flow of the next pair (paper section 4.2).

Shapes: `B` batch, `C` channels, `h w` grid, `N` pixels that stay in the frame.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling_raft.correlation_raft import pixel_grid

REACH = 2  # pixels: a grid point that is closer than this to a target is among the 4 x 4 around that target
CHUNK = 2**24  # distances in memory at a time
NO_TARGET = 0x7F800000 << 32  # key of a grid point without a target nearby: an infinite distance


def forward_interpolate(flow: Tensor, values: Tensor | None = None) -> Tensor:
    """Move values along the flow: motion is expected to continue, so its flow is found again where it leads.

    Every grid point takes the value of the pixel whose target is nearest to it, as in princeton-vl/RAFT
    (core/utils/utils.py, `forward_interpolate`). Pixels that leave the frame do not count.

    Args:
        flow: `(B, 2, h, w)`, in pixels of its own grid, any device.
        values: `(B, C, h, w)`, what is moved; None: the flow itself.

    Returns:
        `(B, C, h, w)`, in the type of `values`; 0 where every pixel leaves the frame.
    """
    values = flow if values is None else values
    return torch.stack([_interpolate_one(*pair) for pair in zip(flow, values, strict=True)])


def shrink_flow(flow: Tensor, length: float) -> Tensor:
    """Shorten every vector by `length`; shorter vectors become zero.

    Args:
        flow: `(B, 2, h, w)`, pixels of its own grid.
        length: At least 0, in the same pixels.

    Returns:
        `(B, 2, h, w)`.
    """
    lengths = torch.linalg.vector_norm(flow, dim=1, keepdim=True)
    tiny = torch.finfo(lengths.dtype).tiny  # a vector of length 0 stays one
    return flow * (1 - length / lengths.clamp(min=max(length, tiny)))


def _interpolate_one(flow: Tensor, values: Tensor) -> Tensor:
    _, height, width = flow.shape
    grid = pixel_grid(1, height, width, torch.float32, flow.device)[0]
    targets = grid + flow.float()
    x, y = targets
    inside = (x > 0) & (x < width) & (y > 0) & (y < height)  # as in the original, an open interval
    sources = inside.flatten().nonzero().flatten()
    if len(sources) == 0:
        return torch.zeros_like(values)
    targets = targets.flatten(1)[:, sources]  # (2, N)
    keys = _nearest_within_reach(targets, height, width)
    squared_distance = (keys >> 32).to(torch.int32).view(torch.float32)
    nearest = keys & 0xFFFFFFFF
    far = (squared_distance > REACH**2).nonzero().flatten()
    if len(far) > 0:
        candidates = _near_gaps(targets, squared_distance.reshape(height, width)).nonzero().flatten()
        found = _nearest_of_all(grid.flatten(1)[:, far], targets[:, candidates])
        nearest[far] = candidates[found]
    return values.flatten(1)[:, sources[nearest]].reshape(values.shape)


def _nearest_within_reach(targets: Tensor, height: int, width: int) -> Tensor:
    """Find for each grid point the nearest of the targets in the 4 x 4 pixels around it.

    Args:
        targets: `(2, N)`, (x, y).
        height: h of the grid.
        width: w of the grid.

    Returns:
        `(h * w,)` keys, int64: the bits of the squared distance, then the index of the target. Keys have the order of
        the distances, so that one integer minimum finds both.
    """
    steps = torch.arange(-1, 3, device=targets.device)
    around_y, around_x = torch.meshgrid(steps, steps, indexing="ij")
    corner_x, corner_y = targets.floor().long()
    point_x, point_y = corner_x + around_x.reshape(-1, 1), corner_y + around_y.reshape(-1, 1)  # (16, N)
    squared_distance = (point_x - targets[0]) ** 2 + (point_y - targets[1]) ** 2
    indices = torch.arange(targets.shape[1], device=targets.device)
    keys = (squared_distance.view(torch.int32).long() << 32) | indices
    on_grid = (point_x >= 0) & (point_x < width) & (point_y >= 0) & (point_y < height)
    points = (point_y * width + point_x)[on_grid]
    nearest = torch.full((height * width,), NO_TARGET, device=targets.device)
    return nearest.scatter_reduce_(0, points, keys[on_grid], "amin")


def _near_gaps(targets: Tensor, squared_distance: Tensor) -> Tensor:
    """Select the targets that could be the nearest to a grid point farther than `REACH` from all of them.

    The disc around such a grid point q up to its nearest target p is empty. If its radius exceeds 2.41, the disc of
    that radius which lies in it and touches p is empty, too, and the grid point next to its center (which may lie by
    up to 1 beyond the last row or column, and is then up to 1.12 away) is at least 1.29 from every target. Else q
    itself is. Either way, such a grid point is less than 3 from p in x and in y.

    Args:
        targets: `(2, N)`, (x, y).
        squared_distance: `(h, w)`, of each grid point to its nearest target within reach.

    Returns:
        `(N,)` bool.
    """
    height, width = squared_distance.shape
    gaps = (squared_distance >= 1.29**2).float()
    near = F.max_pool2d(gaps[None], kernel_size=7, stride=1, padding=3)[0] > 0
    x, y = targets.round().long()
    return near[y.clamp(max=height - 1), x.clamp(max=width - 1)]


def _nearest_of_all(queries: Tensor, points: Tensor) -> Tensor:
    """Return for each of the queries `(2, M)` the index of the nearest of the points `(2, N)`."""
    parts = queries.T.split(max(1, CHUNK // points.shape[1]))
    return torch.cat(
        [torch.cdist(part, points.T, compute_mode="donot_use_mm_for_euclid_dist").argmin(1) for part in parts]
    )
