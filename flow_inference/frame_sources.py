"""Frames from wherever they are: a video file, a folder, a list, a generator."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from flow_data.file_limits import check_pixels
from flow_data.images import read_rgb, to_rgb
from flow_data.pairing import natural_order
from flow_inference.video_files import VideoReader


def list_frames(folder: str | os.PathLike[str]) -> list[Path]:
    """The pictures of a folder in natural order of their names: frame_2 before frame_10.

    Raises:
        FileNotFoundError: There is no such folder, or no picture in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    PIL.Image.init()  # loads the plugins, which fill EXTENSION and OPEN
    pictures = [
        path
        for path in folder.iterdir()
        if PIL.Image.EXTENSION.get(path.suffix.lower()) in PIL.Image.OPEN and not path.name.startswith(".")
    ]
    if not pictures:
        raise FileNotFoundError(f"{folder}: no pictures in this folder")
    return sorted(pictures, key=lambda path: natural_order(path.name))


def open_frames(source: str | os.PathLike[str] | Iterable[Any]) -> Iterable[Any]:
    """What `source` yields frames from: a video file is opened, a folder listed, anything else taken as it is.

    Raises:
        ValueError, OSError: The file is no video, or is not there; see `VideoReader` and `list_frames`.
    """
    if not isinstance(source, (str, os.PathLike)):
        return source
    return list_frames(source) if Path(source).is_dir() else VideoReader(source)


def read_frames(frames: Iterable[Any]) -> Iterator[np.ndarray]:
    """Every frame as `(H, W, 3)` uint8, RGB, of one size.

    Args:
        frames: Arrays `(H, W, 3)` uint8, PIL images, or paths of pictures.

    Raises:
        ValueError: One is none of these, is damaged, is too large for a flow file, or differs in size from the first.
        OSError: One cannot be read.
    """
    size: tuple[int, ...] | None = None
    for number, frame in enumerate(frames, start=1):
        name = f"frame {number}"
        if isinstance(frame, (str, os.PathLike)):
            name = f"{name} ({os.fspath(frame)})"
            picture = read_rgb({"bytes": None, "path": os.fspath(frame)}, f"frame {number}")
        elif isinstance(frame, PIL.Image.Image):
            picture = to_rgb(frame, name)
        else:
            # A copy: what decodes into one buffer again and again would change the frame before this one, too.
            picture = frame.copy() if isinstance(frame, np.ndarray) else frame
        if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8 or picture.shape[2:] != (3,):
            received = (
                f"{picture.dtype} {picture.shape}" if isinstance(picture, np.ndarray) else type(picture).__name__
            )
            raise ValueError(f"{name}: expected an array uint8 (H, W, 3), a PIL image or a path; received {received}")
        if size is None:
            check_pixels(name, picture.shape[1], picture.shape[0])  # else its flow could not be written
            size = picture.shape
        if picture.shape != size:
            raise ValueError(
                f"all frames must have one size; {name} is {picture.shape[1]} x {picture.shape[0]}, the first "
                f"{size[1]} x {size[0]}"
            )
        yield picture
