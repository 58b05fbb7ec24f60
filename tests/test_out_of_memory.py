"""Running out of memory is one line with what was attempted and what helps, in every program, for every library."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from forked_process import run_code
from PIL import Image
from test_modeling_raft import tiny_config
from tiny_run import environment, flags, log_lines, train

from flow_data import sampling
from flow_data.out_of_memory import attempt, explain_out_of_memory, is_out_of_memory
from flow_data.sampling import MixSource, TrainingPairs
from modeling_raft import RaftForOpticalFlow

HUGE = 10**15  # more than the address space of a process


def raise_error(error: BaseException):
    raise error


RAISED = {  # what really raises; and what others raise, as they write it
    "torch on the CPU": (lambda: torch.empty(HUGE), "4000000.00 GB"),
    "NumPy": (lambda: np.empty(HUGE), "7.11 PiB"),
    "Python": (lambda: bytearray(HUGE), ""),
    "Pillow": (lambda: Image.new("RGB", (10**9, 1)), ""),
    "torch on Windows": (
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 3000000000 bytes."),
        "3.00 GB",
    ),
    "CUDA": (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity"),
        "20.00 GiB",
    ),
    "CUDA's own": (
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"),
        "CUDA error: out of memory",
    ),
    "cuBLAS": (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "CUBLAS"),
    "MPS": (
        RuntimeError(
            "MPS backend out of memory (MPS allocated: 17.00 GB, other allocations: 1.20 GB, max allowed: 18.13 GB). "
            "Tried to allocate 1.50 GB on private pool. Use PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0 to disable"
        ),
        "1.50 GB",
    ),
    "XPU": (RuntimeError("XPU out of memory. Tried to allocate 2.00 GiB."), "2.00 GiB"),
    "OpenCV": (
        cv2.error(
            "OpenCV(5.0.0) alloc.cpp:73: error: (-4:Insufficient memory) Failed to allocate 2700000000 bytes in "
            "function 'OutOfMemoryError'\n"
        ),
        "2.70 GB",
    ),
    "the kernel": (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "Cannot allocate memory"),
    "a worker": (
        RuntimeError("Caught _ArrayMemoryError in DataLoader worker process 0.\nOriginal Traceback"),
        "worker",
    ),
    "oneDNN": (RuntimeError("could not create a primitive"), "could not create a primitive"),
    "an import": (ImportError("libcv.so: failed to map segment from shared object"), "failed to map segment"),
}


@pytest.mark.parametrize("name", RAISED)
def test_every_kind_is_explained_in_one_line(name):
    action, details = RAISED[name]
    with pytest.raises(BaseException) as caught, attempt("flow of 1 pair(s)"):  # noqa: B017, PT011
        raise_error(action) if isinstance(action, BaseException) else action()
    assert is_out_of_memory(caught.value)
    line = explain_out_of_memory(caught.value, "the prediction", "Use --max_side.")
    assert line.startswith("out of memory in flow of 1 pair(s)") and line.endswith(". Use --max_side."), line
    assert details in line and len(line.splitlines()) == 1


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"),
        RuntimeError("could not create a primitive descriptor for a convolution"),
        RuntimeError("Caught ValueError in DataLoader worker process 0."),
        ValueError("frames must be 436 x 1024; got 375 x 1242"),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        cv2.error("OpenCV(5.0.0) resize.cpp:4: error: (-215:Assertion failed) !ssize.empty() in function 'resize'"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_other_errors_are_not_touched(error):
    with pytest.raises(type(error)) as caught, attempt("flow of 1 pair(s)"):
        raise error
    assert caught.value is error and not hasattr(error, "__notes__")
    assert explain_out_of_memory(error, "the prediction", "Use --max_side.") is None


def test_causes_count_and_the_innermost_attempt_is_named():
    """Who reads files calls whatever happens a damaged file."""
    with pytest.raises(ValueError, match="is damaged") as caught, attempt("the training"), attempt("a step"):
        try:
            np.empty(HUGE)
        except MemoryError as error:
            raise ValueError("a.png is damaged") from error
    line = explain_out_of_memory(caught.value, "the program", "Use less.")
    assert line == "out of memory in a step (an allocation of 7.11 PiB failed). Use less."
    assert (
        explain_out_of_memory(MemoryError(), "the program", "Use less.") == "out of memory in the program. Use less."
    )


def test_running_out_of_memory_is_not_taken_for_a_bad_pair(monkeypatch):
    """Another in its place would hide it; and it would be another run."""

    def to_sample(row, needs_flow):
        raise ValueError("a.png is damaged") from MemoryError()

    monkeypatch.setattr(sampling, "to_sample", to_sample)
    pairs = TrainingPairs([MixSource("mine", [{"id": "a"}], 1, lambda *sample: sample)], 0, skip_bad=True)
    with pytest.raises(MemoryError):
        pairs[0, 0]


# ---- real processes ----

LIMITED = """
import resource, sys, torch, {module}
import accelerate, flow_inference.outputs, flow_training.evaluation, modeling_raft.convert_raft_checkpoint
torch.ones(8, 8) @ torch.ones(8, 8)  # what libraries keep for themselves
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = size + int(sys.argv[1]) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
{module}.main(sys.argv[2:])
"""


def run_limited(module: str, megabytes: int, *argv: object) -> subprocess.CompletedProcess:
    """A program in a process that may take no more than so many megabytes after its imports."""
    return run_code(LIMITED.format(module=module), [megabytes, *argv], environment())


def write_frames(folder: Path, count: int) -> list[Path]:
    folder.mkdir()
    paths = [folder / f"{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        frame = np.random.default_rng(number).integers(0, 256, (1000, 1504, 3), np.uint8)
        Image.fromarray(frame).save(path, compress_level=0)
    return paths


def error_line(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if ": error: " in line]
    return line


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    RaftForOpticalFlow(tiny_config()).save_pretrained(folder)
    return folder


needs_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a limit that allocators see is Linux's")


@needs_proc
@pytest.mark.slow
def test_prediction(tiny_model, tmp_path):
    paths, output = write_frames(tmp_path / "frames", 2), tmp_path / "flow.flo"
    line = error_line(run_limited("predict_flow", 500, "--model", tiny_model, *paths, "--output", output))
    assert line.startswith("predict_flow.py: error: out of memory in ") and "1000 x 1504 px" in line
    assert "--max_side" in line and '"correlation": "on_demand"' in line
    assert not output.exists()


@needs_proc
@pytest.mark.slow
def test_evaluation(tiny_model, tmp_path):
    report = tmp_path / "report.json"
    argv = ["--model", tiny_model, "--dataset", "synthetic", "--synthetic_image_size", 640, 960]
    argv += ["--synthetic_num_pairs", 2, "--batch_size", 2, "--num_flow_updates", 3, "--output", report]
    line = error_line(run_limited("evaluate_flow", 400, *argv))
    assert line.startswith("evaluate_flow.py: error: out of memory in flow of 2 pair(s) of 640 x 960 px images with 3")
    assert "--batch_size 2" in line and "--mixed_precision bf16" in line
    assert not report.exists()


@needs_proc
@pytest.mark.slow
def test_smoothing(tiny_model, tmp_path):
    write_frames(tmp_path / "frames", 3)
    np.save(tmp_path / "maps.npy", np.zeros((3, 8, 8), np.float32))
    argv = ["--model", tiny_model, "--frames", tmp_path / "frames", "--maps", tmp_path / "maps.npy"]
    result = run_limited("examples.temporal_smoothing", 500, *argv, "--output", tmp_path / "smooth.npy")
    line = error_line(result)
    assert line.startswith("temporal_smoothing.py: error: out of memory in ") and "1000 x 1504 px" in line
    assert "--max_side" in line and "--window" in line


@needs_proc
@pytest.mark.slow
def test_the_first_step_of_a_training(tmp_path):
    argv = flags(tmp_path / "run", crop_size="512 512", synthetic_image_size="520 520", num_flow_updates="12")
    line = error_line(result := run_limited("train_flow", 500, *argv))
    assert line.startswith(
        "train_flow.py: error: out of memory in a pass of 4 pair(s) of 512 x 512 px with 12 updates"
    )
    for flag in ("--per_device_train_batch_size", "--gradient_checkpointing", "--mixed_precision bf16", "--crop_size"):
        assert flag in line
    assert "No step is saved yet" in line and "Resume with:  accelerate launch" in result.stderr


SETTINGS = {"checkpointing_steps": "2", "max_train_steps": "6"}
INTERRUPTED = """
import sys, numpy, torch, train_flow
from flow_data import sampling
from modeling_raft import RaftForOpticalFlow

forward, to_sample, calls = RaftForOpticalFlow.forward, sampling.to_sample, []

def run_out(*arguments, **options):
    calls.append(1)
    if len(calls) == {at_call}:
        {allocation}
    return {function}(*arguments, **options)

{place} = run_out
train_flow.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    result = train(folder, "--gradient_checkpointing", **SETTINGS)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "function", "allocation", "at_call", "workers", "printed", "saved"),
    [
        ("RaftForOpticalFlow.forward", "forward", "torch.empty(10**15)", 4, "0", "a pass of 4 pair(s) of 64 x 72", 2),
        ("sampling.to_sample", "to_sample", "numpy.empty(10**15)", 17, "1", "--dataloader_num_workers", 3),
    ],
    ids=["model", "worker"],
)
def test_a_later_step_of_a_training(whole, place, function, allocation, at_call, workers, printed, saved, tmp_path):
    """What is saved is printed, and with more memory the run ends as if nothing had happened."""
    settings = SETTINGS | {"dataloader_num_workers": workers}
    argv = flags(tmp_path / "run", "--gradient_checkpointing", **settings)
    code = INTERRUPTED.format(place=place, function=function, allocation=allocation, at_call=at_call)
    line = error_line(result := run_code(code, argv, environment()))
    assert "out of memory" in line and printed in line and f"Step {saved} is saved." in line
    assert "--gradient_checkpointing" not in line and "Resume with:" in result.stderr

    resumed = train(tmp_path / "run", "--gradient_checkpointing", "--resume_from_checkpoint", "auto", **settings)
    assert resumed.returncode == 0, resumed.stderr
    assert log_lines(tmp_path / "run") == log_lines(whole)


@pytest.mark.slow
def test_running_out_of_memory_is_not_taken_for_a_damaged_checkpoint(whole):
    code = "import sys, torch, train_flow\nfrom accelerate import Accelerator\n"
    code += "Accelerator.load_state = lambda *argv: torch.empty(10**15)\ntrain_flow.main(sys.argv[1:])"
    argv = flags(whole, "--gradient_checkpointing", "--resume_from_checkpoint", "latest", **SETTINGS)
    line = error_line(run_code(code, argv, environment()))
    assert "out of memory in the training" in line and "Step 6 is saved" in line and "remove" not in line
