"""Flow files: write then read is exact, damage is an error."""

import io
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flow_data.flow_io import (
    FLOW_SUFFIXES,
    MAX_PIXELS,
    decode_flow,
    describe_loss,
    encode_flow,
    read_flow,
    write_flow,
)

FLOATING = (".flo", ".pfm", ".flo5", ".npy", ".npz")  # keep every float32 up to 1e9
LIMITS = {".png": (-512, 511.99)}  # lowest and highest component, pixels, of a format that is not FLOATING
CHECKED = (".png", ".flo5", ".npz")  # every byte that matters is under a checksum
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
    if suffix not in (*FLOATING, ".png"):  # those keep these values exactly
        flow, _ = decode_flow(encode_flow(flow, None, suffix), f"a{suffix}")
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


@pytest.mark.parametrize(
    ("value", "known"),
    [(-512, True), (-512.005, True), (-512.01, False), (511.98438, True), (511.99, True), (511.995, False)],
)
def test_png_range(value, known):
    flow = np.full((2, 2, 2), value, np.float32)
    flow[0, 0, 0] = flow[1, 1, 1] = 0  # one component out of range makes both unknown
    valid = decode_flow(encode_flow(flow, None, ".png"), "a.png")[1]
    np.testing.assert_array_equal(valid, np.full((2, 2), known))


@given(fields(FINITE | st.floats(-515, 515, width=32)))
def test_png_rounds_what_it_can_hold_and_the_rest_becomes_unknown(flow):
    decoded, valid = decode_flow(encode_flow(flow, None, ".png"), "a.png")
    expected = np.round(flow.astype(np.float64) * 64) / 64
    known = ((expected >= -512) & (expected <= 512 - 1 / 64)).all(axis=-1)
    np.testing.assert_array_equal(valid, known)
    np.testing.assert_array_equal(decoded, np.where(known[..., None], expected, 0))


@given(data=st.data(), suffix=st.sampled_from(FLOW_SUFFIXES))
def test_the_share_that_a_format_cannot_hold_is_returned(tmp_path_factory, suffix, data):
    """Counted from the file: pixels that were given as valid and are unknown in it; none left is an error."""
    elements = st.sampled_from([0, 511.5, 512, -512, -513, 700, 1e9, 1.1e9, np.nan, np.inf])
    flow = data.draw(fields(elements))
    valid = data.draw(st.none() | hnp.arrays(bool, flow.shape[:2]))
    path = tmp_path_factory.mktemp("loss") / f"a{suffix}"
    wanted = np.ones(flow.shape[:2], bool) if valid is None else valid
    low, high = LIMITS.get(suffix, (-1e9, 1e9))
    held = wanted & ((flow >= low) & (flow <= high)).all(axis=-1)  # NaN is in no range
    if wanted.any() and not held.any():
        with pytest.raises(ValueError, match=r"a\.\w+: nothing of this flow"):
            write_flow(path, flow, valid)
        assert not list(path.parent.iterdir())
        return
    share = write_flow(path, flow, valid)
    np.testing.assert_array_equal(read_flow(path)[1], held)
    assert share == pytest.approx(1 - held.sum() / wanted.sum() if wanted.any() else 0)


def test_flow_that_its_format_cannot_hold_is_named(tmp_path):
    path = tmp_path / "a.PNG"
    path.write_bytes(b"of an earlier run")
    flow = np.full((5, 7, 2), 1.5, np.float32)
    flow[..., 1] = np.linspace(-700, -513, 35).reshape(5, 7)
    with pytest.raises(ValueError) as error:
        write_flow(path, flow)
    assert str(error.value) == (
        f"{path}: nothing of this flow, -700 to 1.5 px, can be written as KITTI PNG (range -512 to 512 px); "
        f"write one of {', '.join(suffix for suffix in FLOW_SUFFIXES if suffix != '.png')}, which hold it"
    )
    assert path.read_bytes() == b"of an earlier run" and len(list(tmp_path.iterdir())) == 1
    for suffix in FLOATING:
        assert write_flow(tmp_path / f"a{suffix}", flow) == 0
    flow[:] = np.nan
    for suffix in FLOW_SUFFIXES:
        with pytest.raises(ValueError, match="finite and at most 1,000,000,000 px: no format can hold it"):
            write_flow(tmp_path / f"b{suffix}", flow)
    assert write_flow(tmp_path / "c.flo", flow, np.zeros((5, 7), bool)) == 0  # nothing was to be written


def test_loss_is_described():
    assert describe_loss(0.1234, ".png") == (
        "12.3 % of the pixels could not be written as KITTI PNG (range -512 to 512 px)"
    )
    assert describe_loss(1e-6, ".FLO").startswith(
        "less than 0.01 % of the pixels could not be written as .flo (finite"
    )


def test_half_unknown_flow_is_written_as_unknown():
    flow = np.array([[[1, np.nan]]], np.float32)
    assert encode_flow(flow, None, ".flo")[12:] == struct.pack("<2f", 1e10, 1e10)
    assert np.isnan(np.load(io.BytesIO(encode_flow(flow, None, ".npy")))).all()
    assert np.isnan(np.load(io.BytesIO(encode_flow(flow, None, ".npz")))["flow"]).all()
    assert np.isnan(h5py.File(io.BytesIO(encode_flow(flow, None, ".flo5")))["flow"][()]).all()
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


@pytest.mark.parametrize("first", [b"\n", b"\r\n", b" \n", b"# x\n", b"\0\0\0\0", b"\n# \n"])
@pytest.mark.parametrize(
    "header",
    [
        b"PF\n2 3\n-1.0\n",
        b"PF 2 3 -1.0 ",
        b"PF\r2 3\r-1.0\r",
        b"PF\r\n2 3\r\n-1.0\r\n",
        b"PF \n2 3 \n-1.0 \n",
        b"PF\t\r\n  2   3\t\r\n\r\n-1.000000\t \r\n",
        b"PF\n# a remark: 7 5\n2 3\n-1\n",
        b"PF # one\n# two\r\n2 # width\n3\n# three\n-1.0 # four\n",
        b"PF\n2 3\n-1.0\n# a remark\n# another\n",
        b"PF\r\n2 3\r\n-1.0\r\n#\r\n",
    ],
)
def test_pfm_headers_of_other_programs(header, first):
    """Bytes of data that look like white space or a comment are not taken for the header's, nor vice versa."""
    rows = np.arange(18, dtype="<f4").reshape(3, 2, 3)
    body = first + rows.tobytes()[len(first) :]
    flow, _ = decode_flow(header + body, "a.pfm")
    np.testing.assert_array_equal(flow, np.frombuffer(body, "<f4").reshape(3, 2, 3)[::-1, :, :2])


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_of_numpy(tmp_path, dtype, order):
    np.save(tmp_path / "a.npy", np.asarray(example_flow(), dtype, order=order))
    np.testing.assert_array_equal(read_flow(tmp_path / "a.npy")[0], example_flow())


@pytest.mark.parametrize("dtype", ["<f4", "<f8"])
@pytest.mark.parametrize(
    "storage",
    [
        {},
        {"compression": "gzip", "compression_opts": 5},  # Spring's own
        {"chunks": (2, 3, 1), "compression": "gzip"},
        {"chunks": (5, 7, 2), "fletcher32": True},
        {"chunks": (4, 4, 2), "shuffle": True, "compression": "gzip", "fletcher32": True},
        {"chunks": (3, 3, 2), "maxshape": (None, None, 2)},
        {"chunks": (9, 9, 9), "maxshape": (None, None, None), "shuffle": True},
    ],
)
@pytest.mark.parametrize("version", ["earliest", "v108", "v110", "latest"])
def test_flo5_of_h5py(dtype, storage, version):
    flow = example_flow()
    flow[2, 3, 0] = np.nan
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver=version) as file:
        file.create_dataset("flow", data=flow.astype(dtype), **storage)
    decoded, valid = decode_flow(buffer.getvalue(), "a.flo5")
    flow[2, 3] = 0
    np.testing.assert_array_equal(decoded, flow)
    assert valid.sum() == 34 and not valid[2, 3]


def test_flo5_checksums_of_many_bytes():
    flow = np.random.default_rng(0).normal(size=(300, 301, 2))
    data = dataset(flow, chunks=flow.shape, fletcher32=True)
    np.testing.assert_array_equal(decode_flow(data, "a.flo5")[0], flow.astype(np.float32))


def test_flo5_layout():
    """As h5py, and so Spring's own tools, read it: one dataset, float32, NaN where unknown."""
    with h5py.File(io.BytesIO(encode_flow(example_flow(), np.eye(5, 7, dtype=bool), ".flo5"))) as file:
        assert list(file) == ["flow"] and file["flow"].dtype == "<f4" and file["flow"].compression == "gzip"
        expected = np.where(np.eye(5, 7, dtype=bool)[..., None], example_flow(), np.nan)
        np.testing.assert_array_equal(file["flow"][()], expected)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_of_numpy(tmp_path, save):
    known = np.arange(35).reshape(5, 7) % 3 > 0
    save(tmp_path / "a.npz", flow=example_flow().astype(np.float64), valid=known, other=np.array(["not looked at"]))
    flow, valid = read_flow(tmp_path / "a.npz")
    np.testing.assert_array_equal(valid, known)
    np.testing.assert_array_equal(flow, np.where(known[..., None], example_flow(), 0))


def test_npz_has_no_nan_in_valid_pixels():
    flow = example_flow()
    flow[1, 2, 0] = np.nan
    buffer = io.BytesIO()
    np.savez(buffer, flow=flow, valid=np.ones((5, 7), bool))
    decoded, valid = decode_flow(buffer.getvalue(), "a.npz")
    assert not valid[1, 2] and valid.sum() == 34 and not decoded[1, 2].any()


def test_npz_layout():
    with np.load(io.BytesIO(encode_flow(example_flow(), None, ".npz"))) as archive:
        assert archive.files == ["flow"] and archive["flow"].dtype == "<f4"
        np.testing.assert_array_equal(archive["flow"], example_flow())
    known = np.eye(5, 7, dtype=bool)
    with np.load(io.BytesIO(encode_flow(example_flow(), known, ".npz"))) as archive:
        assert archive.files == ["flow", "valid"]
        np.testing.assert_array_equal(archive["valid"], known)
        np.testing.assert_array_equal(archive["flow"], np.where(known[..., None], example_flow(), np.nan))


@pytest.mark.slow
def test_the_same_flow_gives_the_same_bytes():
    known = np.eye(5, 7, dtype=bool)
    first = {suffix: encode_flow(example_flow(), known, suffix) for suffix in FLOW_SUFFIXES}
    time.sleep(2.1)  # the clock of zip files goes in steps of two seconds, HDF5's in one
    assert first == {suffix: encode_flow(example_flow(), known, suffix) for suffix in FLOW_SUFFIXES}


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
    ("flow", "valid", "message"),
    [
        (np.zeros((2, 4, 5), np.float32), None, r"\(H, W, 2\); got \(2, 4, 5\)"),
        (np.zeros((4, 5), np.float32), None, r"got \(4, 5\)"),
        (np.zeros((0, 5, 2), np.float32), None, r"got \(0, 5, 2\)"),
        (np.zeros((4, 5, 2), np.int16), None, "floating type; got int16"),
        ([[[0.0, 0.0]]], None, "got list"),
        (np.zeros((4, 5, 2), np.float32), np.ones((5, 4), bool), r"\(4, 5\); got bool \(5, 4\)"),
        (np.zeros((4, 5, 2), np.float32), np.ones((4, 5), np.uint8), r"got uint8 \(4, 5\)"),
        (np.broadcast_to(np.float32(0), (MAX_PIXELS, 2, 2)), None, "at most"),
    ],
)
def test_arrays_that_are_no_flow_are_refused(flow, valid, message):
    with pytest.raises(ValueError, match=message):
        encode_flow(flow, valid, ".flo")


def test_arguments_are_left_alone():
    flow, valid = example_flow(), np.zeros((5, 7), bool)
    encode_flow(flow, valid, ".flo")
    np.testing.assert_array_equal(flow, example_flow())
    assert not valid.any()


@pytest.mark.parametrize("name", ["a.exr", "a", "a.flo.gz", ".flo"])
def test_unknown_suffix(tmp_path, name):
    for call in (lambda: read_flow(tmp_path / name), lambda: write_flow(tmp_path / name, example_flow())):
        with pytest.raises(ValueError, match=", ".join(FLOW_SUFFIXES)):
            call()
    assert not list(tmp_path.iterdir())


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.flo"):
        read_flow(tmp_path / "nowhere.flo")


def npy(header: str, payload: bytes = b"") -> bytes:
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header.encode() + payload


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, rows: bytes, depth: int = 16, color: int = 2, interlace: int = 0) -> bytes:
    return compressed_png(width, height, zlib.compress(rows), depth, color, interlace)


def compressed_png(
    width: int, height: int, stream: bytes, depth: int = 16, color: int = 2, interlace: int = 0
) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlace))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", stream) + chunk(b"IEND", b"")


def npz(method: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return buffer.getvalue()


def patched(data: bytes, marker: bytes, offset: int, new: bytes) -> bytes:
    """The data with bytes replaced, so many after the last occurrence of a marker."""
    at = data.rindex(marker) + offset
    return data[:at] + new + data[at + len(new) :]


def hdf5(build) -> bytes:
    """An HDF5 file, made by calling `build` with it open."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        build(file)
    return buffer.getvalue()


def dataset(data=None, **options) -> bytes:
    return hdf5(lambda file: file.create_dataset("flow", data=data, **options))


def partly_written(file: h5py.File) -> None:
    file.create_dataset("flow", (4, 4, 2), "<f4", chunks=(2, 2, 2), compression="gzip")[:2] = 1


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((4, 4, 2), "<f4")
    layout[:] = h5py.VirtualSource("elsewhere.h5", "flow", (4, 4, 2))
    file.create_virtual_dataset("flow", layout)


def bomb(file: h5py.File) -> None:
    """A chunk of 128 bytes whose compressed data expands to 64 MB."""
    flow = file.create_dataset("flow", (4, 4, 2), "<f4", chunks=(4, 4, 2), compression="gzip")
    flow.id.write_direct_chunk((0, 0, 0), zlib.compress(bytes(2**26)))


def hollow(file: h5py.File) -> None:
    """Chunks that are all there, but cannot hold what they should."""
    flow = file.create_dataset("flow", (8000, 8000, 2), "<f4", chunks=(8000, 8000, 2), compression="gzip")
    flow.id.write_direct_chunk((0, 0, 0), zlib.compress(b""))


def unfiltered(file: h5py.File) -> None:
    """A chunk that states that it was not shuffled."""
    flow = file.create_dataset("flow", (4, 4, 2), "<f4", chunks=(4, 4, 2), shuffle=True)
    flow.id.write_direct_chunk((0, 0, 0), bytes(128), filter_mask=1)


def linked(link) -> bytes:
    def build(file: h5py.File) -> None:
        file["other"] = example_flow()
        file["flow"] = link

    return hdf5(build)


EXAMPLES = {suffix: encode_flow(example_flow(), None, suffix) for suffix in FLOW_SUFFIXES}
FLO, PFM, PNG, FLO5, NPY, NPZ = (EXAMPLES[suffix] for suffix in (".flo", ".pfm", ".png", ".flo5", ".npy", ".npz"))
SPRING = dataset(example_flow(), compression="gzip", compression_opts=5)
HALVES = dataset(np.ones((4, 4, 2), "<f4"), chunks=(2, 4, 2), compression="gzip")
SUMMED = dataset(np.full((4, 4, 2), 1.5, "<f4"), chunks=(4, 4, 2), fletcher32=True)
NPY_2X3 = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3, 2), }\n"


@pytest.mark.parametrize(
    ("suffix", "data", "message"),
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
        (".pfm", b"PF\r\n2 2\r\n-1.0\r\n" + bytes(47), "truncated"),  # a data set read from one byte too early
        (".pfm", b"PF\r\n2 2\r\n-1.0\r\n" + bytes(49), "too long"),
        (".pfm", b"PF\n2 2 \n-1.0 \n" + bytes(47), "truncated"),
        (".pfm", b"PF\n2 2 \n-1.0 \n" + bytes(49), "too long"),
        (".pfm", b"PF\n# 2 2\n-1.0\n" + bytes(48), "header"),
        (".pfm", b"PF\n2 2\n-1.0\n# a remark\n" + bytes(47), "truncated|too long"),
        (".pfm", b"PF\n2 2\n-1.0#\n" + bytes(48), "header"),
        (".pfm", b"PF\n2 2\n-1.0\n\n" + bytes(48), "too long"),  # a blank line may be a byte of data
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
        (".png", PNG[:-13], "truncated"),
        (".png", PNG[:8], "truncated"),
        (".png", PNG[:33], "truncated"),
        (".png", PNG[:33] + PNG[-12:], "truncated"),
        (".png", compressed_png(7, 5, zlib.compress(bytes(5 * 43))[:-4])[:-12], "truncated|end where it should"),
        (".png", PNG[:-1] + b"\0", "checksum in chunk b'IEND'"),
        (".png", PNG[:50] + bytes([PNG[50] ^ 1]) + PNG[51:], "checksum"),
        (".png", png(7, 5, bytes(5 * 43 - 1)), "truncated"),
        (".png", png(7, 5, bytes(5 * 43 + 1)), "too long"),
        (".png", png(7, 5, b"\7" + bytes(5 * 43 - 1)), "filter"),
        (".png", compressed_png(7, 5, zlib.compress(bytes(5 * 43)) + b"\0"), "end where it should"),
        (".png", compressed_png(7, 5, zlib.compress(bytes(5 * 43))[:-1]), "end where it should"),
        (".png", compressed_png(7, 5, zlib.compress(bytes(5 * 43))[:-1] + b"\7"), "incorrect data check"),
        (".png", png(0, 5, b""), "0 x 5"),
        (".png", png(2**31, 2**31, b"\0"), "2147483648"),
        (".png", png(8000, 8000, b"\0"), "truncated"),
        (".png", png(7, 5, bytes(5 * 22), depth=8), "8-bit RGB"),
        (".png", png(7, 5, bytes(5 * 15), color=0), "16-bit gray"),
        (".png", png(7, 5, bytes(5 * 57), color=6), "16-bit RGBA"),
        (".png", png(7, 5, bytes(5 * 43), interlace=1), "interlac"),
        (".flo5", FLO5[:-1], "truncated"),
        (".flo5", FLO5[:30], "truncated"),
        (".flo5", FLO5 + b"\0", "too long"),
        (".flo5", SPRING[:-1], "truncated"),
        (".flo5", SPRING + b"\0", "too long"),
        (".flo5", bytes(512) + SPRING, "not an HDF5"),
        (".flo5", patched(FLO5, b"\x89HDF", 40, b"\1"), "no flow in this HDF5"),  # a checksum of the superblock
        (".flo5", patched(SPRING, b"\x89HDF", 13, b"\4"), "superblock"),
        (".flo5", hdf5(lambda file: None), "got nothing"),
        (".flo5", hdf5(lambda file: file.create_dataset("depth", data=[1])), "got depth"),
        (".flo5", hdf5(lambda file: file.create_group("flow")), "must be a dataset"),
        (".flo5", linked(h5py.SoftLink("/other")), "link"),
        (".flo5", linked(h5py.ExternalLink("elsewhere.h5", "flow")), "link"),
        (".flo5", hdf5(virtual), "in the file itself"),
        (".flo5", dataset(shape=(4, 4, 2), dtype="<f4", external=[("elsewhere", 0, 128)]), "in the file itself"),
        (".flo5", dataset(shape=(4, 4, 2), dtype="<f4"), "must have 128 bytes"),  # allocated when first written to
        (".flo5", dataset(shape=(8000, 8000, 2), dtype="<f4"), "must have 512000000 bytes"),
        (".flo5", dataset(shape=(8000, 8000, 2), dtype="<f4", chunks=True, compression="gzip"), "chunks; got 0"),
        (".flo5", dataset(shape=(10**9, 10**9, 2), dtype="<f4", chunks=True), "1000000000 x 1000000000"),
        (".flo5", dataset(shape=(0, 4, 2), dtype="<f4"), "4 x 0"),
        (".flo5", hdf5(partly_written), "there must be 4 chunks; got 2"),
        (".flo5", hdf5(bomb), "too long"),
        (".flo5", hdf5(hollow), "truncated"),
        (".flo5", hdf5(unfiltered), "without the filters"),
        (".flo5", patched(HALVES, struct.pack("<4Q", 2, 0, 0, 0), 0, bytes(8)), "tile"),
        (".flo5", patched(SUMMED, struct.pack("<32f", *[1.5] * 32), 5, b"\1"), "checksum"),
        (".flo5", dataset(np.zeros((4, 4, 2), "<i4")), "got int32"),
        (".flo5", dataset(np.zeros((4, 4, 2), ">f4")), "got >f4"),
        (".flo5", dataset(np.zeros((4, 4, 3), "<f4")), r"got float32 \(4, 4, 3\)"),
        (".flo5", dataset(np.zeros((4, 4), "<f4")), r"got float32 \(4, 4\)"),
        (".flo5", dataset(1.5), r"got float64 \(\)"),
        (".flo5", dataset(h5py.Empty("<f4")), "got float32 None"),
        (".flo5", dataset(np.zeros((4, 4, 2), "<f4"), compression="lzf"), "filters"),
        (".flo5", dataset(np.zeros((4, 4, 2), "<f4"), chunks=(1, 1, 1), maxshape=(9, 9, 2)), "may grow"),
        (".npz", NPZ[:-1], "truncated"),
        (".npz", NPZ[:20], "truncated"),
        (".npz", NPZ + b"\0", "too long"),
        (".npz", b"\0" + NPZ, "not a .npz"),
        (".npz", NPZ + NPZ, "too long"),
        (".npz", patched(NPZ, b"PK\5\6", 20, b"\1"), "no .npz directory"),  # a comment that is not there
        (".npz", npz(), "not a .npz"),
        (".npz", npz(flow=NPY, glow=NPY).replace(b"glow", b"flow"), "different names"),
        (".npz", npz(u=NPY, v=NPY), "got u.npy, v.npy"),
        (".npz", npz(flow=NPY[:-1]), "flow: truncated"),
        (".npz", npz(flow=FLO), "flow: not a .npy"),
        (".npz", npz(flow=npy(NPY_2X3.replace("<f4", "|O"), bytes(48))), "array of '|O'"),
        (".npz", npz(flow=npy(NPY_2X3.replace("(2, 3, 2)", "(2, 3, 3)"), bytes(72))), r"\(H, W, 2\); got \(2, 3, 3\)"),
        (".npz", npz(flow=NPY, valid=NPY), "valid: not a flow or mask"),
        (".npz", npz(flow=NPY, valid=npy(NPY_2X3.replace("<f4", "|b1"), bytes(12))), "of the flow's shape"),
        (".npz", npz(zipfile.ZIP_BZIP2, flow=NPY), "method 12"),
        (".npz", patched(npz(flow=NPY), b"PK\1\2", 8, b"\1"), "encrypted"),
        (
            ".npz",
            patched(npz(flow=NPY), b"PK\1\2", 24, struct.pack("<I", 2**30)),
            "1073741824 bytes, compressed to impossible",
        ),
        (".npz", patched(npz(flow=NPY), NPY[-4:], 0, b"\1"), "CRC"),
        (".npz", patched(npz(zipfile.ZIP_DEFLATED, flow=bytes(2**26)), b"PK\1\2", 24, struct.pack("<I", 9)), "CRC"),
    ],
)
def test_damage_is_named(tmp_path, suffix, data, message, capfd):
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        read_flow(path)
    assert str(path) in str(error.value)
    assert capfd.readouterr().err == ""  # OpenCV warns there


@pytest.mark.parametrize("suffix", FLOW_SUFFIXES)
@pytest.mark.parametrize("content", FLOW_SUFFIXES)
def test_a_file_of_another_format_is_named(suffix, content):
    if suffix != content:
        with pytest.raises(ValueError, match=f"mislabelled{suffix}: not an? "):
            decode_flow(EXAMPLES[content], f"mislabelled{suffix}")


@pytest.mark.slow
def test_damaged_sizes_allocate_nothing(tmp_path):
    """In a process that may not have 200 MB more: sizes without data, and data that expands without end."""
    flow = {"shape": (8000, 8000, 2), "dtype": "<f4"}
    bombs = {
        "a.flo": struct.pack("<fii", 202021.25, 8000, 8000),
        "a.pfm": b"PF\n8000 8000\n-1.0\n",
        "a.npy": npy(NPY_2X3.replace("(2, 3, 2)", "(8000, 8000, 2)")),
        "rows.png": png(8000, 8000, b"\0"),
        "bomb.png": png(7, 5, bytes(2**28)),
        "contiguous.flo5": dataset(**flow),
        "chunks.flo5": dataset(**flow, chunks=(8000, 8000, 2), compression="gzip"),
        "hollow.flo5": hdf5(hollow),
        "small.flo5": dataset(**flow, chunks=(2, 2, 2)),
        "bomb.flo5": hdf5(bomb),
        "bomb.npz": patched(npz(zipfile.ZIP_DEFLATED, flow=bytes(2**28)), b"PK\1\2", 24, struct.pack("<I", 208)),
        "header.npz": npz(flow=npy(NPY_2X3.replace("(2, 3, 2)", "(8000, 8000, 2)"))),
    }
    for name, data in bombs.items():
        (tmp_path / name).write_bytes(data)
    script = f"""
import pathlib, resource
from flow_data.flow_io import read_flow
held = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 200 * 2**20,) * 2)
for path in sorted(pathlib.Path({str(tmp_path)!r}).iterdir()):
    try:
        read_flow(path)
    except ValueError:
        print(path.name)
"""
    checkout = Path(__file__).resolve().parents[1]
    refused = subprocess.run([sys.executable, "-c", script], cwd=checkout, check=True, capture_output=True, text=True)
    assert refused.stdout.split() == sorted(bombs)


def test_too_large_a_file_is_not_read(tmp_path):
    with (tmp_path / "a.flo").open("wb") as file:
        file.truncate(2**40)  # a sparse file: it takes no disk
    with pytest.raises(ValueError, match="at most"):
        read_flow(tmp_path / "a.flo")


BAD_TEXT = chunk(b"tEXt", b"Comment\0x")[:-1] + b"\0"


@pytest.mark.parametrize(
    "data",
    [PNG + b"\n", PNG + bytes(512), PNG + EXAMPLES[".flo"], PNG[:-12], PNG[:-5], PNG[:-12] + bytes(9)]
    + [PNG[:33] + BAD_TEXT + PNG[33:], PNG[:-12] + BAD_TEXT + PNG[-12:], PNG[:-12] + BAD_TEXT[:9]],
    ids=["a line feed", "zeros", "more", "no IEND", "part of IEND", "zeros for IEND"]
    + ["a wrong checksum of text", "the same at the end", "part of a text"],
)
def test_what_touches_no_pixel_of_a_png_is_ignored(data, capfd):
    flow, valid = decode_flow(data, "a.png")
    np.testing.assert_array_equal(flow, example_flow())
    assert valid.all() and capfd.readouterr().err == ""


def test_text_chunks_and_gamma_change_nothing():
    extra = chunk(b"gAMA", struct.pack(">I", 45455)) + chunk(b"tEXt", b"Comment\0x") + chunk(b"tRNS", bytes(6))
    data = PNG[:33] + extra + PNG[33:]
    np.testing.assert_array_equal(decode_flow(data, "a.png")[0], example_flow())


# Spring's own files have checksums of the data only, so damage of what locates the data is left to luck and checks.
@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "original"), [*EXAMPLES.items(), (".flo5", SPRING)])
@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_random_damage_never_crashes(suffix, original, data):
    """Cut, lengthened, or with changed bytes: an error, or a flow whose size is the header's."""
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
    if suffix == ".png":  # nothing but its last chunk, IEND, can be missing
        assert damaged[:-12].startswith(original[:-12][: len(damaged) - 12]) and len(damaged) >= len(original) - 12
    else:
        assert kind == "change"
    if suffix in CHECKED:  # what is left of them is gaps and fields that say nothing of the flow
        np.testing.assert_array_equal(flow, example_flow())
        assert valid.all()
    else:
        assert flow.nbytes <= 2 * len(damaged)  # the changed size must fit what is there, if as float16
    assert valid.shape == flow.shape[:2]
    np.testing.assert_array_equal(flow[~valid], 0)
    assert np.isfinite(flow).all()


@pytest.mark.parametrize("suffix", FLOW_SUFFIXES)
@given(data=st.binary(max_size=200))
def test_random_bytes_are_an_error(suffix, data):
    with pytest.raises(ValueError, match="random"):
        decode_flow(data, f"random{suffix}")
