"""A run under way: what its parts share, what is done with it between its steps, and how its failures are handled."""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.distributed import DistError
from torch.optim.lr_scheduler import OneCycleLR

from flow_data.out_of_memory import explain_out_of_memory, is_out_of_memory
from flow_data.sampling import TrainingPairs
from flow_training.checkpoints import ResumeError, RunProgress, list_checkpoints, resume_command, save_checkpoint
from flow_training.config import TrainingConfig
from flow_training.data import WORKER, DataError, describe_dead_worker, save_samples
from flow_training.evaluation import EvaluationInterrupted, Protocol, draw_sets, evaluate_sets
from flow_training.logger import MetricLogger, NotFiniteError, NothingLearnedError
from flow_training.model_card import RunRecord, write_model_folder
from flow_training.ops.signals import StopRequest, TrainingInterrupted
from flow_training.ops.uploads import Uploads
from flow_training.processes import describe_devices, unwrap
from modeling_raft import RaftForOpticalFlow

PROG = "train_flow.py"


@dataclass
class Run:
    """What the parts of a run share; it does nothing by itself."""

    config: TrainingConfig
    settings: dict[str, Any]  # the `resume_settings` that checkpoints are saved with
    checkpoint: Path | None  # to resume from
    accelerator: Accelerator
    pairs: TrainingPairs
    validation: list[tuple[str, Any, Protocol]]
    model: Any  # prepared
    optimizer: Any  # prepared
    schedule: OneCycleLR
    progress: RunProgress
    lineage: list[str]  # of `flow_training.model_card.read_lineage`
    stop: StopRequest
    logger: MetricLogger
    uploads: Uploads | None = None  # on the main process, where the model is pushed
    start: float = field(default_factory=time.perf_counter)
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)  # of the last validation
    reports_step: int = 0  # at which the last validation was


def published_model(run: Run) -> RaftForOpticalFlow:
    """The model that is validated and published: the average of the weights with `ema_decay`, else the weights."""
    ema = run.progress.ema
    return unwrap(run.accelerator, run.model) if ema is None else ema.model


def run_record(run: Run) -> RunRecord:
    """What the run has done so far, for its model card."""
    return RunRecord(
        run_config=run.config.to_dict(),
        step=run.progress.step,
        seconds=time.perf_counter() - run.start,
        device=describe_devices(run.accelerator),
        reports=run.reports if run.reports_step == run.progress.step else {},
        lineage=run.lineage,
    )


def describe_run(run: Run) -> str:
    """Describe what a run is about to do, so that a wrong setting is seen before days are spent on it.

    Returns:
        Lines on model, data, batch arithmetic, precision and devices.
    """
    config, pairs, accumulation_steps = run.config, run.pairs, run.accelerator.gradient_accumulation_steps
    model = unwrap(run.accelerator, run.model)
    samples = config.max_train_steps * config.total_batch_size
    start = config.model_name_or_path or "random weights"
    frozen = ", BatchNorm frozen" if config.freeze_batch_norm else ""
    mix = [f"{source.name}: {len(source.dataset):,} pairs x {source.repeats}" for source in pairs.sources]
    per_micro_batch, processes = config.per_device_train_batch_size, run.accelerator.num_processes
    done = f", of which {run.progress.step:,} are done" if run.progress.step else ""
    lines = [
        f"model       RAFT {config.model_size}, {model.num_parameters():,} parameters, from {start}{frozen}",
        f"data        {'; '.join(mix)}: an epoch is {len(pairs):,} samples",
        f"batch       {config.total_batch_size} pairs a step = {per_micro_batch} a micro-batch x {accumulation_steps} "
        f"micro-batches x {processes} process{'es' if processes > 1 else ''}",
        f"steps       {config.max_train_steps:,}{done}: {samples:,} samples, {samples / len(pairs):.1f} epochs "
        f"of {config.crop_size[0]} x {config.crop_size[1]} crops",
        f"precision   {config.mixed_precision}, on {describe_devices(run.accelerator)}",
    ]
    if config.ema_decay is not None:
        lines.append(f"EMA         of the weights, decay {config.ema_decay}: validated and saved as the final model")
    if run.validation:
        sets = "; ".join(f"{name}: {len(dataset):,} pairs" for name, dataset, _ in run.validation)
        lines.append(f"validation  {sets}: every {config.validation_steps:,} steps and at the end")
    if config.push_to_hub:
        when = "at each checkpoint and at the end" if config.hub_strategy == "every_save" else "at the end"
        private = ", private if it is new" if config.hub_private_repo else ""
        lines.append(f"hub         {config.hub_model_id}{private}: {when}")
    return "\n".join(lines)


def save(run: Run) -> None:
    """Save a checkpoint of this step."""
    limit = run.config.checkpoints_total_limit
    save_checkpoint(run.accelerator, Path(run.config.output_dir), run.progress.step, limit, run.settings)


def save_and_stop(run: Run) -> NoReturn:
    """Save a checkpoint of this step, and raise `TrainingInterrupted`."""
    received = run.stop.stop_requested()
    assert received is not None
    save(run)
    raise TrainingInterrupted(received)


def validate(run: Run) -> None:
    """Evaluate on every validation set, and log the results.

    Raises:
        TrainingInterrupted: A signal was received. A checkpoint is saved, and the run that resumes from it begins with
            this validation.
        DataError: A pair cannot be read.
    """
    model = published_model(run)
    run.progress.validation_due = True
    try:
        run.reports = evaluate_sets(model, run.validation, run.accelerator, run.stop.stop_requested)
        run.reports_step = run.progress.step
    except EvaluationInterrupted:
        save_and_stop(run)
    except (ValueError, OSError) as error:
        raise DataError(f"validation: {error}. Fix the file, or leave the set out of validation_sets") from error
    run.logger.log_validation(run.reports)
    run.progress.validation_due = False
    if run.logger.takes_images:
        images = draw_sets(model, run.validation, run.accelerator)
        run.logger.log_images({f"validation/{name}": image for name, image in images.items()})


def upload(run: Run) -> None:
    """Start to push the weights of this step in the background."""
    if run.uploads is not None:
        step, model = run.progress.step, published_model(run)
        description = f"Step {step} of {run.config.max_train_steps}"
        run.uploads.start(step, description, lambda folder: write_model_folder(folder, model, run_record(run)))


def handle_failure(error: Exception, run: Run | None, config: TrainingConfig, argv: list[str]) -> NoReturn:
    """End the program after an exception: the one place where errors become messages.

    Args:
        error: As it was caught. One that has no explanation is raised again, with its traceback.
        run: None where the run was still being set up.
        config: The settings as they were given.
        argv: The command line, for the command that resumes the run.

    Raises:
        SystemExit: With a message; or with 128 and the number of the signal, as shells report it, after
            `TrainingInterrupted`.
    """
    output_dir = Path(config.output_dir)
    if run is None:
        message = str(error) if isinstance(error, (ValueError, OSError)) and not is_out_of_memory(error) else None
        if message is not None:
            sys.exit(f"{PROG}: error: {message}")
    else:
        run.logger.bar.close()
        if isinstance(error, TrainingInterrupted):
            if run.accelerator.is_main_process:
                saved = f"{error}: step {run.progress.step} is saved."
                print(f"{saved} {resume_command(argv, output_dir)}", file=sys.stderr)
            run.accelerator.wait_for_everyone()
            run.accelerator.end_training()
            sys.exit(128 + error.signal)
        message = describe_failure(error, run)
        # Only one process may have found what is wrong with data or files.
        alone = (DataError, ResumeError, OSError)
        if message is not None and not run.accelerator.is_main_process and not isinstance(error, alone):
            sys.exit(1)
        if isinstance(error, (ResumeError, NothingLearnedError)):  # resuming would end in the same way
            sys.exit(f"{PROG}: error: {message}")
    message = message or explain_out_of_memory(error, "the training", advise_on_memory(config))
    if message is None:
        raise error
    sys.exit(f"{PROG}: error: {message}\n{resume_command(argv, output_dir)}")


def describe_failure(error: Exception, run: Run) -> str | None:
    """Save what can be saved, and describe what ended the training; None if memory ran out or nobody foresaw it."""
    if isinstance(error, NotFiniteError):
        suspects = gather_object(error.indices)
        if not run.accelerator.is_main_process:
            return ""
        path, ids = save_samples(run.pairs, suspects, Path(run.config.output_dir), error.step)
        return (
            f"{error}; its pairs: {', '.join(ids)}, as they were trained on in {path}. Checkpoints are unchanged. "
            "Check these pairs; if they are sound, lower the learning rate or train without fp16."
        )
    if isinstance(error, DataError):
        if run.accelerator.num_processes > 1 or run.progress.step == 0:  # the others would have to take part
            return str(error)
        run.logger.reduce_metrics()
        save(run)
        return f"{error} Step {run.progress.step} is saved."
    if is_out_of_memory(error):
        return None
    if isinstance(error, DistError) or "gloo" in str(error):
        return "another process of this run has ended; its message is the reason."
    if isinstance(error, (NothingLearnedError, ResumeError, OSError)):
        return str(error)
    return describe_dead_worker(error) if WORKER in str(error) else None


def advise_on_memory(config: TrainingConfig) -> str:
    """Say what needs less memory than a run's settings, and which step is saved."""
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
