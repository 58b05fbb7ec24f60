"""The correlation pyramid against torchvision's, and against a plain form without interpolation routines."""

import math

import pytest
import torch
from torchvision.models.optical_flow.raft import CorrBlock

from modeling_raft.correlation_raft import CorrelationPyramid, pixel_grid


def grid_like(fmap: torch.Tensor) -> torch.Tensor:
    batch, _, height, width = fmap.shape
    return pixel_grid(batch, height, width, fmap.dtype, fmap.device)


def plain_lookup(fmap1, fmap2, centroids, num_levels, radius):
    """Section 3.2 of the paper as loops over single numbers; outside of frame 2 correlation is 0."""
    batch, channels, height, width = fmap1.shape
    side = 2 * radius + 1
    out = fmap1.new_zeros(batch, num_levels * side * side, height, width)
    for level in range(num_levels):
        h2, w2 = height // 2**level, width // 2**level
        # averaging correlations over frame 2 is correlating with averaged features
        pooled = torch.nn.functional.avg_pool2d(fmap2, 2**level) if level else fmap2
        for b in range(batch):
            for y in range(height):
                for x in range(width):
                    corr = torch.einsum("c,chw->hw", fmap1[b, :, y, x], pooled[b]) / math.sqrt(channels)
                    for i in range(side):
                        for j in range(side):
                            px = centroids[b, 0, y, x].item() / 2**level + i - radius
                            py = centroids[b, 1, y, x].item() / 2**level + j - radius
                            x0, y0 = math.floor(px), math.floor(py)
                            value = 0.0
                            for tap_y, tap_x in ((y0, x0), (y0, x0 + 1), (y0 + 1, x0), (y0 + 1, x0 + 1)):
                                if 0 <= tap_y < h2 and 0 <= tap_x < w2:
                                    weight = (1 - abs(px - tap_x)) * (1 - abs(py - tap_y))
                                    value += weight * corr[tap_y, tap_x].item()
                            out[b, level * side * side + i * side + j, y, x] = value
    return out


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 11)])  # (8, 8) is a 64 x 64 image: its level 3 is 1 x 1
def test_lookup_equals_the_plain_form(height, width):
    torch.manual_seed(0)
    fmap1, fmap2 = torch.randn(2, 1, 5, height, width, dtype=torch.float64)
    centroids = grid_like(fmap1) + 4 * torch.randn(1, 2, height, width, dtype=torch.float64)
    ours = CorrelationPyramid(fmap1, fmap2, num_levels=4, radius=2).lookup(centroids)
    torch.testing.assert_close(ours, plain_lookup(fmap1, fmap2, centroids, num_levels=4, radius=2))


@pytest.mark.parametrize("radius", [3, 4])
def test_lookup_equals_torchvision(radius):
    torch.manual_seed(0)
    fmap1, fmap2 = torch.randn(2, 2, 16, 24, 32)
    centroids = grid_like(fmap1) + 5 * torch.randn(2, 2, 24, 32)  # some leave the grid
    oracle = CorrBlock(num_levels=3, radius=radius)
    oracle.build_pyramid(fmap1, fmap2)
    ours = CorrelationPyramid(fmap1, fmap2, num_levels=3, radius=radius).lookup(centroids)
    torch.testing.assert_close(ours, oracle.index_pyramid(centroids), atol=1e-4, rtol=1e-4)


def test_far_outside_is_zero():
    fmap = torch.randn(1, 4, 8, 8)
    pyramid = CorrelationPyramid(fmap, fmap, num_levels=4, radius=4)
    assert (pyramid.lookup(torch.full((1, 2, 8, 8), 1e4)) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_correlated_in_float32(dtype):
    torch.manual_seed(0)
    fmap1, fmap2 = (200 * torch.randn(2, 1, 64, 8, 8)).to(dtype)
    centroids = grid_like(fmap1.float()) + 0.3
    expected = CorrelationPyramid(fmap1.double(), fmap2.double(), 2, 3).lookup(centroids.double())
    assert expected.abs().max() * 8 > torch.finfo(torch.float16).max  # the dot products overflow float16
    with torch.autocast("cpu", dtype=dtype):
        ours = CorrelationPyramid(fmap1, fmap2, 2, 3).lookup(centroids.to(dtype).float())
        exact = CorrelationPyramid(fmap1, fmap2, 2, 3).lookup(centroids)
    assert ours.dtype == exact.dtype == torch.float32
    torch.testing.assert_close(exact.double(), expected, rtol=1e-4, atol=0.5)
