"""`.pfm`, the flow files of FlyingThings3D: float32, either byte order, rows bottom-up, three channels.

The first two channels are the flow, the third is unused. CRLF, blanks and comments in the header are read.
"""

import math
import re

import numpy as np

from flow_data.formats.flow_format import FlowFormat, floating_range
from flow_data.formats.limits import check_pixels, check_size

GAP = rb"(?:\s|#[^\r\n]*[\r\n])+"  # white space and comments, as in the other formats of Netpbm
NUMBERS = (rb"([+-]?\d{1,10})", rb"([+-]?\d{1,10})", rb"([0-9.eE+-]{1,20})(?=\s)")  # width, height, scale
HEADER = re.compile(GAP.join((rb"(P[Ff])", *NUMBERS)))
LINE_END = re.compile(rb"[ \t]*(?:#[^\r\n]*)?\r?\n")
COMMENT = re.compile(rb"#[^\r\n]*\r?\n")


def decode(data: bytes, name: str) -> tuple[np.ndarray, None]:
    """Decode the content of a `.pfm` file; see `FlowFormat`."""
    if data[:2] not in (b"PF", b"Pf"):
        raise ValueError(f"{name}: not a .pfm file: it must begin with 'PF'; got {data[:2]!r}")
    header = HEADER.match(data)
    if header is None:
        raise ValueError(f"{name}: damaged .pfm header: must be 'PF', width, height, scale; got {data[:40]!r}")
    if header[1] == b"Pf":
        raise ValueError(f"{name}: not a flow: a .pfm must have three channels ('PF'); got one ('Pf')")
    try:
        scale = float(header[4])
    except ValueError:
        scale = 0.0
    if scale == 0 or not math.isfinite(scale):
        raise ValueError(f"{name}: damaged .pfm header: the scale must be a number other than 0; got {header[4]!r}")
    width, height = int(header[2]), int(header[3])
    check_pixels(name, width, height)
    # Data begins after the scale's line, or after lines of comment; where all of the header is on one line, perhaps
    # after one white space. As bytes of data may look like these, the length of the file decides.
    line_end = LINE_END.match(data, header.end())
    starts = [line_end.end() if line_end else header.end() + 1]
    while comment := COMMENT.match(data, starts[-1]):
        starts.append(comment.end())
    if b"\n" not in header[0]:
        starts.append(header.end() + 1)
    start = len(data) - 12 * width * height
    start = start if start in starts else starts[0]
    check_size(name, width, height, start + 12 * width * height, len(data))
    # Only the sign of the scale means something here: every published flow file has magnitude 1.
    rows = np.frombuffer(data, "<f4" if scale < 0 else ">f4", offset=start).reshape(height, width, 3)
    flow = np.empty((height, width, 2), np.float32)
    flow[..., 0], flow[..., 1] = rows[::-1, :, 0], rows[::-1, :, 1]  # several times faster than both at once
    return flow, None


def encode(flow: np.ndarray, valid: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Encode flow as the content of a `.pfm` file; see `FlowFormat`."""
    height, width = valid.shape
    rows = np.zeros((height, width, 3), "<f4")  # the third channel is unused, as in FlyingThings3D
    rows[..., 0], rows[..., 1] = flow[::-1, :, 0], flow[::-1, :, 1]
    return b"PF\n%d %d\n-1.0\n" % (width, height) + rows.tobytes(), valid


FORMAT = FlowFormat(".pfm", b"P", decode, encode, np.nan, floating_range(".pfm"))
