"""The data sets that a run's settings name."""

from functools import partial
from pathlib import Path
from typing import Any

from flow_data.augmentation import augment_dense, augment_sparse
from flow_data.features import OpticalFlow
from flow_data.sampling import MixSource, TrainingPairs
from flow_data.sources import SOURCES, SPARSE_SOURCES, load_source
from flow_data.synthetic import synthetic
from flow_training.config import TrainingConfig, split_validation_set
from flow_training.evaluation import PROTOCOLS, Protocol


def open_dataset(config: TrainingConfig, source: str, split: str) -> Any:
    """Rows of a source.

    Raises:
        OSError, ValueError: Nothing usable where it was looked for; the message names the folder and what it lacks.
    """
    if source == "synthetic":
        training = split == "training"
        num_pairs = config.synthetic_num_pairs if training else config.synthetic_validation_pairs
        return synthetic(config.synthetic_options(), split=split, num_pairs=num_pairs)
    folder = SOURCES[source].folder
    dataset = load_source(source, Path(config.data_root) / str(folder), split)
    if dataset.cast_column("flow", OpticalFlow(decode=False))[0]["flow"] is None:
        raise ValueError(f"{source}: the split {split} has no ground truth; it is for submissions")
    return dataset


def training_pairs(config: TrainingConfig) -> TrainingPairs:
    """The training mix, augmented."""
    crop_size = (config.crop_size[0], config.crop_size[1])
    sources = [
        MixSource(
            name=source,
            dataset=open_dataset(config, source, config.train_split or SOURCES[source].training_split),
            repeats=repeats,
            augment=partial(
                augment_sparse if source in SPARSE_SOURCES else augment_dense,
                crop_size=crop_size,
                zoom_range=config.zoom_range_of(source),
                flip=config.flip,
            ),
        )
        for source, repeats in config.train_mix.items()
    ]
    return TrainingPairs(sources, config.seed, config.total_batch_size if config.add_noise else None)


def validation_sets(config: TrainingConfig) -> list[tuple[str, Any, Protocol]]:
    """(name, rows, protocol) of each set; without a split it is the one that the protocol evaluates."""
    sets = []
    for entry in config.validation_sets:
        source, split = split_validation_set(entry)
        protocol = PROTOCOLS[source]
        sets.append((entry, open_dataset(config, source, split or protocol.split), protocol))
    return sets
