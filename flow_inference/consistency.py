"""Forward and backward flow held against each other: what is warped, what is occluded, how far they disagree.

Shapes: `B` batch, `C` channels, `H W` frame. Flow is (x right, y down), pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling_raft.correlation_raft import pixel_grid

# Sundaram, Brox & Keutzer 2010 (Dense point trajectories by GPU-accelerated large displacement optical flow, eq. 5).
RELATIVE_TOLERANCE, ABSOLUTE_TOLERANCE = 0.01, 0.5  # of squared lengths; squared pixels


def warp(maps: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """Fetch what frame 2 has where each pixel of frame 1 goes: frame 2 as frame 1 would see it.

    Args:
        maps: `(B, C, H, W)` floating, of frame 2.
        flow: `(B, 2, H, W)`, from frame 1 to frame 2.

    Returns:
        `(B, C, H, W)`, read bilinearly; and `(B, H, W)` bool, False where a pixel leaves the frame by more than half
        a pixel, in whose place the frame's edge is read.
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


def consistency_error(flow: Tensor, backward_flow: Tensor) -> Tensor:
    """How far a pixel ends from where it started, when it goes to frame 2 and back.

    Args:
        flow: `(B, 2, H, W)`, from frame 1 to frame 2.
        backward_flow: likewise, from frame 2 to frame 1.

    Returns:
        `(B, H, W)`, pixels; infinite where the way there leaves the frame.
    """
    there_and_back, inside = _round_trip(flow, backward_flow)
    return torch.where(inside, torch.linalg.vector_norm(flow + there_and_back, dim=1), torch.inf)


def is_occluded(flow: Tensor, backward_flow: Tensor) -> Tensor:
    """Which pixels of frame 1 frame 2 does not show: hidden by something, or outside of it.

    Pixels whose way there and back ends elsewhere, by more than is usual for estimates of flow: a hundredth of the
    squared lengths of both ways and half a squared pixel (Sundaram et al. 2010, equation 5).

    Args:
        flow: `(B, 2, H, W)`, from frame 1 to frame 2.
        backward_flow: likewise, from frame 2 to frame 1. The other way round, one gets the pixels of frame 2 that
            frame 1 does not show.

    Returns:
        `(B, H, W)` bool.
    """
    back, inside = _round_trip(flow, backward_flow)
    error = (flow + back).square().sum(1)
    lengths = flow.square().sum(1) + back.square().sum(1)
    return ~(inside & (error <= RELATIVE_TOLERANCE * lengths + ABSOLUTE_TOLERANCE))


def _round_trip(flow: Tensor, backward_flow: Tensor) -> tuple[Tensor, Tensor]:
    """Backward flow of where each pixel of frame 1 goes, and whether that lies in the frame."""
    if flow.shape != backward_flow.shape:
        raise ValueError(
            f"forward and backward flow must have one size; got {tuple(flow.shape)} and {tuple(backward_flow.shape)}"
        )
    return warp(backward_flow, flow)
