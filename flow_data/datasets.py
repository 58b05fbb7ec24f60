"""Every data set by its name: one record each, and how to load it.

To add a data set, add a record to `DATASETS`, a reader to `flow_data.readers` and a tree to `tests/source_trees.py`.
Training, evaluation, submissions, publishing and the model card read the record, and nothing else is keyed by the name
of a data set. An incomplete or contradictory record raises when this module is imported, before a run begins.

Nothing is converted or cached: a row holds paths, and its images and flow are decoded when they are accessed.
"""

from __future__ import annotations

import difflib
import functools
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from flow_data import readers
from flow_data.formats.kitti_png import KITTI_LIMITS
from flow_data.pairing import validate_choice
from flow_data.pairs import pairs
from flow_data.synthetic import SyntheticOptions

if TYPE_CHECKING:  # takes a second, and the command line needs the names of the data sets only
    from datasets import Dataset

logger = logging.getLogger(__name__)

PADDINGS = ("split", "bottom", "none")  # as flow_inference.prediction pads frames


@dataclass(frozen=True)
class License:
    """The terms on which a data set's owners give it, from the data set's own page.

    Args:
        title: name of the data set, for people.
        terms: description of the license.
        identifier: the Hub's identifier of the license; `other` if it has none.
        homepage: address of the owners' page; None if there is none.
    """

    title: str
    terms: str
    identifier: str
    homepage: str | None


@dataclass(frozen=True)
class Protocol:
    """How a benchmark is evaluated (princeton-vl/RAFT, evaluate.py).

    Args:
        num_flow_updates: updates of the flow.
        padding: one of `PADDINGS`.
        split: evaluated unless another split is asked for.
    """

    num_flow_updates: int
    padding: str
    split: str


@dataclass(frozen=True)
class Submission:
    """What a benchmark's server takes.

    Args:
        split: without public ground truth.
        path: id of a pair -> where its flow belongs, below the submission's folder; the suffix is the format.
        limits: lowest and highest component of flow, pixels; infinite where the format has no limit.
        other_pass: name of the data set whose results the server wants in the same archive; None if there is none.
        id_of: index of a pair -> its id, where ids are consecutive indices; None where they are not.
    """

    split: str
    path: Callable[[str], str]
    limits: tuple[float, float] = (-float("inf"), float("inf"))
    other_pass: str | None = None
    id_of: Callable[[int], str] | None = None


@dataclass(frozen=True, kw_only=True)
class DatasetRecord:
    """Everything that is known of a data set.

    Args:
        name: in `train_mix`, `--dataset` and the like.
        folder: its folder below `data_root`; None if it reads no files.
        reader: (root, split) -> `datasets.Dataset` with `FLOW_FEATURES`.
        splits: name -> number of pairs in the complete download; None where that is not published or not fixed.
        training_split: trained on unless another split is asked for.
        sparse: ground truth exists at scattered pixels and must never be interpolated; None if the files decide.
        license: the terms of its owners.
        protocol: how it is evaluated.
        submission: what its server takes; None if there is no server.

    Raises:
        ValueError: the record contradicts itself.
    """

    name: str
    folder: str | None
    reader: Callable[..., Dataset]
    splits: Mapping[str, int | None]
    training_split: str = "training"
    sparse: bool | None = False
    license: License
    protocol: Protocol
    submission: Submission | None = None

    def __post_init__(self) -> None:
        used = {"training_split": self.training_split, "protocol.split": self.protocol.split}
        if self.submission is not None:
            used["submission.split"] = self.submission.split
        for key, split in used.items():
            if split not in self.splits:
                raise ValueError(f"{self.name}: {key} must be one of {', '.join(self.splits)}; got {split!r}")
        if self.protocol.padding not in PADDINGS:
            raise ValueError(
                f"{self.name}: protocol.padding must be one of {', '.join(PADDINGS)}; got {self.protocol.padding!r}"
            )
        if self.protocol.num_flow_updates < 1:
            raise ValueError(
                f"{self.name}: protocol.num_flow_updates must be at least 1; got {self.protocol.num_flow_updates}"
            )
        for key in ("title", "terms", "identifier"):
            if not getattr(self.license, key):
                raise ValueError(f"{self.name}: license.{key} must not be empty")


def index_records(records: Iterable[DatasetRecord]) -> dict[str, DatasetRecord]:
    """Name -> record.

    Raises:
        ValueError: two records have one name, or one names another that does not exist.
    """
    index: dict[str, DatasetRecord] = {}
    for record in records:
        if record.name in index:
            raise ValueError(f"{record.name}: there must be one record of a name; got two")
        index[record.name] = record
    for record in index.values():
        other = None if record.submission is None else record.submission.other_pass
        if other is not None and (other not in index or index[other].submission is None):
            raise ValueError(f"{record.name}: submission.other_pass must name a data set with a server; got {other!r}")
    return index


def load_source(name: str, root: str | os.PathLike[str] | None, split: str | None = None) -> Dataset:
    """Load a data set by name.

    Args:
        name: a key of `DATASETS`.
        root: the data set's own folder, for example `data_root / DATASETS[name].folder`; None for a data set without.
        split: one of `DATASETS[name].splits`; None is its training split. `all` is every pair with ground truth.

    Returns:
        Rows `id, image1, image2, flow, valid`, in natural order of their ids, decoded lazily. `valid` is null where
        the flow file itself says where flow is known. What is left out is counted and named in warnings. A number of
        pairs that is not the complete data set's is reported once in a process.

    Raises:
        ValueError: unknown name or split, or a malformed split file or table.
        FileNotFoundError: there is no such folder, no pair in it, or no split file.
    """
    check_source(name)
    record = DATASETS[name]
    split = record.training_split if split is None else split
    check_split(name, split)
    dataset = record.reader(root, split)
    complete = record.splits[split]
    if complete is not None and len(dataset) != complete:
        count = f"{len(dataset)} pairs in split {split}, the complete data set has {complete}"
        _warn_once(f"{name}: {count} ({os.path.abspath(root or '')})")
    return dataset


def is_sparse(name: str, dataset: Dataset) -> bool:
    """Whether ground truth exists at scattered pixels only, so that augmentation must not interpolate it.

    Args:
        name: of the data set.
        dataset: its rows; only their paths are read. Where the record leaves the answer to the files (`pairs`), they
            are sparse if any flow is a `.png` (KITTI's format).
    """
    sparse = DATASETS[name].sparse
    if sparse is not None:
        return sparse
    from flow_data.features import OpticalFlow

    stored = dataset.select_columns("flow").cast_column("flow", OpticalFlow(decode=False))
    return any(flow is not None and str(flow["path"]).lower().endswith(".png") for flow in stored["flow"])


def has_ground_truth(dataset: Dataset) -> bool:
    """Whether the rows have flow; all of them have, or none, as in the splits for submissions."""
    if "flow" not in dataset.column_names:  # drawn when accessed
        return True
    from flow_data.features import OpticalFlow

    stored = dataset.select_columns("flow").cast_column("flow", OpticalFlow(decode=False))
    return stored[0]["flow"] is not None


def check_source(name: str) -> None:
    """Raise ValueError, with the nearest right name, where there is no such data set."""
    if name not in DATASETS:
        nearest = difflib.get_close_matches(str(name), DATASETS, n=1, cutoff=0)[0]
        raise ValueError(f"unknown source {name!r}: did you mean {nearest!r}? There are {', '.join(sorted(DATASETS))}")


def check_split(name: str, split: str) -> None:
    """Raise ValueError, with the right names, where a data set has no such split."""
    check_source(name)
    validate_choice(name, "split", split, DATASETS[name].splits)


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


def _read_synthetic(root: str | os.PathLike[str] | None, split: str) -> Dataset:
    """Synthetic pairs with the default options; `root` is a folder of images to cut textures from."""
    check_split("synthetic", split)
    from flow_data.synthetic import synthetic  # needs OpenCV, which the names of data sets do without

    return synthetic(SyntheticOptions(textures=None if root is None else os.fspath(root)), split=split)


# Names in submissions: for Sintel princeton-vl/RAFT (evaluate.py); for KITTI the readme of each development kit (2015:
# "flow" in the archive's root, 2012: the root itself); for Spring the source of the authors' `flow_subsampling`, which
# makes the file to upload from a folder in the data set's own layout, flow at the size of the frames.


def _sintel_path(id: str, render_pass: str) -> str:
    scene, frame = id.split("/")
    return f"{render_pass}/{scene}/frame{int(frame.removeprefix('frame_')):04d}.flo"


def _spring_path(id: str) -> str:
    scene, view, number = id.split("/")
    return f"{scene}/flow_{view}/flow_{view}_{number}.flo5"


# Protocols: princeton-vl/RAFT, evaluate.py; for what it does not evaluate, that of the most similar benchmark.
# Synthetic pairs, of which small models learn in minutes, take as many updates as a model makes by default.
SINTEL_PROTOCOL = Protocol(num_flow_updates=32, padding="split", split="training")
KITTI_PROTOCOL = Protocol(num_flow_updates=24, padding="bottom", split="training")

# Complete counts:
# - FlyingChairs, FlyingThings3D, Sintel training, HD1K: RAFT's data loaders on complete downloads.
# - Sintel test: 564 frames in 12 scenes (Butler et al. 2012), hence 552 pairs; and 1064 - 23 = 1041 in training.
# - KITTI: readme of the 2012 development kit (194 training, 195 test pairs) and of the 2015 one (200 of each).
# - Middlebury: the eight scenes whose ground truth is public.
# - Spring: the authors' own data loader, cv-stuttgart/spring_utils, dataloader.py: cameras and directions together.
# - TartanAir: CroCo v2 (Weinzaepfel et al. 2023) and SEA-RAFT's authors (princeton-vl/SEA-RAFT, issue 25).
DATASETS: dict[str, DatasetRecord] = index_records(
    [
        DatasetRecord(
            name="flying_chairs",
            folder="FlyingChairs_release",
            reader=readers.flying_chairs,
            splits={"training": 22232, "validation": 640, "all": 22872},
            license=License(
                "FlyingChairs",
                "research only",
                "other",
                "https://lmb.informatik.uni-freiburg.de/resources/datasets/FlyingChairs.en.html",
            ),
            protocol=Protocol(num_flow_updates=24, padding="none", split="validation"),
        ),
        *(
            DatasetRecord(
                name=f"flying_things_{render_pass}",
                folder="FlyingThings3D",
                reader=partial(readers.flying_things, render_pass=render_pass),
                splits={"training": 40302, "test": None, "all": None},
                license=License(
                    f"FlyingThings3D, {render_pass} pass",
                    "research only",
                    "other",
                    "https://lmb.informatik.uni-freiburg.de/resources/datasets/SceneFlowDatasets.en.html",
                ),
                protocol=Protocol(num_flow_updates=32, padding="split", split="test"),
            )
            for render_pass in ("clean", "final")
        ),
        *(
            DatasetRecord(
                name=f"sintel_{render_pass}",
                folder="Sintel",
                reader=partial(readers.sintel, render_pass=render_pass),
                splits={"training": 1041, "test": 552, "all": 1041},
                license=License(
                    f"MPI-Sintel, {render_pass} pass", "film CC-BY 3.0", "cc-by-3.0", "http://sintel.is.tue.mpg.de"
                ),
                protocol=SINTEL_PROTOCOL,
                submission=Submission(
                    "test", partial(_sintel_path, render_pass=render_pass), other_pass=f"sintel_{other_pass}"
                ),
            )
            for render_pass, other_pass in (("clean", "final"), ("final", "clean"))
        ),
        DatasetRecord(
            name="kitti_2012",
            folder="KITTI2012",
            reader=readers.kitti_2012,
            splits={"training": 194, "testing": 195, "all": 194},
            sparse=True,
            license=License(
                "KITTI-2012",
                "CC BY-NC-SA 3.0",
                "cc-by-nc-sa-3.0",
                "https://www.cvlibs.net/datasets/kitti/eval_stereo_flow.php?benchmark=flow",
            ),
            protocol=KITTI_PROTOCOL,
            submission=Submission("testing", "{}_10.png".format, KITTI_LIMITS, id_of="{:06d}".format),
        ),
        DatasetRecord(
            name="kitti_2015",
            folder="KITTI",
            reader=readers.kitti_2015,
            splits={"training": 200, "testing": 200, "all": 200},
            sparse=True,
            license=License(
                "KITTI-2015",
                "CC BY-NC-SA 3.0",
                "cc-by-nc-sa-3.0",
                "https://www.cvlibs.net/datasets/kitti/eval_scene_flow.php?benchmark=flow",
            ),
            protocol=KITTI_PROTOCOL,
            submission=Submission("testing", "flow/{}_10.png".format, KITTI_LIMITS, id_of="{:06d}".format),
        ),
        DatasetRecord(
            name="hd1k",
            folder="HD1K",
            reader=readers.hd1k,
            splits={"training": 1047, "all": 1047},
            sparse=True,
            license=License(
                "HD1K", "CC BY-NC-SA 4.0", "cc-by-nc-sa-4.0", "http://hci-benchmark.iwr.uni-heidelberg.de"
            ),
            protocol=KITTI_PROTOCOL,
        ),
        DatasetRecord(
            name="middlebury",
            folder="Middlebury",
            reader=readers.middlebury,
            splits={"training": 8, "all": 8},
            license=License("Middlebury", "no license stated", "other", "https://vision.middlebury.edu/flow/data/"),
            protocol=SINTEL_PROTOCOL,
        ),
        DatasetRecord(
            name="spring",
            folder="Spring",
            reader=readers.spring,
            splits={"training": 19852, "test": 3960, "all": 19852},
            license=License("Spring", "CC BY 4.0", "cc-by-4.0", "https://spring-benchmark.org"),
            protocol=SINTEL_PROTOCOL,
            submission=Submission("test", _spring_path),
        ),
        DatasetRecord(
            name="tartanair",
            folder="TartanAir",
            reader=readers.tartanair,
            splits={"training": 306268, "all": 306268},
            license=License("TartanAir", "CC BY 4.0", "cc-by-4.0", "https://theairlab.org/tartanair-dataset/"),
            protocol=SINTEL_PROTOCOL,
        ),
        DatasetRecord(
            name="pairs",
            folder="pairs",
            reader=pairs,
            splits={"training": None, "all": None},
            sparse=None,
            license=License("The user's own pairs", "the user's to state", "other", None),
            protocol=SINTEL_PROTOCOL,
        ),
        DatasetRecord(
            name="synthetic",
            folder=None,
            reader=_read_synthetic,
            splits={"training": None, "validation": None, "all": None},
            license=License("Synthetic pairs drawn by this project", "BSD-3-Clause", "bsd-3-clause", None),
            protocol=Protocol(num_flow_updates=12, padding="split", split="validation"),
        ),
    ]
)
SUBMISSIONS: dict[str, Submission] = {
    name: record.submission for name, record in DATASETS.items() if record.submission is not None
}
