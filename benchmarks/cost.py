"""Memory and time of one candidate, alone in a process of its own."""

from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.candidates import Candidate, make_pairs
from benchmarks.options import open_device
from benchmarks.own_process import in_new_process, peak_bytes, resident_bytes
from benchmarks.rounds import seconds_of


@dataclass(frozen=True)
class Job:
    """What a process is to do: `calls` times the same, on the same images.

    Attributes:
        task: `inference` or `training`: forward, loss and backward.
        enough_seconds: No further call that counts once those before it took so long together.
    """

    candidate: Candidate
    task: str
    batch: int
    height: int
    width: int
    num_flow_updates: int
    calls: int = 2
    device: str = "cpu"
    enough_seconds: float = float("inf")


@dataclass(frozen=True)
class Cost:
    """What a job took.

    Attributes:
        first_gb: Peak memory of the first call, in 1e9 bytes: on a GPU what PyTorch gave out, else what the process
            had, above what it had when everything was imported.
        peak_gb: The same of all calls.
        seconds: Of each call but the first, or of that one if there is no other.
        flow: `(B, 2, H, W)`, pixels, to compare with others'.
        loss: Of the last training step.
    """

    first_gb: float
    peak_gb: float
    seconds: list[float]
    flow: np.ndarray
    loss: float | None


def measure(job: Job) -> Cost | None:
    """The cost of a job, or None if memory does not suffice for it."""
    try:
        return in_new_process(run_job, job)
    except (BrokenProcessPool, torch.OutOfMemoryError):
        return None
    except RuntimeError as error:
        if "not enough memory" in str(error) or "can't allocate memory" in str(error):
            return None
        raise


def run_job(job: Job) -> Cost:
    """What `measure` lets a new process do."""
    device = open_device(job.device)
    if device.type == "cuda":
        torch.zeros(1, device=device)  # the context is no tensor, but it may take memory when it is made
    before = _memory_in_use(device)
    pixel_values, labels = (tensor.to(device) for tensor in make_pairs(job.batch, job.height, job.width))
    if job.task == "training":
        call = job.candidate.training_step(pixel_values, labels, job.num_flow_updates)
    else:
        call = job.candidate.inference(pixel_values, job.num_flow_updates)

    results: list[torch.Tensor] = []

    def keep_result() -> None:
        results[:] = [call()]

    first = seconds_of(keep_result, device)
    first_peak = _peak_memory(device)
    seconds: list[float] = []
    while len(seconds) < job.calls - 1 and sum(seconds) < job.enough_seconds:
        seconds.append(seconds_of(keep_result, device))
    peak = _peak_memory(device)

    flow, loss = results[0], None
    if job.task == "training":  # what follows is no part of the step
        loss = flow.item()
        flow = job.candidate.inference(pixel_values, job.num_flow_updates)()
    return Cost(
        first_gb=(first_peak - before) / 1e9,
        peak_gb=(peak - before) / 1e9,
        seconds=seconds or [first],
        flow=flow.float().cpu().numpy(),
        loss=loss,
    )


def _memory_in_use(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return resident_bytes()


def _peak_memory(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_bytes()
