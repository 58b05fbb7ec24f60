"""Footage without ground truth: its clips, and which pairs of frames in them to look at, evenly over all of it."""

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from flow_data.file_names import find_path, is_video, natural_order, refuse_url
from flow_data.pairs import TABLE_SUFFIXES, read_table
from flow_inference.frame_changes import is_duplicate
from flow_inference.frame_sources import list_frames, open_frames, read_frames

# Pixels of all pairs of frames, by device: minutes of labelling, and 16 bytes of flow on the disk for each pixel.
PIXEL_BUDGET = {"cpu": 6_000_000, "other": 400_000_000}
FEWEST_PAIRS = 4  # whatever the size of the frames


class Clip(NamedTuple):
    """Consecutive frames.

    Args:
        name: Of the clip, unique, for names of files.
        frames: The path of a video, or the paths of images.
        num_frames: Their number; of a video the one that its container gives, which may be a few off.
        size: (height, width), pixels.
    """

    name: str
    frames: str | list[str]
    num_frames: int
    size: tuple[int, int]


def fingerprint(clip: Clip) -> str:
    """A text that changes with the names and sizes of the files of a clip."""
    files = [clip.frames] if isinstance(clip.frames, str) else clip.frames
    return hashlib.sha256("\n".join(f"{file} {os.path.getsize(file)}" for file in files).encode()).hexdigest()


class PlannedPair(NamedTuple):
    """A pair of frames to label: of a clip, from a frame on, and how many different frames later."""

    clip: int
    start: int
    gap: int


def open_clips(inputs: Sequence[str]) -> list[Clip]:
    """Find the clips that inputs name.

    Args:
        inputs: Videos, folders of frames, of videos or of such folders, `.txt` lists of frames, tables of pairs, and
            images, which are one clip together.

    Returns:
        Clips of at least two frames.

    Raises:
        ValueError, OSError: An input is none of these, cannot be read, or no clip has two frames.
    """
    found: list[tuple[str, str | list[str]]] = []
    images = [path for path in inputs if _is_image(path)]
    for path in inputs:
        refuse_url(path)
        if path not in images:
            found += _clips_of(Path(find_path(path)))
    if images:
        ordered = images if len(images) == 2 else sorted(images, key=natural_order)
        found.insert(0, (Path(ordered[0]).stem, [find_path(path) for path in ordered]))
    digits = len(str(len(found)))
    clips = []
    for number, (name, frames) in enumerate(found, 1):
        num_frames, size = _measure(frames)
        if num_frames >= 2:
            safe = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)
            clips.append(Clip(f"{number:0{digits}}_{safe}"[:60], frames, num_frames, size))
    if not clips:
        raise ValueError(f"flow takes two frames, and no clip of {', '.join(inputs)} has them")
    return clips


def _is_image(path: str) -> bool:
    PIL.Image.init()  # loads the plugins, which fill EXTENSION and OPEN
    suffix = Path(path).suffix.lower()
    return PIL.Image.EXTENSION.get(suffix) in PIL.Image.OPEN and suffix != ".gif" and not Path(path).is_dir()


def _clips_of(path: Path) -> list[tuple[str, str | list[str]]]:
    """(name, frames) of each clip of an input that is no image."""
    if path.is_dir():
        try:
            return [(path.name, [str(frame) for frame in list_frames(path)])]
        except FileNotFoundError:
            clips: list[tuple[str, str | list[str]]] = []
            for entry in sorted(path.iterdir(), key=lambda entry: natural_order(entry.name)):
                if entry.name.startswith("."):
                    continue
                with contextlib.suppress(FileNotFoundError):  # a folder without images or videos
                    clips += _clips_of(entry) if entry.is_dir() or is_video(entry) else []
            if not clips:
                raise FileNotFoundError(f"{path}: no images and no videos in this folder") from None
            return clips
    if path.suffix.lower() in TABLE_SUFFIXES:
        rows = read_table(str(path.absolute()))
        return [(row.id, [str(row.image1), str(row.image2)]) for row in rows]
    if path.suffix.lower() == ".txt":
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        return [(path.stem, [find_path(path.parent / line) for line in lines])]
    return [(path.stem, str(path))]


def _measure(frames: str | list[str]) -> tuple[int, tuple[int, int]]:
    """Number and (height, width) of frames."""
    first = next(read_frames(open_frames(frames)), None)
    size = (0, 0) if first is None else first.shape[:2]
    if isinstance(frames, list):
        return len(frames), size
    reader: Any = open_frames(frames)
    return reader.num_frames or sum(1 for _ in reader), size


def plan_pairs(
    clips: Sequence[Clip], gaps: Sequence[int], every: int | None, max_pairs: int | None, on_cpu: bool
) -> list[PlannedPair]:
    """Choose the pairs of frames to label, evenly over all clips for each gap.

    Args:
        clips: Of at least two frames.
        gaps: Distances in time, in frames.
        every: Begin a pair only at every so many frames of a clip; None: at each.
        max_pairs: At most so many; None: as many as hold `PIXEL_BUDGET` pixels, but at least `FEWEST_PAIRS`.
        on_cpu: Which budget.

    Returns:
        Pairs in the order of the footage.

    Raises:
        ValueError: A setting is out of range, or no clip is long enough.
    """
    given = {
        "every": [] if every is None else [every],
        "gap": gaps,
        "max_pairs": [] if max_pairs is None else [max_pairs],
    }
    for name, values in given.items():
        if min(values, default=1) < 1:
            raise ValueError(f"{name} must be at least 1; got {min(values)}")
    candidates = {
        gap: [
            PlannedPair(number, start, gap)
            for number, clip in enumerate(clips)
            for start in range(0, clip.num_frames - gap, every or 1)
        ]
        for gap in set(gaps)
    }
    everything = [pair for pairs in candidates.values() for pair in pairs]
    if not everything:
        raise ValueError(f"gap must be below the {max(clip.num_frames for clip in clips)} frames of the longest clip; "
                         f"got {min(gaps)}")  # fmt: skip
    if max_pairs is None:
        pixels = sum(clips[pair.clip].size[0] * clips[pair.clip].size[1] for pair in everything) / len(everything)
        budget = PIXEL_BUDGET["cpu" if on_cpu else "other"]
        max_pairs = max(int(budget / pixels), FEWEST_PAIRS)
    planned: list[PlannedPair] = []
    by_number = sorted(candidates.values(), key=len)  # what a rare gap leaves is for the others
    for left, pairs in zip(range(len(by_number), 0, -1), by_number, strict=True):
        share = min((max_pairs - len(planned)) // left, len(pairs))
        planned += [pairs[(2 * i + 1) * len(pairs) // (2 * share)] for i in range(share)]  # the middles of equal runs
    return sorted(planned)


def find_pairs(
    frames: Iterable[np.ndarray], wanted: dict[int, list[int]]
) -> Iterator[tuple[int, int, int, np.ndarray, np.ndarray]]:
    """Find pairs of different frames in a stream, of which only the frames of unfinished pairs are kept.

    Args:
        frames: `(H, W, 3)` uint8 each.
        wanted: Index of a first frame -> gaps. A first frame that is a copy of the frame before it has no pairs, where
            that one begins pairs itself.

    Yields:
        Indices of frame 1 and frame 2, the gap, and both frames. Copies of the frame before them do not count as a
        distance in time.
    """
    unfinished: list[tuple[int, np.ndarray, list[int]]] = []  # index and frame of each first frame, remaining gaps
    distance: dict[int, int] = {}  # first frame -> how many different frames have followed
    different: np.ndarray | None = None  # the last frame that was no copy
    last = max(wanted, default=-1)
    for index, frame in enumerate(frames):
        if unfinished and different is not None and is_duplicate(different, frame):
            continue
        different = frame
        for start, first, gaps in unfinished:
            distance[start] += 1
            if distance[start] in gaps:
                yield start, index, distance[start], first, frame
        unfinished = [entry for entry in unfinished if distance[entry[0]] < max(entry[2])]
        if index in wanted:
            unfinished.append((index, frame, wanted[index]))
            distance[index] = 0
        if index >= last and not unfinished:
            return
