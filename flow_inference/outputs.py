"""What is written of a pair's flow: files of one pair each, or videos of all of them."""

from collections.abc import Callable
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flow_data.atomic_write import atomic_write
from flow_data.flow_io import describe_loss, write_flow
from flow_data.formats.masks import encode_mask
from flow_data.visualize import draw_flow
from flow_inference.video import VideoFlow
from flow_inference.video_files import VideoWriter

SUFFIXES = {  # what a pair's file can be -> its suffix
    "flo": ".flo",
    "npy": ".npy",
    "npz": ".npz",
    "pfm": ".pfm",
    "flo5": ".flo5",
    "kitti": ".png",
    "colour": ".png",
}
BRIGHTEST = 0.99  # share of a film's pixels that are not yet fully saturated: a few wild ones must not pale the rest
FADE = 0.95  # of a film's scale from one picture to the next, so that colours do not flicker


class FlowFiles:
    """A file of flow for each pair, and beside it `*_backward` and `*_occlusion.png` if asked for.

    Args:
        path_of: Index of a pair -> its file, whose folder is made.
        format: A key of SUFFIXES.
        backward, occlusion: Write these, too.
        colour_scale: Pixels, the length that is fully saturated in colour pictures; None: each picture's longest.

    Attributes:
        lost: Of each file of flow, the share of its pixels, 0 to 1, whose flow the format cannot hold.
    """

    def __init__(
        self,
        path_of: Callable[[int], Path],
        format: str,
        backward: bool = False,
        occlusion: bool = False,
        colour_scale: float | None = None,
    ):
        self.path_of, self.format = path_of, format
        self.backward, self.occlusion = backward, occlusion
        self.colour_scale = colour_scale
        self.lost: list[float] = []

    def write(self, pair: VideoFlow) -> None:
        """Write the files of a pair, each whole or not at all.

        Raises:
            ValueError: The format can hold the flow of no pixel at all; the message names formats that can.
            OSError: A file cannot be written.
        """
        path, *beside = self.paths(pair.index)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._write_flow(path, pair.flow)
        if self.backward and pair.backward_flow is not None:
            self._write_flow(beside.pop(0), pair.backward_flow)
        if self.occlusion and pair.occluded is not None:
            with atomic_write(beside.pop(0)) as partial:
                partial.write_bytes(encode_mask(pair.occluded.cpu().numpy()))

    def paths(self, index: int) -> list[Path]:
        """The files of a pair."""
        return result_paths(self.path_of(index), self.backward, self.occlusion, ".png")

    def _write_flow(self, path: Path, flow: Tensor) -> None:
        if self.format == "colour":
            with atomic_write(path) as partial:
                Image.fromarray(draw_flow(flow.cpu(), self.colour_scale)).save(partial)
        else:
            self.lost.append(write_flow(path, flow.permute(1, 2, 0).cpu().contiguous().numpy()))

    def describe_loss(self) -> str | None:
        """Which share of the pixels of all files the format could not hold, and what to do; None where it held all."""
        if not any(self.lost):
            return None
        remedy = (
            "use --format flo (a file ending in .flo)"
            if self.format == "kitti"
            else "the estimate has diverged there; try --mixed_precision no"
        )
        return f"{describe_loss(sum(self.lost) / len(self.lost), SUFFIXES[self.format])}: {remedy}"

    def __enter__(self) -> "FlowFiles":
        return self

    def __exit__(self, *_: object) -> None:
        pass


class FlowFilms:
    """A video of the flow in colours, and beside it `*_backward` and `*_occlusion` if asked for.

    Args:
        path: Of the video.
        frame_rate: Frames a second.
        backward, occlusion: Write these, too.
        colour_scale: Pixels, the length that is fully saturated; None: it follows the flow, slowly, within a scene.
    """

    def __init__(
        self,
        path: Path,
        frame_rate: Fraction | float,
        backward: bool = False,
        occlusion: bool = False,
        colour_scale: float | None = None,
    ):
        self.fixed_scale, self.scale = colour_scale, 0.0
        paths = result_paths(path, backward, occlusion, path.suffix)
        with ExitStack() as files:  # closes those that are open where another cannot be opened
            self.flow, *beside = [files.enter_context(VideoWriter(path, frame_rate)) for path in paths]
            self._files = files.pop_all()
        self.backward = beside.pop(0) if backward else None
        self.occlusion = beside.pop(0) if occlusion else None

    def write(self, pair: VideoFlow) -> None:
        """Add a pair's picture to each video."""
        self.scale = self.fixed_scale or self._follow(pair)
        self.flow.write(draw_flow(pair.flow.cpu(), self.scale))
        if self.backward is not None and pair.backward_flow is not None:
            self.backward.write(draw_flow(pair.backward_flow.cpu(), self.scale))
        if self.occlusion is not None and pair.occluded is not None:
            mask = pair.occluded.cpu().numpy()
            self.occlusion.write(np.where(mask[..., None], 255, 0).repeat(3, 2).astype(np.uint8))

    def _follow(self, pair: VideoFlow) -> float:
        lengths = torch.linalg.vector_norm(pair.flow[:, ::4, ::4], dim=0).flatten()
        lengths = lengths[lengths.isfinite()]  # the rest is white
        length = float(lengths.quantile(BRIGHTEST)) if len(lengths) else 0.0
        return max(length, 0.0 if pair.cut else FADE * self.scale, 1.0)  # at least a pixel: noise is no motion

    def __enter__(self) -> "FlowFilms":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._files.__exit__(kind, error, traceback)


def result_paths(path: Path, backward: bool, occlusion: bool, mask_suffix: str) -> list[Path]:
    """`flow.flo`, and if asked for `flow_backward.flo` and `flow_occlusion.png`."""
    paths = [path]
    if backward:
        paths.append(path.with_name(f"{path.stem}_backward{path.suffix}"))
    if occlusion:
        paths.append(path.with_name(f"{path.stem}_occlusion{mask_suffix}"))
    return paths
