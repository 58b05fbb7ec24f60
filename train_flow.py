"""Train or fine-tune RAFT.

accelerate launch train_flow.py --config configs/NAME.yaml [--flag value ...]
"""

import dataclasses
import logging
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import (
    DataLoaderConfiguration,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
    set_seed,
)
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from flow_data.sampling import RunSampler, TrainingPairs, collate, prepare_worker
from flow_training import hub
from flow_training.checkpoints import (
    RunProgress,
    load_checkpoint,
    load_settings,
    save_checkpoint,
    set_aside_later_checkpoints,
)
from flow_training.config import TrainingConfig, accumulation_steps, nearest, parse_config
from flow_training.data import training_pairs, validation_sets
from flow_training.evaluation import Protocol, check_precision, draw_sets, evaluate_sets
from flow_training.metrics import error_sums, ratios
from flow_training.optimization import make_optimizer, make_schedule
from flow_training.run_dir import RunLock, check_same_run, choose_checkpoint, sees_token
from flow_training.run_log import RunLog
from flow_training.step_sums import STEP_SUMS, NotFiniteError, StepSums
from flow_training.stopping import StopRequest
from flow_training.summary import describe_run
from modeling_raft import RaftConfig, RaftForOpticalFlow, RaftOutput
from modeling_raft.convert_raft_checkpoint import load_raft

WORKER = "DataLoader worker"  # in the errors that torch raises of them
UPLOAD_FAILED = 3  # exit code: the training itself went well


class DataError(RuntimeError):
    """A pair could not be read, or the process that read it died, between two steps."""


@dataclass
class Run:
    """A run under way, and what is done with it now and then."""

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
    replaced: list[str] = field(default_factory=list)  # what was wrong with pairs in whose place others were taken
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)  # of the last validation

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    def look(self) -> None:
        """Take over the figures of the steps so far. Until here, nothing waits for the device."""
        mean, total = (partial(self.accelerator.reduce, reduction=reduction) for reduction in ("mean", "sum"))
        for row in self.step_sums.flush(self.progress.step, mean, total):
            self.progress.sums += row  # one by one: the sum must not depend on when one looks
        if self.config.skip_bad_samples:
            for fault in gather_object(self.replaced):
                if fault not in self.progress.bad_samples and self.accelerator.is_main_process:
                    self.bar.write(f"step {self.progress.step}: took another pair for a bad one: {fault}")
                self.progress.bad_samples[fault] = self.progress.bad_samples.get(fault, 0) + 1
            self.replaced.clear()

    def write(self, figures: dict[str, float]) -> None:
        """Send figures of this step to the log and the trackers."""
        self.accelerator.log(figures, step=self.progress.step)
        if self.log is not None:
            self.log.write({"step": self.progress.step, **figures})

    def validate(self) -> None:
        """Evaluate on every validation set, and show it."""
        model, step = unwrap(self.accelerator, self.model), self.progress.step
        self.reports = evaluate_sets(model, self.validation, self.accelerator)
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
            epe, zero = report["metrics"]["epe"], report["zero_flow_epe"]
            self.bar.write(f"step {step}: {name} epe {epe:.3f} px (zero flow: {zero:.3f})")
        if "tensorboard" in [tracker.name for tracker in self.accelerator.trackers]:
            writer = self.accelerator.get_tracker("tensorboard", unwrap=True)
            for name, picture in draw_sets(model, self.validation, self.accelerator).items():
                writer.add_image(f"validation/{name}", picture, step, dataformats="HWC")

    def save(self) -> None:
        """Save a checkpoint of this step."""
        limit = self.config.checkpoints_total_limit
        save_checkpoint(self.accelerator, self.output_dir, self.progress.step, limit, self.settings)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    config = parse_config(argv)
    lock = None
    # Whatever is wrong with settings, files or tokens shows here, before the first step, in one line.
    try:
        accelerator, config = make_accelerator(config)
        output_dir = Path(config.output_dir)
        lock = RunLock(output_dir) if accelerator.is_main_process else None
        require_shared_folder(output_dir, lock, accelerator)
        checkpoint = choose_checkpoint(output_dir, config.resume_from_checkpoint)
        pairs, validation = training_pairs(config), validation_sets(config)
        settings = config.trajectory({source.name: len(source.dataset) for source in pairs.sources})
        if checkpoint is not None and not config.allow_config_changes:
            check_same_run(checkpoint, load_settings(checkpoint), settings)
        set_seed(config.seed)
        model = make_model(config)
        repo_id = create_repository(config, accelerator)
    except (ValueError, OSError) as error:
        if lock is not None:
            lock.leave_no_trace()
        sys.exit(f"train_flow.py: error: {error}")

    accelerator.wait_for_everyone()  # all have looked before anyone writes
    accelerator.init_trackers("logs")
    optimizer = make_optimizer(model.parameters(), config.learning_rate, config.weight_decay)
    schedule = make_schedule(optimizer, config.learning_rate, config.max_train_steps)
    progress = RunProgress(len(STEP_SUMS))
    prepared, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(schedule, progress)
    if checkpoint is not None:
        load_checkpoint(accelerator, checkpoint)
    accelerator.wait_for_everyone()
    log = None
    if accelerator.is_main_process:
        log = RunLog(output_dir, progress.step)
        set_aside_later_checkpoints(output_dir, progress.step)
        counts = {name: len(dataset) for name, dataset, _ in validation}
        passes, devices = accelerator.gradient_accumulation_steps, describe_devices(accelerator)
        print(describe_run(config, model, pairs, counts, passes, devices, progress.step))
    bar = tqdm(
        total=config.max_train_steps, initial=progress.step, unit="step", disable=not accelerator.is_main_process
    )
    step_sums = StepSums(loss_scaled=accelerator.scaler is not None)
    run = Run(config, settings, accelerator, prepared, pairs, validation, progress, log, bar, step_sums)

    started = time.perf_counter()
    try:
        train(run, optimizer, schedule, argv)
        if accelerator.is_main_process:
            seconds = time.perf_counter() - started
            model, devices = unwrap(accelerator, prepared), describe_devices(accelerator)
            hub.write_run(output_dir, model, config.to_dict(), run.reports, seconds, devices)
            print(f"weights, model card and log are in {output_dir}")
    except (NotFiniteError, DataError, OSError, RuntimeError) as error:
        bar.close()
        message = explain(error, run)
        if message is None:
            raise
        sys.exit(f"train_flow.py: error: {message}\n{how_to_go_on(argv)}" if accelerator.is_main_process else 1)
    accelerator.end_training()
    if accelerator.is_main_process and repo_id is not None:
        push(output_dir, repo_id, config)
    if lock is not None:
        lock.close()


def train(run: Run, optimizer: Any, schedule: Any, argv: list[str]) -> None:
    """The steps that are left of a run."""
    config, accelerator, model, progress = run.config, run.accelerator, run.model, run.progress
    model.train()
    logged, logged_step = time.perf_counter(), progress.step
    with StopRequest() as stop:
        if progress.validation_due:
            run.validate()
        for batch in watch(make_batches(config, run.pairs, progress.step, accelerator)):
            numbers, _ = batch.pop("number"), batch.pop("id")
            run.replaced += filter(None, batch.pop("replaced"))
            with accelerator.accumulate(model):
                output = model(**batch, num_flow_updates=config.num_flow_updates)
                accelerator.backward(output.loss)
                run.step_sums.add_pass(numbers, output.loss.detach(), training_errors(output, batch, config.max_flow))
                if accelerator.sync_gradients:
                    grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue

            learning_rate = schedule.get_last_lr()[0]
            skipped = accelerator.optimizer_step_was_skipped  # fp16 overflow
            if not skipped:
                schedule.step()  # not prepared: a prepared one steps once per *process*
            step = progress.step = progress.step + 1
            run.step_sums.end_step(grad_norm, skipped)
            run.bar.update()

            last = step == config.max_train_steps
            logging_now = step % config.logging_steps == 0
            validating = bool(run.validation) and (step % config.validation_steps == 0 or last)
            saving = step % config.checkpointing_steps == 0
            stopping = stop.agreed()
            if logging_now or validating or saving or stopping or last:
                run.look()
            if logging_now:
                pairs_per_second = (step - logged_step) * config.total_batch_size / (time.perf_counter() - logged)
                figures = log_figures(progress, learning_rate, pairs_per_second)
                run.write(figures)
                run.bar.set_postfix_str(
                    f"loss {figures['loss']:.3f}, epe {figures['epe']:.3f} px, {pairs_per_second:.1f} pairs/s"
                )
                progress.sums.zero_()
                logged, logged_step = time.perf_counter(), step
            if stopping and not last:
                progress.validation_due = validating
                run.save()
                leave(stopping, run, argv)
            paused = time.perf_counter()
            if validating:
                run.validate()
            # Last, so that all lines of the log up to a checkpoint's step are written when it is.
            if saving:
                run.save()
            logged += time.perf_counter() - paused  # neither is training time
    run.bar.close()
    if run.validation and not run.reports:  # a finished run was resumed: its card still needs the figures
        run.reports = evaluate_sets(unwrap(accelerator, model), run.validation, accelerator)


# ---- before ----


def make_accelerator(config: TrainingConfig) -> tuple[Accelerator, TrainingConfig]:
    """The accelerator, and the settings with everything resolved that depends on the machine."""
    known, installed = ({str(name) for name in names} for names in (LOGGER_TYPE_TO_CLASS, get_available_trackers()))
    for name in config.report_to:
        if name not in known | {"none", "all"}:
            raise ValueError(f"report_to: there is no tracker {name}{nearest(name, sorted(known))}")
        if name not in installed | {"none", "all"}:
            raise ValueError(f"report_to: {name} is not installed; there are {', '.join(sorted(installed)) or 'none'}")
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=None if config.report_to == ["none"] else config.report_to,
        project_config=ProjectConfiguration(project_dir=config.output_dir, logging_dir=config.output_dir),
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        step_scheduler_with_optimizer=False,
    )
    check_precision(accelerator)
    if not accelerator.is_main_process:
        logging.getLogger("flow_data").setLevel(logging.ERROR)  # what is missing from the data is said once
    # Only now is the number of processes known.
    per_device, accelerator.gradient_accumulation_steps = accumulation_steps(
        config.total_batch_size, config.per_device_train_batch_size, accelerator.num_processes
    )
    return accelerator, dataclasses.replace(
        config, mixed_precision=accelerator.mixed_precision, per_device_train_batch_size=per_device
    )


def require_shared_folder(output_dir: Path, lock: RunLock | None, accelerator: Accelerator) -> None:
    """Refuse machines with an output_dir each: their parts of a checkpoint would never come together again."""
    if accelerator.num_processes == 1:
        return
    (token,) = broadcast_object_list([None if lock is None else lock.token])
    if not all(gather_object([sees_token(output_dir, str(token))])):
        raise ValueError(
            f"output_dir: {output_dir} is not the same folder for all processes; put it on a file system that all "
            "machines share"
        )


def make_model(config: TrainingConfig) -> RaftForOpticalFlow:
    """The model to train: given weights, or new ones; the run's settings win over those of the weights."""
    overrides = {
        "loss_gamma": config.gamma,
        "loss_max_flow": config.max_flow,
        "freeze_batch_norm": config.freeze_batch_norm,
        "num_flow_updates": config.num_flow_updates,
    }
    if config.model_name_or_path is not None:
        model = load_raft(config.model_name_or_path, **overrides)
    else:
        known = RaftConfig().to_dict()
        for name in config.config_overrides:
            if name not in known:
                raise ValueError(f"config_overrides: RaftConfig has no field {name}")
        make_config = RaftConfig.small if config.model_size == "small" else RaftConfig
        try:
            model = RaftForOpticalFlow(make_config(**{**config.config_overrides, **overrides}))
        except StrictDataclassError as error:
            raise ValueError(f"config_overrides: {error}") from error
    smallest = model.config.min_image_size
    if min(config.crop_size) < smallest:
        raise ValueError(f"crop_size must be at least {smallest} with this model; got {config.crop_size}")
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model


def create_repository(config: TrainingConfig, accelerator: Accelerator) -> str | None:
    """The Hub repository's id, on the main process, where the run is pushed."""
    if not config.push_to_hub or not accelerator.is_main_process:
        return None
    model_id = config.hub_model_id or Path(config.output_dir).resolve().name
    return hub.create_repository(model_id, config.hub_token, config.hub_private_repo)


def make_batches(config: TrainingConfig, pairs: TrainingPairs, step: int, accelerator: Accelerator) -> Any:
    """Batches of this process from step to the end of the run."""
    start, stop = step * config.total_batch_size, config.max_train_steps * config.total_batch_size
    loader = DataLoader(
        pairs,
        batch_size=config.per_device_train_batch_size,
        sampler=RunSampler(len(pairs), config.seed, start, stop),
        num_workers=config.dataloader_num_workers,
        collate_fn=collate,
        worker_init_fn=prepare_worker,
        pin_memory=accelerator.device.type == "cuda",
        generator=torch.Generator(),  # else starting workers would move on the random state that dropout draws from
    )
    return accelerator.prepare(loader)


def describe_devices(accelerator: Accelerator) -> str:
    """The hardware, in words for the model card."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    return f"{accelerator.num_processes} x {name}"


# ---- during ----


def watch(batches: Any) -> Iterator[dict[str, Any]]:
    """Batches; what is wrong with a sample, or kills a worker, is raised as a `DataError`."""
    try:
        for batch in batches:
            # Workers run by now, and torch has set a handler that raises their death wherever the run happens to be,
            # in the middle of a checkpoint too. Without it, the DataLoader notices when it waits for the next batch.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            if "error" in batch:
                raise DataError(
                    f"{'; '.join(batch['error'])}. Mend or remove the file, or let other pairs take the place of bad "
                    "ones: --skip_bad_samples"
                )
            yield batch
    except (
        RuntimeError,
        ConnectionError,
        EOFError,
    ) as error:  # a worker may die handing over
        if isinstance(error, DataError) or (isinstance(error, RuntimeError) and WORKER not in str(error)):
            raise
        raise DataError(describe_dead_worker(error)) from error


def training_errors(output: RaftOutput, batch: dict[str, Tensor], max_flow: float) -> Tensor:
    """Error sums of the last prediction, over the pixels that the loss counts."""
    counted = batch["valid"] & (torch.linalg.vector_norm(batch["labels"], dim=1) < max_flow)
    return error_sums(output.flow.detach(), batch["labels"], counted).sum(0)


def log_figures(progress: RunProgress, learning_rate: float, pairs_per_second: float) -> dict[str, float]:
    """Means since the last line of the log; the learning rate is that of the last step."""
    steps, loss, grad_norm, skipped, *errors = progress.sums.tolist()
    figures = ratios(torch.tensor(errors, dtype=torch.float64))
    figures.pop("fl_all")
    bad = sum(progress.bad_samples.values())
    return {
        "loss": loss / steps,
        "learning_rate": learning_rate,
        "grad_norm": grad_norm / max(steps - skipped, 1),
        **figures,
        **({"skipped_steps": skipped} if skipped else {}),
        **({"bad_samples": bad} if bad else {}),
        "pairs_per_second": pairs_per_second,
    }


def unwrap(accelerator: Accelerator, model: Any) -> RaftForOpticalFlow:
    """The model itself, out of what distributes or compiles it."""
    return accelerator.unwrap_model(model, keep_torch_compile=False)


# ---- after, or when something went wrong ----


def leave(received: signal.Signals, run: Run, argv: list[str]) -> NoReturn:
    """End the process after a signal, with the exit code that shells give it."""
    run.bar.close()
    if run.accelerator.is_main_process:
        print(f"{received.name}: step {run.progress.step} is saved. {how_to_go_on(argv)}", file=sys.stderr)
    run.accelerator.wait_for_everyone()
    sys.exit(128 + received)


def how_to_go_on(argv: list[str]) -> str:
    """The command that resumes this run, without secrets."""
    words = list(argv)
    for index, word in enumerate(words):
        if word == "--hub_token" and index + 1 < len(words):
            words[index + 1] = "TOKEN"
        elif word.startswith("--hub_token="):
            words[index] = "--hub_token=TOKEN"
    command = shlex.join(["accelerate", "launch", "train_flow.py", *words, "--resume_from_checkpoint", "auto"])
    return f"Go on with:  {command}"


def explain(error: Exception, run: Run) -> str | None:
    """What ended a run, in words, after saving what can be saved; None for what nobody foresaw."""
    if isinstance(error, NotFiniteError):
        suspects = gather_object(error.numbers)
        if not run.accelerator.is_main_process:
            return ""
        path, ids = save_samples(run.pairs, suspects, run.output_dir, error.step)
        return (
            f"{error}; its pairs: {', '.join(ids)}, as they were trained on in {path}. Checkpoints are as they were. "
            "Look at these pairs; if they are sound, lower the learning rate or train without fp16."
        )
    if isinstance(error, DataError):
        if run.accelerator.num_processes > 1:  # the others would have to take part
            return str(error)
        run.look()
        run.save()
        return f"{error} Step {run.progress.step} is saved."
    if isinstance(error, OSError):
        return str(error)
    return describe_dead_worker(error) if WORKER in str(error) else None


def describe_dead_worker(error: Exception) -> str:
    return (
        f"a process that prepares pairs died: {error} Most often memory ran out: give fewer --dataloader_num_workers."
    )


def save_samples(pairs: TrainingPairs, numbers: list[int], output_dir: Path, step: int) -> tuple[Path, list[str]]:
    """Save samples of a step for inspection, drawn anew: they follow from their numbers. Returns file and ids."""
    keys = [next(iter(RunSampler(len(pairs), pairs.seed, number, number + 1))) for number in sorted(numbers)]
    batch = collate([pairs[key] for key in keys])
    path = output_dir / f"not_finite_step_{step}.pt"
    torch.save(batch, path)
    return path, batch["id"]


def push(output_dir: Path, repo_id: str, config: TrainingConfig) -> None:
    """Upload; what fails here costs no work."""
    try:
        print(f"pushed: {hub.push_run(output_dir, repo_id, config.hub_token)}")
    except Exception as error:  # whatever it is: the weights are safe, and the user should know how to go on
        print(
            f"train_flow.py: error: training is done and {output_dir} is whole, but the upload to {repo_id} failed: "
            f"{error}\nUpload it later with:  hf upload {repo_id} {output_dir} . "
            "--exclude 'checkpoint-*' --exclude 'logs/*'",
            file=sys.stderr,
        )
        sys.exit(UPLOAD_FAILED)


if __name__ == "__main__":
    main()
