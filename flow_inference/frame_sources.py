"""Frames from a video file, a folder, a list or a generator."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from flow_data.file_names import is_video, natural_order, refuse_url
from flow_data.formats.limits import check_pixels
from modeling_raft.frames_raft import FrameConverter, describe, read_frame

# Formats that Pillow recognizes, and does not decode without further programs.
NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


def list_frames(folder: str | os.PathLike[str]) -> list[Path]:
    """List the images of a folder in natural order of their names: frame_2 before frame_10.

    GIF files, which may be videos, count as images where there are no others.

    Raises:
        FileNotFoundError: There is no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    PIL.Image.init()  # loads the plugins, which fill EXTENSION and OPEN
    decoded = PIL.Image.OPEN.keys() - NOT_DECODED
    images = [
        path
        for path in folder.iterdir()
        if PIL.Image.EXTENSION.get(path.suffix.lower()) in decoded and not path.name.startswith(".")
    ]
    if not images:
        raise FileNotFoundError(f"{folder}: no images in this folder")
    stills = [path for path in images if not is_video(path)]
    return sorted(stills or images, key=lambda path: natural_order(path.name))


def open_frames(source: str | os.PathLike[str] | Iterable[Any]) -> Iterable[Any]:
    """Open a video file, list a folder, or return anything else as it is: an iterable of frames.

    Raises:
        ValueError, OSError: The file is no video, or is not there; see `VideoReader` and `list_frames`.
        MissingPackageError: Videos need the extra `video`.
    """
    if not isinstance(source, (str, os.PathLike)):
        return source
    refuse_url(source)
    if Path(source).is_dir():
        return list_frames(source)
    from flow_inference.video_files import VideoReader  # needs PyAV, which frames in memory do without

    return VideoReader(source)


def read_frames(frames: Iterable[Any], converter: FrameConverter | None = None) -> Iterator[np.ndarray]:
    """Yield every frame as `(H, W, 3)` uint8, RGB, upright, of one size.

    Args:
        frames: Frames of any kind that `modeling_raft.frames_raft.read_frame` takes.
        converter: Maps intensities to 0..255; None: by the range that the first two frames have in common.

    Raises:
        ValueError: A frame is of no such kind, is damaged or too large for a flow file, or its size differs from that
            of the first.
        OSError: A frame cannot be read.
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
