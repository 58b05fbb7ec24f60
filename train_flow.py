"""Train or fine-tune RAFT.

accelerate launch train_flow.py --config configs/NAME.yaml [--flag value ...]
"""

import dataclasses
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from flow_data.optional_packages import require_packages
from flow_inference.cpu_threads import limit_spinning
from flow_training.config import TrainingConfig, parse_config

if __name__ == "__main__":
    limit_spinning()
    CONFIG = parse_config()  # before the slow imports below: --help and mistakes are answered at once
    require_packages("train_flow.py")

from accelerate.utils import set_seed

from flow_data.out_of_memory import attempt
from flow_training import hub
from flow_training.checkpoints import (
    RunProgress,
    archive_later_checkpoints,
    check_resume_settings,
    choose_checkpoint,
    load_checkpoint,
    remove_unfinished,
    resume_settings,
)
from flow_training.cuda_graphs import record_training
from flow_training.data import (
    describe_missing_ground_truth,
    group_micro_batches,
    make_batches,
    training_pairs,
    validation_sets,
)
from flow_training.evaluation import evaluate_sets
from flow_training.logger import MAX_STEPS_WITHOUT_PIXELS, MetricLogger, NothingLearnedError, start_trackers
from flow_training.model import batch_norm_batch, compile_training, make_model, model_size
from flow_training.model_card import read_lineage, write_run
from flow_training.objectives import find_objective
from flow_training.ops.lock import RunLock
from flow_training.ops.signals import StopRequest, terminate_with_launcher
from flow_training.ops.uploads import Uploads
from flow_training.optimization import ExponentialMovingAverage, count_steps, make_optimizer, make_schedule
from flow_training.processes import check_cuda_graphs, make_accelerator, require_shared_folder, unwrap
from flow_training.run import (
    PROG,
    Run,
    describe_run,
    handle_failure,
    published_model,
    run_record,
    save,
    save_and_stop,
    upload,
    validate,
)
from flow_training.run_log import RunLog


def main(argv: list[str] | None = None, config: TrainingConfig | None = None) -> None:
    """Set up, resume, train, finish. This is the one place where errors become messages.

    Args:
        argv: The command line; None: that of the process.
        config: Parsed from `argv`, where this has been done already.
    """
    argv = sys.argv[1:] if argv is None else argv
    config = parse_config(argv) if config is None else config
    run = None
    with ExitStack() as resources:
        try:
            run = set_up(config, resources)
            resume(run)
            with run.stop:
                terminate_with_launcher()
                train(run, make_batches(run.config, run.pairs, run.progress.step, run.accelerator))
            finish(run)
        except Exception as error:
            handle_failure(error, run, config, argv)
        if run.uploads is not None:
            push(run.uploads, run.config)


def set_up(config: TrainingConfig, resources: ExitStack) -> Run:
    """Open and check all that a run needs, before anything is written.

    Args:
        config: The settings as they were given.
        resources: Gets what is to be released however the run ends.

    Raises:
        ValueError, OSError: Something is wrong with settings, files or the token. If the run's folder was created, it
            is removed again.
    """
    with ExitStack() as cleanup:
        accelerator, config = make_accelerator(config)
        if config.cuda_graphs:
            check_cuda_graphs(accelerator, config)
        output_dir, lock = Path(config.output_dir), None
        if accelerator.is_main_process:
            lock = RunLock(output_dir)
            resources.callback(lock.close)
            cleanup.callback(lock.release_and_cleanup)
        require_shared_folder(output_dir, lock, accelerator)
        checkpoint = choose_checkpoint(output_dir, config.resume_from_checkpoint)
        pairs, validation = training_pairs(config), validation_sets(config)
        set_seed(config.seed)
        lineage, model = read_lineage(config.model_name_or_path), make_model(config)
        config = dataclasses.replace(config, model_size=model_size(model))
        num_pairs = {source.name: len(source.dataset) for source in pairs.sources}
        batch_norm = batch_norm_batch(model, config.per_device_train_batch_size)
        settings = resume_settings(config, num_pairs, batch_norm)
        if checkpoint is not None and not config.allow_config_changes:
            check_resume_settings(checkpoint, settings)
        if config.push_to_hub and accelerator.is_main_process:
            model_id = config.hub_model_id or output_dir.resolve().name
            model_id = hub.create_repository(model_id, config.hub_token, config.hub_private_repo)
            config = dataclasses.replace(config, hub_model_id=model_id)
        cleanup.pop_all()

    accelerator.wait_for_everyone()  # all have checked before anyone writes
    optimizer = make_optimizer(model.parameters(), config.learning_rate, config.weight_decay)
    schedule = make_schedule(optimizer, config.learning_rate, config.max_train_steps)
    ema = None if config.ema_decay is None else ExponentialMovingAverage(model, config.ema_decay, accelerator.device)
    progress = RunProgress(ema)
    if config.compile:
        compile_training(model)
    if config.cuda_graphs:
        batch_shape = (int(config.per_device_train_batch_size or 0), config.crop_size[0], config.crop_size[1])
        with attempt("the recording of a training step as a CUDA graph"):
            record_training(model, batch_shape, config.num_flow_updates, accelerator.device, accelerator.autocast())
    prepared, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(schedule, progress)
    logger = MetricLogger(config, accelerator, progress, list(num_pairs))
    uploads = None
    if config.push_to_hub and accelerator.is_main_process:
        uploads = Uploads(output_dir, str(config.hub_model_id), config.hub_token, logger.print)
    return Run(
        config=config,
        settings=settings,
        checkpoint=checkpoint,
        accelerator=accelerator,
        pairs=pairs,
        validation=validation,
        model=prepared,
        optimizer=optimizer,
        schedule=schedule,
        progress=progress,
        lineage=lineage,
        stop=StopRequest(),
        logger=logger,
        uploads=uploads,
    )


def resume(run: Run) -> None:
    """Load the checkpoint, if there is one, open the logs where it ends, and print what the run is about to do.

    Raises:
        ResumeError: The checkpoint cannot be resumed from.
        OSError: The logs cannot be written.
    """
    config, accelerator, progress, run_log = run.config, run.accelerator, run.progress, None
    output_dir, model = Path(config.output_dir), unwrap(accelerator, run.model)
    if run.checkpoint is not None:
        load_checkpoint(accelerator, run.checkpoint, config, progress, model, run.optimizer, run.schedule)
    accelerator.wait_for_everyone()
    start_trackers(accelerator, config)
    if accelerator.is_main_process:
        run_log = RunLog(output_dir, progress.step, progress.validation_due)
        remove_unfinished(output_dir)
        archive_later_checkpoints(output_dir, progress.step)
        print(describe_run(run))
        if find_objective(config.objective).needs_flow:
            for line in describe_missing_ground_truth(run.pairs, config.max_flow):
                print(f"{PROG}: warning: {line}", file=sys.stderr)
    run.logger.start(run_log)


def train(run: Run, batches: Iterable[Any]) -> None:
    """Take the remaining steps of a run.

    Args:
        run: After `resume`.
        batches: Of this process, from the next step on (`flow_training.data.make_batches`).

    Raises:
        TrainingInterrupted: A signal was received; a checkpoint is saved.
        NotFiniteError, NothingLearnedError, DataError, OSError: See `flow_training.run.handle_failure`.
    """
    config, accelerator, model, progress, logger = run.config, run.accelerator, run.model, run.progress, run.logger
    objective = find_objective(config.objective)
    model.train()
    if progress.validation_due and run.validation:
        with logger.paused_clock():
            validate(run)
    height, width = config.crop_size
    attempted = (
        f"a pass of {config.per_device_train_batch_size} pair(s) of {height} x {width} px with "
        f"{config.num_flow_updates} updates"
    )
    for micro_batches in group_micro_batches(batches, accelerator.gradient_accumulation_steps):
        for batch in micro_batches:
            bookkeeping = {name: batch.pop(name) for name in ("number", "id", "replaced")}
            with accelerator.accumulate(model), attempt(attempted):
                loss, totals = objective.compute(model, batch, config)
                accelerator.backward(loss)
                logger.add_micro_batch(bookkeeping, loss, totals)
                if accelerator.sync_gradients:  # in the last pass
                    grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
                run.optimizer.step()
                run.optimizer.zero_grad()

        learning_rate = float(run.schedule.get_last_lr()[0])
        # fp16 overflow: the schedule has taken as many steps as the optimizer
        skipped = accelerator.scaler is not None and count_steps(run.optimizer) == run.schedule.last_epoch
        if not skipped:
            run.schedule.step()  # not prepared: a prepared one steps once per *process*
            if progress.ema is not None:
                progress.ema.update(unwrap(accelerator, model))
        step = progress.step = progress.step + 1
        logger.end_step(grad_norm, skipped)

        last = step == config.max_train_steps
        logging_now = step % config.logging_steps == 0
        validating = bool(run.validation) and (step % config.validation_steps == 0 or last)
        saving = step % config.checkpointing_steps == 0
        stopping = run.stop.stop_requested() is not None
        checking = step % MAX_STEPS_WITHOUT_PIXELS == 0
        if logging_now or validating or saving or stopping or last or checking:
            logger.reduce_metrics()
        if logging_now:
            logger.log_training(learning_rate)
        progress.validation_due = validating
        with logger.paused_clock():  # none of the following is training time
            if stopping and not last:
                save_and_stop(run)
            if saving:  # first, so that whatever happens to the validation costs no training
                save(run)
            if validating:
                validate(run)
            if saving and not last and config.hub_strategy == "every_save":  # after the validation, for the card
                upload(run)
    logger.bar.close()
    if run.schedule.last_epoch == 0:
        raise NothingLearnedError("every step was skipped, because its gradients overflowed in fp16: use bf16, or no")
    if run.validation and not run.reports:  # a finished run was resumed: its card still needs the metrics
        run.reports = evaluate_sets(published_model(run), run.validation, accelerator)
        run.reports_step = progress.step


def finish(run: Run) -> None:
    """Write what a finished run publishes.

    Raises:
        OSError: It cannot be written.
    """
    accelerator, output_dir = run.accelerator, Path(run.config.output_dir)
    if accelerator.is_main_process:
        write_run(output_dir, published_model(run), run_record(run))
        print(f"weights, model card and log are in {output_dir}")
    accelerator.end_training()


def push(uploads: Uploads, config: TrainingConfig) -> None:
    """Upload the finished run. A failure costs no work; the command that pushes it later is printed."""
    failure = uploads.push_final()
    if failure is None:
        return
    token = "" if config.hub_token is None else "\n(with your token in HF_TOKEN, or after --token)"
    print(
        f"{PROG}: error: training is done and {config.output_dir} is complete, but the upload to "
        f"{uploads.repo_id} {failure}\n"
        f"Push it later with:  {hub.push_command(uploads.output_dir, uploads.repo_id)}{token}",
        file=sys.stderr,
    )
    sys.exit(hub.UPLOAD_FAILED)


if __name__ == "__main__":
    main(config=CONFIG)
