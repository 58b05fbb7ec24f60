"""NumPy's own files: `.npy` (TartanAir) and `.npz`; nothing is ever unpickled.

NumPy evaluates a `.npy` header as Python text and allocates the size that it states. Here it is matched, and
compared with the length of the file.
"""

import io
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping

import numpy as np

from flow_data.formats.flow_format import FlowFormat, floating_range
from flow_data.formats.limits import DEFLATE_MAX_RATIO, MAX_FILE_BYTES, check_size

NPY_MAGIC = b"\x93NUMPY"
NPY_HEADER = re.compile(
    r"\{\s*'descr':\s*'([^']*)',\s*'fortran_order':\s*(True|False),\s*'shape':\s*\(([\d\s,]{1,40})\),?\s*\}\s*"
)
NPY_DTYPE = re.compile(r"[<>]f[248]|[<>][iu][248]|\|[iu]1|\|b1")

ZIP_MAGIC = b"PK\3\4"
ZIP_END = struct.Struct("<4s4HIIH")  # PKWARE's APPNOTE 4.3.16, end of central directory
ZIP_ERRORS = (  # what zipfile raises for damage
    *(zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError),
    *(KeyError, ValueError, OverflowError, NotImplementedError, RuntimeError),
)


def decode_npy(data: bytes, name: str, kinds: str) -> np.ndarray:
    """Decode a `.npy` file of two or three axes, height and width first.

    Args:
        data: the whole file.
        name: begins the messages of errors.
        kinds: letters of NumPy's dtype kinds that are taken: f floating, b bool, i u integers.

    Returns:
        The array, read-only.

    Raises:
        ValueError: damaged, truncated, too long, or of another kind.
    """
    if data[:6] != NPY_MAGIC:
        raise ValueError(f"{name}: not a .npy file: it must begin with {NPY_MAGIC!r}; got {data[:6]!r}")
    start = {b"\1\0": 10, b"\2\0": 12}.get(data[6:8])
    if start is None or len(data) < start:
        raise ValueError(f"{name}: damaged .npy header: the version must be 1.0 or 2.0; got {data[6:12]!r}")
    end = start + int.from_bytes(data[8:start], "little")
    header = NPY_HEADER.fullmatch(data[start:end].decode("latin-1")) if end <= len(data) else None
    if header is None:
        raise ValueError(f"{name}: damaged or truncated .npy header: got {data[start : start + 80]!r}")
    dtype, shape = header[1], tuple(int(side) for side in re.findall(r"\d+", header[3]))
    if not NPY_DTYPE.fullmatch(dtype) or np.dtype(dtype).kind not in kinds or len(shape) not in (2, 3):
        raise ValueError(f"{name}: not a flow or mask: got an array of '{dtype}' {shape}")
    height, width = shape[:2]
    size = math.prod(shape[2:]) * np.dtype(dtype).itemsize
    check_size(name, width, height, end + size * width * height, len(data))
    return np.frombuffer(data, dtype, offset=end).reshape(shape, order="F" if header[2] == "True" else "C")


def encode_npy(array: np.ndarray) -> bytes:
    """Encode an array of plain numbers as the content of a `.npy` file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def decode_npz(data: bytes, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Decode a flow in a `.npz` file, as `np.savez` and `np.savez_compressed` write it.

    Args:
        data: the whole file, with an array "flow" and perhaps "valid". Other arrays are ignored.
        name: begins the messages of errors.

    Returns:
        "flow", `(H, W, 2)` floating, read-only, and "valid" as `(H, W)` bool, or None where there is none.

    Raises:
        ValueError: damaged, truncated, too long, encrypted, without "flow", or with arrays of other types or shapes.
    """
    arrays = decode_arrays(data, name, {"flow": "f", "valid": "biu"}, required="flow")
    flow, valid = arrays["flow"], arrays.get("valid")
    if flow.ndim != 3 or flow.shape[2] != 2:
        raise ValueError(f"{name}: not a flow: the shape must be (H, W, 2); got {flow.shape}")
    if valid is not None and valid.shape != flow.shape[:2]:
        raise ValueError(f"{name}: 'valid' must be of the flow's shape {flow.shape[:2]}; got {valid.shape}")
    return flow, None if valid is None else valid != 0


def decode_arrays(data: bytes, name: str, kinds: Mapping[str, str], required: str) -> dict[str, np.ndarray]:
    """Decode some arrays of a `.npz` file.

    Args:
        data: the whole file.
        name: begins the messages of errors.
        kinds: names of the arrays to decode where they are there, each with letters of the dtype kinds that are taken.
        required: name of the array that must be there.

    Returns:
        The arrays by name, read-only, of two or three axes.

    Raises:
        ValueError: damaged, truncated, too long, encrypted, without the required array, or with arrays of other types.
    """
    if data[:4] != ZIP_MAGIC:
        raise ValueError(f"{name}: not a .npz file: it must begin with {ZIP_MAGIC!r}; got {data[:4]!r}")
    end = len(data) - ZIP_END.size
    magic, *_, size, start, comment = ZIP_END.unpack(data[end:]) if end >= 0 else (b"", 0, 0, 0)
    # zipfile would look for an archive anywhere in the file: behind other data, or followed by it.
    if magic != b"PK\5\6" or start + size != end or comment:
        raise ValueError(f"{name}: truncated or too long: no .npz directory at the end of {len(data)} bytes")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
            if len(set(names)) < len(names):
                raise ValueError(f"arrays must have different names; got {', '.join(names):.200}")
            if f"{required}.npy" not in names:
                raise ValueError(f"there must be an array '{required}'; got {', '.join(names) or 'nothing':.200}")
            return {
                key: decode_npy(_read_member(archive, f"{key}.npy"), key, kinds=letters)
                for key, letters in kinds.items()
                if f"{key}.npy" in names
            }
    except ZIP_ERRORS as error:
        raise ValueError(f"{name}: no {required} in this .npz: {error}") from error


def encode_npz(flow: np.ndarray, valid: np.ndarray, further: Mapping[str, np.ndarray] | None = None) -> bytes:
    """Encode `(H, W, 2)` flow as a `.npz` file, with "valid", `(H, W)` bool, if it is False somewhere.

    Unknown flow should be NaN besides: then it is not taken for known by a reader that looks for no mask, or for one
    of another name.

    Args:
        flow: Of any floating type, which is kept.
        valid: True where the flow is known.
        further: Arrays to add under their names.
    """
    return encode_arrays({"flow": flow} | ({} if valid.all() else {"valid": valid}) | dict(further or {}))


def encode_arrays(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Encode arrays as `np.savez_compressed` does, without the time of writing: the same arrays, the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for key, array in arrays.items():
            member = zipfile.ZipInfo(f"{key}.npy")  # its default time is 1980-01-01
            member.create_system, member.compress_type = 3, zipfile.ZIP_DEFLATED  # else it names the platform
            archive.writestr(member, encode_npy(array))
    return buffer.getvalue()


def _read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    """Read one file of an archive. zipfile compares its checksum, and refuses it if encrypted.

    A bomb is refused by its stated size, or inflated no further than that.
    """
    member = archive.getinfo(name)
    ratio = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: DEFLATE_MAX_RATIO}.get(member.compress_type)
    if ratio is None:
        raise ValueError(f"{name} must be stored or deflated; got compression method {member.compress_type}")
    if member.file_size > min(member.compress_size * ratio, MAX_FILE_BYTES):
        raise ValueError(f"{name} states {member.file_size} bytes, compressed to impossible {member.compress_size}")
    with archive.open(member) as file:
        data = file.read(member.file_size)  # without a size it would inflate whatever there is
    if len(data) != member.file_size:
        raise ValueError(f"truncated: {name} must have {member.file_size} bytes; got {len(data)}")
    return data


NPY_FORMAT = FlowFormat(
    ".npy",
    NPY_MAGIC,
    lambda data, name: (decode_npy(data, name, kinds="f"), None),
    lambda flow, valid: (encode_npy(flow), valid),
    np.nan,
    floating_range(".npy"),
)
NPZ_FORMAT = FlowFormat(
    ".npz",
    b"PK",
    decode_npz,
    lambda flow, valid: (encode_npz(flow, valid), valid),
    np.nan,
    floating_range(".npz"),
)
