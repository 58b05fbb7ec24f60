"""Frames of every kind: the same pixels, the same flow and the same errors through every entry point."""

import base64
import http.server
import io
import struct
import threading
import warnings
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageOps
from test_modeling_raft import tiny_config
from transformers import pipeline

import predict_flow
from flow_data.flow_io import read_flow
from flow_data.images import read_pair
from flow_inference import FlowVideo
from flow_inference.frame_sources import read_frames
from modeling_raft import RaftForOpticalFlow, RaftImageProcessor, frames_raft
from modeling_raft.frames_raft import FrameConverter, read_frame
from modeling_raft.pipeline_raft import save_pretrained_with_pipeline

HEIGHT, WIDTH = 70, 90
EXIF_ORIENTATION = 0x0112


def make_pair() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    texture = cv2.GaussianBlur(rng.integers(0, 256, (HEIGHT, WIDTH + 8, 3)).astype(np.float32), (0, 0), 1.5)
    texture = np.clip((texture - 128) * 4 + 128, 0, 255).astype(np.uint8)
    return [np.ascontiguousarray(texture[:, 4:-4]), np.ascontiguousarray(texture[:, :-8])]


PAIR = make_pair()
DEEP = [(frame.astype(np.uint16) * 101 + 3000) for frame in PAIR]  # 12-bit or so: a part of the range only


def encoded(image: PIL.Image.Image, suffix: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, PIL.Image.registered_extensions()[suffix], **options)
    return buffer.getvalue()


def by_pillow(suffix: str, mode: str = "RGB", **options) -> list[bytes]:
    return [encoded(PIL.Image.fromarray(frame).convert(mode), suffix, **options) for frame in PAIR]


def by_opencv(suffix: str, frames: list[np.ndarray]) -> list[bytes]:
    # OpenCV 4 compresses TIFF files of floats with loss where it is not told to do otherwise.
    flags = [cv2.IMWRITE_TIFF_COMPRESSION, 1] if suffix == ".tiff" else []
    turned = [frame[..., ::-1] if frame.ndim == 3 else frame for frame in frames]
    return [cv2.imencode(suffix, frame, flags)[1].tobytes() for frame in turned]


def turned(orientations: tuple[int, int], suffix: str = ".png") -> list[bytes]:
    """Frames as a camera stores them that was held so: an image viewer shows them upright."""
    files = []
    for frame, orientation in zip(PAIR, orientations, strict=True):
        back = {5: 5, 6: 8, 7: 7, 8: 6}.get(orientation, orientation)  # the orientation that undoes it
        image = PIL.Image.fromarray(frame)
        image.getexif()[EXIF_ORIENTATION] = back
        stored = ImageOps.exif_transpose(image)
        exif = PIL.Image.Exif()
        exif[EXIF_ORIENTATION] = orientation
        files.append(encoded(stored, suffix, exif=exif.tobytes()))
    return files


def scaled(frames: list[np.ndarray]) -> list[np.ndarray]:
    """What 16-bit frames of a pair become."""
    low, high = min(frame.min() for frame in frames), max(frame.max() for frame in frames)
    return [np.rint((frame.astype(np.float64) - low) * 255 / (high - low)).astype(np.uint8) for frame in frames]


def as_rgb(frames: list[np.ndarray]) -> list[np.ndarray]:
    return [np.repeat(frame[..., None], 3, axis=2) if frame.ndim == 2 else frame for frame in frames]


def rounded_gray(frame: np.ndarray) -> np.ndarray:
    return np.array(PIL.Image.fromarray(frame).convert("F")).round().astype(np.uint8)


def shown(files: list[bytes]) -> list[np.ndarray]:
    """What an image viewer shows of 8-bit files."""
    return [np.array(ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data))).convert("RGB")) for data in files]


GRAY_DEEP = [frame[..., 1] for frame in DEEP]
# Kind of file -> (suffix, contents of both files, the frames that they are; None: what an image viewer shows)
KINDS: dict[str, tuple[str, list[bytes], list[np.ndarray] | None]] = {
    "png": (".png", by_pillow(".png"), PAIR),
    "bmp": (".bmp", by_pillow(".bmp"), PAIR),
    "ppm": (".ppm", by_pillow(".ppm"), PAIR),
    "tiff": (".tif", by_pillow(".tif"), PAIR),
    "webp": (".webp", by_pillow(".webp", lossless=True), PAIR),
    "jpeg 2000": (".jp2", by_pillow(".jp2"), PAIR),
    "jpeg": (".jpg", by_pillow(".jpg"), None),
    "cmyk jpeg": (".jpg", by_pillow(".jpg", "CMYK"), None),
    "rgba": (".png", by_pillow(".png", "RGBA"), PAIR),
    "palette": (".png", by_pillow(".png", "P"), None),
    "gray": (".png", by_pillow(".png", "L"), None),
    "gray and alpha": (".png", by_pillow(".png", "LA"), None),
    "1-bit": (".png", by_pillow(".png", "1"), None),
    "16-bit gray png": (".png", by_opencv(".png", GRAY_DEEP), as_rgb(scaled(GRAY_DEEP))),
    "16-bit gray tiff": (".tif", by_opencv(".tiff", GRAY_DEEP), as_rgb(scaled(GRAY_DEEP))),
    "16-bit gray pgm": (".pgm", by_opencv(".pgm", GRAY_DEEP), as_rgb(scaled(GRAY_DEEP))),
    "16-bit rgb png": (".png", by_opencv(".png", DEEP), scaled(DEEP)),
    "16-bit rgb tiff": (".tif", by_opencv(".tiff", DEEP), scaled(DEEP)),
    "16-bit rgb ppm": (".ppm", by_opencv(".ppm", DEEP), scaled(DEEP)),
    "float gray tiff, 0..255": (".tif", by_pillow(".tif", "F"), as_rgb([rounded_gray(frame) for frame in PAIR])),
    "float rgb tiff, 0..1": (".tif", by_opencv(".tiff", [np.float32(frame / 255) for frame in PAIR]), PAIR),
    **{f"orientation {tag}": (".png", turned((tag, tag)), PAIR) for tag in range(1, 9)},
    "orientation 6 and none": (".png", turned((6, 1)), PAIR),
    "orientation 8, tiff": (".tif", turned((8, 8), ".tif"), PAIR),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    save_pretrained_with_pipeline(RaftForOpticalFlow(tiny_config()), RaftImageProcessor(), folder)
    return folder


@pytest.fixture(scope="module")
def model(folder) -> RaftForOpticalFlow:
    return RaftForOpticalFlow.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def entry_points(folder, model):
    """Name -> pair of frames -> flow `(2, H, W)`."""
    pipe, processor = pipeline("optical-flow", model=folder, device="cpu"), RaftImageProcessor()

    def processor_and_model(pair):
        inputs = processor(list(pair), return_tensors="pt")
        with torch.no_grad():
            outputs = model(**inputs, num_flow_updates=4)
        return processor.post_process_optical_flow(outputs, [(HEIGHT, WIDTH)])[0]["flow"]

    def flow_video(pair):
        (result,) = FlowVideo(model, list(pair), num_flow_updates=4)
        return result.flow

    return {
        "pipeline": lambda pair: pipe(tuple(pair), num_flow_updates=4)["flow"],
        "processor and model": processor_and_model,
        "FlowVideo": flow_video,
    }


def predict(folder, *arguments) -> None:
    predict_flow.main([*map(str, arguments), "--model", str(folder), "--num_flow_updates", "4"])


def expected_flow(model, frames) -> torch.Tensor:
    """Flow by the published preprocessing, written down on its own: scaled to [-1, 1], edges repeated."""
    pixels = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float()
    bottom, right = -HEIGHT % 8, -WIDTH % 8
    padding = right // 2, right - right // 2, bottom // 2, bottom - bottom // 2
    pixels = F.pad(2 * pixels / 255 - 1, padding, mode="replicate")[None]
    with torch.no_grad():
        flow = model(pixels, num_flow_updates=4).flow[0]
    return flow[:, padding[2] : padding[2] + HEIGHT, padding[0] : padding[0] + WIDTH]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_has_one_flow_everywhere(kind, entry_points, folder, model, tmp_path):
    suffix, files, frames = KINDS[kind]
    expected = expected_flow(model, shown(files) if frames is None else frames)
    paths = [tmp_path / f"{i}{suffix}" for i in range(2)]
    for path, data in zip(paths, files, strict=True):
        path.write_bytes(data)
    sources = {
        "paths": paths,
        "strings": [str(path) for path in paths],
        "bytes": files,
    }
    if kind != "float rgb tiff, 0..1":  # which Pillow does not know
        sources["PIL images"] = [PIL.Image.open(path) for path in paths]
        sources["path and PIL image"] = [paths[0], PIL.Image.open(paths[1])]
    for name, entry_point in entry_points.items():
        for source, pair in sources.items():
            torch.testing.assert_close(
                entry_point(pair), expected, atol=1e-4, rtol=0, msg=lambda text, at=(name, source): f"{at}: {text}"
            )
    predict(folder, *paths, "--output", tmp_path / "flow.flo")
    flow = torch.from_numpy(read_flow(tmp_path / "flow.flo")[0]).permute(2, 0, 1)
    torch.testing.assert_close(flow, expected, atol=1e-4, rtol=0)


ARRAYS = {
    "flipped view": ([frame[..., ::-1] for frame in PAIR], [frame[..., ::-1] for frame in PAIR]),
    "channels first": ([frame.transpose(2, 0, 1) for frame in PAIR], PAIR),
    "gray": ([frame[..., 0] for frame in PAIR], [np.repeat(frame[..., :1], 3, 2) for frame in PAIR]),
    "one channel": ([frame[..., :1] for frame in PAIR], [np.repeat(frame[..., :1], 3, 2) for frame in PAIR]),
    "four channels": ([np.dstack([frame, frame[..., :1]]) for frame in PAIR], PAIR),
    "bool": ([frame > 128 for frame in PAIR], [np.uint8(255) * (frame > 128) for frame in PAIR]),
    "int64 of 8 bits": ([frame.astype(np.int64) for frame in PAIR], PAIR),
    "big endian uint16": ([frame.astype(">u2") for frame in DEEP], scaled(DEEP)),
    "int16 with negatives": ([frame.astype(np.int16) - 5000 for frame in DEEP], scaled(DEEP)),
    "uint16 tensors": ([torch.from_numpy(frame) for frame in DEEP], scaled(DEEP)),
    "float64 in 0..1": ([frame / 255 for frame in PAIR], PAIR),
    "float32 in 0..255": ([frame.astype(np.float32) for frame in PAIR], PAIR),
    "big endian float": ([(frame / 255).astype(">f4") for frame in PAIR], PAIR),
    "ToTensor": ([torch.from_numpy(frame).permute(2, 0, 1) / 255 for frame in PAIR], PAIR),
    "bfloat16 tensors": ([torch.from_numpy(frame).bfloat16() for frame in PAIR],
                         [torch.from_numpy(frame).bfloat16().to(torch.uint8).numpy() for frame in PAIR]),
    "tensors that require gradients": ([torch.from_numpy(frame).float().requires_grad_() for frame in PAIR], PAIR),
    "array and tensor": ([PAIR[0], torch.from_numpy(PAIR[1])], PAIR),
    "8 bits and 0..1": ([PAIR[0], PAIR[1] / 255], PAIR),
}  # fmt: skip


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("orientation")])
def test_training_reads_the_frames_that_prediction_reads(kind, tmp_path):
    """But for the EXIF orientation: ground truth lies on the grid that is stored."""
    suffix, files, _ = KINDS[kind]
    expected = frames_raft.read_frames(files)
    paths = [tmp_path / f"{i}{suffix}" for i in range(2)]
    for path, data in zip(paths, files, strict=True):
        path.write_bytes(data)
    for column in ("path", "bytes"):
        stored = [{"bytes": data, "path": None} for data in files] if column == "bytes" else [
            {"bytes": None, "path": str(path)} for path in paths
        ]  # fmt: skip
        for ours, frame in zip(
            read_pair({"id": "0", "image1": stored[0], "image2": stored[1]}), expected, strict=True
        ):
            np.testing.assert_array_equal(ours, frame)


def row_of(files: list[bytes]) -> dict:
    return {"id": "7", **{f"image{i + 1}": {"bytes": data, "path": None} for i, data in enumerate(files)}}


def tagged_tiff(image: np.ndarray, orientation: int) -> bytes:
    """An uncompressed TIFF of any depth, written by OpenCV, with the tag added by hand: the last, unused entry."""
    data = bytearray(cv2.imencode(".tiff", image, [cv2.IMWRITE_TIFF_COMPRESSION, 1])[1].tobytes())
    start = int.from_bytes(data[4:8], "little")
    count = int.from_bytes(data[start : start + 2], "little")
    entries = [bytes(data[start + 2 + 12 * i : start + 14 + 12 * i]) for i in range(count)]
    tag = struct.pack("<HHIHH", 274, 3, 1, orientation, 0)
    entries = sorted(
        [entry for entry in entries if entry[:2] != tag[:2]] + [tag], key=lambda e: struct.unpack("<H", e[:2])
    )
    data[4:8] = len(data).to_bytes(4, "little")
    return bytes(data) + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "tiff", "16-bit rgb tiff", "16-bit gray tiff", "float rgb tiff"])
def test_prediction_turns_upright_and_training_keeps_the_stored_grid(kind, orientation):
    """The oracle turns arrays; both read the files that a camera stores."""
    turn, mirror, flip = np.transpose, np.fliplr, np.flipud
    steps = [[], [mirror], [flip, mirror], [flip], [turn], [turn, mirror], [turn, flip, mirror], [turn, flip]]

    def upright(image):
        for step in steps[orientation - 1]:
            image = image.swapaxes(0, 1) if step is np.transpose else step(image)
        return image

    stored = PAIR
    if kind == "png":
        exif = PIL.Image.Exif()
        exif[EXIF_ORIENTATION] = orientation
        files = [encoded(PIL.Image.fromarray(frame), ".png", exif=exif.tobytes()) for frame in PAIR]
    elif kind == "tiff":
        files = [tagged_tiff(np.ascontiguousarray(frame[..., ::-1]), orientation) for frame in PAIR]
    elif kind == "16-bit rgb tiff":
        stored, files = scaled(DEEP), [tagged_tiff(np.ascontiguousarray(f[..., ::-1]), orientation) for f in DEEP]
    elif kind == "16-bit gray tiff":
        stored, files = as_rgb(scaled(GRAY_DEEP)), [tagged_tiff(frame, orientation) for frame in GRAY_DEEP]
    else:
        files = [tagged_tiff(np.float32(frame[..., ::-1] / 255), orientation) for frame in PAIR]
    sources = [files] if kind == "float rgb tiff" else [files, [PIL.Image.open(io.BytesIO(data)) for data in files]]
    for source in sources:
        for ours, frame in zip(frames_raft.read_frames(source), stored, strict=True):
            np.testing.assert_array_equal(ours, upright(frame))
    for ours, frame in zip(read_pair(row_of(files)), stored, strict=True):
        np.testing.assert_array_equal(ours, frame)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((np.nan, 0.5), "finite"),
        ((0.5, 200.0), "0..1"),
        ((5.0, 5.0), "0..1"),
        ((-1.0, 0.5), "0..1"),
        ((0.5, -0.0005), None),
        ((200.0, 0.0), None),
    ],
)
def test_training_and_prediction_take_the_same_floats(values, message):
    frames = [np.full((8, 9), 0.25 * value, np.float32) for value in values]
    for frame, value in zip(frames, values, strict=True):
        frame[0, 0] = value
    files = [encoded(PIL.Image.fromarray(frame), ".tif") for frame in frames]
    if message is None:
        for ours, other in zip(read_pair(row_of(files)), frames_raft.read_frames(files), strict=True):
            np.testing.assert_array_equal(ours, other)
        return
    with pytest.raises(ValueError, match=message):
        frames_raft.read_frames(files)
    with pytest.raises(ValueError, match=f"7: .*{message}"):
        read_pair(row_of(files))


def test_integers_beyond_16_bits_do_not_wrap():
    frames = [np.array([[-5, 70000, 3]], np.int32), np.array([[65536, 0, 9]], np.int32)]
    files = [encoded(PIL.Image.fromarray(frame), ".tif") for frame in frames]
    expected = as_rgb(scaled(frames))
    for read in (read_pair(row_of(files)), frames_raft.read_frames(files)):
        for ours, frame in zip(read, expected, strict=True):
            np.testing.assert_array_equal(ours, frame)


def test_a_fade_from_black_of_16_bits_takes_its_range_later():
    frames = [np.full((8, 8), 500, np.uint16)] * 2 + [np.tile(np.uint16([1000, 3000]), (8, 4))] * 2
    converted = [frame[0, :2, 0].tolist() for frame in read_frames(frames)]
    assert converted == [[0, 0], [0, 0], [0, 255], [0, 255]]


def test_a_later_page_of_16_bits_is_no_first_page():
    pages = cv2.imencodemulti(".tiff", [frame[..., ::-1] for frame in DEEP])[1].tobytes()
    image = PIL.Image.open(io.BytesIO(pages))
    image.seek(1)
    with pytest.raises(ValueError, match="frame 2 is a later page of a file of 16-bit color images"):
        read_frame(image, "frame 2")


def test_urls_are_read(monkeypatch, tmp_path):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=tmp_path)

        def log_message(self, *_):
            pass

    (tmp_path / "a.png").write_bytes(KINDS["png"][1][0])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        np.testing.assert_array_equal(read_frame(f"{url}/a.png", "frame 1"), PAIR[0])
        with pytest.raises(OSError, match=r"frame 1 \(.*/missing.png\) cannot be downloaded: .*404"):
            frames_raft.read_frames([f"{url}/missing.png"])
        server.shutdown()
    text = base64.b64encode(KINDS["png"][1][0]).decode()
    np.testing.assert_array_equal(read_frame(f"data:image/png;base64,{text}", "frame 1"), PAIR[0])


def test_damage_beside_the_pixels_is_passed_over_in_silence(capfd):
    """A text with a wrong checksum, before and after the pixels; a palette with transparency."""
    data = KINDS["png"][1][0]
    text = struct.pack(">I", 4) + b"tEXta\0bc" + bytes(4)
    for damaged in (data[:33] + text + data[33:], data[:-12] + text + data[-12:]):
        np.testing.assert_array_equal(read_frame(damaged, "frame 1"), PAIR[0])
    palette = PIL.Image.fromarray(PAIR[0]).quantize(16)
    transparent = encoded(palette, ".png", transparency=bytes(range(16)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(read_frame(transparent, "frame 1"), np.array(palette.convert("RGB")))
        read_pair(row_of([transparent, transparent]))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("wrong", [(255, 0), (0,), "ab", 5, (None, 1), (0, float("inf"))])
def test_a_wrong_range_of_intensities_is_refused_everywhere(wrong, folder, model):
    message = r"intensity_range must be two numbers \(low, high\), low below high; got "
    pair = KINDS["16-bit rgb png"][1]
    for call in (
        lambda: RaftImageProcessor()(pair, intensity_range=wrong, return_tensors="pt"),
        lambda: pipeline("optical-flow", model=folder, device="cpu")(tuple(pair), intensity_range=wrong),
        lambda: FlowVideo(model, pair, intensity_range=wrong),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_ints_are_a_range_of_intensities():
    pair, processor = KINDS["16-bit rgb png"][1], RaftImageProcessor()
    expected = processor(pair, intensity_range=(0.0, 65535.0), return_tensors="pt").pixel_values
    assert torch.equal(processor(pair, intensity_range=(0, 65535), return_tensors="pt").pixel_values, expected)


def test_training_refuses_frames_without_a_common_range():
    files = [KINDS["16-bit rgb png"][1][0], KINDS["png"][1][1]]
    row = {"id": "7", **{f"image{i + 1}": {"bytes": data, "path": None} for i, data in enumerate(files)}}
    with pytest.raises(ValueError, match="7: both frames must have one depth; image1 is uint16, image2 is uint8"):
        read_pair(row)


@pytest.mark.parametrize("kind", ARRAYS)
def test_every_kind_of_array_has_one_flow_everywhere(kind, entry_points, model):
    pair, frames = ARRAYS[kind]
    for name, entry_point in entry_points.items():
        torch.testing.assert_close(
            entry_point(pair),
            expected_flow(model, frames),
            atol=1e-4,
            rtol=0,
            msg=lambda text, at=name: f"{at}: {text}",
        )


@pytest.mark.parametrize("size", [(8, 9), (40, 200), (63, 64), (64, 64), (65, 129), (100, 72)])
def test_small_frames_are_padded_alike_everywhere(size, folder, model, tmp_path):
    frames = [cv2.resize(frame, size[::-1]) for frame in PAIR]
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for path, frame in zip(paths, frames, strict=True):
        PIL.Image.fromarray(frame).save(path)
    processor = RaftImageProcessor()
    with torch.no_grad():
        outputs = model(**processor(frames, return_tensors="pt", input_data_format="channels_last"))
    expected = processor.post_process_optical_flow(outputs, [size])[0]["flow"]
    torch.testing.assert_close(
        pipeline("optical-flow", model=folder, device="cpu")(tuple(map(str, paths)))["flow"], expected
    )
    (pair,) = FlowVideo(model, paths)
    torch.testing.assert_close(pair.flow, expected, atol=1e-4, rtol=0)
    predict_flow.main([*map(str, paths), "--model", str(folder), "--output", str(tmp_path / "flow.npy")])
    flow = torch.from_numpy(read_flow(tmp_path / "flow.npy")[0]).permute(2, 0, 1)
    torch.testing.assert_close(flow, expected, atol=1e-4, rtol=0)


WRONG = {
    "in -1..1": ([frame / 127.5 - 1 for frame in PAIR], "must be in 0..1 or 0..255"),
    "normalized": ([(frame / 255 - 0.45) / 0.225 for frame in PAIR], "must be in 0..1 or 0..255"),
    "beyond 255": ([frame * 1.5 for frame in PAIR], "must be in 0..1 or 0..255"),
    "NaN": ([np.where(frame > 250, np.nan, frame) for frame in PAIR], "frame 1 must hold finite numbers"),
    "infinity": ([PAIR[0] / 255, np.where(PAIR[1] > 250, np.inf, 0.5)], "frame 2 must hold finite numbers"),
    "0..1 and 0..255": ([PAIR[0] / 255, PAIR[1].astype(float)], "frame 1 seems to be in 0..1"),
    "16 and 8 bits": ([DEEP[0], PAIR[1]], "all frames must have one depth.*frame 1 is uint16, frame 2 is uint8"),
    "complex": ([frame * 1j for frame in PAIR], "frame 1 must hold real numbers; got complex128"),
    "two channels": ([frame[..., :2] for frame in PAIR], r"frame 1 must be .* 1, 3 or 4 channels; got \(70, 90, 2\)"),
    "empty bytes": ([b"", b""], "frame 1 is empty"),
    "no image": ([b"<html>not found</html>"] * 2, "frame 1 cannot be decoded"),
    "a cut file": ([KINDS["png"][1][0][:-2000]] * 2, "frame 1 is damaged or cut off"),
    "a cut 16-bit file": ([KINDS["16-bit rgb png"][1][0][:-2000]] * 2, "frame 1 is a 16-bit color image that is dam"),
    "one of two turned": (
        [PIL.Image.open(io.BytesIO(turned((6, 6))[0])), PIL.Image.fromarray(np.rot90(PAIR[1]).copy())],
        "one size",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_what_cannot_be_meant_is_refused_everywhere(kind, entry_points):
    pair, message = WRONG[kind]
    for name, entry_point in entry_points.items():
        with pytest.raises(ValueError, match=message) as caught:
            entry_point(pair)
        assert "\n" not in str(caught.value), name


def test_a_file_that_cannot_be_read_is_named_everywhere(entry_points, folder, tmp_path, capsys):
    damaged, missing = tmp_path / "damaged.jpg", tmp_path / "missing.jpg"
    damaged.write_bytes(KINDS["jpeg"][1][0][:500])
    for path, message in (
        (damaged, "damaged.jpg"),
        (missing, "missing.jpg.: no such file"),
        (tmp_path, "is a folder"),
    ):
        for entry_point in entry_points.values():
            with pytest.raises((ValueError, OSError), match=message):
                entry_point([path, path])
    with pytest.raises(SystemExit) as stopped:
        predict(folder, damaged, damaged, "--output", tmp_path / "flow.flo")
    assert "damaged.jpg" in str(stopped.value) and not (tmp_path / "flow.flo").exists()


def test_a_given_range_of_intensities_is_used_everywhere(entry_points, folder, model, tmp_path, capsys):
    low, high = 4000, 20000
    frames = [np.clip(np.rint((frame.astype(float) - low) * 255 / (high - low)), 0, 255) for frame in DEEP]
    expected = expected_flow(model, [frame.astype(np.uint8) for frame in frames])
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for path, data in zip(paths, KINDS["16-bit rgb png"][1], strict=True):
        path.write_bytes(data)
    predict(folder, *paths, "--output", tmp_path / "flow.flo", "--intensity_range", low, high)
    assert "intensities 4000 to 20000 of the frames were mapped to 0 to 255" in capsys.readouterr().out
    processor = RaftImageProcessor(intensity_range=(low, high))
    with torch.no_grad():
        outputs = model(**processor(paths, return_tensors="pt"), num_flow_updates=4)
    pipe = pipeline("optical-flow", model=folder, device="cpu")
    (pair,) = FlowVideo(model, paths, num_flow_updates=4, intensity_range=(low, high))
    for flow in (
        torch.from_numpy(read_flow(tmp_path / "flow.flo")[0]).permute(2, 0, 1),
        processor.post_process_optical_flow(outputs, [(HEIGHT, WIDTH)])[0]["flow"],
        pipe(tuple(paths), num_flow_updates=4, intensity_range=(low, high))["flow"],
        pair.flow,
    ):
        torch.testing.assert_close(flow, expected, atol=1e-4, rtol=0)
    predict(folder, *paths, "--output", tmp_path / "flow.flo")
    lowest, highest = min(map(np.min, DEEP)), max(map(np.max, DEEP))
    assert f"intensities {lowest} to {highest} of the frames" in capsys.readouterr().out


def test_a_video_of_16_bit_frames_has_the_range_of_its_first_two(caplog):
    frames = [np.full((8, 8), value, np.uint16) for value in (1000, 3000, 2000, 9000, 0)]
    converted = [int(frame[0, 0, 0]) for frame in read_frames(iter(frames))]
    assert converted == [0, 255, 128, 255, 0]  # the last two are clipped
    with pytest.raises(ValueError, match="one depth.*frame 3 is uint8"):
        list(read_frames([*frames[:2], np.zeros((8, 8), np.uint8)]))
    assert [int(frame[0, 0, 0]) for frame in read_frames(frames[:1])] == [0]


def test_frames_of_a_reused_buffer_are_copied():
    def generate():
        buffer = np.zeros((8, 8, 3), np.uint8)
        for value in range(3):
            buffer[:] = value
            yield buffer

    assert [int(frame[0, 0, 0]) for frame in read_frames(generate())] == [0, 1, 2]


def test_frames_that_are_rescaled_already():
    processor = RaftImageProcessor()
    expected = processor(PAIR, return_tensors="pt", input_data_format="channels_last").pixel_values
    unit = [frame / 255 for frame in PAIR]
    assert torch.equal(processor(unit, do_rescale=False, return_tensors="pt").pixel_values, expected)
    with pytest.raises(ValueError, match="do_rescale=False, frames must be floats in 0..1; frame 1 is uint8"):
        processor(PAIR, do_rescale=False, return_tensors="pt")
    with pytest.raises(ValueError, match="values from 0 to 255, where 0 to 1 was expected"):
        processor([frame.astype(float) for frame in PAIR], do_rescale=False, return_tensors="pt")
    dark = [frame / 255 * 0.9 for frame in PAIR]
    ours = processor(dark, do_rescale=False, return_tensors="pt").pixel_values
    torch.testing.assert_close(ours, processor(dark, return_tensors="pt").pixel_values)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([np.uint8, np.uint16, np.int16, np.int32, np.uint32, np.float32, np.float64, bool]),
    st.integers(0, 2**32 - 1),
    st.floats(1, 60000),
)
def test_both_frames_are_mapped_by_one_increasing_map(dtype, seed, scale):
    """Whatever the depth: equal values stay equal, and larger ones never become smaller, across both frames."""
    rng = np.random.default_rng(seed)
    values = rng.random((2, 6, 7)) * (255 if np.dtype(dtype).kind == "f" and scale > 255 else scale)
    frames = [frame.astype(dtype) if dtype is not bool else frame > scale / 2 for frame in values]
    try:
        converted = FrameConverter().convert(frames, ["frame 1", "frame 2"])
    except ValueError as error:
        assert np.dtype(dtype).kind == "f" and "0..1" in str(error)
        return
    flat, result = np.stack(frames).ravel(), np.stack(converted)[..., 0].ravel().astype(int)
    order = np.argsort(flat, kind="stable")
    assert (np.diff(result[order]) >= 0).all()
    assert all(len(set(result[flat == value])) == 1 for value in np.unique(flat))
    assert all(frame.dtype == np.uint8 and frame.shape == (6, 7, 3) for frame in converted)


def test_opencv_is_asked_for_by_name(monkeypatch):
    monkeypatch.setattr(frames_raft, "_opencv", lambda: None)
    with pytest.raises(ValueError, match="frame 1 needs OpenCV to be decoded: pip install opencv-python-headless"):
        read_frame(KINDS["16-bit rgb png"][1][0], "frame 1")
    assert read_frame(KINDS["png"][1][0], "frame 1").dtype == np.uint8


@pytest.mark.slow
def test_field_files_have_the_flow_of_their_pair(sample_weights, tmp_path):
    """The kinds of files that people have, as another program made them."""
    field = sample_weights.parent / "field"
    if not field.is_dir():
        pytest.skip("the sample files are not there: shared/field")
    from modeling_raft.convert_raft_checkpoint import load_raft

    model = load_raft(sample_weights / "raft-small.pth")

    def flow_of(pair):
        (result,) = FlowVideo(model, pair)
        return result.flow

    expected = flow_of([field / "f1.png", field / "f2.png"])
    gray = flow_of([PIL.Image.open(field / name).convert("L") for name in ("f1.png", "f2.png")])
    kinds = [path for path in sorted((field / "kinds").glob("*1.*")) if not path.name.startswith("bit")]
    for first in kinds:  # without 1-bit images, which keep too little of the pattern
        flow = flow_of([first, first.with_name(first.name.replace("1.", "2."))])
        is_gray = first.name.startswith(("gray", "la", "i16", "f1.tif"))
        is_lossy = first.name.startswith(("cmyk", "j", "p", "w"))  # motion is 2.4 px
        assert (flow - (gray if is_gray else expected)).norm(dim=0).mean() < (1.0 if is_lossy else 0.15), first.name
    for first in sorted((field / "png").glob("*1.png")):
        flow = flow_of([first, first.with_name(first.name.replace("1.", "2."))])
        assert torch.equal(flow, expected), first.name
    photos = [field / "exif" / name for name in ("p1.jpg", "p2.jpg")]
    upright = [ImageOps.exif_transpose(PIL.Image.open(path)) for path in photos]
    assert torch.equal(flow_of(photos), flow_of(upright)) and upright[0].size == (128, 160)
    with pytest.raises(ValueError, match="all frames must have one size; frame 2 .*n2.jpg. is 160 x 128"):
        flow_of([photos[0], field / "exif" / "n2.jpg"])
