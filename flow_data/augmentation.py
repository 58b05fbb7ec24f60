"""Random augmentation of one sample: colours, erased patches, zoom and stretch, flips, crop.

The recipe is the published one of RAFT (Teed and Deng, ECCV 2020; princeton-vl/RAFT, core/utils/augmentor.py). Every
random number comes from the generator that the caller passes. A function draws parameters (`draw_*`), or applies them,
or does both where it takes a sample and a generator. Samples are never changed in place.

Shapes: `H W` frame, `h w` crop. Sizes are (height, width), flow is (x, y) in pixels.
"""

from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image
from torchvision.transforms import functional as F

from flow_data.features import FlowSample


class JitterRange(NamedTuple):
    """Half widths of what is drawn: factors around 1 for the first three, a turn around 0 for hue (1 = a circle)."""

    brightness: float
    contrast: float
    saturation: float
    hue: float


# All constants: princeton-vl/RAFT, core/utils/augmentor.py, FlowAugmentor (dense) and SparseFlowAugmentor (sparse).
DENSE_JITTER = JitterRange(0.4, 0.4, 0.4, 0.5 / 3.14)
SPARSE_JITTER = JitterRange(0.3, 0.3, 0.3, 0.3 / 3.14)
ASYMMETRIC_JITTER_PROBABILITY = 0.2  # dense only: the two frames get their own colours
ERASE_PROBABILITY = 0.5
ERASE_COUNT = (1, 2)  # rectangles, both ends included
ERASE_SIDE = (50, 100)  # pixels, the end excluded
RESIZE_PROBABILITY = 0.8
STRETCH_PROBABILITY = 0.8  # dense only
MAX_STRETCH = 0.2  # log2, per axis
DENSE_CROP_SLACK = 8  # pixels that a resized frame is larger than the crop, at least
SPARSE_CROP_SLACK = 1
HORIZONTAL_FLIP_PROBABILITY = 0.5
VERTICAL_FLIP_PROBABILITY = 0.1  # dense only
SPARSE_CROP_MARGIN = (20, 50)  # y (below only), x (both sides): favours the borders, where the road is
MAX_DENSE_FLOW = 1000.0  # pixels; from datasets.py of the same source

ADJUSTMENTS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "brightness": F.adjust_brightness,
    "contrast": F.adjust_contrast,
    "saturation": F.adjust_saturation,
    "hue": F.adjust_hue,
}


def augment_dense(
    sample: FlowSample,
    rng: np.random.Generator,
    crop_size: tuple[int, int],
    zoom_range: tuple[float, float],
    flip: bool = True,
) -> FlowSample:
    """Augment a sample whose ground truth is dense (Chairs, Things, Sintel, synthetic).

    Args:
        sample: Frames of any one size, smaller than the crop too.
        rng: Source of every random number.
        crop_size: (h, w) of the result, pixels.
        zoom_range: (lowest, highest) zoom, log2.
        flip: False switches both flips off.

    Returns:
        A sample of `crop_size` in fresh memory; `valid` leaves out flow of 1000 px and more.

    Raises:
        ValueError: If the crop is smaller than 1 px, the zoom range is reversed, or the frames are empty.
    """
    _check(sample, crop_size, zoom_range)
    sample = jitter_colors(sample, rng, DENSE_JITTER, ASYMMETRIC_JITTER_PROBABILITY)
    sample = erase_patches(sample, rng)
    sample = resize_dense(sample, draw_size_dense(rng, sample.valid.shape, crop_size, zoom_range))
    if flip and rng.random() < HORIZONTAL_FLIP_PROBABILITY:
        sample = flip_horizontal(sample)
    if flip and rng.random() < VERTICAL_FLIP_PROBABILITY:
        sample = flip_vertical(sample)
    sample = crop(sample, draw_offset_dense(rng, sample.valid.shape, crop_size), crop_size)
    return limit_flow(sample, MAX_DENSE_FLOW)


def augment_sparse(
    sample: FlowSample,
    rng: np.random.Generator,
    crop_size: tuple[int, int],
    zoom_range: tuple[float, float],
    flip: bool = True,
) -> FlowSample:
    """Augment a sample whose ground truth is sparse (KITTI, HD1K): no interpolation, no stretch, no vertical flip.

    Arguments, result and errors are those of `augment_dense`, except that no flow is too large.
    """
    _check(sample, crop_size, zoom_range)
    sample = jitter_colors(sample, rng, SPARSE_JITTER, asymmetric_probability=0.0)
    sample = erase_patches(sample, rng)
    sample = resize_sparse(sample, draw_size_sparse(rng, sample.valid.shape, crop_size, zoom_range))
    if flip and rng.random() < HORIZONTAL_FLIP_PROBABILITY:
        sample = flip_horizontal(sample)
    return crop(sample, draw_offset_sparse(rng, sample.valid.shape, crop_size), crop_size)


def draw_adjustments(rng: np.random.Generator, jitter: JitterRange) -> list[tuple[str, float]]:
    """Draw the four colour adjustments, as (name, factor) in the random order in which they are to be applied."""
    factors = [
        (name, rng.uniform(1 - width, 1 + width)) for name, width in zip(jitter._fields[:3], jitter, strict=False)
    ]
    factors.append(("hue", rng.uniform(-jitter.hue, jitter.hue)))
    return [factors[i] for i in rng.permutation(len(factors))]


def adjust_colors(image: np.ndarray, adjustments: list[tuple[str, float]]) -> np.ndarray:
    """Apply colour adjustments to an `(H, W, 3)` uint8 image, in the order given."""
    picture = Image.fromarray(image)  # on Pillow images this takes a quarter of the time it takes on tensors
    for name, factor in adjustments:
        if name != "hue" or factor != 0:  # a hue turn of 0 would still round every pixel to HSV and back
            picture = ADJUSTMENTS[name](picture, factor)
    return np.array(picture)


def jitter_colors(
    sample: FlowSample, rng: np.random.Generator, jitter: JitterRange, asymmetric_probability: float
) -> FlowSample:
    """Change the colours of both frames alike or, with `asymmetric_probability`, of each in its own way."""
    if rng.random() < asymmetric_probability:
        image1 = adjust_colors(sample.image1, draw_adjustments(rng, jitter))
        image2 = adjust_colors(sample.image2, draw_adjustments(rng, jitter))
    else:  # as one tall image, because contrast is relative to the mean of what it is given
        both = np.concatenate([sample.image1, sample.image2])
        image1, image2 = np.split(adjust_colors(both, draw_adjustments(rng, jitter)), 2)
    return sample._replace(image1=image1, image2=image2)


def draw_patches(rng: np.random.Generator, size: tuple[int, int]) -> list[tuple[slice, slice]]:
    """Draw the rectangles to erase in a frame of `size`, often none; some reach beyond the lower or right border."""
    if rng.random() >= ERASE_PROBABILITY:
        return []
    patches = []
    for _ in range(rng.integers(ERASE_COUNT[0], ERASE_COUNT[1] + 1)):
        top, left = rng.integers(0, size)
        height, width = rng.integers(*ERASE_SIDE, size=2)
        patches.append((slice(top, top + height), slice(left, left + width)))
    return patches


def erase_patches(sample: FlowSample, rng: np.random.Generator) -> FlowSample:
    """Hide parts of frame 2 under its mean colour, so that occlusion has to be bridged."""
    patches = draw_patches(rng, sample.valid.shape)
    if not patches:
        return sample
    image2 = sample.image2.copy()
    mean_color = np.array(cv2.mean(image2)[:3])
    for patch in patches:
        image2[patch] = mean_color
    return sample._replace(image2=image2)


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


def resize_dense(sample: FlowSample, size: tuple[int, int]) -> FlowSample:
    """Resize bilinearly to (height, width), the flow with it.

    Returns:
        A sample of `size`. A pixel is valid where every pixel that it is interpolated from was; elsewhere flow is 0.
    """
    if size == sample.valid.shape:
        return sample
    invalid = _resize_linear((~sample.valid).astype(np.float32), size) > 0
    flow = _resize_linear(sample.flow, size) * _scale(sample, size)
    flow[invalid] = 0
    return FlowSample(_resize_linear(sample.image1, size), _resize_linear(sample.image2, size), flow, ~invalid)


def resize_sparse(sample: FlowSample, size: tuple[int, int]) -> FlowSample:
    """Resize to (height, width): the images bilinearly, the flow by moving each valid pixel to x * new / old, rounded.

    Returns:
        A sample of `size` whose flow vectors are the old ones times new / old. Where two pixels land on one place, the
        later in reading order stays; a pixel that rounds to a place outside is dropped.
    """
    if size == sample.valid.shape:
        return sample
    rows, columns = np.nonzero(sample.valid)
    places, old = np.stack([rows, columns], axis=1), np.array(sample.valid.shape)
    moved = (2 * places * np.array(size) + old) // (2 * old)  # floor(place * new / old + 0.5), exact at the halves
    inside = (moved < size).all(axis=1)
    row, column = moved[inside].T
    flow, valid = np.zeros((*size, 2), np.float32), np.zeros(size, bool)
    flow[row, column] = sample.flow[sample.valid][inside] * _scale(sample, size)
    valid[row, column] = True
    return FlowSample(_resize_linear(sample.image1, size), _resize_linear(sample.image2, size), flow, valid)


def _resize_linear(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return cv2.resize(array, size[::-1], interpolation=cv2.INTER_LINEAR)


def _scale(sample: FlowSample, size: tuple[int, int]) -> np.ndarray:
    """New / old size as float32 (x, y): what the images really are scaled by, after rounding to whole pixels."""
    height, width = sample.valid.shape
    return np.array([size[1] / width, size[0] / height], np.float32)


def flip_horizontal(sample: FlowSample) -> FlowSample:
    """Mirror left and right; u changes its sign."""
    image1, image2, flow, valid = (array[:, ::-1] for array in sample)
    return FlowSample(image1, image2, flow * np.array([-1, 1], np.float32), valid)


def flip_vertical(sample: FlowSample) -> FlowSample:
    """Mirror top and bottom; v changes its sign."""
    image1, image2, flow, valid = (array[::-1] for array in sample)
    return FlowSample(image1, image2, flow * np.array([1, -1], np.float32), valid)


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


def crop(sample: FlowSample, offset: tuple[int, int], crop_size: tuple[int, int]) -> FlowSample:
    """Cut a window of (h, w) with the corner (top, left) out of all four arrays, as copies.

    Raises:
        ValueError: If the window reaches outside the frame.
    """
    (top, left), (height, width) = offset, crop_size
    frame = sample.valid.shape
    if top < 0 or left < 0 or top + height > frame[0] or left + width > frame[1]:
        raise ValueError(f"crop of {crop_size} at {offset} (y, x) reaches outside the frame of {frame}")
    return FlowSample(*(array[top : top + height, left : left + width].copy() for array in sample))


def limit_flow(sample: FlowSample, limit: float) -> FlowSample:
    """Declare flow invalid, and set it to 0, where a component reaches `limit` pixels or is not a number."""
    valid = sample.valid & (np.abs(sample.flow) < limit).all(axis=-1)
    return sample._replace(flow=np.where(valid[..., None], sample.flow, np.float32(0)), valid=valid)


def _check(sample: FlowSample, crop_size: tuple[int, int], zoom_range: tuple[float, float]) -> None:
    if min(crop_size) < 1:
        raise ValueError(f"crop_size must be (height, width) of at least 1 px each, got {crop_size}")
    if not zoom_range[0] <= zoom_range[1]:
        raise ValueError(f"zoom_range must be (lowest, highest) in log2, got {zoom_range}")
    if min(sample.valid.shape) < 1:
        raise ValueError(f"frames must have at least 1 px per side, got (height, width) {sample.valid.shape}")
