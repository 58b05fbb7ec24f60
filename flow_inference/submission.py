"""Results on test splits, in the formats and under the names that the benchmarks' servers take.

Formats and names are those of `flow_data.datasets`, where each data set's record has its own.
"""

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from flow_data.datasets import DATASETS, SUBMISSIONS, Submission
from flow_data.flow_io import write_flow
from flow_data.images import read_pair
from flow_data.pairing import first_few


class FramePair(NamedTuple):
    """Two frames `(H, W, 3)` uint8, RGB."""

    image1: np.ndarray
    image2: np.ndarray


def check_submission(source: str) -> None:
    """Raise ValueError, with the right names, where there is no server for a source."""
    if source not in SUBMISSIONS:
        raise ValueError(f"--submission: {source} has no test split for a server; there are {', '.join(SUBMISSIONS)}")


def prepare_folders(paths: Iterable[Path], flag: str = "--submission") -> None:
    """Make the folders of files to come, and make sure that they can be written.

    Args:
        paths: of the files.
        flag: that named them, for errors.

    Raises:
        OSError: They cannot; better known before days of prediction than after.
    """
    paths = list(paths)
    if folders := [path for path in paths if path.is_dir()]:
        raise IsADirectoryError(f"{flag}: {folders[0]} is a folder, and a file was to be written there")
    for folder in sorted({path.parent for path in paths}):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise OSError(f"{flag}: cannot write into {folder}: {error}") from error


def read_frames(row: Mapping[str, Any]) -> FramePair:
    """Decode a row of a source without looking at its flow.

    Raises:
        ValueError, OSError: A frame cannot be read, or the two differ in size; the row's id is named.
    """
    frames = FramePair(*read_pair(row))
    if frames.image1.shape != frames.image2.shape:
        sizes = " and ".join(f"{frame.shape[0]} x {frame.shape[1]}" for frame in frames)
        raise ValueError(f"{row['id']}: both frames must have one size (h x w); got {sizes}")
    return frames


def write_result(path: Path, flow: Tensor, submission: Submission) -> float:
    """Write one file of a submission; one of that name is replaced.

    Flow beyond KITTI's range is clipped: written as it is, `write_flow` would mark it as unknown, and the server would
    fill in its neighbours' flow (interpolateBackground of the development kit) in the place of a nearly right one.

    Args:
        path: its folder exists.
        flow: `(2, H, W)`, pixels.
        submission: that it is part of.

    Returns:
        Share of the pixels, 0 to 1, whose flow was clipped.

    Raises:
        ValueError: Flow is not finite: no server takes that.
        OSError: The file cannot be written.
    """
    if not flow.isfinite().all():
        raise ValueError(f"{path}: the predicted flow is not finite; try without mixed precision")
    clipped = flow.clamp(*submission.limits)
    write_flow(path, clipped.permute(1, 2, 0).numpy())
    return float((clipped != flow).any(dim=0).float().mean())


def find_missing(source: str, split: str, folder: Path, ids: list[str]) -> list[str]:
    """What a submission lacks, in sentences; nothing where it is complete.

    Args:
        source: a key of `SUBMISSIONS`.
        split: that was predicted.
        folder: of the submission.
        ids: of the pairs that were predicted.
    """
    submission, faults = SUBMISSIONS[source], []
    absent = [path for path in map(submission.path, ids) if not (folder / path).is_file()]
    if absent:  # processes on machines that do not share the folder, say
        faults.append(f"{len(absent)} files are not in {folder}: {first_few(absent)}")
    if split != submission.split:
        return [*faults, f"these are results of split {split}; the server wants those of {submission.split}"]
    complete = DATASETS[source].splits[split]
    if complete is not None and len(ids) != complete:
        which = ""
        if submission.id_of is not None:
            which = f"; missing are {first_few(sorted({*map(submission.id_of, range(complete))} - {*ids}))}"
        faults.append(f"{len(ids)} pairs of the {complete} in the data set, and the server wants all{which}")
    if (other := submission.other_pass) is not None:
        absent = [path for path in map(SUBMISSIONS[other].path, ids) if not (folder / path).is_file()]
        if absent:
            faults.append(f"{len(absent)} files of the other pass, which the server wants, too: run {other}")
    return faults
