"""Writers of flow: files of each pair, or videos of all pairs."""

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
from flow_data.file_names import FORMAT_SUFFIXES
from flow_data.flow_io import describe_loss, write_flow
from flow_data.formats.masks import encode_mask
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
        format: A key of `FORMAT_SUFFIXES`.
        backward: Also write backward flow.
        occlusion: Also write occlusion masks.
        color_scale: Length of flow in pixels that is fully saturated in color images; None: the longest of each image.

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
    ):
        self.path_of, self.format = path_of, format
        self.backward, self.occlusion = backward, occlusion
        self.color_scale = color_scale
        self.lost: list[float] = []

    def write(self, pair: VideoFlow) -> None:
        """Write the files of a pair, each completely or not at all.

        Raises:
            ValueError: The format can hold the flow of no pixel; the message names formats that can.
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
        """Return the files of a pair, by its index."""
        return result_paths(self.path_of(index), self.backward, self.occlusion, ".png")

    def _write_flow(self, path: Path, flow: Tensor) -> None:
        if self.format == "color":
            with atomic_write(path) as partial:
                Image.fromarray(draw_flow(flow.cpu(), self.color_scale)).save(partial)
        else:
            self.lost.append(write_flow(path, flow.permute(1, 2, 0).cpu().contiguous().numpy()))

    def describe_loss(self) -> str | None:
        """Return a message about the pixels that the format could not hold and what to do; None where it held all."""
        if not any(self.lost):
            return None
        remedy = (
            "use --format flo (a file ending in .flo)"
            if self.format == "kitti"
            else "the estimate has diverged there; try --mixed_precision no"
        )
        return f"{describe_loss(sum(self.lost) / len(self.lost), FORMAT_SUFFIXES[self.format])}: {remedy}"

    def __enter__(self) -> "FlowFileWriter":
        return self

    def __exit__(self, *_: object) -> None:
        pass


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


def result_paths(path: Path, backward: bool, occlusion: bool, mask_suffix: str) -> list[Path]:
    """Return the paths of a result, and if asked for those beside it: `flow_backward.flo`, `flow_occlusion.png`."""
    paths = [path]
    if backward:
        paths.append(path.with_name(f"{path.stem}_backward{path.suffix}"))
    if occlusion:
        paths.append(path.with_name(f"{path.stem}_occlusion{mask_suffix}"))
    return paths
