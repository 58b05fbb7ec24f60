"""Frames that show the same drawing again: cartoons on twos and threes, film slowed to another rate."""

import cv2
import numpy as np

BLOCK = 16  # pixels: small enough to see an eye blink, large enough that the noise of compression averages out
NOISE = 1.5  # grey levels by which lossy compression alone changes a block
TOLERANCE = 0.1  # pixels: less than models are wrong by


def is_held(frame1: np.ndarray, frame2: np.ndarray, tolerance: float = TOLERANCE) -> bool:
    """Whether frame 2 is a copy of frame 1, but for what lossy compression does to copies.

    It is where no block of 16 x 16 pixels differs more than noise of 1.5 grey levels and a motion of `tolerance` would
    make it: a motion of d pixels changes a pixel by d times the slope of the picture there. Compression, too, leaves
    most of its noise where the slopes are.

    Args:
        frame1, frame2: `(H, W, 3)` uint8, RGB, of one size.
        tolerance: Pixels; 0 takes exact copies only.
    """
    if np.array_equal(frame1, frame2):
        return True
    if tolerance == 0:
        return False
    grey1, grey2 = (cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float32) for frame in (frame1, frame2))
    slope_x, slope_y = (cv2.Sobel(grey1, cv2.CV_32F, *order, scale=1 / 8) for order in ((1, 0), (0, 1)))
    explained = NOISE + tolerance * _block_means(np.hypot(slope_x, slope_y))
    return bool((_block_means(np.abs(grey1 - grey2)) <= explained).all())


def _block_means(values: np.ndarray) -> np.ndarray:
    height, width = values.shape
    return cv2.resize(values, (-(-width // BLOCK), -(-height // BLOCK)), interpolation=cv2.INTER_AREA)
