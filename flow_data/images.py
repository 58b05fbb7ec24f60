"""Pictures of a data set as RGB arrays, decoded by the quickest decoder that never hands out garbage in silence.

A file is damaged or truncated sooner or later in a data set of 80,000 frames, and the decoders differ in what they do
then: Pillow fills up a PNG whose pixel data ends early, torchvision may crash the process on a wrong checksum, OpenCV
turns pictures as EXIF says. So the checksums of a PNG's chunks are compared here, before any decoder sees them, and
only then are its pixels decoded: RGB by kornia-rs, which takes 0.4 of OpenCV's time (most of what a training sample
costs), and the rest by OpenCV. The former does not compare zlib's own checksum of the pixels: it would not notice that
a file was written wrong, with right checksums around wrong data. A PNG that is damaged where it holds no pixels is
decoded after zlib's checksum has proved the pixels complete (`flow_data.png_files`). Binary PPM is little but a
header. All else, JPEG too, is Pillow's.
"""

import contextlib
import io
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL.Image
from datasets import Image
from kornia_rs.io import decode_image_png_u8

from flow_data.file_limits import MAX_PIXELS, check_pixels
from flow_data.file_names import find_path
from flow_data.png_files import PNG_GREY, PNG_RGB, PNG_SIGNATURE, plain_png, read_png

PPM_HEADER = re.compile(rb"P6\s+(\d{1,8})\s+(\d{1,8})\s+255\s")  # a comment in it, or 16 bits: Pillow knows

SAMPLE_COLUMNS = ("id", "image1", "image2", "flow", "valid")
EVALUATION_COLUMNS = ("occlusion",)  # more, where there are any, that figures are divided by


def read_rgb(value: PIL.Image.Image | Mapping[str, Any], name: str) -> np.ndarray:
    """Decode one picture.

    Args:
        value: a PIL image; or, much faster, what is stored: `{"bytes", "path"}`. Bytes win; a path is a local file.
        name: errors are told with it, and with the path where there is one.

    Returns:
        `(H, W, 3)` uint8, RGB, writable; grey is repeated to three channels, an alpha channel is dropped, an EXIF
        orientation is not applied (flow belongs to the stored grid).

    Raises:
        ValueError: damaged, truncated, unknown, of enormous size, not 8-bit, or neither bytes nor path.
        OSError: the file cannot be read.
    """
    if isinstance(value, PIL.Image.Image):
        return to_rgb(value, name)
    data, path = value["bytes"], value["path"]
    if path is not None:
        name = f"{name} ({path})"
    if data is None:
        if path is None:
            raise ValueError(f"{name}: expected 'bytes' or 'path' of an image, received neither")
        data = Path(find_path(path)).read_bytes()
    if data.startswith(PNG_SIGNATURE):
        return _decode_png(data, name)
    header = PPM_HEADER.match(data)
    if header is not None:
        width, height = int(header[1]), int(header[2])
        check_pixels(name, width, height)
        if height * width * 3 == len(data) - header.end():
            pixels = np.frombuffer(data, np.uint8, offset=header.end())
            return pixels.reshape(height, width, 3).copy()  # a view of bytes would be read-only
    try:
        with warnings.catch_warnings():  # Pillow warns from half of its limit on
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            image = PIL.Image.open(io.BytesIO(data))
    except PIL.UnidentifiedImageError as error:
        raise ValueError(f"{name}: no image, or of a format that Pillow does not know") from error
    except PIL.Image.DecompressionBombError as error:
        raise ValueError(f"{name}: size must be 1 to at most {MAX_PIXELS} pixels; Pillow says: {error}") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{name}: damaged or unknown image: {error}") from error
    check_pixels(name, *image.size)  # Pillow's own limit may be switched off
    with image:
        return to_rgb(image, name)


def to_rgb(image: PIL.Image.Image, name: str) -> np.ndarray:
    """Turn a PIL image into an array, as `read_rgb` does, whose arguments, result and errors it has."""
    # "I;16" and the like would be cut or clipped by Pillow's conversion, without a word.
    if image.mode not in ("RGB", "RGBA", "L", "LA", "P"):
        raise ValueError(f"{name}: expected an 8-bit RGB or grey image, received Pillow mode {image.mode}")
    try:
        return np.array(image.convert("RGB"))  # a copy: np.asarray gives a read-only view
    except (OSError, SyntaxError, ValueError) as error:  # Pillow decodes as late as here
        raise ValueError(f"{name}: damaged or truncated image: {error}") from error


def undecoded(dataset: Any) -> Any:
    """The rows of a source with only what a sample and its evaluation need, and images left as stored.

    `read_rgb` decodes them, `flow_data.features.to_occlusion` the masks of occluded pixels.

    Args:
        dataset: a `datasets.Dataset` or `IterableDataset`. One without columns of images, as `synthetic`'s, which
            draws them when asked, is returned as it is.
    """
    features = getattr(dataset, "features", None)
    if features is None or not all(isinstance(features.get(key), Image) for key in ("image1", "image2")):
        return dataset
    dataset = dataset.select_columns([column for column in SAMPLE_COLUMNS + EVALUATION_COLUMNS if column in features])
    for key in ("image1", "image2", *EVALUATION_COLUMNS):
        if isinstance(features.get(key), Image):
            dataset = dataset.cast_column(key, Image(decode=False))
    return dataset


def _decode_png(data: bytes, name: str) -> np.ndarray:
    png = read_png(data, name)
    header = png.header
    height, width = header.height, header.width
    check_pixels(name, width, height)
    if header.depth > 8 or (header.depth, header.colour) == (1, PNG_GREY):  # the latter is a mask, Pillow's mode "1"
        raise ValueError(f"{name}: expected an 8-bit RGB or grey image, received a {header}")
    if not png.intact:
        data = plain_png(png, name)
    if header.colour == PNG_RGB:
        with contextlib.suppress(Exception):  # it knows neither interlacing nor EXIF; OpenCV has the last word
            return decode_image_png_u8(data, (height, width), "rgb")
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if pixels is None or pixels.shape != (height, width, 3):
        raise ValueError(f"{name}: damaged PNG: its pixel data cannot be decoded")
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)
