"""Stages one after another, in real processes: each from the last one's weights, restartable at any point."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_run import TINY_RUN, environment, log_lines, train

from flow_training import curriculum as module
from flow_training.checkpoints import list_checkpoints
from flow_training.config import parse_config
from flow_training.curriculum import disk_needed, kept_checkpoints, main, read_curriculum
from flow_training.hub import FINISHED_FILES
from flow_training.ops.launcher import STOP_SIGNALS, SignalForwarder
from flow_training.run_log import read_log

PROJECT = Path(__file__).resolve().parents[1]
SHIPPED = sorted((PROJECT / "configs" / "curriculum").glob("*.yaml"))
LAUNCH = "--config_file configs/accelerate/cpu.yaml --num_cpu_threads_per_process 1"
SECOND_STEPS = 16  # enough to be in the middle of them for a while


def write_yaml(path: Path, content: object) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def write_tiny(folder: Path, second: dict | None = None, **keys: object) -> Path:
    """A curriculum of two tiny stages, of three steps and of `SECOND_STEPS`."""
    settings = {}
    for key, text in TINY_RUN.items():
        argv = [yaml.safe_load(word) for word in ([text] if text.startswith("{") else text.split())]
        settings[key] = argv if len(argv) > 1 else argv[0]
    own = {"model_size": settings.pop("model_size"), "config_overrides": settings.pop("config_overrides")}
    config = write_yaml(folder / "tiny.yaml", {"output_dir": str(folder / "unused"), **settings})
    content = {
        "launch": LAUNCH,
        "output_root": str(folder / "outputs"),
        "flags": {"checkpointing_steps": 2, "checkpoints_total_limit": 2},
        "stages": [
            {"name": "first", "config": str(config), "flags": {**own, "max_train_steps": 3}},
            {
                "name": "second",
                "config": str(config),
                "flags": {"max_train_steps": SECOND_STEPS, "freeze_batch_norm": True, "seed": 7, **(second or {})},
            },
        ],
    }
    return write_yaml(folder / "curriculum.yaml", content | keys)


def start(path: Path, *argv: str, output: Path) -> subprocess.Popen:
    """Start the command; it writes to a file, as no one reads a pipe while it runs."""
    command = [sys.executable, "-m", "flow_training.curriculum", str(path), *argv]
    with output.open("w") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment(), cwd=PROJECT, start_new_session=True
        )


@pytest.fixture(autouse=True)
def no_leftovers():
    """Kill the training processes that a failed test has left."""
    yield
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if {"train_flow.py", "flow_training.curriculum"} & {Path(word).name for word in child.cmdline()}:
                child.kill()


def run(path: Path, *argv: str) -> tuple[int, str]:
    """Exit code and output of the command."""
    output = path.with_suffix(".out")
    code = start(path, *argv, output=output).wait(timeout=600)
    return code, output.read_text()


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def trainers(process: subprocess.Popen) -> list[psutil.Process]:
    """Training processes below a curriculum: children of its launcher."""
    launchers = psutil.Process(process.pid).children()
    return [
        child for launcher in launchers for child in launcher.children() if "train_flow.py" in str(child.cmdline())
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(ours: Path, theirs: Path) -> None:
    first, second = weights(ours), weights(theirs)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Folder of a tiny curriculum that ran without an interruption."""
    folder = tmp_path_factory.mktemp("finished")
    code, output = run(write_tiny(folder))
    assert code == 0, output
    assert "all stages are done" in output
    return folder


@pytest.fixture
def second_to_do(finished, tmp_path) -> Path:
    """A curriculum whose first stage is done."""
    path = write_tiny(tmp_path)
    shutil.copytree(finished / "outputs" / "first", tmp_path / "outputs" / "first")
    return path


# What is trained


@pytest.mark.slow
def test_a_stage_starts_from_the_weights_of_the_one_before(finished, tmp_path):
    """The second stage does what a run by hand from the first one's folder does, bit by bit."""
    by_hand = train(
        tmp_path / "by_hand",
        "--freeze_batch_norm",
        seed="7",
        model_name_or_path=str(finished / "outputs" / "first"),
        max_train_steps=str(SECOND_STEPS),
        model_size=None,
        config_overrides=None,
    )
    assert by_hand.returncode == 0, by_hand.stderr
    assert log_lines(finished / "outputs" / "second") == log_lines(tmp_path / "by_hand")
    assert_same_weights(finished / "outputs" / "second", tmp_path / "by_hand")
    losses = [line["loss"] for line in log_lines(finished / "outputs" / "second")]
    from_scratch = train(tmp_path / "scratch", "--freeze_batch_norm", seed="7", max_train_steps="1")
    assert from_scratch.returncode == 0, from_scratch.stderr
    assert losses[0] != log_lines(tmp_path / "scratch")[0]["loss"]


@pytest.mark.slow
def test_what_is_done_is_not_trained_again(finished):
    before = {path: path.stat().st_mtime_ns for path in (finished / "outputs").rglob("*")}
    code, output = run(finished / "curriculum.yaml")
    assert code == 0, output
    assert "stage 1, first: done" in output and "stage 2, second: done" in output
    assert before == {path: path.stat().st_mtime_ns for path in (finished / "outputs").rglob("*")}


@pytest.mark.slow
def test_a_kill_in_the_second_stage_is_resumed_there(second_to_do, finished):
    outputs = second_to_do.parent / "outputs"
    before = {path: path.stat().st_mtime_ns for path in (outputs / "first").rglob("*")}
    process = start(second_to_do, output=second_to_do.with_suffix(".out"))
    wait_for(lambda: list_checkpoints(outputs / "second"), process)
    (trainer,) = trainers(process)
    trainer.kill()
    assert process.wait(timeout=60) != 0
    printed = second_to_do.with_suffix(".out").read_text()
    assert f"stage second failed with exit code {process.returncode}" in printed
    assert f"resume with:  python -m flow_training.curriculum {second_to_do}" in printed
    last = int(list_checkpoints(outputs / "second")[-1].name.rpartition("-")[2])
    assert last < SECOND_STEPS

    code, output = run(second_to_do)
    assert code == 0, output
    assert "stage 1, first: done" in output
    assert f"stage 2 of 2, second: in progress, from step {last}" in output
    assert before == {path: path.stat().st_mtime_ns for path in (outputs / "first").rglob("*")}
    assert log_lines(outputs / "second") == log_lines(finished / "outputs" / "second")
    assert_same_weights(outputs / "second", finished / "outputs" / "second")


@pytest.mark.slow
def test_killed_before_the_first_checkpoint_a_stage_starts_anew(second_to_do, finished):
    outputs = second_to_do.parent / "outputs"
    shutil.copytree(finished / "outputs" / "second", outputs / "second", ignore=shutil.ignore_patterns("checkpoint-*"))
    for name in FINISHED_FILES:
        (outputs / "second" / name).unlink()
    code, output = run(second_to_do)
    assert code == 0, output
    assert "second: in progress, without a checkpoint: from the start" in output
    assert log_lines(outputs / "second") == log_lines(finished / "outputs" / "second")
    assert_same_weights(outputs / "second", finished / "outputs" / "second")


@pytest.mark.slow
def test_a_signal_stops_stage_and_curriculum(tmp_path):
    """The trainer saves the step that it is in, and no further stage begins."""
    flags = {"checkpointing_steps": 100000, "max_train_steps": 100000, "dataloader_num_workers": 1}
    path = write_tiny(tmp_path)
    content = yaml.safe_load(path.read_text())
    content["stages"][0]["flags"] |= flags
    content["flags"] = {}
    write_yaml(path, content)
    process = start(path, output=tmp_path / "out")
    log = tmp_path / "outputs" / "first" / "train_log.jsonl"
    wait_for(lambda: log.exists() and len(read_log(log)) > 2, process)
    below = psutil.Process(process.pid).children(recursive=True)
    assert len(below) >= 2
    process.send_signal(signal.SIGTERM)
    code = process.wait(timeout=60)
    printed = (tmp_path / "out").read_text()
    assert code != 0
    assert "stopped by SIGTERM in stage first; resume with:  python -m flow_training.curriculum" in printed
    (checkpoint,) = list_checkpoints(tmp_path / "outputs" / "first")
    assert int(checkpoint.name.rpartition("-")[2]) == read_log(log)[-1]["step"]
    assert not (tmp_path / "outputs" / "second").exists()
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in below)


# Scripts in the place of train_flow.py


def stand_in(monkeypatch, tmp_path: Path, text: str) -> Path:
    """Let a script run in the trainer's place; returns a curriculum whose stages are not done."""
    script = tmp_path / "train_flow.py"
    script.write_text(f"import sys\nfrom pathlib import Path\n{text}")
    monkeypatch.setattr(module, "TRAINER", script)
    monkeypatch.setattr(module, "SHARED_FOLDER_DELAY", 0)
    return write_tiny(tmp_path)


FINISH = """
output_dir = Path(sys.argv[sys.argv.index("--output_dir") + 1])
output_dir.mkdir(parents=True)
steps = sys.argv[len(sys.argv) - sys.argv[::-1].index("--max_train_steps")]
(output_dir / "run_config.yaml").write_text(f"max_train_steps: {steps}")
for name in ("README.md", "config.json", "preprocessor_config.json", "model.safetensors"):
    (output_dir / name).touch()
"""


@pytest.mark.slow
def test_ending_without_an_error_is_not_enough(monkeypatch, tmp_path, capsys):
    path = stand_in(monkeypatch, tmp_path, "Path(sys.argv[0]).with_name('ran').open('a').write('x')")
    assert main([str(path)]) == 1
    assert "stage first ended before its last step; resume with" in capsys.readouterr().out
    assert (tmp_path / "ran").read_text() == "x"


@pytest.mark.slow
def test_a_stage_that_fails_ends_the_curriculum(monkeypatch, tmp_path, capsys):
    fail = "if any(word.endswith('/second') for word in sys.argv): sys.exit(1)\n"
    path = stand_in(monkeypatch, tmp_path, fail + FINISH)
    content = yaml.safe_load(path.read_text())
    third = {"name": "third", "config": content["stages"][0]["config"]}
    write_yaml(path, content | {"stages": [*content["stages"], third]})
    assert main([str(path)]) == 1
    printed = capsys.readouterr().out
    assert "stage second failed with exit code 1; when that is fixed, resume with" in printed
    assert "stage 3" not in printed and not (tmp_path / "outputs" / "third").exists()


@pytest.mark.slow
def test_an_upload_that_fails_does_not_stop_the_stages_after_it(monkeypatch, tmp_path, capsys):
    path = stand_in(monkeypatch, tmp_path, FINISH + "sys.exit(3 if output_dir.name == 'first' else 0)")
    assert main([str(path), "--hub_token", "secret"]) != 0
    printed = capsys.readouterr().out
    assert "stage first is trained, but ended with exit code" in printed and "all stages are done" in printed
    assert (tmp_path / "outputs" / "second" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_token_is_not_shown(monkeypatch, tmp_path, capsys):
    path = stand_in(monkeypatch, tmp_path, "sys.exit(5)")
    for argv in (["--hub_token", "secret"], ["--hub_token=secret"], ["--hub-token", "secret"], ["--hub-token=secret"]):
        assert main([str(path), *argv]) != 0
        printed = capsys.readouterr()
        assert "secret" not in printed.out + printed.err and "TOKEN" in printed.out


def test_a_command_ends_after_all_its_processes(tmp_path):
    """A launcher may be killed alone; a second run must not begin beside the first."""
    script = tmp_path / "launcher.py"
    script.write_text(
        "import os, signal, subprocess, sys\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1); open(\"ended\", \"w\")'])\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = ["sh", "-c", f"cd {tmp_path} && exec {sys.executable} launcher.py"]
    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
    with SignalForwarder(module.TRAINER, module.PROG, again="again") as signals:
        assert signals.run(command) == 128 + signal.SIGKILL
    assert (tmp_path / "ended").exists()
    assert handlers == [signal.getsignal(number) for number in STOP_SIGNALS]


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_before_the_training_a_signal_ends_the_launcher(default_signals, number):
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with SignalForwarder(module.TRAINER, module.PROG, again="again") as signals:
        threading.Timer(0.5, os.kill, [os.getpid(), number]).start()
        assert signals.run(command) == 128 + signal.SIGTERM
    assert signals.signal is number


# The plan


def plan(capsys, *argv: str) -> dict[str, list[str]]:
    """Cells of the printed table, by stage."""
    assert main([*argv, "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = lines[: lines.index("")]
    return {
        cells[0]: cells[1:]
        for cells in ([cell.strip() for cell in line.split("  ") if cell.strip()] for line in table)
    }


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_stages_start_from_the_stage_before(path, monkeypatch):
    monkeypatch.chdir(PROJECT)
    stages = read_curriculum(path, output_root="nowhere").stages
    assert stages[0].config.model_name_or_path is None
    for before, stage in zip(stages, stages[1:], strict=False):
        assert stage.config.model_name_or_path == before.config.output_dir == f"nowhere/{before.name}"
        assert stage.config.resume_from_checkpoint == "auto"


def test_frames_and_motion_grow_in_pretraining(monkeypatch):
    monkeypatch.chdir(PROJECT)
    stages = read_curriculum(PROJECT / "configs/curriculum/pretrain_synthetic_small.yaml").stages
    for name in ("crop_size", "synthetic_image_size", "synthetic_displacement"):
        values = [getattr(stage.config, name) for stage in stages]
        assert values == sorted(values, key=max) and max(values[0]) < max(values[-1])


def test_pretraining_is_what_the_shipped_weights_were_trained_with(monkeypatch):
    """Their last stage is the end of the one before, in smaller batches; the steps of both are one stage here."""
    monkeypatch.chdir(PROJECT)
    stages = read_curriculum(PROJECT / "configs/curriculum/pretrain_synthetic_small.yaml").stages
    *trained, rest = json.loads(Path("pretrained/raft-small-synthetic/training_stages.json").read_text())
    trained[-1]["steps"] += rest["steps"]
    assert len(trained) == len(stages)
    for stage, settings in zip(stages, trained, strict=True):
        assert stage.config.max_train_steps == settings.pop("steps")
        for name in settings.keys() - {"hours", "hardware"}:
            assert getattr(stage.config, name) == settings[name], (stage.name, name)


@pytest.mark.parametrize("name", ["standard", "mixed"])
def test_two_curricula_are_the_stages_of_the_paper(name, monkeypatch):
    path = PROJECT / f"configs/curriculum/{name}.yaml"
    monkeypatch.chdir(PROJECT)
    curriculum = read_curriculum(path, output_root="nowhere")
    assert [stage.name.removesuffix("_mixed") for stage in curriculum.stages] == [
        "chairs",
        "things",
        "sintel",
        "kitti",
    ]
    for before, stage in zip(curriculum.stages, curriculum.stages[1:], strict=False):
        # Run by hand, the config starts from the same stage.
        by_hand = parse_config(["--config", f"configs/{stage.name}.yaml"])
        assert by_hand.model_name_or_path == parse_config(["--config", f"configs/{before.name}.yaml"]).output_dir
    assert {stage.config.mixed_precision for stage in curriculum.stages} == {"fp16" if path.stem == "mixed" else None}
    launch = curriculum.launch
    assert not launch or Path(launch[launch.index("--config_file") + 1]).is_file()


def test_plan_of_the_paper(monkeypatch, capsys, tmp_path):
    """Steps and pairs of train_standard.sh; torchvision's count of RAFT's parameters."""
    monkeypatch.chdir(PROJECT)
    before = set(tmp_path.iterdir())
    root = ["--output_root", str(tmp_path / "runs")]
    rows = plan(capsys, "configs/curriculum/standard.yaml", *root, "--checkpoints_total_limit", "3")
    assert rows["chairs"][:3] == ["100,000", "10", "1,000,000"]
    assert rows["kitti"][:3] == ["50,000", "6", "300,000"]
    assert rows["chairs"][3] == "random (large)" and rows["things"][3] == f"{tmp_path}/runs/chairs"
    assert rows["chairs"][4] == "20: every 5,000, the last 3 kept" and rows["kitti"][4].startswith("10: every 5,000")
    assert [rows[name][-1] for name in ("chairs", "things", "sintel", "kitti")] == ["not started"] * 4
    parameters = 5_257_536
    channels = 64 * 5 + 96 * 5 + 128 * 5  # of BatchNorm in the context encoder: stem, three stages
    weights = 4 * (parameters + 2 * channels) + 8 * 15  # with means, variances and counters
    disk = weights + 4 * (weights + 2 * 4 * parameters)  # one more than is kept, while it is written
    assert rows["chairs"][5] == megabytes(disk)
    assert rows["together"] == ["350,000", "2,500,000", megabytes(4 * disk)]
    assert set(tmp_path.iterdir()) == before
    never = ["--model_size", "small", "--checkpointing_steps", "100001"]
    small = plan(capsys, "configs/curriculum/standard.yaml", *root, *never)
    assert small["chairs"][4:6] == ["none", megabytes(4 * 990_162)]


@pytest.mark.parametrize(
    ("steps", "every", "limit", "kept", "at_once"),
    [
        (10, 3, None, [3, 6, 9], 3),
        (10, 3, 1, [9], 2),  # the oldest is removed when the new one is complete
        (10, 3, 3, [3, 6, 9], 3),
        (10, 3, 9, [3, 6, 9], 3),
        (10, 5, 1, [10], 2),
        (10, 11, None, [], 0),
    ],
)
def test_checkpoints_and_disk_in_closed_form(steps, every, limit, kept, at_once):
    argv = ["--output_dir", "x", "--train_mix", "{synthetic: 1}", "--max_train_steps", f"{steps}"]
    argv += ["--checkpointing_steps", f"{every}"] + (
        [] if limit is None else ["--checkpoints_total_limit", f"{limit}"]
    )
    config = parse_config(argv)
    assert kept_checkpoints(config) == kept
    assert disk_needed(config, weights=110, parameters=100) == 110 + at_once * 310
    averaging = parse_config([*argv, "--ema_decay", "0.9"])
    assert disk_needed(averaging, weights=110, parameters=100) == 110 + at_once * 420


@pytest.mark.slow
def test_plan_agrees_with_what_a_run_leaves(finished, capsys):
    rows = plan(capsys, str(finished / "curriculum.yaml"))
    for name in ("first", "second"):
        folder = finished / "outputs" / name
        config = parse_config(["--config", str(folder / "run_config.yaml")])
        assert [f"checkpoint-{step}" for step in kept_checkpoints(config)] == [
            path.name for path in list_checkpoints(folder)
        ]
        assert rows[name][-1] == "done"
        tensors = weights(folder).values()
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        assert (folder / "model.safetensors").stat().st_size == pytest.approx(size, rel=0.2)
        for path in list_checkpoints(folder):
            real = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            assert real == pytest.approx(3 * size, rel=0.25)  # names and random states weigh something here
        at_once = {"first": 1, "second": 3}[name]
        assert float(rows[name][5].split()[0]) == pytest.approx((size + at_once * 3 * size) / 1e6, rel=0.05, abs=0.06)


def make_run(folder: Path, steps: int, *checkpoints: int, done: bool = True, **settings: object) -> None:
    folder.mkdir(parents=True)
    (folder / "train_log.jsonl").write_text(json.dumps({"step": 1}) + "\n")
    for step in checkpoints:
        (folder / f"checkpoint-{step}").mkdir()
        (folder / f"checkpoint-{step}" / "settings.yaml").touch()
    if done:
        write_yaml(folder / "run_config.yaml", {"max_train_steps": steps, **settings})
        for name in FINISHED_FILES:
            (folder / name).open("a").close()


def test_states(tmp_path):
    curriculum = read_curriculum(write_tiny(tmp_path))
    first, second = tmp_path / "outputs" / "first", tmp_path / "outputs" / "second"
    assert curriculum.states() == ["not started", "not started"]
    make_run(first, 3, done=False)
    assert curriculum.states()[0] == "in progress, without a checkpoint: from the start"
    (first / "unfinished-checkpoint-2").mkdir()
    assert curriculum.states()[0] == "in progress, without a checkpoint: from the start"
    for step in (8, 10):
        (first / f"checkpoint-{step}").mkdir()
        (first / f"checkpoint-{step}" / "settings.yaml").touch()
    assert curriculum.states()[0] == "in progress, from step 10"
    shutil.rmtree(first)
    make_run(first, 2, 2)  # it was done when there were fewer steps to do
    assert curriculum.states()[0] == "in progress, from step 2" and curriculum.first_to_train() == 0
    shutil.rmtree(first)
    make_run(first, 3, 2)
    assert curriculum.states() == ["done", "not started"] and curriculum.first_to_train() == 1
    for name in FINISHED_FILES:
        os.rename(first / name, tmp_path / name)
        assert curriculum.states()[0] == "in progress, from step 2"
        os.rename(tmp_path / name, first / name)
    (first / "run_config.yaml").write_text("max_train")
    assert curriculum.states()[0] == "in progress, from step 2"
    make_run(second, SECOND_STEPS)
    assert curriculum.states() == ["not needed", "done"] and curriculum.first_to_train() == 2
    shutil.rmtree(first)
    assert curriculum.states() == ["not needed", "done"] and curriculum.first_to_train() == 2


def test_changed_settings_of_a_finished_stage_are_reported(tmp_path, capsys):
    path = write_tiny(tmp_path)
    make_run(tmp_path / "outputs" / "first", 3, seed=1234, logging_steps=50, mixed_precision="no")
    make_run(tmp_path / "outputs" / "second", SECOND_STEPS, seed=8)
    assert main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert "seed was 8, is 7 now" in printed and f"remove {tmp_path}/outputs/second" in printed
    assert "logging_steps" not in printed and "mixed_precision" not in printed and "outputs/first;" not in printed
    assert printed.count("it is not trained again") == 1


# What is refused


def broken(path: Path, **keys: object) -> Path:
    return write_yaml(path, yaml.safe_load(path.read_text()) | keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"stage": []}, r"unknown key stage; did you mean stages\?"),
        ({"stages": []}, "stages must be a list of at least one"),
        ({"stages": "configs/chairs.yaml"}, "stages must be a list"),
        ({"stages": ["configs/chairs.yaml"]}, "stage 1 must hold `key: value` lines; got 'configs/chairs.yaml'"),
        ({"stages": [{"name": "x"}]}, "stage 1 must have a config"),
        ({"stages": [{"conf": "x"}]}, r"stage 1: unknown key conf; did you mean config\?"),
        ({"flags": {"learning_rat": 1}}, r"flags: unknown key learning_rat; did you mean learning_rate\?"),
        ({"flags": {"flip": 3}}, "flags: flip must be true or false; got 3"),
        ({"flags": {"output_dir": "x"}}, "flags: output_dir cannot be given here: give output_root"),
        ({"flags": {"resume_from_checkpoint": "x"}}, "resume_from_checkpoint cannot be given here: .*always resumed"),
        ({"flags": "--seed 3"}, "flags must hold `key: value` lines"),
        ({"launch": ["--multi_gpu"]}, "launch must be text"),
        ({"launch": "--x 'y"}, "launch: No closing quotation"),
    ],
)
def test_mistakes_in_the_file_are_named(keys, message, tmp_path):
    path = broken(write_tiny(tmp_path), **keys)
    with pytest.raises(SystemExit, match=message) as error:
        main([str(path), "--dry_run"])
    assert str(error.value).startswith("flow_training.curriculum: error: ")


def test_mistakes_in_a_stage_are_named(tmp_path, capsys):
    path = write_tiny(tmp_path, second={"model_name_or_path": "raft.pth"})
    with pytest.raises(
        SystemExit, match="stage 2: flags: model_name_or_path cannot be given here: a stage starts from"
    ):
        main([str(path)])
    path = write_tiny(tmp_path, second={"seed": -3})
    with pytest.raises(SystemExit):
        main([str(path)])
    printed = capsys.readouterr().err
    assert (
        "seed must be from 0 to 4294967295; got -3" in printed
        and "settings of" in printed
        and "stage 2, second" in printed
    )
    with pytest.raises(SystemExit, match="no such file: .*nowhere.yaml"):
        main([str(tmp_path / "nowhere.yaml")])
    for name in ("--output_dir", "--resume_from_checkpoint=x"):
        with pytest.raises(SystemExit, match="cannot be given for every stage"):
            main([str(write_tiny(tmp_path)), name, "x"])
    twice = yaml.safe_load(write_tiny(tmp_path).read_text())
    twice["stages"][1]["name"] = "first"
    with pytest.raises(SystemExit, match="there is a stage first already"):
        main([str(write_yaml(tmp_path / "twice.yaml", twice))])
    twice = yaml.safe_load(write_tiny(tmp_path, output_root=None).read_text())
    with pytest.raises(SystemExit, match="unused is the output_dir of first already"):
        main([str(write_yaml(tmp_path / "twice.yaml", twice))])


def test_the_command_line_wins(tmp_path):
    content = yaml.safe_load(write_tiny(tmp_path).read_text())
    for key in ("model_size", "config_overrides"):
        del content["stages"][0]["flags"][key]
    flags = ["--seed", "11", "--model_name_or_path", "raft.pth"]
    curriculum = read_curriculum(write_yaml(tmp_path / "c.yaml", content), flags, "--quiet", str(tmp_path / "o"))
    assert curriculum.launch == ["--quiet"]
    configs = [stage.config for stage in curriculum.stages]
    assert [config.seed for config in configs] == [11, 11]
    assert [config.output_dir for config in configs] == [f"{tmp_path}/o/first", f"{tmp_path}/o/second"]
    assert [config.model_name_or_path for config in configs] == ["raft.pth", f"{tmp_path}/o/first"]
