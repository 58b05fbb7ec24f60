"""Visualization of predicted flow beside ground truth."""

import math

import numpy as np
import torch
from torch import Tensor

from flow_data.visualize import (
    GAP,
    draw_flow,
    draw_legend,
    draw_text,
    join_row,
    longest_vector,
    mask_invalid,
    pad_image,
    pixel_text,
    stack_rows,
)

WHITE_ERROR = 3.0  # pixels; Fl counts errors from there on
UNKNOWN_ERROR = (60, 80, 150)  # blue, since errors are gray
TITLES = ("frame 1", "ground truth", "predicted flow", "error")
WIDTH_OF_SCALE_1 = 400  # wider images get larger text, as they are shown smaller
BAR_SIZE = (12, 120)  # height and width of the scale of errors in pixels, at scale 1


def draw_comparison(
    image1: np.ndarray,
    flow_gt: np.ndarray,
    valid: np.ndarray,
    flow_pred: Tensor,
    max_length: float | None = None,
    white_error: float = WHITE_ERROR,
) -> np.ndarray:
    """Draw frame 1, ground truth, predicted flow on the same scale, and the error, side by side.

    Args:
        image1: `(H, W, 3)` uint8.
        flow_gt: `(H, W, 2)` float32, pixels; unknown flow is white.
        valid: `(H, W)` bool.
        flow_pred: `(2, H, W)`, pixels; what is not finite is white.
        max_length: Pixels, the length that is fully saturated; None: the longest known one.
        white_error: Pixels, the error that is white, as are larger ones.

    Returns:
        `(H, 4 * W + 3 * GAP, 3)` uint8. The error is black where it is zero, white from `white_error` on, gray between
        them, and blue where the ground truth is unknown.

    Raises:
        ValueError: The four differ in size, or a scale is not a positive number.
    """
    if max_length is None:
        max_length = common_length(flow_gt, valid, flow_pred)
    return join_row(_draw_parts(image1, flow_gt, valid, flow_pred, max_length, white_error))


def compare(
    image1: np.ndarray,
    flow_gt: np.ndarray,
    valid: np.ndarray,
    flow_pred: Tensor,
    max_length: float | None = None,
    white_error: float = WHITE_ERROR,
) -> np.ndarray:
    """Draw the parts of `draw_comparison` with titles above them, and the scales of flow and error below them.

    Args:
        image1: As in `draw_comparison`, as are all arguments.

    Returns:
        `(h, w, 3)` uint8: wider than `draw_comparison`'s where the images are narrower than their legends.

    Raises:
        ValueError: As `draw_comparison` raises it.
    """
    if max_length is None:
        max_length = common_length(flow_gt, valid, flow_pred)
    parts = _draw_parts(image1, flow_gt, valid, flow_pred, max_length, white_error)
    scale = max(image1.shape[1] / WIDTH_OF_SCALE_1, 1)
    columns = [stack_rows([draw_text(title, scale), part]) for title, part in zip(TITLES, parts, strict=True)]
    row = join_row(columns)

    wheel, grays = draw_legend(max_length, scale), draw_error_legend(white_error, scale)
    height = max(len(wheel), len(grays))
    below_truth = pad_image(wheel, height, sum(column.shape[1] + GAP for column in columns[1:3]) - GAP)
    left = np.full((height, columns[0].shape[1], 3), 255, np.uint8)
    strip = join_row([left, below_truth, pad_image(grays, height, 0)])
    return stack_rows([pad_image(row, 0, strip.shape[1]), strip])


def common_length(flow_gt: np.ndarray, valid: np.ndarray, flow_pred: Tensor) -> float:
    """Return the length of the longest known or predicted vector in pixels, on which scale both can be drawn.

    Args:
        flow_gt: `(H, W, 2)`, pixels.
        valid: `(H, W)` bool.
        flow_pred: `(2, H, W)`, pixels.

    Raises:
        ValueError: They differ in size.
    """
    _check_sizes(flow_gt.shape[:2], valid=valid.shape, flow_pred=flow_pred.shape[1:])
    target = torch.from_numpy(np.where(valid[..., None], flow_gt, 0)).permute(2, 0, 1)
    return longest_vector(torch.stack([target, flow_pred.cpu().to(target.dtype)]))


def draw_error_legend(white_error: float = WHITE_ERROR, scale: float = 1) -> np.ndarray:
    """Draw the grays of the errors with pixels below them, and the color of unknown ground truth.

    Args:
        white_error: Pixels, the error that is white.
        scale: Of text and bar; 1 has a bar of 120 pixels.

    Returns:
        `(h, w, 3)` uint8.
    """
    height, width = (round(size * scale) for size in BAR_SIZE)
    stroke = max(round(scale), 1)
    bar = np.broadcast_to(np.linspace(0, 255, width).astype(np.uint8)[:, None], (height, width, 3)).copy()
    _outline(bar, stroke)
    ends = f"{pixel_text(white_error)} px or more"
    labels = [draw_text(text, scale) for text in ("0", pixel_text(white_error / 2), ends)]

    left = labels[0].shape[1] // 2
    tick = round(4 * scale)
    image = np.full((height + tick + len(labels[0]), left + width + labels[2].shape[1], 3), 255, np.uint8)
    image[:height, left : left + width] = bar
    for label, position in zip(labels, (0, (width - stroke) // 2, width - stroke), strict=True):
        x = left + position
        image[height : height + tick, x : x + stroke] = 0
        # The last label extends to the right: its number is centered at the tick, not the whole text.
        start = x - (labels[0] if label is labels[2] else label).shape[1] // 2
        image[height + tick : height + tick + len(label), start : start + label.shape[1]] = label

    text = draw_text("no ground truth", scale)
    swatch = np.full((len(text), len(text), 3), UNKNOWN_ERROR, np.uint8)
    _outline(swatch, stroke)
    return stack_rows([image, join_row([swatch, text])])


def _draw_parts(
    image1: np.ndarray,
    flow_gt: np.ndarray,
    valid: np.ndarray,
    flow_pred: Tensor,
    max_length: float,
    white_error: float,
) -> list[np.ndarray]:
    """Draw frame, ground truth, prediction and error, each `(H, W, 3)` uint8."""
    _check_sizes(image1.shape[:2], flow_gt=flow_gt.shape[:2], valid=valid.shape, flow_pred=flow_pred.shape[1:])
    if not (math.isfinite(white_error) and white_error > 0):
        raise ValueError(f"white_error must be a positive number of pixels; got {white_error}")
    target = torch.from_numpy(flow_gt).permute(2, 0, 1)
    flow_pred = flow_pred.cpu().to(target.dtype)
    gt_image, pred_image = draw_flow(torch.stack([target, flow_pred]), max_length)
    error = torch.linalg.vector_norm(flow_pred - target, dim=0).nan_to_num(nan=torch.inf, posinf=torch.inf).numpy()
    gray = (np.clip(error / white_error, 0, 1) * 255).astype(np.uint8)[..., None]
    error_image = np.where(valid[..., None], gray, np.array(UNKNOWN_ERROR, np.uint8))
    return [image1, mask_invalid(gt_image, valid), pred_image, error_image]


def _check_sizes(size: tuple[int, ...], **others: tuple[int, ...]) -> None:
    for name, other in others.items():
        if tuple(other) != tuple(size):
            raise ValueError(f"{name} must have the size of the others, {tuple(size)}; got {tuple(other)}")


def _outline(image: np.ndarray, stroke: int) -> None:
    """Draw black edges, without which white is invisible on white."""
    image[:stroke] = image[-stroke:] = image[:, :stroke] = image[:, -stroke:] = 0
