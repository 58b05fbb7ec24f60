"""What the outputs of a collection depend on."""

import math
from dataclasses import dataclass
from typing import Any

from flow_data.file_names import COLLECTION_FORMATS
from flow_data.flow_io import FORMAT_SUFFIXES
from flow_data.formats.jpeg_flow import BOUND


@dataclass(frozen=True)
class CollectionOptions:
    """What the outputs of a collection depend on, besides frames and weights.

    Args:
        format: A key of `FORMAT_SUFFIXES` (`flow_data.flow_io`) or `COLLECTION_FORMATS` (`flow_data.file_names`).
        backward: Also write backward flow.
        occlusion: Also write occlusion masks as images.
        confidence: Also write the forward-backward error and the occlusion mask as arrays.
        color_scale: Length of flow in pixels that is fully saturated in color images.
        bound: Pixels at which JPEG images clip flow.
        split_frames: Frames of the pieces that long sources are cut into, so that several processes share one; None:
            sources are whole.
        batch_size: As in `FlowVideo`, as are all that follow; `"auto"`: as many as memory holds, 16 at most.
    """

    format: str = "flo"
    backward: bool = False
    occlusion: bool = False
    confidence: bool = False
    color_scale: float | None = None
    bound: float = BOUND
    split_frames: int | None = None
    batch_size: int | str = 1
    num_flow_updates: int | None = None
    warm_num_flow_updates: int | None = None
    warm_start: bool = True
    max_side: int | None = None
    min_side: int | None = None
    mixed_precision: str | None = None
    intensity_range: tuple[float, float] | None = None
    tolerance: float | None = None

    def __post_init__(self) -> None:
        formats = (*FORMAT_SUFFIXES, *COLLECTION_FORMATS)
        if self.format not in formats:
            raise ValueError(f"format must be one of {', '.join(formats)}; got {self.format}")
        if self.occlusion and self.format == "h5":
            raise ValueError("occlusion writes images beside files of each pair; with format h5 use confidence")
        if self.split_frames is not None and self.split_frames < 2:
            raise ValueError(f"split_frames must be at least 2; got {self.split_frames}")
        if not (math.isfinite(self.bound) and self.bound > 0):
            raise ValueError(f"bound must be a positive number of pixels; got {self.bound}")
        if isinstance(self.batch_size, str) and self.batch_size != "auto":
            raise ValueError(f"batch_size must be a whole number or auto; got {self.batch_size}")

    def video_settings(self, batch_size: int) -> dict[str, Any]:
        """Return the arguments of `FlowVideo`."""
        names = (
            *("num_flow_updates", "warm_num_flow_updates", "warm_start", "max_side", "min_side"),
            *("mixed_precision", "intensity_range", "tolerance"),
        )
        backward = self.backward or self.occlusion or self.confidence
        return {name: getattr(self, name) for name in names} | {"backward": backward, "batch_size": batch_size}
