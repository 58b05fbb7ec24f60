"""Flow as pictures: direction is the hue, length the saturation (Baker et al. 2011, the Middlebury colours)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.utils import flow_to_image

GAP = 4  # white pixels between the parts of a comparison


def draw_flow(flow: Tensor) -> np.ndarray:
    """Colours of one or several flows, on one scale: the longest vector of them all is fully saturated.

    Args:
        flow: `(2, H, W)` or `(B, 2, H, W)`, pixels, finite.

    Returns:
        `(H, W, 3)` or `(B, H, W, 3)` uint8, RGB.
    """
    return flow_to_image(flow.float()).movedim(-3, -1).contiguous().numpy()


def draw_comparison(image1: np.ndarray, flow_gt: np.ndarray, valid: np.ndarray, flow_pred: Tensor) -> np.ndarray:
    """Frame 1, true flow, predicted flow on the same scale, and where they differ, side by side.

    Args:
        image1: `(H, W, 3)` uint8.
        flow_gt: `(H, W, 2)` float32, pixels; unknown flow is white.
        valid: `(H, W)` bool.
        flow_pred: `(2, H, W)`, pixels.

    Returns:
        `(H, 4 * W + 3 * GAP, 3)` uint8. The error is black where it is zero and white from 3 px on.
    """
    truth = torch.from_numpy(flow_gt).permute(2, 0, 1)
    truth_picture, pred_picture = draw_flow(torch.stack([truth, flow_pred]))
    truth_picture = np.where(valid[..., None], truth_picture, 255).astype(np.uint8)
    error = torch.linalg.vector_norm(flow_pred - truth, dim=0).numpy() * valid
    error_picture = np.repeat((np.clip(error / 3, 0, 1) * 255).astype(np.uint8)[..., None], 3, axis=2)
    return _join([image1, truth_picture, pred_picture, error_picture], axis=1)


def stack_rows(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures below each other; narrower ones are padded with white on the right."""
    width = max(picture.shape[1] for picture in pictures)
    rows = [
        np.pad(picture, ((0, 0), (0, width - picture.shape[1]), (0, 0)), constant_values=255) for picture in pictures
    ]
    return _join(rows, axis=0)


def _join(pictures: Sequence[np.ndarray], axis: int) -> np.ndarray:
    shape = list(pictures[0].shape)
    shape[axis] = GAP
    gap = np.full(shape, 255, dtype=np.uint8)
    parts = [part for picture in pictures for part in (picture, gap)][:-1]
    return np.concatenate(parts, axis=axis)
