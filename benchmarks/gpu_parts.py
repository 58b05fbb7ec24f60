"""What bench_gpu.py measures, a function for each part: it reports rows as it goes, until its time is over.

On a GPU, every part has the sizes that people use, and on a CPU `tiny` ones that try the code. Rows are dictionaries
with `part`; a case that fails is a row with `failed`, and the others continue.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.candidates import Candidate, in_precision, make_pairs
from benchmarks.floor import CountWork, count_work, floor_seconds, measure_ceilings
from benchmarks.rounds import spread, time_in_rounds, times_as_fast

Row = dict[str, Any]
ROUNDS = 9
SECONDS_A_CASE = 6.0  # of rounds, once there are three
KERNELS = 10  # in a profile


@dataclass
class Bench:
    """The inputs of a benchmark part: its device, its limits and where its rows go.

    Attributes:
        device: Where it computes.
        tiny: Take sizes that a CPU computes in seconds.
        report: Takes a row.
        deadline: On the clock of `time.monotonic`; no case begins after it.
        ceilings: Of `floor.measure_ceilings`; empty before they are measured.
    """

    device: torch.device
    tiny: bool
    report: Callable[[Row], None]
    deadline: float
    ceilings: dict[str, float]

    def time_is_over(self) -> bool:
        return time.monotonic() > self.deadline

    def size(self, height: int, width: int) -> tuple[int, int]:
        return (128, 136) if self.tiny else (height, width)

    def number(self, value: int) -> int:
        return min(value, 2) if self.tiny else value


def measure(
    bench: Bench,
    part: str,
    candidates: Sequence[Candidate],
    make_call: Callable[[Candidate], Callable[[], Tensor]],
    facts: Row,
    result_to_compare: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Report a row for each candidate: seconds in interleaved rounds, peak memory, the difference from the first."""
    calls: dict[str, Callable[[], Tensor]] = {}
    rows: dict[str, Row] = {}
    reference: Tensor | None = None
    for candidate in candidates:
        row: Row = {"part": part, "candidate": candidate.name} | facts
        try:
            start = time.monotonic()
            call = make_call(candidate)
            result, row["peak_gb"] = with_peak(call, bench.device)
            row["first_seconds"] = time.monotonic() - start  # with compilation
            if "graph" in candidate.options:
                row["peak_gb"] = None  # was taken when the graph was recorded
            if result_to_compare is not None:
                compared = result_to_compare(result).float().cpu()
                reference = compared if reference is None else reference
                difference = (compared - reference).abs()
                row |= {"mean_px": difference.mean().item(), "largest_px": difference.max().item()}
            calls[candidate.name], rows[candidate.name] = call, row
            del result
        except Exception as error:  # memory that is out, above all: the others continue
            bench.report(row | {"failed": describe(error)})
    seconds = time_in_rounds(calls, ROUNDS, bench.device, SECONDS_A_CASE)
    for name, taken in seconds.items():
        peers = {other: times_as_fast(taken, seconds[other]) for other in seconds if other.startswith("torchvision")}
        bench.report(rows[name] | {"seconds": spread(taken), "times_as_fast": peers})


def with_peak(call: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float | None]:
    """The result of a call, and the memory that it took at its peak, in GB above what was there."""
    if device.type != "cuda":
        return call(), None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    return result, (torch.cuda.max_memory_allocated() - before) / 1e9


def describe(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def report_floors(
    bench: Bench, part: str, facts: Row, precisions: Sequence[str], work: Callable[[str], CountWork]
) -> None:
    """Report the floor of each precision."""
    for precision in precisions:
        counted = work(precision)
        row: Row = {"part": part, "candidate": f"floor {precision}"} | facts
        row |= {"tera_operations": sum(counted.operations.values()) / 1e12, "gb": counted.bytes / 1e9}
        bench.report(row | {"floor_seconds": floor_seconds(counted, precision, bench.ceilings)})


def several(library: str, size: str, precisions: Sequence[str], *options: str) -> list[Candidate]:
    return [Candidate(library, size, precision, options) for precision in precisions]


# ---- The parts ----


def ceilings(bench: Bench) -> None:
    """What the device can do at its best."""
    measured = measure_ceilings(bench.device, *((256, 2**22) if bench.tiny else (8192, 2**32)))
    bench.report({"part": "ceilings"} | measured)


def inference(bench: Bench) -> None:
    """Pairs a second beside torchvision, both models, in all precisions; small batches also as a CUDA graph."""
    every, singles = ("fp32", "tf32", "fp16", "bf16"), ("fp32", "tf32")
    cases: list[tuple[str, tuple[int, int], int, int, Sequence[str], bool]] = [
        # size, height and width, updates, batch, torchvision's precisions, CUDA graphs
        ("large", (440, 1024), 12, 1, every, True),
        ("small", (440, 1024), 12, 1, every, True),
        ("large", (440, 1024), 12, 8, every, False),
        ("large", (1088, 1920), 12, 1, singles, True),
        ("large", (440, 1024), 32, 1, singles, True),
        ("small", (440, 1024), 12, 8, singles, False),
        ("small", (1088, 1920), 12, 1, singles, False),
        ("large", (1088, 1920), 32, 1, singles, False),
        ("small", (440, 1024), 32, 1, singles, False),
        ("small", (1088, 1920), 12, 8, (), False),
        ("large", (1088, 1920), 12, 8, (), False),
    ]
    for size, (height, width), updates, batch, peers, graphs in cases[: 3 if bench.tiny else None]:
        if bench.time_is_over():
            return
        height, width = bench.size(height, width)
        updates, batch = bench.number(updates), bench.number(batch)
        facts = {"size": size, "height": height, "width": width, "num_flow_updates": updates, "batch": batch}
        candidates = several("torchvision", size, peers) + several("ours", size, every)
        if graphs and bench.device.type == "cuda":
            candidates += several("ours", size, ("tf32", "fp16", "bf16"), "dense", "graph")
        pixel_values = make_pairs(batch, height, width)[0].to(bench.device)
        call = lambda c: c.inference(pixel_values, updates)  # noqa: B023, E731
        measure(bench, "inference", candidates, call, facts, lambda flow: flow)
        if batch == 1:
            # The plain way, for which nothing is recomputed: what every version has to do.
            work = lambda p: count_work(Candidate("ours", size, p, ("dense",)).inference(pixel_values, updates))  # noqa: B023, E731
            report_floors(bench, "inference", facts, every, work)


def compiled_inference(bench: Bench) -> None:
    """Inference compiled by torch.compile, beside the candidates that are not compiled."""
    cases = [("small", 1, ("bf16",)), ("large", 1, ("bf16",)), ("large", 8, ("bf16",))]
    height, width = bench.size(440, 1024)
    for size, batch, precisions in cases[: 1 if bench.tiny else None]:
        if bench.time_is_over():
            return
        batch, updates = bench.number(batch), bench.number(12)
        facts = {"size": size, "height": height, "width": width, "num_flow_updates": updates, "batch": batch}
        candidates = several("torchvision", size, ("fp32", "tf32")) + several("ours", size, precisions)
        candidates += several("ours", size, precisions, "compiled")
        if bench.device.type == "cuda":
            candidates += several("ours", size, precisions, "compiled", "graph")
        pixel_values = make_pairs(batch, height, width)[0].to(bench.device)
        call = lambda c: c.inference(pixel_values, updates)  # noqa: B023, E731
        measure(bench, "compiled inference", candidates, call, facts, lambda flow: flow)


TRAINING_SIZES = [("chairs", (368, 496), 8), ("things", (400, 720), 5)]  # configs/*_mixed.yaml: crop, batch


def training(bench: Bench) -> None:
    """Forward, loss and backward of the recipes' batches, with and without activation checkpointing."""
    for recipe, size, batch in TRAINING_SIZES[: 1 if bench.tiny else None]:
        if bench.time_is_over():
            return
        images, labels, facts = training_batch(bench, recipe, size, batch)
        updates = facts["num_flow_updates"]
        precisions = training_precisions(bench, "fp32", "tf32", "fp16", "bf16")
        candidates = several("torchvision", "large", precisions) + several("ours", "large", precisions)
        candidates += several("ours", "large", precisions[1:], "checkpointing")
        if bench.device.type == "cuda":
            candidates += several("ours", "large", ("tf32", "fp16", "bf16"), "graph")
        call = lambda c: c.training_step(images, labels, updates)  # noqa: B023, E731
        measure(bench, "training", candidates, call, facts)
        work = lambda p: count_work(Candidate("ours", "large", p, ("dense",)).training_step(images, labels, updates))  # noqa: B023, E731
        report_floors(bench, "training", facts, precisions, work)


def compiled_training(bench: Bench) -> None:
    """A training step compiled by torch.compile, beside the candidates that are not compiled."""
    images, labels, facts = training_batch(bench, *TRAINING_SIZES[0])
    candidates = several("torchvision", "large", training_precisions(bench, "fp16") or ("bf16",))
    candidates += several("ours", "large", ("bf16",)) + several("ours", "large", ("bf16",), "compiled")
    call = lambda c: c.training_step(images, labels, facts["num_flow_updates"])  # noqa: E731
    measure(bench, "compiled training", candidates, call, facts)


def training_precisions(bench: Bench, *names: str) -> tuple[str, ...]:
    """Return the precisions to measure training in.

    Tiny trials leave out TF32, which a CPU lacks, and fp16, with which training did not end in time on a CPU.
    """
    return tuple(name for name in names if not (bench.tiny and name in ("tf32", "fp16")))


def training_batch(bench: Bench, recipe: str, size: tuple[int, int], batch: int) -> tuple[Tensor, Tensor, Row]:
    height, width = bench.size(*size)
    batch, updates = bench.number(batch), bench.number(12)
    images, labels = (tensor.to(bench.device) for tensor in make_pairs(batch, height, width))
    facts = {"recipe": recipe, "height": height, "width": width, "num_flow_updates": updates, "batch": batch}
    return images, labels, facts


def on_demand(bench: Bench) -> None:
    """Correlation on demand beside the dense way, where the volume is large and where it does not fit."""
    for height, width, precision in ((1088, 1920, "tf32"), (1088, 1920, "bf16"), (2176, 3840, "tf32")):
        if bench.time_is_over():
            return
        height, width = bench.size(height, width)
        updates = bench.number(12)
        facts = {"height": height, "width": width, "num_flow_updates": updates, "batch": 1}
        pixel_values = make_pairs(1, height, width)[0].to(bench.device)
        candidates = [Candidate("ours", "large", precision, (way,)) for way in ("dense", "on_demand")]
        call = lambda c: c.inference(pixel_values, updates)  # noqa: B023, E731
        measure(bench, "on demand", candidates, call, facts, lambda flow: flow)


def video(bench: Bench) -> None:
    """Frames a second of FlowVideo, beside torchvision's model on each pair."""
    from flow_inference import FlowVideo
    from flow_inference.cuda_graphs import SWITCH

    height, width = bench.size(436, 1024)
    frames = moving_frames(height, width, count=4 if bench.tiny else 13)
    ways: dict[str, dict[str, Any]] = {
        "pair by pair, as the model is": {"warm_start": False},
        "as it is (bf16 where quick)": {},
        "float32": {"mixed_precision": "no"},
        "as it is, with CUDA graphs": {},
        "float32, with CUDA graphs": {"mixed_precision": "no"},
    }
    for size in ("large", "small"):
        if bench.time_is_over():
            return
        model: Any = Candidate("ours", size).make_model().to(bench.device).eval()
        peer = Candidate("torchvision", size, "tf32").make_model().to(bench.device).eval()
        updates = bench.number(12)

        def run_peer() -> None:
            with torch.no_grad(), in_precision("tf32", bench.device):
                for frame1, frame2 in zip(frames[:-1], frames[1:], strict=True):
                    images = (as_input(frame, bench.device) for frame in (frame1, frame2))
                    peer(*images, num_flow_updates=updates)[-1].cpu()  # noqa: B023

        def run(name: str, options: dict[str, Any]) -> None:
            os.environ[SWITCH] = "1" if "graphs" in name else "0"
            for pair in FlowVideo(model, frames, num_flow_updates=updates, **options):  # noqa: B023
                pair.flow.cpu()

        calls: dict[str, Callable[[], Any]] = {"torchvision tf32": run_peer}
        calls |= {name: lambda name=name, options=options: run(name, options) for name, options in ways.items()}  # type: ignore[misc]
        seconds = time_in_rounds(calls, 3, bench.device)
        for name, taken in seconds.items():
            rates = [(len(frames) - 1) / second for second in taken]
            row: Row = {"part": "video", "size": size, "candidate": name, "height": height, "width": width}
            times = times_as_fast(taken, seconds["torchvision tf32"])
            bench.report(row | {"frames_per_second": spread(rates), "times_as_fast": {"torchvision tf32": times}})


def moving_frames(height: int, width: int, count: int) -> list[np.ndarray]:
    """A texture that moves by 3 and 2 pixels a frame, `(height, width, 3)` uint8 each."""
    coarse = make_pairs(1, 8 * (height // 8) + 64, 8 * (width // 8) + 64)[0][0, 0]
    texture = ((coarse + 1) * 127.5).byte().permute(1, 2, 0).numpy()
    return [np.ascontiguousarray(texture[2 * i : 2 * i + height, 3 * i : 3 * i + width]) for i in range(count)]


def as_input(frame: np.ndarray, device: torch.device) -> Tensor:
    """A frame as torchvision's model takes it, padded to a multiple of 8 by repeating its edges."""
    from flow_inference.estimator import InputPadder

    return InputPadder(*frame.shape[:2]).pad(frame, device)


def loader(bench: Bench) -> None:
    """Pairs a second of the loader with 8 workers, and the phases of the steps that it feeds."""
    import train_flow
    from benchmarks import bench_step
    from flow_training.config import parse_config
    from flow_training.data import make_batches

    workers, batches, steps = (1, 3, 5) if bench.tiny else (8, 60, 33)
    recipe = Path(__file__).resolve().parents[1] / "configs/pretrain_synthetic_small.yaml"
    with ExitStack() as resources:
        folder = resources.enter_context(tempfile.TemporaryDirectory())
        never = str(10**9)
        flags = ["--config", str(recipe), "--output_dir", folder, "--report_to", "none", "--validation_sets"]
        flags += ["--dataloader_num_workers", str(workers), "--checkpointing_steps", never, "--logging_steps", never]
        if bench.tiny:
            flags += ["--synthetic_image_size", "136", "144", "--crop_size", "128", "136", "--total_batch_size", "2"]
            flags += ["--num_flow_updates", "2"]
        run = train_flow.set_up(parse_config(flags), resources)
        config = run.config
        facts: Row = {"part": "loader", "workers": workers}
        facts |= {"crop": list(config.crop_size), "batch": config.total_batch_size}
        taken = list(arrivals(make_batches(config, run.pairs, 0, run.accelerator), batches))
        # The first ones were prepared while the workers started, as many as they keep ready.
        rates = config.total_batch_size / statistics.mean(taken[len(taken) // 3 :])
        bench.report(facts | {"candidate": "loader alone", "pairs_per_second": rates})
        if bench.time_is_over():
            return
        phases = np.array(bench_step.measure(run, steps)[bench_step.WARM_UP :])
        names = dict(zip(bench_step.PHASES, np.median(phases, axis=0).tolist(), strict=True))
        step = float(np.median(phases.sum(1)))
        row = facts | {"candidate": "training", "phases": names, "step_seconds": step}
        bench.report(row | {"pairs_per_second": config.total_batch_size / step})


def arrivals(batches: Any, count: int) -> Iterator[float]:
    """Seconds between the batches."""
    last = time.perf_counter()
    for _ in islice(batches, count):
        now = time.perf_counter()
        yield now - last
        last = now


def profile(bench: Bench) -> None:
    """Which kernels one inference and one training step spend their time in."""
    height, width = bench.size(440, 1024)
    pixel_values = make_pairs(1, height, width)[0].to(bench.device)
    images, labels, facts = training_batch(bench, *TRAINING_SIZES[0])
    updates = facts["num_flow_updates"]
    candidate = Candidate("ours", "large", "bf16", ("dense",))
    calls = {
        "inference": (candidate.inference(pixel_values, updates), (1, height, width)),
        "training": (
            candidate.training_step(images, labels, updates),
            (facts["batch"], facts["height"], facts["width"]),
        ),
    }
    for name, (call, shape) in calls.items():
        for _ in range(2):
            call()
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if bench.device.type == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=kinds) as profiler:
            call()
            if bench.device.type == "cuda":
                torch.cuda.synchronize()
        on_device = [event for event in profiler.key_averages() if event.device_type.name.lower() == bench.device.type]
        spent = "self_device_time_total" if bench.device.type == "cuda" else "self_cpu_time_total"
        total = sum(getattr(event, spent) for event in on_device)
        top = sorted(on_device, key=lambda event: -getattr(event, spent))[:KERNELS]
        bench.report(
            {
                "part": "profile",
                "candidate": f"{name}, {candidate.name}",
                "shape": list(shape),
                "total_ms": total / 1000,
                "launches": sum(event.count for event in on_device),
                "kernels": [(event.key[:80], getattr(event, spent) / 1000, event.count) for event in top],
            }
        )


# In the order of their worth: what the time does not suffice for is at the end. Seconds that each may take.
PARTS: dict[str, tuple[Callable[[Bench], None], float]] = {
    "ceilings": (ceilings, 60),
    "inference": (inference, 110),
    "training": (training, 80),
    "profile": (profile, 30),
    "on_demand": (on_demand, 40),
    "loader": (loader, 90),
    "video": (video, 40),
    "compiled_inference": (compiled_inference, 120),
    "compiled_training": (compiled_training, 150),
}
