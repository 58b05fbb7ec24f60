"""Random augmentation of one sample: colours, erased patches, zoom and stretch, flips, crop.

First every parameter is drawn (flow_data/augmentation_recipe.py), from the generator that the caller passes and from
nothing else. Then they are applied, in the published order but only to what the crop will show: colours change and
patches vanish in the window of the frames that the crop comes from, and of the flow only the crop is flipped and
scaled. The result is that of whole frames, but for the rounding of colours (flow_data/colors.py). Samples are never
changed in place.

Shapes: `H W` frame, `h w` crop. Sizes are (height, width), flow is (x, y) in pixels.
"""

from typing import NamedTuple

import cv2
import numpy as np

from flow_data.augmentation_recipe import Augmentation, draw_dense, draw_sparse
from flow_data.colors import adjust_colors, mean_color, take_probe
from flow_data.features import FlowSample

MAX_DENSE_FLOW = 1000.0  # pixels; princeton-vl/RAFT, core/datasets.py
NEGLIGIBLE_WEIGHT = 1e-4  # the rounding of coordinates, to float32 in cv2.resize, gives neighbours weights below it


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
    return apply_dense(sample, draw_dense(rng, sample.valid.shape, crop_size, zoom_range, flip))


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
    return apply_sparse(sample, draw_sparse(rng, sample.valid.shape, crop_size, zoom_range, flip))


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
        # Pixel centres are mapped, (x + 0.5) * old / new - 0.5; this is its floor, in whole numbers.
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
        """New / old: what pictures really are scaled by, after rounding to whole pixels."""
        return self.new / self.old


def apply_dense(sample: FlowSample, augmentation: Augmentation) -> FlowSample:
    """Do to a sample with dense ground truth what was drawn; result as of `augment_dense`.

    The flow is interpolated. A pixel is valid where every pixel that it is interpolated from was, but for a weight of
    less than 1e-4; elsewhere flow is 0.

    Raises:
        ValueError: If the crop reaches outside the resized frame.
    """
    y, x = _spans(sample.valid.shape, augmentation)
    image1, image2 = _augment_images(sample, augmentation, y, x)
    flow = _flip(_resize_crop(sample.flow, y, x), augmentation)
    _scale_vectors(flow, augmentation, y, x)
    valid = np.ones(flow.shape[:2], bool)
    if not sample.valid[y.source, x.source].all():
        invalid = _resize_crop((~sample.valid).astype(np.float32), y, x)
        valid = _flip(invalid, augmentation) < NEGLIGIBLE_WEIGHT
        flow[~valid] = 0
    return FlowSample(image1, image2, *limit_flow(flow, valid, MAX_DENSE_FLOW))


def apply_sparse(sample: FlowSample, augmentation: Augmentation) -> FlowSample:
    """Do to a sample with sparse ground truth what was drawn; result as of `augment_sparse`.

    No flow is interpolated: each valid pixel moves to the pixel in which its centre lies after resizing. (The original
    rounds x * new / old, although its pictures are resized by pixel centres: its flow is off by up to half of
    new / old - 1 pixels.) Where several land on one place, the last in reading order stays.

    Raises:
        ValueError: If the crop reaches outside the resized frame.
    """
    y, x = _spans(sample.valid.shape, augmentation)
    image1, image2 = _augment_images(sample, augmentation, y, x)
    (window_y, place_y), (window_x, place_x) = _landing(y), _landing(x)
    size = y.length, x.length
    # Numbers of pixels rather than rows and columns, and vectors as complex numbers: a third of the time.
    moved = np.flatnonzero(sample.valid[window_y, window_x])
    places = np.add.outer(place_y * x.length, place_x).ravel()[moved]
    vectors = np.ascontiguousarray(sample.flow[window_y, window_x]).view(np.complex64).ravel()
    flow, valid = np.zeros(y.length * x.length, np.complex64), np.zeros(size, bool)
    flow[places] = vectors[moved]
    valid.ravel()[places] = True
    flow = _flip(flow.view(np.float32).reshape(*size, 2), augmentation)
    _scale_vectors(flow, augmentation, y, x)
    return FlowSample(image1, image2, flow, _flip(valid.view(np.uint8), augmentation).view(bool))


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


def _augment_images(sample: FlowSample, augmentation: Augmentation, y: Span, x: Span) -> tuple[np.ndarray, np.ndarray]:
    """Both frames, from colours to crop."""
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
    if (y.old, x.old) != (y.new, x.new):
        images = [_resize_crop(_at(image, window), y, x) for image in images]
    return _flip(images[0], augmentation), _flip(images[1], augmentation)


def _shift(patch: tuple[slice, slice], window: tuple[slice, slice]) -> tuple[slice, slice]:
    """The part of a patch in the window, counted from the window's corner."""
    rows, columns = (
        slice(max(part.start - whole.start, 0), max(part.stop - whole.start, 0))
        for part, whole in zip(patch, window, strict=True)
    )
    return rows, columns


def _at(image: np.ndarray, window: tuple[slice, slice]) -> np.ndarray:
    """The window at its place in a frame, of which everything outside is undefined."""
    rows, columns = window
    frame = np.empty((rows.stop, columns.stop, 3), np.uint8)
    frame[window] = image
    return frame


def _resize_crop(array: np.ndarray, y: Span, x: Span) -> np.ndarray:
    """Resize `(H, W)` or `(H, W, C)` bilinearly and crop.

    What is below and right of the crop is not resized. What is above and left is, unused: where the first pixel's
    centre comes to lie depends on the scale alone in `cv2.resize`, and its warps, which could start anywhere, round
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
    """The pixels of the frame whose centres come to lie in the crop, and in which of its pixels each does."""
    places = (2 * np.arange(span.old) + 1) * span.new // (2 * span.old)  # floor((x + 0.5) * new / old), exactly
    first, end = np.searchsorted(places, [span.start, span.start + span.length])
    return slice(first, end), places[first:end] - span.start
