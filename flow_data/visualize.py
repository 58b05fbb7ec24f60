"""Visualizations of flow: direction is the hue, length the saturation (Baker et al. 2011, the Middlebury colors).

They are `(h, w, 3)` uint8, RGB, on white. Text is drawn by OpenCV, whose letters are ASCII.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.utils import flow_to_image

from flow_data.optional_packages import needs_extra

GAP = 4  # white pixels between the parts of an image
WHEEL_SIZE = 64  # pixels; of a legend whose text is 9 pixels high
SUPERSAMPLING = 4  # the wheel's rim is smooth
FONT_SIZE = 0.4  # of OpenCV's Hershey Simplex


def draw_flow(flow: Tensor, max_length: float | None = None) -> np.ndarray:
    """Colors of one or several flows, on one scale.

    Args:
        flow: `(2, H, W)` or `(B, 2, H, W)`, pixels, on any device. What is not finite is white, as unknown flow is.
        max_length: pixels; vectors of this length, and longer ones, are fully saturated. Give the frames of a video
            the same, or their colors cannot be compared. None: the longest finite vector of them all.

    Returns:
        `(H, W, 3)` or `(B, H, W, 3)` uint8, RGB.

    Raises:
        ValueError: `max_length` is not a positive number.
    """
    flow = flow.detach().float().movedim(-3, 0)
    length = torch.linalg.vector_norm(flow, dim=0)
    finite = length.isfinite()
    if max_length is None:
        max_length = _longest(length)
    _check_length(max_length)
    vectors = torch.where(finite, flow / length.clamp(min=max_length), 0)  # 0 is white
    # flow_to_image scales by the longest vector that it is given: so it is given one of length 1 beside the others
    one = vectors.new_tensor([[1], [0]])
    pixels = torch.cat([vectors.flatten(1), one], dim=1)
    colors = flow_to_image(pixels[:, None])[:, 0, :-1].reshape(3, *finite.shape)
    return colors.movedim(0, -1).cpu().contiguous().numpy()


def longest_vector(flow: Tensor) -> float:
    """Pixels of the longest finite vector of `(..., 2, H, W)`; 1 where nothing moves, as any scale fits then."""
    return _longest(torch.linalg.vector_norm(flow.detach().float(), dim=-3))


def mask_invalid(image: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Paint a visualization `(H, W, 3)` uint8 white where `valid` `(H, W)` bool is False."""
    return np.where(valid[..., None], image, 255).astype(np.uint8)


def draw_wheel(size: int) -> np.ndarray:
    """The color wheel: each pixel has the color of the vector from the center to it.

    Args:
        size: of the image in pixels. Full saturation is at the rim.

    Returns:
        `(size, size, 3)` uint8; white outside of the wheel.
    """
    steps = (torch.arange(size * SUPERSAMPLING) + 0.5) / (size * SUPERSAMPLING) * 2 - 1
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    inside = (x.square() + y.square() <= 1).numpy()
    wheel = mask_invalid(draw_flow(torch.stack([x, y]), max_length=1), inside)
    return _opencv().resize(wheel, (size, size), interpolation=_opencv().INTER_AREA)


def draw_legend(max_length: float, scale: float = 1) -> np.ndarray:
    """The color wheel with right, down, and the length at its rim.

    Args:
        max_length: pixels, as given to `draw_flow`.
        scale: 1 has a wheel of 64 pixels, and text of 9.

    Returns:
        `(h, w, 3)` uint8.

    Raises:
        ValueError: `max_length` is not a positive number.
    """
    cv2 = _opencv()
    _check_length(max_length)
    wheel = draw_wheel(round(WHEEL_SIZE * scale))
    size = len(wheel)
    middle, end = size // 2, round(size * 0.9)
    for tip in ((end, middle), (middle, end)):
        cv2.arrowedLine(wheel, (middle, middle), tip, (0, 0, 0), max(round(scale), 1), cv2.LINE_AA, tipLength=0.3)
    rim = draw_text(f"{pixel_text(max_length)} px at the rim", scale)
    right, down = draw_text("right", scale), draw_text("down", scale)
    legend = np.full((size + len(down), size + GAP + rim.shape[1], 3), 255, np.uint8)
    _paste(legend, wheel, 0, 0)
    _paste(legend, rim, 0, size + GAP)
    _paste(legend, right, middle - len(right) // 2, size + GAP)
    _paste(legend, down, size, max(middle - down.shape[1] // 2, 0))
    return legend


def draw_scale(max_length: float, size: int = 240) -> np.ndarray:
    """A color wheel that says what colors mean in pixels: four directions, and rings with the lengths at them.

    Args:
        max_length: pixels at the rim, as given to `draw_flow`.
        size: of the wheel in pixels, without the words around it.

    Returns:
        `(h, w, 3)` uint8.

    Raises:
        ValueError: `max_length` is not a positive number, or there is no room for words.
    """
    cv2 = _opencv()
    _check_length(max_length)
    if size < 100:
        raise ValueError(f"size must be at least 100; got {size}")
    wheel, scale = draw_wheel(size), size / 170
    stroke, middle = max(1, round(scale * 0.7)), size // 2
    for share in (0.5, 1.0):
        cv2.circle(wheel, (middle, middle), round(share * size / 2) - stroke, (0, 0, 0), stroke, cv2.LINE_AA)
    for tip in ((1, 0), (-1, 0), (0, 1), (0, -1)):
        ends = [tuple(round(middle + share * size * side) for side in tip) for share in (0.04, 0.16)]
        cv2.arrowedLine(wheel, *ends, (0, 0, 0), stroke, cv2.LINE_AA, tipLength=0.4)
    names = {name: draw_text(name, scale) for name in ("up", "down", "left", "right")}
    left, top = names["left"].shape[1] + GAP, names["up"].shape[0] + GAP
    lengths = [draw_text(f"{pixel_text(share * max_length)} px", scale) for share in (0.5, 1.0)]
    width = left + size + GAP + max(names["right"].shape[1], lengths[1].shape[1])
    image = np.full((2 * top + size, width, 3), 255, np.uint8)
    _paste(image, wheel, top, left)
    for name, word in names.items():
        x = {"left": 0, "right": left + size + GAP}.get(name, left + middle - word.shape[1] // 2)
        y = {"up": 0, "down": top + size + GAP}.get(name, top + middle - word.shape[0] // 2)
        _paste(image, word, y, x)
    # At the lower right of each ring, where it is 45 degrees from the words; on a patch of white inside of the wheel.
    for share, label in zip((0.5, 1.0), lengths, strict=True):
        x = round(left + middle + share * size / 2 * math.sqrt(0.5))
        y = round(top + middle + share * size / 2 * math.sqrt(0.5))
        _paste(image, label, y - (label.shape[0] // 2 if share < 1 else 0), x + stroke if share == 1 else x + 2)
    return image


def draw_text(text: str, scale: float = 1) -> np.ndarray:
    """Black letters on white, `(h, w, 3)` uint8; as wide as they need, and of one height whatever the letters."""
    cv2 = _opencv()
    font, size, stroke = cv2.FONT_HERSHEY_SIMPLEX, FONT_SIZE * scale, max(round(scale), 1)
    width = cv2.getTextSize(text, font, size, stroke)[0][0]
    (_, ascent), descent = cv2.getTextSize("Ag", font, size, stroke)
    margin = stroke + 2  # for what the smooth outline adds
    image = np.full((ascent + descent + 2 * margin, width + 2 * margin, 3), 255, np.uint8)
    origin = (margin, margin + ascent)
    return cv2.putText(image, text, origin, font, size, (0, 0, 0), stroke, cv2.LINE_AA)


def _opencv() -> Any:
    """Import OpenCV, which only legends and text need."""
    with needs_extra("video"):
        import cv2
    return cv2


def pixel_text(value: float) -> str:
    """A length in pixels with the digits that matter: 0.05, 1.5, 12.3, 123."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def pad_image(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """White below and on the right of an image, up to a size."""
    missing = (max(height - image.shape[0], 0), max(width - image.shape[1], 0))
    return np.pad(image, ((0, missing[0]), (0, missing[1]), (0, 0)), constant_values=255)


def join_row(images: Sequence[np.ndarray]) -> np.ndarray:
    """Images of one height side by side, `(H, W, 3)` uint8 each."""
    return _join(images, axis=1)


def stack_rows(images: Sequence[np.ndarray]) -> np.ndarray:
    """Images below each other; narrower ones are padded with white on the right."""
    width = max(image.shape[1] for image in images)
    return _join([pad_image(image, 0, width) for image in images], axis=0)


def _longest(length: Tensor) -> float:
    return torch.where(length.isfinite(), length, 0).max().item() or 1.0


def _check_length(max_length: float) -> None:
    if not (math.isfinite(max_length) and max_length > 0):
        raise ValueError(f"max_length must be a positive number of pixels; got {max_length}")


def _paste(canvas: np.ndarray, image: np.ndarray, top: int, left: int) -> None:
    canvas[top : top + image.shape[0], left : left + image.shape[1]] = image


def _join(images: Sequence[np.ndarray], axis: int) -> np.ndarray:
    shape = list(images[0].shape)
    shape[axis] = GAP
    gap = np.full(shape, 255, dtype=np.uint8)
    parts = [part for image in images for part in (image, gap)][:-1]
    return np.concatenate(parts, axis=axis)
