"""Train or fine-tune RAFT.

accelerate launch train_flow.py --config configs/NAME.yaml [--flag value ...]
"""

import dataclasses
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from tqdm.auto import tqdm

from flow_data.out_of_memory import attempt, explain_out_of_memory, is_out_of_memory
from flow_training import hub
from flow_training.batches import DataError, batches_of_steps, make_batches
from flow_training.checkpoints import (
    RunProgress,
    load_checkpoint,
    load_settings,
    remove_unfinished,
    set_aside_later_checkpoints,
)
from flow_training.config import TrainingConfig, parse_config
from flow_training.data import describe_missing_truth, training_pairs, validation_sets
from flow_training.ema import ExponentialMovingAverage
from flow_training.evaluation import evaluate_sets
from flow_training.metrics import error_sums, flow_length
from flow_training.model import batch_norm_batch, make_model, model_size
from flow_training.model_card import read_lineage
from flow_training.model_folder import write_run
from flow_training.optimization import change_course, make_optimizer, make_schedule
from flow_training.processes import describe_devices, make_accelerator, require_shared_folder, unwrap
from flow_training.run import (
    MAX_STEPS_WITHOUT_TRUTH,
    NothingLearnedError,
    Run,
    Stopped,
    advise_on_memory,
    how_to_go_on,
)
from flow_training.run_dir import RunLock, check_same_run, choose_checkpoint
from flow_training.run_log import RunLog
from flow_training.step_sums import STEP_SUMS, StepSums
from flow_training.stopping import StopRequest, outlive_no_launcher
from flow_training.summary import describe_run
from flow_training.uploads import Uploads
from modeling_raft import RaftOutput


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    config = parse_config(argv)
    try:
        with ExitStack() as resources:
            run_training(config, argv, resources)
    except Exception as error:
        message = explain_out_of_memory(error, "the training", advise_on_memory(config))
        if message is None:
            raise
        sys.exit(f"train_flow.py: error: {message}\n{how_to_go_on(argv, Path(config.output_dir))}")


def run_training(config: TrainingConfig, argv: list[str], resources: ExitStack) -> None:
    """Train, from the first step or where a checkpoint ends, and write what is published.

    Args:
        config: As it was given.
        argv: The command line, for the one that resumes the run.
        resources: Gets what is to be released however the run ends.
    """
    lock = uploads = None
    # Whatever is wrong with settings, files or tokens shows here, before the first step, in one line.
    try:
        accelerator, config = make_accelerator(config)
        output_dir = Path(config.output_dir)
        if accelerator.is_main_process:
            lock = RunLock(output_dir)
            resources.callback(lock.close)
        require_shared_folder(output_dir, lock, accelerator)
        checkpoint = choose_checkpoint(output_dir, config.resume_from_checkpoint)
        pairs, validation = training_pairs(config), validation_sets(config)
        set_seed(config.seed)
        lineage, model = read_lineage(config.model_name_or_path), make_model(config)
        config = dataclasses.replace(config, model_size=model_size(model))
        num_pairs = {source.name: len(source.dataset) for source in pairs.sources}
        settings = config.trajectory(num_pairs, batch_norm_batch(model, config.per_device_train_batch_size))
        if checkpoint is not None and not config.allow_config_changes:
            check_same_run(checkpoint, load_settings(checkpoint), settings)
        if config.push_to_hub and accelerator.is_main_process:
            model_id = config.hub_model_id or output_dir.resolve().name
            model_id = hub.create_repository(model_id, config.hub_token, config.hub_private_repo)
            config = dataclasses.replace(config, hub_model_id=model_id)
    except Exception as error:
        if lock is not None:
            lock.leave_no_trace()
        if is_out_of_memory(error) or not isinstance(error, (ValueError, OSError)):
            raise
        sys.exit(f"train_flow.py: error: {error}")

    accelerator.wait_for_everyone()  # all have looked before anyone writes
    fused = accelerator.scaler is None
    optimizer = make_optimizer(model.parameters(), config.learning_rate, config.weight_decay, fused)
    schedule = make_schedule(optimizer, config.learning_rate, config.max_train_steps)
    ema = None if config.ema_decay is None else ExponentialMovingAverage(model, config.ema_decay, accelerator.device)
    progress = RunProgress(len(STEP_SUMS), ema)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(schedule, progress)
    if checkpoint is not None:
        try:
            load_checkpoint(accelerator, checkpoint, progress, unwrap(accelerator, prepared))
            if progress.step > config.max_train_steps:
                raise ValueError(f"max_train_steps: {checkpoint} is beyond step {config.max_train_steps}")
        except ValueError as error:
            sys.exit(f"train_flow.py: error: {error}")
        if config.allow_config_changes:
            change_course(optimizer, schedule, config.learning_rate, config.weight_decay, config.max_train_steps)
    accelerator.wait_for_everyone()
    log = None
    try:
        start_trackers(accelerator, config)
        if accelerator.is_main_process:
            log = RunLog(output_dir, progress.step, progress.validation_due)
            remove_unfinished(output_dir)
            set_aside_later_checkpoints(output_dir, progress.step)
    except OSError as error:  # the disk is full still
        sys.exit(f"train_flow.py: error: {error}\n{how_to_go_on(argv, output_dir)}")
    if accelerator.is_main_process:
        counts = {name: len(dataset) for name, dataset, _ in validation}
        passes, devices = accelerator.gradient_accumulation_steps, describe_devices(accelerator)
        print(describe_run(config, model, pairs, counts, passes, devices, progress.step))
        for line in describe_missing_truth(pairs, config.max_flow):
            print(f"train_flow.py: warning: {line}", file=sys.stderr)
    bar = tqdm(
        total=config.max_train_steps, initial=progress.step, unit="step", disable=not accelerator.is_main_process
    )
    sums, stop = StepSums(loss_scaled=accelerator.scaler is not None), StopRequest()
    if config.push_to_hub and accelerator.is_main_process:
        uploads = Uploads(output_dir, str(config.hub_model_id), config.hub_token, bar.write)
    run = Run(
        config, settings, accelerator, prepared, pairs, validation, progress, log, bar, sums, stop, lineage, uploads
    )

    try:
        with stop:
            outlive_no_launcher()
            train(run, optimizer, schedule)
        if accelerator.is_main_process:
            write_run(output_dir, run.published_model, run.record())
            print(f"weights, model card and log are in {output_dir}")
    except Stopped as stopped:
        bar.close()
        if accelerator.is_main_process:
            print(f"{stopped}: step {progress.step} is saved. {how_to_go_on(argv, output_dir)}", file=sys.stderr)
        accelerator.wait_for_everyone()
        accelerator.end_training()
        sys.exit(128 + stopped.signal)  # as shells name an end by a signal
    except Exception as error:
        bar.close()
        message = run.explain(error)
        if message is None:
            raise
        heard = accelerator.is_main_process or isinstance(error, (DataError, OSError))  # which one process may have
        # The same pairs teach nothing again.
        resume = "" if isinstance(error, NothingLearnedError) else f"\n{how_to_go_on(argv, output_dir)}"
        sys.exit(f"train_flow.py: error: {message}{resume}" if heard else 1)
    accelerator.end_training()
    if uploads is not None:
        push(uploads, config)


def train(run: Run, optimizer: Any, schedule: Any) -> None:
    """The steps that are left of a run.

    Raises:
        Stopped: A signal came; a checkpoint is saved.
        NotFiniteError, DataError, OSError: What `Run.explain` explains.
    """
    config, accelerator, model, progress = run.config, run.accelerator, run.model, run.progress
    model.train()
    logged, logged_step = time.perf_counter(), progress.step
    if progress.validation_due and run.validation:
        run.validate()
    height, width = config.crop_size
    attempted = (
        f"a pass of {config.per_device_train_batch_size} pair(s) of {height} x {width} px with "
        f"{config.num_flow_updates} updates"
    )
    batches = make_batches(config, run.pairs, progress.step, accelerator)
    for batches_of_step in batches_of_steps(batches, accelerator.gradient_accumulation_steps):
        for batch in batches_of_step:
            numbers, _ = batch.pop("number"), batch.pop("id")
            run.replaced += filter(None, batch.pop("replaced"))
            with accelerator.accumulate(model), attempt(attempted):
                output = model(**batch, num_flow_updates=config.num_flow_updates)
                accelerator.backward(output.loss)
                run.step_sums.add_pass(numbers, output.loss.detach(), training_errors(output, batch, config.max_flow))
                if accelerator.sync_gradients:  # in the last pass
                    grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()

        learning_rate = schedule.get_last_lr()[0]
        skipped = accelerator.optimizer_step_was_skipped  # fp16 overflow
        if not skipped:
            schedule.step()  # not prepared: a prepared one steps once per *process*
            if progress.ema is not None:
                progress.ema.update(unwrap(accelerator, model))
        step = progress.step = progress.step + 1
        run.step_sums.end_step(grad_norm, skipped)
        run.bar.update()

        last = step == config.max_train_steps
        logging_now = step % config.logging_steps == 0
        validating = bool(run.validation) and (step % config.validation_steps == 0 or last)
        saving = step % config.checkpointing_steps == 0
        stopping = run.stop.agreed() is not None
        checking = step % MAX_STEPS_WITHOUT_TRUTH == 0
        if logging_now or validating or saving or stopping or last or checking:
            run.look()
        if logging_now:
            run.log_training(
                learning_rate, (step - logged_step) * config.total_batch_size / (time.perf_counter() - logged)
            )
            logged, logged_step = time.perf_counter(), step
        paused = time.perf_counter()
        progress.validation_due = validating
        if stopping and not last:
            run.save_and_stop()
        if saving:  # first, so that whatever happens to the validation costs no training
            run.save()
        if validating:
            run.validate()
        if saving and not last and config.hub_strategy == "every_save":  # after the validation, for the card
            run.upload()
        logged += time.perf_counter() - paused  # neither is training time
    run.bar.close()
    if schedule.last_epoch == 0:
        raise NothingLearnedError("every step was skipped, because its gradients overflowed in fp16: use bf16, or no")
    if run.validation and not run.reports:  # a finished run was resumed: its card still needs the figures
        run.reports = evaluate_sets(run.published_model, run.validation, accelerator)
        run.reports_step = progress.step


def training_errors(output: RaftOutput, batch: dict[str, Tensor], max_flow: float) -> Tensor:
    """Error sums of the last prediction, over the pixels that the loss counts."""
    counted = batch["valid"] & (flow_length(batch["labels"]) < max_flow)
    return error_sums(output.flow.detach(), batch["labels"], counted).sum(0)


def start_trackers(accelerator: Accelerator, config: TrainingConfig) -> None:
    """Open what figures are sent to, and give it the settings of the run."""
    names = [str(name) for name in accelerator.log_with]
    # The name is a folder to TensorBoard, and a project to services.
    accelerator.init_trackers("logs" if "tensorboard" in names else "raft")
    for tracker in accelerator.trackers:
        if tracker.name != "tensorboard":  # it takes numbers only, and makes a run of its own of them
            tracker.store_init_configuration(config.to_dict())


def push(uploads: Uploads, config: TrainingConfig) -> None:
    """Upload the finished run; what fails here costs no work, and the user is told how to go on."""
    failure = uploads.push_final()
    if failure is None:
        return
    token = "" if config.hub_token is None else "\n(with your token in HF_TOKEN, or after --token)"
    print(
        f"train_flow.py: error: training is done and {config.output_dir} is whole, but the upload to "
        f"{uploads.repo_id} {failure}\n"
        f"Push it later with:  {hub.push_command(uploads.output_dir, uploads.repo_id)}{token}",
        file=sys.stderr,
    )
    sys.exit(hub.UPLOAD_FAILED)


if __name__ == "__main__":
    main()
