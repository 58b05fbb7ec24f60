"""Random colors: brightness, contrast, saturation and hue of part of a frame, relative to the whole of it.

The adjustments are those of torchvision's ColorJitter, in 8 bits each, of which OpenCV makes a tenth of Pillow's time.
Contrast is relative to the mean gray of the whole of what is adjusted. Here most of that is never used again, so
its mean is taken from a `probe`, a grid of its pixels that undergoes the same adjustments: of at least 2**14 pixels of
a frame, which for independent pixels of standard deviation 70 means a standard error of 0.6 gray levels, times at most
0.4 in the image; what neighboring pixels have in common makes it less.
"""

import math
from typing import NamedTuple

import cv2
import numpy as np

PROBE_PIXELS = 2**14  # of a frame, at least, where it has so many
GRAY = np.array([0.299, 0.587, 0.114])  # ITU-R 601-2, as in Pillow and OpenCV
HUE_STEPS = 256  # a circle, in OpenCV's *_FULL conversions


class JitterRange(NamedTuple):
    """Half widths of what is drawn: factors around 1 for the first three, a turn around 0 for hue (1 = a circle)."""

    brightness: float
    contrast: float
    saturation: float
    hue: float


Adjustments = list[tuple[str, float]]  # (name, factor), in the order in which they are to be applied


def draw_adjustments(rng: np.random.Generator, jitter: JitterRange) -> Adjustments:
    """Draw the four color adjustments, in random order."""
    factors = [
        (name, rng.uniform(1 - width, 1 + width)) for name, width in zip(jitter._fields[:3], jitter, strict=False)
    ]
    factors.append(("hue", rng.uniform(-jitter.hue, jitter.hue)))
    return [factors[i] for i in rng.permutation(len(factors))]


def take_probe(frame: np.ndarray) -> np.ndarray:
    """A regular grid of the pixels of a frame `(H, W, 3)`, flattened to `(N, 1, 3)`."""
    stride = max(1, math.isqrt(frame.shape[0] * frame.shape[1] // PROBE_PIXELS))
    return frame[::stride, ::stride].reshape(-1, 1, 3)


def mean_color(probe: np.ndarray) -> np.ndarray:
    """The mean `(3,)` of the pixels of a probe."""
    return np.array(cv2.mean(probe)[:3])


def adjust_colors(image: np.ndarray, adjustments: Adjustments, probe: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Apply color adjustments in the order given.

    Args:
        image: `(H, W, 3)` uint8, RGB.
        adjustments: A factor of 1, or a turn of 0, changes nothing.
        probe: `(N, 1, 3)` uint8, pixels of everything that is adjusted in this way, whose mean gray contrast needs.

    Returns:
        The image and the probe, adjusted; neither is changed in place.
    """
    for name, factor in adjustments:
        if name == "brightness":
            image, probe = _scale(image, factor, 0.0), _scale(probe, factor, 0.0)
        elif name == "contrast":
            gray = float(GRAY @ mean_color(probe))
            image, probe = _scale(image, factor, gray), _scale(probe, factor, gray)
        elif name == "saturation":
            image, probe = _saturate(image, factor), _saturate(probe, factor)
        elif name == "hue":
            image, probe = _turn_hue(image, factor), _turn_hue(probe, factor)
        else:
            raise ValueError(f"an adjustment must be brightness, contrast, saturation or hue; got {name!r}")
    return image, probe


def _scale(image: np.ndarray, factor: float, center: float) -> np.ndarray:
    """center + factor * (image - center), rounded and clipped."""
    return cv2.addWeighted(image, factor, image, 0, (1 - factor) * center)


def _saturate(image: np.ndarray, factor: float) -> np.ndarray:
    """gray + factor * (image - gray), rounded and clipped."""
    return cv2.transform(image, factor * np.eye(3) + (1 - factor) * GRAY)


def _turn_hue(image: np.ndarray, turn: float) -> np.ndarray:
    """Turn the hue by so many circles. A turn of less than half a step would only round every pixel, and does not."""
    steps = round(turn * HUE_STEPS) % HUE_STEPS
    if steps == 0:
        return image
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(steps)  # wraps, where cv2.add would stop at 255
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
