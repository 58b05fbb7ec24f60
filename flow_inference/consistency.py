"""Forward-backward consistency: warping, occlusion, and how far forward and backward flow disagree.

Shapes: `B` batch, `C` channels, `H W` frame. Flow is (x right, y down), pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling_raft.correlation_raft import pixel_grid

# Sundaram, Brox & Keutzer 2010 (Dense point trajectories by GPU-accelerated large displacement optical flow, eq. 5).
RELATIVE_TOLERANCE, ABSOLUTE_TOLERANCE = 0.01, 0.5  # of squared lengths; squared pixels


def warp(maps: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """Warp maps of frame 2 to frame 1: read them where each pixel of frame 1 goes.

    Args:
        maps: `(B, C, H, W)` floating, of frame 2.
        flow: `(B, 2, H, W)`, from frame 1 to frame 2.

    Returns:
        `(B, C, H, W)`, read bilinearly, and `(B, H, W)` bool, False where a pixel leaves the frame by more than half
        a pixel. There, the edge of the frame is read.
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
    """Distance between each pixel of frame 1 and the place to which flow and then backward flow bring it.

    Args:
        flow: `(B, 2, H, W)`, from frame 1 to frame 2.
        backward_flow: `(B, 2, H, W)`, from frame 2 to frame 1.

    Returns:
        `(B, H, W)`, pixels; infinite where flow leaves the frame.

    Raises:
        ValueError: The two differ in size.
    """
    back, inside = _warp_backward_flow(flow, backward_flow)
    return torch.where(inside, torch.linalg.vector_norm(flow + back, dim=1), torch.inf)


def is_occluded(flow: Tensor, backward_flow: Tensor) -> Tensor:
    """Mask of the pixels of frame 1 that frame 2 does not show: hidden by something, or outside of the frame.

    A pixel is occluded where the squared distance between its start and the place to which flow and backward flow
    bring it exceeds 0.01 of the squared lengths of both flows plus 0.5 (Sundaram et al. 2010, equation 5).

    Args:
        flow: `(B, 2, H, W)`, from frame 1 to frame 2.
        backward_flow: `(B, 2, H, W)`, from frame 2 to frame 1. With the two arguments exchanged, the result is the
            mask of the pixels of frame 2 that frame 1 does not show.

    Returns:
        `(B, H, W)` bool.

    Raises:
        ValueError: The two differ in size.
    """
    back, inside = _warp_backward_flow(flow, backward_flow)
    error = (flow + back).square().sum(1)
    lengths = flow.square().sum(1) + back.square().sum(1)
    return ~(inside & (error <= RELATIVE_TOLERANCE * lengths + ABSOLUTE_TOLERANCE))


def _warp_backward_flow(flow: Tensor, backward_flow: Tensor) -> tuple[Tensor, Tensor]:
    """Return backward flow at the place where each pixel of frame 1 goes, and whether that lies in the frame."""
    if flow.shape != backward_flow.shape:
        raise ValueError(
            f"forward and backward flow must have one size; got {tuple(flow.shape)} and {tuple(backward_flow.shape)}"
        )
    return warp(backward_flow, flow)
