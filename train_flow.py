"""Train or fine-tune RAFT.

accelerate launch train_flow.py --config configs/NAME.yaml [--flag value ...]
"""

import dataclasses
import logging
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, gather_object, set_seed
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from flow_data.sampling import RunSampler, TrainingPairs, use_one_thread
from flow_training import hub
from flow_training.checkpoints import (
    RunProgress,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    set_aside_later_checkpoints,
)
from flow_training.config import TrainingConfig, accumulation_steps, parse_config
from flow_training.data import training_pairs, validation_sets
from flow_training.evaluation import check_precision, evaluate_sets
from flow_training.metrics import ERROR_SUMS, error_sums, ratios
from flow_training.optimization import make_optimizer, make_schedule
from flow_training.run_log import FILE_NAME, RunLog
from modeling_raft import RaftConfig, RaftForOpticalFlow, RaftOutput
from modeling_raft.convert_raft_checkpoint import load_raft

STEP_SUMS = ("steps", "loss", "grad_norm", "skipped_steps", *ERROR_SUMS)  # what adds up between two lines of the log


def main(argv: list[str] | None = None) -> None:
    config = parse_config(argv)
    # Whatever is wrong with settings, files or tokens shows here, before the first step, in one line.
    try:
        accelerator, config = make_accelerator(config)
        output_dir = Path(config.output_dir)
        checkpoint = prepare_output_dir(config, output_dir, accelerator)
        pairs, validation = training_pairs(config), validation_sets(config)
        set_seed(config.seed)
        model = make_model(config)
        repo_id = create_repository(config, accelerator)
    except (ValueError, OSError) as error:
        sys.exit(f"train_flow.py: error: {error}")

    optimizer = make_optimizer(model.parameters(), config.learning_rate, config.weight_decay)
    schedule = make_schedule(optimizer, config.learning_rate, config.max_train_steps)
    progress = RunProgress(len(STEP_SUMS))
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(schedule, progress)
    if checkpoint is not None:
        load_checkpoint(accelerator, checkpoint)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        log = RunLog(output_dir, progress.step)
        set_aside_later_checkpoints(output_dir, progress.step)
    batches = make_batches(config, pairs, progress.step, accelerator)

    model.train()
    reports: dict[str, dict[str, Any]] = {}
    started = logged = time.perf_counter()
    logged_step = progress.step
    micro_batches: list[tuple[list[str], Tensor]] = []  # (ids, loss) of this step so far
    step_errors = torch.zeros(len(ERROR_SUMS), device=accelerator.device)
    bar = tqdm(
        total=config.max_train_steps, initial=progress.step, unit="step", disable=not accelerator.is_main_process
    )
    for batch in batches:
        ids = batch.pop("id")
        with accelerator.accumulate(model):
            output = model(**batch, num_flow_updates=config.num_flow_updates)
            accelerator.backward(output.loss)
            micro_batches.append((ids, output.loss.detach()))
            step_errors += training_errors(output, batch, config.max_flow)
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
                loss, errors = reduce_step(micro_batches, step_errors, accelerator)
                stop_if_not_finite(loss, grad_norm, progress.step + 1, micro_batches, accelerator)
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue

        learning_rate = schedule.get_last_lr()[0]
        skipped = accelerator.optimizer_step_was_skipped  # fp16 overflow
        if not skipped:
            schedule.step()  # not prepared: a prepared one steps once per *process*
        step = progress.step = progress.step + 1
        step_norm = 0.0 if skipped else float(grad_norm)
        progress.sums += torch.tensor([1, loss, step_norm, skipped, *errors], dtype=torch.float64)
        micro_batches.clear()
        step_errors.zero_()
        bar.update()

        if step % config.logging_steps == 0:
            now = time.perf_counter()
            pairs_per_second = (step - logged_step) * config.total_batch_size / (now - logged)
            figures = log_figures(progress.sums, learning_rate, pairs_per_second)
            progress.sums.zero_()
            logged, logged_step = now, step
            bar.set_postfix(loss=f"{figures['loss']:.3f}", epe=f"{figures['epe']:.3f}")
            accelerator.log(figures, step=step)
            if accelerator.is_main_process:
                log.write({"step": step, **figures})
        if validation and (step % config.validation_steps == 0 or step == config.max_train_steps):
            paused = time.perf_counter()
            reports = evaluate_sets(unwrap(accelerator, model), validation, accelerator)
            figures = {
                f"validation/{name}/{metric}": value
                for name, report in reports.items()
                for metric, value in report["metrics"].items()
            }
            accelerator.log(figures, step=step)
            if accelerator.is_main_process:
                log.write({"step": step, **figures})
                for name, report in reports.items():
                    epe, zero = report["metrics"]["epe"], report["zero_flow_epe"]
                    bar.write(f"step {step}: {name} epe {epe:.3f} px (zero flow: {zero:.3f})")
            logged += time.perf_counter() - paused  # validation is not training time
        # Last, so that all lines of the log up to a checkpoint's step are written when it is.
        if step % config.checkpointing_steps == 0:
            save_checkpoint(accelerator, output_dir, step, config.checkpoints_total_limit)
    bar.close()

    if validation and not reports:  # a finished run was resumed: its card still needs the figures
        reports = evaluate_sets(unwrap(accelerator, model), validation, accelerator)

    if accelerator.is_main_process:
        seconds = time.perf_counter() - started
        hub.write_run(
            output_dir, unwrap(accelerator, model), config.to_dict(), reports, seconds, describe_devices(accelerator)
        )
        print(f"weights, model card and log are in {output_dir}")
    accelerator.end_training()
    if accelerator.is_main_process and repo_id is not None:
        push(output_dir, repo_id, config)


def make_accelerator(config: TrainingConfig) -> tuple[Accelerator, TrainingConfig]:
    """The accelerator, and the settings with everything resolved that depends on the machine."""
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=None if config.report_to == "none" else config.report_to,
        project_config=ProjectConfiguration(project_dir=config.output_dir, logging_dir=config.output_dir),
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


def prepare_output_dir(config: TrainingConfig, output_dir: Path, accelerator: Accelerator) -> Path | None:
    """Make the run's folder; returns the checkpoint to go on from."""
    checkpoint = None
    if config.resume_from_checkpoint is not None:
        checkpoint = find_checkpoint(config.resume_from_checkpoint, output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"output_dir: {output_dir} is a file")
    goes_on_here = checkpoint is not None and checkpoint.resolve().parent == output_dir.resolve()
    if not goes_on_here and ((output_dir / FILE_NAME).exists() or list_checkpoints(output_dir)):
        raise ValueError(
            f"{output_dir} holds an earlier run: go on with it (--resume_from_checkpoint latest), "
            "choose another output_dir, or remove it"
        )
    accelerator.wait_for_everyone()  # all have looked before anyone writes
    output_dir.mkdir(parents=True, exist_ok=True)
    accelerator.init_trackers("logs")
    return checkpoint


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
        worker_init_fn=use_one_thread,
        pin_memory=accelerator.device.type == "cuda",
        generator=torch.Generator(),  # else starting workers would move on the random state that dropout draws from
    )
    return accelerator.prepare(loader)


def training_errors(output: RaftOutput, batch: dict[str, Tensor], max_flow: float) -> Tensor:
    """Error sums of the last prediction, over the pixels that the loss counts."""
    counted = batch["valid"] & (torch.linalg.vector_norm(batch["labels"], dim=1) < max_flow)
    return error_sums(output.flow.detach(), batch["labels"], counted).sum(0)


def reduce_step(
    micro_batches: list[tuple[list[str], Tensor]], step_errors: Tensor, accelerator: Accelerator
) -> tuple[float, list[float]]:
    """Loss of an optimizer step (mean) and its error sums, over all its forward passes and processes."""
    loss = torch.stack([loss for _, loss in micro_batches]).mean()
    reduced = accelerator.reduce(torch.cat([loss[None], step_errors]), reduction="sum").tolist()
    return reduced[0] / accelerator.num_processes, reduced[1:]


def stop_if_not_finite(
    loss: float, grad_norm: Tensor, step: int, micro_batches: list[tuple[list[str], Tensor]], accelerator: Accelerator
) -> None:
    """End the run, on all processes, before the optimizer spoils the weights."""
    # With fp16, gradients overflow now and then: the scaler skips the step and tries a smaller scale.
    if math.isfinite(loss) and (accelerator.scaler is not None or math.isfinite(float(grad_norm))):
        return
    what = "gradient" if math.isfinite(loss) else "loss"
    suspects = [
        id_ for ids, micro_loss in micro_batches if what == "gradient" or not micro_loss.isfinite() for id_ in ids
    ]
    suspects = gather_object(suspects)
    sys.exit(
        f"train_flow.py: error: the {what} of step {step} is not finite; its pairs: {', '.join(suspects)}. "
        "No optimizer step was taken with it, and checkpoints are as they were. Look at these pairs; if they "
        "are sound, lower the learning rate or train without fp16."
        if accelerator.is_main_process
        else 1
    )


def log_figures(sums: Tensor, learning_rate: float, pairs_per_second: float) -> dict[str, float]:
    """Means since the last line of the log; the learning rate is that of the last step."""
    steps, loss, grad_norm, skipped, *errors = sums.tolist()
    figures = ratios(torch.tensor(errors, dtype=torch.float64))
    figures.pop("fl_all")
    return {
        "loss": loss / steps,
        "learning_rate": learning_rate,
        "grad_norm": grad_norm / max(steps - skipped, 1),
        **figures,
        **({"skipped_steps": skipped} if skipped else {}),
        "pairs_per_second": pairs_per_second,
    }


def unwrap(accelerator: Accelerator, model: Any) -> RaftForOpticalFlow:
    """The model itself, out of what distributes or compiles it."""
    return accelerator.unwrap_model(model, keep_torch_compile=False)


def describe_devices(accelerator: Accelerator) -> str:
    """The hardware, in words for the model card."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    return f"{accelerator.num_processes} x {name}"


def push(output_dir: Path, repo_id: str, config: TrainingConfig) -> None:
    """Upload; what fails here costs no work."""
    try:
        print(f"pushed: {hub.push_run(output_dir, repo_id, config.hub_token)}")
    except Exception as error:  # whatever it is: the weights are safe, and the user should know how to go on
        sys.exit(
            f"train_flow.py: error: training is done and {output_dir} is whole, but the upload to {repo_id} failed: "
            f"{error}\nUpload it later with:  hf upload {repo_id} {output_dir} . "
            "--exclude 'checkpoint-*' --exclude 'logs/*'"
        )


if __name__ == "__main__":
    main()
