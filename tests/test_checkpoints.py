"""Which checkpoint is the latest, and what the log keeps when a run is resumed."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from flow_training.checkpoints import archive_later_checkpoints, find_checkpoint, list_checkpoints, resume_command
from flow_training.ops.launcher import RESUME_VARIABLE
from flow_training.run_log import FILE_NAME, RunLog, read_log


def make_checkpoint(path: Path) -> None:
    path.mkdir()
    (path / "settings.yaml").touch()


def test_latest_is_the_highest_finished_step(tmp_path):
    for name in ("checkpoint-5", "checkpoint-100", "checkpoint-20", "unfinished-checkpoint-300", "checkpoint-x"):
        make_checkpoint(tmp_path / name)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-20", "checkpoint-100"]
    assert find_checkpoint("latest", tmp_path).name == "checkpoint-100"
    assert find_checkpoint(str(tmp_path / "checkpoint-5"), tmp_path).name == "checkpoint-5"


def test_a_folder_without_a_checkpoint_hides_no_older_one(tmp_path):
    make_checkpoint(tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-9").touch()
    assert find_checkpoint("latest", tmp_path) == tmp_path / "checkpoint-3"


def test_a_missing_checkpoint_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no checkpoint-.* in {tmp_path}"):
        find_checkpoint("latest", tmp_path)
    with pytest.raises(FileNotFoundError, match="checkpoint-7"):
        find_checkpoint(str(tmp_path / "checkpoint-7"), tmp_path)


def test_what_is_no_checkpoint_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no checkpoint: give its checkpoint-STEP folder"):
        find_checkpoint(str(tmp_path), tmp_path)


def test_archived_checkpoints_are_not_the_latest(tmp_path):
    for step in (2, 4, 6):
        make_checkpoint(tmp_path / f"checkpoint-{step}")
    archive_later_checkpoints(tmp_path, 4)
    assert find_checkpoint("latest", tmp_path).name == "checkpoint-4"
    assert (tmp_path / "abandoned-checkpoint-6").is_dir()  # no work is lost


def test_log_has_each_step_once_after_a_resume(tmp_path):
    log = RunLog(tmp_path, 0)
    for step in (2, 4, 6, 8):
        log.write({"step": step, "loss": step / 3})
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write('{"step": 10, "lo')  # killed while writing
    resumed = RunLog(tmp_path, 5)
    resumed.write({"step": 6, "loss": 2.0})
    assert [line["step"] for line in read_log(tmp_path / FILE_NAME)] == [2, 4, 6]
    first = json.loads((tmp_path / FILE_NAME).read_text().splitlines()[0])
    assert first == {"step": 2, "loss": 2 / 3}  # unrounded


def test_metrics_over_no_pixels_are_null(tmp_path):
    """Also those of a log that an older version has written."""
    (tmp_path / FILE_NAME).write_text('{"step": 1, "epe": NaN, "list": [Infinity, 1]}\n')
    RunLog(tmp_path, 1).write({"step": 2, "epe": float("nan"), "loss": -0.0})
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / FILE_NAME).read_text().splitlines()]
    assert lines == [{"step": 1, "epe": None, "list": [None, 1]}, {"step": 2, "epe": None, "loss": 0}]


def test_damaged_lines_are_removed_and_others_kept(tmp_path):
    path = tmp_path / FILE_NAME
    path.write_bytes(b'{"step": 1, "loss": 1.0}\n\xff\x00{"st\n[3]\n{"step": 4, "loss": 4.0}\n{"loss": 5.0}\n')
    RunLog(tmp_path, 9).write({"step": 5, "loss": 5.0})
    assert [line["step"] for line in read_log(path)] == [1, 4, 5]
    assert len(path.read_text().splitlines()) == 3


def test_the_resume_command_works_where_the_user_is(tmp_path, monkeypatch):
    """The script by the path that was given, or as the module of an installation, where there is no script."""
    given = ["--config", "chairs", "--hub_token", "secret"]
    for program in ("train_flow.py", "../code/train_flow.py"):
        monkeypatch.setattr(sys, "argv", [program, *given])
        expected = f"accelerate launch {program} --config chairs --hub_token TOKEN --resume_from_checkpoint auto"
        assert resume_command(given, tmp_path) == f"Resume with:  {expected}"
    spec = importlib.util.find_spec("train_flow")
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)  # as `python -m train_flow` sets it
    monkeypatch.setattr(sys, "argv", [spec.origin, *given])
    assert resume_command(given, tmp_path).startswith("Resume with:  accelerate launch -m train_flow --config chairs")


@pytest.mark.parametrize("flag", ["--hub_token {}", "--hub-token {}", "--hub_token={}", "--hub-token={}"])
def test_a_token_is_in_no_command_that_is_shown(flag, tmp_path):
    given = ["--config", "x", *flag.format("secret").split(), "--seed", "3"]
    shown = resume_command(given, tmp_path)
    assert f" --config x {flag.format('TOKEN')} --seed 3 --resume_from_checkpoint auto" in shown


@pytest.mark.parametrize("flag", ["--resume_from_checkpoint", "--resume-from-checkpoint"])
@pytest.mark.parametrize("equals", [" ", "="])
def test_a_checkpoint_that_a_run_started_from_is_kept_until_it_has_its_own(flag, equals, tmp_path):
    given = f"--config x {flag}{equals}old/checkpoint-5 --seed 3"
    assert resume_command(given.split(), tmp_path).endswith(f" train_flow.py {given}")
    make_checkpoint(tmp_path / "checkpoint-7")
    resumed = " train_flow.py --config x --seed 3 --resume_from_checkpoint auto"
    assert resume_command(given.split(), tmp_path).endswith(resumed)


def test_the_resume_command_is_that_of_the_program_around_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv(RESUME_VARIABLE, "python -m flow_training.adapt frames/ --output_dir out")
    assert resume_command(["--config", "chairs"], tmp_path) == (
        "Resume with:  python -m flow_training.adapt frames/ --output_dir out"
    )
