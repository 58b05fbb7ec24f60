"""Optical flow files: bytes <-> arrays, nothing else.

Shapes: `H W` height and width of the flow field, in pixels. Everywhere below `flow` is `(H, W, 2)`, (x right, y down)
in pixels, from frame 1 to frame 2, and `valid` is `(H, W)` bool, True where the flow is known. Formats, by suffix:

- `.flo` (Middlebury, FlyingChairs, Sintel): float32; unknown flow is any |value| > 1e9.
- `.pfm` (FlyingThings3D): float32, either byte order, rows bottom-up, three channels of which the first two are flow.
- `.png` (KITTI, HD1K): 16-bit RGB, steps of 1/64 pixel in [-512, 512), the third channel is 0 where flow is unknown.
- `.flo5` (Spring): HDF5 with a dataset "flow", floats, NaN where flow is unknown.
- `.npy` (TartanAir): NumPy's own, `(H, W, 2)` floats; nothing is ever unpickled.
- `.npz`: NumPy's archive with "flow", `(H, W, 2)` floats, and perhaps "valid", `(H, W)` bool.

The floating formats keep every float32 of magnitude up to 1e9 bit by bit; NaN, infinities and larger values are
unknown. A header is believed only after it was compared with the bytes there are, so a damaged file cannot ask for
memory. `.png`, `.flo5` and `.npz` have checksums, which are compared; in the others a changed value goes unnoticed.
What other programs add, leave out or damage without touching the data is read: bytes after a PNG's end, no end, wrong
checksums of its text (`flow_data.png_files`), CRLF, blanks and comments in a PFM header. Flow that a format cannot
hold is written as unknown, and its share reported.
"""

import math
import os
import re
import struct
from pathlib import Path, PurePath

import numpy as np

from flow_data.file_limits import MAX_FILE_BYTES, MAX_PIXELS, check_pixels, check_size
from flow_data.file_names import find_path
from flow_data.kitti_png import KITTI_LIMITS, decode_kitti_png, encode_kitti_png
from flow_data.numpy_files import decode_npy, decode_npz, encode_npy, encode_npz
from flow_data.whole_files import whole_file

FLOW_SUFFIXES = (".flo", ".pfm", ".png", ".flo5", ".npy", ".npz")

FLO_MAGIC = b"PIEH"  # 202021.25 as a little-endian float32
FLO_UNKNOWN = 1e10  # what is written; read is anything beyond MAX_KNOWN
MAX_KNOWN = 1e9

MAGIC = {  # what files begin with
    ".flo": FLO_MAGIC,
    ".pfm": b"P",
    ".png": b"\x89PNG",
    ".flo5": b"\x89HDF",
    ".npy": b"\x93NUMPY",
    ".npz": b"PK",
}

PFM_GAP = rb"(?:\s|#[^\r\n]*[\r\n])+"  # white space and comments, as in the other formats of Netpbm
PFM_NUMBERS = (rb"([+-]?\d{1,10})", rb"([+-]?\d{1,10})", rb"([0-9.eE+-]{1,20})(?=\s)")  # width, height, scale
PFM_HEADER = re.compile(PFM_GAP.join((rb"(P[Ff])", *PFM_NUMBERS)))
PFM_LINE_END = re.compile(rb"[ \t]*(?:#[^\r\n]*)?\r?\n")
PFM_COMMENT = re.compile(rb"#[^\r\n]*\r?\n")


def read_flow(path: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray]:
    """Read a flow file; the suffix says which format it is.

    Args:
        path: ends in one of `FLOW_SUFFIXES`, upper or lower case; `.png` is KITTI's. Its name may differ from the
            file's in Unicode normalization.

    Returns:
        flow: `(H, W, 2)` float32, pixels; 0 wherever it is unknown.
        valid: `(H, W)` bool.

    Raises:
        ValueError: unknown suffix, or a file that is damaged, truncated, too long or of another format.
        OSError: the file cannot be read, FileNotFoundError where there is none.
    """
    path = Path(path)
    _check_suffix(path.suffix, str(path))
    with open(find_path(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_FILE_BYTES:
            raise ValueError(
                f"{path}: must hold at most {MAX_FILE_BYTES} bytes, those of {MAX_PIXELS} pixels; got {size} bytes"
            )
        head = file.read(len(MAGIC[path.suffix.lower()]))
        if head != MAGIC[path.suffix.lower()]:
            return decode_flow(head + file.read(100), str(path))  # which says so; the rest may be huge
        return decode_flow(head + file.read(), str(path))


def write_flow(path: str | os.PathLike[str], flow: np.ndarray, valid: np.ndarray | None = None) -> float:
    """Write a flow file; the suffix says which format. The file is either complete or not there.

    Args:
        path: ends in one of `FLOW_SUFFIXES`, upper or lower case; its folder exists.
        flow: `(H, W, 2)` floating, pixels; stored as float32, for `.png` rounded to 1/64 pixel.
        valid: `(H, W)` bool; all True if None. Flow that the format cannot hold (not finite, |value| > 1e9, outside
            [-512, 512) in `.png`) is written as unknown either way.

    Returns:
        Share of the valid pixels, 0 to 1, whose flow the format cannot hold; `describe_loss` says it to users.

    Raises:
        ValueError: unknown suffix, wrong shape or type, or a format that holds the flow of no valid pixel at all.
        OSError: the file cannot be written.
    """
    path = Path(path)
    data, lost = encode_with_loss(flow, valid, path.suffix, str(path))
    with whole_file(path) as partial:
        partial.write_bytes(data)
    return lost


def describe_loss(share: float, suffix: str) -> str:
    """Say which share of the pixels a format could not hold, in one sentence without a full stop.

    Args:
        share: 0 to 1, as `write_flow` returns it.
        suffix: of the files, one of `FLOW_SUFFIXES`.
    """
    percent = f"{100 * share:.3g} %" if share >= 1e-4 else "less than 0.01 %"
    return f"{percent} of the pixels could not be written as {_range_of(_check_suffix(suffix, suffix))}"


def encode_with_loss(
    flow: np.ndarray, valid: np.ndarray | None, suffix: str, name: str = "flow"
) -> tuple[bytes, float]:
    """Encode flow as `encode_flow` does, and count what the format cannot hold.

    Args:
        flow: as of `encode_flow`, as are the next two.
        name: begins the message where nothing can be held.

    Returns:
        The bytes, and the share of the valid pixels, 0 to 1, that they do not hold.

    Raises:
        ValueError: as `encode_flow`; besides, where there are valid pixels and the format holds none of them.
    """
    data, written = _encode(flow, valid, suffix)
    wanted, kept = written.size if valid is None else np.count_nonzero(valid), np.count_nonzero(written)
    if wanted and not kept:
        raise ValueError(f"{name}: {_explain_loss(flow, valid, suffix.lower())}")
    return data, (wanted - kept) / wanted if wanted else 0.0


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
    suffix = _check_suffix(PurePath(name).suffix, name)
    known: np.ndarray | None = None  # a mask beside the values; else NaN or huge values say what is unknown
    if suffix == ".flo":
        values = _decode_flo(data, name)
    elif suffix == ".pfm":
        values = _decode_pfm(data, name)
    elif suffix == ".png":
        values, known = decode_kitti_png(data, name)
    elif suffix == ".flo5":
        from flow_data.hdf5_flow import decode_flo5  # needs h5py, which no other format does

        values = decode_flo5(data, name)
    elif suffix == ".npy":
        values = decode_npy(data, name, kinds="f")
    else:
        values, known = decode_npz(data, name)
    if values.ndim != 3 or values.shape[2] != 2:
        raise ValueError(f"{name}: not a flow: expected floats of shape (H, W, 2), received shape {values.shape}")
    flow = _to_float32(values)
    valid = _known(flow) if known is None else known & _known(flow)
    _replace_unknown(flow, valid, 0)  # nobody shall compute with 1e10 or NaN
    return flow, valid


def encode_flow(flow: np.ndarray, valid: np.ndarray | None, suffix: str) -> bytes:
    """Encode flow as the content of a file.

    Args:
        flow: `(H, W, 2)` floating, pixels.
        valid: `(H, W)` bool, or None if all of it is known.
        suffix: one of `FLOW_SUFFIXES`, upper or lower case.

    Returns:
        The bytes `write_flow` would write. Flow that the format cannot hold is unknown there, all of it if need be.

    Raises:
        ValueError: unknown suffix, wrong shape or type.
    """
    return _encode(flow, valid, suffix)[0]


def _encode(flow: np.ndarray, valid: np.ndarray | None, suffix: str) -> tuple[bytes, np.ndarray]:
    """As `encode_flow`; besides `(H, W)` bool, True where the flow is known in the file."""
    suffix = _check_suffix(suffix, suffix or "''")
    if not isinstance(flow, np.ndarray) or flow.ndim != 3 or flow.shape[2] != 2 or 0 in flow.shape:
        raise ValueError(f"expected flow of shape (H, W, 2), received {getattr(flow, 'shape', type(flow).__name__)}")
    if flow.dtype.kind != "f":
        raise ValueError(f"expected flow of a floating type, received {flow.dtype}")
    height, width = flow.shape[:2]
    check_pixels("flow", width, height)
    if valid is None:
        valid = np.ones((height, width), bool)
    if not isinstance(valid, np.ndarray) or valid.dtype != bool or valid.shape != (height, width):
        received = f"{valid.dtype} {valid.shape}" if isinstance(valid, np.ndarray) else type(valid).__name__
        raise ValueError(f"expected valid of type bool and shape ({height}, {width}), received {received}")

    with np.errstate(over="ignore", invalid="ignore"):
        flow = flow.astype(np.float32, order="C")  # a copy, to be changed below
    valid = valid & _known(flow)
    if suffix == ".png":
        return encode_kitti_png(flow, valid)
    _replace_unknown(flow, valid, FLO_UNKNOWN if suffix == ".flo" else np.nan)
    flow = flow.astype("<f4", copy=False)
    if suffix == ".flo":
        data = FLO_MAGIC + struct.pack("<ii", width, height) + flow.tobytes()
    elif suffix == ".pfm":
        data = _encode_pfm(flow)
    elif suffix == ".flo5":
        from flow_data.hdf5_flow import encode_flo5

        data = encode_flo5(flow)
    else:
        data = encode_npy(flow) if suffix == ".npy" else encode_npz(flow, valid)
    return data, valid


def _check_suffix(suffix: str, name: str) -> str:
    if suffix.lower() not in FLOW_SUFFIXES:
        raise ValueError(f"{name}: expected a flow file ending in {', '.join(FLOW_SUFFIXES)}, received '{suffix}'")
    return suffix.lower()


def _range_of(suffix: str) -> str:
    if suffix == ".png":
        return f"KITTI PNG (range {KITTI_LIMITS[0]:.0f} to {KITTI_LIMITS[1]:.0f} px)"
    return f"{suffix} (finite values up to {MAX_KNOWN:,.0f} px)"


def _explain_loss(flow: np.ndarray, valid: np.ndarray | None, suffix: str) -> str:
    """Why a format holds no vector of a flow, and which formats do."""
    vectors = flow[_known(flow) if valid is None else valid & _known(flow)]
    if not len(vectors):
        return f"nothing of this flow is finite and at most {MAX_KNOWN:,.0f} px: no format can hold it"
    others = ", ".join(other for other in FLOW_SUFFIXES if other != suffix)
    return (
        f"nothing of this flow, {vectors.min():.6g} to {vectors.max():.6g} px, can be written as {_range_of(suffix)}; "
        f"write one of {others}, which hold it"
    )


def _known(flow: np.ndarray) -> np.ndarray:
    """`(H, W)` bool: both components are numbers of magnitude up to 1e9 (a NaN compares as False)."""
    return (np.abs(flow[..., 0]) <= MAX_KNOWN) & (np.abs(flow[..., 1]) <= MAX_KNOWN)  # all(axis=-1) is far slower


def _to_float32(flow: np.ndarray) -> np.ndarray:
    """As native float32 that may be written to, copied unless it is; a float64 too large for it becomes infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.require(flow, np.float32, ["C", "W"])


def _replace_unknown(flow: np.ndarray, valid: np.ndarray, value: float) -> None:
    """Write a value into both components wherever flow is not valid."""
    if not valid.all():
        vectors = flow.view(np.complex64)[..., 0]  # one item a pixel: several times faster than two
        vectors[~valid] = complex(value, value)


def _decode_flo(data: bytes, name: str) -> np.ndarray:
    if data[:4] != FLO_MAGIC:
        raise ValueError(f"{name}: not a .flo file: expected it to begin with {FLO_MAGIC!r}, received {data[:4]!r}")
    if len(data) < 12:
        raise ValueError(f"{name}: truncated: expected a header of 12 bytes, the file holds {len(data)}")
    width, height = struct.unpack_from("<ii", data, 4)
    check_size(name, width, height, 12 + 8 * width * height, len(data))
    return np.frombuffer(data, "<f4", offset=12).reshape(height, width, 2)


def _decode_pfm(data: bytes, name: str) -> np.ndarray:
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
    check_pixels(name, width, height)
    # Data begins after the scale's line, or after lines of comment; where all of the header is on one line, perhaps
    # after one white space. As bytes of data may look like these, the length of the file decides.
    line_end = PFM_LINE_END.match(data, header.end())
    starts = [line_end.end() if line_end else header.end() + 1]
    while comment := PFM_COMMENT.match(data, starts[-1]):
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
    return flow


def _encode_pfm(flow: np.ndarray) -> bytes:
    height, width = flow.shape[:2]
    rows = np.zeros((height, width, 3), "<f4")  # the third channel is unused, as in FlyingThings3D
    rows[..., 0], rows[..., 1] = flow[::-1, :, 0], flow[::-1, :, 1]
    return b"PF\n%d %d\n-1.0\n" % (width, height) + rows.tobytes()
