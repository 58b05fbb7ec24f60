"""Flow files: write then read is exact, damage is an error."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flow_data.flow_io import FLOW_SUFFIXES, MAX_PIXELS, decode_flow, encode_flow, read_flow, write_flow

FLOATING = (".flo", ".pfm", ".npy")
SIZES = st.tuples(st.integers(1, 6), st.integers(1, 7))


def fields(components):
    """Strategy of `(H, W, 2)` float32 flow."""
    return SIZES.flatmap(lambda size: hnp.arrays(np.float32, (*size, 2), elements=components))


FINITE = st.floats(-1e9, 1e9, width=32)
STEPS = st.integers(0, 2**16 - 1).map(lambda code: (code - 2**15) / 64)  # everything a KITTI file can hold


def example_flow(height: int = 5, width: int = 7) -> np.ndarray:
    """Multiples of 1/64 that every format holds, different in every component, row and column."""
    return (np.arange(height * width * 2, dtype=np.float32).reshape(height, width, 2) - 31) / 64


def assert_same_bits(received, expected):
    np.testing.assert_array_equal(received.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("suffix", FLOATING)
@given(data=st.data())
def test_floats_survive_bit_by_bit(suffix, data):
    flow = data.draw(fields(FINITE))
    decoded, valid = decode_flow(encode_flow(flow, None, suffix), f"a{suffix}")
    assert decoded.dtype == np.float32 and valid.dtype == bool and valid.all()
    assert_same_bits(decoded, flow)


@given(fields(STEPS))
def test_png_keeps_multiples_of_a_64th(flow):
    decoded, valid = decode_flow(encode_flow(flow, None, ".png"), "a.png")
    assert valid.all()
    np.testing.assert_array_equal(decoded, flow)


@pytest.mark.parametrize("suffix", FLOW_SUFFIXES)
@given(data=st.data())
def test_unknown_flow_stays_unknown_and_reads_as_zero(suffix, data):
    flow = data.draw(fields(STEPS))
    valid = data.draw(hnp.arrays(bool, flow.shape[:2]))
    decoded, decoded_valid = decode_flow(encode_flow(flow, valid, suffix), f"a{suffix}")
    np.testing.assert_array_equal(decoded_valid, valid)
    np.testing.assert_array_equal(decoded, np.where(valid[..., None], flow, 0))


@pytest.mark.parametrize("suffix", FLOW_SUFFIXES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1.1e9, 1e10])
def test_values_that_are_no_flow_become_unknown(suffix, value):
    flow = example_flow()
    flow[1, 2, 1] = value
    decoded, valid = decode_flow(encode_flow(flow, np.ones((5, 7), bool), suffix), f"a{suffix}")
    assert not valid[1, 2] and valid.sum() == 34
    np.testing.assert_array_equal(decoded[1, 2], 0)


@pytest.mark.parametrize(("value", "known"), [(-512, True), (-512.01, False), (511.98438, True), (511.995, False)])
def test_png_range(value, known):
    flow = np.full((2, 2, 2), value, np.float32)
    assert decode_flow(encode_flow(flow, None, ".png"), "a.png")[1].all() == known


def test_half_unknown_flow_is_written_as_unknown():
    flow = np.array([[[1, np.nan]]], np.float32)
    assert encode_flow(flow, None, ".flo")[12:] == struct.pack("<2f", 1e10, 1e10)
    assert np.isnan(np.load(io.BytesIO(encode_flow(flow, None, ".npy")))).all()
    assert np.isnan(np.frombuffer(encode_flow(flow, None, ".pfm")[-12:-4], "<f4")).all()


def test_png_rounds_to_the_nearest():
    flow = np.array([[[0.6 / 64, -0.6 / 64], [0.4 / 64, -0.4 / 64]]], np.float32)
    decoded, _ = decode_flow(encode_flow(flow, None, ".png"), "a.png")
    np.testing.assert_array_equal(decoded * 64, [[[1, -1], [0, 0]]])


def test_flo_layout():
    flow = np.array([[[1, 2], [3, 4], [5, 6]]], np.float32)  # one row, three columns
    data = encode_flow(flow, np.array([[True, True, False]]), ".flo")
    assert data == struct.pack("<fii6f", 202021.25, 3, 1, 1, 2, 3, 4, 1e10, 1e10)
    unknown = struct.pack("<fii6f", 202021.25, 3, 1, 1, 2, 3, -1.7e9, float("nan"), 6)
    np.testing.assert_array_equal(decode_flow(unknown, "a.flo")[1], [[True, False, False]])


@pytest.mark.parametrize("order", ["<", ">"])
def test_pfm_layout(order):
    """Rows are bottom-up, the sign of the scale is the byte order, the third channel is no flow."""
    rows = np.array([[[1, 2, 9], [3, 4, 9]], [[5, 6, 9], [7, 8, 9]]], f"{order}f4")
    data = b"PF\n2 2\n%s\n" % (b"-1.0" if order == "<" else b"1.0") + rows.tobytes()
    flow, valid = decode_flow(data, "a.pfm")
    np.testing.assert_array_equal(flow, [[[5, 6], [7, 8]], [[1, 2], [3, 4]]])
    assert valid.all() and flow.dtype == np.float32 and flow.dtype.isnative
    assert encode_flow(flow, None, ".pfm").startswith(b"PF\n2 2\n-1.0\n")


def test_png_layout():
    """Red is u, green v, blue says whether they are known."""
    rgb = np.array([[[2**15 + 64, 2**15 - 128, 1], [2**15 + 1, 7, 0]]], np.uint16)
    data = cv2.imencode(".png", rgb[..., ::-1])[1].tobytes()
    flow, valid = decode_flow(data, "a.png")
    np.testing.assert_array_equal(flow, [[[1, -2], [0, 0]]])
    np.testing.assert_array_equal(valid, [[True, False]])
    written = cv2.imdecode(np.frombuffer(encode_flow(flow, valid, ".png"), np.uint8), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(written[..., ::-1], [[[2**15 + 64, 2**15 - 128, 1], [0, 0, 0]]])


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_of_numpy(tmp_path, dtype, order):
    np.save(tmp_path / "a.npy", np.asarray(example_flow(), dtype, order=order))
    np.testing.assert_array_equal(read_flow(tmp_path / "a.npy")[0], example_flow())


@pytest.mark.parametrize("suffix", [*FLOW_SUFFIXES, ".FLO", ".PNG"])
def test_files(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    write_flow(path, np.ones((1, 1, 2), np.float32))
    write_flow(str(path), example_flow())
    flow, valid = read_flow(str(path))
    np.testing.assert_array_equal(flow, example_flow())
    assert valid.all() and flow.flags.writeable
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_refused_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.flo"
    write_flow(path, example_flow())
    with pytest.raises(ValueError, match="valid"):
        write_flow(path, example_flow(), np.ones((7, 5), bool))
    np.testing.assert_array_equal(read_flow(path)[0], example_flow())
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("flow", "valid", "fault"),
    [
        (np.zeros((2, 4, 5), np.float32), None, r"\(H, W, 2\), received \(2, 4, 5\)"),
        (np.zeros((4, 5), np.float32), None, r"received \(4, 5\)"),
        (np.zeros((0, 5, 2), np.float32), None, r"received \(0, 5, 2\)"),
        (np.zeros((4, 5, 2), np.int16), None, "floating type, received int16"),
        ([[[0.0, 0.0]]], None, "received list"),
        (np.zeros((4, 5, 2), np.float32), np.ones((5, 4), bool), r"\(4, 5\), received bool \(5, 4\)"),
        (np.zeros((4, 5, 2), np.float32), np.ones((4, 5), np.uint8), r"received uint8 \(4, 5\)"),
        (np.broadcast_to(np.float32(0), (MAX_PIXELS, 2, 2)), None, "at most"),
    ],
)
def test_arrays_that_are_no_flow_are_refused(flow, valid, fault):
    with pytest.raises(ValueError, match=fault):
        encode_flow(flow, valid, ".flo")


def test_arguments_are_left_alone():
    flow, valid = example_flow(), np.zeros((5, 7), bool)
    encode_flow(flow, valid, ".flo")
    np.testing.assert_array_equal(flow, example_flow())
    assert not valid.any()


@pytest.mark.parametrize("name", ["a.exr", "a", "a.flo.gz", ".flo"])
def test_unknown_suffix(tmp_path, name):
    for call in (lambda: read_flow(tmp_path / name), lambda: write_flow(tmp_path / name, example_flow())):
        with pytest.raises(ValueError, match=r"\.flo, \.pfm, \.png, \.npy"):
            call()
    assert not list(tmp_path.iterdir())


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.flo"):
        read_flow(tmp_path / "nowhere.flo")


def npy(header: str, payload: bytes = b"") -> bytes:
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header.encode() + payload


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, rows: bytes, depth: int = 16, colour: int = 2, interlace: int = 0) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


FLO, PFM, PNG, NPY = (encode_flow(example_flow(), None, suffix) for suffix in (".flo", ".pfm", ".png", ".npy"))
NPY_2X3 = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3, 2), }\n"
EVIL = {"descr": "'|O'", "call": "__import__('os')"}


@pytest.mark.parametrize(
    ("suffix", "data", "fault"),
    [
        (".flo", b"", "not a .flo"),
        (".flo", FLO[:10], "truncated"),
        (".flo", FLO[:-1], "truncated"),
        (".flo", FLO + b"\0", "too long"),
        (".flo", struct.pack("<fii", 202021.25, 0, 5), "0 x 5"),
        (".flo", struct.pack("<fii", 202021.25, -3, -5) + bytes(120), "-3 x -5"),
        (".flo", struct.pack("<fii", 202021.25, 2**31 - 1, 2**31 - 1), "2147483647 x 2147483647"),
        (".flo", struct.pack("<fii", 202021.25, 8192, 8192), "truncated"),
        (".flo", struct.pack(">fii", 202021.25, 7, 5) + bytes(280), "not a .flo"),
        (".flo", PNG, "not a .flo"),
        (".pfm", FLO, "not a .pfm"),
        (".pfm", b"Pf\n2 2\n-1.0\n" + bytes(16), "one"),
        (".pfm", b"PF\n2 2\n", "header"),
        (".pfm", b"PF\n2 2\n-1.0\n" + bytes(47), "truncated"),
        (".pfm", b"PF\n2 2\n-1.0\n" + bytes(49), "too long"),
        (".pfm", b"PF\n-2 2\n-1.0\n" + bytes(48), "-2 x 2"),
        (".pfm", b"PF\n2 2\n0\n" + bytes(48), "scale"),
        (".pfm", b"PF\n2 2\n1e999\n" + bytes(48), "scale"),
        (".pfm", b"PF\n2 2\n1-1\n" + bytes(48), "scale"),
        (".pfm", b"PF\n9999999999 9999999999\n-1.0\n", "9999999999"),
        (".npy", PFM, "not a .npy"),
        (".npy", NPY[:9], "header"),
        (".npy", NPY[:50], "truncated"),
        (".npy", NPY[:-1], "truncated"),
        (".npy", NPY + b"\0", "too long"),
        (".npy", npy(NPY_2X3.replace("(2, 3, 2)", "(2, 3, 3)"), bytes(72)), "not a flow"),
        (".npy", npy(NPY_2X3.replace("(2, 3, 2)", "(6, 2)"), bytes(48)), "not a flow"),
        (".npy", npy(NPY_2X3.replace("(2, 3, 2)", "(0, 3, 2)")), "3 x 0"),
        (".npy", npy(NPY_2X3.replace("(2, 3, 2)", "(8000, 8000, 2)"), bytes(48)), "truncated"),
        (".npy", npy(NPY_2X3.replace("<f4", "<i4"), bytes(48)), "not a flow"),
        (".npy", npy(NPY_2X3.replace("<f4", "|O"), bytes(48)), "not a flow"),
        (".npy", npy(NPY_2X3.replace("False", "print(1)"), bytes(48)), "header"),
        (".png", FLO, "not a PNG"),
        (".png", PNG[:-1], "truncated"),
        (".png", PNG[:-12], "IEND"),
        (".png", PNG[:8], "truncated"),
        (".png", PNG + b"\0", "too long"),
        (".png", PNG[:50] + bytes([PNG[50] ^ 1]) + PNG[51:], "checksum"),
        (".png", png(7, 5, bytes(5 * 43 - 1)), "truncated"),
        (".png", png(7, 5, bytes(5 * 43 + 1)), "too long"),
        (".png", png(7, 5, b"\7" + bytes(5 * 43 - 1)), "filters"),
        (".png", png(0, 5, b""), "0 x 5"),
        (".png", png(2**31, 2**31, b"\0"), "2147483648"),
        (".png", png(8000, 8000, b"\0"), "truncated"),
        (".png", png(7, 5, bytes(5 * 22), depth=8), "8-bit RGB"),
        (".png", png(7, 5, bytes(5 * 15), colour=0), "16-bit grey"),
        (".png", png(7, 5, bytes(5 * 57), colour=6), "16-bit RGBA"),
        (".png", png(7, 5, bytes(5 * 43), interlace=1), "interlac"),
    ],
)
def test_damage_is_named(tmp_path, suffix, data, fault, capfd):
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=fault) as error:
        read_flow(path)
    assert str(path) in str(error.value)
    assert capfd.readouterr().err == ""  # OpenCV warns there


def test_too_large_a_file_is_not_read(tmp_path):
    with (tmp_path / "a.flo").open("wb") as file:
        file.truncate(2**40)  # a sparse file: it takes no disk
    with pytest.raises(ValueError, match="at most"):
        read_flow(tmp_path / "a.flo")


def test_text_chunks_and_gamma_change_nothing():
    extra = chunk(b"gAMA", struct.pack(">I", 45455)) + chunk(b"tEXt", b"Comment\0x") + chunk(b"tRNS", bytes(6))
    data = PNG[:33] + extra + PNG[33:]
    np.testing.assert_array_equal(decode_flow(data, "a.png")[0], example_flow())


@pytest.mark.parametrize("suffix", FLOW_SUFFIXES)
@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_random_damage_never_crashes(suffix, data):
    """Cut, lengthened, or with changed bytes: an error, or a flow whose size is the header's."""
    original = {".flo": FLO, ".pfm": PFM, ".png": PNG, ".npy": NPY}[suffix]
    damaged = bytearray(original)
    kind = data.draw(st.sampled_from(["cut", "extend", "change"]))
    if kind == "cut":
        del damaged[data.draw(st.integers(0, len(original) - 1)) :]
    elif kind == "extend":
        damaged += data.draw(st.binary(min_size=1, max_size=64))
    else:
        places = st.integers(0, len(original) - 1) | st.integers(0, min(len(original), 140) - 1)  # rather the header
        for place, mask in data.draw(st.lists(st.tuples(places, st.integers(1, 255)), min_size=1, max_size=4)):
            damaged[place] ^= mask
    try:
        flow, valid = decode_flow(bytes(damaged), f"damaged{suffix}")
    except ValueError as error:
        assert f"damaged{suffix}" in str(error)
        return
    if suffix == ".png" or damaged == original:  # every byte of a PNG is under a checksum, of the others only some
        np.testing.assert_array_equal(damaged, bytearray(original))
    else:
        assert kind == "change"
        assert flow.nbytes <= 2 * len(damaged)  # the changed size must fit what is there, if as float16
    assert valid.shape == flow.shape[:2]
    np.testing.assert_array_equal(flow[~valid], 0)
    assert np.isfinite(flow).all()


@pytest.mark.parametrize("suffix", FLOW_SUFFIXES)
@given(data=st.binary(max_size=200))
def test_random_bytes_are_an_error(suffix, data):
    with pytest.raises(ValueError, match="random"):
        decode_flow(data, f"random{suffix}")
