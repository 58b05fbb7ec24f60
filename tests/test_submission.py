"""Submissions: names and formats of the servers, and flow that is what the model predicts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from forked_process import run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from test_modeling_raft import tiny_config
from tiny_run import PROJECT, environment

import evaluate_flow
from flow_data.datasets import SUBMISSIONS
from flow_data.flow_io import read_flow
from flow_inference.prediction import predict_pair
from flow_inference.submission import find_missing, write_result
from modeling_raft import RaftForOpticalFlow

SIZE = 66, 75  # h, w: both are padded


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("submission") / "model"
    RaftForOpticalFlow(tiny_config()).save_pretrained(folder)
    return folder


def frame(path: Path, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list(str(path.name).encode()))
    Image.fromarray(rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)).convert(mode).save(path)


def make_tests(root: Path) -> None:
    """Test splits, without ground truth: two pairs of Sintel in one scene, one in another; two of KITTI; Spring."""
    for render_pass in ("clean", "final"):
        for name in (
            "cave_3/frame_0001",
            "cave_3/frame_0002",
            "cave_3/frame_0003",
            "wall/frame_0010",
            "wall/frame_0011",
        ):
            frame(root / f"sintel_{render_pass}/test/{render_pass}/{name}.png")
    for name in ("000000_10", "000000_11", "000012_10", "000012_11"):
        frame(root / f"kitti_2012/testing/image_0/{name}.png", "L")
        frame(root / f"kitti_2015/testing/image_2/{name}.png")
    for camera in ("left", "right"):
        for number in (1, 2):
            frame(root / f"spring/test/0003/frame_{camera}/frame_{camera}_{number:04d}.png")


# file of the submission -> first and second frame below the data set's folder, flow updates and padding
SINTEL = {
    f"{{0}}/{scene}/frame{number:04d}.flo": tuple(
        f"test/{{0}}/{scene}/frame_{n:04d}.png" for n in (number, number + 1)
    )
    for scene, number in (("cave_3", 1), ("cave_3", 2), ("wall", 10))
}
KITTI = {
    f"{{0}}{number}_10.png": tuple(f"testing/{{1}}/{number}_{n}.png" for n in (10, 11))
    for number in ("000000", "000012")
}
SPRING = {
    f"0003/flow_{way}_{camera}/flow_{way}_{camera}_{first:04d}.flo5": tuple(
        f"test/0003/frame_{camera}/frame_{camera}_{n:04d}.png" for n in (first, second)
    )
    for camera in ("left", "right")
    for way, first, second in (("FW", 1, 2), ("BW", 2, 1))
}


def filled(files: dict, *words: str) -> dict:
    return {key.format(*words): tuple(path.format(*words) for path in paths) for key, paths in files.items()}


EXPECTED = {
    "sintel_clean": (filled(SINTEL, "clean"), 32, "split"),
    "sintel_final": (filled(SINTEL, "final"), 32, "split"),
    "kitti_2012": (filled(KITTI, "", "image_0"), 24, "bottom"),
    "kitti_2015": (filled(KITTI, "flow/", "image_2"), 24, "bottom"),
    "spring": (SPRING, 32, "split"),
}


def run(*arguments: object) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    evaluate_flow.main([word for argument in arguments for word in str(argument).split()])


def written(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def quick(monkeypatch) -> list[int]:
    """Let the model do two updates; how many it was asked for."""
    forward, asked = RaftForOpticalFlow.forward, []

    def two_updates(model, pixel_values, num_flow_updates=None, **kwargs):
        asked.append(num_flow_updates)
        return forward(model, pixel_values, num_flow_updates=2, **kwargs)

    monkeypatch.setattr(RaftForOpticalFlow, "forward", two_updates)
    return asked


@pytest.mark.slow
@pytest.mark.parametrize("name", SUBMISSIONS)
def test_files_are_named_as_published_and_hold_the_prediction(name, model_dir, tmp_path, capsys, quick):
    make_tests(tmp_path)
    files, updates, padding = EXPECTED[name]
    out = tmp_path / "out"
    (out / next(iter(files))).parent.mkdir(parents=True)
    (out / next(iter(files))).write_text("of an earlier run")
    run(f"--model {model_dir} --dataset {name} --data_dir {tmp_path / name} --submission {out} --batch_size 2")
    assert set(quick) == {updates}
    assert written(out) == set(files)
    model = RaftForOpticalFlow.from_pretrained(model_dir).eval()
    for file, frames in files.items():
        images = [np.array(Image.open(tmp_path / name / path).convert("RGB")) for path in frames]
        expected = predict_pair(model, *images, padding=padding).permute(1, 2, 0).numpy()
        flow, valid = read_flow(out / file)
        assert valid.all()
        np.testing.assert_allclose(flow, expected, atol=1 / 128 + 1e-4 if name.startswith("kitti") else 1e-4)
    printed = capsys.readouterr().out
    assert f"{len(files)} files in {out}, {updates} updates, float32" in printed
    assert "incomplete:" in printed  # the real ones are larger
    if name.startswith("kitti"):
        assert "missing are 000001, 000002, 000003, ..." in printed
    if name.startswith("sintel"):
        assert f"run sintel_{'final' if name == 'sintel_clean' else 'clean'}" in printed


def test_warm_start_begins_anew_with_every_scene(model_dir, tmp_path, quick):
    make_tests(tmp_path)
    common = f"--model {model_dir} --dataset sintel_clean --data_dir {tmp_path / 'sintel_clean'}"
    run(common, f"--submission {tmp_path / 'cold'}")
    run(common, f"--submission {tmp_path / 'warm'} --warm_start")
    differ = {
        file: bool((read_flow(tmp_path / "cold" / file)[0] != read_flow(tmp_path / "warm" / file)[0]).any())
        for file in written(tmp_path / "cold")
    }
    assert differ == {
        "clean/cave_3/frame0001.flo": False, "clean/cave_3/frame0002.flo": True, "clean/wall/frame0010.flo": False
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--batch_size 2", "--warm_start"])
def test_two_processes_write_what_one_does(option, model_dir, tmp_path):
    make_tests(tmp_path)
    common = f"--model {model_dir} --dataset sintel_clean --data_dir {tmp_path / 'sintel_clean'} {option}"
    common += " --num_flow_updates 2"
    run(common, f"--submission {tmp_path / 'one'}")
    argv = [*common.split(), "--submission", str(tmp_path / "two")]
    result = run_ranks(PROJECT / "evaluate_flow.py", argv, environment(), 2)
    assert result.returncode == 0, result.stderr
    assert "3 files" in result.stdout
    assert written(tmp_path / "two") == written(tmp_path / "one")
    for file in written(tmp_path / "one"):
        one, two = (read_flow(tmp_path / folder / file)[0] for folder in ("one", "two"))
        np.testing.assert_allclose(two, one, atol=1e-4)


@settings(deadline=None, max_examples=50)
@given(flow=arrays(np.float32, (2, 3, 4), elements=st.floats(-2000, 2000, width=32)))
def test_kitti_files_have_no_unknown_pixel(flow, tmp_path_factory):
    path = tmp_path_factory.mktemp("kitti") / "000000_10.png"
    write_result(path, torch.from_numpy(flow), SUBMISSIONS["kitti_2015"])
    read, valid = read_flow(path)
    assert valid.all()
    expected = np.clip(flow, -512, 512 - 1 / 64).transpose(1, 2, 0)
    np.testing.assert_allclose(read, expected, atol=1 / 128, rtol=0)


def test_what_is_clipped_is_reported(model_dir, tmp_path, capsys, monkeypatch, quick):
    make_tests(tmp_path)
    flow = torch.zeros(2, *SIZE)
    flow[1, :, :15] = -600  # a fifth of the pixels of one pair of two
    flows = iter([flow, torch.zeros(2, *SIZE)])
    assert write_result(tmp_path / "000000_10.png", flow, SUBMISSIONS["kitti_2015"]) == pytest.approx(0.2)
    monkeypatch.setattr("flow_inference.prediction.predict_batch", lambda *_: ([next(flows)], None))
    arguments = f"--model {model_dir} --dataset kitti_2015 --data_dir {tmp_path / 'kitti_2015'}"
    run(arguments, f"--submission {tmp_path / 'out'}")
    printed = capsys.readouterr().out
    assert (
        "warning: 10 % of the pixels could not be written as KITTI PNG (range -512 to 512 px) and were cl" in printed
    )
    monkeypatch.undo()
    run(arguments, f"--submission {tmp_path / 'out'} --num_flow_updates 2")
    assert "warning" not in capsys.readouterr().out


def test_other_formats_are_not_clipped(tmp_path):
    flow = torch.full((2, 3, 4), 700.5)
    assert not write_result(tmp_path / "frame0001.flo", flow, SUBMISSIONS["sintel_clean"])
    np.testing.assert_array_equal(read_flow(tmp_path / "frame0001.flo")[0], 700.5)


def test_flow_that_is_not_finite_is_refused(tmp_path):
    flow = torch.zeros(2, 3, 4)
    flow[1, 2, 3] = float("nan")
    with pytest.raises(ValueError, match="frame0001.flo: the predicted flow is not finite"):
        write_result(tmp_path / "frame0001.flo", flow, SUBMISSIONS["sintel_clean"])
    assert not written(tmp_path)


def test_what_is_missing_is_said(tmp_path):
    ids = [f"{number:06d}" for number in range(200)]
    for id_ in ids:
        (tmp_path / f"flow/{id_}_10.png").parent.mkdir(exist_ok=True)
        (tmp_path / f"flow/{id_}_10.png").touch()
    assert find_missing("kitti_2015", "testing", tmp_path, ids) == []
    (problem,) = find_missing("kitti_2015", "testing", tmp_path, ids[:7] + ids[8:])
    assert "199 pairs of the 200" in problem and "missing are 000007" in problem
    (tmp_path / "flow/000009_10.png").unlink()
    (problem,) = find_missing("kitti_2015", "testing", tmp_path, ids)
    assert problem == f"1 files are not in {tmp_path}: flow/000009_10.png"
    (problem,) = find_missing("kitti_2015", "training", tmp_path, ids[10:])
    assert "the server wants those of testing" in problem


@pytest.mark.parametrize("name", ["middlebury", "flying_chairs", "hd1k", "pairs"])
def test_a_data_set_without_a_server_is_refused(name, model_dir, tmp_path):
    with pytest.raises(SystemExit) as error:
        run(f"--model {model_dir} --dataset {name} --data_dir {tmp_path} --submission {tmp_path / 'out'}")
    assert name in str(error.value) and ", ".join(SUBMISSIONS) in str(error.value)


def test_a_folder_that_cannot_be_written_is_known_before_anything_is_predicted(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(RaftForOpticalFlow, "forward", lambda *args, **kwargs: pytest.fail("it predicts"))
    make_tests(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "out/clean").mkdir(parents=True)
    (tmp_path / "out/clean/wall").write_text("")
    for folder in ("file", "file/below", "out"):
        with pytest.raises(SystemExit) as error:
            run(
                f"--model {model_dir} --dataset sintel_clean --data_dir {tmp_path / 'sintel_clean'} "
                f"--submission {tmp_path / folder}"
            )
        assert f"--submission: cannot write into {tmp_path / folder}" in str(error.value)


def test_frames_of_two_sizes_are_named(model_dir, tmp_path):
    make_tests(tmp_path)
    Image.new("RGB", (80, 64)).save(tmp_path / "sintel_clean/test/clean/wall/frame_0011.png")
    with pytest.raises(SystemExit) as error:
        run(
            f"--model {model_dir} --dataset sintel_clean --data_dir {tmp_path / 'sintel_clean'} "
            f"--submission {tmp_path / 'out'}"
        )
    assert "wall/frame_0010: frames must have one size (h x w); got 66 x 75 and 64 x 80" in str(error.value)
