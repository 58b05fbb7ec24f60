"""Mask files: write then read is exact, damage is an error."""

import io
import struct
import zlib

import cv2
import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flow_data.formats.masks import decode_mask, encode_mask

MASKS = hnp.arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 20)))
EXAMPLE = np.arange(35).reshape(5, 7) % 3 > 0


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def encoded(image: PIL.Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, rows: bytes, depth: int = 8, color: int = 0, interlace: int = 0) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlace))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@given(MASKS)
def test_written_masks_are_read(mask):
    decoded = decode_mask(encode_mask(mask), "a.png")
    assert decoded.dtype == bool
    np.testing.assert_array_equal(decoded, mask)


def test_written_masks_are_white_where_true():
    """As any viewer shows them, and another reader reads them."""
    pixels = np.array(PIL.Image.open(io.BytesIO(encode_mask(EXAMPLE))))
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, np.where(EXAMPLE, 255, 0))


@pytest.mark.parametrize("dtype", [bool, "u1", "i1", "<u2", ">i4", "<i8"])
@given(mask=MASKS)
def test_npy(dtype, mask):
    decoded = decode_mask(npy(mask.astype(dtype)), "a.NPY")
    assert decoded.dtype == bool
    np.testing.assert_array_equal(decoded, mask)


@given(MASKS)
def test_one_bit(mask):
    np.testing.assert_array_equal(decode_mask(encoded(PIL.Image.fromarray(mask)), "a.png"), mask)


@given(hnp.arrays(np.uint8, (4, 5)))
def test_gray_and_palette_are_true_where_not_0(values):
    gray = PIL.Image.fromarray(values)
    np.testing.assert_array_equal(decode_mask(encoded(gray), "a.png"), values != 0)
    indices = PIL.Image.fromarray(values)
    indices.putpalette([255, 255, 255] + [0, 0, 0] * 255)  # the index counts, not the color
    assert indices.mode == "P"
    np.testing.assert_array_equal(decode_mask(encoded(indices), "a.png"), values != 0)


@pytest.mark.parametrize("color", [0, 3])
@pytest.mark.parametrize(("depth", "row"), [(1, b"\x60"), (2, b"\x1c"), (4, b"\x01\xf0"), (8, b"\x00\x01\x80\x00")])
def test_few_bits(depth, row, color):
    expected = [[False, True, True, False]]
    np.testing.assert_array_equal(decode_mask(png(4, 1, b"\0" + row, depth, color), "a.png"), expected)


def test_16_bits():
    """Small values must not be lost on the way to 8 bits."""
    data = cv2.imencode(".png", np.array([[0, 1, 256, 65535]], np.uint16))[1].tobytes()
    np.testing.assert_array_equal(decode_mask(data, "a.png"), [[False, True, True, True]])


def test_other_chunks_change_nothing():
    data = encode_mask(EXAMPLE)
    extra = chunk(b"gAMA", struct.pack(">I", 1)) + chunk(b"tRNS", bytes([0, 255])) + chunk(b"tEXt", b"Comment\0x")
    np.testing.assert_array_equal(decode_mask(data[:33] + extra + data[33:], "a.png"), EXAMPLE)


PNG, NPY = encode_mask(EXAMPLE), npy(EXAMPLE)
RGB = PIL.Image.fromarray(np.zeros((4, 5, 3), np.uint8))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.png", b"", "not a PNG"),
        ("a.png", NPY, "not a PNG"),
        ("a.jpg", encoded(RGB.convert("L"), "JPEG"), "not a PNG"),
        ("a.png", encoded(RGB), "8-bit RGB"),
        ("a.png", encoded(RGB.convert("LA")), "gray and alpha"),
        ("a.png", PNG[:-13], "truncated"),
        ("a.png", PNG[:8], "truncated"),
        ("a.png", PNG[:45] + bytes([PNG[45] ^ 1]) + PNG[46:], "checksum"),
        ("a.png", png(7, 5, bytes(4 * 8)), "truncated"),  # Pillow fills in 0
        ("a.png", png(7, 5, bytes(6 * 8)), "too long"),
        ("a.png", png(7, 5, b"\5" + bytes(5 * 8 - 1)), "filter"),
        ("a.png", png(7, 5, bytes(5 * 8), interlace=1), "interlac"),
        ("a.png", png(7, 5, bytes(5 * 8), depth=7), "7-bit"),
        ("a.png", png(0, 5, b""), "0 x 5"),
        ("a.png", png(2**31, 2**31, b"\0"), "2147483648"),
        ("a.png", png(8000, 8000, b"\0"), "truncated"),
        ("a.npy", PNG, "not a .npy"),
        ("a.npy", NPY[:-1], "truncated"),
        ("a.npy", NPY + b"\0", "too long"),
        ("a.npy", npy(EXAMPLE.astype(np.float32)), "'<f4'"),
        ("a.npy", npy(EXAMPLE.astype(object)), "'|O'"),
        ("a.npy", npy(EXAMPLE[..., None]), r"got \(5, 7, 1\)"),
        ("a.npy", npy(EXAMPLE[0]), r"\(7,\)"),
    ],
)
def test_damage_is_named(name, data, message, capfd):
    with pytest.raises(ValueError, match=message) as error:
        decode_mask(data, f"folder/{name}")
    assert f"folder/{name}" in str(error.value)
    assert capfd.readouterr().err == ""  # OpenCV warns there


BAD_TEXT = chunk(b"tEXt", b"Comment\0x")[:-1] + b"\0"


@pytest.mark.parametrize(
    "data",
    [
        PNG + b"\n",
        PNG + bytes(512),
        PNG + PNG[::-1],
        PNG[:-12],
        PNG[:-5],
        PNG[:-12] + b"end",
        PNG[:33] + BAD_TEXT + PNG[33:],
    ],
    ids=["a line feed", "zeros", "more", "no IEND", "part of IEND", "other bytes", "a wrong checksum of text"],
)
def test_what_touches_no_pixel_is_ignored(data, capfd):
    np.testing.assert_array_equal(decode_mask(data, "a.png"), EXAMPLE)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("name", "original"), [("a.png", PNG), ("a.npy", NPY)])
@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_random_damage_never_crashes(name, original, data):
    damaged = bytearray(original)
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(0, len(original) - 1)) :]
    else:
        damaged[data.draw(st.integers(0, len(original) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        mask = decode_mask(bytes(damaged), name)
    except ValueError as error:
        assert name in str(error)
        return
    assert mask.dtype == bool and mask.size <= EXAMPLE.size
    if name == "a.png":  # every byte of it is under a checksum
        assert damaged[:-12].startswith(original[:-12][: len(damaged) - 12]) and len(damaged) >= len(original) - 12
        np.testing.assert_array_equal(mask, EXAMPLE)
    else:
        assert len(damaged) == len(original)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (EXAMPLE.astype(np.uint8), r"got uint8 \(5, 7\)"),
        (EXAMPLE[None], r"got bool \(1, 5, 7\)"),
        (EXAMPLE[:0], r"got bool \(0, 7\)"),
        ([[True]], "got list"),
    ],
)
def test_arrays_that_are_no_mask_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        encode_mask(mask)
