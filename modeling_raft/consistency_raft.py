"""Forward-backward consistency: occlusion, and how far forward and backward flow disagree.

Shapes: `B` batch, `H W` frame. Flow is (x right, y down), pixels.
"""

import torch
from torch import Tensor

from .correlation_raft import warp

# Sundaram, Brox & Keutzer 2010 (Dense point trajectories by GPU-accelerated large displacement optical flow, eq. 5).
RELATIVE_TOLERANCE, ABSOLUTE_TOLERANCE = 0.01, 0.5  # of squared lengths; squared pixels


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


def is_occluded(flow: Tensor, backward_flow: Tensor, absolute_tolerance: float = ABSOLUTE_TOLERANCE) -> Tensor:
    """Mask of the pixels of frame 1 that frame 2 does not show: hidden by something, or outside of the frame.

    A pixel is occluded where the squared distance between its start and the place to which flow and backward flow
    bring it exceeds 0.01 of the squared lengths of both flows plus 0.5 (Sundaram et al. 2010, equation 5).

    Args:
        flow: `(B, 2, H, W)`, from frame 1 to frame 2.
        backward_flow: `(B, 2, H, W)`, from frame 2 to frame 1. With the two arguments exchanged, the result is the
            mask of the pixels of frame 2 that frame 1 does not show.
        absolute_tolerance: Squared pixels, instead of 0.5.

    Returns:
        `(B, H, W)` bool.

    Raises:
        ValueError: The two differ in size.
    """
    back, inside = _warp_backward_flow(flow, backward_flow)
    error = (flow + back).square().sum(1)
    lengths = flow.square().sum(1) + back.square().sum(1)
    return ~(inside & (error <= RELATIVE_TOLERANCE * lengths + absolute_tolerance))


def _warp_backward_flow(flow: Tensor, backward_flow: Tensor) -> tuple[Tensor, Tensor]:
    """Return backward flow at the place where each pixel of frame 1 goes, and whether that lies in the frame."""
    if flow.shape != backward_flow.shape:
        raise ValueError(
            f"forward and backward flow must have one size; got {tuple(flow.shape)} and {tuple(backward_flow.shape)}"
        )
    return warp(backward_flow, flow)
