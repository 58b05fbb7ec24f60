"""Batches of the training mix for one process, and what can go wrong on their way."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from flow_data.out_of_memory import is_out_of_memory
from flow_data.sampling import RunSampler, TrainingPairs, collate, prepare_worker
from flow_training.config import TrainingConfig

WORKER = "DataLoader worker"  # in the errors that torch raises of them


class DataError(RuntimeError):
    """A pair could not be read, or the process that read it died, between two steps."""


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


def batches_of_steps(batches: Any, passes: int) -> Iterator[list[dict[str, Any]]]:
    """The batches of each optimizer step, one for each pass.

    What is wrong with a sample, or kills a worker, is raised as a `DataError`: always between two steps, before the
    first pass of one has changed anything.
    """
    step: list[dict[str, Any]] = []
    try:
        for batch in batches:
            # Workers run by now, and torch has set a handler that raises their death wherever the run happens to be,
            # in the middle of a checkpoint too. Without it, the DataLoader notices when it waits for the next batch.
            if hasattr(signal, "SIGCHLD"):  # not on Windows
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            if "error" in batch:
                raise DataError(
                    f"{'; '.join(batch['error'])}. Mend or remove the file, or let other pairs take the place of bad "
                    "ones: --skip_bad_samples"
                )
            step.append(batch)
            if len(step) == passes:
                yield step
                step = []
    except Exception as error:
        of_worker = WORKER in str(error)
        if of_worker and is_out_of_memory(error):
            reason = "a process that prepares pairs ran out of memory: give fewer --dataloader_num_workers."
            raise DataError(reason) from error
        # A worker may die handing over a batch.
        if isinstance(error, (ConnectionError, EOFError)) or (isinstance(error, RuntimeError) and of_worker):
            raise DataError(describe_dead_worker(error)) from error
        raise


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
