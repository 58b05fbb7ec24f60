"""train_flow.py from the outside: complete runs, in real processes."""

import json
import math
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import TINY_RUN, flags, log_lines, train

from benchmarks import bench_step
from flow_data.flow_io import write_flow
from flow_training.objectives import OBJECTIVES
from flow_training.run_log import read_log
from modeling_raft import RaftForOpticalFlow, RaftImageProcessor
from train_flow import main

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    """A complete run with everything on: validation, checkpoints, TensorBoard, noise, accumulation."""
    output_dir = tmp_path_factory.mktemp("runs") / "finished"
    result = train(
        output_dir,
        "--add_noise",
        validation_sets="synthetic",
        validation_steps="2",
        checkpointing_steps="1",
        checkpoints_total_limit="2",
        report_to="tensorboard",
        per_device_train_batch_size="2",
    )
    assert result.returncode == 0, result.stderr
    return output_dir


def test_a_run_writes_all_documented_files(finished_run):
    names = {path.name for path in finished_run.iterdir()}
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "README.md", "run_config.yaml"} <= names
    assert {name for name in names if "checkpoint" in name} == {"checkpoint-3", "checkpoint-4"}
    assert any((finished_run / "logs").rglob("events.out.tfevents.*"))
    model = RaftForOpticalFlow.from_pretrained(finished_run)
    assert (model.config.corr_radius, model.config.loss_gamma, model.config.num_flow_updates) == (2, 0.8, 2)
    RaftImageProcessor.from_pretrained(finished_run)


def test_log_has_the_documented_metrics(finished_run):
    lines = read_log(finished_run / "train_log.jsonl")
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == [1, 2, 3, 4]
    for line in training:
        expected = "step loss learning_rate grad_norm epe 1px 3px 5px pairs_per_second".split()
        assert list(line) == expected
        assert all(math.isfinite(value) for value in line.values())
        assert 0 <= line["1px"] <= line["3px"] <= line["5px"] <= 1
    assert training[0]["learning_rate"] == pytest.approx(3e-4 / 25)
    validation = [line for line in lines if "validation/synthetic/epe" in line]
    assert [line["step"] for line in validation] == [2, 4]


def test_tensorboard_has_metrics_and_images(finished_run):
    events = EventAccumulator(str(finished_run / "logs"), size_guidance={"images": 0})
    events.Reload()
    assert {"loss", "epe", "validation/synthetic/epe"} <= set(events.Tags()["scalars"])
    images = events.Images("validation/synthetic")
    assert [image.step for image in images] == [2, 4]
    assert (images[0].height, images[0].width) == (72, 4 * 88 + 3 * 4)  # frame, ground truth, prediction, error


@pytest.mark.parametrize(("processes", "per_device"), [(1, "1"), (2, "2")])
def test_learning_rates_are_the_one_cycle_schedules(tmp_path, processes, per_device):
    """Of each optimizer step, by the published formula, with accumulation and with two processes."""
    steps, peak = 7, 3e-4
    result = train(tmp_path / "run", processes=processes, per_device_train_batch_size=per_device, max_train_steps="7")
    assert result.returncode == 0, result.stderr
    total = steps + 100
    warm_up, end = 0.05 * total - 1, total - 1
    expected = []
    for step in range(steps):
        if step <= warm_up:
            expected.append(peak / 25 + (peak - peak / 25) * step / warm_up)
        else:
            expected.append(peak + (peak / 25 / 1e4 - peak) * (step - warm_up) / (end - warm_up))
    assert [line["learning_rate"] for line in log_lines(tmp_path / "run")] == pytest.approx(expected, rel=1e-12)


def test_run_config_repeats_the_run(finished_run, tmp_path):
    settings = yaml.safe_load((finished_run / "run_config.yaml").read_text())
    assert settings["learning_rate"] == 3e-4 and settings["per_device_train_batch_size"] == 2
    assert settings["mixed_precision"] == "no" and "hub_token" not in settings
    path = str(finished_run / "run_config.yaml")
    settings = dict.fromkeys(TINY_RUN)
    result = train(tmp_path / "again", "--config", path, **settings)
    assert result.returncode == 0, result.stderr
    assert log_lines(tmp_path / "again") == log_lines(finished_run)


def test_model_card_describes_the_run(finished_run):
    card = (finished_run / "README.md").read_text()
    assert "{{" not in card and "{%" not in card
    for part in ("- optical-flow", "model-index", "random weights", "Synthetic pairs", "| learning_rate | 0.0003 |"):
        assert part in card
    last = [line for line in read_log(finished_run / "train_log.jsonl") if "validation/synthetic/epe" in line][-1]
    assert f"{last['validation/synthetic/epe']:.3f}" in card


def test_resumed_equals_uninterrupted(finished_run, tmp_path):
    """Stopped between checkpoints, resumed with other workers: the same log and the same weights, bit by bit."""
    output_dir = tmp_path / "run"
    shared = {
        "validation_sets": "synthetic",
        "validation_steps": "2",
        "per_device_train_batch_size": "2",
        "checkpointing_steps": "3",
    }
    whole = train(tmp_path / "whole", "--add_noise", max_train_steps="5", logging_steps="2", **shared)
    assert whole.returncode == 0, whole.stderr
    os.rename(tmp_path / "whole" / "checkpoint-3", tmp_path / "kept")
    output_dir.mkdir()
    os.rename(tmp_path / "kept", output_dir / "checkpoint-3")
    log = (tmp_path / "whole" / "train_log.jsonl").read_text()
    (output_dir / "train_log.jsonl").write_text(log + '{"step": 6, "lo')  # later lines, and a torn one
    resume = ["--add_noise", "--resume_from_checkpoint", "latest"]
    for changed in ({"dataloader_num_workers": "2"}, {"per_device_train_batch_size": "4"}):
        copy = tmp_path / next(iter(changed))
        shutil.copytree(output_dir, copy)
        resumed = train(copy, *resume, max_train_steps="5", logging_steps="2", **shared | changed)
        assert resumed.returncode == 0, resumed.stderr
        assert len(log_lines(copy)) == len(log_lines(tmp_path / "whole"))
        for ours, theirs in zip(log_lines(copy), log_lines(tmp_path / "whole"), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)  # more pairs a pass are summed in another order
    output_dir = tmp_path / "dataloader_num_workers"
    assert log_lines(output_dir) == log_lines(tmp_path / "whole")
    ours, theirs = (load_file(path / "model.safetensors") for path in (output_dir, tmp_path / "whole"))
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


def test_two_processes_do_what_one_does(finished_run, tmp_path):
    settings = {"validation_sets": "synthetic", "validation_steps": "2", "per_device_train_batch_size": "1"}
    result = train(tmp_path / "two", "--add_noise", processes=2, **settings)
    assert result.returncode == 0, result.stderr
    two, one = log_lines(tmp_path / "two"), log_lines(finished_run)
    assert len(two) == len(one) > 4
    for ours, theirs in zip(two, one, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_bf16_trains_and_is_not_float32(finished_run, tmp_path):
    result = train(tmp_path / "bf16", "--add_noise", mixed_precision="bf16", per_device_train_batch_size="2")
    assert result.returncode == 0, result.stderr
    ours, theirs = log_lines(tmp_path / "bf16"), [line for line in log_lines(finished_run) if "loss" in line]
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=0.05)
    assert ours[0]["loss"] != theirs[0]["loss"]
    assert RaftForOpticalFlow.from_pretrained(tmp_path / "bf16").dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "messages"),
    [
        ({"mixed_precision": "fp16"}, ["fp16 needs a GPU", "bf16"]),
        ({"train_mix": "{sintel_clean: 1}", "data_root": "nowhere"}, ["nowhere/Sintel"]),
        ({"resume_from_checkpoint": "latest"}, ["no checkpoint-"]),
        ({"per_device_train_batch_size": "3"}, ["total_batch_size 4 cannot be cut", "the next that can is 6"]),
        ({"crop_size": "56 64"}, ["crop_size must be at least 64"]),
        ({"config_overrides": "{corr_level: 3}"}, ["RaftConfig has no field corr_level"]),
        ({"config_overrides": "{corr_levels: 0}"}, ["corr_levels must be at least 1; got 0"]),
        ({"config_overrides": "{feature_dim: abc}"}, ["config_overrides", "feature_dim"]),
        ({"config_overrides": None, "model_name_or_path": "outputs/nowhere"}, ["outputs/nowhere is no folder"]),
        ({"synthetic_textures": "no_images_here"}, ["no_images_here"]),
        ({"report_to": "tensorbord"}, ["got tensorbord; did you mean tensorboard?"]),
    ],
)
def test_mistakes_stop_the_run_before_it_starts(settings, messages, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(SystemExit) as error:
        main(flags(tmp_path / "run", **settings))
    assert str(error.value).startswith("train_flow.py: error:")
    for message in messages:
        assert message in str(error.value)
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_an_earlier_run_is_not_overwritten(finished_run):
    other = train(finished_run.parent / "other", checkpointing_steps="2", max_train_steps="2")
    assert other.returncode == 0, other.stderr

    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in finished_run.rglob("*") if path.is_file() and path.suffix}

    before = files()
    elsewhere = ["--resume_from_checkpoint", str(finished_run.parent / "other" / "checkpoint-2")]
    for switches in ([], elsewhere):
        result = train(finished_run, *switches)
        assert result.returncode != 0 and "holds an earlier run" in result.stderr
    assert before == files()  # but for the lock, which has no suffix


def test_a_split_without_ground_truth_is_refused_at_the_start(tmp_path):
    folder = tmp_path / "Sintel" / "test" / "clean" / "scene"
    folder.mkdir(parents=True)
    for i in (1, 2):
        cv2.imwrite(str(folder / f"frame_000{i}.png"), np.zeros((72, 88, 3), np.uint8))
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(SystemExit, match="sintel_clean: the split test has no ground truth"):
        main(flags(tmp_path / "run", data_root=str(tmp_path), validation_sets="sintel_clean:test"))


def test_fine_tunes_from_a_folder_on_files(finished_run, tmp_path):
    """A data set on disk with sparse ground truth; the run's settings win over those of the weights."""
    data = tmp_path / "data" / "KITTI" / "training"
    rng = np.random.default_rng(0)
    for folder in ("image_2", "flow_occ"):
        (data / folder).mkdir(parents=True)
    for i in range(3):
        for frame in (10, 11):
            cv2.imwrite(str(data / "image_2" / f"{i:06d}_{frame}.png"), rng.integers(0, 256, (80, 160, 3), np.uint8))
        flow = np.full((80, 160, 2), 2.0, dtype=np.float32)
        write_flow(data / "flow_occ" / f"{i:06d}_10.png", flow, rng.random((80, 160)) < 0.3)
    result = train(
        tmp_path / "run",
        "--freeze_batch_norm",
        train_mix="{kitti_2015: 2}",
        data_root=str(tmp_path / "data"),
        model_name_or_path=str(finished_run),
        validation_sets="kitti_2015",
        max_train_steps="2",
        gamma="0.85",
        model_size=None,
        config_overrides=None,
    )
    assert result.returncode == 0, result.stderr
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["loss_gamma"] == 0.85 and config["freeze_batch_norm"] is True
    assert "KITTI-2015 (CC BY-NC-SA 3.0), each pair 2 times" in (tmp_path / "run" / "README.md").read_text()
    assert any("validation/kitti_2015/fl_all" in line for line in read_log(tmp_path / "run" / "train_log.jsonl"))


def test_the_benchmark_of_steps_times_this_loop(tmp_path, monkeypatch, capsys):
    """Each phase is timed, no time is counted twice, and the run leaves nothing."""
    steps = []
    measure = bench_step.measure
    monkeypatch.setattr(bench_step, "measure", lambda *args: steps.extend(measure(*args)) or steps)
    monkeypatch.setitem(OBJECTIVES, "supervised", OBJECTIVES["supervised"])  # restores it after it was timed
    monkeypatch.setattr(bench_step, "WARM_UP", 1)
    monkeypatch.setattr("sys.argv", ["bench_step", *flags(tmp_path / "run", max_train_steps="3")])
    AcceleratorState._reset_state(reset_partial_state=True)
    bench_step.main()
    assert len(steps) == 3 and all(seconds > 0 for step in steps for seconds in step)
    assert "2 steps of 4 pairs of 64 x 72" in capsys.readouterr().out and not (tmp_path / "run").exists()
