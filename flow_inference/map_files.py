"""Maps of a video, one for each frame, that something else has made: files to arrays, and back in the same form.

Maps are `.npy`, one file `(N, h, w)` or `(N, h, w, C)` or a folder with a file for each frame, or pictures, grey or
RGB. A folder that holds any `.npy` is one of `.npy`.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from flow_data.atomic_write import atomic_write
from flow_data.pairing import natural_order
from flow_inference.frame_sources import list_frames
from modeling_raft.frames_raft import describe, read_frame


def list_maps(path: Path) -> Sequence[Path] | np.ndarray:
    """The files of a folder in natural order of their names, or the array `(N, h, w[, C])` in a file, left on disk.

    Raises:
        ValueError, OSError: There are none, or the file is not of that kind.
    """
    if path.is_dir():
        files = [file for file in path.iterdir() if file.suffix.lower() == ".npy" and not file.name.startswith(".")]
        return sorted(files, key=lambda file: natural_order(file.name)) or list_frames(path)
    if path.suffix.lower() != ".npy":
        raise ValueError(f"{path}: maps are a folder or a .npy file")
    maps = load_npy(path)
    if maps.ndim not in (3, 4) or maps.size == 0:
        raise ValueError(f"{path}: expected maps (N, h, w) or (N, h, w, C); the file holds {maps.shape}")
    return maps


def read_maps(maps: Sequence[Path] | np.ndarray) -> Iterator[np.ndarray]:
    """Every map as `(h, w)` or `(h, w, C)` float32, pictures in 0..255.

    Raises:
        ValueError, OSError: One cannot be read, differs in shape from the first, or holds what is no finite number.
    """
    shape: tuple[int, ...] | None = None
    for number, source in enumerate(maps, start=1):
        name = f"map of frame {number}"
        if isinstance(source, Path):
            name = f"{name} ({source})"
            source = load_npy(source) if source.suffix.lower() == ".npy" else read_picture(source)
        shape = shape or source.shape
        if source.shape != shape or len(shape) not in (2, 3) or source.size == 0:
            expected = f"{shape}, as the first" if source.shape != shape else "(h, w) or (h, w, C)"
            raise ValueError(f"{name}: expected the shape {expected}; received {source.shape}")
        with np.errstate(over="ignore"):  # becomes infinite
            values = np.array(source, np.float32, order="C")
        if not np.isfinite(values).all():
            raise ValueError(f"{name}: holds values that are not finite, which averages would spread; replace them")
        yield values


def load_npy(path: Path) -> np.ndarray:
    """The array of a `.npy`, left on disk."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except ValueError as error:
        raise ValueError(f"{path}: no .npy file of numbers, or damaged ({error})") from error
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{path}: expected real numbers; the file holds {array.dtype}")
    return array


def read_picture(path: Path) -> np.ndarray:
    """`(H, W)` or `(H, W, 3)` uint8, turned upright as frames are."""
    pixels = read_frame(path, describe(path, "map"))
    with Image.open(path) as image:
        mode = image.mode
    if mode not in ("L", "RGB") or pixels.dtype != np.uint8:
        raise ValueError(f"{path}: maps must be 8-bit gray or RGB images; got {pixels.dtype} of Pillow's mode {mode}")
    return pixels if mode == "RGB" else pixels[..., 0]


def write_map(path: Path, values: np.ndarray) -> None:
    """Write one map, float32 in `.npy` and rounded to uint8 in pictures; the file is either complete or not there."""
    with atomic_write(path) as unfinished:
        if path.suffix.lower() == ".npy":
            with unfinished.open("wb") as file:
                np.save(file, values)
        else:
            Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).save(unfinished, quality=95)  # if lossy


@contextmanager
def npy_writer(path: Path, shape: tuple[int, ...]) -> Iterator[Callable[[np.ndarray], None]]:
    """A function that appends map after map, of one shape, to a `.npy`; it gets its name when the block ends well.

    Else `PATH.partial.npy` stays, a proper file of the maps that were written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial.npy")
    count = 0

    def write(values: np.ndarray) -> None:
        nonlocal count
        data = values.tobytes()
        while data:
            data = data[file.write(data) :]
        count += 1

    def write_header() -> None:
        header = {"descr": "<f4", "fortran_order": False, "shape": (count, *shape)}
        np.lib.format.write_array_header_1_0(file, header)  # of one length: numpy leaves room for a larger count

    with partial.open("wb", buffering=0) as file:  # a full disk is told by write, not at the end
        write_header()
        try:
            yield write
        except (ValueError, OSError) as error:
            raise ValueError(f"{error}; {partial} has the {count} maps before that") from error
        finally:
            file.seek(0)
            write_header()
    os.replace(partial, path)


@contextmanager
def open_output(path: Path, maps: Sequence[Path] | np.ndarray) -> Iterator[Callable[[np.ndarray], None]]:
    """A function that writes map after map, in the format and with the names of those that are given.

    Raises:
        ValueError: Pictures of their kind cannot be written.
        OSError: The disk is full, say; what is written stays.
    """
    if isinstance(maps, np.ndarray):
        with npy_writer(path, maps.shape[1:]) as write:
            yield write
    else:
        for suffix in {source.suffix.lower() for source in maps} - {".npy"}:
            if Image.registered_extensions().get(suffix) not in Image.SAVE:
                raise ValueError(f"{path}: Pillow reads pictures ending in {suffix}, but cannot write them; use .png")
        path.mkdir(parents=True, exist_ok=True)
        targets = (path / source.name for source in maps)
        yield lambda values: write_map(next(targets), values)
