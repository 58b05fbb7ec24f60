"""Where a pair's flow has moved to by the next pair: what that one's estimate starts from (paper section 4.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling_raft.correlation_raft import pixel_grid

REACH = 2  # pixels: every grid point that is closer than this to a landed one is among the 4 x 4 around that one
CHUNK = 2**24  # distances that are held at a time
NOBODY = 0x7F800000 << 32  # key of a grid point that nothing has landed near: at an infinite distance


def project_forward(flow: Tensor, values: Tensor | None = None) -> Tensor:
    """Carry flow along itself: what a pixel has done is expected again of the place where it is now.

    Every grid point takes the value of whichever pixel lands nearest to it, as in princeton-vl/RAFT
    (core/utils/utils.py, `forward_interpolate`); pixels that leave the picture are not asked.

    Args:
        flow: `(B, 2, h, w)`, in pixels of its own grid, any device.
        values: `(B, C, h, w)`, what is carried; None: the flow itself.

    Returns:
        `(B, C, h, w)`, in the type of `values`; 0 where every pixel has left the picture.
    """
    values = flow if values is None else values
    return torch.stack([_project_one(*pair) for pair in zip(flow, values, strict=True)])


def shorten(flow: Tensor, length: float) -> Tensor:
    """Take `length` off every vector; of those that are no longer, nothing remains.

    Args:
        flow: `(B, 2, h, w)`, pixels of its own grid.
        length: Likewise.
    """
    lengths = torch.linalg.vector_norm(flow, dim=1, keepdim=True)
    tiny = torch.finfo(lengths.dtype).tiny  # a vector of length 0 stays one
    return flow * (1 - length / lengths.clamp(min=max(length, tiny)))


def _project_one(flow: Tensor, values: Tensor) -> Tensor:
    _, height, width = flow.shape
    grid = pixel_grid(1, height, width, torch.float32, flow.device)[0]
    landed = grid + flow.float()
    x, y = landed
    inside = (x > 0) & (x < width) & (y > 0) & (y < height)  # as in the original, an open interval
    sources = inside.flatten().nonzero().flatten()
    if len(sources) == 0:
        return torch.zeros_like(values)
    landed = landed.flatten(1)[:, sources]  # (2, N)
    keys = _nearest_within_reach(landed, height, width)
    squared_distance = (keys >> 32).to(torch.int32).view(torch.float32)
    nearest = keys & 0xFFFFFFFF
    far = (squared_distance > REACH**2).nonzero().flatten()
    if len(far) > 0:
        candidates = _near_gaps(landed, squared_distance.reshape(height, width)).nonzero().flatten()
        found = _nearest_of_all(grid.flatten(1)[:, far], landed[:, candidates])
        nearest[far] = candidates[found]
    return values.flatten(1)[:, sources[nearest]].reshape(values.shape)


def _nearest_within_reach(landed: Tensor, height: int, width: int) -> Tensor:
    """For each grid point `(h * w,)` the nearest of the points that landed in the 4 x 4 pixels around it, as a key.

    A key is the bits of the squared distance, then the point's number: keys have the order of distances, so that one
    integer minimum finds both.
    """
    steps = torch.arange(-1, 3, device=landed.device)
    around_y, around_x = torch.meshgrid(steps, steps, indexing="ij")
    corner_x, corner_y = landed.floor().long()
    target_x, target_y = corner_x + around_x.reshape(-1, 1), corner_y + around_y.reshape(-1, 1)  # (16, N)
    squared_distance = (target_x - landed[0]) ** 2 + (target_y - landed[1]) ** 2
    numbers = torch.arange(landed.shape[1], device=landed.device)
    keys = (squared_distance.view(torch.int32).long() << 32) | numbers
    on_grid = (target_x >= 0) & (target_x < width) & (target_y >= 0) & (target_y < height)
    targets = (target_y * width + target_x)[on_grid]
    nearest = torch.full((height * width,), NOBODY, device=landed.device)
    return nearest.scatter_reduce_(0, targets, keys[on_grid], "amin")


def _near_gaps(landed: Tensor, squared_distance: Tensor) -> Tensor:
    """Which points `(N,)` could be the nearest to a grid point that is farther than `REACH` from all of them.

    The disc around such a grid point q up to its nearest point p is empty. If it is larger than 2.41, so is the disc
    of that radius in it that touches p, and the grid point next to its centre (which may lie by up to 1 beyond the
    last row or column, and is then up to 1.12 away) is 1.29 or more from every point. Else q itself is. Either way,
    such a grid point is less than 3 from p in x and in y.
    """
    height, width = squared_distance.shape
    gaps = (squared_distance >= 1.29**2).float()
    near = F.max_pool2d(gaps[None], kernel_size=7, stride=1, padding=3)[0] > 0
    x, y = landed.round().long()
    return near[y.clamp(max=height - 1), x.clamp(max=width - 1)]


def _nearest_of_all(queries: Tensor, points: Tensor) -> Tensor:
    """For each of `(2, M)` the number of the nearest of `(2, N)`."""
    parts = queries.T.split(max(1, CHUNK // points.shape[1]))
    return torch.cat(
        [torch.cdist(part, points.T, compute_mode="donot_use_mm_for_euclid_dist").argmin(1) for part in parts]
    )
