"""The data sets that a run's settings name."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flow_data.augmentation import augment_dense, augment_sparse
from flow_data.features import to_sample
from flow_data.hub_dataset import flow_is_sparse, load_hub_dataset
from flow_data.images import undecoded
from flow_data.sampling import MixSource, TrainingPairs
from flow_data.sources import SOURCES, has_ground_truth, is_sparse, load_source
from flow_data.synthetic import synthetic
from flow_training.config import TrainingConfig, split_validation_set
from flow_training.evaluation import PROTOCOLS, Protocol

CHECKED_PAIRS = 8  # of each source, at the start of a run


def open_dataset(config: TrainingConfig, source: str, split: str) -> Any:
    """Rows of a source, images left as stored.

    Raises:
        OSError, ValueError: Nothing usable where it was looked for; the message names the folder and what it lacks.
    """
    if source == "synthetic":
        training = split == "training"
        num_pairs = config.synthetic_num_pairs if training else config.synthetic_validation_pairs
        return synthetic(config.synthetic_options(), split=split, num_pairs=num_pairs)
    root = Path(config.data_root) / str(SOURCES[source].folder)
    if source == "pairs" and config.pairs_path is not None:
        root = Path(config.pairs_path)
    dataset = load_source(source, root, split)
    if not has_ground_truth(dataset):
        wanted = "a column or files of flow" if source == "pairs" else "a split that is not for submissions"
        raise ValueError(f"{source}: the split {split} has no ground truth in {root}; expected {wanted}")
    return undecoded(dataset)


def training_pairs(config: TrainingConfig) -> TrainingPairs:
    """The training mix, augmented: the sources of train_mix, or the Hub's data set."""
    mix: list[tuple[str, Any, bool, int]] = []  # name, rows, whether ground truth is sparse, repeats
    if config.dataset_name is not None:
        rows = load_hub_dataset(config.dataset_name, config.train_split, config.streaming, config.hub_token)
        if len(rows) == 0:
            raise ValueError(f"dataset_name: {config.dataset_name} is empty")
        mix.append((config.dataset_name, rows, flow_is_sparse(rows), 1))
    for source, repeats in config.train_mix.items():
        rows = open_dataset(config, source, config.train_split or SOURCES[source].training_split)
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
            ),
        )
        for name, rows, sparse, repeats in mix
    ]
    noise_batch_size = config.total_batch_size if config.add_noise else None
    return TrainingPairs(sources, config.seed, noise_batch_size, config.skip_bad_samples)


def describe_missing_truth(pairs: TrainingPairs, max_flow: float) -> list[str]:
    """Which sources seem to have no ground truth to learn from: a line for each.

    The first pairs of each source are loaded, as they are before augmentation, until one has a pixel that counts for
    the loss: with valid flow, shorter than `max_flow` pixels. Pairs that cannot be read are left to the training.
    """
    lines = []
    for name, rows, *_ in pairs.sources:
        ids = []
        for number in range(min(CHECKED_PAIRS, len(rows))):
            try:
                row = rows[number]
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


def validation_sets(config: TrainingConfig) -> list[tuple[str, Any, Protocol]]:
    """(name, rows, protocol) of each set; without a split it is the one that the protocol evaluates."""
    sets = []
    for entry in config.validation_sets:
        source, split = split_validation_set(entry)
        protocol = PROTOCOLS[source]
        sets.append((entry, open_dataset(config, source, split or protocol.split), protocol))
    return sets
