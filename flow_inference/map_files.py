"""Files of per-frame maps of a video (depth, segmentation): reading them, and writing results in the same form.

Maps are `.npy`, one file `(N, h, w)` or `(N, h, w, C)` or a folder with a file for each frame, or images, gray or RGB.
In a folder that holds any `.npy`, images are ignored.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from flow_data.atomic_write import atomic_write
from flow_data.file_names import natural_order
from flow_inference.frame_sources import list_frames
from modeling_raft.frames_raft import describe, read_frame


def list_maps(path: Path) -> Sequence[Path] | np.ndarray:
    """List the files of a folder in natural order of their names, or map the array `(N, h, w[, C])` of a file.

    Raises:
        ValueError, OSError: There are no maps, or the file is no such array.
    """
    if path.is_dir():
        files = [file for file in path.iterdir() if file.suffix.lower() == ".npy" and not file.name.startswith(".")]
        return sorted(files, key=lambda file: natural_order(file.name)) or list_frames(path)
    if path.suffix.lower() != ".npy":
        raise ValueError(f"{path}: maps are a folder or a .npy file")
    maps = load_npy(path)
    if maps.ndim not in (3, 4) or maps.size == 0:
        raise ValueError(f"{path}: maps must be (N, h, w) or (N, h, w, C); got {maps.shape}")
    return maps


def read_maps(maps: Sequence[Path] | np.ndarray) -> Iterator[np.ndarray]:
    """Yield every map as `(h, w)` or `(h, w, C)` float32, images in 0..255.

    Raises:
        ValueError, OSError: A map cannot be read, differs in shape from the first, or has values that are not finite.
    """
    shape: tuple[int, ...] | None = None
    for index, source in enumerate(maps, start=1):
        name = f"map of frame {index}"
        if isinstance(source, Path):
            name = f"{name} ({source})"
            source = load_npy(source) if source.suffix.lower() == ".npy" else read_image(source)
        shape = shape or source.shape
        if source.shape != shape or len(shape) not in (2, 3) or source.size == 0:
            expected = f"{shape}, as the first" if source.shape != shape else "(h, w) or (h, w, C)"
            raise ValueError(f"{name}: the shape must be {expected}; got {source.shape}")
        with np.errstate(over="ignore"):  # becomes infinite
            values = np.array(source, np.float32, order="C")
        if not np.isfinite(values).all():
            raise ValueError(f"{name} has values that are not finite, which averages would spread; replace them")
        yield values


def load_npy(path: Path) -> np.ndarray:
    """Map the array of a `.npy` file into memory, without reading it."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except ValueError as error:
        raise ValueError(f"{path}: no .npy file of numbers, or damaged ({error})") from error
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{path} must hold real numbers; got {array.dtype}")
    return array


def read_image(path: Path) -> np.ndarray:
    """Read an image as `(H, W)` or `(H, W, 3)` uint8, turned upright as frames are."""
    pixels = read_frame(path, describe(path, "map"))
    with Image.open(path) as image:
        mode = image.mode
    if mode not in ("L", "RGB") or pixels.dtype != np.uint8:
        raise ValueError(f"{path}: maps must be 8-bit gray or RGB images; got {pixels.dtype} of Pillow's mode {mode}")
    return pixels if mode == "RGB" else pixels[..., 0]


def write_map(path: Path, values: np.ndarray) -> None:
    """Write a map as float32 to `.npy`, or rounded to uint8 to an image; the file is either complete or not there."""
    with atomic_write(path) as unfinished:
        if path.suffix.lower() == ".npy":
            with unfinished.open("wb") as file:
                np.save(file, values)
        else:
            Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).save(unfinished, quality=95)  # if lossy


@contextmanager
def npy_writer(path: Path, shape: tuple[int, ...]) -> Iterator[Callable[[np.ndarray], None]]:
    """Return a function that appends maps of one shape to a `.npy`, which gets its name when the block ends well.

    After an error, `PATH.partial.npy` stays, a valid file of the maps that were written.
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
        np.lib.format.write_array_header_1_0(file, header)  # its length is fixed: numpy leaves room for the count

    with partial.open("wb", buffering=0) as file:  # so that a full disk raises in write, not at the end
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
    """Return a function that writes maps one after the other, in the format and with the names of the given ones.

    Raises:
        ValueError: Images of their format cannot be written.
        OSError: The maps cannot be written, because the disk is full, for example. Those before stay.
    """
    if isinstance(maps, np.ndarray):
        with npy_writer(path, maps.shape[1:]) as write:
            yield write
    else:
        for suffix in {source.suffix.lower() for source in maps} - {".npy"}:
            if Image.registered_extensions().get(suffix) not in Image.SAVE:
                raise ValueError(f"{path}: Pillow reads images ending in {suffix}, but cannot write them; use .png")
        path.mkdir(parents=True, exist_ok=True)
        targets = (path / source.name for source in maps)
        yield lambda values: write_map(next(targets), values)
