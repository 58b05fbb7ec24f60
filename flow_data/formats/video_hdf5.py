"""The flow of a whole video in one `.h5` file: float16, a compressed chunk for each pair of frames.

Shapes: `N` pairs of the video, `H W` height and width in pixels.

Datasets: `flow` `(N, H, W, 2)`, and where they were asked for `backward_flow` `(N, H, W, 2)`, `consistency_error`
`(N, H, W)`, `occluded` `(N, H, W)` bool; `duplicate` and `cut` `(N,)` bool. Each has the attribute `description`, and
those in pixels `units`. Unknown flow is NaN. The same flow gives the same bytes.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

import numpy as np

from flow_data.flow_io import as_known_float16
from flow_data.optional_packages import needs_extra

with needs_extra("video"):
    import h5py

LIBRARY_VERSION = ("v108", "v110")  # of the file format: the least that holds a dataset that grows, for old readers
DESCRIPTIONS = {
    "flow": "from frame 1 to frame 2 of each pair, (x right, y down)",
    "backward_flow": "from frame 2 to frame 1 of each pair, (x right, y down)",
    "consistency_error": "distance between a pixel of frame 1 and where flow and backward flow bring it; infinite "
    "where it leaves the frame",
    "occluded": "pixels of frame 1 that frame 2 does not show",
    "duplicate": "frame 2 repeats frame 1; the flow is 0",
    "cut": "the scene changes between the frames; the flow means nothing",
}
IN_PIXELS = ("flow", "backward_flow", "consistency_error")


class FlowHdf5Writer:
    """Append the flow of one pair after the other to a `.h5` file.

    Args:
        path: Of the file; its folder exists. One that is there is replaced.
        attributes: Of the file: model and settings, as numbers or text.
    """

    def __init__(self, path: str | os.PathLike[str], attributes: Mapping[str, str | int | float] | None = None):
        self._file = h5py.File(path, "w", libver=LIBRARY_VERSION)
        self._file.attrs.update(attributes or {})
        self._file.attrs["flow_convention"] = "x to the right, then y down, in pixels of the frames"

    def append(self, arrays: Mapping[str, np.ndarray]) -> float:
        """Append a pair.

        Args:
            arrays: Some of the datasets, the same ones for each pair, without their first axis.

        Returns:
            Share of the pixels, 0 to 1, whose flow float16 cannot hold.
        """
        lost = 0.0
        for name, array in arrays.items():
            if name in ("flow", "backward_flow"):
                array, share = as_known_float16(array)
                lost = max(lost, share)
            elif name == "consistency_error":
                with np.errstate(over="ignore"):
                    array = array.astype(np.float16)
            dataset = self._dataset(name, np.asarray(array))
            dataset.resize(len(dataset) + 1, axis=0)
            dataset[-1] = array
        return lost

    def append_file(self, path: str | os.PathLike[str]) -> None:
        """Append all pairs of another such file."""
        with h5py.File(path, "r") as other:
            for index in range(len(other["flow"])):
                for name in DESCRIPTIONS:
                    if name in other:
                        array = other[name][index]
                        dataset = self._dataset(name, np.asarray(array))
                        dataset.resize(len(dataset) + 1, axis=0)
                        dataset[-1] = array

    def _dataset(self, name: str, array: np.ndarray) -> "h5py.Dataset":
        if name in self._file:
            return self._file[name]
        storage = {"compression": "gzip", "compression_opts": 4, "shuffle": True} if array.ndim else {}
        dataset = self._file.create_dataset(
            name,
            shape=(0, *array.shape),
            maxshape=(None, *array.shape),
            chunks=(1, *array.shape) if array.ndim else (1024,),
            dtype=array.dtype,
            track_times=False,
            **storage,
        )
        dataset.attrs["description"] = DESCRIPTIONS[name]
        if name in IN_PIXELS:
            dataset.attrs["units"] = "pixels"
        return dataset

    def close(self) -> None:
        """Close the file, which is then complete."""
        self._file.close()

    def __enter__(self) -> "FlowHdf5Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_flow_hdf5(
    path: str | os.PathLike[str], dataset: str = "flow", start: int = 0, stop: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Read flow of a `.h5` file pair by pair.

    Args:
        path: Of a file that `FlowHdf5Writer` has written.
        dataset: `"flow"` or `"backward_flow"`.
        start: Index of the first pair.
        stop: Index after the last pair; None: all.

    Yields:
        `(H, W, 2)` float32, pixels, 0 where unknown; and `(H, W)` bool, True where the flow is known.

    Raises:
        OSError: The file cannot be read, or is no HDF5 file.
        ValueError: It holds no such flow.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise OSError(f"{path}: no HDF5 file, or a damaged one ({error})") from error
    with file:
        stored = file.get(dataset)
        if not isinstance(stored, h5py.Dataset) or stored.ndim != 4 or stored.shape[3] != 2:
            raise ValueError(
                f"{path}: must have a dataset {dataset!r} (N, H, W, 2); got {', '.join(file) or 'nothing'}"
            )
        for index in range(*slice(start, stop).indices(len(stored))):
            try:
                flow = stored[index].astype(np.float32)
            except OSError as error:
                raise OSError(f"{path}: pair {index} cannot be read ({error})") from error
            valid = np.isfinite(flow).all(axis=-1)
            flow[~valid] = 0
            yield flow, valid
