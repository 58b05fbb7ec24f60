"""FlowVideo: the flow of pairs, sooner."""

import weakref

import cv2
import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from moving_shapes import moving_shapes
from test_modeling_raft import tiny_config

import flow_inference.devices
from flow_inference import FlowVideo, predict_pair
from flow_inference.devices import autocast
from flow_inference.estimator import FlowEstimator
from flow_inference.frame_changes import SceneCutDetector, is_duplicate, photometric_error
from flow_inference.video_files import VideoReader, VideoWriter
from modeling_raft import RaftForOpticalFlow
from modeling_raft.convert_raft_checkpoint import load_raft


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = RaftForOpticalFlow(tiny_config()).eval()
    model.update_block.flow_head[2].weight.data *= 30  # flow of several pixels, everywhere another
    return model


@pytest.fixture(scope="module")
def shapes():
    return moving_shapes(5, 136, 150, [(2, 1), (-4, 2)])


@pytest.fixture
def calls(model, monkeypatch):
    """Images that went through each encoder, and what each estimate was started with."""
    seen = {"features": 0, "context": 0, "starts": [], "updates": []}
    features, context, updates = model.encode_features, model.encode_context, model.updates

    def count_features(images):
        seen["features"] += len(images)
        return features(images)

    def count_context(images):
        seen["context"] += len(images)
        return context(images)

    def watch_updates(*args):
        seen["updates"].append(args[4])
        seen["starts"].append(args[5])
        return updates(*args)

    for name, function in (
        ("encode_features", count_features),
        ("encode_context", count_context),
        ("updates", watch_updates),
    ):
        monkeypatch.setattr(model, name, function)
    return seen


def test_without_warm_start_it_is_pair_by_pair(model, shapes):
    pairs = list(FlowVideo(model, shapes.frames, num_flow_updates=3, warm_start=False, backward=True))
    assert [pair.index for pair in pairs] == [0, 1, 2, 3]
    for pair in pairs:
        frame1, frame2 = shapes.frames[pair.index : pair.index + 2]
        assert np.array_equal(pair.frame1, frame1) and np.array_equal(pair.frame2, frame2)
        assert (pair.num_flow_updates, pair.warm, pair.duplicate) == (3, False, False)
        torch.testing.assert_close(pair.flow, predict_pair(model, frame1, frame2, 3), atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(pair.backward_flow, predict_pair(model, frame2, frame1, 3), atol=1e-3, rtol=1e-4)
        assert pair.occluded.shape == pair.consistency_error.shape == (136, 150)


def test_each_frame_is_encoded_once(model, shapes, calls):
    frames = (frame for frame in shapes.frames)
    assert len(list(FlowVideo(model, frames, backward=True, num_flow_updates=2, warm_num_flow_updates=1))) == 4
    assert calls["features"] == calls["context"] == 5


def test_the_last_frame_needs_no_context(model, shapes, calls):
    list(FlowVideo(model, shapes.frames, num_flow_updates=1, warm_start=False))
    assert (calls["features"], calls["context"]) == (5, 4)


def test_batches_give_the_same_pairs_in_order(model, shapes, calls):
    """With a duplicate frame in the middle, a last batch that is not full, and both directions."""
    frames = shapes.frames[[0, 1, 1, 2, 3, 4]]
    settings = {"num_flow_updates": 2, "warm_start": False, "backward": True}
    one = list(FlowVideo(model, frames, **settings))
    calls["features"] = calls["context"] = 0
    batches = list(FlowVideo(model, (frame for frame in frames), **settings, batch_size=3))
    assert calls["features"] == calls["context"] == 5  # the duplicate is none
    assert [pair.index for pair in batches] == [0, 1, 2, 3, 4] and batches[1].duplicate
    for pair, expected in zip(batches, one, strict=True):
        assert np.array_equal(pair.frame1, expected.frame1) and np.array_equal(pair.frame2, expected.frame2)
        assert (pair.cut, pair.flat, pair.duplicate) == (expected.cut, expected.flat, expected.duplicate)
        torch.testing.assert_close(pair.flow, expected.flow, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(pair.backward_flow, expected.backward_flow, atol=1e-3, rtol=1e-4)
    with pytest.raises(ValueError, match="batch_size must be 1 with warm_start"):
        FlowVideo(model, frames, batch_size=2)


def test_a_pair_is_updated_until_its_flow_rests(model, shapes, monkeypatch):
    """Updates that move the flow of one pair less and less, and that of another always by 8 px of the image."""
    steps = {0: [4.0, 1.0, 0.5, 0.1, 0.1, 0.1], 1: [1.0] * 6}  # grid pixels: 1/8 of those of the image

    def updates(features1, features2, hidden, context, num_flow_updates, initial_flow):
        flow = torch.zeros(len(hidden), 2, *hidden.shape[2:])
        for number in range(num_flow_updates):
            flow = flow.clone()
            for index in range(len(flow)):
                flow[index, 0] += steps[index][number]
            yield hidden + number, flow

    monkeypatch.setattr(model, "updates", updates)
    monkeypatch.setattr(model.upsampler, "forward", lambda hidden, flow: 8 * F.interpolate(flow, scale_factor=8))
    estimator = FlowEstimator(model, *shapes.frames.shape[1:3])
    encoded = estimator.encode_all(shapes.frames[:3])
    pairs = list(zip(encoded[:-1], encoded[1:], strict=True))
    for tolerance, counts in ((None, [6, 6]), (0.1, [6, 6]), (1.0, [4, 6]), (5.0, [4, 6]), (8.0, [2, 2])):
        estimate = estimator.estimate_until(pairs, 6, None, tolerance)
        assert estimate.num_flow_updates == counts, tolerance
        for index, count in enumerate(counts):
            expected = sum(steps[index][:count])
            assert float(estimate.flow[index, 0].mean()) == pytest.approx(8 * expected, rel=1e-5)
            assert float(estimate.low_res_flow[index, 0].mean()) == pytest.approx(expected, rel=1e-5)


def test_memory_does_not_grow(model, shapes, monkeypatch):
    features = []  # weak references to those of every frame
    encode = model.encode_features
    monkeypatch.setattr(model, "encode_features", lambda images: remembered(encode(images), features))
    frames = (frame for _ in range(4) for frame in shapes.frames)
    alive = [
        sum(reference() is not None for reference in features)
        for _ in FlowVideo(model, frames, num_flow_updates=1, warm_num_flow_updates=1)
    ]
    assert len(alive) == 19 and len(features) == 20 and max(alive) <= 2


def remembered(tensor: torch.Tensor, references: list) -> torch.Tensor:
    references.append(weakref.ref(tensor))
    return tensor


def test_a_pair_starts_from_where_the_flow_has_moved(model, shapes, calls, monkeypatch):
    """The start is the flow of the pair before, moved along itself and shrunk; compared with a plain form of both."""
    video = FlowVideo(model, shapes.frames[:3], num_flow_updates=3, warm_num_flow_updates=2, mixed_precision="no")
    monkeypatch.setattr("flow_inference.video.SceneCutDetector.is_cut", lambda self, error: False)
    states = []
    updates = model.updates
    monkeypatch.setattr(model, "updates", lambda *args: states.append(list(updates(*args))) or states[-1])
    pairs = list(video)
    assert [(pair.warm, pair.num_flow_updates) for pair in pairs] == [(False, 3), (True, 2)]
    assert calls["updates"] == [3, 2] and calls["starts"][0] is None
    low_res_flow = states[0][-1][1][0].numpy()
    _, height, width = low_res_flow.shape
    y, x = np.mgrid[:height, :width]
    landed = np.stack([x, y]) + low_res_flow
    inside = (landed > 0).all(0) & (landed[0] < width) & (landed[1] < height)
    for py, px in ((5, 5), (10, 3), (height - 1, width - 1)):
        distance = np.where(inside, np.hypot(landed[0] - px, landed[1] - py), np.inf)
        carried = low_res_flow[:, *np.unravel_index(distance.argmin(), distance.shape)]
        length = np.linalg.norm(carried)
        expected = carried * max(0, 1 - 0.5 / length)
        np.testing.assert_allclose(calls["starts"][1][0, :, py, px].numpy(), expected, atol=1e-4)


def test_the_way_back_starts_from_the_way_there(model, shapes, calls, monkeypatch):
    monkeypatch.setattr("flow_inference.video.SceneCutDetector.is_cut", lambda self, error: False)
    pairs = list(
        FlowVideo(model, shapes.frames[:2], backward=True, num_flow_updates=3, warm_num_flow_updates=1, shrink_by=0)
    )
    assert calls["updates"] == [3, 1]
    forward = torch.nn.functional.avg_pool2d(pairs[0].flow[None], 8).mean((0, 2, 3)) / 8
    torch.testing.assert_close(calls["starts"][1].mean((0, 2, 3)), -forward, atol=0.5, rtol=0.5)


def test_a_jump_is_estimated_again_and_ends_the_scene(model, shapes, calls, monkeypatch):
    errors = iter([3.0, 60.0, 3.0, 60.0, 58.0, 3.0])
    monkeypatch.setattr("flow_inference.video.photometric_error", lambda *_: next(errors))
    pairs = list(FlowVideo(model, shapes.frames, num_flow_updates=2, warm_num_flow_updates=1))
    # Pair 1 was badly started only; pair 2 is a cut, so that pair 3 starts from zero.
    assert calls["updates"] == [2, 1, 2, 1, 2, 2]
    assert [pair.cut for pair in pairs] == [False, False, True, False]
    assert [pair.warm for pair in pairs] == [False, False, False, False]
    assert [pair.num_flow_updates for pair in pairs] == [2, 2, 2, 2]


def test_a_jump_is_measured_by_its_scene():
    detector = SceneCutDetector()
    assert detector.is_cut(41) and not detector.is_cut(39)  # of a first pair
    detector.update(2)
    assert detector.is_cut(13) and not detector.is_cut(11)
    for _ in range(30):
        detector.update(10)
    assert detector.is_cut(31) and not detector.is_cut(29)
    detector.update(30)  # an outlier raises what is usual a little
    assert not detector.is_cut(41) and detector.is_cut(43)
    detector.reset()
    assert not detector.is_cut(39)


def test_photometric_error_is_what_flow_does_not_explain():
    thumbnail1 = torch.rand(1, 3, 20, 30) * 255
    thumbnail2 = thumbnail1.roll(3, dims=3) + 7
    flow = torch.zeros(1, 2, 20, 30)
    flow[:, 0] = 3
    assert photometric_error(thumbnail1, thumbnail2, flow) == pytest.approx(7, abs=0.01)
    assert photometric_error(thumbnail1, thumbnail2, 0 * flow) > 40
    assert photometric_error(thumbnail1, thumbnail2, 100 * flow) == float("inf")


def test_a_new_scene_is_measured_anew(model, shapes, monkeypatch):
    """An error of 30 is a jump in a calm scene, and none for the first pair of the next."""
    errors = iter([3.0, 60.0, 60.0, 30.0, 31.0])
    monkeypatch.setattr("flow_inference.video.photometric_error", lambda *_: next(errors))
    pairs = list(FlowVideo(model, shapes.frames, num_flow_updates=2, warm_num_flow_updates=1))
    assert [(pair.cut, pair.warm) for pair in pairs] == [(False, False), (True, False), (False, False), (False, True)]
    errors = iter([3.0, 30.0, 5.0, 3.0, 3.0])
    pairs = list(FlowVideo(model, shapes.frames, num_flow_updates=2, warm_num_flow_updates=1))
    assert [(pair.cut, pair.warm) for pair in pairs] == [(False, False), (False, False), (False, True), (False, True)]


def test_slow_drift_and_fades_are_not_duplicates_for_ever(model):
    """Each frame is nearly a copy of the one before it, and the last none of the first."""
    texture = moving_shapes(1, 144, 256 + 16, [(0, 0)]).frames[0]
    drifting = [
        cv2.warpAffine(texture, np.float32([[1, 0, -0.06 * i], [0, 1, 0]]), (256, 144), flags=cv2.INTER_CUBIC)
        for i in range(12)
    ]
    fading = [(texture[:, :256] * 0.992**i).astype(np.uint8) for i in range(12)]
    for frames in (drifting, fading):
        assert is_duplicate(frames[0], frames[1]) and not is_duplicate(frames[0], frames[-1])
        duplicates = [pair.duplicate for pair in FlowVideo(model, frames, num_flow_updates=1, warm_num_flow_updates=1)]
        assert any(duplicates) and not all(duplicates)


def test_a_generator_may_use_one_buffer_for_all_frames(model, shapes):
    def frames():
        buffer = np.empty_like(shapes.frames[0])
        for frame in shapes.frames:
            buffer[:] = frame
            yield buffer

    options = {"num_flow_updates": 1, "warm_num_flow_updates": 1}
    expected = list(FlowVideo(model, shapes.frames, **options))
    for pair, other in zip(FlowVideo(model, frames(), **options), expected, strict=True):
        assert torch.equal(pair.flow, other.flow) and np.array_equal(pair.frame1, other.frame1) and not pair.duplicate


@pytest.mark.slow
def test_cuts_and_motion_on_real_weights(sample_weights):
    """Two scenes of fast motion: the cut is found, and nothing else is taken for one; warm flow is as good as cold."""
    model = load_raft(sample_weights / "raft-small.pth").eval()
    scenes = [moving_shapes(3, 160, 224, [(6, 2), (-9, 4)], seed=seed) for seed in (1, 2)]
    frames = np.concatenate([scene.frames for scene in scenes])
    flow_gt = np.concatenate([scenes[0].flow, np.zeros_like(scenes[0].flow[:1]), scenes[1].flow])

    def errors(**options):
        pairs = list(FlowVideo(model, frames, **options))
        assert [pair.cut for pair in pairs] == [False, False, True, False, False]
        lengths = [np.linalg.norm(pair.flow.permute(1, 2, 0) - flow_gt[pair.index], axis=-1) for pair in pairs]
        return [np.median(length) for length in lengths], [pair.warm for pair in pairs]

    warm, started = errors()
    cold, _ = errors(warm_start=False)
    assert started == [False, True, False, False, True]
    for index in (0, 1, 3, 4):
        assert warm[index] < 1.1 * cold[index] + 0.05 < 1


def test_duplicate_frames_have_no_flow_and_keep_the_motion(model, shapes, calls):
    on_twos = np.repeat(shapes.frames[:4], 2, axis=0)
    pairs = list(FlowVideo(model, on_twos, num_flow_updates=3, warm_num_flow_updates=2, backward=True))
    assert [pair.duplicate for pair in pairs] == [True, False] * 3 + [True]
    for pair in pairs[::2]:
        assert not pair.flow.any() and not pair.backward_flow.any() and not pair.occluded.any()
        assert pair.num_flow_updates == 0 and not pair.consistency_error.any()
    # Without the copies, the flow is the same.
    alone = list(FlowVideo(model, shapes.frames[:4], num_flow_updates=3, warm_num_flow_updates=2))
    for pair, expected in zip(pairs[1::2], alone, strict=True):
        torch.testing.assert_close(pair.flow, expected.flow)
    assert calls["features"] == 4 + 4
    assert not any(pair.duplicate for pair in FlowVideo(model, on_twos, num_flow_updates=1, duplicate_tolerance=None))


def test_compressed_copies_are_duplicates_and_slow_motion_is_not(tmp_path):
    frames = moving_shapes(3, 144, 256, [(1, 0), (-1, 1)]).frames
    with VideoWriter(tmp_path / "copies.mp4", 24) as video:
        for frame in frames.repeat(3, axis=0):
            video.write(frame)
    decoded = list(VideoReader(tmp_path / "copies.mp4"))
    duplicates = [is_duplicate(*pair) for pair in zip(decoded[:-1], decoded[1:], strict=True)]
    assert duplicates == [True, True, False] * 2 + [True, True]
    noise = np.random.default_rng(0).normal(0, 1, (2, 144, 256, 3))
    noisy = [(frames[0] + each).round().clip(0, 255).astype(np.uint8) for each in noise]
    assert (
        is_duplicate(*noisy)
        and not is_duplicate(*noisy, tolerance=0)
        and is_duplicate(noisy[0], noisy[0], tolerance=0)
    )
    flat = [(100 + each).round().clip(0, 255).astype(np.uint8) for each in noise]  # no slope that would explain it
    assert is_duplicate(*flat) and not is_duplicate(flat[0], flat[1] + 3)
    shifted = cv2.warpAffine(frames[0], np.float32([[1, 0, 0.3], [0, 1, 0]]), (256, 144), flags=cv2.INTER_CUBIC)
    assert not is_duplicate(frames[0], shifted)
    blinking = frames[0].copy()
    blinking[40:52, 60:72] = 255 - blinking[40:52, 60:72]
    assert not is_duplicate(frames[0], blinking)


def test_frames_come_from_anywhere(model, shapes, tmp_path):
    frames = shapes.frames[:3]
    for number, frame in zip((1, 2, 10), frames, strict=True):
        PIL.Image.fromarray(frame).save(tmp_path / f"frame_{number}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    with VideoWriter(tmp_path / "video.mkv", 24, crf=0) as video:
        for frame in frames:
            video.write(frame)
    options = {"num_flow_updates": 2, "warm_num_flow_updates": 1}
    expected = [pair.flow for pair in FlowVideo(model, list(frames), **options)]
    assert len(expected) == 2
    sources = {
        "generator": (frame for frame in frames),
        "images": [PIL.Image.fromarray(frame) for frame in frames],
        "folder": str(tmp_path),
        "paths": sorted(tmp_path.glob("*.png"), key=lambda path: len(path.name)),
    }
    for source in sources.values():
        for pair, flow in zip(FlowVideo(model, source, **options), expected, strict=True):
            assert torch.equal(pair.flow, flow)
    assert len(list(FlowVideo(model, tmp_path / "video.mkv", **options))) == 2


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (
            [np.zeros((130, 130, 3), np.uint8), np.zeros((130, 131, 3), np.uint8)],
            "frame 2 is 131 x 130, the first 130",
        ),
        ([np.full((130, 130, 3), -1, np.float32)], "frame 1: float frames must be in 0..1 or 0..255"),
        ([None], "frame 1 must be a path, .* or a tensor; got NoneType"),
        ("nowhere.mp4", "nowhere.mp4"),
    ],
)
def test_bad_frames_are_named(model, frames, message):
    with pytest.raises((ValueError, OSError), match=message):
        list(FlowVideo(model, frames))


def test_all_of_a_frame_of_one_color_counts_as_occluded(model):
    """There is nothing in it that could be matched, whatever the model makes of it."""
    flat, textured = np.full((130, 140, 3), (10, 200, 30), np.uint8), moving_shapes(1, 130, 140, [(0, 0)]).frames[0]
    for frames, expected in (([flat, flat + 9], True), ([flat, textured], True), ([textured, textured + 9], False)):
        (pair,) = FlowVideo(model, frames, num_flow_updates=1, backward=True)
        assert pair.flat == expected
        if expected:
            assert pair.occluded.all() and pair.consistency_error.isinf().all()
    (pair,) = FlowVideo(model, [flat, flat], num_flow_updates=1, backward=True)
    assert pair.duplicate and not pair.flow.any() and not pair.occluded.any()  # it is known that nothing has moved


def test_bad_settings_are_named(model):
    for options, message in (
        ({"num_flow_updates": 0}, "num_flow_updates must be at least 1; got 0"),
        ({"warm_num_flow_updates": 0}, "warm_num_flow_updates must be at least 1"),
        ({"shrink_by": -1}, "shrink_by must be at least 0"),
        ({"duplicate_tolerance": -0.1}, "duplicate_tolerance must be at least 0"),
        ({"max_side": 56}, "max_side must be at least 64; got 56"),
        ({"min_side": 0}, "min_side must be at least 1; got 0"),
        (
            {"intensity_range": (5, 5)},
            r"intensity_range must be two numbers \(low, high\), low below high; got \(5, 5\)",
        ),
        ({"mixed_precision": "fp16"}, "fp16 needs a GPU"),
        ({"mixed_precision": "fp8"}, "must be one of no, bf16, fp16"),
    ):
        with pytest.raises(ValueError, match=message):
            FlowVideo(model, [], **options)
    assert list(FlowVideo(model, [])) == []
    with pytest.raises(ValueError, match="eval"):
        FlowVideo(RaftForOpticalFlow(tiny_config()).train(), [])


def test_bf16_is_taken_where_it_is_quick_and_nobody_has_chosen(model, monkeypatch):
    def chosen(quick: bool, **options):
        monkeypatch.setattr("flow_inference.video.computes_bf16_quickly", lambda device: quick)
        return FlowVideo(model, [], **options).mixed_precision

    assert chosen(True) == "bf16" and chosen(False) is None
    assert FlowVideo(model, ["frame1.png", "frame2.png"]).mixed_precision is None  # no video, and so as pair by pair
    assert chosen(True, warm_start=False) is None and chosen(True, mixed_precision="no") == "no"
    with torch.autocast("cpu", torch.bfloat16):
        assert chosen(True) is None
    with autocast(torch.device("cpu"), "bf16"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert isinstance(flow_inference.devices.computes_bf16_quickly(torch.device("cpu")), bool)
