"""A run under way: what is done with it between its steps, and how it ends when it must."""

import math
import shlex
import signal
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.distributed import DistError
from tqdm.auto import tqdm

from flow_data.out_of_memory import is_out_of_memory
from flow_data.sampling import TrainingPairs
from flow_training.batches import WORKER, DataError, describe_dead_worker, save_samples
from flow_training.checkpoints import RunProgress, list_checkpoints, save_checkpoint
from flow_training.config import TrainingConfig, without_token
from flow_training.evaluation import EvaluationStopped, Protocol, draw_sets, evaluate_sets
from flow_training.metrics import format_metric, ratios
from flow_training.model_card import RunRecord
from flow_training.model_folder import write_model_folder
from flow_training.processes import describe_devices, unwrap
from flow_training.run_log import RunLog
from flow_training.step_sums import STEP_SUMS, NotFiniteError, StepSums
from flow_training.stopping import StopRequest
from flow_training.uploads import Uploads
from modeling_raft import RaftForOpticalFlow

# A run whose ground truth is sparse has steps by chance in which no pixel counts, but never so many in a row.
MAX_STEPS_WITHOUT_TRUTH = 100
COUNT = STEP_SUMS.index("count")


class NothingLearnedError(ArithmeticError):
    """The loss of many steps in a row, or of all, says nothing about the model."""


class Stopped(Exception):
    """A signal has ended the run before its last step; a checkpoint is saved."""

    def __init__(self, received: signal.Signals):
        super().__init__(received.name)
        self.signal = received


@dataclass
class Run:
    """What a run consists of once it has begun."""

    config: TrainingConfig
    settings: dict[str, Any]  # that checkpoints are saved with
    accelerator: Accelerator
    model: Any
    pairs: TrainingPairs
    validation: list[tuple[str, Any, Protocol]]
    progress: RunProgress
    log: RunLog | None  # on the main process
    bar: tqdm
    step_sums: StepSums
    stop: StopRequest
    lineage: list[str]  # what the weights were at first
    uploads: Uploads | None  # on the main process, where the model is pushed
    began: float = field(default_factory=time.perf_counter)
    replaced: list[str] = field(default_factory=list)  # what was wrong with pairs in whose place others were taken
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)  # of the last validation
    reports_step: int = 0  # whose weights they are of

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def published_model(self) -> RaftForOpticalFlow:
        """The model that is validated and published: with `ema_decay` the average of the weights, else the weights."""
        ema = self.progress.ema
        return unwrap(self.accelerator, self.model) if ema is None else ema.model

    def look(self) -> None:
        """Take over the figures of the steps so far. Until here, nothing waits for the device."""
        mean, total = (partial(self.accelerator.reduce, reduction=reduction) for reduction in ("mean", "sum"))
        for row in self.step_sums.flush(self.progress.step, mean, total):
            self.progress.sums += row  # one by one: the sum must not depend on when one looks
            self._require_ground_truth(num_pixels=row[COUNT].item())
        if self.config.skip_bad_samples:
            for fault in gather_object(self.replaced):
                if fault not in self.progress.bad_samples and self.accelerator.is_main_process:
                    self.bar.write(f"step {self.progress.step}: took another pair for a bad one: {fault}")
                self.progress.bad_samples[fault] = self.progress.bad_samples.get(fault, 0) + 1
            self.replaced.clear()

    def _require_ground_truth(self, num_pixels: float) -> None:
        """Stop a run that has nothing to learn from.

        Args:
            num_pixels: Pixels that counted for the loss of a step.

        Raises:
            NothingLearnedError: None has in too many steps in a row, or in any step of a shorter run.
        """
        progress = self.progress
        progress.steps_without_truth = 0 if num_pixels > 0 else progress.steps_without_truth + 1
        if progress.steps_without_truth >= min(MAX_STEPS_WITHOUT_TRUTH, self.config.max_train_steps):
            names = ", ".join(source.name for source in self.pairs.sources)
            raise NothingLearnedError(
                f"there is nothing to learn from: no pixel counted for the loss in {progress.steps_without_truth} "
                f"steps in a row, that is none had valid ground truth below max_flow ({self.config.max_flow:g} px). "
                f"Check the ground truth of {names} with python -m flow_data.preview: is it marked as invalid, or in "
                "another unit than pixels? If the motion is that large, raise --max_flow"
            )

    def log_training(self, learning_rate: float, pairs_per_second: float) -> None:
        """Write the means since the last line of the log; the learning rate is that of the last step."""
        steps, loss, grad_norm, skipped, *errors = self.progress.sums.tolist()
        metrics = ratios(torch.tensor(errors, dtype=torch.float64))
        metrics.pop("fl_all")
        bad = sum(self.progress.bad_samples.values())
        figures = {
            "loss": loss / steps,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm / max(steps - skipped, 1),
            **metrics,
            **({"skipped_steps": skipped} if skipped else {}),
            **({"bad_samples": bad} if bad else {}),
            "pairs_per_second": pairs_per_second,
        }
        self.write(figures)
        epe = format_metric(figures["epe"])
        self.bar.set_postfix_str(f"loss {figures['loss']:.3f}, epe {epe} px, {pairs_per_second:.1f} pairs/s")
        self.progress.sums.zero_()

    def write(self, figures: dict[str, float]) -> None:
        """Send figures of this step to the log and the trackers."""
        existing = {name: value for name, value in figures.items() if math.isfinite(value)}
        self.accelerator.log(existing, step=self.progress.step)
        if self.log is not None:
            self.log.write({"step": self.progress.step, **figures})

    def validate(self) -> None:
        """Evaluate on every validation set, and show it.

        Raises:
            Stopped: A signal came; a checkpoint is saved from which the validation is done first.
        """
        model, step = self.published_model, self.progress.step
        self.progress.validation_due = True
        try:
            self.reports = evaluate_sets(model, self.validation, self.accelerator, self.stop.agreed)
            self.reports_step = step
        except EvaluationStopped:
            self.save_and_stop()
        except (ValueError, OSError) as error:
            raise DataError(f"validation: {error}. Mend the file, or leave the set out of validation_sets") from error
        self.write(
            {
                f"validation/{name}/{metric}": value
                for name, report in self.reports.items()
                for metric, value in report["metrics"].items()
            }
        )
        self.progress.validation_due = False
        if not self.accelerator.is_main_process:
            return
        for name, report in self.reports.items():
            epe, zero = format_metric(report["metrics"]["epe"]), format_metric(report["zero_flow_epe"])
            self.bar.write(f"step {step}: {name} epe {epe} px (zero flow: {zero})")
        if "tensorboard" in [tracker.name for tracker in self.accelerator.trackers]:
            writer = self.accelerator.get_tracker("tensorboard", unwrap=True)
            for name, picture in draw_sets(model, self.validation, self.accelerator).items():
                writer.add_image(f"validation/{name}", picture, step, dataformats="HWC")

    def save(self) -> None:
        """Save a checkpoint of this step."""
        limit = self.config.checkpoints_total_limit
        save_checkpoint(self.accelerator, self.output_dir, self.progress.step, limit, self.settings)

    def record(self) -> RunRecord:
        """What the run has done so far."""
        return RunRecord(
            run_config=self.config.to_dict(),
            step=self.progress.step,
            seconds=time.perf_counter() - self.began,
            device=describe_devices(self.accelerator),
            reports=self.reports if self.reports_step == self.progress.step else {},
            lineage=self.lineage,
        )

    def upload(self) -> None:
        """Begin to push the weights of this step in the background."""
        if self.uploads is None:
            return
        step, model = self.progress.step, self.published_model
        description = f"Step {step} of {self.config.max_train_steps}"
        self.uploads.start(step, description, lambda folder: write_model_folder(folder, model, self.record()))

    def save_and_stop(self) -> None:
        """Save a checkpoint of this step, and raise `Stopped`."""
        received = self.stop.agreed()
        assert received is not None
        self.save()
        raise Stopped(received)

    def explain(self, error: Exception) -> str | None:
        """What ended the run, in words, after saving what can be saved; None for what nobody foresaw."""
        if isinstance(error, NotFiniteError):
            suspects = gather_object(error.numbers)
            if not self.accelerator.is_main_process:
                return ""
            path, ids = save_samples(self.pairs, suspects, self.output_dir, error.step)
            return (
                f"{error}; its pairs: {', '.join(ids)}, as they were trained on in {path}. Checkpoints are as they "
                "were. Look at these pairs; if they are sound, lower the learning rate or train without fp16."
            )
        if isinstance(error, NothingLearnedError):
            return str(error)
        if isinstance(error, DataError):
            if self.accelerator.num_processes > 1 or self.progress.step == 0:  # the others would have to take part
                return str(error)
            self.look()
            self.save()
            return f"{error} Step {self.progress.step} is saved."
        if is_out_of_memory(error):
            return None  # may happen before there is a run, too: see `advise_on_memory`
        if isinstance(error, DistError) or "gloo" in str(error):
            return "another process of this run has ended; what it said is the reason."
        if isinstance(error, OSError):
            return str(error)
        return describe_dead_worker(error) if WORKER in str(error) else None


def advise_on_memory(config: TrainingConfig) -> str:
    """What needs less memory than a run's settings, and which step is saved."""
    flags = []
    if config.per_device_train_batch_size != 1:
        flags.append("a smaller --per_device_train_batch_size (accumulation makes up for it)")
    if not config.gradient_checkpointing:
        flags.append("--gradient_checkpointing")
    if config.mixed_precision in (None, "no"):
        flags.append("--mixed_precision bf16")
    flags.append("a smaller --crop_size")
    validation = "; leave sets of large images out of --validation_sets" if config.validation_sets else ""
    saved = list_checkpoints(Path(config.output_dir))
    step = f"Step {saved[-1].name.rpartition('-')[2]} is saved." if saved else "No step is saved yet."
    return f"Give {', or '.join(flags)}{validation}. {step}"


def how_to_go_on(argv: list[str], output_dir: Path) -> str:
    """The command that resumes a run, without secrets.

    Where nothing has been saved yet, it is the command as it was given: what that one started from must not be lost.
    """
    given = without_token(argv)
    resume = "--resume_from_checkpoint"
    if list_checkpoints(output_dir) or not any(word.startswith(resume) for word in given):
        pairs = list(zip(["", *given], given, strict=False))
        given = [word for before, word in pairs if before != resume and not word.startswith(resume)]
        given += [resume, "auto"]
    return f"Go on with:  {shlex.join(['accelerate', 'launch', 'train_flow.py', *given])}"
