"""predict_flow.py on files: two images, a folder, a video."""

import dataclasses

import cv2
import numpy as np
import pytest
import torch
from conftest import SHARED
from moving_shapes import moving_shapes
from PIL import Image
from test_modeling_raft import tiny_config

import predict_flow
from flow_data.flow_io import FLOW_SUFFIXES, read_flow
from flow_data.formats import limits
from flow_data.visualize import draw_flow
from flow_inference import FlowVideo, frame_sources
from flow_inference.outputs import FlowVideoWriter
from flow_inference.video import VideoFlow
from flow_inference.video_files import VideoReader, VideoWriter
from modeling_raft import RaftForOpticalFlow, RaftImageProcessor

HEIGHT, WIDTH = 131, 154  # no multiples of 8


@pytest.fixture
def model(tmp_path) -> RaftForOpticalFlow:
    torch.manual_seed(0)
    model = RaftForOpticalFlow(tiny_config()).eval()
    model.update_block.flow_head[2].weight.data *= 30  # flow of several pixels
    model.save_pretrained(tmp_path / "model")
    return model


@pytest.fixture
def job(tmp_path, model):
    """Arguments for a pair, and the flow that must come out."""
    frames = np.random.default_rng(0).integers(0, 256, (2, HEIGHT, WIDTH, 3), dtype=np.uint8)
    for name, frame in zip(("a.png", "b.png"), frames, strict=True):
        Image.fromarray(frame).save(tmp_path / name)
    processor = RaftImageProcessor()
    with torch.no_grad():
        outputs = model(**processor(list(frames), return_tensors="pt"), num_flow_updates=2)
    flow = processor.post_process_optical_flow(outputs, [(HEIGHT, WIDTH)])[0]["flow"].permute(1, 2, 0).numpy()
    arguments = ["--model", tmp_path / "model", tmp_path / "a.png", tmp_path / "b.png", "--num_flow_updates", 2]
    return tmp_path, [str(argument) for argument in arguments], flow


@pytest.fixture
def clip(tmp_path, model):
    """A folder of frames and a video of them, motion of two scenes with a duplicate frame; and the arguments."""
    frames = moving_shapes(3, HEIGHT, WIDTH, [(2, 1), (-4, 2)]).frames
    frames = frames[[0, 1, 1, 2]]
    (tmp_path / "frames").mkdir()
    for number, frame in enumerate(frames, start=8):
        Image.fromarray(frame).save(tmp_path / "frames" / f"f{number}.png")  # f8, f9, f10: not in order of letters
    with VideoWriter(tmp_path / "clip.mp4", 25) as video:
        for frame in frames:
            video.write(frame)
    arguments = f"--model {tmp_path / 'model'} --num_flow_updates 3 --warm_num_flow_updates 2 --mixed_precision no"
    return tmp_path, frames, arguments.split()


@pytest.mark.parametrize(("name", "flags", "tolerance"), [
    ("out.flo", [], 0), ("deep/er/out.npy", [], 0), ("out.pfm", [], 0), ("out.png", ["--format", "kitti"], 1 / 128),
])  # fmt: skip
def test_flow_files_hold_the_models_flow(job, name, flags, tolerance):
    folder, arguments, expected = job
    predict_flow.main([*arguments, "--output", str(folder / name), *flags])
    flow, valid = read_flow(folder / name)
    assert valid.all()
    np.testing.assert_allclose(flow, expected, atol=tolerance + 1e-4)


def test_a_png_is_a_color_image(job, capsys):
    folder, arguments, expected = job
    predict_flow.main([*arguments, "--output", str(folder / "out.png")])
    image = np.asarray(Image.open(folder / "out.png")).astype(int)
    assert np.abs(image - draw_flow(torch.from_numpy(expected).permute(2, 0, 1))).max() <= 1  # rounding
    length = np.linalg.norm(expected, axis=-1)
    assert f"1 pair, mean length {length.mean():.2f} px, longest {length.max():.2f} px" in capsys.readouterr().out


@pytest.mark.slow
def test_backward_and_occlusion_lie_beside_the_flow(job):
    folder, arguments, _ = job
    predict_flow.main([*arguments, "--output", str(folder / "out.flo"), "--backward", "--occlusion"])
    swapped = [*arguments[:2], arguments[3], arguments[2], *arguments[4:]]
    predict_flow.main([*swapped, "--output", str(folder / "swapped.flo")])
    backward, expected = (read_flow(folder / name)[0] for name in ("out_backward.flo", "swapped.flo"))
    np.testing.assert_allclose(backward, expected, atol=1e-3)
    mask = np.asarray(Image.open(folder / "out_occlusion.png"))
    assert mask.shape == (HEIGHT, WIDTH) and set(np.unique(mask)) <= {0, 255}
    predict_flow.main([*arguments, "--output", str(folder / "only.flo"), "--occlusion"])
    assert np.array_equal(np.asarray(Image.open(folder / "only_occlusion.png")), mask)
    assert not (folder / "only_backward.flo").exists()


@pytest.mark.parametrize(
    ("format", "suffix"), [(None, ".flo"), ("npy", ".npy"), ("kitti", ".png"), ("color", ".png"), ("colour", ".png")]
)
def test_a_folder_of_frames_gives_a_folder_of_flow(clip, model, format, suffix, capsys):
    folder, frames, arguments = clip
    flags = [] if format is None else ["--format", format]
    predict_flow.main([*arguments, str(folder / "frames"), "--output", str(folder / "flow"), *flags])
    assert {path.name for path in (folder / "flow").iterdir()} == {f"f{number}{suffix}" for number in (8, 9, 10)}
    expected = list(FlowVideo(model, frames, num_flow_updates=3, warm_num_flow_updates=2, mixed_precision="no"))
    for number, pair in zip((8, 9, 10), expected, strict=True):
        path = folder / "flow" / f"f{number}{suffix}"
        if format in ("color", "colour"):
            assert np.array_equal(np.asarray(Image.open(path)), draw_flow(pair.flow))
        else:
            tolerance = 1 / 64 if format == "kitti" else 1e-5
            np.testing.assert_allclose(read_flow(path)[0], pair.flow.permute(1, 2, 0), atol=tolerance)
    assert "duplicate frames, which repeat the one before and have zero flow: 1" in capsys.readouterr().out


def test_a_video_gives_numbered_files_or_a_video_of_colors(clip):
    folder, frames, arguments = clip
    flags = ["--video", str(folder / "clip.mp4")]
    predict_flow.main([*arguments, *flags, "--output", str(folder / "flow")])
    names = [path.name for path in sorted((folder / "flow").iterdir())]
    assert names == [f"frame_00000{number}.flo" for number in (1, 2, 3)]
    output = folder / "deep" / "colors.mp4"
    predict_flow.main([*arguments, *flags, "--output", str(output), "--backward", "--occlusion"])
    readers = [VideoReader(output.with_stem(f"colors{what}")) for what in ("", "_backward", "_occlusion")]
    assert [(reader.frame_rate, reader.num_frames) for reader in readers] == [(25, 3)] * 3
    colors, _, occluded = (next(iter(reader)) for reader in readers)
    flow = torch.from_numpy(read_flow(folder / "flow" / "frame_000001.flo")[0]).permute(2, 0, 1)
    # Half the resolution of color, and what a few pixels of longer flow do to the scale.
    assert np.abs(colors.astype(int) - draw_flow(flow)).mean() < 40
    assert occluded.std(axis=2).max() < 20


def test_colors_of_a_video_do_not_flicker(clip):
    """A scale that is given is kept; the one that is not follows within a scene, and starts anew with the next."""
    folder, frames, _ = clip
    flows = [torch.full((2, HEIGHT, WIDTH), length) for length in (10.0, 1.0, 1.0)]
    flows[0][:, 0, 0] = 1000.0  # one wild pixel
    pairs = [VideoFlow(i, frames[0], frames[0], flow, 1, cut=i == 2) for i, flow in enumerate(flows)]
    scales = []
    with FlowVideoWriter(folder / "colors.mp4", 25) as output:
        for pair in pairs:
            output.write(pair)
            scales.append(output.scale)
    assert scales == pytest.approx([10 * 2**0.5, 0.95 * 10 * 2**0.5, 2**0.5], rel=1e-4)
    with FlowVideoWriter(folder / "fixed.mp4", 25, color_scale=5.0) as output:
        output.write(pairs[0])
        assert output.scale == 5.0


def test_a_video_of_flow_that_is_not_finite_is_white_there(clip):
    folder, frames, _ = clip
    flow = torch.full((2, HEIGHT, WIDTH), 3.0)
    flow[:, :40], flow[0, 40:80] = torch.nan, torch.inf
    pair = VideoFlow(0, frames[0], frames[0], flow, 1)
    with FlowVideoWriter(folder / "colors.mp4", 25) as output:
        output.write(pair)
        assert output.scale == pytest.approx(3 * 2**0.5)
        output.write(dataclasses.replace(pair, flow=torch.full_like(flow, torch.nan)))  # no scale of its own
    first, last = VideoReader(folder / "colors.mp4")
    assert first[:70].mean() > 250 > first[90:].mean() and last.mean() > 250


@pytest.fixture
def flows(monkeypatch):
    """Flow for predict_flow.py to write, instead of the model's: a list to be filled."""
    flows: list[torch.Tensor] = []
    frame = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)

    class Pairs:
        mapped_range = None

        def __init__(self, *_, **settings):
            self.backward = settings["backward"]

        def __iter__(self):
            for index, flow in enumerate(flows):
                yield VideoFlow(index, frame, frame, flow, 1, backward_flow=flow.flip(2) if self.backward else None)

    monkeypatch.setattr("flow_inference.video.FlowVideo", Pairs)
    return flows


def far(share: float, length: float = 700.0) -> torch.Tensor:
    """Flow of which a share of the rows is too long for a KITTI file."""
    flow = torch.zeros(2, HEIGHT, WIDTH)
    flow[0, : round(share * HEIGHT)] = length
    return flow


def test_flow_that_a_kitti_file_cannot_hold_is_reported(clip, flows, capsys):
    """In one line: the mean share over the files, and what to do."""
    folder, _, arguments = clip
    flows += [far(0), far(0.5), far(0.25)]
    argv = [*arguments, str(folder / "frames"), "--output", str(folder / "flow"), "--format"]
    predict_flow.main([*argv, "kitti"])
    share = np.mean([round(share * HEIGHT) / HEIGHT for share in (0, 0.5, 0.25)])
    expected = f"{100 * share:.3g} % of the pixels could not be written as KITTI PNG (range -512 to 512 px): "
    assert capsys.readouterr().out.splitlines()[-1] == f"{expected}use --format flo (a file ending in .flo)"
    assert read_flow(folder / "flow" / "f9.png")[1].mean() == pytest.approx(1 - round(0.5 * HEIGHT) / HEIGHT)
    predict_flow.main([*argv, "flo"])
    predict_flow.main([*argv, "colour"])
    assert "could not be written" not in capsys.readouterr().out


def test_flow_that_diverged_is_reported(job, flows, capsys):
    folder, arguments, _ = job
    flows.append(far(0.5, float("nan")))
    predict_flow.main([*arguments, "--output", str(folder / "out.npy"), "--backward"])
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"{100 * round(0.5 * HEIGHT) / HEIGHT:.3g} % of the pixels could not be written as .npy (finite values up to "
        "1,000,000,000 px): the estimate has diverged there; try --mixed_precision no"
    )
    predict_flow.main([*arguments, "--output", str(folder / "out.png")])
    assert "could not be written" not in capsys.readouterr().out
    assert (np.asarray(Image.open(folder / "out.png"))[: round(0.5 * HEIGHT)] == 255).all()


def test_flow_that_is_lost_altogether_is_an_error(job, flows):
    folder, arguments, _ = job
    flows.append(far(1))
    with pytest.raises(SystemExit) as error:
        predict_flow.main([*arguments, "--output", str(folder / "out.png"), "--format", "kitti"])
    assert str(error.value).endswith(
        "out.png: nothing of this flow, 0 to 700 px, can be written as KITTI PNG (range -512 to 512 px); write one of "
        f"{', '.join(suffix for suffix in FLOW_SUFFIXES if suffix != '.png')}, which hold it"
    )
    assert not list(folder.glob("*out*"))


@pytest.mark.slow
def test_shared_frames_of_large_motion(sample_weights, tmp_path):
    folder = SHARED / "field" / "range"
    if not folder.is_dir():
        pytest.skip(f"the problem inputs are not there: {folder}")
    frames = [str(folder / name) for name in ("a.jpg", "b.jpg")]
    argv = ["--model", str(sample_weights / "raft-small.pth"), *frames, "--max_side", "512", "--format", "kitti"]
    with pytest.raises(SystemExit, match=r"px, can be written as KITTI PNG .*; write one of \.flo, "):
        predict_flow.main([*argv, "--output", str(tmp_path / "out.png")])
    assert not list(tmp_path.iterdir())


def test_frames_too_large_for_a_flow_file_are_refused_before_any_flow(job, monkeypatch):
    folder, arguments, _ = job
    monkeypatch.setattr("flow_inference.video.FlowEstimator.encode", lambda *_: pytest.fail("it computes"))
    monkeypatch.setattr(limits, "MAX_PIXELS", HEIGHT * WIDTH - 1)
    with pytest.raises(SystemExit, match="size must be 1 to at most"):
        predict_flow.main([*arguments, "--output", str(folder / "out.flo")])
    with pytest.raises(ValueError, match=f"frame 1: size must be 1 to at most .*; got {WIDTH} x {HEIGHT}"):
        next(frame_sources.read_frames([np.zeros((HEIGHT, WIDTH, 3), np.uint8)]))


def test_max_side_gives_flow_in_pixels_of_the_frames(clip):
    """The same motion, whether it is estimated on large or reduced frames: a shift of 6 pixels."""
    folder, _, arguments = clip
    large = moving_shapes(2, 262, 308, [(6, 0)]).frames
    for name, frame in zip(("c.png", "d.png"), large, strict=True):
        Image.fromarray(frame).save(folder / name)
    pair = [str(folder / "c.png"), str(folder / "d.png"), "--output", str(folder / "out.flo")]
    alone = [argument for argument in arguments if argument not in ("--warm_num_flow_updates", "2")]
    predict_flow.main([*alone, *pair, "--max_side", "160"])
    flow, _ = read_flow(folder / "out.flo")
    assert flow.shape == (262, 308, 2)
    small = [cv2.resize(frame, (160, 136), interpolation=cv2.INTER_AREA) for frame in large]
    model = RaftForOpticalFlow.from_pretrained(folder / "model").eval()
    expected = next(iter(FlowVideo(model, small, num_flow_updates=3, warm_start=False))).flow.mean((1, 2)).numpy()
    np.testing.assert_allclose(flow.mean((0, 1)), expected * [308 / 160, 262 / 136], rtol=0.3, atol=0.5)


@pytest.mark.parametrize("flags", [[], ["--min_side", "128"]])
@pytest.mark.parametrize("size", [(1, 1), (20, 300), (100, 90)])
def test_small_images_have_flow(job, size, flags, capsys):
    folder, arguments, _ = job
    for name in ("a.png", "b.png"):
        Image.fromarray(np.zeros((*size, 3), np.uint8)).save(folder / name)
    predict_flow.main([*arguments, "--output", str(folder / "out.flo"), *flags])
    flow, valid = read_flow(folder / "out.flo")
    assert flow.shape == (*size, 2) and valid.all()
    assert ("better flow with --min_side" in capsys.readouterr().out) == (not flags)


def test_flat_images_are_reported(job, capsys):
    folder, arguments, _ = job
    Image.new("RGB", (WIDTH, HEIGHT), (10, 200, 30)).save(folder / "a.png")
    predict_flow.main([*arguments, "--output", str(folder / "out.flo")])
    assert "in 1 pair a frame is of one color, so nothing can be matched" in capsys.readouterr().out


def test_images_of_a_shell_pattern_are_a_sequence(clip):
    """In natural order of their names, whatever order the shell gives; and the same as the folder of them."""
    folder, _, arguments = clip
    paths = sorted(str(path) for path in (folder / "frames").iterdir())  # f10 before f8
    predict_flow.main([*arguments, *paths, "--output", str(folder / "results.v1")])
    predict_flow.main([*arguments, str(folder / "frames"), "--output", f"{folder / 'results.mp4'}/"])
    for name in ("f8.flo", "f9.flo", "f10.flo"):
        expected = (folder / "results.mp4" / name).read_bytes()
        assert (folder / "results.v1" / name).read_bytes() == expected
    assert len(list((folder / "results.v1").iterdir())) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({2: "missing.png"}, "missing.png"),
        ({2: "broken.png"}, "broken.png) cannot be decoded: it is no image"),
        ({2: "other.png"}, "must have one size"),
        ({2: "deep.png"}, "all frames must have one depth"),
        ({2: ""}, "is a folder; give the path of an image"),
        ({0: "--device=cuda:9"}, "device cuda:9 is not available; available are cpu"),
        ({0: "--device=gpu"}, "device must be cpu, cuda, cuda:1"),
        ({0: "--min_side=0"}, "min_side must be at least 1; got 0"),
        ({0: "https://example.com/a.png"}, "https://example.com/a.png is a URL; download it"),
        ({0: "--output=out.jpg"}, "--output must end in one of"),
        ({0: "--format=kitti"}, "--format kitti writes a .png"),
        ({0: "--num_flow_updates=0"}, "at least 1; got 0"),
        ({0: "--max_side=50"}, "max_side must be at least 64; got 50"),
        ({0: "--mixed_precision=fp16"}, "fp16 needs a GPU"),
        ({0: "--colour_scale=2"}, "--color_scale has no use here: no colors are written"),
        ({0: "--frame_rate=2"}, "--frame_rate has no use here: no video is written"),
        ({0: "--no_warm_start"}, "--no_warm_start has no use here: two images have no pair before them"),
        ({0: "c.mp4"}, "c.mp4 is no image; give images alone"),
        ({0: "--video=x.mp4"}, "not both"),
    ],
)
def test_mistakes_are_named(job, change, message, capsys):
    folder, arguments, _ = job
    (folder / "broken.png").write_bytes(b"no image")
    Image.fromarray(np.zeros((HEIGHT, 90, 3), np.uint8)).save(folder / "other.png")
    cv2.imwrite(str(folder / "deep.png"), np.zeros((HEIGHT, WIDTH), np.uint16))
    ((position, value),) = change.items()
    argv = [*arguments, "--output", str(folder / "out.flo")]
    if position:
        argv[position + 1] = str(folder / value)
    elif value.startswith("-"):
        argv.append(value)
    else:
        argv.insert(3, value)
    with pytest.raises(SystemExit) as error:
        predict_flow.main(argv)
    assert message in capsys.readouterr().err + str(error.value)
    assert not (folder / "out.flo").exists()


def test_mistakes_with_videos_are_named(clip, capsys):
    folder, frames, arguments = clip
    Image.fromarray(frames[0]).save(folder / "frames" / "f8.jpg")
    before = (folder / "clip.mp4").read_bytes()
    (folder / "beside").mkdir()
    for name in ("a", "a_backward", "b"):
        Image.fromarray(frames[0]).save(folder / "beside" / f"{name}.png")
    (folder / "one").mkdir()
    Image.fromarray(frames[0]).save(folder / "one" / "a.png")
    (folder / "empty").mkdir()
    (folder / "text.mp4").write_text("no video")
    for more, message in (
        (f"{folder / 'frames'} --output {folder / 'x'}", "several results would be written to f8.flo"),
        (f"{folder / 'beside'} --output {folder / 'x'} --backward", "several results would be written to a_backward"),
        (
            f"{folder / 'beside'} --output {folder / 'beside'} --format colour",
            "a.png is read, and would be overwritten",
        ),
        (f"{folder / 'one' / 'a.png'} --output {folder / 'x'}", "a.png is one image; flow takes two frames"),
        (f"{folder / 'frames'} --output {folder / 'x.flo'}", "must be a folder, or a video ending in"),
        (f"--video rtsp://camera --output {folder / 'x'}", "rtsp://camera is a URL; download it"),
        (f"{folder / 'clip.mp4'} --output {folder / 'x.mp4'}", "For a video of colors, give it with --video"),
        (f"--video {folder / 'clip.mp4'} --output {folder / 'clip.mp4'}", "clip.mp4 is read, and would be overwr"),
        (f"--video {folder / 'clip.mp4'} --output {folder / 'x.mp4'} --colour_scale -1", "must be positive and fin"),
        (f"{folder / 'one'} --output {folder / 'x'}", "flow takes two frames, and there is one"),
        (f"{folder / 'empty'} --output {folder / 'x'}", "no images in this folder"),
        (f"--video {folder / 'text.mp4'} --output {folder / 'x'}", "text.mp4"),
        (f"--video {folder / 'clip.mp4'} --output {folder / 'x.mp4'} --format flo", "a video is of colors"),
    ):
        with pytest.raises(SystemExit) as error:
            predict_flow.main([*arguments, *more.split()])
        assert message in capsys.readouterr().err + str(error.value)
        assert not (folder / "x").exists() and not list(folder.glob("x.*"))
    assert (folder / "clip.mp4").read_bytes() == before


def test_what_was_done_before_an_error_stays(clip, capsys):
    folder, frames, arguments = clip
    (folder / "frames" / "f11.png").write_bytes(b"no image")
    for output in ("flow", "flow.mp4"):
        with pytest.raises(SystemExit) as error:
            predict_flow.main([*arguments, str(folder / "frames"), "--output", str(folder / output)])
        assert "f11.png" in str(error.value) and "the flow of the 2 pairs before is in" in str(error.value)
    assert len(list((folder / "flow").iterdir())) == 2
    assert VideoReader(folder / "flow.mp4").num_frames == 2
