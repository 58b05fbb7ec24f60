"""Frames of any size to a size that the model takes, and its flow back to theirs."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from modeling_raft.image_processing_raft import RaftImageProcessor, image_padding

LONGEST_ENLARGED = 1024  # pixels: a narrow strip is not enlarged in both directions beyond this


class FrameFit:
    """How frames of one size are made to fit: resized where that is asked for, then padded as by `RaftImageProcessor`.

    Args:
        height, width: Of the frames, pixels.
        max_side: Frames with a longer side are reduced to this one, in proportion; None: as they are.
        min_side: Frames with a shorter side are enlarged to this one, in proportion, as long as the other side stays
            within 1024 px and `max_side`; None: as they are.
        smallest: The model's smallest side, pixels: to it frames are padded.

    Raises:
        ValueError: `max_side` is below `min_side` or `smallest`, or there are no pixels.
    """

    def __init__(
        self,
        height: int,
        width: int,
        max_side: int | None = None,
        min_side: int | None = None,
        smallest: int = RaftImageProcessor.min_size,
    ):
        if min(height, width) < 1:
            raise ValueError(f"frames must have pixels; got {height} x {width}")
        if min_side is not None and min_side < 1:
            raise ValueError(f"min_side must be at least 1; got {min_side}")
        if max_side is not None and max_side < max(min_side or 0, smallest):
            raise ValueError(f"max_side must be at least {max(min_side or 0, smallest)}; got {max_side}")
        self.size = (height, width)
        self.resized = _resized(height, width, max_side, min_side)
        self.padding = image_padding(*self.resized, RaftImageProcessor.height_padding, smallest)

    def prepare(self, frame: np.ndarray, device: torch.device) -> Tensor:
        """`(H, W, 3)` uint8 to what `RaftForOpticalFlow` takes: `(1, 3, H', W')` float32 in [-1, 1].

        Raises:
            ValueError: The frame has another size or type.
        """
        if frame.dtype != np.uint8 or frame.shape != (*self.size, 3):
            expected = f"uint8 ({self.size[0]}, {self.size[1]}, 3)"
            raise ValueError(f"all frames must be {expected}, as the first; got {frame.dtype} {frame.shape}")
        pixels = torch.from_numpy(np.ascontiguousarray(frame)).to(device).permute(2, 0, 1)[None].float()
        if self.resized != self.size:
            pixels = F.interpolate(pixels, self.resized, mode="bilinear", antialias=True)
        return F.pad((pixels - 127.5) / 127.5, self.padding, mode="replicate")

    def restore(self, flow: Tensor) -> Tensor:
        """`(B, 2, H', W')`, in pixels of the prepared frames, to `(B, 2, H, W)` in pixels of the frames."""
        left, _, top, _ = self.padding
        height, width = self.resized
        flow = flow[..., top : top + height, left : left + width].float()
        if self.resized != self.size:
            flow = F.interpolate(flow, self.size, mode="bilinear", align_corners=False)
            flow = flow * flow.new_tensor([self.size[1] / width, self.size[0] / height]).reshape(1, 2, 1, 1)
        return flow


def _resized(height: int, width: int, max_side: int | None, min_side: int | None) -> tuple[int, int]:
    """(height, width) before padding."""
    scale = 1.0 if max_side is None else min(1.0, max_side / max(height, width))
    height, width = max(1, round(scale * height)), max(1, round(scale * width))
    shorter, longer = sorted((height, width))
    if min_side is not None and shorter < min_side:
        limit = max(longer, LONGEST_ENLARGED if max_side is None else min(max_side, LONGEST_ENLARGED))
        enlarged = min(min_side / shorter, limit / longer)  # in proportion, as far as the limit lets it
        height, width = (max(min_side, round(enlarged * side)) for side in (height, width))
    return height, width
