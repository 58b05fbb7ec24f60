"""Images decode to the same pixels however they are stored, and damage is always an error, never decoded."""

import io
import random
import struct
import zlib

import cv2
import datasets
import numpy as np
import PIL.Image
import pytest
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from flow_data import images
from flow_data.features import FLOW_FEATURES, to_sample
from flow_data.formats import limits
from flow_data.images import disable_image_decoding, read_rgb
from flow_data.synthetic import SyntheticOptions, synthetic

HEIGHT, WIDTH = 37, 53
COLOR = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)
RGBA = PIL.Image.fromarray(COLOR)
RGB = PIL.Image.fromarray(np.ascontiguousarray(COLOR[..., :3]))


@pytest.fixture(params=["kornia-rs", "opencv"], autouse=True)
def decoder(request, monkeypatch):
    """Every test runs with the quick decoder, and as if that refused everything."""

    def refuse(*_):
        raise ValueError

    if request.param == "opencv":
        monkeypatch.setattr(images, "decode_image_png_u8", refuse)


def encoded(image: PIL.Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def stored(data: bytes, path: str | None = None) -> dict:
    return {"bytes": data, "path": path}


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(rows: bytes, depth: int = 8, color: int = 2, *, compressed: bytes | None = None, extra: bytes = b"") -> bytes:
    """A PNG made by hand, of rows with their filter bytes."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, depth, color, 0, 0, 0))
    pixels = zlib.compress(rows) if compressed is None else compressed
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def interlaced(pixels: np.ndarray) -> bytes:
    """A PNG in the seven passes of Adam7 (PNG specification, section 8.2), which Pillow does not write."""
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = [row.tobytes() for top, left, down, right in passes for row in pixels[top::down, left::right]]
    data = png(b"".join(b"\0" + row for row in rows))
    return data[:8] + chunk(b"IHDR", data[16:28] + b"\1") + data[33:]


ROWS = b"".join(b"\0" + row.tobytes() for row in COLOR[..., :3])
IEND = chunk(b"IEND", b"")
SIDEWAYS = PIL.Image.Exif()
SIDEWAYS[0x112] = 6  # orientation: turn by 90 degrees
LOSSLESS = {
    "RGB": encoded(RGB),
    "interlaced": interlaced(COLOR[..., :3]),
    "gray": encoded(RGB.convert("L")),
    "RGBA": encoded(RGBA),
    "gray and alpha": encoded(RGBA.convert("LA")),
    "palette": encoded(RGB.convert("P")),
    "palette of 4": encoded(RGB.quantize(4), bits=2),
    "transparent palette": encoded(RGB.quantize(16), transparency=bytes([0, 100] * 8)),
    "transparent color": encoded(RGB, transparency=(1, 2, 3)),
    "turned": encoded(RGB, exif=SIDEWAYS),
    "gamma": png(ROWS, extra=chunk(b"gAMA", struct.pack(">I", 22000))),
    "gray in 2 bits": png(b"".join(b"\0" + bytes(range(row, row + 14)) for row in range(HEIGHT)), depth=2, color=0),
    "PPM": encoded(RGB, "PPM"),
    "PPM, other spaces": b"P6 \n%d %d \n255\n" % (WIDTH, HEIGHT) + RGB.tobytes(),
    "PPM, a comment": b"P6\n# so it is\n%d %d\n255\n" % (WIDTH, HEIGHT) + RGB.tobytes(),
    "PGM": encoded(RGB.convert("L"), "PPM"),
    "BMP": encoded(RGB, "BMP"),
    "WebP": encoded(RGB, "WEBP", lossless=True),
}


@pytest.mark.filterwarnings("ignore:Palette images")
@pytest.mark.parametrize("kind", LOSSLESS)
def test_stored_and_pillow_images_give_the_same_pixels(kind):
    data = LOSSLESS[kind]
    pixels = read_rgb(stored(data), "x")
    oracle = PIL.Image.open(io.BytesIO(data))
    np.testing.assert_array_equal(pixels, np.array(oracle.convert("RGB")))
    np.testing.assert_array_equal(pixels, read_rgb(oracle, "x"))
    assert pixels.shape == (HEIGHT, WIDTH, 3) and pixels.dtype == np.uint8
    assert pixels.flags.writeable and pixels.flags.c_contiguous


@pytest.mark.parametrize("options", [{}, {"exif": SIDEWAYS}, {"progressive": True}, {"subsampling": 2}])
def test_jpeg_is_nearly_what_opencv_makes_of_it(options):
    smooth = PIL.Image.fromarray(cv2.GaussianBlur(np.array(RGB), (0, 0), 3))
    data = encoded(smooth, "JPEG", quality=95, **options)
    pixels = read_rgb(stored(data), "x")
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    other = cv2.imdecode(np.frombuffer(data, np.uint8), flags)[..., ::-1]
    assert np.abs(pixels.astype(int) - other).max() <= 2
    np.testing.assert_array_equal(pixels, read_rgb(PIL.Image.open(io.BytesIO(data)), "x"))


def test_files_are_read_where_there_are_no_bytes(tmp_path):
    for name, data in (("a.png", LOSSLESS["RGB"]), ("a.ppm", LOSSLESS["PPM"])):
        path = tmp_path / name
        path.write_bytes(data)
        np.testing.assert_array_equal(read_rgb(stored(None, str(path)), "x"), np.array(RGB))
        path.unlink()
        with pytest.raises(FileNotFoundError, match=name):
            read_rgb(stored(None, str(path)), "x")
    with pytest.raises(ValueError, match="pair 7.*neither"):
        read_rgb(stored(None), "pair 7")


@pytest.mark.parametrize(
    "data",
    [
        png(b"".join(b"\0" + row.tobytes() * 2 for row in COLOR[..., :3]), depth=16),
        png(b"".join(b"\0" + row.tobytes() for row in COLOR[..., :2]), depth=16, color=0),
    ],
    ids=["48 bits", "16 bits"],
)
def test_other_depths_are_no_8_bit_images(data):
    """Alone they have no range of intensities; `read_pair` reads them."""
    with pytest.raises(ValueError, match="pair 7: image1: an image must have 8 bits; got uint16"):
        read_rgb(stored(data), "pair 7: image1")


@pytest.mark.parametrize("data", [encoded(RGB.convert("1")), encoded(RGB.convert("CMYK"), "JPEG")], ids=["1", "CMYK"])
def test_other_color_spaces_are_converted(data):
    np.testing.assert_array_equal(
        read_rgb(stored(data), "x"), np.array(PIL.Image.open(io.BytesIO(data)).convert("RGB"))
    )


# ---- damage ----


def assert_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"pair 7: image1 \(frame_0001.png\)"):
        read_rgb(stored(data, "frame_0001.png"), "pair 7: image1")


@pytest.mark.parametrize("kind", ["RGB", "gray", "RGBA", "palette", "PPM", "PGM"])
def test_truncated_files_are_refused(kind):
    data = LOSSLESS[kind]
    end = len(data) - len(IEND) if data.startswith(b"\x89PNG") else len(data)  # of the pixel data
    for length in {*range(0, end, 61), end - 1, end - 5}:
        assert_refused(data[:length])


def test_truncated_jpeg_is_refused():
    data = encoded(RGB, "JPEG", quality=95)
    for length in range(0, len(data) - 2, 61):
        assert_refused(data[:length])


@settings(deadline=None, max_examples=300)
@given(place=st.integers(0, len(LOSSLESS["RGB"]) - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_in_a_png_is_refused_or_touches_no_pixel(place, bit):
    data = LOSSLESS["RGB"]
    damaged = bytearray(data)
    damaged[place] ^= 1 << bit
    if data.index(b"IEND") <= place < len(data) - 4:  # it may name an ancillary chunk now
        try:
            np.testing.assert_array_equal(read_rgb(stored(bytes(damaged)), "x"), np.array(RGB))
        except ValueError as error:
            assert "IEND" in str(error) or "checksum" in str(error)
    else:
        assert_refused(bytes(damaged))


# ---- what does not touch the pixels of a PNG ----

PNGS = {kind: data for kind, data in LOSSLESS.items() if data.startswith(b"\x89PNG")}
AFTER_IEND = {
    "a zero": b"\0",
    "zeros": bytes(512),
    "a line feed": b"\n",
    "a camera's block": b"SEFHj\0\0\0" + bytes(range(256)) + b"SEFT",
    "another PNG": encoded(PIL.Image.new("RGB", (WIDTH, HEIGHT), "red")),
    "a chunk": chunk(b"IDAT", zlib.compress(b"")),
}
IN_PLACE_OF_IEND = {
    "nothing": b"",
    "part of it": IEND[:5],
    "all but a byte of it": IEND[:-1],
    "zeros": bytes(64),
    "text": b"camera: unknown\n",
    "a text chunk": chunk(b"tEXt", b"Comment\0x"),
    "a length beyond the end": struct.pack(">I", 10**6) + b"tEXtComment\0x",
    "a length beyond the end, and IEND": struct.pack(">I", 2**31) + b"eXIfMM" + IEND,
}


def assert_read(data: bytes, expected: bytes, capfd) -> None:
    """The pixels are those that Pillow reads from the same file undamaged; and no decoder warns."""
    pixels = read_rgb(stored(data), "x")
    np.testing.assert_array_equal(pixels, np.array(PIL.Image.open(io.BytesIO(expected)).convert("RGB")))
    assert pixels.flags.writeable
    assert capfd.readouterr().err == ""


@pytest.mark.filterwarnings("ignore:Palette images")
@pytest.mark.parametrize("kind", PNGS)
def test_what_follows_a_png_is_ignored(kind, capfd):
    for what in AFTER_IEND.values():
        assert_read(PNGS[kind] + what, PNGS[kind], capfd)


@pytest.mark.filterwarnings("ignore:Palette images")
@pytest.mark.parametrize("kind", PNGS)
def test_a_png_may_lack_its_end(kind, capfd):
    for what in IN_PLACE_OF_IEND.values():
        assert_read(PNGS[kind][: -len(IEND)] + what, PNGS[kind], capfd)


@pytest.mark.filterwarnings("ignore:Palette images")
@pytest.mark.parametrize("kind", PNGS)
@pytest.mark.parametrize("name", ["tEXt", "iTXt", "zTXt", "eXIf", "pHYs", "tIME", "gAMA", "iCCP", "tRNS", "acTL"])
def test_ancillary_chunks_may_be_damaged(kind, name, capfd):
    """A wrong checksum, before the pixel data and after it."""
    wrong = chunk(name.encode(), b"Comment\0words")[:-1] + b"\0"
    data = PNGS[kind]
    for place in (33, len(data) - len(IEND)):
        assert_read(data[:place] + wrong + data[place:], data, capfd)


def test_shared_samples_of_such_files(capfd):
    folder = SHARED / "field" / "png"
    if not folder.is_dir():
        pytest.skip(f"the problem inputs are not there: {folder}")
    for path in sorted(folder.glob("*.png")):
        frame = folder.parent / f"f{path.stem[-1]}.png"
        assert_read(path.read_bytes(), frame.read_bytes(), capfd)


def split_png(pieces: int) -> list[bytes]:
    """Signature and header, so many IDAT chunks, IEND."""
    size = -(-len(GOOD) // pieces)
    idats = [chunk(b"IDAT", GOOD[start : start + size]) for start in range(0, len(GOOD), size)]
    return [png(ROWS)[:33], *idats, IEND]


def test_a_cut_between_chunks_of_pixel_data_is_refused(capfd):
    parts = split_png(7)
    whole = b"".join(parts)
    for count in range(1, 8):
        for end in (*IN_PLACE_OF_IEND.values(), IEND):
            assert_refused(b"".join(parts[:count]) + end)
    capfd.readouterr()  # OpenCV's words on those with an IEND
    assert_read(b"".join(parts[:8]), whole, capfd)


def test_pixel_data_under_a_damaged_name_is_missed():
    """IDAT with a small letter would be an ancillary chunk, which may be damaged; but the pixels need it."""
    for number in range(1, 8):
        parts = split_png(7)
        parts[number] = parts[number].replace(b"IDAT", b"iDAT", 1)
        assert_refused(b"".join(parts))
        assert_refused(b"".join(parts[:8]))


def test_damage_of_critical_chunks_is_refused():
    palette = LOSSLESS["palette"]
    place = palette.index(b"PLTE") + 10
    assert_refused(palette[:place] + bytes([palette[place] ^ 1]) + palette[place + 1 :])
    unknown = chunk(b"ABCD", b"")[:-1] + b"\0"  # a capital: the image cannot be understood without it
    assert_refused(LOSSLESS["RGB"][:33] + unknown + LOSSLESS["RGB"][33:])
    assert_refused(png(ROWS)[:-4] + b"\0\0\0\0")


# ---- sizes ----


def blank(width: int, height: int, kind: str) -> bytes:
    return encoded(PIL.Image.new("L" if kind == "PNG" else "RGB", (width, height)), kind)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "PPM", "BMP"])
def test_one_limit_for_every_format(kind, monkeypatch, recwarn):
    """It is Pillow's own, whose default is checked, too."""
    assert limits.MAX_PIXELS == 2 * PIL.Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(limits, "MAX_PIXELS", 60 * 40)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 60 * 40 / 2)
    assert read_rgb(stored(blank(60, 40, kind)), "x").shape == (40, 60, 3)
    assert not recwarn.list
    with pytest.raises(ValueError, match="x: size must be 1 to at most"):
        read_rgb(stored(blank(60, 41, kind)), "x")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ValueError, match="x: size must be 1 to at most 2400 pixels; got 60 x 41"):
        read_rgb(stored(blank(60, 41, kind)), "x")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_large_frames_are_read(kind, recwarn):
    pixels = read_rgb(stored(blank(11000, 9000, kind)), "x")
    assert pixels.shape == (9000, 11000, 3) and not pixels.any()
    assert not recwarn.list


GOOD = zlib.compress(ROWS)


@pytest.mark.parametrize(
    "data",
    [
        png(b"", compressed=zlib.compress(ROWS[: len(ROWS) // 2])),  # Pillow fills up what is missing
        png(b"", compressed=GOOD[: len(GOOD) // 2]),
        png(b"", compressed=b""),
        png(b"", compressed=b"\0" * 2000),
        png(b"\x07" + ROWS[1:]),
        LOSSLESS["RGB"][:33] + LOSSLESS["RGB"][-12:],
        LOSSLESS["RGB"][:8] + LOSSLESS["RGB"][33:],
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", GOOD) + chunk(b"IEND", b""),
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 0, 5, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", GOOD) + chunk(b"IEND", b""),
        b"P6\n1000000 1000000\n255\n" + b"\0" * 100,
        b"P6\n0 5\n255\n",
        b"", b"GIF", b"not a picture" * 20,
    ],
    ids=["half its rows", "half its stream", "no stream", "no zlib stream", "unknown filter", "no IDAT", "no IHDR",
         "enormous", "no pixel", "enormous PPM", "empty PPM", "nothing", "no GIF", "text"],
)  # fmt: skip
def test_files_that_are_wrong_in_themselves_are_refused(data):
    assert_refused(data)


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 2**32))
def test_random_damage_gives_pixels_or_a_value_error(seed):
    """Where a format has no checksum, some damage cannot be seen; but it neither crashes nor changes the size."""
    rng = random.Random(seed)
    data = bytearray(rng.choice([LOSSLESS["PPM"], LOSSLESS["BMP"], LOSSLESS["PGM"], encoded(RGB, "JPEG")]))
    for _ in range(rng.randint(1, 5)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    try:
        pixels = read_rgb(stored(bytes(data)), "x")
    except ValueError:
        return
    assert pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8


def test_truncated_pillow_images_are_refused():
    for kind, data in (("PNG", LOSSLESS["RGB"]), ("JPEG", encoded(RGB, "JPEG", quality=95))):
        image = PIL.Image.open(io.BytesIO(data[: len(data) // 2]), formats=[kind])  # decoded when it is looked at
        with pytest.raises(ValueError, match="pair 7: image1.*truncated"):
            read_rgb(image, "pair 7: image1")


# ---- data sets ----


def test_decoding_disabled_rows_make_the_same_samples(tmp_path):
    flow = np.ones((HEIGHT, WIDTH, 2), np.float32)
    row = {
        "id": "7",
        "image1": stored(LOSSLESS["RGB"], "a.png"),
        "image2": stored(LOSSLESS["gray"], "b.png"),
        "flow": (flow, None),
        "valid": None,
        "note": "of no use",
    }
    columns = {key: datasets.features.features.encode_nested_example(FLOW_FEATURES[key], value)
               for key, value in row.items() if key in FLOW_FEATURES}  # fmt: skip
    columns["note"] = row["note"]
    features = datasets.Features({**FLOW_FEATURES, "note": datasets.Value("string")})
    dataset = datasets.Dataset.from_list([columns], features=features)
    for rows in (dataset, dataset.to_iterable_dataset()):
        quick = disable_image_decoding(rows)
        assert set(quick.features) == set(FLOW_FEATURES)
        stored_row, decoded_row = next(iter(quick)), next(iter(rows))
        assert stored_row["image1"]["bytes"] == LOSSLESS["RGB"]
        for array, expected in zip(to_sample(stored_row), to_sample(decoded_row), strict=True):
            np.testing.assert_array_equal(array, expected)


@pytest.mark.slow
def test_decoding_disabled_leaves_drawn_rows_alone():
    rows = synthetic(SyntheticOptions(image_size=(32, 48)), num_pairs=2)
    assert disable_image_decoding(rows) is rows
    assert to_sample(rows[1]).image1.shape == (32, 48, 3)
