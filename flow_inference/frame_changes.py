"""What the change from one frame to the next is, other than motion: a repeated frame, or a scene cut."""

import numpy as np
from torch import Tensor

from flow_data.optional_packages import needs_extra
from modeling_raft.correlation_raft import warp

BLOCK = 16  # pixels: small enough to show an eye blink, large enough that the noise of compression averages out
NOISE = 1.5  # gray levels by which lossy compression alone changes a block
DUPLICATE_TOLERANCE = 0.1  # pixels: less than the error of models

# Gray levels. Pairs of Sintel and Middlebury have photometric errors of 2 to 4, synthetic ones with much occlusion up
# to 19, and cuts between any of them 45 to 80.
FIRST_PAIR_LIMIT = 40.0  # of a scene's first pair, which has nothing to be compared with
LOWEST_CUT = 12.0  # below, there is no cut, however large the increase
CUT_RATIO = 3.0  # times the usual error of the scene
MEMORY = 0.8  # share that the usual error keeps from pair to pair


def is_duplicate(frame1: np.ndarray, frame2: np.ndarray, tolerance: float = DUPLICATE_TOLERANCE) -> bool:
    """Return whether frame 2 is a copy of frame 1, up to what lossy compression changes.

    Cartoons are drawn on twos and threes, and video is slowed to other frame rates by repeating frames. Frame 2 is a
    copy where no block of 16 x 16 pixels differs more than noise of 1.5 gray levels and a motion of `tolerance` would
    explain: a motion of d pixels changes a pixel by d times the gradient of the image there. Compression, too, leaves
    most of its noise where gradients are large.

    Args:
        frame1: `(H, W, 3)` uint8, RGB.
        frame2: `(H, W, 3)` uint8, RGB.
        tolerance: Motion in pixels that is ignored; 0 accepts exact copies only.
    """
    if np.array_equal(frame1, frame2):
        return True
    if tolerance == 0:
        return False
    with needs_extra("video"):
        import cv2
    gray1, gray2 = (cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float32) for frame in (frame1, frame2))
    gradient_x, gradient_y = (cv2.Sobel(gray1, cv2.CV_32F, *order, scale=1 / 8) for order in ((1, 0), (0, 1)))
    explained = NOISE + tolerance * _block_means(cv2.magnitude(gradient_x, gradient_y))
    return bool((_block_means(cv2.absdiff(gray1, gray2)) <= explained).all())


def _block_means(values: np.ndarray) -> np.ndarray:
    import cv2

    height, width = values.shape
    return cv2.resize(values, (-(-width // BLOCK), -(-height // BLOCK)), interpolation=cv2.INTER_AREA)


def photometric_error(thumbnail1: Tensor, thumbnail2: Tensor, low_res_flow: Tensor) -> float:
    """Mean difference between frame 1 and frame 2 warped by the flow, in gray levels of 255.

    It is measured on the grid of the flow, where neither noise nor sub-pixel errors matter. Pixels that leave the
    frame do not count.

    Args:
        thumbnail1: `(1, 3, h, w)` in 0..255.
        thumbnail2: `(1, 3, h, w)` in 0..255.
        low_res_flow: `(1, 2, h, w)`, grid pixels.

    Returns:
        The mean; infinity where every pixel leaves the frame.
    """
    warped, inside = warp(thumbnail2, low_res_flow)
    difference = (thumbnail1 - warped).abs().mean(1)[inside]
    return float(difference.mean()) if len(difference) else float("inf")


class SceneCutDetector:
    """Tells a scene cut from the photometric error, which it compares with the usual error of the scene so far."""

    def __init__(self) -> None:
        self._usual_error: float | None = None

    def is_cut(self, error: float) -> bool:
        """Return whether an error is far above the usual one; of a scene's first pair, above that of any scene."""
        usual = self._usual_error
        return error > (FIRST_PAIR_LIMIT if usual is None else max(LOWEST_CUT, CUT_RATIO * usual))

    def update(self, error: float) -> None:
        """Add the error of a pair of the same scene."""
        usual = self._usual_error
        self._usual_error = error if usual is None else MEMORY * usual + (1 - MEMORY) * error

    def reset(self) -> None:
        """Begin a new scene."""
        self._usual_error = None
