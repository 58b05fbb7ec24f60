"""`.flo`, the flow files of Middlebury, FlyingChairs and Sintel: float32, unknown flow is any |value| > 1e9."""

import struct

import numpy as np

from flow_data.formats.flow_format import FlowFormat, floating_range
from flow_data.formats.limits import check_size

MAGIC = b"PIEH"  # 202021.25 as a little-endian float32
UNKNOWN = 1e10  # what is written; anything beyond MAX_KNOWN is read as unknown


def decode(data: bytes, name: str) -> tuple[np.ndarray, None]:
    """Decode the content of a `.flo` file; see `FlowFormat`."""
    if data[:4] != MAGIC:
        raise ValueError(f"{name}: not a .flo file: it must begin with {MAGIC!r}; got {data[:4]!r}")
    if len(data) < 12:
        raise ValueError(f"{name}: truncated: the header must have 12 bytes; the file holds {len(data)}")
    width, height = struct.unpack_from("<ii", data, 4)
    check_size(name, width, height, 12 + 8 * width * height, len(data))
    return np.frombuffer(data, "<f4", offset=12).reshape(height, width, 2), None


def encode(flow: np.ndarray, valid: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Encode flow as the content of a `.flo` file; see `FlowFormat`."""
    height, width = valid.shape
    return MAGIC + struct.pack("<ii", width, height) + flow.tobytes(), valid


FORMAT = FlowFormat(".flo", MAGIC, decode, encode, UNKNOWN, floating_range(".flo"))
