"""Metrics of a run while it trains: kept on the device, reduced over processes, logged."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from flow_training.checkpoints import STEP_TOTALS, RunProgress
from flow_training.config import TrainingConfig
from flow_training.metrics import format_metric
from flow_training.run_log import RunLog

# Halved this often, the scale of 2**16 would let gradients of 2**40 pass: then they are not large but NaN.
MAX_SKIPPED_IN_A_ROW = 40
# A run whose ground truth is sparse has steps by chance in which no pixel counts, but never so many in a row.
MAX_STEPS_WITHOUT_PIXELS = 100


class NotFiniteError(ArithmeticError):
    """The loss or the gradient of a step is not finite.

    Args:
        step: Of the run, from 1.
        what: "loss" or "gradient".
        indices: Indices of this process's samples that may have caused it.
    """

    def __init__(self, step: int, what: str, indices: list[int]):
        super().__init__(f"the {what} of step {step} is not finite")
        self.step, self.what, self.indices = step, what, indices


class NothingLearnedError(ArithmeticError):
    """The run cannot learn: no pixel counted for the loss in many steps in a row, or every step was skipped."""


@dataclass
class _Step:
    """The micro-batches of one optimizer step on this process."""

    indices: list[list[int]] = field(default_factory=list)  # of the samples of each micro-batch
    losses: list[Tensor] = field(default_factory=list)
    totals: list[Tensor] = field(default_factory=list)
    grad_norm: Tensor | None = None
    skipped: bool = False


class PendingSteps:
    """Losses and metrics of steps, kept on the device until they are reduced, because reading them waits for it.

    Args:
        loss_scaled: Whether gradients may overflow, as a scaler skips such steps (fp16).
    """

    def __init__(self, loss_scaled: bool):
        self.loss_scaled = loss_scaled
        self._skipped_in_a_row = 0
        self._steps: list[_Step] = []
        self._open = _Step()
        self._names: list[str] = []

    def add_micro_batch(self, indices: list[int], loss: Tensor, totals: dict[str, Tensor]) -> None:
        """Add a micro-batch of the current step.

        Args:
            indices: Of its samples.
            loss: Scalar, detached.
            totals: Of `flow_training.objectives.ObjectiveOutput`.
        """
        self._names = list(totals)
        self._open.indices.append(indices)
        self._open.losses.append(loss)
        self._open.totals.append(torch.stack(list(totals.values())))

    def end_step(self, grad_norm: Tensor, skipped: bool) -> None:
        """Close the current step.

        Args:
            grad_norm: Scalar, the gradient's norm before clipping.
            skipped: Whether the scaler skipped the step.
        """
        self._open.grad_norm, self._open.skipped = grad_norm, skipped
        self._steps.append(self._open)
        self._open = _Step()

    def reduce(
        self, last_step: int, mean: Callable[[Tensor], Tensor], total: Callable[[Tensor], Tensor]
    ) -> list[dict[str, float]]:
        """Reduce the steps since the last call over all processes.

        Args:
            last_step: Number of the last closed step.
            mean, total: Reduce a tensor over the processes; all of them call these in this order.

        Returns:
            For each step, what it adds to `RunProgress.totals`.

        Raises:
            NotFiniteError: A loss is not finite, or a gradient where nothing skips it, or so many gradients in a row
                that no scale of the loss can help; it is raised on all processes alike.
        """
        steps, self._steps = self._steps, []
        if not steps:
            return []
        losses = mean(torch.stack([torch.stack(step.losses).mean() for step in steps])).tolist()
        totals = total(torch.stack([torch.stack(step.totals).sum(0) for step in steps])).tolist()
        norms = torch.stack([step.grad_norm for step in steps if step.grad_norm is not None]).tolist()
        rows = []
        for index, (step, loss, norm) in enumerate(zip(steps, losses, norms, strict=True)):
            self._skipped_in_a_row = self._skipped_in_a_row + 1 if step.skipped else 0
            overflow_is_normal = self.loss_scaled and self._skipped_in_a_row < MAX_SKIPPED_IN_A_ROW
            if not math.isfinite(loss) or not (overflow_is_normal or math.isfinite(norm)):
                what = "gradient" if math.isfinite(loss) else "loss"
                raise NotFiniteError(last_step - len(steps) + 1 + index, what, _suspects(step, what))
            of_step = (1.0, loss, 0.0 if step.skipped else norm, float(step.skipped))
            rows.append(dict(zip((*STEP_TOTALS, *self._names), (*of_step, *totals[index]), strict=True)))
        return rows


def _suspects(step: _Step, what: str) -> list[int]:
    """Return the samples of the micro-batches whose loss is not finite; for a gradient, all samples of the step."""
    micro_batches = zip(step.indices, step.losses, strict=True)
    return [index for indices, loss in micro_batches if what == "gradient" or not loss.isfinite() for index in indices]


class MetricLogger:
    """Logs the metrics of a run: to train_log.jsonl, to trackers, and to the terminal.

    Args:
        config: The run's settings.
        accelerator: Reduces over the processes, and has the trackers.
        progress: Its step is logged; it holds the totals since the last line.
        source_names: Of the training data, for messages.
    """

    def __init__(
        self, config: TrainingConfig, accelerator: Accelerator, progress: RunProgress, source_names: list[str]
    ):
        self.config, self.accelerator, self.progress = config, accelerator, progress
        self.source_names = source_names
        self.pending = PendingSteps(loss_scaled=accelerator.scaler is not None)
        self.run_log: RunLog | None = None
        self.bar = tqdm(disable=True)
        self._replaced: list[str] = []  # what was wrong with pairs that were replaced, since the last reduction
        self._last_line = time.perf_counter(), progress.step

    def start(self, run_log: RunLog | None) -> None:
        """Start the progress bar and the clock, at the step that `progress` has now.

        Args:
            run_log: On the main process, the log to append to.
        """
        self.run_log, steps, hidden = run_log, self.config.max_train_steps, not self.accelerator.is_main_process
        self.bar = tqdm(total=steps, initial=self.progress.step, unit="step", disable=hidden)
        self._last_line = time.perf_counter(), self.progress.step

    def print(self, line: str) -> None:
        """Print a line above the progress bar; also from another thread."""
        self.bar.write(line)

    def add_micro_batch(self, bookkeeping: dict[str, Any], loss: Tensor, totals: dict[str, Tensor]) -> None:
        """Add a forward pass of the current step.

        Args:
            bookkeeping: `number` and `replaced` of its samples, see `flow_data.sampling.TrainingPairs`.
            loss, totals: As `PendingSteps.add_micro_batch`.
        """
        self._replaced += filter(None, bookkeeping["replaced"])
        self.pending.add_micro_batch(bookkeeping["number"], loss.detach(), totals)

    def end_step(self, grad_norm: Tensor, skipped: bool) -> None:
        """Close the current step; see `PendingSteps.end_step`."""
        self.pending.end_step(grad_norm, skipped)
        self.bar.update()

    def reduce_metrics(self) -> None:
        """Add the metrics of the steps since the last call to the totals. Until then, nothing waits for the device.

        Raises:
            NotFiniteError: See `PendingSteps.reduce`.
            NothingLearnedError: No pixel counted in too many steps in a row, or in any step of a shorter run.
        """
        mean, total = (partial(self.accelerator.reduce, reduction=reduction) for reduction in ("mean", "sum"))
        totals = self.progress.totals
        for row in self.pending.reduce(self.progress.step, mean, total):
            for name, value in row.items():  # step by step: the sum must not depend on how often it is updated
                totals[name] = totals.get(name, 0.0) + value
            self._require_pixels(row["count"])
        if self.config.skip_bad_samples:
            for problem in gather_object(self._replaced):
                if problem not in self.progress.bad_samples and self.accelerator.is_main_process:
                    self.print(f"step {self.progress.step}: took another pair for a bad one: {problem}")
                self.progress.bad_samples[problem] = self.progress.bad_samples.get(problem, 0) + 1
            self._replaced.clear()

    def _require_pixels(self, num_pixels: float) -> None:
        progress, max_steps = self.progress, min(MAX_STEPS_WITHOUT_PIXELS, self.config.max_train_steps)
        progress.steps_without_pixels = 0 if num_pixels > 0 else progress.steps_without_pixels + 1
        if progress.steps_without_pixels >= max_steps:
            names = ", ".join(self.source_names)
            raise NothingLearnedError(
                f"there is nothing to learn from: no pixel counted for the loss in {progress.steps_without_pixels} "
                f"steps in a row, that is none had valid ground truth below max_flow ({self.config.max_flow:g} px). "
                f"Check the ground truth of {names} with python -m flow_data.preview: is it marked as invalid, or in "
                "another unit than pixels? If the motion is that large, raise --max_flow"
            )

    @contextmanager
    def paused_clock(self) -> Iterator[None]:
        """Exclude what happens in this context, such as a validation, from the speed that is logged."""
        start = time.perf_counter()
        yield
        since, step = self._last_line
        self._last_line = since + time.perf_counter() - start, step

    def log_training(self, learning_rate: float) -> None:
        """Log the means since the last line.

        Args:
            learning_rate: Of the last step.
        """
        since, last_step = self._last_line
        pairs = (self.progress.step - last_step) * self.config.total_batch_size
        pairs_per_second = pairs / (time.perf_counter() - since)
        totals = self.progress.totals
        count, skipped = totals["count"], totals["skipped_steps"]
        replaced = sum(self.progress.bad_samples.values())
        metrics = {
            "loss": totals["loss"] / totals["steps"],
            "learning_rate": learning_rate,
            "grad_norm": totals["grad_norm"] / max(totals["steps"] - skipped, 1),
            **{
                name: value / count if count else math.nan
                for name, value in totals.items()
                if name not in (*STEP_TOTALS, "count")
            },
            **({"skipped_steps": skipped} if skipped else {}),
            **({"bad_samples": replaced} if replaced else {}),
            "pairs_per_second": pairs_per_second,
        }
        self.log(metrics)
        epe = f", epe {format_metric(metrics['epe'])} px" if "epe" in metrics else ""
        self.bar.set_postfix_str(f"loss {metrics['loss']:.3f}{epe}, {pairs_per_second:.1f} pairs/s")
        totals.clear()
        self._last_line = time.perf_counter(), self.progress.step

    def log_validation(self, reports: dict[str, dict[str, Any]]) -> None:
        """Log the reports of `flow_training.evaluation`, of each validation set by its name."""
        self.log(
            {
                f"validation/{name}/{metric}": value
                for name, report in reports.items()
                for metric, value in report["metrics"].items()
            }
        )
        for name, report in reports.items() if self.accelerator.is_main_process else ():
            epe, zero = format_metric(report["metrics"]["epe"]), format_metric(report["zero_flow_epe"])
            self.print(f"step {self.progress.step}: {name} epe {epe} px (zero flow: {zero})")

    def log(self, metrics: dict[str, float]) -> None:
        """Log metrics of this step as a line of the log, and those that are finite to the trackers."""
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self.accelerator.log(finite, step=self.progress.step)
        if self.run_log is not None:
            self.run_log.write({"step": self.progress.step, **metrics})

    @property
    def takes_images(self) -> bool:
        """Whether `log_images` shows them anywhere: on the main process, with a tracker that takes images."""
        return self.accelerator.is_main_process and any(map(_takes_images, self.accelerator.trackers))

    def log_images(self, images: dict[str, np.ndarray]) -> None:
        """Log images of this step to every tracker that takes images: name -> `(H, W, 3)` uint8."""
        for tracker in filter(_takes_images, self.accelerator.trackers):
            if tracker.name == "tensorboard":
                batches = {name: image[None] for name, image in images.items()}
                tracker.log_images(batches, step=self.progress.step, dataformats="NHWC")
            elif tracker.name == "trackio":
                import trackio

                tracker.log({name: trackio.Image(image) for name, image in images.items()}, step=self.progress.step)
            elif tracker.name in ("aim", "clearml"):  # one image for each name
                tracker.log_images(images, step=self.progress.step)
            else:  # wandb, swanlab and others: a list of images for each name
                tracker.log_images({name: [image] for name, image in images.items()}, step=self.progress.step)


def _takes_images(tracker: Any) -> bool:
    """Whether a tracker takes images: by accelerate's method, which Trackio's does without."""
    return hasattr(tracker, "log_images") or tracker.name == "trackio"


def start_trackers(accelerator: Accelerator, config: TrainingConfig) -> None:
    """Open the trackers that metrics are sent to, and give them the settings of the run."""
    # accelerate has one name for all of them, and to TensorBoard it is a folder.
    wanted, started = accelerator.log_with, []
    for project, is_folder in (("logs", True), (config.tracker_project_name, False)):
        accelerator.log_with = [name for name in wanted if (str(name) == "tensorboard") == is_folder]
        accelerator.trackers = []  # it starts all that are in it
        accelerator.init_trackers(project)
        started += accelerator.trackers
    accelerator.log_with, accelerator.trackers = wanted, started
    for tracker in accelerator.trackers:
        if tracker.name != "tensorboard":  # it takes only numbers, and makes a separate run of them
            tracker.store_init_configuration(config.to_dict())
