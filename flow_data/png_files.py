"""PNG files as they must be before a decoder sees them (PNG specification, sections 5, 10 and 11.2).

OpenCV warns on stderr and Pillow fills missing rows with 0 where this module raises.
"""

import struct
import zlib
from typing import NamedTuple

from flow_data.file_limits import DEFLATE_MAX_RATIO, check_size, inflate

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_GREY, PNG_RGB, PNG_PALETTE = 0, 2, 3
COLOUR_TYPES = {0: ("grey", 1), 2: ("RGB", 3), 3: ("palette", 1), 4: ("grey and alpha", 2), 6: ("RGBA", 4)}


class PngHeader(NamedTuple):
    """The IHDR chunk: width and height in pixels, bits per channel, colour type, and three methods."""

    width: int
    height: int
    depth: int
    colour: int
    compression: int
    filtering: int
    interlace: int

    def __str__(self) -> str:
        kind = COLOUR_TYPES[self.colour][0] if self.colour in COLOUR_TYPES else f"colour type {self.colour}"
        return f"{self.depth}-bit {kind} PNG"


def read_png(data: bytes, name: str) -> tuple[PngHeader, bytes]:
    """Take a PNG apart; the checksums of all its chunks are compared.

    Args:
        data: the whole file.
        name: errors are told with it.

    Returns:
        The header, and the compressed pixel data (what all IDAT chunks hold).

    Raises:
        ValueError: damaged, truncated, too long, or no PNG.
    """
    if data[:8] != PNG_SIGNATURE:
        raise ValueError(f"{name}: not a PNG: expected it to begin with {PNG_SIGNATURE!r}, received {data[:8]!r}")
    header, compressed, position, kind = b"", [], 8, b""
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
            header = body
        if kind == b"IDAT":
            compressed.append(body)
        position = end
    if position != len(data):
        raise ValueError(f"{name}: too long: {len(data) - position} bytes after the PNG's IEND chunk")
    return PngHeader(*struct.unpack(">IIBBBBB", header)), b"".join(compressed)


def plain_png(header: PngHeader, compressed: bytes, name: str) -> bytes:
    """Put together the same pixels as a PNG for a decoder; their amount and zlib's checksum are compared.

    Args:
        header: as `read_png` gives it.
        compressed: likewise.
        name: errors are told with it.

    Returns:
        A PNG without other chunks, so that no gamma, palette or transparency touches the pixels, and not compressed,
        so that nothing is inflated twice.

    Raises:
        ValueError: damaged, truncated, too long, or interlaced.
    """
    known = header.colour in COLOUR_TYPES and header.depth in (1, 2, 4, 8, 16)
    if not known or header.compression or header.filtering or header.interlace:
        raise ValueError(f"{name}: expected a PNG without interlacing, received an interlaced or damaged {header}")
    stride = 1 + (header.width * header.depth * COLOUR_TYPES[header.colour][1] + 7) // 8  # a filter byte first
    size = stride * header.height
    # A stream that cannot possibly hold these rows is refused before it is inflated.
    check_size(name, header.width, header.height, size, min(size, len(compressed) * DEFLATE_MAX_RATIO))
    rows = inflate(compressed, size, name)
    if max(rows[::stride]) > 4:
        raise ValueError(f"{name}: damaged PNG: a row has an unknown filter")
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", *header)), (b"IDAT", zlib.compress(rows, 0)), (b"IEND", b""))
    return PNG_SIGNATURE + b"".join(_chunk(kind, body) for kind, body in chunks)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))
