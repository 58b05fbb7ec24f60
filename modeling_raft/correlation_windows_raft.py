"""Where a lookup reads correlations, and how (paper section 3.2).

Correlations of some pixels of frame 1 with some of frame 2 are a volume: a row for each of the former, a column for
each of the latter, of all levels of the pyramid. Averaging correlations over frame 2, as the paper has it, is the same
as correlating with averaged features, and needs one product in place of a product and averages of its result.

Shapes: `B` batch, `C` feature channels, `N` rows and `S` columns of a volume, `L` levels, `r` radius, `W` 2 * r + 2,
`K` points of a window, (2 * r + 1) ** 2.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNMENT = 16  # columns: rows of a volume begin where vector instructions load fastest


def pool_features(fmap: Tensor, num_levels: int) -> list[Tensor]:
    """Features `(B, C, h, w)`, averaged over ever larger squares: level l is `(B, C, h // 2**l, w // 2**l)`."""
    levels = [fmap]
    for _ in range(num_levels - 1):
        levels.append(F.avg_pool2d(levels[-1], kernel_size=2, stride=2))
    return levels


@dataclass(frozen=True)
class Box:
    """A rectangle of a pyramid level, in pixels of that level, whose correlations are columns of a volume."""

    left: int
    top: int
    width: int
    height: int


def join_levels(crops: list[Tensor]) -> Tensor:
    """Features of each level, `(B, C, height, width)`, as columns `(B, C, S)`, with at least one column of zeros.

    The zeros are what is read outside of frame 2. They stand last, and `find_windows` relies on it.
    """
    columns = torch.cat([crop.flatten(2) for crop in crops], dim=2)
    return F.pad(columns, (0, ALIGNMENT - columns.shape[2] % ALIGNMENT))


def find_windows(centroids: Tensor, boxes: list[Box], radius: int, last: int) -> tuple[Tensor, Tensor]:
    """Which columns of a volume the windows around centroids consist of.

    All points of a window lie equally far from the pixels around them: a window of (2 r + 1)**2 points is a patch of
    W**2 = (2 r + 2)**2 pixels, and two fractions.

    Args:
        centroids: `(N, 2)`, (x, y) in pixels of level 0.
        boxes: of each level, what the volume's columns hold, one level after the other.
        radius: of the windows, in pixels of each level.
        last: column that holds zeros.

    Returns:
        The columns `(N, L, W, W)`, x before y, and the fractions `(N, L, 2, 1, 1)` between 0 and 1 at which points
        lie from there to the next pixel, (x, y).
    """
    steps = torch.arange(-radius, radius + 2, device=centroids.device)
    columns_x, columns_y, fractions, begin = [], [], [], 0
    for level, box in enumerate(boxes):
        centres = centroids / 2**level
        corners = centres.floor()
        fractions.append(centres - corners)
        x, y = (corners.long()[..., None] + steps).unbind(1)  # (N, W) each
        x, y = x - box.left, y - box.top
        # Whatever is outside in x or y ends up beyond the last column.
        columns_x.append(torch.where((x >= 0) & (x < box.width), x, last))
        columns_y.append(torch.where((y >= 0) & (y < box.height), y * box.width + begin, last))
        begin += box.width * box.height
    columns = torch.stack(columns_x, dim=1)[..., :, None] + torch.stack(columns_y, dim=1)[..., None, :]
    return columns.clamp_(max=last), torch.stack(fractions, dim=1)[..., None, None]


def read_windows(volume: Tensor, columns: Tensor, fractions: Tensor) -> Tensor:
    """Read a volume `(N, S)` at what `find_windows` has found: `(N, L * K)`."""
    patches = volume.gather(1, columns.flatten(1)).reshape(columns.shape)
    patches = torch.lerp(patches[..., :-1], patches[..., 1:], fractions[:, :, 1])
    patches = torch.lerp(patches[..., :-1, :], patches[..., 1:, :], fractions[:, :, 0])
    return patches.flatten(1)


def spread_windows(grad: Tensor, columns: Tensor, fractions: Tensor, grad_volume: Tensor) -> None:
    """Add the gradient of `read_windows` in its volume to `grad_volume`, given that of its result, `(N, L * K)`."""
    side = columns.shape[-1] - 1
    grad = grad.reshape(*columns.shape[:2], side, side)
    fraction_x, fraction_y = fractions[:, :, 0], fractions[:, :, 1]
    grad = F.pad(grad * (1 - fraction_x), (0, 0, 0, 1)) + F.pad(grad * fraction_x, (0, 0, 1, 0))
    grad = F.pad(grad * (1 - fraction_y), (0, 1)) + F.pad(grad * fraction_y, (1, 0))
    grad_volume.scatter_add_(1, columns.flatten(1), grad.flatten(1))
