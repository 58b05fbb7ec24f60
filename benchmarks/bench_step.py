"""Where the time of a training step goes: waiting for data, forward pass with loss, backward pass, the rest.

    python -m benchmarks.bench_step --config configs/finetune_small.yaml --data_root datasets [--flag value ...]

All flags are train_flow.py's. The steps are the first ones of that run, taken by its own loop, data workers included;
nothing is logged, validated or kept. The first steps, in which workers start and memory is taken, are left out.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

import train_flow
from flow_training.config import parse_config
from flow_training.data import make_batches
from flow_training.objectives import OBJECTIVES
from flow_training.run import Run

WARM_UP = 3
STEPS = 30
PHASES = ("data", "forward", "backward", "rest")
NEVER = str(10**9)


class PhaseTimes:
    """Seconds of each step, by phase. A step lasts from the end of the one before to the call of `end_step`."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.steps: list[list[float]] = []
        self._spent = dict.fromkeys(PHASES[:-1], 0.0)
        self._start = self.now()

    def now(self) -> float:
        """Seconds, once the device has finished all its work."""
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, phase: str, function: Callable) -> Callable:
        """The function, its calls timed as part of a phase."""

        def call(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                self._spent[phase] += self.now() - start

        return call

    def end_step(self) -> None:
        now = self.now()
        spent = list(self._spent.values())
        self.steps.append([*spent, now - self._start - sum(spent)])
        self._spent, self._start = dict.fromkeys(self._spent, 0.0), now


def measure(run: Run, num_steps: int) -> list[list[float]]:
    """Take steps of a run, and return the seconds of each, by phase."""
    times = PhaseTimes(run.accelerator)
    objective = OBJECTIVES[run.config.objective]
    OBJECTIVES[run.config.objective] = objective._replace(compute=times.timed("forward", objective.compute))
    run.accelerator.backward = times.timed("backward", run.accelerator.backward)  # type: ignore[method-assign]
    end_step = run.logger.end_step

    def end_timed_step(*args: Any) -> None:
        end_step(*args)
        times.end_step()

    run.logger.end_step = end_timed_step  # type: ignore[method-assign, assignment]

    def timed_batches(batches: Iterable[Any]) -> Iterator[Any]:
        get_batch = times.timed("data", iter(batches).__next__)
        for _ in range(num_steps * run.accelerator.gradient_accumulation_steps):
            yield get_batch()

    batches = make_batches(run.config, run.pairs, 0, run.accelerator)
    train_flow.train(run, timed_batches(batches))
    return times.steps


def main() -> None:
    with ExitStack() as resources:
        folder = resources.enter_context(tempfile.TemporaryDirectory())
        keep_nothing = ["--output_dir", folder, "--report_to", "none", "--validation_sets", "--no_push_to_hub"]
        keep_nothing += ["--checkpointing_steps", NEVER, "--logging_steps", NEVER]
        config = parse_config([*sys.argv[1:], *keep_nothing])
        try:
            run = train_flow.set_up(config, resources)
        except (ValueError, OSError) as error:
            sys.exit(f"bench_step: error: {error}")
        config = run.config
        if run.accelerator.num_processes > 1:
            sys.exit("bench_step: error: it measures one process")
        measured = np.array(measure(run, min(WARM_UP + STEPS, config.max_train_steps))[WARM_UP:])
    total = measured.sum(1)
    quarter, median, three_quarters = np.percentile(total, (25, 50, 75))
    print("| phase | s, median | share |\n|---|---:|---:|")
    for phase, seconds in zip(PHASES, np.median(measured, axis=0), strict=True):
        print(f"| {phase} | {seconds:.3f} | {seconds / median:.1%} |")
    print(f"| step | {median:.3f} ({quarter:.3f} to {three_quarters:.3f}) | |")
    height, width = config.crop_size
    print(
        f"\n{len(measured)} steps of {config.total_batch_size} pairs of {height} x {width}, {config.num_flow_updates} "
        f"updates, precision {config.mixed_precision}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
