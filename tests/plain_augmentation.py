"""The published augmentation in the plain way: whole frames, step by step, with Pillow.

The oracle of `flow_data.augmentation`, which does the same to the part of the frames that the crop shows, and the
baseline of `benchmarks.bench_data`. Here every step is the obvious one on whole frames, in the published order.
Parameters are those that `flow_data.augmentation` draws, so that both can be given the same.
"""

from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image
from torchvision.transforms import functional as F

from flow_data.augmentation import MAX_DENSE_FLOW, Augmentation
from flow_data.color_jitter import Adjustments
from flow_data.sample import FlowSample

ADJUSTMENTS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "brightness": F.adjust_brightness,
    "contrast": F.adjust_contrast,
    "saturation": F.adjust_saturation,
    "hue": F.adjust_hue,
}


def apply_plainly(sample: FlowSample, augmentation: Augmentation, sparse: bool) -> FlowSample:
    """Apply what was drawn to a sample, as `apply_dense` or `apply_sparse` does."""
    image1, image2 = jitter(sample.image1, sample.image2, augmentation.colors)
    image2 = erase(image2, augmentation.patches)
    sample = sample._replace(image1=image1, image2=image2)
    if augmentation.size != sample.valid.shape:
        sample = (resize_sparse if sparse else resize_dense)(sample, augmentation.size)
    if augmentation.flip_x:
        sample = _map(sample, lambda array: array[:, ::-1])
        sample = sample._replace(flow=sample.flow * [-1.0, 1.0])
    if augmentation.flip_y:
        sample = _map(sample, lambda array: array[::-1])
        sample = sample._replace(flow=sample.flow * [1.0, -1.0])
    (top, left), (height, width) = augmentation.offset, augmentation.crop_size
    sample = _map(sample, lambda array: array[top : top + height, left : left + width])
    flow, valid = sample.flow.astype(np.float32), sample.valid
    if not sparse:
        valid = valid & (np.abs(flow[..., 0]) < MAX_DENSE_FLOW) & (np.abs(flow[..., 1]) < MAX_DENSE_FLOW)
    flow = np.where(valid[..., None], flow, np.float32(0))
    return _map(FlowSample(sample.image1, sample.image2, flow, valid), np.ascontiguousarray)


def _map(sample: FlowSample, function: Callable[[np.ndarray], np.ndarray]) -> FlowSample:
    """Apply a function to both frames, flow and `valid`."""
    image1, image2, flow, valid = map(function, sample[:4])  # type: ignore[arg-type]
    return FlowSample(image1, image2, flow, valid)


def jitter(image1: np.ndarray, image2: np.ndarray, colors: tuple[Adjustments, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Adjust the colors of both frames as one image, or of each in its own way."""
    if len(colors) == 2:
        return adjust(image1, colors[0]), adjust(image2, colors[1])
    both = adjust(np.concatenate([image1, image2]), colors[0])
    return both[: len(image1)], both[len(image1) :]


def adjust(image: np.ndarray, adjustments: Adjustments) -> np.ndarray:
    """Apply color adjustments with torchvision's functions on Pillow images."""
    result = Image.fromarray(image)
    for name, factor in adjustments:
        if name != "hue" or factor != 0:  # a turn of 0 would still round every pixel to HSV and back
            result = ADJUSTMENTS[name](result, factor)
    return np.array(result)


def erase(image: np.ndarray, patches: list[tuple[slice, slice]]) -> np.ndarray:
    """Fill rectangles with the image's mean color."""
    erased = image.copy()
    for patch in patches:
        erased[patch] = np.rint(image.reshape(-1, 3).mean(axis=0))
    return erased


def resize_dense(sample: FlowSample, size: tuple[int, int]) -> FlowSample:
    """Resize everything bilinearly; a pixel is valid where all that it is interpolated from was."""
    invalid = resize((~sample.valid).astype(np.float32), size) >= 1e-4
    flow = resize(sample.flow, size) * _scale(sample, size)
    return FlowSample(resize(sample.image1, size), resize(sample.image2, size), flow, ~invalid)


def resize_sparse(sample: FlowSample, size: tuple[int, int]) -> FlowSample:
    """Resize the images bilinearly and move each valid pixel to the pixel in which its center lies afterwards."""
    rows, columns = np.nonzero(sample.valid)
    row = ((2 * rows + 1) * size[0]) // (2 * sample.valid.shape[0])
    column = ((2 * columns + 1) * size[1]) // (2 * sample.valid.shape[1])
    flow, valid = np.zeros((*size, 2), np.float32), np.zeros(size, bool)
    flow[row, column] = sample.flow[rows, columns] * _scale(sample, size)
    valid[row, column] = True
    return FlowSample(resize(sample.image1, size), resize(sample.image2, size), flow, valid)


def resize(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return cv2.resize(array, size[::-1], interpolation=cv2.INTER_LINEAR)


def _scale(sample: FlowSample, size: tuple[int, int]) -> np.ndarray:
    return np.array([size[1] / sample.valid.shape[1], size[0] / sample.valid.shape[0]], np.float32)
