"""Writers of flow: files of each pair, one file of all pairs, or videos of all pairs."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flow_data.atomic_write import atomic_write
from flow_data.flow_io import (
    FORMAT_SUFFIXES,
    confidence_arrays,
    describe_loss,
    encode_with_loss,
    write_compact_flow,
    write_confidence,
    write_flow,
)
from flow_data.formats.jpeg_flow import BOUND, write_flow_jpeg
from flow_data.formats.masks import encode_mask
from flow_data.formats.numpy_files import encode_npz
from flow_data.visualize import draw_flow
from flow_inference.video import VideoFlow

BRIGHTEST = 0.99  # share of the pixels of a video below full saturation: a few outliers must not pale the rest
FADE = (
    0.95  # factor by which the scale of a video may shrink from one image to the next, so that colors do not flicker
)


class FlowFileWriter:
    """Writes a file of flow for each pair, and beside it `*_backward` and `*_occlusion.png` if asked for.

    Args:
        path_of: Function from the index of a pair to its file, whose folder is made.
        format: A key of `FORMAT_SUFFIXES`, or `"jpg"`: two images `flow_x_*` and `flow_y_*`, for which `path_of` gives
            a name that begins with `flow_x_`.
        backward: Also write backward flow.
        occlusion: Also write occlusion masks.
        color_scale: Length of flow in pixels that is fully saturated in color images; None: the longest of each image.
        confidence: Also write the forward-backward error and the occlusion mask as arrays: in the file of the flow
            where that is a .npz, else in `*_confidence.npz` beside it (`flow_data.flow_io.read_confidence`).
        bound: Pixels at which flow is clipped in JPEG images.

    Attributes:
        lost: For each file of flow, the share of its pixels, 0 to 1, whose flow the format cannot hold.
    """

    def __init__(
        self,
        path_of: Callable[[int], Path],
        format: str,
        backward: bool = False,
        occlusion: bool = False,
        color_scale: float | None = None,
        confidence: bool = False,
        bound: float = BOUND,
    ):
        self.path_of, self.format = path_of, format
        self.backward, self.occlusion, self.confidence = backward, occlusion, confidence
        self.color_scale, self.bound = color_scale, bound
        self.lost: list[float] = []

    def write(self, pair: VideoFlow) -> None:
        """Write the files of a pair, each completely or not at all.

        Raises:
            ValueError: The format can hold the flow of no pixel; the message names formats that can.
            OSError: A file cannot be written.
        """
        path = self.path_of(pair.index)
        path.parent.mkdir(parents=True, exist_ok=True)
        confidence = _confidence(pair) if self.confidence else None
        holds_more = path.suffix == ".npz"
        self._write_flow(path, pair.flow, confidence if holds_more else None)
        if self.backward and pair.backward_flow is not None:
            self._write_flow(_beside(path, "backward"), pair.backward_flow, None)
        if self.occlusion and pair.occluded is not None:
            with atomic_write(_beside(path, "occlusion", ".png")) as partial:
                partial.write_bytes(encode_mask(pair.occluded.cpu().numpy()))
        if confidence is not None and not holds_more:
            write_confidence(_beside(path, "confidence", ".npz"), **confidence)

    def paths(self, index: int) -> list[Path]:
        """Return the files of a pair, by its index."""
        path = self.path_of(index)
        paths = result_paths(path, self.backward, self.occlusion, ".png")
        if self.format == "jpg":
            paths += [_y_path(part) for part in paths if part.suffix == ".jpg"]
        if self.confidence and path.suffix != ".npz":
            paths.append(_beside(path, "confidence", ".npz"))
        return paths

    def _write_flow(self, path: Path, flow: Tensor, further: Mapping[str, np.ndarray] | None) -> None:
        if self.format == "color":
            with atomic_write(path) as partial:
                Image.fromarray(draw_flow(flow.cpu(), self.color_scale)).save(partial)
            return
        array = _as_array(flow)
        if self.format == "npz16":
            stored = None if further is None else confidence_arrays(**further)
            self.lost.append(write_compact_flow(path, array, stored))
        elif self.format == "jpg":
            self.lost.append(write_flow_jpeg(path, _y_path(path), array, self.bound))
        elif further is None:
            self.lost.append(write_flow(path, array))
        else:
            known = np.isfinite(array).all(axis=-1)
            self.lost.append(encode_with_loss(array, None, path.suffix, str(path))[1])
            with atomic_write(path) as partial:
                partial.write_bytes(encode_npz(np.where(known[..., None], array, np.nan), known, further))

    def describe_loss(self) -> str | None:
        """Return a message about the pixels that the format could not hold and what to do; None where it held all."""
        if not any(self.lost):
            return None
        share = sum(self.lost) / len(self.lost)
        return describe_format_loss(share, self.format, self.bound)

    def __enter__(self) -> "FlowFileWriter":
        return self

    def __exit__(self, *_: object) -> None:
        pass


class FlowArchiveWriter:
    """Writes the flow of all pairs into one `.h5` file (`flow_data.formats.video_hdf5`).

    Args:
        path: Of the file, whose folder is made.
        attributes: Of the file: model and settings.
        backward: Also write backward flow.
        confidence: Also write the forward-backward error and the occlusion mask.

    Attributes:
        lost: For each pair, the share of its pixels, 0 to 1, whose flow float16 cannot hold.

    Raises:
        MissingPackageError: h5py is not installed.
    """

    def __init__(
        self,
        path: Path,
        attributes: Mapping[str, str | int | float],
        backward: bool = False,
        confidence: bool = False,
    ):
        from flow_data.formats.video_hdf5 import FlowHdf5Writer  # needs h5py, which other files do without

        path.parent.mkdir(parents=True, exist_ok=True)
        self.backward, self.confidence = backward, confidence
        self.lost: list[float] = []
        self._file = FlowHdf5Writer(path, attributes)

    def write(self, pair: VideoFlow) -> None:
        """Append a pair."""
        arrays = {"flow": _as_array(pair.flow), "duplicate": np.array(pair.duplicate), "cut": np.array(pair.cut)}
        if self.backward and pair.backward_flow is not None:
            arrays["backward_flow"] = _as_array(pair.backward_flow)
        if self.confidence:
            arrays |= _confidence(pair)
        self.lost.append(self._file.append(arrays))

    def append_file(self, path: Path) -> None:
        """Append all pairs of another such file."""
        self._file.append_file(path)

    def __enter__(self) -> "FlowArchiveWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class FlowVideoWriter:
    """Writes a video of the flow in colors, and beside it `*_backward` and `*_occlusion` if asked for.

    Args:
        path: Of the video.
        frame_rate: Frames per second.
        backward: Also write a video of backward flow.
        occlusion: Also write a video of occlusion masks.
        color_scale: Length of flow in pixels that is fully saturated; None: it follows the flow, slowly, in a scene.

    Raises:
        ValueError, OSError: As `VideoWriter` raises them.
        MissingPackageError: Videos need the extra `video`.
    """

    def __init__(
        self,
        path: Path,
        frame_rate: Fraction | float,
        backward: bool = False,
        occlusion: bool = False,
        color_scale: float | None = None,
    ):
        from flow_inference.video_files import VideoWriter  # needs PyAV, which files of flow do without

        self.fixed_scale, self.scale = color_scale, 0.0
        paths = result_paths(path, backward, occlusion, path.suffix)
        with ExitStack() as files:  # closes the open ones where one cannot be opened
            self.flow, *beside = [files.enter_context(VideoWriter(path, frame_rate)) for path in paths]
            self._files = files.pop_all()
        self.backward = beside.pop(0) if backward else None
        self.occlusion = beside.pop(0) if occlusion else None

    def write(self, pair: VideoFlow) -> None:
        """Append the images of a pair to the videos."""
        self.scale = self.fixed_scale or self._scale_of(pair)
        self.flow.write(draw_flow(pair.flow.cpu(), self.scale))
        if self.backward is not None and pair.backward_flow is not None:
            self.backward.write(draw_flow(pair.backward_flow.cpu(), self.scale))
        if self.occlusion is not None and pair.occluded is not None:
            mask = pair.occluded.cpu().numpy()
            self.occlusion.write(np.where(mask[..., None], 255, 0).repeat(3, 2).astype(np.uint8))

    def describe_loss(self) -> None:
        """A video has a color for every flow."""

    def _scale_of(self, pair: VideoFlow) -> float:
        """Return the scale that follows the flow of the pairs so far."""
        lengths = torch.linalg.vector_norm(pair.flow[:, ::4, ::4], dim=0).flatten()
        lengths = lengths[lengths.isfinite()]  # flow that is not finite is drawn white
        length = float(lengths.quantile(BRIGHTEST)) if len(lengths) else 0.0
        return max(length, 0.0 if pair.cut else FADE * self.scale, 1.0)  # at least a pixel, since less is noise

    def __enter__(self) -> "FlowVideoWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._files.__exit__(kind, error, traceback)


def describe_format_loss(share: float, format: str, bound: float = BOUND) -> str:
    """Describe which share of the pixels a format could not hold, and what to do.

    Args:
        share: 0 to 1, more than 0.
        format: A key of `FORMAT_SUFFIXES` or of `COLLECTION_FORMATS`.
        bound: Pixels at which JPEG images clip flow.
    """
    percent = f"{100 * share:.3g} %" if share >= 1e-4 else "less than 0.01 %"
    if format == "jpg":
        return f"{percent} of the pixels have flow beyond {bound:g} px, which is clipped: use a larger --bound"
    if format in ("npz16", "h5"):
        return f"{percent} of the pixels could not be written as float16 (up to 65,504 px): use --format npz"
    remedy = (
        "use --format flo (a file ending in .flo)"
        if format == "kitti"
        else "the estimate has diverged there; try --mixed_precision no"
    )
    return f"{describe_loss(share, FORMAT_SUFFIXES[format])}: {remedy}"


def result_paths(path: Path, backward: bool, occlusion: bool, mask_suffix: str) -> list[Path]:
    """Return the paths of a result, and if asked for those beside it: `flow_backward.flo`, `flow_occlusion.png`."""
    paths = [path]
    if backward:
        paths.append(_beside(path, "backward"))
    if occlusion:
        paths.append(_beside(path, "occlusion", mask_suffix))
    return paths


def _beside(path: Path, what: str, suffix: str | None = None) -> Path:
    return path.with_name(f"{path.stem}_{what}{path.suffix if suffix is None else suffix}")


def _y_path(x_path: Path) -> Path:
    return x_path.with_name(f"flow_y_{x_path.name.removeprefix('flow_x_')}")


def _as_array(flow: Tensor) -> np.ndarray:
    """Return flow `(2, H, W)` as `(H, W, 2)` in memory."""
    return np.ascontiguousarray(flow.cpu().numpy().transpose(1, 2, 0))


def _confidence(pair: VideoFlow) -> dict[str, np.ndarray]:
    """Return forward-backward error and occlusion mask by their names in files."""
    if pair.consistency_error is None or pair.occluded is None:
        raise ValueError("confidence needs flow in both directions: FlowVideo(..., backward=True)")
    return {
        "consistency_error": pair.consistency_error.cpu().numpy(),
        "occluded": pair.occluded.cpu().numpy(),
    }
