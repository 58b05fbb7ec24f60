"""Every source of image pairs by its name: what is known of it, and how to load it.

Nothing is converted or cached: a record holds paths, and its images and flow are decoded when it is looked at.
"""

import difflib
import functools
import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from datasets import Dataset

from flow_data import layouts
from flow_data.features import OpticalFlow
from flow_data.pairs import pairs
from flow_data.synthetic import SyntheticOptions, synthetic

logger = logging.getLogger(__name__)

SPARSE_SOURCES = frozenset({"kitti_2012", "kitti_2015", "hd1k"})  # ground truth at some pixels: never interpolate it


class SourceSpec(NamedTuple):
    """What is known of a data source.

    Args:
        folder: its folder under `data_root`; None if it reads no files.
        load: root, split -> Dataset with `FLOW_FEATURES`.
        splits: the split names it has.
        complete: split -> number of pairs in the complete download, where published.
        training_split: the split that is trained on unless one is asked for.
    """

    folder: str | None
    load: Callable[..., Dataset]
    splits: tuple[str, ...]
    complete: Mapping[str, int]
    training_split: str = "training"


def load_source(name: str, root: str | os.PathLike[str] | None, split: str | None = None) -> Dataset:
    """Load a data set by name.

    Args:
        name: a key of `SOURCES`.
        root: the data set's own folder, for example `data_root / SOURCES[name].folder`; None for a source without one.
        split: one of `SOURCES[name].splits`; None is its training split. `all` is every pair with ground truth.

    Returns:
        Records `id, image1, image2, flow, valid`, in natural order of their ids, decoded lazily. `valid` is null where
        the flow file itself says where flow is known. What is left out is counted and named in warnings; a number of
        pairs that is not the complete data set's is told once in a process.

    Raises:
        ValueError: unknown name or split, or a malformed split file or table.
        FileNotFoundError: there is no such folder, no pair in it, or no split file.
    """
    check_source(name)
    spec = SOURCES[name]
    split = spec.training_split if split is None else split
    check_split(name, split)
    dataset = spec.load(root, split)
    complete = spec.complete.get(split, len(dataset))
    if len(dataset) != complete:
        count = f"{len(dataset)} pairs in split {split}, the complete data set has {complete}"
        _warn_once(f"{name}: {count} ({os.path.abspath(root or '')})")
    return dataset


def is_sparse(name: str, dataset: Dataset) -> bool:
    """Whether a source's ground truth is at scattered pixels, so that augmentation must not interpolate it.

    Args:
        name: of the source.
        dataset: its rows; only their paths are looked at. `pairs` are sparse if any flow is a `.png` (KITTI's format).
    """
    if name in SPARSE_SOURCES:
        return True
    if name != "pairs":
        return False
    stored = dataset.select_columns("flow").cast_column("flow", OpticalFlow(decode=False))
    return any(flow is not None and str(flow["path"]).lower().endswith(".png") for flow in stored["flow"])


def has_ground_truth(dataset: Dataset) -> bool:
    """Whether a source's rows have flow; all of them have, or none, as in the splits for submissions."""
    if "flow" not in dataset.column_names:  # drawn when looked at
        return True
    stored = dataset.select_columns("flow").cast_column("flow", OpticalFlow(decode=False))
    return stored[0]["flow"] is not None


def default_synthetic(root: str | os.PathLike[str] | None, split: str) -> Dataset:
    """Synthetic pairs as `flow_data.synthetic` draws them unless told otherwise; `root` is a folder of textures."""
    check_split("synthetic", split)
    return synthetic(SyntheticOptions(textures=None if root is None else os.fspath(root)), split=split)


# Complete counts, compared where there are any:
# - FlyingChairs, FlyingThings3D, Sintel training, HD1K: RAFT's data loaders on complete downloads.
# - Sintel test: 564 frames in 12 scenes (Butler et al. 2012), hence 552 pairs; likewise 1064 - 23 = 1041 in training.
# - KITTI: readme of the 2012 development kit (194 training, 195 test pairs) and of the 2015 one (200 of each).
# - Middlebury: the eight scenes whose ground truth is public.
# - Spring: the authors' own data loader, cv-stuttgart/spring_utils, dataloader.py: cameras and directions together.
# - TartanAir: CroCo v2 (Weinzaepfel et al. 2023) and SEA-RAFT's authors (princeton-vl/SEA-RAFT, issue 25).
SOURCES: dict[str, SourceSpec] = {
    "flying_chairs": SourceSpec(
        "FlyingChairs_release",
        layouts.flying_chairs,
        splits=("training", "validation", "all"),
        complete={"training": 22232, "validation": 640, "all": 22872},
    ),
    "kitti_2012": SourceSpec(
        "KITTI2012",
        layouts.kitti_2012,
        splits=("training", "testing", "all"),
        complete={"training": 194, "testing": 195, "all": 194},
    ),
    "kitti_2015": SourceSpec(
        "KITTI",
        layouts.kitti_2015,
        splits=("training", "testing", "all"),
        complete={"training": 200, "testing": 200, "all": 200},
    ),
    "hd1k": SourceSpec("HD1K", layouts.hd1k, ("training", "all"), {"training": 1047, "all": 1047}),
    "middlebury": SourceSpec("Middlebury", layouts.middlebury, ("training", "all"), {"training": 8, "all": 8}),
    "spring": SourceSpec(
        "Spring",
        layouts.spring,
        splits=("training", "test", "all"),
        complete={"training": 19852, "test": 3960, "all": 19852},
    ),
    "tartanair": SourceSpec("TartanAir", layouts.tartanair, ("training", "all"), {"training": 306268, "all": 306268}),
    "pairs": SourceSpec("pairs", pairs, ("training", "all"), complete={}),  # a folder: data_root/pairs
    "synthetic": SourceSpec(None, default_synthetic, ("training", "validation", "all"), complete={}),
}
for _pass in layouts.PASSES:
    SOURCES[f"flying_things_{_pass}"] = SourceSpec(
        "FlyingThings3D",
        partial(layouts.flying_things, render_pass=_pass),
        splits=("training", "test", "all"),
        complete={"training": 40302},
    )
    SOURCES[f"sintel_{_pass}"] = SourceSpec(
        "Sintel",
        partial(layouts.sintel, render_pass=_pass),
        splits=("training", "test", "all"),
        complete={"training": 1041, "test": 552, "all": 1041},
    )


def check_source(name: str) -> None:
    """Raise ValueError, with the nearest right name, where there is no such source."""
    if name not in SOURCES:
        nearest = difflib.get_close_matches(str(name), SOURCES, n=1, cutoff=0)[0]
        raise ValueError(f"unknown source {name!r}: did you mean {nearest!r}? There are {', '.join(sorted(SOURCES))}")


def check_split(name: str, split: str) -> None:
    """Raise ValueError, with the right names, where a source has no such split."""
    check_source(name)
    if split not in SOURCES[name].splits:
        raise ValueError(f"{name}: expected a split of {', '.join(SOURCES[name].splits)}, received {split!r}")


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)
