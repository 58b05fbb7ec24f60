"""Optical flow files: bytes <-> arrays, nothing else.

Shapes: `H W` height and width of the flow field, in pixels. Everywhere below `flow` is `(H, W, 2)`, (x right, y down)
in pixels, from frame 1 to frame 2, and `valid` is `(H, W)` bool, True where the flow is known. Formats, by suffix:

- `.flo` (Middlebury, FlyingChairs, Sintel): float32; unknown flow is any |value| > 1e9.
- `.pfm` (FlyingThings3D): float32, either byte order, rows bottom-up, three channels of which the first two are flow.
- `.png` (KITTI, HD1K): 16-bit RGB, steps of 1/64 pixel in [-512, 512), the third channel is 0 where flow is unknown.
- `.npy` (TartanAir): NumPy's own, `(H, W, 2)` floats; nothing is ever unpickled.

The floating formats keep every float32 of magnitude up to 1e9 bit by bit; NaN, infinities and larger values are
unknown.
A header is believed only after it was compared with the bytes there are, so a damaged file cannot ask for memory;
these checks are half of this module.
"""

import io
import math
import os
import re
import struct
import uuid
import zlib
from pathlib import Path, PurePath

import cv2
import numpy as np

FLOW_SUFFIXES = (".flo", ".pfm", ".png", ".npy")

MAX_PIXELS = 2**26  # twice an 8K frame; only a damaged header asks for more
MAX_FILE_BYTES = MAX_PIXELS * 16 + 4096  # the widest pixel is two float64 of a .npy

FLO_MAGIC = b"PIEH"  # 202021.25 as a little-endian float32
FLO_UNKNOWN = 1e10  # what is written; read is anything beyond MAX_KNOWN
MAX_KNOWN = 1e9

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_OFFSET, PNG_SCALE = 2**15, 64
PNG_COLOUR_TYPES = {0: "grey", 2: "RGB", 3: "palette", 4: "grey and alpha", 6: "RGBA"}
DEFLATE_MAX_RATIO = 1032  # zlib cannot expand a byte into more

NPY_MAGIC = b"\x93NUMPY"

PFM_HEADER = re.compile(rb"(P[Ff])\s+([+-]?\d{1,10})\s+([+-]?\d{1,10})\s+([+-]?[0-9.eE+-]{1,20})\s")
NPY_HEADER = re.compile(
    r"\{\s*'descr':\s*'([^']*)',\s*'fortran_order':\s*(True|False),\s*'shape':\s*\(([\d\s,]{1,40})\),?\s*\}\s*"
)
NPY_DTYPES = ("<f2", "<f4", "<f8", ">f2", ">f4", ">f8")


def read_flow(path: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray]:
    """Read a flow file; the suffix says which format it is.

    Args:
        path: `.flo`, `.pfm`, KITTI `.png` or `.npy`, upper or lower case.

    Returns:
        flow: `(H, W, 2)` float32, pixels; 0 wherever it is unknown.
        valid: `(H, W)` bool.

    Raises:
        ValueError: unknown suffix, or a file that is damaged, truncated, too long or of another format.
        OSError: the file cannot be read, FileNotFoundError where there is none.
    """
    path = Path(path)
    _check_suffix(path.suffix, str(path))
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_FILE_BYTES:
            raise ValueError(f"{path}: expected at most {MAX_FILE_BYTES} bytes of flow, the file holds {size}")
        return decode_flow(file.read(), str(path))


def write_flow(path: str | os.PathLike[str], flow: np.ndarray, valid: np.ndarray | None = None) -> None:
    """Write a flow file; the suffix says which format. The file is either complete or not there.

    Args:
        path: ends in `.flo`, `.pfm`, `.png` (KITTI) or `.npy`; its folder exists.
        flow: `(H, W, 2)` floating, pixels; stored as float32, for `.png` rounded to 1/64 pixel.
        valid: `(H, W)` bool; all True if None. Flow that the format cannot hold (not finite, |value| > 1e9, outside
            [-512, 512) in `.png`) is written as unknown either way.

    Raises:
        ValueError: unknown suffix, wrong shape or type.
        OSError: the file cannot be written.
    """
    path = Path(path)
    data = encode_flow(flow, valid, path.suffix)
    partial = path.with_name(f".{uuid.uuid4().hex}.tmp")  # same folder: os.replace must not cross file systems
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def decode_flow(data: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Decode the content of a flow file.

    Args:
        data: the whole file.
        name: file name or path; its suffix is the format, and errors are told with it.

    Returns:
        `(H, W, 2)` float32 flow, 0 where unknown, and `(H, W)` bool, as `read_flow` does.

    Raises:
        ValueError: unknown suffix, or data that is damaged, truncated, too long or of another format.
    """
    decode = {".flo": _decode_flo, ".pfm": _decode_pfm, ".png": _decode_png, ".npy": _decode_npy}
    flow, valid = decode[_check_suffix(PurePath(name).suffix, name)](data, name)
    flow[~valid] = 0  # nobody shall compute with 1e10 or NaN
    return flow, valid


def encode_flow(flow: np.ndarray, valid: np.ndarray | None, suffix: str) -> bytes:
    """Encode flow as the content of a file.

    Args:
        flow: `(H, W, 2)` floating, pixels.
        valid: `(H, W)` bool, or None if all of it is known.
        suffix: `.flo`, `.pfm`, `.png` or `.npy`.

    Returns:
        The bytes `write_flow` would write.

    Raises:
        ValueError: unknown suffix, wrong shape or type.
    """
    suffix = _check_suffix(suffix, suffix or "''")
    if not isinstance(flow, np.ndarray) or flow.ndim != 3 or flow.shape[2] != 2 or 0 in flow.shape:
        raise ValueError(f"expected flow of shape (H, W, 2), received {getattr(flow, 'shape', type(flow).__name__)}")
    if flow.dtype.kind != "f":
        raise ValueError(f"expected flow of a floating type, received {flow.dtype}")
    height, width = flow.shape[:2]
    if height * width > MAX_PIXELS:
        raise ValueError(f"expected flow of at most {MAX_PIXELS} pixels, received {width} x {height}")
    if valid is None:
        valid = np.ones((height, width), bool)
    if not isinstance(valid, np.ndarray) or valid.dtype != bool or valid.shape != (height, width):
        received = f"{valid.dtype} {valid.shape}" if isinstance(valid, np.ndarray) else type(valid).__name__
        raise ValueError(f"expected valid of type bool and shape ({height}, {width}), received {received}")

    flow = _to_float32(flow)
    valid = valid & _known(flow)
    if suffix == ".png":
        return _encode_png(flow, valid)
    flow[~valid] = FLO_UNKNOWN if suffix == ".flo" else np.nan
    if suffix == ".flo":
        return FLO_MAGIC + struct.pack("<ii", width, height) + flow.astype("<f4").tobytes()
    if suffix == ".pfm":
        channels = np.zeros((height, width, 3), "<f4")  # the third is unused, as in FlyingThings3D
        channels[..., :2] = flow[::-1]
        return b"PF\n%d %d\n-1.0\n" % (width, height) + channels.tobytes()
    buffer = io.BytesIO()
    np.save(buffer, flow.astype("<f4"), allow_pickle=False)
    return buffer.getvalue()


def _check_suffix(suffix: str, name: str) -> str:
    if suffix.lower() not in FLOW_SUFFIXES:
        raise ValueError(f"{name}: expected a flow file ending in {', '.join(FLOW_SUFFIXES)}, received '{suffix}'")
    return suffix.lower()


def _known(flow: np.ndarray) -> np.ndarray:
    """`(H, W)` bool: both components are numbers of magnitude up to 1e9 (a NaN compares as False)."""
    known = np.abs(flow) <= MAX_KNOWN
    return known[..., 0] & known[..., 1]  # all(axis=-1) takes five times as long on an axis of two


def _to_float32(flow: np.ndarray) -> np.ndarray:
    """A writable copy as native float32; a float64 that does not fit becomes an infinity, thus unknown."""
    with np.errstate(over="ignore", invalid="ignore"):
        return flow.astype(np.float32, order="C")


def _check_size(name: str, width: int, height: int, expected: int, received: int) -> None:
    """Compare what a header promises with what there is, in bytes, before anything is allocated."""
    if width <= 0 or height <= 0 or width * height > MAX_PIXELS:
        raise ValueError(f"{name}: expected a size of 1 to {MAX_PIXELS} pixels, the header says {width} x {height}")
    if received < expected:
        raise ValueError(f"{name}: truncated: {width} x {height} needs {expected} bytes, the file holds {received}")
    if received > expected:
        raise ValueError(f"{name}: too long: {width} x {height} needs {expected} bytes, the file holds {received}")


def _decode_flo(data: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    if data[:4] != FLO_MAGIC:
        raise ValueError(f"{name}: not a .flo file: expected it to begin with {FLO_MAGIC!r}, received {data[:4]!r}")
    if len(data) < 12:
        raise ValueError(f"{name}: truncated: expected a header of 12 bytes, the file holds {len(data)}")
    width, height = struct.unpack_from("<ii", data, 4)
    _check_size(name, width, height, 12 + 8 * width * height, len(data))
    flow = _to_float32(np.frombuffer(data, "<f4", offset=12).reshape(height, width, 2))
    return flow, _known(flow)


def _decode_pfm(data: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    if data[:2] not in (b"PF", b"Pf"):
        raise ValueError(f"{name}: not a .pfm file: expected it to begin with 'PF', received {data[:2]!r}")
    header = PFM_HEADER.match(data)
    if header is None:
        raise ValueError(f"{name}: damaged .pfm header: expected 'PF', width, height, scale, received {data[:40]!r}")
    if header[1] == b"Pf":
        raise ValueError(f"{name}: not a flow: expected a .pfm of three channels ('PF'), received one ('Pf')")
    try:
        scale = float(header[4])
    except ValueError:
        scale = 0.0
    if scale == 0 or not math.isfinite(scale):
        raise ValueError(f"{name}: damaged .pfm header: expected a scale other than 0, received {header[4]!r}")
    width, height = int(header[2]), int(header[3])
    _check_size(name, width, height, header.end() + 12 * width * height, len(data))
    # Only the sign of the scale means something here: every published flow file has magnitude 1.
    rows = np.frombuffer(data, "<f4" if scale < 0 else ">f4", offset=header.end()).reshape(height, width, 3)
    flow = _to_float32(rows[::-1, :, :2])
    return flow, _known(flow)


def _decode_npy(data: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    if data[:6] != NPY_MAGIC:
        raise ValueError(f"{name}: not a .npy file: expected it to begin with {NPY_MAGIC!r}, received {data[:6]!r}")
    start = {b"\1\0": 10, b"\2\0": 12}.get(data[6:8])
    if start is None or len(data) < start:
        raise ValueError(f"{name}: damaged .npy header: expected version 1.0 or 2.0, received {data[6:12]!r}")
    end = start + int.from_bytes(data[8:start], "little")
    # Matched rather than evaluated: the header of a .npy is Python text, and the file may come from anyone.
    header = NPY_HEADER.fullmatch(data[start:end].decode("latin-1")) if end <= len(data) else None
    if header is None:
        raise ValueError(f"{name}: damaged or truncated .npy header: received {data[start : start + 80]!r}")
    dtype, shape = header[1], tuple(int(side) for side in re.findall(r"\d+", header[3]))
    if dtype not in NPY_DTYPES or len(shape) != 3 or shape[2] != 2:
        raise ValueError(f"{name}: not a flow: expected floats of shape (H, W, 2), received '{dtype}' {shape}")
    height, width = shape[:2]
    _check_size(name, width, height, end + 2 * width * height * np.dtype(dtype).itemsize, len(data))
    values = np.frombuffer(data, dtype, offset=end).reshape(shape, order="F" if header[2] == "True" else "C")
    flow = _to_float32(values)
    return flow, _known(flow)


def _decode_png(data: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    cleaned = _check_png(data, name)
    codes = cv2.imdecode(np.frombuffer(cleaned, np.uint8), cv2.IMREAD_UNCHANGED)
    if codes is None or codes.dtype != np.uint16 or codes.ndim != 3 or codes.shape[2] != 3:
        received = None if codes is None else f"{codes.dtype} {codes.shape}"
        raise ValueError(f"{name}: damaged PNG: expected uint16 (H, W, 3), decoded {received}")
    flow = codes[..., 2:0:-1].astype(np.float32, order="C")  # OpenCV's order is blue, green, red
    flow -= PNG_OFFSET
    flow /= PNG_SCALE
    return flow, codes[..., 0] > 0


def _encode_png(flow: np.ndarray, valid: np.ndarray) -> bytes:
    codes = np.rint(np.where(valid[..., None], flow, 0).astype(np.float64) * PNG_SCALE + PNG_OFFSET)
    valid = valid & ((codes >= 0) & (codes < 2**16)).all(axis=-1)
    codes = np.where(valid[..., None], codes, 0).astype(np.uint16)  # KITTI's own files: 0 in all three channels
    encoded, buffer = cv2.imencode(".png", np.dstack([valid.astype(np.uint16), codes[..., 1], codes[..., 0]]))
    if not encoded:
        raise ValueError(f"OpenCV cannot encode a PNG of {flow.shape[1]} x {flow.shape[0]}")
    return buffer.tobytes()


def _check_png(data: bytes, name: str) -> bytes:
    """Check a PNG's chunks, checksums and amount of pixel data (PNG specification, sections 5 and 11.2).

    OpenCV would warn on stderr or fill the missing rows with 0 where this raises.

    Returns:
        The PNG without chunks that are not pixels, so that no gamma, palette or transparency touches the flow.
    """
    if data[:8] != PNG_SIGNATURE:
        raise ValueError(f"{name}: not a PNG: expected it to begin with {PNG_SIGNATURE!r}, received {data[:8]!r}")
    kept, compressed, position, kind = [PNG_SIGNATURE], [], 8, b""
    while kind != b"IEND":
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        if end > len(data):
            raise ValueError(f"{name}: truncated PNG: no complete IEND chunk in {len(data)} bytes")
        kind, body = data[position + 4 : position + 8], data[position + 8 : end - 4]
        if zlib.crc32(body, zlib.crc32(kind)) != int.from_bytes(data[end - 4 : end], "big"):
            raise ValueError(f"{name}: damaged PNG: wrong checksum in chunk {kind!r} at byte {position}")
        if (kind == b"IHDR") != (position == 8) or (kind == b"IHDR" and len(body) != 13):
            raise ValueError(f"{name}: damaged PNG: expected one IHDR chunk of 13 bytes, and that first")
        if kind == b"IHDR":
            width, height, depth, colour, compression, filtering, interlace = struct.unpack(">IIBBBBB", body)
        if kind == b"IDAT":
            compressed.append(body)
        if kind in (b"IHDR", b"IDAT", b"IEND"):
            kept.append(data[position:end])
        position = end
    if position != len(data):
        raise ValueError(f"{name}: too long: {len(data) - position} bytes after the PNG's IEND chunk")
    if (depth, colour) != (16, 2):
        kind_of_png = f"{depth}-bit {PNG_COLOUR_TYPES.get(colour, f'colour type {colour}')}"
        raise ValueError(f"{name}: not a flow: expected a 16-bit RGB PNG, received {kind_of_png}")
    if compression or filtering or interlace:
        raise ValueError(f"{name}: expected a PNG without interlacing, received an interlaced or damaged one")

    stride = 1 + 6 * width  # a filter byte, then three 16-bit channels
    stream, inflater = b"".join(compressed), zlib.decompressobj()
    # Inflated size, from the header. A stream that cannot possibly hold it is refused before it is inflated.
    _check_size(name, width, height, stride * height, min(stride * height, len(stream) * DEFLATE_MAX_RATIO))
    try:
        rows = inflater.decompress(stream, stride * height + 1)
    except zlib.error as error:
        raise ValueError(f"{name}: damaged PNG: {error}") from error
    _check_size(name, width, height, stride * height, len(rows))
    if not inflater.eof or inflater.unused_data or max(rows[::stride]) > 4:
        raise ValueError(f"{name}: damaged PNG: its pixel data does not end where it should, or has unknown filters")
    return b"".join(kept)
