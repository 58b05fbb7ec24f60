"""Visual similarity of all pairs of pixels, and its lookup around the current flow (paper section 3.2).

Shapes: `B` batch, `C` feature channels, `h w` 1/8 grid, `L` levels, `r` radius, `K` window, (2 * r + 1) ** 2.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def pixel_grid(batch: int, height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Coordinates of every grid point, `(batch, 2, height, width)` as (x, y)."""
    y, x = torch.meshgrid(
        torch.arange(height, dtype=dtype, device=device),
        torch.arange(width, dtype=dtype, device=device),
        indexing="ij",
    )
    return torch.stack([x, y]).expand(batch, 2, height, width)


def sample_bilinear(maps: Tensor, coordinates: Tensor) -> Tensor:
    """Read maps between their pixels; outside of them they are 0.

    Args:
        maps: `(N, C, H, W)`.
        coordinates: `(N, P, Q, 2)`, (x, y) in pixels of the map: (0, 0) is the centre of the first one.

    Returns:
        `(N, C, P, Q)`.
    """
    height, width = maps.shape[-2:]
    # With align_corners=False the map's edges, not its pixels' centres, lie at -1 and 1, so that a map of a single
    # pixel has a scale too: with align_corners=True one would divide by size - 1.
    # Tensors are divided, not numbers, which torch.export would take for constants.
    two = coordinates.new_full((), 2)
    scale = torch.stack([two / width, two / height])
    grid = (coordinates + 0.5) * scale - 1
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


class CorrelationPyramid:
    """All-pairs correlation, computed once per pair of frames, averaged over frame 2 level by level.

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
        batch, channels, height, width = fmap1.shape
        with torch.autocast(fmap1.device.type, enabled=False):
            # Scaled before the product: of features there are few, of products h * w times as many.
            features1 = (fmap1.to(dtype) / math.sqrt(channels)).flatten(2).transpose(1, 2)  # (B, h*w, C)
            features2 = fmap2.to(dtype).flatten(2)  # (B, C, h*w)
            corr = features1 @ features2
            corr = corr.reshape(batch * height * width, 1, height, width)
            self.levels = [corr]
            for _ in range(num_levels - 1):
                self.levels.append(F.avg_pool2d(self.levels[-1], kernel_size=2, stride=2))

    def lookup(self, centroids: Tensor) -> Tensor:
        """Sample every pyramid level in a square window around each centroid.

        Args:
            centroids: `(B, 2, h, w)`, where each pixel of frame 1 lands in frame 2, as (x, y) in grid pixels
                (image pixels / 8). May lie outside the grid, where correlation reads as 0.

        Returns:
            `(B, L * K, h, w)`. Level, then x offset, then y offset: channel `l * K + i * (2 * r + 1) + j` reads
            `centroid / 2**l + (i - r, j - r)`. Published weights depend on x coming before y.
        """
        batch, _, height, width = centroids.shape
        with torch.autocast(centroids.device.type, enabled=False):
            centroids = centroids.to(self.levels[0].dtype)
            centres = centroids.permute(0, 2, 3, 1).reshape(-1, 1, 1, 2)  # (B*h*w, 1, 1, 2)
            steps = torch.arange(-self.radius, self.radius + 1, dtype=centres.dtype, device=centres.device)
            offsets = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), dim=-1)  # [i, j] = (x i, y j)
            windows = [
                sample_bilinear(corr, centres / 2**level + offsets).flatten(1)  # (B*h*w, K)
                for level, corr in enumerate(self.levels)
            ]
        return torch.cat(windows, dim=1).reshape(batch, height, width, -1).permute(0, 3, 1, 2)
