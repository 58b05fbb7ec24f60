"""Optical flow files: bytes <-> arrays, nothing else.

Shapes: `H W` height and width of the flow field, in pixels. Everywhere below `flow` is `(H, W, 2)`, (x right, y down)
in pixels, from frame 1 to frame 2, and `valid` is `(H, W)` bool, True where the flow is known. Formats, by suffix,
each in a file of `flow_data.formats`:

- `.flo` (Middlebury, FlyingChairs, Sintel): float32; unknown flow is any |value| > 1e9.
- `.pfm` (FlyingThings3D): float32, either byte order, rows bottom-up, three channels of which the first two are flow.
- `.png` (KITTI, HD1K): 16-bit RGB, steps of 1/64 pixel in [-512, 512), the third channel is 0 where flow is unknown.
- `.flo5` (Spring): HDF5 with a dataset "flow", floats, NaN where flow is unknown.
- `.npy` (TartanAir): NumPy's own, `(H, W, 2)` floats; nothing is ever unpickled.
- `.npz`: NumPy's archive with "flow", `(H, W, 2)` floats, and perhaps "valid", `(H, W)` bool. `write_compact_flow`
  stores float16, in a quarter of the bytes or less.

The floating formats keep every float32 of magnitude up to 1e9 bit by bit; NaN, infinities and larger values are
unknown. Nothing is allocated by a header alone: its size is compared with the length of the file first. `.png`,
`.flo5` and `.npz` have checksums, which are compared; in the others a changed value goes unnoticed. What other
programs add, leave out or damage without touching the data is read: bytes after a PNG's end, no end, wrong checksums
of its text (`flow_data.formats.png`), CRLF, blanks and comments in a PFM header. Flow that a format cannot hold is
written as unknown, and its share is reported.
"""

import os
from collections.abc import Mapping
from pathlib import Path, PurePath

import numpy as np

from flow_data.atomic_write import atomic_write
from flow_data.file_names import find_path
from flow_data.formats import flo, flo5, kitti_png, numpy_files, pfm
from flow_data.formats.flow_format import MAX_KNOWN, FlowFormat
from flow_data.formats.limits import MAX_FILE_BYTES, MAX_PIXELS, check_pixels
from flow_data.formats.numpy_files import decode_arrays, encode_arrays, encode_npz

FORMATS: dict[str, FlowFormat] = {
    flow_format.suffix: flow_format
    for flow_format in (
        *(flo.FORMAT, pfm.FORMAT, kitti_png.FORMAT, flo5.FORMAT),
        *(numpy_files.NPY_FORMAT, numpy_files.NPZ_FORMAT),
    )
}
FLOW_SUFFIXES = tuple(FORMATS)
FORMAT_SUFFIXES = {  # format of the flow of a pair, as `--format` names it -> suffix of its file
    **{"kitti" if suffix == ".png" else suffix[1:]: suffix for suffix in FLOW_SUFFIXES},
    "npz16": ".npz",  # float16, `write_compact_flow`
    "color": ".png",  # an image to look at, which `read_flow` does not read
}


def read_flow(path: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray]:
    """Read a flow file, whose suffix is its format.

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
    magic = _format_of(path.suffix, str(path)).magic
    with open(find_path(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_FILE_BYTES:
            raise ValueError(
                f"{path}: must hold at most {MAX_FILE_BYTES} bytes, those of {MAX_PIXELS} pixels; got {size} bytes"
            )
        head = file.read(len(magic))
        if head != magic:
            return decode_flow(head + file.read(100), str(path))  # which raises; the rest may be huge
        return decode_flow(head + file.read(), str(path))


def write_flow(path: str | os.PathLike[str], flow: np.ndarray, valid: np.ndarray | None = None) -> float:
    """Write a flow file, whose suffix is its format. The file is either complete or absent.

    Args:
        path: ends in one of `FLOW_SUFFIXES`, upper or lower case; its folder exists.
        flow: `(H, W, 2)` floating, pixels; stored as float32, for `.png` rounded to 1/64 pixel.
        valid: `(H, W)` bool; all True if None. Flow that the format cannot hold (not finite, |value| > 1e9, outside
            [-512, 512) in `.png`) is written as unknown either way.

    Returns:
        Share of the valid pixels, 0 to 1, whose flow the format cannot hold; `describe_loss` describes it to users.

    Raises:
        ValueError: unknown suffix, wrong shape or type, or a format that holds the flow of no valid pixel at all.
        OSError: the file cannot be written.
    """
    path = Path(path)
    data, lost = encode_with_loss(flow, valid, path.suffix, str(path))
    with atomic_write(path) as partial:
        partial.write_bytes(data)
    return lost


def write_compact_flow(
    path: str | os.PathLike[str], flow: np.ndarray, further: Mapping[str, np.ndarray] | None = None
) -> float:
    """Write flow as float16 in a compressed `.npz` file, which `read_flow` reads. It is either complete or absent.

    Args:
        path: ends in .npz; its folder exists.
        flow: `(H, W, 2)` floating, pixels. Each value is rounded by at most 1/2048 of itself, 0.016 px in 32 px.
        further: arrays to add under their names, such as those of `read_confidence`.

    Returns:
        Share of the pixels, 0 to 1, whose flow float16 cannot hold (not finite, or beyond 65,504 px); it is unknown
        in the file.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    known, lost = as_known_float16(flow)
    with atomic_write(path) as partial:
        partial.write_bytes(encode_npz(known, np.isfinite(known).all(axis=-1), further))
    return lost


def as_known_float16(flow: np.ndarray) -> tuple[np.ndarray, float]:
    """Return flow `(H, W, 2)` as float16 with NaN where it is unknown, and the share of such pixels, 0 to 1."""
    with np.errstate(over="ignore", invalid="ignore"):
        compact = flow.astype("<f2", order="C")  # a copy, to be changed below
    known = np.isfinite(compact[..., 0]) & np.isfinite(compact[..., 1])
    compact[~known] = np.nan
    return compact, 1 - float(known.mean())


def write_confidence(path: str | os.PathLike[str], consistency_error: np.ndarray, occluded: np.ndarray) -> None:
    """Write how sure flow is as a `.npz` file, for formats of flow that hold nothing else.

    Args:
        path: ends in .npz; its folder exists.
        consistency_error: `(H, W)` floating, pixels, stored as float16.
        occluded: `(H, W)` bool.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    with atomic_write(path) as partial:
        partial.write_bytes(encode_arrays(confidence_arrays(consistency_error, occluded)))


def confidence_arrays(consistency_error: np.ndarray, occluded: np.ndarray) -> dict[str, np.ndarray]:
    """Return both as they are stored in a `.npz` file."""
    with np.errstate(over="ignore"):
        return {"consistency_error": consistency_error.astype("<f2"), "occluded": occluded}


def read_confidence(path: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray]:
    """Read how sure flow is from a `.npz` file of `predict_flow.py --confidence`.

    Args:
        path: of the flow itself where that is a `.npz`, else of the file `*_confidence.npz` beside it.

    Returns:
        consistency_error: `(H, W)` float32, pixels between where a pixel starts and where flow and backward flow bring
            it; infinite where it leaves the frame.
        occluded: `(H, W)` bool, pixels of frame 1 that frame 2 does not show.

    Raises:
        ValueError: a file that is damaged, or holds no confidence.
        OSError: the file cannot be read.
    """
    with open(find_path(path), "rb") as file:
        data = file.read(MAX_FILE_BYTES)
    arrays = decode_arrays(data, str(path), {"consistency_error": "f", "occluded": "b"}, required="consistency_error")
    error, occluded = arrays["consistency_error"], arrays.get("occluded")
    if error.ndim != 2 or occluded is None or occluded.shape != error.shape:
        raise ValueError(f"{path}: consistency_error and occluded must both be (H, W)")
    return error.astype(np.float32), occluded


def describe_loss(share: float, suffix: str) -> str:
    """Describe which share of the pixels a format could not hold, in one sentence without a full stop.

    Args:
        share: 0 to 1, as `write_flow` returns it.
        suffix: of the files, one of `FLOW_SUFFIXES`.
    """
    percent = f"{100 * share:.3g} %" if share >= 1e-4 else "less than 0.01 %"
    return f"{percent} of the pixels could not be written as {_format_of(suffix, suffix).range}"


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
        name: file name or path; its suffix is the format, and it begins the messages of errors.

    Returns:
        `(H, W, 2)` float32 flow, 0 where unknown, and `(H, W)` bool, as `read_flow` does.

    Raises:
        ValueError: unknown suffix, or data that is damaged, truncated, too long or of another format.
    """
    values, known = _format_of(PurePath(name).suffix, name).decode(data, name)
    if values.ndim != 3 or values.shape[2] != 2:
        raise ValueError(f"{name}: not a flow: the shape must be (H, W, 2); got {values.shape}")
    flow = _to_float32(values)
    valid = _known(flow) if known is None else known & _known(flow)
    _replace_unknown(flow, valid, 0)  # so that nothing is computed with 1e10 or NaN
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
    """Encode as `encode_flow` does; besides return `(H, W)` bool, True where the flow is known in the file."""
    flow_format = _format_of(suffix, suffix or "''")
    if not isinstance(flow, np.ndarray) or flow.ndim != 3 or flow.shape[2] != 2 or 0 in flow.shape:
        raise ValueError(f"flow must be of shape (H, W, 2); got {getattr(flow, 'shape', type(flow).__name__)}")
    if flow.dtype.kind != "f":
        raise ValueError(f"flow must be of a floating type; got {flow.dtype}")
    height, width = flow.shape[:2]
    check_pixels("flow", width, height)
    if valid is None:
        valid = np.ones((height, width), bool)
    if not isinstance(valid, np.ndarray) or valid.dtype != bool or valid.shape != (height, width):
        received = f"{valid.dtype} {valid.shape}" if isinstance(valid, np.ndarray) else type(valid).__name__
        raise ValueError(f"valid must be of type bool and shape ({height}, {width}); got {received}")

    with np.errstate(over="ignore", invalid="ignore"):
        flow = flow.astype(np.float32, order="C")  # a copy, to be changed below
    valid = valid & _known(flow)
    if flow_format.unknown is not None:
        _replace_unknown(flow, valid, flow_format.unknown)
    return flow_format.encode(flow.astype("<f4", copy=False), valid)


def _format_of(suffix: str, name: str) -> FlowFormat:
    flow_format = FORMATS.get(suffix.lower())
    if flow_format is None:
        raise ValueError(f"{name}: a flow file must end in one of {', '.join(FLOW_SUFFIXES)}; got '{suffix}'")
    return flow_format


def _explain_loss(flow: np.ndarray, valid: np.ndarray | None, suffix: str) -> str:
    """Why a format holds no vector of a flow, and which formats do."""
    vectors = flow[_known(flow) if valid is None else valid & _known(flow)]
    if not len(vectors):
        return f"nothing of this flow is finite and at most {MAX_KNOWN:,.0f} px: no format can hold it"
    others = ", ".join(other for other in FLOW_SUFFIXES if other != suffix)
    values = f"{vectors.min():.6g} to {vectors.max():.6g} px"
    return (
        f"nothing of this flow, {values}, can be written as {FORMATS[suffix].range}; "
        f"write one of {others}, which hold it"
    )


def _known(flow: np.ndarray) -> np.ndarray:
    """`(H, W)` bool: both components are numbers of magnitude up to 1e9 (a NaN compares as False)."""
    return (np.abs(flow[..., 0]) <= MAX_KNOWN) & (np.abs(flow[..., 1]) <= MAX_KNOWN)  # all(axis=-1) is far slower


def _to_float32(flow: np.ndarray) -> np.ndarray:
    """Return flow as native, writable float32, copied unless it is; a float64 too large for it becomes infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.require(flow, np.float32, ["C", "W"])


def _replace_unknown(flow: np.ndarray, valid: np.ndarray, value: float) -> None:
    """Write a value into both components wherever flow is not valid."""
    if not valid.all():
        vectors = flow.view(np.complex64)[..., 0]  # one item a pixel: several times faster than two
        vectors[~valid] = complex(value, value)
