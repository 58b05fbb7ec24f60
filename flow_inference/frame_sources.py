"""Frames from wherever they are: a video file, a folder, a list, a generator."""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from flow_data.formats.limits import check_pixels
from flow_data.pairing import natural_order
from flow_inference.video_files import VideoReader
from modeling_raft.frames_raft import FrameConverter, describe, read_frame

URL = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)  # pathlib makes one slash of two; c:/ is a drive


def list_frames(folder: str | os.PathLike[str]) -> list[Path]:
    """The images of a folder in natural order of their names: frame_2 before frame_10.

    Raises:
        FileNotFoundError: There is no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    PIL.Image.init()  # loads the plugins, which fill EXTENSION and OPEN
    images = [
        path
        for path in folder.iterdir()
        if PIL.Image.EXTENSION.get(path.suffix.lower()) in PIL.Image.OPEN and not path.name.startswith(".")
    ]
    if not images:
        raise FileNotFoundError(f"{folder}: no images in this folder")
    return sorted(images, key=lambda path: natural_order(path.name))


def open_frames(source: str | os.PathLike[str] | Iterable[Any]) -> Iterable[Any]:
    """What `source` yields frames from: a video file is opened, a folder listed, anything else taken as it is.

    Raises:
        ValueError, OSError: The file is no video, or is not there; see `VideoReader` and `list_frames`.
    """
    if not isinstance(source, (str, os.PathLike)):
        return source
    refuse_url(source)
    return list_frames(source) if Path(source).is_dir() else VideoReader(source)


def refuse_url(path: str | os.PathLike[str]) -> None:
    """Frames, folders and videos are read from files here.

    Raises:
        ValueError: The path is a URL.
    """
    if URL.match(str(path)):
        raise ValueError(f"{path} is a URL; download it, and give the path of the file")


def read_frames(frames: Iterable[Any], converter: FrameConverter | None = None) -> Iterator[np.ndarray]:
    """Every frame as `(H, W, 3)` uint8, RGB, upright, of one size.

    Args:
        frames: Frames of any kind that `modeling_raft.frames_raft.read_frame` takes.
        converter: Maps intensities to 0..255; None: by the range that the first two frames have in common.

    Raises:
        ValueError: One is of no such kind, is damaged, too large for a flow file, or of another size than the first.
        OSError: One cannot be read.
    """
    converter = converter or FrameConverter()
    size: tuple[int, ...] | None = None
    waiting: list[tuple[np.ndarray, str]] = []
    for index, frame in enumerate(frames):
        name = describe(frame, f"frame {index + 1}")
        array = read_frame(frame, name)
        if size is None:
            check_pixels(name, array.shape[1], array.shape[0])  # else its flow could not be written
            size = array.shape
        if array.shape != size:
            raise ValueError(
                f"all frames must have one size; {name} is {array.shape[1]} x {array.shape[0]}, the first "
                f"{size[1]} x {size[0]}"
            )
        waiting.append((array, name))
        if index == 0 and array.dtype != np.uint8:
            continue  # its range is chosen together with that of the next frame
        yield from converter.convert(*zip(*waiting, strict=True))
        waiting.clear()
    if waiting:
        yield from converter.convert(*zip(*waiting, strict=True))
