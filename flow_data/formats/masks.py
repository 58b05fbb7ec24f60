"""Masks of pixels as files: gray PNG of any depth, and NumPy arrays.

A mask is `(H, W)` bool. In a file, a pixel is True where it is not 0.
"""

from pathlib import PurePath

import numpy as np

from flow_data.formats.numpy_files import decode_npy
from flow_data.formats.png import PNG_GRAY, PNG_PALETTE, plain_png, read_png
from flow_data.optional_packages import needs_extra


def decode_mask(data: bytes, name: str) -> np.ndarray:
    """Decode the content of a mask file.

    Args:
        data: the whole file: `.npy` (bool or integers) or, whatever its suffix, a PNG, gray or of palette indices (the
            index counts, not its color).
        name: file name or path; it begins the messages of errors.

    Returns:
        `(H, W)` bool, True where the file is not 0.

    Raises:
        ValueError: damaged, truncated, too long, or no mask.
    """
    if PurePath(name).suffix.lower() == ".npy":
        values = decode_npy(data, name, kinds="biu")
        if values.ndim != 2:
            raise ValueError(f"{name}: not a mask: the shape must be (H, W); got {values.shape}")
        return values != 0
    png = read_png(data, name)
    header = png.header
    if header.color not in (PNG_GRAY, PNG_PALETTE):
        raise ValueError(f"{name}: not a mask: a PNG must be gray; got a {header}")
    if header.interlace:
        raise ValueError(f"{name}: not a mask: a PNG must not be interlaced; got an interlaced one")
    indices = png._replace(header=header._replace(color=PNG_GRAY), palette=b"")
    with needs_extra("video"):
        import cv2
    pixels = cv2.imdecode(np.frombuffer(plain_png(indices, name), np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.shape != (header.height, header.width):
        raise ValueError(f"{name}: damaged PNG: it must decode as a {header} of {header.width} x {header.height}")
    return pixels != 0


def encode_mask(mask: np.ndarray) -> bytes:
    """Encode `(H, W)` bool as an 8-bit gray PNG of 0 and 255.

    Raises:
        ValueError: another type or shape.
    """
    if not isinstance(mask, np.ndarray) or mask.dtype != bool or mask.ndim != 2 or 0 in mask.shape:
        received = f"{mask.dtype} {mask.shape}" if isinstance(mask, np.ndarray) else type(mask).__name__
        raise ValueError(f"a mask must be of type bool and shape (H, W); got {received}")
    with needs_extra("video"):
        import cv2
    encoded, buffer = cv2.imencode(".png", mask.astype(np.uint8) * 255)
    if not encoded:
        raise ValueError(f"OpenCV cannot encode a PNG of {mask.shape[1]} x {mask.shape[0]}")
    return buffer.tobytes()
