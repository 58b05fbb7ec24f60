"""Kills, signals, full disks, damaged data and changed settings: a run loses nothing, and reports what happened."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file
from tiny_run import PROJECT, command, environment, log_lines, start, train

from flow_data.flow_io import write_flow
from flow_data.sampling import RunSampler
from flow_training.checkpoints import find_checkpoint
from flow_training.ops.lock import RunLock
from flow_training.ops.signals import StopRequest
from flow_training.optimization import make_schedule
from flow_training.run_log import read_log
from modeling_raft import RaftForOpticalFlow

pytestmark = pytest.mark.slow
STEPS = 12
SETTINGS = {
    "max_train_steps": str(STEPS),
    "checkpointing_steps": "2",
    "logging_steps": "1",
    "validation_sets": "synthetic",
    "validation_steps": "4",
    "dataloader_num_workers": "1",
    "ema_decay": "0.9",
}
AUTO = ["--add_noise", "--resume_from_checkpoint", "auto"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run that nothing happened to."""
    output_dir = tmp_path_factory.mktemp("whole") / "run"
    result = train(output_dir, "--add_noise", **SETTINGS)
    assert result.returncode == 0, result.stderr
    return output_dir


def wait_for_step(process: subprocess.Popen, output_dir: Path, step: int, seconds: float = 120) -> None:
    """Wait until the log has a step."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        log = output_dir / "train_log.jsonl"
        if log.exists() and any(line["step"] >= step for line in read_log(log)):
            return
        time.sleep(0.01)
    process.kill()
    pytest.fail(f"no step {step}: {process.communicate()[1]}")


def assert_same_run(output_dir: Path, other: Path) -> None:
    """The same log, line by line, and the same weights, bit by bit: their average, and themselves."""
    assert log_lines(output_dir) == log_lines(other)
    for folder in (".", f"checkpoint-{STEPS}"):
        ours, theirs = (load_file(path / folder / "model.safetensors") for path in (output_dir, other))
        for name in theirs:
            assert torch.equal(ours[name], theirs[name]), name


def test_a_run_that_is_killed_repeatedly_equals_an_uninterrupted_one(whole, tmp_path):
    """SIGKILL right after a step is logged, so also while a checkpoint is written; other workers each time."""
    output_dir = tmp_path / "run"
    for step, workers, pause in ((1, "1", 0.0), (4, "2", 0.02), (7, "0", 0.05), (10, "1", 0.0)):
        process = start(output_dir, *AUTO, **SETTINGS | {"dataloader_num_workers": workers})
        wait_for_step(process, output_dir, step)
        time.sleep(pause)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL and not (output_dir / "model.safetensors").exists()
    result = train(output_dir, *AUTO, **SETTINGS)
    assert result.returncode == 0, result.stderr
    assert_same_run(output_dir, whole)


@pytest.mark.parametrize(
    ("number", "to_group"), [(signal.SIGTERM, True), (signal.SIGINT, True), (signal.SIGTERM, False)]
)
def test_a_signal_saves_the_step_and_prints_the_resume_command(whole, tmp_path, number, to_group):
    """As a scheduler sends it: to the process, or to it and its workers; after a step that is no checkpoint's."""
    output_dir = tmp_path / "run"
    process = start(output_dir, "--add_noise", "--hub_token", "hf_secret", **SETTINGS)
    wait_for_step(process, output_dir, 3)
    os.killpg(process.pid, number) if to_group else process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    last = read_log(output_dir / "train_log.jsonl")[-1]["step"]
    assert f"{number.name}: step {last} is saved" in errors and (output_dir / f"checkpoint-{last}").is_dir()
    assert "--resume_from_checkpoint auto" in errors and "hf_secret" not in errors and "Traceback" not in errors
    result = train(output_dir, *AUTO, **SETTINGS)
    assert result.returncode == 0, result.stderr
    assert_same_run(output_dir, whole)


def test_a_signal_does_not_wait_for_a_validation_to_end(tmp_path):
    """The last step is taken, its validation is not: that is done first after the resume."""
    output_dir = tmp_path / "run"
    settings = SETTINGS | {"max_train_steps": "1", "synthetic_validation_pairs": "60"}
    process = start(output_dir, "--add_noise", **settings)
    wait_for_step(process, output_dir, 1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM and "step 1 is saved" in errors, errors
    assert [line["step"] for line in log_lines(output_dir)] == [1] and not (output_dir / "model.safetensors").exists()
    result = train(output_dir, *AUTO, **settings)
    assert result.returncode == 0, result.stderr
    assert [("loss" in line, "validation/synthetic/epe" in line) for line in log_lines(output_dir)] == [
        (True, False),
        (False, True),
    ]


def test_a_signal_to_one_of_two_processes_stops_both(whole, tmp_path):
    output_dir = tmp_path / "run"
    settings = SETTINGS | {"per_device_train_batch_size": "2"}
    process = start(output_dir, "--add_noise", processes=2, **settings)
    wait_for_step(process, output_dir, 3)
    workers = [
        child for child in psutil.Process(process.pid).children() if str(PROJECT / "train_flow.py") in child.cmdline()
    ]
    assert len(workers) == 2
    workers[1].send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    last = read_log(output_dir / "train_log.jsonl")[-1]["step"]
    assert process.returncode != 0 and f"SIGTERM: step {last} is saved" in errors
    result = train(output_dir, *AUTO, processes=2, **settings)
    assert result.returncode == 0, result.stderr
    losses = [[line["loss"] for line in log_lines(path) if "loss" in line] for path in (output_dir, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)  # rounding grows from step to step


def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(tmp_path):
    output_dir = tmp_path / "run"
    assert train(output_dir, **SETTINGS | {"max_train_steps": "3", "validation_sets": None}).returncode == 0
    (output_dir / "model.safetensors").unlink()
    before = {path.name: path.read_bytes() for path in (output_dir / "checkpoint-2").iterdir()}
    switches = ["--resume_from_checkpoint", "latest", "--allow_config_changes"]
    # no worker: what it hands over lies in files too, on another disk
    settings = SETTINGS | {"validation_sets": None, "dataloader_num_workers": "0"}
    result = train(output_dir, *switches, max_file_bytes=60_000, **settings)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert f"cannot write {output_dir}/checkpoint-4" in result.stderr
    assert f"the last good one is {output_dir}/checkpoint-2" in result.stderr and "Resume with:" in result.stderr
    assert before == {path.name: path.read_bytes() for path in (output_dir / "checkpoint-2").iterdir()}
    assert not list(output_dir.glob("unfinished*")) and not (output_dir / "checkpoint-4").exists()


def test_a_full_disk_at_the_end_loses_no_step(tmp_path):
    output_dir = tmp_path / "run"
    settings = {"max_train_steps": "1", "checkpointing_steps": "5"}
    result = train(output_dir, max_file_bytes=60_000, **settings)
    assert result.returncode == 1 and "Traceback" not in result.stderr and "Resume with:" in result.stderr
    assert not (output_dir / "model.safetensors").exists()


def test_two_runs_do_not_share_a_folder(tmp_path):
    output_dir = tmp_path / "run"
    process = start(output_dir, **SETTINGS | {"max_train_steps": "1000", "dataloader_num_workers": "2"})
    wait_for_step(process, output_dir, 3)  # there is a checkpoint, of step 2
    second = train(output_dir, *AUTO, **SETTINGS)
    assert second.returncode == 1 and f"another run writes into {output_dir} (process {process.pid}" in second.stderr
    process.kill()  # its workers live on for a moment; the lock does not
    process.communicate()
    step = find_checkpoint("latest", output_dir).name.rpartition("-")[2]
    third = train(output_dir, "--resume_from_checkpoint", "auto", "--allow_config_changes", max_train_steps=step)
    assert third.returncode == 0, third.stderr


def test_two_processes_hold_one_lock_and_the_failing_one_names_the_file(tmp_path):
    """The lock is the first process's; the file that cannot be read, in its last step, is the second one's."""
    (tmp_path / "data").mkdir()
    names = [f"{index}.png" for index in range(400)]
    for name in names:
        cv2.imwrite(str(tmp_path / "data" / name), np.full((72, 88, 3), 7, np.uint8))
    write_flow(tmp_path / "data" / "flow.flo", np.zeros((72, 88, 2), np.float32))
    rows = [f"{name},{name},flow.flo" for name in names]
    (tmp_path / "data" / "pairs.csv").write_text("\n".join(["image1,image2,flow", *rows]))
    last = next(iter(RunSampler(len(names), 1234, 399, 400)))[1]
    bad = tmp_path / "data" / names[last]
    bad.write_bytes(bad.read_bytes()[:30])
    settings = {"train_mix": "{pairs: 1}", "pairs_path": str(tmp_path / "data" / "pairs.csv")}
    settings |= {"max_train_steps": "100", "checkpointing_steps": "1000"}
    process = start(tmp_path / "run", processes=2, **settings)
    wait_for_step(process, tmp_path / "run", 1)
    with pytest.raises(ValueError, match="another run writes into"):
        RunLock(tmp_path / "run")
    _, errors = process.communicate(timeout=300)
    assert process.returncode != 0 and "train_flow.py: error:" in errors and str(bad) in errors, errors
    assert "Resume with:" in errors
    # The other process reports that, unless the launcher has ended it before.
    assert errors.count("train_flow.py: error:") == 1 + errors.count("error: another process of this run has ended")


def test_the_death_of_a_launcher_is_a_signal(tmp_path):
    """accelerate launch of one process dies of SIGTERM and passes nothing on."""
    process = start_below_launcher(tmp_path / "run", 1, **SETTINGS | {"max_train_steps": "1000"})
    wait_for_step(process, tmp_path / "run", 1)
    process.terminate()
    _, errors = process.communicate(timeout=120)  # until the trainer has closed it, too
    assert "SIGTERM: step" in errors and "is saved" in errors, errors


def start_below_launcher(output_dir: Path, processes: int, **settings: str | None) -> subprocess.Popen:
    """Start a run with `accelerate launch`, in a process group of its own."""
    argv = command(output_dir, processes=processes, **settings | {"validation_sets": None})
    if processes == 1:
        argv[1:1] = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    return subprocess.Popen(
        argv, stderr=subprocess.PIPE, text=True, env=environment(), cwd=PROJECT, start_new_session=True
    )


@pytest.mark.parametrize(("processes", "number"), [(1, signal.SIGINT), (1, signal.SIGTERM), (2, signal.SIGTERM)])
def test_repeated_signals_to_all_processes_save_the_step(tmp_path, processes, number):
    """Ctrl-C reaches the launcher, too: its death is a SIGTERM to one trainer, and to several it forwards it."""
    slow = {"max_train_steps": "1000", "num_flow_updates": "60", "checkpointing_steps": "1000"}
    process = start_below_launcher(tmp_path / "run", processes, **SETTINGS | slow)
    wait_for_step(process, tmp_path / "run", 2)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=120)
    last = read_log(tmp_path / "run" / "train_log.jsonl")[-1]["step"]
    assert f"step {last} is saved" in errors and "--resume_from_checkpoint auto" in errors, errors
    assert find_checkpoint("latest", tmp_path / "run").name == f"checkpoint-{last}"


def test_only_a_late_second_ctrl_c_stops_at_once(monkeypatch, default_signals):
    clock = [100.0]
    monkeypatch.setattr("flow_training.ops.signals.time.monotonic", lambda: clock[0])
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        assert stop.stop_requested() is None
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
        assert stop.stop_requested() == signal.SIGINT
        clock[0] += 10
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)


def fill_disk() -> None:
    """Let no file of this process grow beyond a few bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))


def test_a_run_that_saved_nothing_resumes_from_the_checkpoint_that_it_started_from(whole, tmp_path):
    """From a checkpoint of another folder, and the disk is full at its first own one; and full still at the resume."""
    output_dir = tmp_path / "run"
    settings = SETTINGS | {"validation_sets": None, "dataloader_num_workers": "0"}
    switches = ["--add_noise", "--resume_from_checkpoint", str(whole / "checkpoint-8")]
    result = train(output_dir, *switches, max_file_bytes=60_000, **settings)
    assert result.returncode == 1 and "there is none before it" in result.stderr, result.stderr
    assert f"--resume_from_checkpoint {whole / 'checkpoint-8'}" in result.stderr
    result = subprocess.run(  # an interpreter of its own, as what a forked process prints goes to a file, too
        command(output_dir, *switches, **settings), capture_output=True, text=True, env=environment(), cwd=PROJECT,
        preexec_fn=fill_disk,
    )  # fmt: skip
    assert result.returncode == 1 and "Traceback" not in result.stderr and "cannot write" in result.stderr
    result = train(output_dir, *switches, **settings)
    assert result.returncode == 0, result.stderr
    steps = [line["step"] for line in log_lines(output_dir)]
    assert steps == [9, 10, 11, 12]
    ours, theirs = (load_file(path / "model.safetensors") for path in (output_dir, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


HOLDER = """
import errno, os, sys, time
from pathlib import Path
from flow_training.ops import lock as module

def has_no_locks(descriptor, blocking):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

if sys.argv[2] == "no locks":
    module.lock_descriptor = has_no_locks
lock = module.RunLock(Path(sys.argv[1]))
reader, writer = os.pipe()
if os.fork() == 0:  # as a DataLoader forks its workers
    os.write(writer, b".")  # it runs, so what is closed after a fork is closed
    time.sleep(60)
    os._exit(0)
os.read(reader, 1)
print("locked", flush=True)
time.sleep(60)
"""


def has_no_locks(descriptor: int, blocking: bool) -> bool:
    """Stand in for a lock on a network file system that has none: raise its error."""
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


@pytest.mark.parametrize("file_system", ["locks", "no locks"])
def test_a_lock_is_released_with_its_process_and_not_held_by_its_children(file_system, tmp_path, monkeypatch):
    """However it is killed, and also where the file system has no locks; a worker that outlives it keeps nothing."""
    if file_system == "no locks":
        monkeypatch.setattr("flow_training.ops.lock.lock_descriptor", has_no_locks)
    argv = [sys.executable, "-c", HOLDER, str(tmp_path), file_system]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=PROJECT, start_new_session=True)
    assert process.stdout.readline() == "locked\n"
    (child,) = psutil.Process(process.pid).children()
    with pytest.raises(ValueError, match=rf"another run writes into {tmp_path} \(process {process.pid} on ") as error:
        RunLock(tmp_path)
    assert ("if it was killed on another machine" in str(error.value)) == (file_system == "no locks")
    process.kill()
    process.wait()
    assert child.is_running()
    RunLock(tmp_path).close()
    os.killpg(process.pid, signal.SIGKILL)
    assert {path.name for path in tmp_path.iterdir()} == {".lock"}


@pytest.mark.parametrize("file_system", ["locks", "no locks"])
def test_a_lock_excludes_others_until_it_is_released(file_system, tmp_path, monkeypatch, caplog):
    if file_system == "no locks":
        monkeypatch.setattr("flow_training.ops.lock.lock_descriptor", has_no_locks)
    folder = tmp_path / "runs" / "one"
    lock = RunLock(folder)
    with pytest.raises(ValueError, match=f"process {os.getpid()} on"):  # in one process, too
        RunLock(folder)
    lock.close()
    second = RunLock(folder)
    lock.close()  # of what is released already
    with pytest.raises(ValueError, match="another run writes into"):
        RunLock(folder)
    second.close()
    RunLock(tmp_path / "new").release_and_cleanup()
    assert not (tmp_path / "new").exists() and {path.name for path in folder.iterdir()} == {".lock"}
    assert ("has no locks" in caplog.text) == (file_system == "no locks")


def test_other_errors_of_locking_are_raised(tmp_path, monkeypatch):
    def fail(descriptor, blocking):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("flow_training.ops.lock.lock_descriptor", fail)
    with pytest.raises(OSError, match="cannot lock .*Input/output error"):
        RunLock(tmp_path)


def make_kitti(root: Path, num_pairs: int) -> Path:
    data = root / "KITTI" / "training"
    rng = np.random.default_rng(0)
    for folder in ("image_2", "flow_occ"):
        (data / folder).mkdir(parents=True)
    for i in range(num_pairs):
        for frame in (10, 11):
            cv2.imwrite(str(data / "image_2" / f"{i:06d}_{frame}.png"), rng.integers(0, 256, (80, 160, 3), np.uint8))
        flow = np.full((80, 160, 2), 2.0, dtype=np.float32)
        write_flow(data / "flow_occ" / f"{i:06d}_10.png", flow, rng.random((80, 160)) < 0.3)
    return data


def test_a_corrupt_image_is_named_or_replaced(tmp_path):
    data = make_kitti(tmp_path, 6)
    bad = data / "image_2" / "000003_11.png"
    bad.write_bytes(bad.read_bytes()[:500])
    settings = {"train_mix": "{kitti_2015: 1}", "data_root": str(tmp_path), "total_batch_size": "2"}
    settings |= {"max_train_steps": "9", "dataloader_num_workers": "1", "checkpointing_steps": "100"}
    result = train(tmp_path / "stopped", **settings)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert str(bad) in result.stderr and "truncated" in result.stderr and "--skip_bad_samples" in result.stderr

    done = len(log_lines(tmp_path / "stopped"))
    assert f"Step {done} is saved" in result.stderr and (tmp_path / "stopped" / f"checkpoint-{done}").is_dir()

    validated = {"validation_sets": "kitti_2015", "validation_steps": "1", "max_train_steps": "2"}
    result = train(tmp_path / "validated", data_root=str(tmp_path), **validated)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert str(bad) in result.stderr and "Step 1 is saved" in result.stderr

    skipped = train(tmp_path / "skipped", "--skip_bad_samples", **settings)
    assert skipped.returncode == 0, skipped.stderr
    assert log_lines(tmp_path / "skipped")[-1]["bad_samples"] == 3
    again = train(tmp_path / "again", "--skip_bad_samples", processes=2, **settings)
    assert again.returncode == 0, again.stderr
    for result in (skipped, again):
        assert (result.stderr + result.stdout).count(str(bad)) == 1  # three epochs, named once
    ours, theirs = ([line["loss"] for line in log_lines(tmp_path / name)] for name in ("again", "skipped"))
    assert ours == pytest.approx(theirs, rel=0.02)  # the same pairs take its place


def test_a_dead_worker_is_reported(tmp_path):
    output_dir = tmp_path / "run"
    process = start(output_dir, **SETTINGS | {"max_train_steps": "1000", "validation_sets": None})
    wait_for_step(process, output_dir, 2)
    for worker in psutil.Process(process.pid).children():
        worker.kill()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and "a process that prepares pairs died" in errors, errors
    assert "--dataloader_num_workers" in errors and "Resume with:" in errors


def test_a_loss_that_is_not_finite_stops_with_the_pairs(tmp_path):
    """A weight so large that the flow overflows; one that is NaN is refused when it is loaded."""
    begin = tmp_path / "start"
    assert train(begin, max_train_steps="1").returncode == 0
    model = RaftForOpticalFlow.from_pretrained(begin)
    model.update_block.flow_head[2].bias.data.fill_(3e38)
    model.save_pretrained(begin)
    settings = dict.fromkeys(["model_size", "config_overrides"]) | {"per_device_train_batch_size": "2"}
    settings |= {"logging_steps": "3", "checkpointing_steps": "2"}
    result = train(tmp_path / "run", "--model_name_or_path", str(begin), **settings)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "the loss of step 1 is not finite" in result.stderr
    assert result.stderr.count("synthetic/training/") == 4  # the four pairs of that step
    samples = torch.load(tmp_path / "run" / "not_finite_step_1.pt")
    assert samples["pixel_values"].shape == (4, 2, 3, 64, 72) and samples["number"] == [0, 1, 2, 3]
    assert not (tmp_path / "run" / "model.safetensors").exists() and not list((tmp_path / "run").glob("checkpoint-*"))


def test_changed_settings_are_refused_by_name(whole, tmp_path):
    output_dir = tmp_path / "run"
    assert train(output_dir, **SETTINGS | {"max_train_steps": "2", "validation_sets": None}).returncode == 0
    changed = {"max_train_steps": "3", "seed": "5", "crop_size": "64 64", "synthetic_num_pairs": "8"}
    resume = ["--resume_from_checkpoint", "latest"]
    result = train(output_dir, *resume, **SETTINGS | changed)
    assert result.returncode == 1 and "--allow_config_changes" in result.stderr
    for difference in ("seed: 1234 -> 5", "crop_size: [64, 72] -> [64, 64]", "max_train_steps: 2 -> 3",
                       "num_pairs: {synthetic: 7} -> {synthetic: 8}"):  # fmt: skip
        assert difference in result.stderr
    free = {"max_train_steps": "2", "per_device_train_batch_size": "1", "dataloader_num_workers": "0"}
    assert train(output_dir, *resume, **SETTINGS | free | {"logging_steps": "2"}).returncode == 0
    # With leave to change, they take effect: also far beyond the schedule that the checkpoint was saved with.
    changed |= {"max_train_steps": "110", "learning_rate": "7e-4", "validation_sets": None, "num_flow_updates": "1"}
    changed |= {"checkpointing_steps": "1000"}
    allowed = train(output_dir, *resume, "--allow_config_changes", **SETTINGS | changed)
    assert allowed.returncode == 0, allowed.stderr
    schedule = make_schedule(torch.optim.AdamW([torch.zeros(1)]), 7e-4, 110)
    expected = []
    for _ in range(110):
        expected.append(schedule.get_last_lr()[0])
        schedule.step()
    assert [line["learning_rate"] for line in log_lines(output_dir)][2:] == expected[2:]
