"""Flow of collections: where outputs go, what is skipped, what survives an interruption, who computes what."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from forked_process import free_port
from moving_shapes import moving_shapes
from PIL import Image
from test_modeling_raft import tiny_config
from tiny_run import PROJECT, environment

import predict_flow
from flow_data.flow_io import read_confidence, read_flow, write_compact_flow
from flow_data.formats.jpeg_flow import read_flow_jpeg, write_flow_jpeg
from flow_data.formats.video_hdf5 import FlowHdf5Writer, read_flow_hdf5
from flow_inference import FlowVideo, pretrained_path
from flow_inference.collection import CollectionOptions, predict_collection
from flow_inference.collection.report import CollectionReport
from flow_inference.collection.sources import choose_shard, find_sources, measure, read_list
from flow_inference.collection.state import CollectionState
from flow_inference.estimator import FlowEstimator
from flow_inference.video_files import VideoReader, VideoWriter
from modeling_raft import RaftForOpticalFlow

HEIGHT, WIDTH = 66, 74  # odd multiples of nothing
UPDATES = {"num_flow_updates": 2, "warm_num_flow_updates": 1, "mixed_precision": "no"}
SETTINGS = CollectionOptions(**UPDATES)
FLAGS = "--num_flow_updates 2 --warm_num_flow_updates 1 --mixed_precision no".split()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> RaftForOpticalFlow:
    torch.manual_seed(0)
    model = RaftForOpticalFlow(tiny_config()).eval()
    model.update_block.flow_head[2].weight.data *= 30  # flow of several pixels
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    model.folder = str(folder)
    return model


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A tree: four videos, of which one has one frame, a damaged one, and a folder of frames."""
    root = tmp_path_factory.mktemp("inputs")
    frames = moving_shapes(12, HEIGHT, WIDTH, [(2, 1), (-4, 2)]).frames
    for name, chosen in (
        ("long.mp4", frames),
        ("a/short.mkv", frames[:4]),
        ("a/b/odd.mp4", frames[3:6, :65, :71]),
        ("single.mp4", frames[:1]),
    ):
        with VideoWriter(root / name, 25) as video:
            for frame in chosen:
                video.write(frame)
    damaged = (root / "long.mp4").read_bytes()
    (root / "a" / "damaged.mp4").write_bytes(damaged[: len(damaged) // 2])
    (root / "frames").mkdir()
    for number, frame in enumerate(frames[:3], start=8):
        Image.fromarray(frame).save(root / "frames" / f"f{number}.png")
    return root


def checksums(folder: Path) -> dict[str, str]:
    """Every output by its name below the folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".flow_state" not in path.parts and path.name != "manifest.jsonl"
    }


@pytest.fixture(scope="module")
def undisturbed(model, inputs, tmp_path_factory) -> dict[str, str]:
    output = tmp_path_factory.mktemp("undisturbed")
    predict_collection(model, [inputs], output, SETTINGS)
    return checksums(output)


def run_command(*arguments: object) -> int:
    """Run predict_flow.py in this process, and return its exit code; a message counts as 1."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        predict_flow.main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0


# ---- Outputs ----


def test_outputs_mirror_the_tree_and_failures_are_reported(model, inputs, tmp_path, capsys):
    output, report = tmp_path / "flow", tmp_path / "reports" / "report.json"
    assert run_command(inputs, "--output", output, "--model", model.folder, *FLAGS, "--report", report) == 4
    assert {path.rpartition("/")[0] for path in checksums(output)} == {"long", "a/short", "a/b/odd", "frames"}
    assert sorted(path.name for path in (output / "frames").iterdir()) == ["f8.flo", "f9.flo"]
    for path, names in (
        (inputs / "a/short.mkv", [f"a/short/frame_{number:06d}" for number in (1, 2, 3)]),
        (inputs / "frames", ["frames/f8", "frames/f9"]),
    ):
        for pair, name in zip(FlowVideo(model, path, **UPDATES), names, strict=True):
            assert np.array_equal(read_flow(output / f"{name}.flo")[0], pair.flow.permute(1, 2, 0).numpy())
    content = json.loads(report.read_text())
    assert (content["sources"], content["done"], content["unfinished"], content["exit_code"]) == (6, 4, 0, 4)
    assert content["pairs"] >= 11 + 3 + 2 + 2 and content["processes"][0]["pairs_per_second"] > 0
    reasons = {failure["output"]: failure["reason"] for failure in content["failed"]}
    assert reasons.keys() == {"a/damaged", "single"} and "there is one" in reasons["single"]
    printed = capsys.readouterr().out
    assert "6 sources: 4 done, 2 failed" in printed and f"failed: {inputs}/a/damaged.mp4: " in printed
    manifest = {row["output"]: row for row in map(json.loads, (output / "manifest.jsonl").read_text().splitlines())}
    assert manifest.keys() == {"long", "a/short", "a/b/odd", "frames", "a/damaged", "single"}
    assert (manifest["long"]["status"], manifest["long"]["pairs"], manifest["long"]["frames"]) == ("done", 11, 12)
    assert manifest["long"]["settings"]["num_flow_updates"] == 2
    assert len(manifest["long"]["settings"]["weights_sha256"]) == 64
    assert manifest["single"]["status"] == "failed"
    assert not list((output / ".flow_state" / "partial").iterdir())


def test_what_is_complete_is_skipped_and_what_is_missing_is_not(model, inputs, tmp_path, undisturbed, monkeypatch):
    report = predict_collection(model, [inputs], tmp_path, SETTINGS)
    assert checksums(tmp_path) == undisturbed and (report.done, report.skipped) == (4, 0)
    estimate, calls = FlowEstimator.estimate_until, []
    monkeypatch.setattr(FlowEstimator, "estimate_until", lambda *args: calls.append(1) or estimate(*args))
    report = predict_collection(model, [inputs / "long.mp4", inputs / "frames"], tmp_path, SETTINGS)
    assert not calls and (report.done, report.skipped, report.pairs) == (2, 2, 0)
    for path in (tmp_path / "frames").iterdir():
        path.unlink()
    (tmp_path / "frames").rmdir()
    predict_collection(model, [inputs / "long.mp4", inputs / "frames"], tmp_path, SETTINGS)
    assert len(calls) in (2, 4) and checksums(tmp_path) == undisturbed  # 2 pairs, perhaps twice, after a cut
    (tmp_path / "long" / "frame_000003.flo").unlink()
    assert predict_collection(model, [inputs / "long.mp4", inputs / "frames"], tmp_path, SETTINGS).skipped == 1
    assert checksums(tmp_path) == undisturbed


def test_a_source_that_has_changed_is_computed_again(model, inputs, tmp_path):
    source = tmp_path / "clip.mkv"
    source.write_bytes((inputs / "a/short.mkv").read_bytes())
    predict_collection(model, [source], tmp_path / "flow", SETTINGS)
    before = checksums(tmp_path / "flow")
    source.write_bytes((inputs / "long.mp4").read_bytes())
    report = predict_collection(model, [source], tmp_path / "flow", SETTINGS)
    assert report.skipped == 0 and len(checksums(tmp_path / "flow")) == 11 > len(before)


@pytest.mark.parametrize("split_frames", [None, 3])
def test_nothing_is_left_of_a_longer_source(model, inputs, tmp_path, split_frames):
    """A video and a folder of frames are replaced by shorter ones, then by what cannot be read."""
    options = CollectionOptions(**UPDATES, occlusion=True, split_frames=split_frames)
    folder, output = tmp_path / "in", tmp_path / "flow"
    shutil.copytree(inputs / "frames", folder / "frames")
    shutil.copy(inputs / "long.mp4", folder / "clip.mp4")
    predict_collection(model, [folder], output, options)
    (output / "clip" / "mine.txt").write_text("a file of the user")
    assert len(checksums(output)) == 2 * (11 + 2) + 1
    shutil.copy(inputs / "a/b/odd.mp4", folder / "clip.mp4")
    (folder / "frames" / "f9.png").unlink()
    predict_collection(model, [folder], output, options)
    predict_collection(model, [folder], tmp_path / "fresh", options)
    assert checksums(output).keys() - checksums(tmp_path / "fresh").keys() == {"clip/mine.txt"}
    assert checksums(tmp_path / "fresh").items() <= checksums(output).items()
    (folder / "clip.mp4").write_bytes(b"no video")
    report = predict_collection(model, [folder], output, options)
    assert len(report.failed) == 1 and {path for path in checksums(output) if "clip" in path} == {"clip/mine.txt"}


def test_an_output_that_is_blocked_fails_alone(model, inputs, tmp_path):
    (tmp_path / "long").write_text("a file where a folder is to be")
    report = predict_collection(model, [inputs / "long.mp4", inputs / "frames"], tmp_path, SETTINGS)
    assert report.done == 1 and [failure["output"] for failure in report.failed] == ["long"]
    assert "long" in report.failed[0]["reason"] and (tmp_path / "long").is_file()
    assert len((tmp_path / "manifest.jsonl").read_text().splitlines()) == 2
    assert not list((tmp_path / ".flow_state/partial").iterdir())


def test_other_settings_and_other_weights_are_refused(model, inputs, tmp_path):
    predict_collection(model, [inputs / "a/short.mkv"], tmp_path, SETTINGS)
    before = checksums(tmp_path)
    other = CollectionOptions(**UPDATES | {"num_flow_updates": 3})
    with pytest.raises(ValueError, match="has flow with num_flow_updates 2, and this run has 3"):
        predict_collection(model, [inputs / "a/short.mkv"], tmp_path, other)
    torch.manual_seed(1)
    with pytest.raises(ValueError, match="has flow with weights_sha256"):
        predict_collection(RaftForOpticalFlow(tiny_config()).eval(), [inputs / "long.mp4"], tmp_path, SETTINGS)
    assert checksums(tmp_path) == before


def test_mistakes_are_errors_before_anything_is_computed(model, inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(FlowEstimator, "encode_all", lambda *_: pytest.fail("it computes"))
    twin = tmp_path / "twin"
    (twin / "deep").mkdir(parents=True)
    for name in ("clip.mp4", "clip.avi", "deep/clip.mp4"):
        (twin / name).write_bytes((inputs / "long.mp4").read_bytes())
    (tmp_path / "names.csv").write_text(f"input,output\n{inputs}/long.mp4,../out\n")
    (tmp_path / "list.xls").write_text("")
    for name, text in (
        ("state.txt", f"{inputs}/long.mp4\t.flow_state/x"),
        ("manifest.txt", f"{inputs}/long.mp4\tmanifest.jsonl"),
        ("folder.txt", f"{inputs}\tname"),
        ("empty.csv", "input,output\n,name\n"),
        ("semicolon.csv", f"input;output\n{inputs}/long.mp4;name\n"),
        ("nested.txt", f"{inputs}/long.mp4\ta\n{inputs}/a/short.mkv\ta.h5/b\n"),
    ):
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.txt").write_bytes("é.mp4".encode("latin-1"))
    (tmp_path / "notes.odt").touch()
    for arguments, message in (
        ([twin], "clip.avi and .*clip.mp4 would both be written to 'clip'"),
        ([twin / "clip.mp4", twin / "deep" / "clip.mp4"], "would both be written to 'clip'"),
        ([inputs / "frames", inputs / "long.mp4", "--output", inputs / "frames" / "out"], "written into what is read"),
        ([twin, "--output", twin], "--output must not be the folder that is searched"),
        ([twin / "clip.mp4", "--output", tmp_path / "a.flo"], "--output must be a folder"),
        (["--list", tmp_path / "names.csv"], "must be a path below the output folder; got '../out'"),
        (["--list", tmp_path / "list.xls"], "must end in .txt, .csv or .jsonl"),
        (["--list", tmp_path / "state.txt"], "must be none that the program itself uses; got '.flow_state/x'"),
        (["--list", tmp_path / "manifest.txt"], "must be none that the program itself uses; got 'manifest.jsonl'"),
        (["--list", tmp_path / "folder.txt"], "is a pattern or a folder that is searched"),
        (["--list", tmp_path / "empty.csv"], "empty.csv: every row must have a path in column 1; got ',name'"),
        (["--list", tmp_path / "semicolon.csv"], "columns must be separated by commas; got 'input;output'"),
        (["--list", tmp_path / "latin.txt"], "latin.txt: a list must be UTF-8 text"),
        (["--list", tmp_path / "nested.txt", "--format", "h5"], "b.h5 would be written into the file .*a.h5"),
        ([twin / "clip.mp4", tmp_path / "notes.odt"], "notes.odt is no video, no image and no folder; leave it out"),
        ([twin, tmp_path / "notes.odt", "--format", "h5"], "notes.odt is no video, no image and no folder"),
        ([twin / "clip.mp4", "--report", tmp_path], "--report must be a file; .* is a folder"),
        ([inputs / "long.mp4", "--shard", "3/2"], "--shard must be I/N with I from 1 to N; got 3/2"),
        ([inputs / "long.mp4", "--bound", "5"], "--bound has no use here: it is for --format jpg"),
        ([inputs / "long.mp4", "--batch_size", "0"], "--batch_size must be a whole number, at least 1, or auto"),
        ([*(inputs / "frames").glob("f[89].png"), "--shard", "1/2"], "--shard has no use here: two images"),
        ([*(inputs / "frames").glob("*.png"), "--shard", "1/2"], "is an image; for .* give the folder of frames"),
        ([*(inputs / "frames").glob("f[89].png"), "--format", "h5"], "is an image; for .* give the folder of frames"),
        ([inputs / "long.mp4", "--format", "h5", "--occlusion"], "with format h5 use confidence"),
    ):  # fmt: skip
        argv = [str(argument) for argument in arguments]
        argv += [] if "--output" in argv else ["--output", str(tmp_path / "out")]
        with pytest.raises(SystemExit) as error:
            predict_flow.main([*argv, "--model", model.folder])
        shown = f"{error.value} {capsys.readouterr().err}"
        assert re.search(message, shown), shown
    assert not (tmp_path / "out").exists() and not (inputs / "frames" / "out").exists()


def test_inputs_are_found_in_folders_patterns_and_lists(inputs, tmp_path):
    def names(*texts: object, lists: tuple[Path, ...] = ()) -> list[str]:
        return [source.name for source in find_sources([str(text) for text in texts], [str(path) for path in lists])]

    everything = ["a/b/odd", "a/damaged", "a/short", "frames", "long", "single"]
    assert names(inputs) == everything
    assert names(inputs / "a", inputs / "long.mp4") == ["b/odd", "damaged", "long", "short"]
    assert names(inputs / "**" / "*.mp4") == ["a/b/odd", "a/damaged", "long", "single"]
    assert names(inputs / "frames") == ["."] and names(inputs / "frames", inputs / "long.mp4") == ["frames", "long"]
    assert names(tmp_path / "missing.mp4") == ["missing"]  # reported at the end, like others that cannot be read
    (inputs / ".hidden").mkdir(exist_ok=True)
    (inputs / ".hidden" / "x.mp4").write_bytes(b"")
    os.symlink(inputs, tmp_path / "circle")
    assert names(inputs) == everything == names(tmp_path / "circle")
    for name, text in (
        ("jobs.txt", f"# comment\n{inputs}/long.mp4\tnew/name\n\n{inputs}/a/short.mkv\n"),
        ("jobs.csv", f"input,output\n{inputs}/long.mp4,new/name\n{inputs}/a/short.mkv,\n"),
        ("bare.csv", f"{inputs}/long.mp4,new/name\n{inputs}/a/short.mkv\n"),
        (
            "jobs.jsonl",
            json.dumps({"input": f"{inputs}/long.mp4", "output": "new/name"}) + f'\n"{inputs}/a/short.mkv"',
        ),
    ):
        (tmp_path / name).write_text(text)
        assert names(lists=(tmp_path / name,)) == ["new/name", "short"], name
    (inputs.parent / "beside.txt").write_text(f"{inputs.name}/long.mp4\n")  # relative to the list
    assert Path(read_list(inputs.parent / "beside.txt")[0][0]).is_file()
    with pytest.raises(ValueError, match="no videos and no folders of frames there"):
        find_sources([str(tmp_path / "none*.mp4")])
    assert names(inputs / "long.mp4", inputs / "long.mp4") == ["long"]


def test_videos_and_other_files_are_not_taken_for_frames(inputs, tmp_path):
    """Pillow knows the suffixes of some; results of another run are no input either."""
    for name in ("a.gif", "b.gif", "c.mpg", "d.mpeg", "notes.h5", "more.h5", "plan.eps", "old.eps"):
        (tmp_path / name).touch()
    shutil.copytree(inputs / "frames", tmp_path / "results" / "clip")
    assert [source.name for source in find_sources([str(tmp_path)])] == ["a", "b", "c", "d", "results/clip"]
    (tmp_path / "results" / ".flow_state").mkdir()
    assert [source.name for source in find_sources([str(tmp_path)])] == ["a", "b", "c", "d"]


def test_shards_are_disjoint_complete_and_even(inputs):
    sources = [measure(source) for source in find_sources([str(inputs)])]
    for count in (1, 2, 4, 9):
        shares = [choose_shard(sources, index, count) for index in range(1, count + 1)]
        names = [source.name for share in shares for source in share]
        assert sorted(names) == sorted(source.name for source in sources)
        assert [choose_shard(sources, index, count) for index in range(count)] == [shares[-1], *shares[:-1]]
    loads = [sum(source.num_bytes for source in choose_shard(sources, index, 2)) for index in (1, 2)]
    assert max(loads) - min(loads) <= max(source.num_bytes for source in sources)


# ---- Formats ----


@pytest.mark.parametrize("format", ["npz16", "h5", "jpg", "flo", "npz"])
def test_formats_are_read_back_within_their_stated_loss(model, inputs, tmp_path, format):
    options = CollectionOptions(**UPDATES, format=format, confidence=True, backward=True)
    predict_collection(model, [inputs / "a/short.mkv"], tmp_path, options)
    pairs = list(FlowVideo(model, inputs / "a/short.mkv", **UPDATES, backward=True))
    stored = {} if format != "h5" else {name: list(read_flow_hdf5(tmp_path / "short.h5", name))
                                        for name in ("flow", "backward_flow")}  # fmt: skip
    for index, pair in enumerate(pairs):
        expected, backward = (flow.permute(1, 2, 0).numpy() for flow in (pair.flow, pair.backward_flow))
        if format == "h5":
            (flow, valid), (back, _) = stored["flow"][index], stored["backward_flow"][index]
            assert valid.all()
        elif format == "jpg":
            flow, back = (
                read_flow_jpeg(tmp_path / f"short/flow_x_{index + 1:05d}{what}.jpg") for what in ("", "_backward")
            )
        else:
            suffix = ".flo" if format == "flo" else ".npz"
            flow, back = (
                read_flow(tmp_path / f"short/frame_{index + 1:06d}{what}{suffix}")[0] for what in ("", "_backward")
            )
        for received, wanted in ((flow, expected), (back, backward)):
            if format == "jpg":
                error = np.abs(received - wanted.clip(-20, 20))
                assert error.max() < 8 and error.mean() < 0.5  # of flow as rough as that of random weights
            elif format in ("h5", "npz16"):
                assert (np.abs(received - wanted) <= np.maximum(np.abs(wanted) / 2048, 1e-6)).all()
            else:
                assert np.array_equal(received, wanted)
        if format != "h5":
            beside = {"npz16": "frame_00000{}.npz", "npz": "frame_00000{}.npz", "flo": "frame_00000{}_confidence.npz",
                      "jpg": "flow_x_0000{}_confidence.npz"}[format]  # fmt: skip
            error, occluded = read_confidence(tmp_path / "short" / beside.format(index + 1))
            assert np.array_equal(occluded, pair.occluded.numpy())
            finite = np.isfinite(error)
            assert np.array_equal(finite, pair.consistency_error.isfinite().numpy())
            np.testing.assert_allclose(error[finite], pair.consistency_error.numpy()[finite], rtol=1e-3, atol=1e-6)


def test_compact_formats_lose_what_is_stated(tmp_path):
    """On smooth flow of up to 30 px; what a format cannot hold is clipped or unknown, and its share reported."""
    y, x = np.mgrid[:120, :160].astype(np.float32)
    flow = np.stack([30 * np.sin(x / 40) * np.cos(y / 50), 10 * np.cos(x / 30) - y / 20], axis=-1)
    clipped = (np.abs(flow) > 20).any(-1)
    assert write_flow_jpeg(tmp_path / "flow_x_1.jpg", tmp_path / "flow_y_1.jpg", flow) == pytest.approx(clipped.mean())
    error = np.abs(read_flow_jpeg(tmp_path / "flow_x_1.jpg") - flow.clip(-20, 20))
    assert error[~clipped].max() < 0.5 and error.mean() < 0.08
    assert write_flow_jpeg(tmp_path / "flow_x_1.jpg", tmp_path / "flow_y_1.jpg", flow, bound=40) == 0
    assert np.abs(read_flow_jpeg(tmp_path / "flow_x_1.jpg", bound=40) - flow).max() < 1
    assert write_compact_flow(tmp_path / "a.npz", flow) == 0
    assert np.abs(read_flow(tmp_path / "a.npz")[0] - flow).max() <= 2**-7  # of values between 16 and 32
    flow[:12] = [70_000, np.nan]
    assert write_compact_flow(tmp_path / "a.npz", flow) == pytest.approx(0.1)
    with FlowHdf5Writer(tmp_path / "a.h5") as file:
        assert file.append({"flow": flow}) == pytest.approx(0.1)
    for again, valid in (read_flow(tmp_path / "a.npz"), next(read_flow_hdf5(tmp_path / "a.h5"))):
        assert not valid[:12].any() and valid[12:].all() and np.isfinite(again).all()


def test_intensities_are_mapped_once(model, inputs, tmp_path):
    options = CollectionOptions(**UPDATES, intensity_range=(40, 200))
    predict_collection(model, [inputs / "frames", inputs / "a/short.mkv"], tmp_path, options)
    expected = {"frames": ("frames/f8", "frames/f9"), "a/short.mkv": ("short/frame_000001",)}
    for path, names in expected.items():
        for pair, name in zip(
            FlowVideo(model, inputs / path, **UPDATES, intensity_range=(40, 200)), names, strict=False
        ):
            assert np.array_equal(read_flow(tmp_path / f"{name}.flo")[0], pair.flow.permute(1, 2, 0).numpy())
    manifest = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert [row["mapped_range"] for row in manifest] == [[40, 200]] * 2


def test_an_archive_says_what_it_holds(model, inputs, tmp_path):
    import h5py

    options = CollectionOptions(**UPDATES, format="h5", confidence=True)
    predict_collection(model, [inputs / "frames", inputs / "a/short.mkv"], tmp_path, options, model_name="tiny")
    with h5py.File(tmp_path / "short.h5") as file:
        assert file["flow"].shape == (3, HEIGHT, WIDTH, 2) and file["flow"].dtype == np.float16
        assert file["flow"].chunks == (1, HEIGHT, WIDTH, 2) and file["flow"].attrs["units"] == "pixels"
        assert file["consistency_error"].shape == file["occluded"].shape == (3, HEIGHT, WIDTH)
        assert file.attrs["model"] == "tiny" and json.loads(file.attrs["settings"])["num_flow_updates"] == 2
        assert "x right, y down" in file["flow"].attrs["description"] and "backward_flow" not in file
    with pytest.raises(ValueError, match=r"must have a dataset 'backward_flow' \(N, H, W, 2\)"):
        next(read_flow_hdf5(tmp_path / "short.h5", "backward_flow"))
    assert sorted(path.name for path in tmp_path.glob("*.h5")) == ["frames.h5", "short.h5"]


# ---- Interruptions, processes, pieces ----


@pytest.mark.slow
@pytest.mark.parametrize("format", ["flo", "h5"])
def test_a_run_that_is_stopped_goes_on_to_the_same_outputs(model, inputs, tmp_path, format):
    options = CollectionOptions(**UPDATES, format=format)
    predict_collection(model, [inputs], tmp_path / "whole", options)
    for asked in (2, 9, 14):
        calls = iter(range(1000))
        report = predict_collection(
            model, [inputs], tmp_path / "flow", options, stop=lambda calls=calls, asked=asked: next(calls) >= asked
        )
        assert not list((tmp_path / "flow/.flow_state/partial").iterdir())
        assert not list((tmp_path / "flow/.flow_state/claims").iterdir())
    assert report.stopped and report.unfinished
    report = predict_collection(model, [inputs], tmp_path / "flow", options)
    assert not report.stopped and checksums(tmp_path / "flow") == checksums(tmp_path / "whole")


def test_a_full_disk_ends_the_run(model, inputs, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flow_inference.outputs.write_flow", full)
    with pytest.raises(OSError, match="No space left"):
        predict_collection(model, [inputs / "long.mp4", inputs / "frames"], tmp_path, SETTINGS)
    assert not list((tmp_path / ".flow_state/records").iterdir()) and not checksums(tmp_path)
    assert not list((tmp_path / ".flow_state/claims").iterdir()) and (tmp_path / "manifest.jsonl").exists()


def test_a_run_reports_its_own_pairs(model, inputs, tmp_path):
    """Another run in the same folder, started while this one has its first source, computes the other ones."""
    claims = tmp_path / "flow/.flow_state/claims"
    reports: list[CollectionReport] = []
    once = threading.Lock()  # this run asks in two threads whether to stop
    other = threading.Thread(
        target=lambda: reports.append(predict_collection(model, [inputs], tmp_path / "flow", SETTINGS))
    )

    def stop() -> bool:
        if any(claims.iterdir()) and once.acquire(blocking=False):
            other.start()
            while len(list(claims.iterdir())) < 2:
                time.sleep(0.01)
        return False

    reports.append(predict_collection(model, [inputs], tmp_path / "flow", SETTINGS, stop=stop))
    other.join()
    whole = predict_collection(model, [inputs], tmp_path / "whole", SETTINGS)
    assert reports[0].done == reports[1].done == whole.done == reports[0].skipped + reports[1].skipped
    assert all(report.pairs > 0 for report in reports) and sum(report.pairs for report in reports) == whole.pairs


def test_fail_fast_stops_at_the_first_failure(model, inputs, tmp_path):
    report = predict_collection(model, [inputs], tmp_path, SETTINGS, fail_fast=True)
    assert report.failed and report.stopped
    report = predict_collection(model, [inputs], tmp_path, SETTINGS)  # failures are tried again
    assert len(report.failed) == 2 and report.done == 4


def test_what_cannot_be_opened_fails_before_anything_is_computed(model, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(FlowEstimator, "encode_all", lambda *_: pytest.fail("it computes"))
    (tmp_path / "empty.mp4").touch()
    sources = [inputs / "long.mp4", tmp_path / "empty.mp4"]
    report = predict_collection(model, sources, tmp_path / "flow", SETTINGS, fail_fast=True)
    assert [failure["output"] for failure in report.failed] == ["empty"] and report.stopped


@pytest.mark.slow
@pytest.mark.parametrize("format", ["flo", "h5"])
def test_pieces_without_a_warm_start_equal_the_whole(model, inputs, tmp_path, format):
    options = {"num_flow_updates": 2, "mixed_precision": "no", "warm_start": False, "format": format}
    predict_collection(model, [inputs / "long.mp4"], tmp_path / "whole", CollectionOptions(**options))
    predict_collection(model, [inputs / "long.mp4"], tmp_path / "cut", CollectionOptions(**options, split_frames=3))
    if format == "flo":
        assert checksums(tmp_path / "cut") == checksums(tmp_path / "whole")
    else:
        whole, cut = (list(read_flow_hdf5(tmp_path / name / "long.h5")) for name in ("whole", "cut"))
        assert len(whole) == len(cut) == 11
        assert all(np.array_equal(a[0], b[0]) for a, b in zip(whole, cut, strict=True))
    manifest = [json.loads(line) for line in (tmp_path / "cut/manifest.jsonl").read_text().splitlines()]
    assert [(row["output"], row["pairs"]) for row in manifest] == [("long", 11)]
    assert not list((tmp_path / "cut/.flow_state/pieces").iterdir())


@pytest.mark.slow
def test_pieces_with_a_warm_start_are_close_to_the_whole(tmp_path):
    """With trained weights, since the flow of random ones never comes to rest."""
    model = RaftForOpticalFlow.from_pretrained(pretrained_path()).eval()
    with VideoWriter(tmp_path / "clip.mp4", 25) as video:
        for frame in moving_shapes(13, 128, 136, [(3, 1), (-4, 2)]).frames:
            video.write(frame)
    options = {"mixed_precision": "no", "format": "npy"}
    predict_collection(model, [tmp_path / "clip.mp4"], tmp_path / "whole", CollectionOptions(**options))
    cut = CollectionOptions(**options, split_frames=10)
    predict_collection(model, [tmp_path / "clip.mp4"], tmp_path / "cut", cut)
    assert len(checksums(tmp_path / "whole")) == 12
    for name in checksums(tmp_path / "whole"):
        np.testing.assert_allclose(np.load(tmp_path / "whole" / name), np.load(tmp_path / "cut" / name), atol=0.02)


def test_frames_from_an_index_are_those_of_the_whole(inputs):
    frames = list(VideoReader(inputs / "long.mp4"))
    for start in (0, 5, 11, 12):
        rest = list(VideoReader(inputs / "long.mp4").frames_from(start)) if start < 12 else []
        assert len(rest) == 12 - start and all(map(np.array_equal, rest, frames[start:]))


def test_batches_equal_pairs_and_shrink_when_memory_runs_out(model, inputs, tmp_path, monkeypatch):
    options = {"num_flow_updates": 2, "mixed_precision": "no", "warm_start": False, "backward": True}
    predict_collection(model, [inputs / "long.mp4"], tmp_path / "one", CollectionOptions(**options))
    estimate, sizes = FlowEstimator.estimate_until, []

    def limited(self, pairs, *args):
        sizes.append(len(pairs))
        if len(pairs) > 4:
            raise MemoryError
        return estimate(self, pairs, *args)

    monkeypatch.setattr(FlowEstimator, "estimate_until", limited)
    predict_collection(
        model, [inputs / "long.mp4"], tmp_path / "batch", CollectionOptions(**options, batch_size="auto")
    )
    assert sizes[0] > 4 and set(sizes[-6:]) == {4, 3}  # 11 pairs: 4, 4, 3, each in both directions
    assert checksums(tmp_path / "one").keys() == checksums(tmp_path / "batch").keys()
    for name in checksums(tmp_path / "one"):
        flows = [read_flow(tmp_path / kind / name)[0] for kind in ("one", "batch")]
        np.testing.assert_allclose(*flows, atol=1e-3)


def test_claims_of_the_dead_are_taken_and_those_of_the_living_are_not(tmp_path):
    ours, theirs = CollectionState(tmp_path, "ours"), CollectionState(tmp_path, "theirs")
    with ours.alive({}), theirs.alive({}):
        assert ours.claim("a") and not theirs.claim("a") and not ours.claim("a")
        ours.release("a")
        assert theirs.claim("a")
    path = tmp_path / ".flow_state" / "workers" / f"{theirs.worker}.json"
    worker = json.loads(path.read_text())
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with ours.alive({}):
        assert not ours.claim("a")  # the process of `theirs` is this one, and lives
        path.write_text(json.dumps(worker | {"pid": ended.pid}))
        assert ours.claim("a")
        ours.release("a")
        path.write_text(json.dumps(worker | {"born": "1"}))  # the number was given to another process
        assert theirs.claim("a") and ours.claim("a")
        ours.release("a")
        path.write_text(json.dumps(worker | {"host": f"not-{socket.gethostname()}"}))
        assert theirs.claim("a") and not ours.claim("a")  # of another machine, and has just shown itself
        os.utime(path, (0, 0))
        assert ours.claim("a")


def test_files_that_are_being_written_count_neither_as_processes_nor_as_sources(tmp_path):
    state = CollectionState(tmp_path, "run")
    state.write_record("a", {"output": "a", "status": "done"})
    with state.alive({"rank": 0, "pairs": 1}):
        for name in ("workers", "records"):
            (complete,) = (state.folder / name).glob("*.json")
            (state.folder / name / ".1234.tmp.json").write_bytes(complete.read_bytes())
        assert len(state.workers()) == 1
        state.write_manifest([])
        assert len((tmp_path / "manifest.jsonl").read_text().splitlines()) == 1
        state.clean()
        assert (state.folder / "records" / ".1234.tmp.json").exists()  # its process may be writing it
        an_hour_ago = time.time() - 3600
        os.utime(state.folder / "records" / ".1234.tmp.json", (an_hour_ago, an_hour_ago))
        state.clean()
        assert not (state.folder / "records" / ".1234.tmp.json").exists()


@pytest.mark.slow
def test_processes_that_are_killed_and_started_again_leave_the_same_outputs(model, inputs, tmp_path, undisturbed):
    """Two processes by accelerate launch: SIGKILL to all of them and to the launcher, then once more to the end."""
    output = tmp_path / "flow"
    argv = [PROJECT / "predict_flow.py", inputs, "--output", output, "--model", model.folder, *FLAGS]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]

    def start() -> subprocess.Popen:
        command = [*launch, "--main_process_port", free_port(), *argv, "--report", tmp_path / "report.json"]
        return subprocess.Popen(
            [str(argument) for argument in command],
            env=environment(),
            cwd=PROJECT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    process = start()
    try:
        wait_for(lambda: list(output.glob(".flow_state/partial/*")), process)
    finally:
        for victim in (*psutil.Process(process.pid).children(recursive=True), process):  # workers have own sessions
            victim.kill()
        process.communicate()
    process = start()
    printed, _ = process.communicate(timeout=300)
    assert process.returncode != 0  # the launcher's own code, as two sources have failed
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["exit_code"], report["done"], len(report["failed"])) == (4, 4, 2), printed
    # The second one may start after the first has computed all.
    assert {0} <= {process["rank"] for process in report["processes"]} <= {0, 1}
    assert checksums(output) == undisturbed


@pytest.mark.slow
def test_sigterm_ends_after_the_frame_and_says_how_to_go_on(model, inputs, tmp_path, undisturbed):
    output = tmp_path / "flow"
    argv = [PROJECT / "predict_flow.py", inputs, "--output", output, "--model", model.folder, *FLAGS]
    process = subprocess.Popen(
        [sys.executable, *map(str, argv)],
        env=environment(),
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: list(output.glob(".flow_state/partial/*")), process)
    process.terminate()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1 and "the same command resumes" in errors
    assert not list(output.glob(".flow_state/partial/*")) and not list(output.glob(".flow_state/claims/*"))
    assert run_command(*argv[1:]) == 4
    assert checksums(output) == undisturbed


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, a process does not learn who started it")
def test_a_process_ends_with_its_launcher(model, inputs, tmp_path):
    """`accelerate launch` with one process passes no signal on."""
    launcher = tmp_path / "accelerate.py"
    launcher.write_text("import subprocess, sys; subprocess.run(sys.argv[2:])")
    many = "--num_flow_updates 500 --mixed_precision no".split()
    argv = [PROJECT / "predict_flow.py", inputs / "long.mp4", "--output", tmp_path, "--model", model.folder, *many]
    arguments = [sys.executable, launcher, "launch", sys.executable, *argv]
    process = subprocess.Popen([str(argument) for argument in arguments], env=environment(), cwd=PROJECT)
    wait_for(lambda: list(tmp_path.glob(".flow_state/partial/*")), process)
    (child,) = psutil.Process(process.pid).children()
    process.terminate()
    process.wait(timeout=30)
    try:
        child.wait(timeout=100)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    assert not list(tmp_path.glob(".flow_state/partial/*")) and not list(tmp_path.glob("long/*"))


def wait_for(condition, process: subprocess.Popen, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the process has ended"
        assert time.monotonic() < end, "nothing has happened"
        time.sleep(0.01)
