"""KITTI's flow files (also HD1K's): 16-bit RGB PNG, steps of 1/64 pixel in [-512, 512).

Red is u, green v, blue is 0 where flow is unknown (KITTI's development kit). OpenCV reads and writes the pixels, since
Pillow cuts them to 8 bits.
"""

import numpy as np

from flow_data.formats.flow_format import FlowFormat
from flow_data.formats.png import PNG_RGB, plain_png, read_png
from flow_data.optional_packages import needs_extra

OFFSET, SCALE = 2**15, 64
KITTI_LIMITS = (-OFFSET / SCALE, (OFFSET - 1) / SCALE)  # pixels: -512 and 511.984375


def decode_kitti_png(data: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Decode the content of a KITTI flow file.

    Args:
        data: the whole file.
        name: begins the messages of errors.

    Returns:
        `(H, W, 2)` float32 flow in pixels, and `(H, W)` bool, True where it is known.

    Raises:
        ValueError: damaged, truncated, or another kind of PNG.
    """
    png = read_png(data, name)
    header = png.header
    if (header.depth, header.color) != (16, PNG_RGB):
        raise ValueError(f"{name}: not a flow: it must be a 16-bit RGB PNG; got a {header}")
    if header.interlace:
        raise ValueError(f"{name}: not a flow: a PNG must not be interlaced; got an interlaced one")
    with needs_extra("video"):
        import cv2
    codes = cv2.imdecode(np.frombuffer(plain_png(png, name), np.uint8), cv2.IMREAD_UNCHANGED)
    if codes is None or codes.dtype != np.uint16 or codes.shape != (header.height, header.width, 3):
        received = None if codes is None else f"{codes.dtype} {codes.shape}"
        raise ValueError(f"{name}: damaged PNG: its pixels must be uint16 (H, W, 3); decoded {received}")
    blue, green, red = cv2.split(codes)  # planes are much faster than slices of interleaved channels
    flow = cv2.merge([red, green]).astype(np.float32)
    flow -= OFFSET
    flow /= SCALE
    return flow, blue > 0


def encode_kitti_png(flow: np.ndarray, valid: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Encode flow as the content of a KITTI file, rounded to the nearest 1/64 pixel.

    Args:
        flow: `(H, W, 2)` float32, pixels. What is outside `KITTI_LIMITS` after rounding is written as unknown.
        valid: `(H, W)` bool; flow is finite where it is True.

    Returns:
        The whole file, and `(H, W)` bool, True where its flow is known.
    """
    codes = np.rint(np.where(valid[..., None], flow, np.float32(0)) * np.float32(SCALE)) + np.float32(OFFSET)  # exact
    valid = valid & ((codes >= 0) & (codes < 2**16)).all(axis=-1)
    codes = np.where(valid[..., None], codes, 0).astype(np.uint16)  # KITTI's own files: 0 in all three channels
    with needs_extra("video"):
        import cv2
    encoded, buffer = cv2.imencode(".png", np.dstack([valid.astype(np.uint16), codes[..., 1], codes[..., 0]]))
    if not encoded:
        raise ValueError(f"OpenCV cannot encode a PNG of {flow.shape[1]} x {flow.shape[0]}")
    return buffer.tobytes(), valid


FORMAT = FlowFormat(
    ".png",
    b"\x89PNG",
    decode_kitti_png,
    encode_kitti_png,
    None,
    f"KITTI PNG (range {KITTI_LIMITS[0]:.0f} to {KITTI_LIMITS[1]:.0f} px)",
)
