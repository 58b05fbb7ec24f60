"""Smoothing of maps along flow: against the plain formula over a video, against known ground truth, and on files."""

import math
import resource
import weakref
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from moving_shapes import moving_shapes
from PIL import Image
from test_modeling_raft import tiny_config

from examples import temporal_smoothing
from examples.temporal_smoothing import TemporalSmoother, main, read_ahead, reflect, time_weights
from flow_inference.estimator import FlowEstimator
from flow_inference.frame_sources import read_frames
from flow_inference.map_files import npy_writer
from flow_inference.video_files import VideoReader, VideoWriter
from modeling_raft import RaftForOpticalFlow
from modeling_raft.convert_raft_checkpoint import load_raft

VELOCITIES = [(2, 1), (-3, 0)]


def shapes_video(num_frames, height, width, velocities=VELOCITIES):
    """Also of a single frame, which has no flow."""
    shapes = moving_shapes(num_frames + 1, height, width, velocities)
    return shapes._replace(frames=shapes.frames[:-1], layers=shapes.layers[:-1])


class KnownFlow:
    """Stands for `FlowEstimator` on a video of moving shapes; a frame's encoding is its number."""

    def __init__(self, shapes, velocities=VELOCITIES):
        self.shapes, self.velocities, self.num_encoded = shapes, np.array(velocities, np.float32), 0

    def encode(self, frame):
        self.num_encoded += 1
        return self.num_encoded - 1

    def between(self, first, second):
        """`(H, W, 2)`."""
        return (second - first) * self.velocities[self.shapes.layers[first]]

    def estimate(self, pairs, num_flow_updates):
        flows = np.stack([self.between(*pair) for pair in pairs])
        return torch.from_numpy(flows).permute(0, 3, 1, 2), None


def smooth_with_known_flow(monkeypatch, shapes, maps, window, frames=None):
    """The smoothed maps, and what smoothed them."""
    known = KnownFlow(shapes)
    monkeypatch.setattr(temporal_smoothing, "FlowEstimator", lambda *arguments: known)
    smoother = TemporalSmoother(SimpleNamespace(device=torch.device("cpu")), window)
    frames = shapes.frames if frames is None else frames
    smoothed = list(smoother.smooth(zip(frames, maps, strict=True)))
    assert known.num_encoded == len(frames)
    return np.stack(smoothed), smoother


def read_between(values, x, y):
    """Values `(h, w, ...)` at places `(h', w')` between the pixels, and which places are in the frame."""
    height, width = values.shape[:2]
    inside = (x >= -0.5) & (x <= width - 0.5) & (y >= -0.5) & (y <= height - 0.5)
    x, y = x.clip(0, width - 1), y.clip(0, height - 1)
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    right, bottom = (left + 1).clip(max=width - 1), (top + 1).clip(max=height - 1)
    dx, dy = ((a - b).reshape(*x.shape, *[1] * (values.ndim - 2)) for a, b in ((x, left), (y, top)))
    above = (1 - dx) * values[top, left] + dx * values[top, right]
    below = (1 - dx) * values[bottom, left] + dx * values[bottom, right]
    return (1 - dy) * above + dy * below, inside


def neighbor_seen(images, flow, reverse, first, second):
    """Photometric weight, 0 where hidden, and flow, both on the frames' grid: straight from the definitions."""
    y, x = np.mgrid[: flow.shape[0], : flow.shape[1]]
    u, v = flow[..., 0], flow[..., 1]
    seen, inside = read_between(images[second], x + u, y + v)
    back, _ = read_between(reverse, x + u, y + v)
    mismatch = ((flow + back) ** 2).sum(-1)
    lengths = (flow**2).sum(-1) + (back**2).sum(-1)
    weight = np.exp(-((seen - images[first]) ** 2).mean(-1) / (2 * 0.2**2))
    return weight * inside * (mismatch <= 0.01 * lengths + 0.5)


def plain_smoothing(shapes, maps, window, reduction):
    """The formula of the docstring over a whole video, offset by offset, with the video repeated by numpy.pad.

    Returns the smoothed maps, and the flicker of the given ones and of these.
    """
    known = KnownFlow(shapes)
    images = shapes.frames / 127.5 - 1
    order = np.pad(np.arange(len(maps)), window, mode="reflect")
    y, x = np.mgrid[: maps.shape[1], : maps.shape[2]]
    channels = [1] * (maps.ndim - 3)
    center = slice(reduction // 2, None, reduction)
    smoothed, before, after = [], [], []

    def fetch(values, first, second):
        """A map as another frame would see it, and its weight."""
        flow, reverse = known.between(first, second), known.between(second, first)
        weight = neighbor_seen(images, flow, reverse, first, second)[center, center]
        u, v = np.moveaxis(flow[center, center] / reduction, -1, 0)
        return read_between(values, x + u, y + v)[0], weight

    for first in range(len(maps)):
        total, weights = np.zeros(maps.shape[1:]), np.zeros(maps.shape[1:3])
        for offset in range(-window, window + 1):
            warped, weight = fetch(maps[order[first + window + offset]], first, order[first + window + offset])
            weight = weight * math.exp(-(offset**2) / (2 * (window + 0.5) ** 2))
            total += weight.reshape(*weight.shape, *channels) * warped
            weights += weight
        smoothed.append(total / weights.reshape(*weights.shape, *channels))
        if first > 0:
            for values, found in ((maps, before), (smoothed, after)):
                warped, weight = fetch(values[first - 1], first, first - 1)
                found.extend(np.abs(values[first] - warped)[weight > 0].reshape(-1))
    return np.stack(smoothed), np.mean(before) if before else math.nan, np.mean(after) if after else math.nan


@pytest.mark.parametrize("num_frames", [1, 2, 3, 4, 5, 9, 14])
@pytest.mark.parametrize(("window", "reduction", "channels"), [(3, 1, ()), (3, 2, (2,)), (5, 1, (3,)), (1, 2, ())])
def test_the_stream_equals_the_plain_formula(monkeypatch, num_frames, window, reduction, channels):
    shapes = shapes_video(num_frames, 24, 32)
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 20, shapes.frames.shape)  # of which the photometric weights are about 0.7
    shapes = shapes._replace(frames=(shapes.frames + noise).clip(0, 255).astype(np.uint8))
    shape = (num_frames, 24 // reduction, 32 // reduction, *channels)
    maps = rng.normal(size=shape).astype(np.float32)
    expected, before, after = plain_smoothing(shapes, maps.astype(float), window, reduction)
    smoothed, smoother = smooth_with_known_flow(monkeypatch, shapes, maps, window)
    assert smoothed.dtype == np.float32
    np.testing.assert_allclose(smoothed, expected, atol=2e-5)
    np.testing.assert_allclose([smoother.before.mean, smoother.after.mean], [before, after], rtol=1e-5)


@pytest.mark.parametrize("num_frames", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("window", [1, 5, 6])
def test_time_weights_are_those_of_the_padded_video(num_frames, window):
    order = np.pad(np.arange(num_frames), window, mode="reflect")
    assert [reflect(index, num_frames) for index in range(-window, num_frames + window)] == list(order)
    for index in range(num_frames):
        weights = time_weights(index, num_frames, window)
        assert all(abs(other - index) <= window for other in weights)  # no other pairs are ever estimated
        gauss = np.exp(-(np.arange(-window, window + 1) ** 2) / (2 * (window + 0.5) ** 2))
        padded = order[index : index + 2 * window + 1]
        np.testing.assert_allclose([weights.get(other, 0) for other in range(num_frames)],
                                   [gauss[padded == other].sum() for other in range(num_frames)])  # fmt: skip
        assert index + window >= num_frames or weights == time_weights(index, index + window + 1, window)


@pytest.mark.parametrize("num_samples", [0, 1, 3, 8])
def test_reading_ahead_tells_how_many_there_are(num_samples):
    drawn = []
    samples = (drawn.append(number) or number for number in range(num_samples))
    for expected, (number, known) in enumerate(read_ahead(samples, 3)):
        assert number == expected
        assert known == len(drawn) == min(num_samples, number + 4)
    assert len(drawn) == num_samples


def test_noise_falls_as_the_number_of_averaged_maps_says(monkeypatch):
    """The frames' own brightness, which moves with the layers, and noise of its own in every map."""
    window, num_frames = 3, 13
    shapes = moving_shapes(num_frames, 64, 80, VELOCITIES)
    clean = shapes.frames.mean(-1, dtype=np.float32)
    noise = np.random.default_rng(1).normal(0, 20, clean.shape).astype(np.float32)
    smoothed, smoother = smooth_with_known_flow(monkeypatch, shapes, clean + noise, window)
    gauss = np.exp(-(np.arange(-window, window + 1) ** 2) / (2 * (window + 0.5) ** 2))
    remaining = math.sqrt((gauss**2).sum()) / gauss.sum()  # of independent noise in a weighted mean: 0.381
    middle = slice(window, num_frames - window)
    inner = np.s_[middle, 12:-12, 12:-12]
    everywhere = np.ones_like(clean, bool)
    for offset in range(-window, window + 1):  # pixels that all neighbors show
        for first in range(num_frames)[middle]:
            everywhere[first] &= visible(shapes, first, first + offset)
    error = (smoothed - clean)[inner][everywhere[inner]]
    assert error.std() == pytest.approx(20 * remaining, rel=0.03)
    assert abs(smoothed - clean)[inner].mean() < 0.5 * abs(noise)[inner].mean()
    # Two means in a row share most of their maps, so that flicker falls further than noise does.
    assert smoother.before.mean == pytest.approx(20 * math.sqrt(2) * math.sqrt(2 / math.pi), rel=0.03)
    assert smoother.after.mean < 0.25 * smoother.before.mean


def visible(shapes, first, second):
    """Pixels of one frame that another shows, by the layers: `(H, W)` bool."""
    y, x = np.mgrid[: shapes.layers.shape[1], : shapes.layers.shape[2]]
    flow = KnownFlow(shapes).between(first, second)
    to_x, to_y = x + flow[..., 0].astype(int), y + flow[..., 1].astype(int)
    height, width = x.shape
    inside = (to_x >= 0) & (to_x < width) & (to_y >= 0) & (to_y < height)
    there = shapes.layers[second, to_y.clip(0, height - 1), to_x.clip(0, width - 1)]
    return inside & (there == shapes.layers[first])


@pytest.mark.parametrize("check", [True, False])
def test_what_is_hidden_is_not_averaged_in(monkeypatch, check):
    """Frames of one gray, where colors cannot tell: only the way there and back says which layer is seen."""
    shapes = moving_shapes(9, 48, 64, VELOCITIES)
    if not check:
        monkeypatch.setattr(temporal_smoothing, "is_occluded", lambda flow, _: torch.zeros_like(flow[:, 0]).bool())
    layers = 100 * shapes.layers.astype(np.float32)
    gray = np.full_like(shapes.frames, 128)
    smoothed, _ = smooth_with_known_flow(monkeypatch, shapes, layers, 3, gray)
    pollution = abs(smoothed - layers).max()
    assert pollution < 1e-3 if check else pollution > 30


def test_another_scene_is_not_averaged_in(monkeypatch):
    """Flow that leads across a cut, both ways alike, is found out by the colors."""
    shapes = moving_shapes(8, 48, 64, [(0, 0)])
    frames = shapes.frames // 4
    frames[4:] += 180
    maps = np.zeros((8, 48, 64), np.float32)
    maps[4:] = 100
    smoothed, _ = smooth_with_known_flow(monkeypatch, shapes, maps, 3, frames)
    assert abs(smoothed - maps).max() < 0.1


class CountingEstimator(FlowEstimator):
    """Knows which of its encodings are alive."""

    encodings: list[weakref.ref]
    most_alive = 0

    def encode(self, frame):
        encoded = super().encode(frame)
        self.encodings.append(weakref.ref(encoded))
        alive = sum(reference() is not None for reference in self.encodings)
        CountingEstimator.most_alive = max(CountingEstimator.most_alive, alive)
        return encoded


@pytest.mark.parametrize("window", [1, 3])
def test_frames_are_encoded_once_and_few_are_held(monkeypatch, window):
    model = RaftForOpticalFlow(tiny_config()).eval()
    CountingEstimator.encodings, CountingEstimator.most_alive = [], 0
    monkeypatch.setattr(temporal_smoothing, "FlowEstimator", CountingEstimator)
    images = {"feature_encoder": 0, "context_encoder": 0}
    for name in images:

        def count(_, arguments, name=name):
            images[name] += len(arguments[0])

        getattr(model, name).register_forward_pre_hook(count)
    frames = np.random.default_rng(0).integers(0, 256, (9, 48, 64, 3), np.uint8)
    drawn = []
    samples = ((drawn.append(frame) or frame, np.zeros((48, 64), np.float32)) for frame in frames)
    smoother = TemporalSmoother(model, window, num_flow_updates=1)
    for number, _ in enumerate(smoother.smooth(samples)):
        assert len(drawn) <= number + 2 * window + 1  # a stream: not all frames are asked for at once
    assert images == {"feature_encoder": 9, "context_encoder": 9}
    assert CountingEstimator.most_alive == window + 1


@pytest.mark.slow
def test_flicker_falls_with_published_weights(sample_weights):
    shapes = moving_shapes(8, 160, 224, [(2, 1), (-4, 2)])
    clean = shapes.frames.mean(-1, dtype=np.float32)
    rng = np.random.default_rng(0)
    noise = np.stack([cv2.GaussianBlur(rng.normal(size=(160, 224)), (0, 0), 6) for _ in clean])
    maps = (clean + 15 * noise / noise.std()).astype(np.float32)
    model = load_raft(str(sample_weights / "raft-small.pth")).eval()
    smoother = TemporalSmoother(model, window=2, num_flow_updates=8)
    smoothed = np.stack(list(smoother.smooth(zip(shapes.frames, maps, strict=True))))
    assert smoother.after.mean < 0.4 * smoother.before.mean
    assert abs(smoothed - clean).mean() < 0.65 * abs(maps - clean).mean()  # and the ground truth is not blurred away


@pytest.fixture
def job(tmp_path):
    """Files of a video of six frames, its maps in every form, and the arguments that they share."""
    torch.manual_seed(0)
    model = RaftForOpticalFlow(tiny_config())
    model.update_block.flow_head[2].bias.data.zero_()  # else flow has one direction there and back: all is occluded
    model.save_pretrained(tmp_path / "model")
    frames = moving_shapes(6, 64, 80, VELOCITIES).frames
    write_images(tmp_path / "frames", frames)
    with VideoWriter(tmp_path / "clip.mp4", frame_rate=25) as video:
        for frame in frames:
            video.write(frame)
    rng = np.random.default_rng(0)
    scalar = rng.normal(size=(6, 20, 30))
    np.save(tmp_path / "maps.npy", scalar)
    (tmp_path / "arrays").mkdir()
    for number, values in enumerate(rng.normal(size=(6, 64, 80, 2)).astype(np.float16), start=6):  # 6 to 11
        np.save(tmp_path / f"arrays/map_{number}.npy", values)
    write_images(tmp_path / "gray", rng.integers(0, 256, (6, 64, 80), np.uint8))
    write_images(tmp_path / "color", rng.integers(0, 256, (6, 32, 40, 3), np.uint8))
    return tmp_path


def write_images(folder, images):
    folder.mkdir(exist_ok=True)
    for number, image in enumerate(images, start=6):
        Image.fromarray(image).save(folder / f"{number}.png")


def command(folder, frames="frames", maps="maps.npy", output="out.npy", *more):
    paths = {"--model": "model", "--frames": frames, "--maps": maps, "--output": output}
    arguments = [argument for flag, path in paths.items() for argument in (flag, str(folder / path))]
    return [*arguments, "--window", "2", "--num_flow_updates", "2", *map(str, more)]


def expected(folder, frames, maps):
    """What must be in the output: smoothed by the classes that the other tests compare with the formula."""
    smoother = TemporalSmoother(RaftForOpticalFlow.from_pretrained(folder / "model").eval(), 2, 2)
    frames = read_frames(sorted((folder / frames).iterdir(), key=number_of) if frames == "frames" else frames)
    return np.stack(list(smoother.smooth(zip(frames, maps.astype(np.float32), strict=True)))), smoother


def number_of(path):
    return int(path.stem.split("_")[-1])


def load(folder):
    return np.stack(
        [
            np.load(path) if path.suffix == ".npy" else np.asarray(Image.open(path))
            for path in sorted(folder.iterdir(), key=number_of)
        ]
    )


@pytest.mark.slow
def test_a_npy_file_gives_a_npy_file(job, capsys):
    main(command(job))
    smoothed, smoother = expected(job, "frames", np.load(job / "maps.npy"))
    written = np.load(job / "out.npy")
    assert written.dtype == np.float32 and written.shape == (6, 20, 30)
    np.testing.assert_allclose(written, smoothed, atol=1e-6)
    assert not list(job.glob("*partial*"))
    said = capsys.readouterr().out
    assert f"{smoother.before.mean:.4g} before" in said and f"{smoother.after.mean:.4g} after" in said


def test_a_video_file_is_read(job):
    main(command(job, "clip.mp4", output="new/out.npy"))
    smoothed, _ = expected(job, VideoReader(job / "clip.mp4"), np.load(job / "maps.npy"))
    np.testing.assert_allclose(np.load(job / "new/out.npy"), smoothed, atol=1e-6)


@pytest.mark.parametrize("maps", ["arrays", "gray", "color"])
def test_a_folder_gives_a_folder_of_the_same_names(job, maps):
    main(command(job, maps=maps, output="new/out"))
    given, written = load(job / maps), load(job / "new/out")
    assert sorted(path.name for path in (job / "new/out").iterdir()) == sorted(
        path.name for path in (job / maps).iterdir()
    )
    smoothed, _ = expected(job, "frames", given)
    assert written.shape == given.shape
    assert written.dtype == (np.float32 if maps == "arrays" else np.uint8)
    np.testing.assert_allclose(written, smoothed if maps == "arrays" else smoothed.round(), atol=1e-6)


def test_mixed_precision_is_close(job):
    main([*command(job), "--mixed_precision", "bf16"])
    smoothed, _ = expected(job, "frames", np.load(job / "maps.npy"))
    written = np.load(job / "out.npy")
    assert 0 < abs(written - smoothed).mean() < 0.1


@pytest.mark.slow
def test_phone_photos_are_smoothed_as_upright_ones(job):
    """Maps are upright; the frames lie on their side, and say so."""
    frames, tall = moving_shapes(6, 64, 80, VELOCITIES).frames, np.random.default_rng(1).random((6, 80, 64))
    np.save(job / "tall.npy", tall)
    write_images(job / "upright", [np.rot90(frame, -1) for frame in frames])
    (job / "phone").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    for number, frame in enumerate(frames, start=6):
        Image.fromarray(frame).save(job / f"phone/{number}.png", exif=exif)
    main(command(job, "upright", "tall.npy", "upright.npy"))
    main(command(job, "phone", "tall.npy", "phone.npy"))
    np.testing.assert_array_equal(np.load(job / "phone.npy"), np.load(job / "upright.npy"))
    np.save(job / "lying.npy", tall.transpose(0, 2, 1))
    with pytest.raises(SystemExit, match="maps of 64 x 80 .* lie on their side beside frames of 80 x 64"):
        main(command(job, "phone", "lying.npy", "lying_out.npy"))
    (job / "turned_maps").mkdir()
    for number, values in enumerate(tall.transpose(0, 2, 1)[:, ::-1], start=6):  # stored as the frames are
        Image.fromarray((255 * values).astype(np.uint8)).save(job / f"turned_maps/{number}.png", exif=exif)
    main(command(job, "phone", "turned_maps", "turned_maps_out"))
    smoothed = np.array(Image.open(job / "turned_maps_out/6.png"))
    assert smoothed.shape == (80, 64)
    np.testing.assert_allclose(smoothed, 255 * np.load(job / "phone.npy")[0], atol=3)


def remove_last_frame(folder):
    (folder / "frames/11.png").unlink()


def shorten_video(folder):
    frames = list(VideoReader(folder / "clip.mp4"))[:5]
    with VideoWriter(folder / "clip.mp4", frame_rate=25) as video:
        for frame in frames:
            video.write(frame)


def save(name, values):
    return lambda folder: np.save(folder / name, values)


def save_zip(folder):
    np.savez(folder / "maps.npz", np.zeros((6, 8, 8)))
    (folder / "maps.npz").rename(folder / "maps.npy")


def spoil(name, index, value):
    def change(folder):
        maps = np.load(folder / name)
        maps[index] = value
        np.save(folder / name, maps)

    return change


def write_image(mode, name="gray/8.png", size=(80, 64)):
    return lambda folder: Image.new(mode, size).save(folder / name)


def deep_color(folder):
    cv2.imwrite(str(folder / "gray/8.png"), np.zeros((64, 80, 3), np.uint16))


def cut_off(folder):
    (folder / "maps.npy").write_bytes((folder / "maps.npy").read_bytes()[:-8])


GRAY = {"maps": "gray", "output": "out"}


@pytest.mark.parametrize(
    ("change", "paths", "message"),
    [
        (remove_last_frame, {}, "there are 5 frames and 6 maps"),
        (shorten_video, {"frames": "clip.mp4"}, "there are 5 frames and 6 maps; "),
        (save("maps.npy", np.zeros((5, 8, 8))), {"frames": "clip.mp4"}, "there are at least 6 frames and 5 maps; "),
        (save("maps.npy", np.zeros((9, 8, 8))), {}, "there are 6 frames and 9 maps"),
        (spoil("maps.npy", (3, 0, 0), np.nan), {}, "map of frame 4 has values that are not finite"),
        (spoil("maps.npy", (3, 0, 0), 1e300), {}, "map of frame 4 has values that are not finite"),
        (
            spoil("arrays/map_8.npy", (0, 0, 0), np.inf),
            {"maps": "arrays", "output": "out"},
            "arrays/map_8.npy) has values",
        ),
        (save("arrays/map_8.npy", np.zeros((64, 81, 2))), {"maps": "arrays", "output": "out"}, "map of frame 3 ("),
        (save("arrays/map_6.npy", np.zeros(64)), {"maps": "arrays", "output": "out"}, "the shape must be (h, w) or"),
        (save("arrays/map_6.npy", np.array("a")), {"maps": "arrays", "output": "out"}, "arrays/map_6.npy must hold r"),
        (
            save("maps.npy", np.zeros((6, 8), complex)),
            {},
            "maps.npy must hold real numbers; got complex128",
        ),
        (save("maps.npy", np.array([None])), {}, "maps.npy: no .npy file of numbers"),
        (save("maps.npy", np.zeros((6, 8))), {}, "maps.npy: maps must be (N, h, w) or (N, h, w, C)"),
        (save("maps.npy", np.zeros((0, 8, 8))), {}, "maps.npy: "),
        (cut_off, {}, "maps.npy: no .npy file of numbers, or damaged"),
        (write_image("P"), GRAY, "gray/8.png: maps must be 8-bit gray or RGB images; got uint8 of Pillow's mode P"),
        (
            write_image("RGBA"),
            GRAY,
            "gray/8.png: maps must be 8-bit gray or RGB images; got uint8 of Pillow",
        ),
        (write_image("I;16"), GRAY, "gray/8.png: maps must be 8-bit gray or RGB images; got uint16"),
        (deep_color, GRAY, "gray/8.png: maps must be 8-bit gray or RGB images; got uint16"),
        (write_image("L", size=(80, 65)), GRAY, "gray/8.png): the shape must be (64, 80), as the first"),
        (write_image("RGB"), GRAY, "gray/8.png): the shape must be (64, 80), as the first; got (64, 80, 3)"),
        (
            lambda folder: (folder / "gray/8.png").write_bytes(b"?"),
            GRAY,
            "gray/8.png) cannot be decoded: it is no image",
        ),
        (lambda folder: (folder / "empty").mkdir(), {"maps": "empty", "output": "out"}, "empty: no images"),
        (None, {"maps": "missing.npy"}, "missing.npy: no such file or folder"),
        (None, {"maps": "missing", "output": "out"}, "missing: no such file or folder"),
        (lambda folder: (folder / "maps.npy").write_bytes(b""), {}, "maps.npy: no .npy file of numbers"),
        (save_zip, {}, "maps.npy: no .npy file of numbers"),
        (None, {"maps": "clip.mp4"}, "clip.mp4: maps are a folder or a .npy file"),
        (None, {"frames": "missing.mp4"}, "missing.mp4"),
        (write_image("RGB", "frames/8.png", (81, 64)), {}, "all frames must have one size"),
        (None, {"output": "maps.npy"}, "maps.npy: is read; write to another place"),
        (None, {"maps": "gray", "output": "frames"}, "frames: is read; write to another place"),
        (None, {"maps": "gray", "output": "new.npy"}, "new.npy: maps of a folder are written to a folder"),
        (None, {"maps": "gray", "output": "clip.mp4"}, "clip.mp4: maps of a folder are written to a folder"),
        (None, {"output": "new"}, "new: maps of a .npy file are written to a .npy file"),
        (lambda folder: (folder / "model/model.safetensors").write_bytes(b"?"), {}, "model"),
    ],
)
def test_mistakes_in_files_are_named(job, change, paths, message):
    if change is not None:
        change(job)
    with pytest.raises(SystemExit) as error:
        main(command(job, **paths))
    assert str(error.value).startswith("temporal_smoothing.py: error: ")
    assert message in str(error.value)
    assert not (job / "out.npy").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--window", 0], "--window must be at least 1; got 0"),
        (["--num_flow_updates", 0], "--num_flow_updates must be at least 1; got 0"),
        (["--max_side", 20], "max_side must be at least 64; got 20"),
        pytest.param(["--mixed_precision", "fp16"], "fp16 needs a GPU", marks=pytest.mark.skipif(
            torch.cuda.is_available(), reason="there is a GPU")),
    ],
)  # fmt: skip
def test_mistakes_in_flags_are_named(job, flags, message, capsys):
    with pytest.raises(SystemExit) as error:
        main([*command(job), *map(str, flags)])
    assert message in capsys.readouterr().err + str(error.value)


def test_what_was_written_before_an_error_stays(job):
    """Of six maps the last is bad: the others are smoothed as if the video ended before it."""
    maps = np.load(job / "maps.npy")
    maps[5, 0, 0] = np.nan
    np.save(job / "maps.npy", maps)
    with pytest.raises(SystemExit, match=r"map of frame 6.*; .*out.npy.partial.npy has the 5 maps before that"):
        main([*command(job), "--window", "1"])
    smoother = TemporalSmoother(RaftForOpticalFlow.from_pretrained(job / "model").eval(), 1, 2)
    frames = list(read_frames(sorted((job / "frames").iterdir(), key=number_of)))
    smoothed = list(smoother.smooth(zip(frames[:5], maps[:5].astype(np.float32), strict=True)))
    np.testing.assert_allclose(np.load(job / "out.npy.partial.npy"), smoothed, atol=1e-6)
    assert not (job / "out.npy").exists()


def test_a_folder_keeps_what_was_written_before_an_error(job):
    write_image("P", "gray/11.png")(job)
    with pytest.raises(SystemExit, match="11.png: maps must be 8-bit gray or RGB images"):
        main([*command(job, maps="gray", output="out"), "--window", "1"])
    assert sorted(path.name for path in (job / "out").iterdir()) == sorted(f"{number}.png" for number in range(6, 11))


def test_a_full_disk_is_told(tmp_path):
    maps = np.random.default_rng(0).normal(size=(4, 100, 100)).astype(np.float32)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(ValueError, match="out.npy.partial.npy has the 2 maps before that"):
        with npy_writer(tmp_path / "out.npy", (100, 100)) as write:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
            try:
                for values in maps:
                    write(values)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert np.array_equal(np.load(tmp_path / "out.npy.partial.npy"), maps[:2])


def test_folders_are_counted_before_the_work(job):
    remove_last_frame(job)
    with pytest.raises(SystemExit, match="there are 5 frames and 6 maps"):
        main(command(job))
    assert not list(job.glob("out*"))
