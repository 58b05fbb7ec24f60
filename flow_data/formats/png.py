"""PNG files as they must be before a decoder sees them (PNG specification, sections 5, 8, 10 and 11.2).

Header, palette and pixel data must be whole. What else other programs write, damage or leave out does not touch the
pixels: bytes after the IEND chunk, a missing IEND chunk, and ancillary chunks (text, time, EXIF) with a wrong checksum
or length. Every decoder refuses some of these files, OpenCV warns on stderr, and Pillow fills missing rows with 0. So
`read_png` finds out what is whole, and `plain_png` writes the same pixels as a PNG that every decoder takes.
"""

import struct
import zlib
from typing import NamedTuple

from flow_data.formats.limits import DEFLATE_MAX_RATIO, check_size, inflate

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_GRAY, PNG_RGB, PNG_PALETTE = 0, 2, 3
COLOR_TYPES = {0: ("gray", 1), 2: ("RGB", 3), 3: ("palette", 1), 4: ("gray and alpha", 2), 6: ("RGBA", 4)}
ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
# passes of an interlaced image: first row, first column, step of rows, step of columns


class PngHeader(NamedTuple):
    """The IHDR chunk: width and height in pixels, bits per channel, color type, and three methods."""

    width: int
    height: int
    depth: int
    color: int
    compression: int
    filtering: int
    interlace: int

    def __str__(self) -> str:
        kind = COLOR_TYPES[self.color][0] if self.color in COLOR_TYPES else f"color type {self.color}"
        return f"{self.depth}-bit {kind} PNG"


class Png(NamedTuple):
    """The parts of a PNG that pixels are decoded from.

    Args:
        header: the IHDR chunk.
        palette: content of the PLTE chunk, empty where there is none.
        compressed: content of the IDAT chunks, views of the file.
        intact: the file is a PNG without any damage, up to its IEND chunk. False where this chunk is missing or an
            ancillary one is damaged: then only `plain_png` proves that the pixel data is complete.
    """

    header: PngHeader
    palette: bytes
    compressed: list[memoryview]
    intact: bool


def read_png(data: bytes, name: str) -> Png:
    """Take a PNG apart. The checksums of all its chunks are compared.

    Args:
        data: the whole file; what follows the IEND chunk (a second PNG, say) is ignored.
        name: begins the messages of errors.

    Returns:
        The parts. Where it is not intact, pixel data may be missing.

    Raises:
        ValueError: no PNG; a critical chunk (header, palette, pixel data, end) that is damaged, truncated or missing,
            a missing IEND chunk excepted.
    """
    if data[:8] != PNG_SIGNATURE:
        raise ValueError(f"{name}: not a PNG: it must begin with {PNG_SIGNATURE!r}; got {data[:8]!r}")
    view = memoryview(data)  # whose slices are not copies
    header, palette, compressed = b"", b"", []
    position, kind, intact = 8, b"", True
    while kind != b"IEND":
        length, kind = int.from_bytes(view[position : position + 4], "big"), bytes(view[position + 4 : position + 8])
        critical, end = kind[:1].isupper(), position + 12 + length
        if len(kind) < 4 or not kind.isalpha():  # the file's end, or no chunk
            intact = False
            break
        if end > len(data):
            if critical and (kind, length) != (b"IEND", 0):
                raise ValueError(f"{name}: truncated PNG: chunk {kind!r} at byte {position} ends after the file")
            intact = False
            break
        body = view[position + 8 : end - 4]
        if zlib.crc32(body, zlib.crc32(kind)) != int.from_bytes(view[end - 4 : end], "big"):
            if critical:
                raise ValueError(f"{name}: damaged PNG: wrong checksum in chunk {kind!r} at byte {position}")
            intact = False
        if (kind == b"IHDR") != (position == 8) or (kind == b"IHDR" and length != 13):
            raise ValueError(f"{name}: damaged PNG: there must be one IHDR chunk of 13 bytes, and that first")
        if kind == b"IHDR":
            header = bytes(body)
        elif kind == b"PLTE":
            palette = bytes(body)
        elif kind == b"IDAT":
            compressed.append(body)
        position = end
    if not header or not compressed:
        missing = "IDAT chunk (pixel data)" if header else "IHDR chunk (header)"
        raise ValueError(f"{name}: truncated or damaged PNG: no {missing} in {len(data)} bytes")
    return Png(PngHeader(*struct.unpack(">IIBBBBB", header)), palette, compressed, intact)


def plain_png(png: Png, name: str) -> bytes:
    """Write the same pixels as a PNG for a decoder; their amount and zlib's checksum are compared.

    Args:
        png: as `read_png` returns it.
        name: begins the messages of errors.

    Returns:
        A PNG without ancillary chunks, so that no gamma or transparency touches the pixels, and not compressed, so
        that nothing is inflated twice.

    Raises:
        ValueError: damaged, truncated, or too long.
    """
    header = png.header
    known = header.color in COLOR_TYPES and header.depth in (1, 2, 4, 8, 16) and header.interlace in (0, 1)
    if not known or header.compression or header.filtering:
        raise ValueError(f"{name}: damaged PNG: the header states an unknown kind, a {header}")
    size = sum(rows * stride for rows, stride in _passes(header))
    compressed = b"".join(png.compressed)
    # A stream that cannot possibly hold these rows is refused before it is inflated.
    check_size(name, header.width, header.height, size, min(size, len(compressed) * DEFLATE_MAX_RATIO))
    rows = inflate(compressed, size, name)
    start = 0
    for count, stride in _passes(header):
        if max(rows[start : start + count * stride : stride]) > 4:
            raise ValueError(f"{name}: damaged PNG: a row has an unknown filter")
        start += count * stride
    palette = ((b"PLTE", png.palette),) if png.palette else ()
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", *header)), *palette, (b"IDAT", zlib.compress(rows, 0)), (b"IEND", b""))
    return PNG_SIGNATURE + b"".join(_chunk(kind, body) for kind, body in chunks)


def _passes(header: PngHeader) -> list[tuple[int, int]]:
    """(rows, bytes in a row) of every pass that has pixels; a row begins with the byte that names its filter."""
    passes = ADAM7 if header.interlace else ((0, 0, 1, 1),)
    sizes = [
        (-((top - header.height) // down), -((left - header.width) // right)) for top, left, down, right in passes
    ]
    bits = header.depth * COLOR_TYPES[header.color][1]
    return [(rows, 1 + (columns * bits + 7) // 8) for rows, columns in sizes if rows > 0 and columns > 0]


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))
