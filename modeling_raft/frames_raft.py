"""Convert frames of any kind to `(H, W, 3)` uint8 RGB. Every frame of prediction passes through this module.

Pillow decodes files. OpenCV decodes those that Pillow would cut to 8 bits (16-bit color) or cannot read (float color).

Every frame becomes 8-bit by a linear map of an intensity range `(low, high)` to 0..255. The range is a property of the
frames' type, never of one frame alone, since two frames that are scaled differently no longer match:

- 8-bit images: 0 to 255. 1-bit images and bool arrays: black and white.
- 16-bit images, and integer arrays with values outside 0..255: the smallest and the largest value of the first frames,
  which is both frames of a pair. Give 16-bit color images as paths or bytes: Pillow cuts them to 8 bits when it
  decodes them, so that a PIL image has all bits only until it is loaded.
- Float arrays: 0 to 1 or 0 to 255, recognized from the first frames. Values outside, NaN and infinities are refused.
- With an `intensity_range`: that range, for frames of any type.
"""

import os
import warnings
import zlib
from collections.abc import Sequence
from io import BytesIO
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import torch
from torch import Tensor
from transformers.utils import is_vision_available, logging

# Under such an `if`, transformers does not count an import among what everyone needs who loads a model.
if is_vision_available():
    import PIL.Image

logger = logging.get_logger(__name__)

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
KINDS = "a path, the bytes of an image file, a PIL image, an array or a tensor"
URL_PREFIXES = ("http://", "https://", "data:image/")
EXIF_ORIENTATION = 0x0112
# What turns stored rows and columns upright, for each value of the EXIF tag (CIPA DC-008, section 4.6.5): transpose,
# then flip rows, then flip columns.
ORIENTATIONS = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")  # Pillow's
PREMULTIPLIED_MODES = {"La": "LA", "RGBa": "RGBA"}
DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
FLOAT_TOLERANCE = 1e-3  # of the range: interpolation overshoots a little
FEW_LEVELS = 16  # of 255, between which most pixels lie: a hot pixel has stretched the range
AMBIGUOUS_MAXIMUM = 16.0  # floats up to here are either an overexposed 0..1 or an almost black 0..255


class FrameConverter:
    """Converts frames one after the other by the intensity range of the first ones.

    Args:
        intensity_range: (low, high) that becomes 0..255; None: chosen from the first frames, as the module says.
        do_rescale: False: float frames must be in 0..1, and integer frames are refused, as in an image processor whose
            input is rescaled already.
        input_data_format: `"channels_first"` or `"channels_last"`, for arrays whose shape fits both; None: last for
            arrays, first for tensors.

    Attributes:
        mapped_range: The intensity range in use, if it was given or chosen from 16-bit frames; None before the first
            frame, and for 8-bit and float frames.
    """

    def __init__(
        self,
        intensity_range: tuple[float, float] | None = None,
        do_rescale: bool = True,
        input_data_format: str | None = None,
    ):
        if intensity_range is not None:
            intensity_range = _check_intensity_range(intensity_range)
        if input_data_format not in (None, "channels_first", "channels_last"):
            raise ValueError(f"input_data_format must be channels_first or channels_last; got {input_data_format!r}")
        self.mapped_range = intensity_range
        self.do_rescale, self.input_data_format = do_rescale, input_data_format
        self._given = intensity_range
        self._ranges: dict[str, tuple[float, float]] = {}  # kind of frame -> its range

    def convert(self, frames: Sequence[Any], names: Sequence[str]) -> list[np.ndarray]:
        """Convert frames, of which the first call should hold two or more: their common range is used from then on.

        Args:
            frames: Paths, bytes of image files, PIL images, arrays or tensors: `(H, W)`, `(H, W, C)` or `(C, H, W)`,
                C being 1, 3 or 4. Images with an EXIF orientation are turned upright, transparency is dropped.
            names: What to call each frame in messages.

        Returns:
            Arrays `(H, W, 3)` uint8, RGB, which share no memory with the input.

        Raises:
            ValueError: A frame cannot be converted; the message names it and says why.
            OSError: A file cannot be read.
        """
        arrays = [read_frame(frame, name, self.input_data_format) for frame, name in zip(frames, names, strict=True)]
        if self._given is None and "integer" not in self._ranges:
            arrays = _narrow(arrays)
        kinds = [_kind(array) for array in arrays]
        self._choose_ranges(arrays, kinds, names)
        converted = [self._to_uint8(array, kind, name) for array, kind, name in zip(arrays, kinds, names, strict=True)]
        self._forget_flat_range()
        return converted

    def _choose_ranges(self, arrays: list[np.ndarray], kinds: list[str], names: Sequence[str]) -> None:
        if self._given is not None:
            for array, kind, name in zip(arrays, kinds, names, strict=True):
                if kind == "float":
                    _check_finite(array, name)
            self._ranges = dict.fromkeys(("uint8", "integer", "float"), self._given)
            return
        for array, kind, name in zip(arrays, kinds, names, strict=True):
            if not self.do_rescale and kind != "float":
                raise ValueError(f"with do_rescale=False, frames must be floats in 0..1; {name} is {array.dtype}")
        if "integer" in self._ranges.keys() | set(kinds) and len(self._ranges.keys() | set(kinds)) > 1:
            described = ", ".join(f"{name} is {array.dtype}" for name, array in zip(names, arrays, strict=True))
            raise ValueError(
                "all frames must have one depth, since a 16-bit and an 8-bit frame have no intensity range in common; "
                f"{described}. Convert one of them, or give intensity_range"
            )
        for kind in dict.fromkeys(kinds):
            if kind not in self._ranges:
                chosen = [index for index, other in enumerate(kinds) if other == kind]
                found = [arrays[index] for index in chosen], [names[index] for index in chosen]
                self._ranges[kind] = self._choose_range(kind, *found)

    def _forget_flat_range(self) -> None:
        """Forget the range of frames with a single value, as in a fade from black: later ones choose it."""
        low, high = self._ranges.get("integer", (0.0, 1.0))
        if low == high:
            del self._ranges["integer"]
            self.mapped_range = None

    def _choose_range(self, kind: str, arrays: list[np.ndarray], names: list[str]) -> tuple[float, float]:
        if kind == "float":
            return _float_range(arrays, names, unit_only=not self.do_rescale)
        if kind == "uint8":
            return 0.0, 255.0
        low, high = min(array.min() for array in arrays), max(array.max() for array in arrays)
        self.mapped_range = float(low), float(high)
        levels = _typical_levels(arrays, *self.mapped_range)
        few = f". Nearly all pixels lie within {levels:.1f} of 255 gray levels: a narrower range is needed"
        logger.warning_once(
            f"{names[0]} is {arrays[0].dtype}: intensities {low} to {high}, the range of the first frames, become 0 "
            f"to 255; give intensity_range to choose another range{few if low < high and levels < FEW_LEVELS else ''}"
        )
        return self.mapped_range

    def _to_uint8(self, array: np.ndarray, kind: str, name: str) -> np.ndarray:
        low, high = self._ranges[kind]
        if kind == "uint8" and (low, high) == (0, 255):
            return array
        if kind == "float" and self._given is None:
            _check_in_range(array, low, high, name)
        if array.size and (array.min() < low or array.max() > high) and kind == "integer":
            logger.warning_once(
                f"{name} has intensities outside {low:g} to {high:g}, the range of the first frames, which are "
                "clipped; give an intensity_range that holds all"
            )
        scale = 255 / (high - low) if high > low else 0.0
        values: Any = (array.astype(np.float64) - low) * scale
        return values.round().clip(0, 255).astype(np.uint8)


def _check_intensity_range(intensity_range: Any) -> tuple[float, float]:
    try:
        low, high = (float(bound) for bound in intensity_range)
    except (TypeError, ValueError):
        low = high = 0.0
    if not -np.inf < low < high < np.inf:
        raise ValueError(f"intensity_range must be two numbers (low, high), low below high; got {intensity_range!r}")
    return low, high


def _typical_levels(arrays: list[np.ndarray], low: float, high: float) -> float:
    """Count the gray levels between the 1st and 99th percentile of the values, if low to high become 255 levels."""
    lower, upper = np.percentile(np.concatenate([array[::4, ::4].ravel() for array in arrays]), [1, 99])
    return float((upper - lower) * 255 / (high - low)) if high > low else 0.0


def read_frames(frames: Sequence[Any], **options: Any) -> list[np.ndarray]:
    """Convert the frames of a pair to `(H, W, 3)` uint8 RGB; `options` are the arguments of `FrameConverter`."""
    names = [describe(frame, f"frame {number}") for number, frame in enumerate(frames, start=1)]
    return FrameConverter(**options).convert(frames, names)


def describe(frame: Any, name: str) -> str:
    """Return the name of a frame for messages, with its path if it has one."""
    return f"{name} ({os.fspath(frame)})" if isinstance(frame, (str, os.PathLike)) else name


def read_frame(frame: Any, name: str, input_data_format: str | None = None) -> np.ndarray:
    """Read one frame, upright, as `(H, W, 3)` in its own type and depth. The array shares no memory with the input.

    Args:
        frame: A frame of any kind, as `FrameConverter.convert` takes it; a path may be a URL.
        name: What to call it in messages.
        input_data_format: As `FrameConverter` takes it.

    Raises:
        ValueError: It is not one of the kinds of frames, or a file is damaged or of an unknown format.
        OSError: A file cannot be read.
    """
    if isinstance(frame, (str, os.PathLike)):
        return _decode(_read_file(os.fspath(frame), name), name)
    if isinstance(frame, (bytes, bytearray, memoryview)):
        return _decode(bytes(frame), name)
    if is_vision_available() and isinstance(frame, PIL.Image.Image):
        return _from_pil(frame, name)
    channels_last = input_data_format != "channels_first"
    if isinstance(frame, Tensor):
        channels_last = input_data_format == "channels_last"
        frame = frame.detach().cpu()
        try:
            frame = (frame.float() if frame.dtype in (torch.bfloat16, torch.float16) else frame).numpy()
        except (TypeError, RuntimeError, NotImplementedError) as error:  # sparse, quantized, without data
            raise ValueError(f"{name} is a tensor that cannot be made an array: {error}") from error
    if not isinstance(frame, np.ndarray):
        raise ValueError(f"{name} must be {KINDS}; got {type(frame).__name__}")
    return _from_array(frame, name, channels_last)


def _read_file(path: str, name: str) -> bytes:
    if path.lower().startswith(URL_PREFIXES):
        return _download(path, name)
    try:
        with open(path, "rb") as file:
            return file.read()
    except IsADirectoryError as error:
        raise IsADirectoryError(f"{name} is a folder; give the path of an image") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: no such file") from error
    except OSError as error:
        raise OSError(f"{name} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # a null character in the path
        raise ValueError(f"{name}: {error}") from error


def _download(url: str, name: str) -> bytes:
    try:
        request = Request(url, headers={"User-Agent": "Mozilla/5.0"})  # some servers refuse Python's own
        with urlopen(request, timeout=60) as response:
            return response.read()
    except (OSError, ValueError) as error:
        raise OSError(f"{name} cannot be downloaded: {error}") from error


def _decode(data: bytes, name: str) -> np.ndarray:
    """Decode the first image in the content of a file, upright."""
    if not data:
        raise ValueError(f"{name} is empty")
    if data.startswith(PNG_SIGNATURE):
        data = _without_comments(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about large images, which are expected; damage is an error
            image = PIL.Image.open(BytesIO(data))
    except PIL.UnidentifiedImageError as error:
        return _decode_by_opencv(
            data, name, f"{name} cannot be decoded: it is no image, of an unknown format, or damaged", error
        )
    except PIL.Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large to be decoded: {error}") from error
    except Exception as error:  # Pillow raises many types, and few of their messages name the file
        raise ValueError(f"{name} is damaged, or of a format that is not known: {error}") from error
    with image:
        return _from_pil(image, name, data)


def _without_comments(data: bytes) -> bytes:
    """Remove the ancillary chunks of a PNG (text, dates) except EXIF, since decoders stop at damaged ones.

    A chunk that is cut off is kept, so that the decoder sees that the file is cut off.
    """
    kept, position = [data[:8]], 8
    while position < len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        kind = data[position + 4 : position + 8]
        checksum = zlib.crc32(data[position + 4 : end - 4]).to_bytes(4, "big")
        if not kind[:1].islower() or (kind == b"eXIf" and data[end - 4 : end] == checksum):
            kept.append(data[position:end])
        if kind == b"IEND":
            break
        position = end
    return b"".join(kept)


def _from_pil(image: "PIL.Image.Image", name: str, data: bytes | None = None) -> np.ndarray:
    if _is_cut_to_8_bits(image):
        data = _content(image, name) if data is None else data
        pixels = _decode_by_opencv(data, name, f"{name} is a 16-bit color image that is damaged")
        if image.format == "TIFF":
            return pixels  # OpenCV has turned it upright
        image = PIL.Image.open(BytesIO(data))  # asked for its orientation, the caller's image would be decoded
        return _turn_upright(pixels, image)
    try:
        image.load()
    except Exception as error:  # of many types, whose messages do not name the file
        raise ValueError(f"{name} is damaged or cut off: {error}") from error
    return _turn_upright(_pil_to_array(image, name), image)  # Pillow turns a TIFF itself, and then drops its tag


def _turn_upright(pixels: np.ndarray, image: "PIL.Image.Image") -> np.ndarray:
    """Transpose and flip the stored rows and columns according to the EXIF orientation of the image."""
    try:
        orientation = int(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # damaged metadata do not make the pixels wrong
        orientation = 1
    if orientation not in ORIENTATIONS:
        return pixels
    transpose, flip_rows, flip_columns = ORIENTATIONS[orientation]
    pixels = pixels.swapaxes(0, 1) if transpose else pixels
    return np.ascontiguousarray(pixels[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1])


def _pil_to_array(image: "PIL.Image.Image", name: str) -> np.ndarray:
    if image.mode in DEEP_MODES:
        pixels = np.array(image)
        if image.mode == "I" and 0 <= pixels.min() and pixels.max() < 2**16:
            pixels = pixels.astype(np.uint16)  # a 16-bit file, which Pillow has in wider integers
        return _from_array(pixels, name, channels_last=True)
    if image.mode in PREMULTIPLIED_MODES:
        image = image.convert(PREMULTIPLIED_MODES[image.mode])
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # without the warning that Pillow gives otherwise
    if image.mode not in EIGHT_BIT_MODES:
        raise ValueError(f"{name} has Pillow's mode {image.mode}, which is no color or gray image")
    return _from_array(np.array(image.convert("RGB")), name, channels_last=True)


def _is_cut_to_8_bits(image: "PIL.Image.Image") -> bool:
    """Whether Pillow would silently cut a 16-bit color image to 8 bits when it decodes it."""
    tiles = getattr(image, "tile", None)  # none once it is decoded
    if image.mode in DEEP_MODES or not tiles:
        return False
    arguments = tiles[0][3]
    first, *rest = arguments if isinstance(arguments, tuple) else (arguments,)
    if image.format == "PPM":
        return bool(rest) and isinstance(rest[0], int) and rest[0] > 255
    if image.format == "JPEG2000":
        return _opencv() is not None and _decodes_to_16_bits(image)
    return ";16" in str(first)


def _decodes_to_16_bits(image: Any) -> bool:
    pixels = _imdecode(_content(image, "a JPEG 2000 image"))
    return pixels is not None and pixels.dtype == np.uint16


def _content(image: Any, name: str) -> bytes:
    """Read the file of an image that Pillow has opened and not yet decoded."""
    if image.tell() > 0:
        raise ValueError(f"{name} is a later page of a file of 16-bit color images; give its pixels as an array")
    try:
        position = image.fp.tell()
        image.fp.seek(0)
        data = image.fp.read()
        image.fp.seek(position)
    except (AttributeError, OSError, ValueError) as error:
        raise ValueError(f"{name} is a 16-bit color image whose file is closed; give its path") from error
    return data


def _decode_by_opencv(data: bytes, name: str, failure: str, cause: Exception | None = None) -> np.ndarray:
    """Decode pixels of any depth as they are stored."""
    if _opencv() is None:
        raise ValueError(f"{name} needs OpenCV to be decoded: pip install opencv-python-headless") from cause
    pixels = _imdecode(data)
    if pixels is None:
        raise ValueError(failure) from cause
    if pixels.ndim == 3 and pixels.shape[2] >= 3:
        pixels = pixels[..., [2, 1, 0]]  # OpenCV's order is BGR
    return _from_array(pixels, name, channels_last=True)


def _opencv() -> Any:
    """Return the module cv2, imported when the first image needs it; None where it is not installed."""
    try:  # in which transformers does not count an import among what everyone needs who loads a model
        import cv2
    except ImportError:
        return None
    return cv2


def _imdecode(data: bytes) -> np.ndarray | None:
    cv2 = _opencv()
    log: Any = getattr(cv2.utils, "logging", cv2)  # the functions are in cv2 itself before OpenCV 5
    level = log.getLogLevel()
    log.setLogLevel(0)  # silent: a file that it cannot decode must not print to stderr
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None
    finally:
        log.setLogLevel(level)


def _from_array(array: np.ndarray, name: str, channels_last: bool) -> np.ndarray:
    """Copy `(H, W)`, `(H, W, C)` or `(C, H, W)` of any numeric type to `(H, W, 3)` in native byte order."""
    if array.dtype.kind not in "buif":
        raise ValueError(f"{name} must hold real numbers; got {array.dtype}")
    if array.size == 0:
        raise ValueError(f"{name} is empty: its shape is {array.shape}")
    if array.ndim == 2:
        array = array[..., None]
    elif array.ndim == 3:
        fits_last, fits_first = array.shape[2] in (1, 3, 4), array.shape[0] in (1, 3, 4)
        if fits_first and not (fits_last and channels_last):
            array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise ValueError(f"{name} must be (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels; got {array.shape}")
    array = array[..., :3] if array.shape[2] == 4 else array
    if array.dtype.kind == "b":
        array = array.astype(np.uint8) * np.uint8(255)
    return np.array(np.broadcast_to(array, (*array.shape[:2], 3)), array.dtype.newbyteorder("="), order="C")


def _narrow(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Convert wider integers that hold 8-bit values to uint8, but not uint16, whose range is that of a 16-bit file."""
    wide = [array for array in arrays if _kind(array) == "integer"]
    if any(array.dtype == np.uint16 or array.min() < 0 or array.max() > 255 for array in wide):
        return arrays
    return [array.astype(np.uint8) if _kind(array) == "integer" else array for array in arrays]


def _kind(array: np.ndarray) -> str:
    if array.dtype.kind == "f":
        return "float"
    return "uint8" if array.dtype == np.uint8 else "integer"


def _check_finite(array: np.ndarray, name: str) -> None:
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must hold finite numbers; it has NaN or infinities. Replace them first")


def _float_range(arrays: list[np.ndarray], names: list[str], unit_only: bool) -> tuple[float, float]:
    """Recognize whether float frames are in 0..1 or 0..255."""
    for array, name in zip(arrays, names, strict=True):
        _check_finite(array, name)
    highest = max(float(array.max()) for array in arrays)
    if unit_only:
        return 0.0, 1.0
    if highest <= 1 + FLOAT_TOLERANCE:
        logger.warning_once(f"{names[0]} is {arrays[0].dtype} with values up to 1: taken as intensities in 0..1")
        return 0.0, 1.0
    if highest < AMBIGUOUS_MAXIMUM:
        raise ValueError(
            f"{names[0]}: float frames must be in 0..1 or 0..255; got values up to {highest:g}, which fit neither "
            "well. Rescale them, or give intensity_range"
        )
    for array, name in zip(arrays, names, strict=True):
        if 0 < array.max() <= 1 + FLOAT_TOLERANCE:
            raise ValueError(
                f"{name} seems to be in 0..1, and another frame in 0..255 (up to {highest:g}); bring both to one range"
            )
    return 0.0, 255.0


def _check_in_range(array: np.ndarray, low: float, high: float, name: str) -> None:
    _check_finite(array, name)
    margin = FLOAT_TOLERANCE * (high - low)
    lowest, highest = float(array.min()), float(array.max())
    if lowest < low - margin or highest > high + margin:
        raise ValueError(
            f"{name}: float frames must be in 0..1 or 0..255, all in the same; got values from {lowest:g} to "
            f"{highest:g}, where {low:g} to {high:g} was expected. Rescale them, or give intensity_range"
        )
