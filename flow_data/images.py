"""Images of a data set as RGB arrays, decoded by the fastest decoder that never returns wrong pixels silently.

A file is damaged or truncated sooner or later in a data set of 80,000 frames, and the decoders differ in what they do
then: Pillow fills up a PNG whose pixel data ends early, torchvision may crash the process on a wrong checksum, OpenCV
rotates images by their EXIF orientation. So the checksums of a PNG's chunks are compared here, before any decoder sees
them, and only then are its pixels decoded: RGB by kornia-rs, which takes 0.4 of OpenCV's time (most of what a training
sample costs), and the rest by OpenCV. kornia-rs does not compare zlib's own checksum of the pixels: it would not
notice that a file was written wrong, with right checksums around wrong data. A PNG that is damaged where it holds no
pixels is decoded after zlib's checksum has proved the pixels complete (`flow_data.formats.png`). Binary PPM is little
but a header. Everything else, JPEG too, is decoded by Pillow.
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
import PIL.TiffImagePlugin
from datasets import Image
from kornia_rs.io import decode_image_png_u8

from flow_data.file_names import find_path
from flow_data.formats.limits import MAX_PIXELS, check_pixels
from flow_data.formats.png import PNG_RGB, PNG_SIGNATURE, plain_png, read_png

PPM_HEADER = re.compile(
    rb"P6\s+(\d{1,8})\s+(\d{1,8})\s+255\s"
)  # a header with a comment, or 16 bits, is left to Pillow

EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")  # Pillow's
DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
FLOAT_TOLERANCE, AMBIGUOUS_MAXIMUM = 1e-3, 16.0  # as in modeling_raft.frames_raft
EXIF_ORIENTATION = 0x0112
FORMATS_CUT_TO_8_BITS = ("TIFF", "PPM", "JPEG2000")  # by Pillow, where they hold color of 16 bits

SAMPLE_COLUMNS = ("id", "image1", "image2", "flow", "valid")
EVALUATION_COLUMNS = ("occlusion",)  # further columns, by which metrics are divided where a data set has them


def read_pair(row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Decode both frames of a row.

    Frames become 8-bit as in prediction (`modeling_raft.frames_raft`): 16-bit frames of a pair by the range that both
    have in common, floats from 0..1 or 0..255. Unlike there, an EXIF orientation is not applied, since flow belongs to
    the stored grid.

    Args:
        row: `id`; `image1` and `image2` as `read_rgb` takes them.

    Returns:
        Two arrays `(H, W, 3)` uint8, RGB, writable.

    Raises:
        ValueError: as `read_rgb` raises it, or the frames have different depths. It names the row's id.
        OSError: a file cannot be read.
    """
    image1, image2 = (_read_image(row[key], f"{row['id']}: {key}") for key in ("image1", "image2"))
    if image1.dtype == image2.dtype == np.uint8:
        return image1, image2
    if image1.dtype != image2.dtype:
        raise ValueError(
            f"{row['id']}: both frames must have one depth; image1 is {image1.dtype}, image2 is {image2.dtype}"
        )
    low, high = min(image1.min(), image2.min()), max(image1.max(), image2.max())
    if image1.dtype.kind == "f":
        low, high = _float_range(image1, image2, row["id"])
    scale = 255 / (float(high) - float(low)) if high > low else 0.0
    image1, image2 = (
        ((image.astype(np.float64) - float(low)) * scale).round().clip(0, 255).astype(np.uint8)
        for image in (image1, image2)
    )
    return image1, image2


def _float_range(image1: np.ndarray, image2: np.ndarray, name: str) -> tuple[float, float]:
    """0..1 or 0..255, whichever float frames are in, by the rules of prediction.

    Raises:
        ValueError: neither, or one frame is in one and the other in the other.
    """
    highest = [float(image.max()) for image in (image1, image2)]
    lowest = min(float(image1.min()), float(image2.min()))
    if not (np.isfinite(image1).all() and np.isfinite(image2).all()):
        raise ValueError(f"{name}: float frames must hold finite numbers; they have NaN or infinities")
    unit = max(highest) <= 1 + FLOAT_TOLERANCE
    mixed = not unit and any(0 < value <= 1 + FLOAT_TOLERANCE for value in highest)
    bound = 1 if unit else 255
    fits = -FLOAT_TOLERANCE * bound <= lowest and max(highest) <= bound * (1 + FLOAT_TOLERANCE)
    if not fits or mixed or (not unit and max(highest) < AMBIGUOUS_MAXIMUM):
        raise ValueError(
            f"{name}: both float frames must be in 0..1 or both in 0..255; got values from {lowest:g} to "
            f"{highest[0]:g} in image1 and {highest[1]:g} in image2"
        )
    return 0.0, float(bound)


def read_rgb(value: PIL.Image.Image | Mapping[str, Any], name: str) -> np.ndarray:
    """Decode one 8-bit image.

    Args:
        value: a PIL image; or, much faster, what is stored: `{"bytes", "path"}`. Bytes win; a path is a local file.
        name: of the image in messages, beside the path where there is one.

    Returns:
        `(H, W, 3)` uint8, RGB, writable; gray is repeated to three channels, an alpha channel is dropped, an EXIF
        orientation is not applied.

    Raises:
        ValueError: damaged, truncated, unknown, of enormous size, not 8-bit, or neither bytes nor path.
        OSError: the file cannot be read.
    """
    image = _read_image(value, name)
    if image.dtype != np.uint8:
        raise ValueError(f"{name}: an image must have 8 bits; got {image.dtype}")
    return image


def _read_image(value: PIL.Image.Image | Mapping[str, Any], name: str) -> np.ndarray:
    """Decode one image as `read_rgb` does, but of any depth."""
    if isinstance(value, PIL.Image.Image):
        return _from_pil(value, name)
    data, path = value["bytes"], value["path"]
    if path is not None:
        name = f"{name} ({path})"
    if data is None:
        if path is None:
            raise ValueError(f"{name}: an image must have 'bytes' or 'path'; got neither")
        data = Path(find_path(path)).read_bytes()
    if data.startswith(PNG_SIGNATURE):
        return _decode_png(data, name)
    header = PPM_HEADER.match(data)
    if header is not None:
        width, height = int(header[1]), int(header[2])
        check_pixels(name, width, height)
        if height * width * 3 == len(data) - header.end():
            stored = np.frombuffer(data, np.uint8, offset=header.end())
            return stored.reshape(height, width, 3).copy()  # a view of bytes would be read-only
    try:
        with warnings.catch_warnings():  # Pillow warns from half of its limit on
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            image = PIL.Image.open(io.BytesIO(data))
    except PIL.UnidentifiedImageError as error:
        if (pixels := _decode_deep(data)) is not None:  # floats in three channels
            return _turn_back(pixels, _tiff_orientation(data))
        raise ValueError(f"{name}: no image, or of a format that is not known") from error
    except PIL.Image.DecompressionBombError as error:
        raise ValueError(f"{name}: size must be 1 to at most {MAX_PIXELS} pixels; Pillow says: {error}") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{name}: damaged or unknown image: {error}") from error
    check_pixels(name, *image.size)  # Pillow's own limit may be switched off
    with image:
        pixels = _decode_deep(data) if image.format in FORMATS_CUT_TO_8_BITS else None
        pixels = _from_pil(image, name) if pixels is None else pixels
        return _turn_back(pixels, _tiff_orientation(data))


def _tiff_orientation(data: bytes) -> int:
    """The EXIF orientation of a TIFF, 1 for any other file."""
    if not data.startswith((b"II*\0", b"MM\0*")):
        return 1
    tags = PIL.TiffImagePlugin.ImageFileDirectory_v2(data[:8])
    file = io.BytesIO(data)
    file.seek(tags.next)
    tags.load(file)
    return tags.get(EXIF_ORIENTATION, 1)


def _turn_back(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """The rows and columns of a TIFF as they are stored: Pillow and OpenCV rotate it by its orientation."""
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    return np.ascontiguousarray(pixels)


def _from_pil(image: PIL.Image.Image, name: str) -> np.ndarray:
    if image.mode not in EIGHT_BIT_MODES + DEEP_MODES:
        raise ValueError(f"{name}: an image must be color or gray; got Pillow's mode {image.mode}")
    try:
        if image.mode in DEEP_MODES:
            return _as_rgb(np.array(image))
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # without the warning that Pillow gives otherwise
        return np.array(image.convert("RGB"))  # a copy: np.asarray gives a read-only view
    except (OSError, SyntaxError, ValueError) as error:  # Pillow decodes as late as here
        raise ValueError(f"{name}: damaged or truncated image: {error}") from error


def _decode_deep(data: bytes) -> np.ndarray | None:
    """Pixels of more than 8 bits as OpenCV decodes them; None where it cannot, or where they have 8 bits."""
    log: Any = getattr(cv2.utils, "logging", cv2)  # the functions are in cv2 itself before OpenCV 5
    level = log.getLogLevel()
    log.setLogLevel(0)  # silent: Pillow reports what is wrong with a file that OpenCV cannot decode
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None
    finally:
        log.setLogLevel(level)
    if pixels is None or pixels.dtype == np.uint8:
        return None
    return _as_rgb(pixels if pixels.ndim == 2 else pixels[..., [2, 1, 0]])  # OpenCV's order is BGR


def _as_rgb(pixels: np.ndarray) -> np.ndarray:
    """`(H, W)` or `(H, W, 3)` as `(H, W, 3)`; what Pillow has in wider integers than 16 bits becomes uint16."""
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    if pixels.dtype == np.int32 and 0 <= pixels.min() and pixels.max() < 2**16:
        pixels = pixels.astype(np.uint16)
    return np.ascontiguousarray(pixels, pixels.dtype.newbyteorder("="))


def disable_image_decoding(dataset: Any) -> Any:
    """Select the columns that a sample and its evaluation need, and leave images as stored.

    `read_rgb` decodes them, `flow_data.features.to_occlusion` the masks of occluded pixels.

    Args:
        dataset: a `datasets.Dataset` or `IterableDataset`. One without columns of images, as `synthetic`'s, which
            draws them when accessed, is returned unchanged.
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
    if not png.intact:
        data = plain_png(png, name)
    if header.depth > 8:
        deep = _decode_deep(data)
        if deep is None or deep.shape != (height, width, 3):
            raise ValueError(f"{name}: damaged PNG: its pixel data cannot be decoded")
        return deep
    if header.color == PNG_RGB:
        with contextlib.suppress(Exception):  # it supports neither interlacing nor EXIF; then OpenCV decodes
            return decode_image_png_u8(data, (height, width), "rgb")
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if pixels is None or pixels.shape != (height, width, 3):
        raise ValueError(f"{name}: damaged PNG: its pixel data cannot be decoded")
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)
