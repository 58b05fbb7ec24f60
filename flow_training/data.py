"""What a run reads: the data sets that its settings name, and the batches of one process."""

import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset, default_collate

from flow_data.augmentation import augment_dense, augment_sparse
from flow_data.datasets import DATASETS, Protocol, has_ground_truth, is_sparse, load_source
from flow_data.features import to_sample
from flow_data.hub import flow_is_sparse, load_hub_dataset
from flow_data.images import disable_image_decoding
from flow_data.out_of_memory import is_out_of_memory
from flow_data.sampling import MixSource, RunSampler, SampleError, TrainingPairs, prepare_worker
from flow_data.synthetic import synthetic
from flow_training.config import TrainingConfig, split_validation_set
from flow_training.objectives import find_objective

CHECKED_PAIRS = 8  # of each source, at the start of a run
WORKER = "DataLoader worker"  # in the text of the errors that torch raises about its workers


class DataError(RuntimeError):
    """A pair cannot be read, or the process that reads pairs has died; raised between two optimizer steps."""


def open_dataset(
    config: TrainingConfig, source: str, split: str, needs_flow: bool = True, pairs_path: str | None = None
) -> Any:
    """Open a source.

    Args:
        config: The run's settings, which name the folder of the source.
        source: A name in `flow_data.datasets.DATASETS`.
        split: One of its splits.
        needs_flow: Refuse a split without ground truth.
        pairs_path: Of the source `pairs`; None: as `config` says.

    Returns:
        Its rows, with images as they are stored.

    Raises:
        OSError, ValueError: The folder holds nothing usable; the message names the folder and what it lacks.
    """
    if source == "synthetic":
        training = split == "training"
        num_pairs = config.synthetic_num_pairs if training else config.synthetic_validation_pairs
        return synthetic(config.synthetic_options(), split=split, num_pairs=num_pairs)
    root = Path(config.data_root) / str(DATASETS[source].folder)
    pairs_path = pairs_path or config.pairs_path
    if source == "pairs" and pairs_path is not None:
        root = Path(pairs_path)
    dataset = load_source(source, root, split)
    if needs_flow and not has_ground_truth(dataset):
        wanted = "a column or files of flow" if source == "pairs" else "a split that is not for submissions"
        raise ValueError(f"{source}: the split {split} has no ground truth in {root}; give {wanted}")
    return disable_image_decoding(dataset)


def training_pairs(config: TrainingConfig) -> TrainingPairs:
    """Open the training mix, with its augmentation: the sources of `train_mix`, or `dataset_name` on the Hub."""
    objective = find_objective(config.objective)
    needs_flow = objective.needs_flow
    mix: list[tuple[str, Any, bool, int]] = []  # name, rows, whether ground truth is sparse, repeats
    if config.dataset_name is not None:
        rows = load_hub_dataset(config.dataset_name, config.train_split, config.streaming, config.hub_token)
        if len(rows) == 0:
            raise ValueError(f"dataset_name: {config.dataset_name} is empty")
        mix.append((config.dataset_name, rows, flow_is_sparse(rows), 1))
    for source, repeats in config.train_mix.items():
        rows = open_dataset(config, source, config.train_split or DATASETS[source].training_split, needs_flow)
        mix.append((source, rows, is_sparse(source, rows), repeats))
    crop_size = (config.crop_size[0], config.crop_size[1])
    sources = [
        MixSource(
            name=name,
            dataset=rows,
            repeats=repeats,
            augment=partial(
                augment_sparse if sparse else augment_dense,
                crop_size=crop_size,
                zoom_range=config.zoom_range_of(name),
                flip=config.flip,
                keep_without_photo_aug=objective.needs_images_without_photo_aug,
            ),
        )
        for name, rows, sparse, repeats in mix
    ]
    noise_batch_size = config.total_batch_size if config.add_noise else None
    return TrainingPairs(sources, config.seed, noise_batch_size, config.skip_bad_samples, needs_flow)


def validation_sets(config: TrainingConfig) -> list[tuple[str, Any, Protocol]]:
    """Open the validation sets.

    Returns:
        (name, rows, protocol) of each. A set without a split is the split that its protocol evaluates.
    """
    sets = []
    for entry in config.validation_sets:
        source, split = split_validation_set(entry)
        protocol = DATASETS[source].protocol
        rows = open_dataset(config, source, split or protocol.split, pairs_path=config.validation_pairs_path)
        sets.append((entry, rows, protocol))
    return sets


def describe_missing_ground_truth(pairs: TrainingPairs, max_flow: float) -> list[str]:
    """Name the sources that seem to have no ground truth to learn from.

    The first pairs of each source are loaded, as they are before augmentation, until one has a pixel that counts for
    the loss. Pairs that cannot be read are skipped here; the training reports them.

    Args:
        pairs: The training mix.
        max_flow: Length of flow in pixels from which a pixel does not count for the loss.

    Returns:
        A line for each such source.
    """
    lines = []
    for name, rows, *_ in pairs.sources:
        ids = []
        for index in range(min(CHECKED_PAIRS, len(rows))):
            try:
                row = rows[index]
                sample = to_sample(row)
            except (ValueError, OSError):
                continue
            ids.append(str(row["id"]))
            if (sample.valid & (np.hypot(*np.moveaxis(sample.flow, -1, 0)) < max_flow)).any():
                break
        else:
            if ids:
                lines.append(
                    f"{name}: no pixel of its first {len(ids)} pair(s) ({', '.join(ids)}) has valid ground truth "
                    f"below max_flow ({max_flow:g} px): there is nothing to learn from them"
                )
    return lines


class _KeepErrors(Dataset):
    """Pairs, with a `SampleError` returned in the place of its sample.

    Raised in a worker, the error would arrive as the text of a traceback, and before the last batch without an error
    has been trained on, as accelerate reads one batch ahead.
    """

    def __init__(self, pairs: TrainingPairs):
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any] | SampleError:
        try:
            return self.pairs[key]
        except SampleError as error:
            return error


def collate(samples: list[dict[str, Any] | SampleError]) -> dict[str, Any] | SampleError:
    """Stack samples into a batch.

    What only some of them have (`labels` and `valid`, where sources without ground truth are mixed in) is left out.
    `number` stays a list: as a tensor it would be moved to the device, and reading it there would wait for all before
    it.

    Returns:
        The batch; or one error with the messages of all samples that could not be read.
    """
    errors = [sample for sample in samples if isinstance(sample, SampleError)]
    if errors:
        return SampleError("; ".join(map(str, errors)))
    read = [sample for sample in samples if not isinstance(sample, SampleError)]
    shared = [name for name in read[0] if all(name in sample for sample in read) and name != "number"]
    return default_collate([{name: sample[name] for name in shared} for sample in read]) | {
        "number": [sample["number"] for sample in read]
    }


def make_batches(config: TrainingConfig, pairs: TrainingPairs, step: int, accelerator: Accelerator) -> Any:
    """Batches of this process, from a step to the end of the run."""
    start, stop = step * config.total_batch_size, config.max_train_steps * config.total_batch_size
    loader = DataLoader(
        _KeepErrors(pairs),
        batch_size=config.per_device_train_batch_size,
        sampler=RunSampler(len(pairs), config.seed, start, stop),
        num_workers=config.dataloader_num_workers,
        collate_fn=collate,
        worker_init_fn=prepare_worker,
        pin_memory=accelerator.device.type == "cuda",
        generator=torch.Generator(),  # else starting workers would change the random state that dropout draws from
    )
    return accelerator.prepare(loader)


def group_micro_batches(batches: Any, accumulation_steps: int) -> Iterator[list[dict[str, Any]]]:
    """Group batches by optimizer step, one for each forward pass.

    Raises:
        DataError: A sample cannot be read, or a worker has died. It is raised between two steps, before the first
            pass of a step has changed anything.
    """
    step: list[dict[str, Any]] = []
    try:
        for batch in batches:
            # Workers run by now, and torch has set a handler that raises their death wherever the run happens to be,
            # in the middle of a checkpoint too. Without it, the DataLoader notices when it waits for the next batch.
            if hasattr(signal, "SIGCHLD"):  # not on Windows
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            if isinstance(batch, SampleError):
                raise DataError(
                    f"{batch}. Fix or remove the file, or let other pairs take the place of bad ones: "
                    "--skip_bad_samples"
                ) from batch
            step.append(batch)
            if len(step) == accumulation_steps:
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
    """Say that a worker has died, and what helps most often."""
    return (
        f"a process that prepares pairs died: {error} Most often memory ran out: give fewer --dataloader_num_workers."
    )


def save_samples(pairs: TrainingPairs, numbers: list[int], output_dir: Path, step: int) -> tuple[Path, list[str]]:
    """Save samples of a step for inspection; they are drawn again, as they follow from their numbers.

    Returns:
        The file, and the ids of its pairs.
    """
    keys = [next(iter(RunSampler(len(pairs), pairs.seed, number, number + 1))) for number in sorted(numbers)]
    batch: Any = collate([pairs[key] for key in keys])
    path = output_dir / f"not_finite_step_{step}.pt"
    torch.save(batch, path)
    return path, batch["id"]
