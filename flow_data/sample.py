"""A decoded image pair, as augmentation and training take it."""

from typing import Any, NamedTuple

import numpy as np

MAX_ZOOM = 5  # log2, of augmentation; a misread range would make frames larger than memory


class FlowSample(NamedTuple):
    """One image pair, with its flow where there is ground truth, as numpy arrays.

    Args:
        image1: `(H, W, 3)` uint8, RGB.
        image2: `(H, W, 3)` uint8, RGB.
        flow: `(H, W, 2)` float32, (x right, y down) in pixels, from image1 to image2; 0 where `valid` is False. None
            without ground truth.
        valid: `(H, W)` bool; None without ground truth, or where all of the flow is known.
        images_without_photo_aug: both frames, `(H, W, 3)` uint8 each, without photometric augmentation, where the
            augmentation was asked to keep them (`flow_data.augmentation.augment_dense`).
    """

    image1: np.ndarray
    image2: np.ndarray
    # Any rather than optional arrays: nearly every caller requires ground truth, which `to_sample` then guarantees.
    flow: Any = None
    valid: Any = None
    images_without_photo_aug: tuple[np.ndarray, ...] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the frames."""
        return self.image1.shape[0], self.image1.shape[1]
