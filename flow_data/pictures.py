"""Flow as pictures: direction is the hue, length the saturation (Baker et al. 2011, the Middlebury colours)."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor
from torchvision.utils import flow_to_image

GAP = 4  # white pixels between the parts of a picture


def draw_flow(flow: Tensor) -> np.ndarray:
    """Colours of one or several flows, on one scale: the longest vector of them all is fully saturated.

    Args:
        flow: `(2, H, W)` or `(B, 2, H, W)`, pixels, finite.

    Returns:
        `(H, W, 3)` or `(B, H, W, 3)` uint8, RGB.
    """
    return flow_to_image(flow.float()).movedim(-3, -1).contiguous().numpy()


def hide_unknown(picture: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """A picture of flow with white where the flow is unknown; `(H, W, 3)` uint8 and `(H, W)` bool."""
    return np.where(valid[..., None], picture, 255).astype(np.uint8)


def join_row(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures of one height side by side, `(H, W, 3)` uint8 each."""
    return _join(pictures, axis=1)


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
