"""Adaptation without ground truth: what the judge refuses, and a command that can be killed in every phase."""

import contextlib
import json
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from forked_process import ForkedProcess, run_script
from moving_shapes import moving_shapes
from PIL import Image
from safetensors.torch import load_file
from test_pseudo_labels import calm_model
from tiny_run import PROJECT, environment

from flow_data.flow_io import write_flow
from flow_data.formats.masks import encode_mask
from flow_inference.labels import LabelledPair
from flow_training import judge
from flow_training.adapt import RECORD, main, open_record, save_record, smallest_frame
from flow_training.adapt_flags import parse_args, trainer_arguments
from flow_training.config import parse_config
from flow_training.data import validation_sets
from flow_training.judge import census_error, check_guard, check_student, check_teacher, split_pairs
from flow_training.run_log import read_log

VELOCITIES = [(3, -2), (-4, 3)]


# ---- the judge ----


@pytest.fixture(scope="module")
def footage():
    return moving_shapes(2, 72, 88, VELOCITIES, seed=3)


def true_flow(video) -> torch.Tensor:
    """Flow of both directions, `(2, 2, H, W)`."""
    velocities = np.array(VELOCITIES, np.float32)
    flows = np.stack([velocities[video.layers[0]], -velocities[video.layers[1]]])
    return torch.from_numpy(flows).permute(0, 3, 1, 2)


def write_pair(folder: Path, frames: np.ndarray, flow: torch.Tensor, name: str = "p") -> LabelledPair:
    """A pair with labels that are valid everywhere."""
    folder.mkdir(exist_ok=True)
    paths = {kind: tuple(folder / f"{name}_{kind}{i}{end}" for i in (1, 2)) for kind, end in
             (("frame", ".png"), ("flow", ".flo"), ("valid", ".png"))}  # fmt: skip
    for i in range(2):
        Image.fromarray(frames[i]).save(paths["frame"][i])
        write_flow(paths["flow"][i], flow[i].permute(1, 2, 0).contiguous().numpy())
        paths["valid"][i].write_bytes(encode_mask(np.ones(frames[0].shape[:2], bool)))
    return LabelledPair(name, paths["frame"], paths["flow"], paths["valid"])


def predicting(monkeypatch, **flows: torch.Tensor) -> None:
    """Let models be names, whose flow is given."""
    monkeypatch.setattr(judge, "predict_both", lambda model, frames, updates: flows[model])


def test_the_census_error_follows_the_flow_and_not_the_light(footage):
    first, second = torch.from_numpy(footage.frames).permute(0, 3, 1, 2)[:, None].float()
    flow = true_flow(footage)[:1]
    mask = ~torch.from_numpy(footage.occluded[:1])

    def mean(second, flow):
        total, count = census_error(first, second, flow, mask)
        return total / count

    right, wrong = mean(second, flow), mean(second, flow + 1.5)
    assert right < 0.3 * wrong
    assert mean((second + 30).clip(max=255), flow) < 0.5 * wrong  # changed light
    assert census_error(first, second, flow, torch.zeros_like(mask)) == (0.0, 0)


def test_a_teacher_must_explain_the_frames_better_than_the_student(footage, tmp_path, monkeypatch):
    right = true_flow(footage)
    wrong = right + torch.tensor([0.8, 0.6]).reshape(1, 2, 1, 1) * torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1)
    predicting(monkeypatch, right=right, wrong=wrong)
    good, bad = (write_pair(tmp_path / n, footage.frames, f) for n, f in (("good", right), ("bad", wrong)))
    better = check_teacher("wrong", [good], 12, own_labels=False)
    assert better["reasons"] == [] and better["teacher"] < better["student"] < better["displaced"]
    assert "no better than the student" in check_teacher("right", [bad], 12, own_labels=False)["reasons"][0]
    assert "no better than the student" in check_teacher("right", [good], 12, own_labels=False)["reasons"][0]  # equal
    assert check_teacher("none", [good], 12, own_labels=True)["reasons"] == []


def test_labels_need_pixels_to_be_judged_by(footage, tmp_path, monkeypatch):
    right = true_flow(footage)
    predicting(monkeypatch, lost=right + 200)  # leaves the frame nearly everywhere
    pair = write_pair(tmp_path, footage.frames, right)
    assert "too few pixels" in check_teacher("lost", [pair], 12, own_labels=False)["reasons"][0]


def test_noise_bears_out_no_labels(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (2, 72, 88, 3), np.uint8)
    still = torch.zeros(2, 2, 72, 88)
    predicting(monkeypatch, student=still + torch.tensor([3.0, -3.0]).reshape(2, 1, 1, 1))
    pair = write_pair(tmp_path, noise, still)
    for own_labels in (False, True):
        assert "do not support" in check_teacher("student", [pair], 12, own_labels)["reasons"][0]


def test_a_student_must_come_closer_to_the_labels_and_agree_with_itself(footage, tmp_path, monkeypatch):
    labels = true_flow(footage)
    there_and_back = torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1)
    torn = labels.clone()
    torn[0, :, :36] += 4  # near the labels elsewhere, but its directions disagree in a half
    predicting(monkeypatch, far=labels + 3 * there_and_back, near=labels + there_and_back, torn=torn,
               broken=labels * torch.nan)  # fmt: skip
    pair = write_pair(tmp_path, footage.frames, labels)
    good = check_student("far", "near", [pair], 12, own_labels=False)
    assert good["reasons"] == []
    assert good["distance"] == pytest.approx([3 * 2**0.5, 2**0.5], rel=1e-5)
    for before, after, reason in (
        ("near", "far", "distance to the teacher's labels has not fallen"),
        ("near", "near", "distance to the teacher's labels has not fallen"),
        ("far", "torn", "disagree on too many pixels"),
        ("far", "broken", "has not fallen"),
    ):
        reasons = check_student(before, after, [pair], 12, own_labels=False)["reasons"]
        assert any(reason in line for line in reasons), (before, after)


def test_with_its_own_labels_a_student_must_not_become_worse(footage, tmp_path, monkeypatch):
    """They are almost reached before, so the distance to them may rise; frames and consistency show harm."""
    right = true_flow(footage)
    there_and_back = torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1)
    torn = right.clone()
    torn[0, :, :36] += 1
    predicting(monkeypatch, right=right, near=right + 0.02 * there_and_back, far=right + 3 * there_and_back, torn=torn,
               broken=right * torch.nan)  # fmt: skip
    pair = write_pair(tmp_path, footage.frames, right)
    good = check_student("right", "near", [pair], 12, own_labels=True)
    assert good["reasons"] == [] and good["distance"][1] > good["distance"][0]
    assert good["census"][1] < good["census"][0] + judge.NEGLIGIBLE_CENSUS_LOSS
    for before, after, reason in (
        ("right", "far", "explains the frames less"),
        ("right", "torn", "disagree on too many pixels"),
        ("right", "broken", "disagree on too many pixels"),
    ):
        reasons = check_student(before, after, [pair], 12, own_labels=True)["reasons"]
        assert any(reason in line for line in reasons), (before, after, reasons)
    assert check_student("far", "right", [pair], 12, own_labels=True)["reasons"] == []
    reasons = check_student("far", "far", [pair], 12, own_labels=True)["reasons"]
    assert reasons == []
    predicting(monkeypatch, apart=right + torch.tensor([2.0, 0.0]).reshape(2, 1, 1, 1))
    (reason,) = check_student("apart", "apart", [pair], 12, own_labels=True)["reasons"]
    assert "disagree on too many pixels: 100.0 -> 100.0 %, at most 90.0 %" in reason


def test_a_guard_refuses_what_is_lost_elsewhere():
    limits = {"a": 0.2, "b": 0.05}
    assert check_guard({"a": 1.0, "b": 2.0}, {"a": 1.2, "b": 2.1}, limits) == []
    (reason,) = check_guard({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 2.2}, limits)
    assert "on b has risen by more than 5 %: 2.000 -> 2.200 px" in reason
    assert len(check_guard({"a": 1.0}, {"a": float("nan")}, limits)) == 1


@pytest.mark.parametrize(("count", "held_out"), [(1, 0), (9, 0), (10, 1), (14, 1), (30, 3)])
@pytest.mark.parametrize("shared", [False, True])
def test_a_tenth_is_held_out_and_shares_no_frame(count, held_out, shared):
    def frames(i):
        return (Path(f"{i}"), Path(f"{i + 1}")) if shared else (Path(f"{i}a"), Path(f"{i}b"))

    pairs = [LabelledPair(str(i), frames(i), (), ()) for i in range(count)]
    trained, held = split_pairs(pairs)
    assert len(held) == held_out and trained
    assert not {f for pair in trained for f in pair.frames} & {f for pair in held for f in pair.frames}
    assert len(trained) >= count - 3 * held_out if shared else len(trained) == count - held_out


# ---- settings ----


def test_flags_of_the_trainer_are_told_from_those_of_the_command():
    argv = "a.mp4 b --model m --learning_rate 1e-3 --gap 1 3 --output_dir out --crop_size 64 72 --force".split()
    args, flags = parse_args(argv)
    assert (args.inputs, args.model, args.gap, args.force) == (["a.mp4", "b"], "m", [1, 3], True)
    assert flags == "--learning_rate 1e-3 --crop_size 64 72".split()
    config = parse_config(trainer_arguments(args, flags, num_pairs=3))
    assert (config.learning_rate, config.crop_size, config.model_name_or_path) == (1e-3, [64, 72], "m")
    assert config.train_mix == {"pairs": 20, "synthetic": 1} and config.synthetic_num_pairs == 30
    assert (config.total_batch_size, config.max_train_steps) == (1, 150)


def test_steps_grow_with_the_footage():
    for share, expected in (("0", [120, 120, 160, 400, 400]), ("0.2", [150, 150, 200, 500, 500])):
        args, flags = parse_args(["a", "--output_dir", "out", "--mix_synthetic", share])
        steps = [parse_config(trainer_arguments(args, flags, pairs)).max_train_steps for pairs in (1, 15, 20, 50, 500)]
        assert steps == expected  # a synthetic share comes on top
    assert parse_config(trainer_arguments(args, flags, on_gpu=True)).total_batch_size == 4
    args, flags = parse_args(["a", "--output_dir", "out", "--max_train_steps", "7"])
    assert parse_config(trainer_arguments(args, flags, 500)).max_train_steps == 7


@pytest.mark.parametrize(
    ("frame_size", "crop_size"),
    [((436, 1024), [256, 384]), ((188, 621), [176, 384]), ((192, 256), [184, 248]), ((20, 300), [64, 288])],
)
def test_a_crop_fits_into_the_frames(frame_size, crop_size, tmp_path):
    """Half-size KITTI with a crop of 256 x 384 was trained on at 1.4 times its scale, and gained half as much."""
    args, flags = parse_args(["a", "--output_dir", "out"])
    assert parse_config(trainer_arguments(args, flags, 1, frame_size)).crop_size == crop_size
    args, flags = parse_args(["a", "--output_dir", "out", "--crop_size", "256", "384"])
    assert parse_config(trainer_arguments(args, flags, 1, frame_size)).crop_size == [256, 384]
    frames = np.zeros((2, *frame_size, 3), np.uint8), np.zeros((2, 500, 200, 3), np.uint8)
    pairs = [write_pair(tmp_path, each, torch.zeros(2, 2, *each.shape[1:3]), f"{i}") for i, each in enumerate(frames)]
    assert smallest_frame(pairs) == (min(frame_size[0], 500), min(frame_size[1], 200))


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_synthetic_pairs_have_their_share_of_an_epoch(share):
    args, flags = parse_args(["a", "--output_dir", "out", "--mix_synthetic", str(share)])
    config = parse_config(trainer_arguments(args, flags, num_pairs=6))
    labelled = 12 * config.train_mix["pairs"]
    assert config.synthetic_num_pairs / (config.synthetic_num_pairs + labelled) == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["a", "--output_dir", "o", "--train_mix", "{synthetic: 1}"], "--train_mix cannot be given"),
        (["a", "--output_dir", "o", "--mix_synthetic", "1.5"], "between 0 and 0.9"),
        (["a", "--output_dir", "o", "--learning_rat", "1"], "did you mean --learning_rate?"),
        (["a", "--output_dir", "o", "--techer", "m"], "unknown flag --techer; did you mean --teacher?"),
        (["a", "--output_dir", "o", "--max_guard_loss", "-1"], "--max_guard_loss must be at least 0"),
        (["a", "--output_dir", "o", "--guard", "pairs:all"], "--guard pairs needs --validation_pairs_path"),
        (["missing.mp4", "--output_dir", "OUT"], "missing.mp4"),
    ],
)
def test_mistakes_are_one_line(argv, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        main([word.replace("OUT", str(tmp_path / "o")) for word in argv])
    assert message in capsys.readouterr().err + str(error.value)


def test_validation_pairs_are_their_own(tmp_path):
    for name in ("trained", "held_out"):
        write_pair(tmp_path / name, np.zeros((2, 16, 16, 3), np.uint8), torch.zeros(2, 2, 16, 16))
        rows = "p_frame1.png,p_frame2.png,p_flow1.flo\n"
        (tmp_path / name / f"{name}.csv").write_text("image1,image2,flow\n" + rows * (1 if name == "trained" else 1))
    flags = ["--output_dir", "o", "--train_mix", "{pairs: 1}", "--pairs_path", str(tmp_path / "trained")]
    own = ["--validation_pairs_path", str(tmp_path / "held_out")]
    for extra, expected in (([], "trained"), (own, "held_out")):
        ((name, rows, _),) = validation_sets(parse_config([*flags, "--validation_sets", "pairs", *extra]))
        assert name == "pairs" and Path(rows[0]["image1"]["path"]).parent.name == expected
    with pytest.raises(SystemExit):
        parse_config([*flags, *own])


def test_settings_may_change_until_something_is_trained(tmp_path):
    """Then what has changed is named; labels need not be made again because of a slip in a setting of the training."""
    output_dir = tmp_path / "out"
    output_dir.mkdir()

    def open_again(*flags: str) -> dict:
        args, rest = parse_args(["a.mp4", "--output_dir", str(output_dir), *flags])
        return open_record(args, rest)

    record = open_again("--learning_rate", "1e-4")
    save_record(output_dir, record | {"teacher_check": {}})
    assert open_again("--learning_rate=1e-4", "--data_root", "elsewhere") == record  # an earlier check does not count
    assert open_again("--learning_rate", "1e-5")["settings"]["learning_rate"] == 1e-5
    with pytest.raises(ValueError, match="every was None, is 2 now"):
        open_again("--learning_rate", "1e-4", "--every", "2")
    (output_dir / "train_log.jsonl").touch()
    assert "teacher_check" in open_again("--learning_rate", "1e-4", "--logging_steps", "3")
    with pytest.raises(ValueError, match="other settings: learning_rate was 0.0001, is 1e-05 now. Choose"):
        open_again("--learning_rate", "1e-5")


# ---- the whole command, in processes of its own ----


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """Two models and a clip."""
    folder = tmp_path_factory.mktemp("adapt")
    for seed, name in ((0, "student"), (1, "teacher")):
        calm_model(seed).save_pretrained(folder / name)
    (folder / "clip").mkdir()
    for number, frame in enumerate(moving_shapes(7, 136, 144, [(1, 0), (-2, 1)]).frames):
        Image.fromarray(frame).save(folder / "clip" / f"{number}.png")
    return folder


def arguments(tiny: Path, output_dir: Path, *flags: str) -> list[str]:
    settings = "--max_train_steps 12 --learning_rate 2e-5 --crop_size 128 128 --num_flow_updates 3 --logging_steps 1 "
    settings += "--checkpointing_steps 2 --dataloader_num_workers 0 --report_to none --device cpu "
    settings += "--synthetic_image_size 128 128 --synthetic_validation_pairs 2"
    launch = "--num_processes 1 --cpu --num_cpu_threads_per_process 1"
    models = ["--model", str(tiny / "student"), "--teacher", str(tiny / "teacher"), "--output_dir", str(output_dir)]
    return [str(tiny / "clip"), *models, *settings.split(), "--launch", launch, *flags]


def start(argv: list[str]) -> ForkedProcess:
    return ForkedProcess(PROJECT / "flow_training" / "adapt.py", argv, environment())


def run(argv: list[str]) -> subprocess.CompletedProcess:
    return run_script(PROJECT / "flow_training" / "adapt.py", argv, environment())


@pytest.mark.slow
def test_a_run_that_is_killed_in_every_phase_equals_an_uninterrupted_one(tiny, tmp_path, capsys, default_signals):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    result = run(arguments(tiny, whole, "--force"))
    assert result.returncode == 0, result.stdout + result.stderr

    def labelled() -> bool:
        path = cut / "labels" / "labels.json"
        return path.exists() and len(json.loads(path.read_text())["pairs"]) >= 3

    def trained(step: int) -> bool:
        path = cut / "train_log.jsonl"
        return path.exists() and any(line["step"] >= step for line in read_log(path))

    argv = arguments(tiny, cut, "--force")
    for reached, with_training in (
        (labelled, True),
        (lambda: trained(3), True),
        (lambda: trained(7), False),  # the training outlives the command, and the next one waits for it
        (lambda: (cut / "model.safetensors").exists(), True),
    ):
        process = start(argv)
        deadline = time.monotonic() + 300
        while not reached():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        kill(process, with_training)
        assert "accepted" not in json.loads((cut / RECORD).read_text())
    result = run(argv)
    assert result.returncode == 0, result.stdout + result.stderr
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (cut, whole))
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name
    records = [json.loads((folder / RECORD).read_text()) for folder in (cut, whole)]
    assert records[0] == records[1] and records[0]["accepted"] is True
    steps = [line["step"] for line in read_log(cut / "train_log.jsonl") if "loss" in line]
    assert steps == list(range(1, 13))

    check = records[0]["judge"]
    assert check["held_out"] == 1 and check["distance"][1] < check["distance"][0]
    card = (whole / "README.md").read_text()
    assert "Adapted without ground truth" in card and str(tiny / "teacher") in card
    assert card.count("## Adaptation") == 1
    assert "that were held out" in card and np.asarray(Image.open(whole / "before_after.png")).std() > 10

    assert main(argv) == 0 and "accepted" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="seed was 1234, is 5 now"):
        main([*argv, "--seed", "5"])


def kill(process: ForkedProcess, with_training: bool) -> None:
    """SIGKILL the command, and the training below it, which has a session of its own."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    for child in children if with_training else []:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(children if with_training else [], timeout=30)


@pytest.mark.slow
def test_weights_that_the_judge_refuses_are_kept_apart(tiny, tmp_path, default_signals):
    """A teacher is refused before training where its student is better; weights that have not moved, after it."""
    exchanged = ["--model", str(tiny / "teacher"), "--teacher", str(tiny / "student")]
    result = run(arguments(tiny, tmp_path / "run", *exchanged))
    assert result.returncode == 5 and "no better than the student" in result.stderr and "--force" in result.stderr
    assert not (tmp_path / "run" / "train_log.jsonl").exists()
    flags = ["--force", "--learning_rate", "1e-12", "--max_train_steps", "2"]
    result = run(arguments(tiny, tmp_path / "other", *flags))
    assert result.returncode == 5, result.stdout + result.stderr
    assert "not accepted: the distance to the teacher's labels has not fallen" in result.stderr
    assert not (tmp_path / "other" / "model.safetensors").exists()
    rejected = tmp_path / "other" / "rejected"
    assert {"model.safetensors", "config.json", "README.md"} <= {path.name for path in rejected.iterdir()}
    assert main(arguments(tiny, tmp_path / "other", *flags)) == 5
