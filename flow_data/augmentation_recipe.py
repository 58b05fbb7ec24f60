"""What the augmentation of one sample is: the published recipe's numbers, and how parameters are drawn from them.

Source: RAFT (Teed and Deng, ECCV 2020; princeton-vl/RAFT, core/utils/augmentor.py). Every random number comes from the
generator that the caller passes. Sizes are (height, width) in pixels.
"""

from typing import NamedTuple

import numpy as np

from flow_data.colors import Adjustments, JitterRange, draw_adjustments

# All constants: princeton-vl/RAFT, core/utils/augmentor.py, FlowAugmentor (dense) and SparseFlowAugmentor (sparse).
DENSE_JITTER = JitterRange(0.4, 0.4, 0.4, 0.5 / 3.14)
SPARSE_JITTER = JitterRange(0.3, 0.3, 0.3, 0.3 / 3.14)
ASYMMETRIC_JITTER_PROBABILITY = 0.2  # dense only: the two frames get their own colours
ERASE_PROBABILITY = 0.5
ERASE_COUNT = (1, 2)  # rectangles, both ends included
ERASE_SIDE = (50, 100)  # pixels, the end excluded; of crops of ERASE_AREA and larger
ERASE_AREA = 368 * 496  # the smallest published crop; half of a crop of 96 x 128 would vanish behind such patches
RESIZE_PROBABILITY = 0.8
STRETCH_PROBABILITY = 0.8  # dense only
MAX_ZOOM = 5  # log2; a misread range would ask for frames that no memory holds
MAX_STRETCH = 0.2  # log2, per axis
DENSE_CROP_SLACK = 8  # pixels that a resized frame is larger than the crop, at least
SPARSE_CROP_SLACK = 1
HORIZONTAL_FLIP_PROBABILITY = 0.5
VERTICAL_FLIP_PROBABILITY = 0.1  # dense only
SPARSE_CROP_MARGIN = (20, 50)  # y (below only), x (both sides): favours the borders, where the road is


class Augmentation(NamedTuple):
    """What is done to a sample, in this order.

    Args:
        colors: Adjustments of frame 1 and of frame 2, or one list of them for both frames, which then are adjusted as
            one picture: contrast is relative to the mean of both.
        patches: (y, x) slices of frame 2 that get its mean colour; some reach beyond the lower or right border.
        size: (height, width) to resize to, the frame's own for no resizing.
        flip_x: Mirror left and right.
        flip_y: Mirror top and bottom.
        offset: (top, left) of the crop.
        crop_size: (h, w).
    """

    colors: tuple[Adjustments, ...]
    patches: list[tuple[slice, slice]]
    size: tuple[int, int]
    flip_x: bool
    flip_y: bool
    offset: tuple[int, int]
    crop_size: tuple[int, int]


def draw_dense(
    rng: np.random.Generator,
    frame_size: tuple[int, int],
    crop_size: tuple[int, int],
    zoom_range: tuple[float, float],
    flip: bool = True,
) -> Augmentation:
    """Draw what `augment_dense` does to a frame of (height, width); the other arguments and errors are its own."""
    _check(frame_size, crop_size, zoom_range)
    ways = 2 if rng.random() < ASYMMETRIC_JITTER_PROBABILITY else 1
    colors = tuple(draw_adjustments(rng, DENSE_JITTER) for _ in range(ways))
    patches = draw_patches(rng, frame_size, crop_size)
    size = draw_size_dense(rng, frame_size, crop_size, zoom_range)
    return Augmentation(
        colors=colors,
        patches=patches,
        size=size,
        flip_x=flip and rng.random() < HORIZONTAL_FLIP_PROBABILITY,
        flip_y=flip and rng.random() < VERTICAL_FLIP_PROBABILITY,
        offset=draw_offset_dense(rng, size, crop_size),
        crop_size=crop_size,
    )


def draw_sparse(
    rng: np.random.Generator,
    frame_size: tuple[int, int],
    crop_size: tuple[int, int],
    zoom_range: tuple[float, float],
    flip: bool = True,
) -> Augmentation:
    """Draw what `augment_sparse` does, as `draw_dense`."""
    _check(frame_size, crop_size, zoom_range)
    colors = (draw_adjustments(rng, SPARSE_JITTER),)
    patches = draw_patches(rng, frame_size, crop_size)
    size = draw_size_sparse(rng, frame_size, crop_size, zoom_range)
    return Augmentation(
        colors=colors,
        patches=patches,
        size=size,
        flip_x=flip and rng.random() < HORIZONTAL_FLIP_PROBABILITY,
        flip_y=False,
        offset=draw_offset_sparse(rng, size, crop_size),
        crop_size=crop_size,
    )


def draw_patches(
    rng: np.random.Generator, size: tuple[int, int], crop_size: tuple[int, int]
) -> list[tuple[slice, slice]]:
    """Draw the rectangles to erase in a frame of `size`, often none; some reach beyond the lower or right border.

    For crops smaller than the published ones they are smaller in proportion.
    """
    if rng.random() >= ERASE_PROBABILITY:
        return []
    shrink = min(1.0, np.sqrt(crop_size[0] * crop_size[1] / ERASE_AREA))
    patches = []
    for _ in range(rng.integers(ERASE_COUNT[0], ERASE_COUNT[1] + 1)):
        top, left = rng.integers(0, size)
        height, width = np.ceil(rng.integers(*ERASE_SIDE, size=2) * shrink).astype(int).tolist()
        patches.append((slice(top, top + height), slice(left, left + width)))
    return patches


def draw_size_dense(
    rng: np.random.Generator, size: tuple[int, int], crop_size: tuple[int, int], zoom_range: tuple[float, float]
) -> tuple[int, int]:
    """Draw the (height, width) to resize to: zoom and stretch, or often none, and always room for the crop."""
    scale = np.full(2, 2.0 ** rng.uniform(*zoom_range))
    if rng.random() < STRETCH_PROBABILITY:
        scale *= 2.0 ** rng.uniform(-MAX_STRETCH, MAX_STRETCH, size=2)
    return _size_or_none(rng, size, crop_size, scale, DENSE_CROP_SLACK)


def draw_size_sparse(
    rng: np.random.Generator, size: tuple[int, int], crop_size: tuple[int, int], zoom_range: tuple[float, float]
) -> tuple[int, int]:
    """Draw the (height, width) to resize to, as `draw_size_dense` but without stretch and with less room."""
    scale = np.full(2, 2.0 ** rng.uniform(*zoom_range))
    return _size_or_none(rng, size, crop_size, scale, SPARSE_CROP_SLACK)


def _size_or_none(
    rng: np.random.Generator, size: tuple[int, int], crop_size: tuple[int, int], scale: np.ndarray, slack: int
) -> tuple[int, int]:
    """The scaled size in RESIZE_PROBABILITY of the cases and wherever the crop does not fit, else the old one."""
    fits = size[0] >= crop_size[0] and size[1] >= crop_size[1]
    if rng.random() >= RESIZE_PROBABILITY and fits:
        return size
    least = max((crop_size[0] + slack) / size[0], (crop_size[1] + slack) / size[1])
    height, width = (round(old * max(factor, least)) for old, factor in zip(size, scale, strict=True))
    return height, width


def draw_offset_dense(rng: np.random.Generator, size: tuple[int, int], crop_size: tuple[int, int]) -> tuple[int, int]:
    """Draw the (top, left) of a crop, each that fits equally likely."""
    top, left = (int(rng.integers(0, old - new + 1)) for old, new in zip(size, crop_size, strict=True))
    return top, left


def draw_offset_sparse(rng: np.random.Generator, size: tuple[int, int], crop_size: tuple[int, int]) -> tuple[int, int]:
    """Draw the (top, left) of a crop with margins, then clip it into the frame: most borders are likelier."""
    last_top, last_left = size[0] - crop_size[0], size[1] - crop_size[1]
    margin_y, margin_x = SPARSE_CROP_MARGIN
    top = rng.integers(0, last_top + margin_y)
    left = rng.integers(-margin_x, last_left + margin_x)
    return int(np.clip(top, 0, last_top)), int(np.clip(left, 0, last_left))


def _check(frame_size: tuple[int, int], crop_size: tuple[int, int], zoom_range: tuple[float, float]) -> None:
    if min(crop_size) < 1:
        raise ValueError(f"crop_size must be (height, width) of at least 1 px each; got {crop_size}")
    if not -MAX_ZOOM <= zoom_range[0] <= zoom_range[1] <= MAX_ZOOM:
        raise ValueError(f"zoom_range must be (lowest, highest) in log2, within +-{MAX_ZOOM}; got {zoom_range}")
    if min(frame_size) < 1:
        raise ValueError(f"frames must have at least 1 px per side; got (height, width) {frame_size}")
