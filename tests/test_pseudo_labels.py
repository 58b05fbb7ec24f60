"""Labels without ground truth: which frames are paired, where flow is valid, and files that a run trains on."""

import copy
import itertools
import json

import numpy as np
import pytest
import torch
from moving_shapes import moving_shapes
from PIL import Image
from test_modeling_raft import tiny_config
from tiny_run import PROJECT

from flow_data.datasets import is_sparse, load_source
from flow_data.features import to_sample
from flow_inference import footage, labels
from flow_inference.consistency import is_occluded
from flow_inference.estimator import FlowEstimator
from flow_inference.footage import Clip, find_pairs, open_clips, plan_pairs
from flow_inference.labels import NoLabelsError, estimate_labels, make_labels, read_teacher
from flow_inference.prediction import predict_pair
from flow_inference.pseudo_labels import main
from flow_inference.video_files import VideoWriter
from modeling_raft import RaftForOpticalFlow


def calm_model(seed: int) -> RaftForOpticalFlow:
    """A tiny model whose flow is short, so that its directions agree."""
    torch.manual_seed(seed)
    model = RaftForOpticalFlow(tiny_config()).eval()
    with torch.no_grad():
        for parameter in model.update_block.flow_head[2].parameters():
            parameter.mul_(0.05)
    return model


@pytest.fixture(scope="module")
def model() -> RaftForOpticalFlow:
    return calm_model(0)


@pytest.fixture(scope="module")
def video() -> np.ndarray:
    return moving_shapes(6, 136, 144, [(1, 0), (-2, 1)]).frames


@pytest.fixture
def clip_folder(tmp_path, video):
    folder = tmp_path / "clip"
    folder.mkdir()
    for number, frame in enumerate(video):
        Image.fromarray(frame).save(folder / f"{number}.png")
    return folder


def numbered_frames(values: list[int]) -> list[np.ndarray]:
    """Frames of noise, the same where the value is the same."""
    return [np.random.default_rng(value).integers(0, 256, (32, 32, 3), np.uint8) for value in values]


# ---- which pairs ----


def test_pairs_are_planned_evenly_over_all_clips_for_each_gap():
    clips = [Clip("a", [], 100, (100, 100)), Clip("b", [], 100, (100, 100)), Clip("c", [], 2, (100, 100))]
    planned = plan_pairs(clips, [1, 3], every=None, max_pairs=40, on_cpu=True)
    assert planned == sorted(set(planned)) and len(planned) == 40
    for gap in (1, 3):
        starts = [100 * pair.clip + pair.start for pair in planned if pair.gap == gap]
        assert len(starts) == 20
        steps = np.diff(starts)
        assert steps.min() >= 9 and steps.max() <= 13  # ends of clips lack partners
        assert starts[0] <= 10 and starts[-1] >= 190
    assert all(pair.start + pair.gap < clips[pair.clip].num_frames for pair in planned)


def test_a_gap_that_few_clips_have_leaves_its_share_to_the_others():
    clips = [Clip(str(i), [], 2, (10, 10)) for i in range(30)] + [Clip("long", [], 3, (10, 10))]
    planned = plan_pairs(clips, [1, 2], every=None, max_pairs=20, on_cpu=True)
    assert [pair for pair in planned if pair.gap == 2] == [(30, 0, 2)] and len(planned) == 20


def test_the_budget_of_pixels_bounds_the_number_of_pairs():
    clips = [Clip("a", [], 1000, (436, 1024))]
    planned = {on_cpu: plan_pairs(clips, [1], None, None, on_cpu) for on_cpu in (True, False)}
    assert [len(planned[on_cpu]) * 436 * 1024 <= budget for on_cpu, budget in
            ((True, footage.PIXEL_BUDGET["cpu"]), (False, footage.PIXEL_BUDGET["other"]))] == [True, True]  # fmt: skip
    assert len(planned[True]) == 13 and len(planned[False]) == 895
    assert len(plan_pairs([Clip("a", [], 1000, (4000, 6000))], [1], None, None, True)) == footage.FEWEST_PAIRS


def test_every_frame_that_is_asked_for_begins_a_pair():
    planned = plan_pairs([Clip("a", [], 20, (10, 10))], [2], every=5, max_pairs=100, on_cpu=True)
    assert [pair.start for pair in planned] == [0, 5, 10, 15]
    for setting in ({"every": 0}, {"max_pairs": 0}, {"gaps": [0]}, {"gaps": [30]}):
        with pytest.raises(ValueError, match="must be"):
            plan_pairs(
                [Clip("a", [], 20, (10, 10))], **{"gaps": [1], "every": 1, "max_pairs": 5, "on_cpu": True} | setting
            )


@pytest.mark.parametrize("values", [[0, 1, 2, 3, 4, 5], [0, 0, 1, 1, 1, 2, 3, 3], [7] * 5, [0, 1, 0, 1, 2, 2]])
@pytest.mark.parametrize("gaps", [[1], [1, 2], [3]])
def test_pairs_of_a_stream_are_those_of_its_different_frames(values, gaps):
    frames = numbered_frames(values)
    found = {
        (start, end, gap) for start, end, gap, *_ in find_pairs(iter(frames), {i: gaps for i in range(len(values))})
    }
    different = [next(group)[0] for _, group in itertools.groupby(enumerate(values), key=lambda item: item[1])]
    expected = {(different[i], different[i + gap], gap) for gap in gaps for i in range(len(different) - gap)}
    assert found == expected


def test_a_stream_is_read_no_further_than_needed_and_not_kept():
    read = []

    def stream():
        for number, frame in enumerate(numbered_frames(list(range(50)))):
            read.append(number)
            yield frame

    pairs = list(find_pairs(stream(), {3: [1, 2], 10: [1]}))
    assert [pair[:3] for pair in pairs] == [(3, 4, 1), (3, 5, 2), (10, 11, 1)] and read[-1] == 11


def test_inputs_are_clips(tmp_path, clip_folder, video):
    frames = sorted(str(path) for path in clip_folder.iterdir())
    scenes = tmp_path / "scenes"
    for scene in ("s2", "s10"):
        (scenes / scene).mkdir(parents=True)
        for name in ("1.png", "2.png"):
            (scenes / scene / name).write_bytes((clip_folder / name).read_bytes())
    (tmp_path / "list.txt").write_text("\n".join(["clip/0.png", "clip/3.png", frames[5]]))
    (tmp_path / "table.csv").write_text("image1,image2\nclip/0.png,clip/1.png\nclip/4.png,clip/5.png\n")
    inputs = [str(tmp_path / name) for name in ("clip", "scenes", "list.txt", "table.csv")]
    clips = open_clips([*inputs, frames[2], frames[3]])
    assert [clip.num_frames for clip in clips] == [2, 6, 2, 2, 3, 2, 2]
    assert [clip.name for clip in clips] == ["1_2", "2_clip", "3_s2", "4_s10", "5_list", "6_0", "7_4"]
    assert all(clip.size == video.shape[1:3] for clip in clips)


def test_a_folder_of_clips_may_hold_other_things(tmp_path, clip_folder, video):
    """Videos are clips; hidden folders and folders without images are passed over."""
    for name in (".cache", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "readme.txt").touch()
    (tmp_path / ".cache" / "thumbnail.png").write_bytes((clip_folder / "0.png").read_bytes())
    with VideoWriter(tmp_path / "b.mp4", 24) as writer:
        for frame in video[:3]:
            writer.write(frame)
    assert [(clip.name, clip.num_frames) for clip in open_clips([str(tmp_path)])] == [("1_b", 3), ("2_clip", 6)]


@pytest.mark.parametrize(
    ("name", "message"),
    [("none.mp4", "none.mp4"), ("empty", "no images"), ("one", "two frames"), ("https://x.org/a.mp4", "is a URL")],
)
def test_inputs_without_frames_are_named(tmp_path, clip_folder, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "0.png").write_bytes((clip_folder / "0.png").read_bytes())
    with pytest.raises((ValueError, OSError), match=message):
        open_clips([name if ":" in name else str(tmp_path / name)])


# ---- labels ----


def test_flow_is_valid_where_both_directions_agree():
    """The formula, pixel by pixel, on random flow of about the tolerance."""
    rng = np.random.default_rng(0)
    flow = torch.from_numpy(rng.normal(0, 3, (1, 2, 12, 16)).round()).float()  # whole pixels: nothing is interpolated
    back = torch.from_numpy(rng.normal(0, 3, (1, 2, 12, 16)).round()).float()
    valid = ~is_occluded(flow, back, labels.ABSOLUTE_TOLERANCE)[0]
    expected = torch.zeros(12, 16, dtype=torch.bool)
    for y, x in itertools.product(range(12), range(16)):
        f = flow[0, :, y, x]
        to_x, to_y = int(x + f[0]), int(y + f[1])
        if 0 <= to_x < 16 and 0 <= to_y < 12:
            b = back[0, :, to_y, to_x]
            expected[y, x] = (f + b).square().sum() <= 0.01 * (f.square().sum() + b.square().sum()) + 4
    assert torch.equal(valid, expected) and 0.05 < expected.float().mean() < 0.95


def test_labels_are_the_flow_of_both_directions_from_zero(model, video):
    estimator = FlowEstimator(model, *video.shape[1:3])
    flow, valid, _ = estimate_labels(estimator, video[0], video[1], 5)
    for direction, (first, second) in enumerate(((0, 1), (1, 0))):
        expected = predict_pair(model, video[first], video[second], 5)
        torch.testing.assert_close(flow[direction], expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(valid[direction], ~is_occluded(flow[[direction]], flow[[1 - direction]], 4.0)[0])


def test_labels_are_a_source_of_dense_pairs(model, clip_folder, tmp_path):
    made = make_labels(model, "teacher.pth", open_clips([str(clip_folder)]), tmp_path / "out", num_flow_updates=2)
    assert len(made.pairs) == 5 + 4 and "9 pairs of frames" in made.description
    rows = load_source("pairs", tmp_path / "out")
    assert len(rows) == 18 and not is_sparse("pairs", rows) and read_teacher(tmp_path / "out") == "teacher.pth"
    by_id = {row["id"]: row for row in rows}
    for pair in made.pairs:
        flow, valid = pair.read_labels()
        frames = pair.read_frames()
        for direction, path in enumerate(pair.flows):
            sample = to_sample(by_id[path.stem])
            np.testing.assert_array_equal(sample.image1, frames[direction])
            np.testing.assert_array_equal(sample.image2, frames[1 - direction])
            np.testing.assert_array_equal(sample.valid, valid[direction].numpy())
            np.testing.assert_array_equal(
                sample.flow[sample.valid], flow[direction].permute(1, 2, 0).numpy()[sample.valid]
            )


@pytest.mark.slow
def test_an_interrupted_labelling_resumes_and_repeats_nothing(model, clip_folder, tmp_path, monkeypatch):
    clips = open_clips([str(clip_folder)])
    make_labels(model, "t", clips, tmp_path / "whole", num_flow_updates=1)
    calls = []

    def counted(*args):
        if len(calls) == 4:
            calls.append("stopped")
            raise KeyboardInterrupt
        calls.append(args)
        return estimate_labels(*args)

    monkeypatch.setattr(labels, "estimate_labels", counted)
    with pytest.raises(KeyboardInterrupt):
        make_labels(model, "t", clips, tmp_path / "cut", num_flow_updates=1)
    assert not (tmp_path / "cut" / "pairs.csv").exists()
    make_labels(model, "t", clips, tmp_path / "cut", num_flow_updates=1)
    assert len(calls) == 9 + 1
    files = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file())
    assert len(files) == 2 + 6 + 2 * 18
    for path in files:
        assert (tmp_path / "cut" / path).read_bytes() == (tmp_path / "whole" / path).read_bytes(), path
    changed = copy.deepcopy(model)
    next(changed.parameters()).data += 1
    for arguments, match in (
        ((model, "other", clips), "another model:"),
        ((changed, "t", clips), "another state of the model's weights"),
        ((model, "t", clips, 3), r"another choice of pairs \(--every, --gap, --max_pairs\)"),
    ):
        every = {"every": arguments[3]} if len(arguments) > 3 else {}
        with pytest.raises(ValueError, match=match):
            make_labels(*arguments[:3], tmp_path / "cut", num_flow_updates=1, **every)
    frame = sorted(clip_folder.iterdir())[-1]  # not the first one, of the same size
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*clips[0].size, 3), np.uint8)).save(frame)
    with pytest.raises(ValueError, match="another set of frames"):
        make_labels(model, "t", open_clips([str(clip_folder)]), tmp_path / "cut", num_flow_updates=1)


def test_duplicates_cuts_and_flat_frames_are_skipped(model, video, tmp_path, monkeypatch):
    folder = tmp_path / "clip"
    folder.mkdir()
    flat = np.full_like(video[0], 90)
    for number, frame in enumerate([video[0], video[0], video[1], 255 - video[1], flat]):
        Image.fromarray(frame).save(folder / f"{number}.png")
    agreeing = torch.zeros(2, 2, *video.shape[1:3]), torch.ones(2, *video.shape[1:3], dtype=torch.bool)
    monkeypatch.setattr(labels, "estimate_labels", lambda estimator, a, b, updates: (
        *agreeing, float(np.abs(a.astype(float) - b).mean())))  # fmt: skip
    made = make_labels(model, "t", open_clips([str(folder)]), tmp_path / "out", gaps=[1], max_pairs=10)
    record = json.loads((tmp_path / "out" / "labels.json").read_text())["pairs"]
    assert [(pair["start"], pair["end"], pair["why"]) for pair in record] == [
        (0, 2, ""),
        (2, 3, "cut"),
        (3, 4, "flat"),
    ]
    assert (
        len(made.pairs) == 1
        and "1 across a scene cut" in made.description
        and "1 with a frame of one color" in made.description
    )


def test_footage_without_a_label_is_refused(model, clip_folder, tmp_path, monkeypatch):
    nowhere = torch.zeros(2, 2, 136, 144), torch.zeros(2, 136, 144, dtype=torch.bool), 1.0
    monkeypatch.setattr(labels, "estimate_labels", lambda *args: nowhere)
    with pytest.raises(NoLabelsError, match="agree in less than a tenth"):
        make_labels(model, "t", open_clips([str(clip_folder)]), tmp_path / "out")
    assert not (tmp_path / "out" / "pairs.csv").exists()


@pytest.mark.slow
def test_the_command_labels_a_pair_with_the_shipped_weights(tmp_path, capsys):
    frames = [str(PROJECT / f"examples/frames/frame_000{number}.png") for number in (1, 2)]
    main([*frames, "--output", str(tmp_path / "out"), "--num_flow_updates", "2"])
    assert "1 pair of frames" in capsys.readouterr().out
    assert len(load_source("pairs", tmp_path / "out")) == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="error: .*no images and no videos"):
        main([str(tmp_path / "empty"), "--output", str(tmp_path / "other")])
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="is a file; --output must be a folder"):
        main([*frames, "--output", str(tmp_path / "file")])
