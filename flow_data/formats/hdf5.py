"""The content of Spring's flow files (`.flo5`): HDF5 with one dataset "flow", `(H, W, 2)`, NaN where flow is unknown.

h5py is asked only where the dataset lies in the file. The data itself is taken from there and decompressed here,
because the HDF5 library crashes on some damaged data (a segmentation fault, where this module raises), returns 0 for
parts that are missing, and expands a compressed part without limit.
"""

import io
import itertools
import math
from typing import NamedTuple

import numpy as np

from flow_data.formats.limits import DEFLATE_MAX_RATIO, MAX_PIXELS, check_pixels, check_size, inflate
from flow_data.optional_packages import needs_extra

with needs_extra("train"):
    import h5py

SIGNATURE = b"\x89HDF\r\n\x1a\n"
SUPERBLOCK_FIELDS = {0: (13, 24, 40), 1: (13, 28, 44), 2: (9, 12, 28), 3: (9, 12, 28)}  # see _check_superblock
DTYPES = ((h5py.h5t.IEEE_F32LE, "<f4"), (h5py.h5t.IEEE_F64LE, "<f8"))  # only damage asks for other orders or mantissas
FILTERS = (h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_FLETCHER32)  # in the order of writing
WRITTEN_VERSION = ("v108", "v108")  # metadata under checksums, which newer ones have too but fewer readers know


class _Part(NamedTuple):
    """A part of the dataset: where it belongs (row, column, component), and its bytes in the file."""

    place: tuple[int, ...]
    offset: int
    size: int


class _Storage(NamedTuple):
    dtype: np.dtype
    shape: tuple[int, int, int]
    part_shape: tuple[int, int, int]  # of every part; those at the right and bottom reach beyond the dataset
    filters: tuple[int, ...]
    parts: list[_Part]


def decode_flo5(data: bytes, name: str) -> np.ndarray:
    """Decode the content of a `.flo5` file.

    Args:
        data: the whole file. Float32 or float64, stored at once or in chunks, plain or with gzip, shuffle, fletcher32.
        name: begins the messages of errors.

    Returns:
        `(H, W, 2)` floating, pixels; NaN where unknown.

    Raises:
        ValueError: damaged, truncated, too long, stored in another way, or no flow.
    """
    _check_superblock(data, name)
    try:
        with h5py.File(io.BytesIO(data), "r") as file:
            storage = _locate(file)
    except Exception as error:  # of damage, h5py raises OSError, RuntimeError, KeyError, OverflowError and more
        raise ValueError(f"{name}: no flow in this HDF5 file: {error}") from error

    height, width, _ = storage.shape
    expected = math.prod(storage.shape) * storage.dtype.itemsize
    ratio = DEFLATE_MAX_RATIO if h5py.h5z.FILTER_DEFLATE in storage.filters else 1
    check_size(name, width, height, expected, min(expected, ratio * sum(part.size for part in storage.parts)))
    values = np.empty(storage.shape, storage.dtype)
    for part in storage.parts:
        target = values[tuple(slice(at, at + side) for at, side in zip(part.place, storage.part_shape, strict=True))]
        content = _unfilter(data, part, storage, name)
        target[...] = content[tuple(slice(side) for side in target.shape)]
    return values


def encode_flo5(flow: np.ndarray) -> bytes:
    """Encode `(H, W, 2)` float32 flow, NaN where unknown, as the content of a `.flo5` file; the same each time.

    One chunk holds all of it, so that no damage goes unnoticed: gzip has a checksum of the data, HDF5 of type and
    shape, and a chunk that is looked for in a wrong place fails gzip's.
    """
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver=WRITTEN_VERSION) as file:
        file.create_dataset("flow", data=flow, dtype="<f4", chunks=flow.shape, compression="gzip", track_times=False)
    return buffer.getvalue()


def _check_superblock(data: bytes, name: str) -> None:
    """Compare the file's length with the one in its superblock (HDF5 file format specification, section II.A)."""
    if data[:8] != SIGNATURE:
        raise ValueError(f"{name}: not an HDF5 file: it must begin with {SIGNATURE!r}; got {data[:8]!r}")
    if len(data) < 48:
        raise ValueError(f"{name}: truncated: the superblock must have 48 bytes; the file holds {len(data)}")
    # Per version, the positions of: the width of an address, the address that others are relative to, the file's end.
    address_width, base, end = SUPERBLOCK_FIELDS.get(data[8], (8, 8, 8))
    if data[8] not in SUPERBLOCK_FIELDS or data[address_width] != 8 or any(data[base : base + 8]):
        raise ValueError(f"{name}: damaged HDF5 superblock: {data[:48]!r}")
    length = int.from_bytes(data[end : end + 8], "little")
    if length != len(data):
        problem = "truncated" if len(data) < length else "too long"
        raise ValueError(f"{name}: {problem}: its HDF5 superblock states {length} bytes, the file holds {len(data)}")


def _locate(file: h5py.File) -> _Storage:
    """Find the parts of "flow" in an open file, without reading them."""
    link = file.get("flow", getlink=True)
    if link is None:
        raise ValueError(f"the file must hold a dataset 'flow'; got {', '.join(file) or 'nothing':.200}")
    if not isinstance(link, h5py.HardLink):
        raise ValueError("'flow' must be in the file itself; got a link to elsewhere")
    dataset = h5py.h5o.open(file.id, b"flow")
    if not isinstance(dataset, h5py.h5d.DatasetID):
        raise ValueError("'flow' must be a dataset; got a group")
    dtypes = [np.dtype(dtype) for hdf5_type, dtype in DTYPES if dataset.get_type() == hdf5_type]
    shape, properties = dataset.shape, dataset.get_create_plist()
    if not dtypes or shape is None or len(shape) != 3 or shape[2] != 2:
        raise ValueError(f"'flow' must be little-endian float32 or float64 (H, W, 2); got {dataset.dtype} {shape}")
    check_pixels("flow", shape[1], shape[0])
    limits = dataset.get_space().get_simple_extent_dims(True)
    if any(limit not in (side, h5py.h5s.UNLIMITED) for side, limit in zip(shape, limits, strict=True)):
        raise ValueError(f"damaged or unfinished: its shape {shape} may grow to {limits}")
    dtype, layout = dtypes[0], properties.get_layout()

    if layout == h5py.h5d.CONTIGUOUS and properties.get_external_count() == 0:
        offset, size = dataset.get_offset(), math.prod(shape) * dtype.itemsize
        if offset is None or dataset.get_storage_size() != size:
            raise ValueError(f"the data must have {size} bytes; got {dataset.get_storage_size()}")
        return _Storage(dtype, shape, shape, (), [_Part((0, 0, 0), offset, size)])

    if layout != h5py.h5d.CHUNKED:
        raise ValueError("the data must be in the file itself, contiguous or in chunks")
    filters = [properties.get_filter(index) for index in range(properties.get_nfilters())]
    codes = tuple(code for code, *_ in filters)
    if codes != tuple(code for code in FILTERS if code in codes):
        raise ValueError(f"filters must be of shuffle, gzip, fletcher32; got {[f[3] for f in filters]}")
    for code, _, options, _ in filters:
        if code == h5py.h5z.FILTER_SHUFFLE and options[:1] != (dtype.itemsize,):
            raise ValueError(f"the shuffle must be of {dtype.itemsize} bytes; got {options}")
    part_shape = properties.get_chunk()
    if len(part_shape) != 3 or 0 in part_shape or math.prod(part_shape) > 2 * MAX_PIXELS:
        raise ValueError(f"chunks must have at most {2 * MAX_PIXELS} values; got shape {part_shape}")
    grid = [range(0, side, step) for side, step in zip(shape, part_shape, strict=True)]
    expected = math.prod(len(places) for places in grid)
    if dataset.get_num_chunks() != expected:
        raise ValueError(f"truncated: there must be {expected} chunks; got {dataset.get_num_chunks()}")
    chunks: list[h5py.h5d.StoreInfo] = []
    dataset.chunk_iter(chunks.append)
    if any(chunk.filter_mask for chunk in chunks):  # parts for which a filter was skipped; these filters never are
        raise ValueError("damaged: some chunks state that they are stored without the filters")
    parts = [_Part(chunk.chunk_offset, chunk.byte_offset, chunk.size) for chunk in chunks]
    if sorted(part.place for part in parts) != list(itertools.product(*grid)):
        raise ValueError("damaged: its chunks do not tile the dataset")
    return _Storage(dtype, shape, part_shape, codes, parts)


def _unfilter(data: bytes, part: _Part, storage: _Storage, name: str) -> np.ndarray:
    """Undo the filters of one part, last one first, and compare its checksums and length."""
    length = math.prod(storage.part_shape) * storage.dtype.itemsize
    content = data[part.offset : part.offset + part.size]
    if h5py.h5z.FILTER_FLETCHER32 in storage.filters:
        content, checksum = content[:-4], content[-4:]
        if _fletcher32(content) != [half % 65535 for half in np.frombuffer(checksum, "<u2").tolist()]:
            raise ValueError(f"{name}: damaged: wrong checksum of the data at byte {part.offset}")
    if h5py.h5z.FILTER_DEFLATE in storage.filters:
        content = inflate(content, length, name)
    if len(content) != length:
        raise ValueError(f"{name}: truncated: there must be {length} bytes at {part.offset}; got {len(content)}")
    if h5py.h5z.FILTER_SHUFFLE in storage.filters:
        content = np.frombuffer(content, np.uint8).reshape(storage.dtype.itemsize, -1).T.tobytes()
    return np.frombuffer(content, storage.dtype).reshape(storage.part_shape)


def _fletcher32(content: bytes) -> list[int]:
    """HDF5's checksum of a chunk: the sum of its 16-bit words and the sum of these sums, both modulo 65535."""
    words = np.frombuffer(content + b"\0" * (len(content) % 2), ">u2")
    sums, block = [0, 0], 2**16  # small enough for 64 bits
    for start in range(0, len(words), block):
        part = words[start : start + block].astype(np.uint64)
        sums[1] += len(part) * sums[0] + int(np.dot(part, np.arange(len(part), 0, -1, dtype=np.uint64)))
        sums[0] += int(part.sum())
    return [total % 65535 for total in sums]
