"""Submissions: flow of test splits, in the formats and under the names that the servers of benchmarks take.

Sources: for Sintel princeton-vl/RAFT (evaluate.py); for KITTI the readme of each development kit (2015: "flow" in the
archive's root, 2012: the root itself); for Spring the source of the authors' `flow_subsampling`, which makes the file
to upload from a folder in the data set's own layout, flow at the size of the frames.
"""

import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from flow_data.flow_io import write_flow
from flow_data.images import read_pair
from flow_data.kitti_png import KITTI_LIMITS
from flow_data.pairing import first_few
from flow_data.sources import SOURCES


class Submission(NamedTuple):
    """The format of a benchmark's submissions.

    Args:
        split: The split without public ground truth.
        path: Function from the id of a pair to the path of its flow below the folder of the submission; the suffix is
            the format.
        limits: Lowest and highest component of flow that the format holds, pixels.
    """

    split: str
    path: Callable[[str], str]
    limits: tuple[float, float] = (-np.inf, np.inf)


class FramePair(NamedTuple):
    """Two frames `(H, W, 3)` uint8, RGB."""

    image1: np.ndarray
    image2: np.ndarray


def _sintel_path(id: str, render_pass: str) -> str:
    scene, frame = id.split("/")
    return f"{render_pass}/{scene}/frame{int(frame.removeprefix('frame_')):04d}.flo"


def _spring_path(id: str) -> str:
    scene, view, number = id.split("/")
    return f"{scene}/flow_{view}/flow_{view}_{number}.flo5"


SUBMISSIONS = {
    "sintel_clean": Submission("test", partial(_sintel_path, render_pass="clean")),
    "sintel_final": Submission("test", partial(_sintel_path, render_pass="final")),
    "kitti_2012": Submission("testing", "{}_10.png".format, KITTI_LIMITS),
    "kitti_2015": Submission("testing", "flow/{}_10.png".format, KITTI_LIMITS),
    "spring": Submission("test", _spring_path),
}


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
    complete = SOURCES[source].complete[split]
    if len(ids) != complete:
        which = ""
        if source.startswith("kitti"):
            which = f"; missing are {first_few(sorted({f'{number:06d}' for number in range(complete)} - {*ids}))}"
        missing.append(f"{len(ids)} pairs of the {complete} in the data set, and the server wants all{which}")
    if source.startswith("sintel"):
        other = {"sintel_clean": "sintel_final", "sintel_final": "sintel_clean"}[source]
        absent = [path for path in map(SUBMISSIONS[other].path, ids) if not (folder / path).is_file()]
        if absent:
            missing.append(f"{len(absent)} files of the other pass, which the server wants, too: run {other}")
    return missing
