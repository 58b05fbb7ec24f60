"""Real training on the device: fp16 that overflows, kills, two processes, and steps that never wait for the device."""

import os
import signal
import subprocess
import sys
import time
import warnings
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from test_mixed_precision import WatchedScaler, expected_scales
from tiny_run import CPU, PROJECT, flags, free_port, log_lines

import train_flow
from benchmarks import bench_step
from flow_training import processes
from flow_training.data import make_batches
from flow_training.objectives import OBJECTIVES
from flow_training.run_log import read_log

pytestmark = pytest.mark.gpu
STEPS = 8
SETTINGS = {"max_train_steps": str(STEPS), "checkpointing_steps": "2", "dataloader_num_workers": "1"}
PROGRAM = str(PROJECT / "tests/gpu/train_here.py")


def environment(device: torch.device) -> dict[str, str]:
    return dict(os.environ) | ({} if device.type == "cuda" else CPU)


def start(device: torch.device, output_dir: Path, *switches: str, processes: int = 1, **settings) -> subprocess.Popen:
    """Start a run in processes of its own, which share one GPU."""
    launch = []
    if processes > 1:
        launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(free_port())]
    return subprocess.Popen(
        [sys.executable, *launch, PROGRAM, *flags(output_dir, *switches, **settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(device) | {"PYTHONPATH": os.pathsep.join([str(PROJECT), *sys.path])},
        cwd=PROJECT,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> None:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


# ---- fp16 ----


@pytest.fixture
def run_in_float16(device, monkeypatch):
    """train_flow.py in this process with a loss scale that is far too high; on a CPU, fp16 is put there."""
    make_accelerator = train_flow.make_accelerator
    if device.type == "cpu":
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        monkeypatch.setattr(processes, "check_precision", lambda accelerator: None)

    def run(output_dir: Path, **settings: str) -> WatchedScaler:
        AcceleratorState._reset_state(reset_partial_state=True)
        scaler = WatchedScaler(init_scale=2.0**24, device=device.type)

        def make(config):
            accelerator, config = make_accelerator(config)
            assert accelerator.mixed_precision == "fp16" and accelerator.device.type == device.type
            accelerator.native_amp, accelerator.scaler = True, scaler
            return accelerator, config

        monkeypatch.setattr(train_flow, "make_accelerator", make)
        train_flow.main(flags(output_dir, mixed_precision="fp16", per_device_train_batch_size="2", **settings))
        return scaler

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


def test_steps_that_overflow_in_float16_are_skipped_and_the_schedule_stands_still(run_in_float16, tmp_path):
    num_steps = 24
    scaler = run_in_float16(tmp_path, max_train_steps=str(num_steps), ema_decay="0.9", checkpointing_steps="24")
    scales, learning_rates, changed = zip(*scaler.steps, strict=True)
    assert len(changed) == num_steps and changed.count(True) > 6 and changed.count(False) > 1, scaler.steps
    assert list(scales) == expected_scales(changed)
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=3e-4)
    schedule = train_flow.make_schedule(optimizer, 3e-4, num_steps)
    for learning_rate, taken in zip(learning_rates, changed, strict=True):
        assert learning_rate == schedule.get_last_lr()[0]
        if taken:
            optimizer.step()
            schedule.step()
    lines = log_lines(tmp_path)
    assert [line.get("skipped_steps", 0) for line in lines] == [0 if taken else 1 for taken in changed]
    progress = torch.load(tmp_path / f"checkpoint-{num_steps}" / "custom_checkpoint_1.pkl", map_location="cpu")
    assert progress["ema"]["num_updates"] == changed.count(True)


# ---- CUDA graphs ----


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_run_with_cuda_graphs_is_the_run_without(precision, cuda, tmp_path):
    """With BatchNorm that trains, clipping, a moving average and a validation in the middle.

    Biases before a normalization have no gradient but rounding, of which AdamW makes whole steps: weights are compared
    all together, and later steps less exactly.
    """
    settings = {"max_train_steps": "6", "mixed_precision": precision, "model_size": "large", "ema_decay": "0.9"}
    settings |= {"validation_sets": "synthetic", "validation_steps": "3", "config_overrides": "{correlation: dense}"}
    finish(start(cuda, tmp_path / "graphs", "--cuda_graphs", **settings))
    finish(start(cuda, tmp_path / "plain", **settings))
    for ours, expected in zip(*(log_lines(tmp_path / name) for name in ("graphs", "plain")), strict=True):
        assert ours.keys() == expected.keys() and ours["step"] == expected["step"]
        print(precision, {name: (ours[name], expected[name]) for name in ours.keys() & {"loss", "grad_norm", "epe"}})
        limit = 1e-3 if ours["step"] == 1 else 0.03
        for name in ours.keys() & {"loss", "grad_norm", "epe", "validation/synthetic/epe"}:
            assert ours[name] == pytest.approx(expected[name], rel=limit), name
    ours, theirs = (
        torch.cat([weight.flatten() for _, weight in sorted(load_file(tmp_path / name / "model.safetensors").items())])
        for name in ("graphs", "plain")
    )
    print(f"weights differ by {(ours - theirs).norm() / theirs.norm():.2g} of their norm")
    assert (ours - theirs).norm() < 0.01 * theirs.norm()


# ---- kills and processes ----


def wait_for_step(process: subprocess.Popen, output_dir: Path, step: int) -> None:
    deadline, log = time.monotonic() + 240, output_dir / "train_log.jsonl"
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and any(line["step"] >= step for line in read_log(log)):
            return
        time.sleep(0.01)
    process.kill()
    pytest.fail(f"no step {step}: {process.communicate()[0]}")


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_run_that_is_killed_and_resumed_equals_an_uninterrupted_one(precision, device, tmp_path):
    """Bit by bit, as torch's algorithms are the deterministic ones."""
    settings = SETTINGS | {"mixed_precision": precision}
    whole = start(device, tmp_path / "whole", **settings)
    killed = start(device, tmp_path / "killed", **settings)
    wait_for_step(killed, tmp_path / "killed", 3)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "killed/model.safetensors").exists()
    finish(start(device, tmp_path / "killed", "--resume_from_checkpoint", "auto", **settings))
    finish(whole)
    assert log_lines(tmp_path / "killed") == log_lines(tmp_path / "whole")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("killed", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_two_processes_on_one_device_are_one_run(device, tmp_path):
    """The same losses as of one process, to rounding; gradients are added up over gloo."""
    settings = SETTINGS | {"max_train_steps": "4"}
    finish(start(device, tmp_path / "two", "--freeze_batch_norm", processes=2, **settings))
    finish(start(device, tmp_path / "one", "--freeze_batch_norm", **settings))
    assert "2 x" in (tmp_path / "two/README.md").read_text()
    two, one = (log_lines(tmp_path / name) for name in ("two", "one"))
    assert [line["step"] for line in two] == [1, 2, 3, 4]
    for ours, theirs in zip(two, one, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


# ---- waiting ----


@pytest.mark.parametrize(("precision", "reads"), [("no", 0), ("bf16", 0), ("fp16", 1)])
@pytest.mark.parametrize("options", [[], ["--gradient_checkpointing"]])
def test_a_step_does_not_wait_for_the_device(precision, reads, options, cuda, tmp_path):
    """From the batch to the next one, nothing is read from the GPU; in fp16 one number is: was the step skipped?"""
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = {"max_train_steps": "8", "logging_steps": "100", "ema_decay": "0.9"}
    settings |= {"mixed_precision": precision, "config_overrides": "{correlation: dense}", "model_size": "large"}
    config = train_flow.parse_config(flags(tmp_path, *options, **settings))

    def watched(batches):
        """Watch five steps, with the copy of the batch to the GPU; the first ones allocate, the last one logs."""
        for index, batch in enumerate(batches):
            torch.cuda.set_sync_debug_mode("warn" if 2 <= index < 7 else "default")
            yield batch

    with ExitStack() as resources, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resources.callback(torch.cuda.set_sync_debug_mode, "default")
        run = train_flow.set_up(config, resources)
        train_flow.resume(run)
        train_flow.train(run, watched(make_batches(run.config, run.pairs, 0, run.accelerator)))
        waits = [f"{item.filename}:{item.lineno}" for item in caught if "synchronizing CUDA" in str(item.message)]
    AcceleratorState._reset_state(reset_partial_state=True)
    assert len(waits) == 5 * reads, "\n".join(waits)
    assert all("optimization.py" in place for place in waits), waits


def test_the_loader_keeps_the_device_busy(device, on_gpu, tmp_path, monkeypatch):
    """A step of a recipe waits for data for less than a quarter of its time, with 8 workers."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setitem(OBJECTIVES, "supervised", OBJECTIVES["supervised"])  # the benchmark replaces it by a timed one
    settings = {"max_train_steps": "6", "logging_steps": "1000", "validation_sets": None}
    steps = 6
    if on_gpu:
        steps = 25
        settings |= {"synthetic_image_size": "384 512", "crop_size": "368 496", "total_batch_size": "10"}
        settings |= {"model_size": "large", "config_overrides": None, "num_flow_updates": "12"}
        settings |= {"dataloader_num_workers": "8", "max_train_steps": str(steps), "mixed_precision": "bf16"}
    else:
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        settings |= {"dataloader_num_workers": "2", "num_flow_updates": "24"}
    config = train_flow.parse_config(flags(tmp_path, **settings))
    with ExitStack() as resources:
        run = train_flow.set_up(config, resources)
        measured = torch.tensor(bench_step.measure(run, steps))[bench_step.WARM_UP :]
    AcceleratorState._reset_state(reset_partial_state=True)
    share = (measured[:, 0].sum() / measured.sum()).item()
    print(f"waiting for data: {share:.1%} of {measured.sum(1).median():.3f} s a step")
    assert share < 0.25
