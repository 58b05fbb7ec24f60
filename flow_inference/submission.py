"""Submissions: flow of test splits, in the formats and under the names that the servers of benchmarks take.

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
    """Raise ValueError, with the right names, where a source has no server."""
    if source not in SUBMISSIONS:
        raise ValueError(f"--submission: {source} has no test split for a server; there are {', '.join(SUBMISSIONS)}")


def prepare_folders(paths: Iterable[Path], flag: str = "--submission") -> None:
    """Make the folders of files that will be written, and make sure that they are writable, before days of prediction.

    Args:
        paths: Of the files.
        flag: The flag that named them, for errors.

    Raises:
        OSError: A file cannot be written there.
    """
    paths = list(paths)
    if folders := [path for path in paths if path.is_dir()]:
        raise IsADirectoryError(f"{flag}: {folders[0]} is a folder; give the name of a file")
    for folder in sorted({path.parent for path in paths}):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise OSError(f"{flag}: cannot write into {folder}: {error}") from error


def read_frames(row: Mapping[str, Any]) -> FramePair:
    """Decode the frames of a row of a source, without its flow.

    Raises:
        ValueError, OSError: A frame cannot be read, or the two differ in size; the row's id is named.
    """
    frames = FramePair(*read_pair(row))
    if frames.image1.shape != frames.image2.shape:
        sizes = " and ".join(f"{frame.shape[0]} x {frame.shape[1]}" for frame in frames)
        raise ValueError(f"{row['id']}: frames must have one size (h x w); got {sizes}")
    return frames


def write_result(path: Path, flow: Tensor, submission: Submission) -> float:
    """Write one file of a submission, over one of the same name.

    Flow beyond KITTI's range is clipped. Otherwise `write_flow` would mark it as unknown, and the server would replace
    it with the flow of its neighbors (interpolateBackground of the development kit), which is farther off.

    Args:
        path: The file, whose folder exists.
        flow: `(2, H, W)`, pixels.
        submission: The format.

    Returns:
        Share of the pixels, 0 to 1, whose flow was clipped.

    Raises:
        ValueError: Flow is not finite, which no server takes.
        OSError: The file cannot be written.
    """
    if not flow.isfinite().all():
        raise ValueError(f"{path}: the predicted flow is not finite; try without mixed precision")
    clipped = flow.clamp(*submission.limits)
    write_flow(path, clipped.permute(1, 2, 0).numpy())
    return float((clipped != flow).any(dim=0).float().mean())


def find_missing(source: str, split: str, folder: Path, ids: list[str]) -> list[str]:
    """Describe what a submission lacks.

    Args:
        source: A key of `SUBMISSIONS`.
        split: The split that was predicted.
        folder: The folder of the submission.
        ids: Ids of the pairs that were predicted.

    Returns:
        Sentences; none where the submission is complete.
    """
    submission, missing = SUBMISSIONS[source], []
    absent = [path for path in map(submission.path, ids) if not (folder / path).is_file()]
    if absent:  # where the machines of several processes do not share the folder, for example
        missing.append(f"{len(absent)} files are not in {folder}: {first_few(absent)}")
    if split != submission.split:
        return [*missing, f"these are results of split {split}; the server wants those of {submission.split}"]
    complete = DATASETS[source].splits[split]
    if complete is not None and len(ids) != complete:
        which = ""
        if submission.id_of is not None:
            which = f"; missing are {first_few(sorted({*map(submission.id_of, range(complete))} - {*ids}))}"
        missing.append(f"{len(ids)} pairs of the {complete} in the data set, and the server wants all{which}")
    if (other := submission.other_pass) is not None:
        absent = [path for path in map(SUBMISSIONS[other].path, ids) if not (folder / path).is_file()]
        if absent:
            missing.append(f"{len(absent)} files of the other pass, which the server wants, too: run {other}")
    return missing
