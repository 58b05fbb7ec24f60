"""Random augmentation of one sample: color jitter, erased patches, zoom and stretch, flips, crop.

Source: RAFT (Teed and Deng, ECCV 2020; princeton-vl/RAFT, core/utils/augmentor.py). First every parameter is drawn,
from the generator that the caller passes and from nothing else. Then they are applied, in the published order but only
to what the crop will show: colors change and patches are erased in the window of the frames that the crop comes from,
and of the flow only the crop is flipped and scaled. The result is that of whole frames, but for the rounding of colors
(flow_data/color_jitter.py); `tests/plain_augmentation.py` states the same on whole frames. Samples are never changed
in place.

Shapes: `H W` frame, `h w` crop. Sizes are (height, width), flow is (x, y) in pixels.
"""

from typing import NamedTuple

import cv2
import numpy as np

from flow_data.color_jitter import Adjustments, JitterRange, adjust_colors, draw_adjustments, mean_color, take_probe
from flow_data.sample import MAX_ZOOM, FlowSample

# From princeton-vl/RAFT, core/utils/augmentor.py: FlowAugmentor (dense) and SparseFlowAugmentor (sparse).
DENSE_JITTER = JitterRange(0.4, 0.4, 0.4, 0.5 / 3.14)
SPARSE_JITTER = JitterRange(0.3, 0.3, 0.3, 0.3 / 3.14)
ASYMMETRIC_JITTER_PROBABILITY = 0.2  # dense only: the two frames get their own color jitter
ERASE_PROBABILITY = 0.5
ERASE_COUNT = (1, 2)  # rectangles, both ends included
ERASE_SIDE = (50, 100)  # pixels, the end excluded; of crops of ERASE_AREA and larger
ERASE_AREA = 368 * 496  # the smallest published crop; half of a crop of 96 x 128 would be erased by such patches
RESIZE_PROBABILITY = 0.8
STRETCH_PROBABILITY = 0.8  # dense only
MAX_STRETCH = 0.2  # log2, per axis
DENSE_CROP_SLACK = 8  # pixels that a resized frame is larger than the crop, at least
SPARSE_CROP_SLACK = 1
HORIZONTAL_FLIP_PROBABILITY = 0.5
VERTICAL_FLIP_PROBABILITY = 0.1  # dense only
SPARSE_CROP_MARGIN = (20, 50)  # y (below only), x (both sides): favors the borders, where the road is

MAX_DENSE_FLOW = 1000.0  # pixels; princeton-vl/RAFT, core/datasets.py
NEGLIGIBLE_WEIGHT = 1e-4  # the rounding of coordinates, to float32 in cv2.resize, gives neighbors weights below it


def augment_dense(
    sample: FlowSample,
    rng: np.random.Generator,
    crop_size: tuple[int, int],
    zoom_range: tuple[float, float],
    flip: bool = True,
    keep_without_photo_aug: bool = False,
) -> FlowSample:
    """Augment a sample whose ground truth is dense (Chairs, Things, Sintel, synthetic), or that has none.

    Args:
        sample: frames of any one size, smaller than the crop too; flow and `valid` are optional.
        rng: source of every random number.
        crop_size: (h, w) of the result, pixels.
        zoom_range: (lowest, highest) zoom, log2.
        flip: False switches both flips off.
        keep_without_photo_aug: also return both frames without photometric augmentation (color jitter and erased
            patches) but with the same zoom, flips and crop. A photometric loss compares these frames, as in UFlow
            (Jonschkowski et al., ECCV 2020) and SMURF (Stone et al., CVPR 2021), where they have this name.

    Returns:
        A sample of `crop_size` in fresh memory; `valid` leaves out flow of 1000 px and more. Flow and `valid` are None
        where the sample has no flow.

    Raises:
        ValueError: If the crop is smaller than 1 px, the zoom range is reversed, or the frames are empty.
    """
    augmentation = draw_dense(rng, sample.size, crop_size, zoom_range, flip)
    return apply_dense(sample, augmentation, keep_without_photo_aug)


def augment_sparse(
    sample: FlowSample,
    rng: np.random.Generator,
    crop_size: tuple[int, int],
    zoom_range: tuple[float, float],
    flip: bool = True,
    keep_without_photo_aug: bool = False,
) -> FlowSample:
    """Augment a sample whose ground truth is sparse (KITTI, HD1K): no interpolation, no stretch, no vertical flip.

    Arguments, result and errors are those of `augment_dense`, except that no flow is too large.
    """
    augmentation = draw_sparse(rng, sample.size, crop_size, zoom_range, flip)
    return apply_sparse(sample, augmentation, keep_without_photo_aug)


# ---- drawing ----


class Augmentation(NamedTuple):
    """What is done to a sample, in this order.

    Args:
        colors: Adjustments of frame 1 and of frame 2, or one list of them for both frames, which then are adjusted as
            one image: contrast is relative to the mean of both.
        patches: (y, x) slices of frame 2 that get its mean color; some reach beyond the lower or right border.
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
    """Draw what `augment_sparse` does to a frame of (height, width); the other arguments and errors are its own."""
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


# ---- applying ----


class Span(NamedTuple):
    """One axis of a crop of resized frames, before flipping.

    Args:
        old: Length of the frame, pixels.
        new: Length of the resized frame.
        start: First pixel of the crop in the resized frame.
        length: Of the crop.
    """

    old: int
    new: int
    start: int
    length: int

    @property
    def source(self) -> slice:
        """The pixels of the frame that the crop is interpolated from, and one more on each side."""
        if self.old == self.new:
            return self.crop
        ends = (self.start, self.start + self.length - 1)
        # Pixel centers are mapped, (x + 0.5) * old / new - 0.5; this is its floor, in whole numbers.
        first, last = (((2 * x + 1) * self.old - self.new) // (2 * self.new) for x in ends)
        stop = min(last + 3, self.old)
        if round(stop * self.scale) == stop:  # near a scale of 1; `cv2.resize` would just copy what keeps its size
            stop = self.old
        return slice(max(first - 1, 0), stop)

    @property
    def crop(self) -> slice:
        """The crop's place in the resized frame."""
        return slice(self.start, self.start + self.length)

    @property
    def scale(self) -> float:
        """New / old: what images are really scaled by, after rounding to whole pixels."""
        return self.new / self.old


def apply_dense(sample: FlowSample, augmentation: Augmentation, keep_without_photo_aug: bool = False) -> FlowSample:
    """Apply what was drawn to a sample with dense ground truth; the result is that of `augment_dense`.

    The flow is interpolated. A pixel is valid where every pixel that it is interpolated from was, but for a weight of
    less than 1e-4; elsewhere flow is 0.

    Raises:
        ValueError: If the crop reaches outside the resized frame.
    """
    y, x = _spans(sample.size, augmentation)
    augmented = _augment_images(sample, augmentation, y, x, keep_without_photo_aug)
    if sample.flow is None:
        return augmented
    flow = _flip(_resize_crop(sample.flow, y, x), augmentation)
    _scale_vectors(flow, augmentation, y, x)
    valid = np.ones(flow.shape[:2], bool)
    if sample.valid is not None and not sample.valid[y.source, x.source].all():
        invalid = _resize_crop((~sample.valid).astype(np.float32), y, x)
        valid = _flip(invalid, augmentation) < NEGLIGIBLE_WEIGHT
        flow[~valid] = 0
    flow, valid = limit_flow(flow, valid, MAX_DENSE_FLOW)
    return augmented._replace(flow=flow, valid=valid)


def apply_sparse(sample: FlowSample, augmentation: Augmentation, keep_without_photo_aug: bool = False) -> FlowSample:
    """Apply what was drawn to a sample with sparse ground truth; the result is that of `augment_sparse`.

    No flow is interpolated: each valid pixel moves to the pixel in which its center lies after resizing. (The original
    rounds x * new / old, although its images are resized by pixel centers: its flow is off by up to half of
    new / old - 1 pixels.) Where several land on one place, the last in reading order stays.

    Raises:
        ValueError: If the crop reaches outside the resized frame.
    """
    y, x = _spans(sample.size, augmentation)
    augmented = _augment_images(sample, augmentation, y, x, keep_without_photo_aug)
    if sample.flow is None:
        return augmented
    known = np.ones(sample.size, bool) if sample.valid is None else sample.valid
    (window_y, place_y), (window_x, place_x) = _landing(y), _landing(x)
    size = y.length, x.length
    # Indices of pixels rather than rows and columns, and vectors as complex numbers: a third of the time.
    moved = np.flatnonzero(known[window_y, window_x])
    places = np.add.outer(place_y * x.length, place_x).ravel()[moved]
    vectors = np.ascontiguousarray(sample.flow[window_y, window_x]).view(np.complex64).ravel()
    flow, valid = np.zeros(y.length * x.length, np.complex64), np.zeros(size, bool)
    flow[places] = vectors[moved]
    valid.ravel()[places] = True
    flow = _flip(flow.view(np.float32).reshape(*size, 2), augmentation)
    _scale_vectors(flow, augmentation, y, x)
    return augmented._replace(flow=flow, valid=_flip(valid.view(np.uint8), augmentation).view(bool))


def limit_flow(flow: np.ndarray, valid: np.ndarray, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """Declare flow invalid, and set it to 0, where a component reaches `limit` pixels or is not a number."""
    if -limit < flow.min() and flow.max() < limit:  # False where there is a NaN
        return flow, valid
    valid = valid & (np.abs(flow) < limit).all(axis=-1)
    return np.where(valid[..., None], flow, np.float32(0)), valid


def _spans(frame_size: tuple[int, int], augmentation: Augmentation) -> tuple[Span, Span]:
    """The axes y and x. A flip comes before the crop in the recipe: undone, it counts the crop from the other end."""
    _, _, size, flip_x, flip_y, offset, crop_size = augmentation
    spans = []
    for old, new, start, length, flipped in zip(frame_size, size, offset, crop_size, (flip_y, flip_x), strict=True):
        if start < 0 or start + length > new:
            raise ValueError(f"crop of {crop_size} at {offset} (y, x) reaches outside the frame of {size}")
        spans.append(Span(old, new, new - start - length if flipped else start, length))
    return spans[0], spans[1]


def _augment_images(
    sample: FlowSample, augmentation: Augmentation, y: Span, x: Span, keep_without_photo_aug: bool
) -> FlowSample:
    """Both frames, from color jitter to crop, in a sample without flow."""
    window = y.source, x.source
    images = [sample.image1[window], sample.image2[window]]
    probes = [take_probe(sample.image1), take_probe(sample.image2)]
    if len(augmentation.colors) == 1:  # as one tall image
        both, probe = adjust_colors(np.concatenate(images), augmentation.colors[0], np.concatenate(probes))
        images, probes = np.split(both, 2), np.split(probe, 2)
    else:
        for i, adjustments in enumerate(augmentation.colors):
            images[i], probes[i] = adjust_colors(images[i].copy(), adjustments, probes[i])
    for patch in augmentation.patches:
        images[1][_shift(patch, window)] = np.rint(mean_color(probes[1]))
    image1, image2 = (_move(image, augmentation, y, x) for image in images)
    if not keep_without_photo_aug:
        return FlowSample(image1, image2)
    originals = (_move(image[window], augmentation, y, x) for image in (sample.image1, sample.image2))
    return FlowSample(image1, image2, None, None, tuple(originals))


def _move(image: np.ndarray, augmentation: Augmentation, y: Span, x: Span) -> np.ndarray:
    """Zoom, crop and flip a frame, of which the window that the crop comes from is given."""
    if (y.old, x.old) != (y.new, x.new):
        image = _resize_crop(_at(image, (y.source, x.source)), y, x)
    return _flip(image, augmentation)


def _shift(patch: tuple[slice, slice], window: tuple[slice, slice]) -> tuple[slice, slice]:
    """The part of a patch in the window, counted from the window's corner."""
    rows, columns = (
        slice(max(part.start - whole.start, 0), max(part.stop - whole.start, 0))
        for part, whole in zip(patch, window, strict=True)
    )
    return rows, columns


def _at(image: np.ndarray, window: tuple[slice, slice]) -> np.ndarray:
    """Return a frame that has an image in a window; the pixels outside the window are undefined."""
    rows, columns = window
    frame = np.empty((rows.stop, columns.stop, 3), np.uint8)
    frame[window] = image
    return frame


def _resize_crop(array: np.ndarray, y: Span, x: Span) -> np.ndarray:
    """Resize `(H, W)` or `(H, W, C)` bilinearly and crop.

    What is below and right of the crop is not resized. What is above and left is, unused: where the first pixel's
    center comes to lie depends on the scale alone in `cv2.resize`, and its warps, which could start anywhere, round
    coordinates to 1/32 pixel.
    """
    if (y.old, x.old) != (y.new, x.new):
        array = array[: y.source.stop, : x.source.stop]
        array = cv2.resize(array, None, fx=x.scale, fy=y.scale, interpolation=cv2.INTER_LINEAR)
    return array[y.crop, x.crop]


def _flip(array: np.ndarray, augmentation: Augmentation) -> np.ndarray:
    """A mirrored, contiguous copy. Vectors keep their direction."""
    if augmentation.flip_x or augmentation.flip_y:
        return cv2.flip(array, -1 if augmentation.flip_x and augmentation.flip_y else int(augmentation.flip_x))
    return array.copy()


def _scale_vectors(flow: np.ndarray, augmentation: Augmentation, y: Span, x: Span) -> None:
    """Bring the vectors of `(h, w, 2)` flow, in place, into the resized and mirrored frame."""
    scale = np.array([-x.scale if augmentation.flip_x else x.scale, -y.scale if augmentation.flip_y else y.scale])
    rows = flow.reshape(len(flow), -1)  # a view; numpy is slow on a last axis of two
    rows *= np.tile(scale.astype(np.float32), flow.shape[1])


def _landing(span: Span) -> tuple[slice, np.ndarray]:
    """The pixels of the frame whose centers come to lie in the crop, and in which of its pixels each does."""
    places = (2 * np.arange(span.old) + 1) * span.new // (2 * span.old)  # floor((x + 0.5) * new / old), exactly
    first, end = np.searchsorted(places, [span.start, span.start + span.length])
    return slice(first, end), places[first:end] - span.start
