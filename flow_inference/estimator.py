"""Flow between any two frames of a video, each of which is encoded once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flow_data.out_of_memory import attempt
from flow_inference.devices import autocast
from flow_inference.frame_fit import FrameFit
from modeling_raft import RaftForOpticalFlow, RaftImageProcessor
from modeling_raft.modeling_raft import GRID


@dataclass
class EncodedFrame:
    """What is known of a frame.

    Args:
        pixels: `(1, 3, H', W')`, as the model takes them.
        features: `(1, feature_dim, h, w)`, what is matched.
        state: first hidden state and context `(1, ., h, w)`; None until flow *from* this frame is asked for.
    """

    pixels: Tensor
    features: Tensor
    state: tuple[Tensor, Tensor] | None = None

    def thumbnail(self) -> Tensor:
        """`(1, 3, h, w)` in 0..255, on the grid of the flow."""
        return F.avg_pool2d(127.5 * (self.pixels + 1), GRID)


class FlowEstimator:
    """Estimates flow between frames of one size.

    Args:
        model: In eval mode, on any device.
        height, width: Of the frames.
        max_side, min_side: As in `FrameFit`.
        mixed_precision: As in `flow_inference.devices.autocast`.

    Raises:
        ValueError: The model is in training mode, where BatchNorm and dropout would spoil its flow; or a setting does
            not fit.
    """

    def __init__(
        self,
        model: RaftForOpticalFlow,
        height: int,
        width: int,
        max_side: int | None = None,
        mixed_precision: str | None = None,
        min_side: int | None = None,
    ):
        if model.training:
            raise ValueError("the model is in training mode; call model.eval() first")
        autocast(model.device, mixed_precision)  # says now what is wrong with it
        self.model, self.mixed_precision = model, mixed_precision
        smallest = max(RaftImageProcessor.min_size, model.config.min_image_size)
        self.fit = FrameFit(height, width, max_side, min_side, smallest)

    @torch.no_grad()
    def encode(self, frame: np.ndarray) -> EncodedFrame:
        """Encode `(H, W, 3)` uint8, RGB."""
        pixels = self.fit.prepare(frame, self.model.device)
        size = f"{pixels.shape[-2]} x {pixels.shape[-1]} px"
        with autocast(self.model.device, self.mixed_precision), attempt(f"the encoding of a frame of {size}"):
            return EncodedFrame(pixels, self.model.encode_features(pixels))

    @torch.no_grad()
    def estimate(
        self,
        pairs: Sequence[tuple[EncodedFrame, EncodedFrame]],
        num_flow_updates: int | None = None,
        initial_flow: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Flow from the first to the second frame of each pair, all pairs as one batch.

        Args:
            pairs: B of them.
            num_flow_updates: At least 1; None: as the model's configuration says.
            initial_flow: `(B, 2, h, w)` in grid pixels; None: zero.

        Returns:
            `(B, 2, H, W)` float32 in pixels of the frames, and `(B, 2, h, w)` in grid pixels, on the model's device.
        """
        if num_flow_updates is None:
            num_flow_updates = self.model.config.num_flow_updates
        height, width = pairs[0][0].pixels.shape[-2:]
        attempted = f"flow of {len(pairs)} pair(s) of {height} x {width} px frames with {num_flow_updates} updates"
        with autocast(self.model.device, self.mixed_precision), attempt(attempted):
            states = [self._state(first) for first, _ in pairs]
            updates = self.model.updates(
                torch.cat([first.features for first, _ in pairs]),
                torch.cat([second.features for _, second in pairs]),
                torch.cat([hidden for hidden, _ in states]),
                torch.cat([context for _, context in states]),
                num_flow_updates,
                initial_flow,
            )
            for hidden, low_res_flow in updates:  # noqa: B007  # the last ones are wanted
                pass
            flow = self.model.upsampler(hidden, low_res_flow)
        return self.fit.restore(flow), low_res_flow

    def _state(self, frame: EncodedFrame) -> tuple[Tensor, Tensor]:
        if frame.state is None:
            frame.state = self.model.encode_context(frame.pixels)
        return frame.state
