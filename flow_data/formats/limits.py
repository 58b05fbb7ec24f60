"""How large images, flow and masks may be, and headers that are compared with the bytes that there are.

One limit holds for frames of every format, flow and masks, so that the flow of any frame that can be read can be
written. It is Pillow's own: twice its `MAX_IMAGE_PIXELS`, beyond which it refuses an image as a decompression bomb.
"""

import zlib

MAX_PIXELS = 178_956_970  # 13,377 x 13,377; flow of that size takes 1.4 GB
MAX_FILE_BYTES = MAX_PIXELS * 17 + 2**16  # the widest pixel is two float64 and a bool, in an uncompressed .npz

DEFLATE_MAX_RATIO = 1032  # zlib cannot expand a byte into more


def check_pixels(name: str, width: int, height: int) -> None:
    """Refuse a size before anything of that size is read, allocated or computed.

    Args:
        name: begins the message of the error.
        width: pixels.
        height: pixels.

    Raises:
        ValueError: no size of 1 to `MAX_PIXELS` pixels.
    """
    if width <= 0 or height <= 0 or width * height > MAX_PIXELS:
        raise ValueError(f"{name}: size must be 1 to at most {MAX_PIXELS} pixels; got {width} x {height}")


def check_size(name: str, width: int, height: int, expected: int, received: int) -> None:
    """Compare what a header promises with what there is, before anything of that size is allocated.

    Args:
        name: begins the messages of errors.
        width: pixels, as the header states.
        height: pixels, as the header states.
        expected: bytes that a file of that size has.
        received: bytes that there are.

    Raises:
        ValueError: no size of 1 to `MAX_PIXELS` pixels, or a file that is truncated or too long for it.
    """
    check_pixels(name, width, height)
    if received < expected:
        raise ValueError(f"{name}: truncated: {width} x {height} needs {expected} bytes, the file holds {received}")
    if received > expected:
        raise ValueError(f"{name}: too long: {width} x {height} needs {expected} bytes, the file holds {received}")


def inflate(stream: bytes, expected: int, name: str) -> bytes:
    """Decompress one zlib stream (RFC 1950) that must hold a known number of bytes; its checksum is compared.

    Args:
        stream: the whole stream.
        expected: bytes it must expand to; never much more is allocated, whatever size the stream states.
        name: begins the messages of errors.

    Returns:
        The `expected` bytes.

    Raises:
        ValueError: damaged, truncated, or of another length.
    """
    inflater = zlib.decompressobj()
    try:
        data = inflater.decompress(stream, expected + 1)
    except zlib.error as error:
        raise ValueError(f"{name}: damaged: {error}") from error
    if len(data) != expected:
        problem, received = ("too long", "more") if len(data) > expected else ("truncated", str(len(data)))
        raise ValueError(f"{name}: {problem}: compressed data must expand to {expected} bytes; got {received}")
    if not inflater.eof or inflater.unused_data:
        raise ValueError(f"{name}: damaged: its compressed data does not end where it should")
    return data
