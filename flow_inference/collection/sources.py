"""The sources of a collection: videos and folders of frames, found by paths, patterns and lists, with output names."""

import csv
import glob
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import PIL.Image

from flow_data.file_names import find_path, is_video, natural_order, refuse_url
from flow_inference.collection.state import FOLDER, MANIFEST
from flow_inference.frame_sources import list_frames, read_frames
from modeling_raft.frames_raft import FrameConverter

WILDCARDS = frozenset("*?[")
INPUT_COLUMNS = ("input", "path", "source", "video")  # of a list file; the first is the documented one
OUTPUT_COLUMNS = ("output", "output_name", "name")
FEWEST_FRAMES = 2  # images that a folder with videos or folders in it must hold to be taken for frames


@dataclass(frozen=True)
class FlowSource:
    """A video, or a folder of frames.

    Args:
        path: Of the file or folder.
        name: Name of its output below the output folder, without a suffix: `"train/clip"`. `"."` is that folder.
        num_bytes: Of the file, or of all images; 0 where it cannot be read.
        num_frames: As far as the container gives it; None: not known.
        work: Expected work, frames x pixels; 0 where nothing is known.
    """

    path: Path
    name: str
    num_bytes: int = 0
    num_frames: int | None = None
    work: float = 0.0

    def read(self, start: int = 0, converter: FrameConverter | None = None) -> Iterator[np.ndarray]:
        """Yield the frames from one index on, `(H, W, 3)` uint8, RGB.

        Raises:
            ValueError, OSError: Frames cannot be read, or differ in size.
        """
        if self.path.is_dir():
            paths = list_frames(self.path)
            before = min(start, 2)  # the two that decide how 16-bit frames are mapped
            return islice(read_frames([*paths[:before], *paths[start:]], converter), before, None)
        from flow_inference.video_files import VideoReader  # needs PyAV, which images do without

        return read_frames(VideoReader(self.path).frames_from(start), converter)

    def frame_names(self) -> list[str] | None:
        """Return the name of each frame of a folder; None for a video, whose frames are numbered."""
        return [path.stem for path in list_frames(self.path)] if self.path.is_dir() else None


def find_sources(inputs: Sequence[str], lists: Sequence[str] = (), output: str | None = None) -> list[FlowSource]:
    """Find the sources that inputs and list files name, in natural order of their output names.

    A file is named by its stem, a folder of frames by its name, and what is found in a folder or by a pattern by its
    path from there on. The frames of a folder that is the only input are named `"."`.

    Args:
        inputs: Videos, folders of frames, folders that are searched for both, and patterns such as `"a/**/*.mp4"`.
        lists: `.txt` (a path on each line, and perhaps a tab and an output name), `.csv` (columns `input` and
            perhaps `output`) or `.jsonl` (paths, or objects with these keys). Paths are relative to the list's folder,
            or to the working directory where they are not found there.
        output: The output folder, which is not searched; nor are those of other runs.

    Returns:
        The sources, their sizes not yet looked at. What does not exist is among them, to be reported as unreadable.

    Raises:
        ValueError: Nothing is found, two sources have one output name, an output name leads out of the output folder,
            or a list cannot be understood.
        OSError: A list cannot be read.
    """
    named = [(path, name) for text in inputs for path, name in _expand(text, len(inputs) + len(lists) == 1, output)]
    for list_file in lists:
        for text, name in read_list(list_file):
            found = _expand(text, False, output)
            if name and Path(find_path(text)) not in [path for path, _ in found]:
                raise ValueError(
                    f"{list_file}: an output name is for a video or a folder of frames; {text} is a pattern or a "
                    "folder that is searched"
                )
            named += [(Path(text), name)] if name else found
    if not named:
        raise ValueError(f"{', '.join([*inputs, *lists])}: no videos and no folders of frames there")
    sources: dict[str, FlowSource] = {}
    for path, name in named:
        if name in sources and sources[name].path.resolve() != path.resolve():
            raise ValueError(
                f"{sources[name].path} and {path} would both be written to {name!r}: rename one, or give output "
                "names with --list"
            )
        sources[name] = FlowSource(path, name)
    return sorted(sources.values(), key=lambda source: natural_order(source.name))


def _expand(text: str, alone: bool, output: str | None) -> list[tuple[Path, str]]:
    """Return the sources that one input names, each with its output name."""
    refuse_url(text)
    path = Path(find_path(text))
    if not path.exists() and WILDCARDS & set(text):
        fixed = [part for part in Path(text).parts]
        while WILDCARDS & set("".join(fixed)):
            fixed.pop()
        base = Path(*fixed)
        found = [Path(match) for match in sorted(glob.glob(text, recursive=True))]
        sources = [found_path for found_path in found if found_path.is_dir() or is_video(found_path)]
        return [each for source in sources for each in _walk(source, base, output, only=True)]
    if path.is_dir():
        # The frames of a folder among others are named by it; what is found below one folder, from there on.
        own_frames = bool(_images(path))
        if output is not None and path.resolve() == Path(output).resolve() and not own_frames:
            raise ValueError(f"--output must not be the folder that is searched for videos; got {output}")
        return list(_walk(path, path if alone or not own_frames else path.resolve().parent, output))
    return [(path, path.stem)]


def _walk(folder: Path, base: Path, output: str | None, only: bool = False) -> Iterator[tuple[Path, str]]:
    """Yield the sources in a folder and in those below it; `only`: the folder may be a file, or stand for itself."""
    if not folder.is_dir():
        yield folder, _name(folder, base)
        return
    excluded = None if output is None else Path(output).resolve()
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        here = Path(root)
        real = os.path.realpath(root)
        if real in seen or (excluded is not None and Path(real) == excluded and here != folder):
            folders.clear()  # a link that leads in a circle, or results of an earlier run
            continue
        if here != folder and (here / FOLDER).is_dir():
            folders.clear()  # results of a run with another output folder
            continue
        seen.add(real)
        if only and here != folder:
            folders.clear()
            continue
        folders[:] = sorted((name for name in folders if not name.startswith(".")), key=natural_order)
        videos = [name for name in files if is_video(name) and not name.startswith(".")]
        images = _images(here)
        if len(images) >= (FEWEST_FRAMES if videos or folders else 1):
            yield here, _name(here, base, is_folder=True)
        for name in sorted(videos, key=natural_order):
            yield here / name, _name(here / name, base)


def _name(path: Path, base: Path, is_folder: bool = False) -> str:
    """Return the output name of a source below a base folder."""
    try:
        relative = path.relative_to(base)
    except ValueError:
        relative = path.resolve().relative_to(base.resolve())
    return PurePosixPath(relative if is_folder or path.is_dir() else relative.with_suffix("")).as_posix()


def _images(folder: Path) -> list[Path]:
    try:
        return [path for path in list_frames(folder) if not is_video(path)]
    except OSError:
        return []


def read_list(path: str | os.PathLike[str]) -> list[tuple[str, str | None]]:
    """Read a list of sources: (path, output name or None) of each.

    Raises:
        ValueError: It has another suffix, is no UTF-8 text, has no column of paths or a row without one, or an output
            name that leads out of the output folder or is taken by the program.
        OSError: It cannot be read.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: a list must be UTF-8 text ({error})") from error
    rows: Iterable[tuple[Any, Any]]
    if suffix == ".txt":
        lines = (line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))
        rows = [(first.strip(), rest.strip() or None) for first, _, rest in (line.partition("\t") for line in lines)]
    elif suffix == ".csv":
        rows = _csv_rows(path, text)
    elif suffix in (".jsonl", ".json"):
        rows = [_json_row(path, number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    else:
        raise ValueError(f"{path}: a list must end in .txt, .csv or .jsonl")
    return [(_resolve(path.parent, source), _check_name(path, name)) for source, name in rows]


def _csv_rows(path: Path, text: str) -> list[tuple[str, str | None]]:
    rows = [row for row in csv.reader(text.splitlines()) if any(cell.strip() for cell in row)]
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    sources = [name for name in INPUT_COLUMNS if name in header]
    source, output = 0, 1
    if sources:
        source = header.index(sources[0])
        output = next((header.index(name) for name in OUTPUT_COLUMNS if name in header), len(header))
        rows = rows[1:]
    elif any(len(row) > 2 for row in rows):
        raise ValueError(f"{path}: must have a column {INPUT_COLUMNS[0]!r}; got {', '.join(header)}")
    elif header and set(INPUT_COLUMNS) & set(re.split("[;\t]", header[0])):
        raise ValueError(f"{path}: columns must be separated by commas; got {header[0]!r}")
    pairs = []
    for row in rows:
        name = row[output].strip() if output < len(row) else ""
        if source >= len(row) or not row[source].strip():
            raise ValueError(f"{path}: every row must have a path in column {source + 1}; got {','.join(row)!r}")
        pairs.append((row[source].strip(), name or None))
    return pairs


def _json_row(path: Path, number: int, line: str) -> tuple[str, str | None]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: no JSON ({error})") from error
    if isinstance(row, str):
        return row, None
    source = next((row[key] for key in INPUT_COLUMNS if key in row), None) if isinstance(row, dict) else None
    name = next((row[key] for key in OUTPUT_COLUMNS if key in row), None) if isinstance(row, dict) else None
    if not isinstance(source, str) or not isinstance(name, str | None):
        raise ValueError(
            f"{path}, line {number}: must be a path, or an object with {INPUT_COLUMNS[0]!r} (and 'output')"
        )
    return source, name


def _resolve(folder: Path, text: str) -> str:
    """Return a path of a list in terms of the working directory."""
    refuse_url(text)
    beside = folder / text
    return str(beside) if beside.exists() or not (Path(text).exists() or WILDCARDS & set(text)) else text


def _check_name(path: Path, name: str | None) -> str | None:
    if name is None:
        return None
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or not relative.parts:
        raise ValueError(f"{path}: an output name must be a path below the output folder; got {name!r}")
    if relative.parts[0] in (FOLDER, MANIFEST) or "\0" in name:
        raise ValueError(f"{path}: an output name must be none that the program itself uses; got {name!r}")
    return relative.as_posix()


def check_outputs(sources: Iterable[FlowSource], output: Path, targets: Iterable[Path], are_files: bool) -> None:
    """Refuse outputs that would replace inputs, or would be taken for inputs the next time.

    Args:
        sources: Of the collection.
        output: The output folder.
        targets: The output of each source.
        are_files: Outputs are files, not folders of files.

    Raises:
        ValueError: An output is a source, or lies in a folder of frames or in another output that is a file.
    """
    files = {source.path.resolve() for source in sources}
    folders = {path for path in files if path.is_dir()}
    targets = list(targets)
    for target in targets:
        if are_files and (inside := set(targets) & set(target.parents)):
            raise ValueError(f"{target} would be written into the file {inside.pop()}; give another output name")
        resolved = target.resolve()
        if resolved in files or folders & {resolved, *resolved.parents}:
            raise ValueError(f"{target} would be written into what is read; choose another --output than {output}")


def measure(source: FlowSource) -> FlowSource:
    """Return the source with its size in bytes, and its frames and work as far as headers give them."""
    try:
        if source.path.is_dir():
            images = list_frames(source.path)
            with PIL.Image.open(images[0]) as image:
                pixels = image.width * image.height
            num_bytes = sum(path.stat().st_size for path in images)
            return replace(source, num_bytes=num_bytes, num_frames=len(images), work=len(images) * pixels)
        num_bytes = source.path.stat().st_size
    except (OSError, ValueError):
        return source
    try:
        from flow_inference.video_files import VideoReader

        reader = VideoReader(source.path)
        frames = reader.num_frames
        # Without a number of frames, that of a video of usual compression: a byte for ten pixels.
        work = 10.0 * num_bytes if frames is None else float(frames * reader.size[0] * reader.size[1])
        return replace(source, num_bytes=num_bytes, num_frames=frames, work=work)
    except (OSError, ValueError):
        return replace(source, num_bytes=num_bytes)


def choose_shard(sources: Sequence[FlowSource], index: int, count: int) -> list[FlowSource]:
    """Return the sources of one of `count` shares of about the same size in bytes.

    It depends on names and sizes of the files alone, so that machines which see the same files agree.

    Args:
        sources: All of them, measured.
        index: 1 to `count`.
        count: Number of shares.
    """
    shares: list[list[FlowSource]] = [[] for _ in range(count)]
    loads = [0] * count
    for source in sorted(sources, key=lambda source: (-source.num_bytes, source.name)):
        least = loads.index(min(loads))
        shares[least].append(source)
        loads[least] += source.num_bytes + 1
    return sorted(shares[index % count], key=lambda source: natural_order(source.name))
