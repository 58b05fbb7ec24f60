"""Flow between any two frames of one size, each of which is encoded once.

Shapes: `B` batch, `H W` frame, `H' W'` frame as the model takes it, `h w` 1/8 grid of that.
"""

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flow_data.out_of_memory import attempt
from flow_inference.cuda_graphs import Part, recorder_of
from flow_inference.devices import autocast
from modeling_raft import RaftForOpticalFlow, RaftImageProcessor
from modeling_raft.configuration_raft import DOWNSAMPLE_FACTOR
from modeling_raft.image_processing_raft import image_padding

CHECK_EVERY = 2  # updates: with a tolerance, motion is looked at after each of so many, as a GPU waits for that
LONGEST_ENLARGED = 1024  # pixels: a narrow strip is not enlarged in both directions beyond this


class InputPadder:
    """Resizes frames of one size where that is asked for, pads them as `RaftImageProcessor` does, and undoes both.

    Args:
        height: Of the frames, pixels.
        width: Of the frames, pixels.
        max_side: Frames with a longer side are reduced to this one, in proportion; None: as they are.
        min_side: Frames with a shorter side are enlarged to this one, in proportion, as long as the other side stays
            within 1024 px and `max_side`; None: as they are.
        smallest: The smallest side that the model takes, pixels; smaller frames are padded to it.

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
        left, right, top, bottom = self.padding
        self.padded_size = (self.resized[0] + top + bottom, self.resized[1] + left + right)

    def pad(self, frame: np.ndarray, device: torch.device) -> Tensor:
        """Make a frame the input of the model.

        Args:
            frame: `(H, W, 3)` uint8, RGB.
            device: Of the model.

        Returns:
            `(1, 3, H', W')` float32 in [-1, 1].

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

    def unpad(self, flow: Tensor) -> Tensor:
        """Bring flow back to the size of the frames.

        Args:
            flow: `(B, 2, H', W')`, in pixels of the padded frames.

        Returns:
            `(B, 2, H, W)` float32, in pixels of the frames.
        """
        left, _, top, _ = self.padding
        height, width = self.resized
        flow = flow[..., top : top + height, left : left + width].float()
        if self.resized != self.size:
            flow = F.interpolate(flow, self.size, mode="bilinear", align_corners=False)
            flow = flow * flow.new_tensor([self.size[1] / width, self.size[0] / height]).reshape(1, 2, 1, 1)
        return flow


def _resized(height: int, width: int, max_side: int | None, min_side: int | None) -> tuple[int, int]:
    """Return (height, width) of frames after resizing, before padding."""
    scale = 1.0 if max_side is None else min(1.0, max_side / max(height, width))
    height, width = max(1, round(scale * height)), max(1, round(scale * width))
    shorter, longer = sorted((height, width))
    if min_side is not None and shorter < min_side:
        limit = max(longer, LONGEST_ENLARGED if max_side is None else min(max_side, LONGEST_ENLARGED))
        enlarged = min(min_side / shorter, limit / longer)  # in proportion, as far as the limit lets it
        height, width = (max(min_side, round(enlarged * side)) for side in (height, width))
    return height, width


@dataclass
class EncodedFrame:
    """A frame and its encodings.

    Args:
        pixels: `(1, 3, H', W')` in [-1, 1], the model's input.
        features: `(1, feature_dim, h, w)`, what is matched between frames.
        state: First hidden state and context, `(1, ., h, w)` each; None until flow *from* this frame is asked for.
    """

    pixels: Tensor
    features: Tensor
    state: tuple[Tensor, Tensor] | None = None

    def thumbnail(self) -> Tensor:
        """Return the frame on the grid of the flow, `(1, 3, h, w)` in 0..255."""
        return F.avg_pool2d(127.5 * (self.pixels + 1), DOWNSAMPLE_FACTOR)


class Estimate(NamedTuple):
    """The flow of B pairs.

    Args:
        flow: `(B, 2, H, W)` float32 in pixels of the frames, on the model's device.
        low_res_flow: `(B, 2, h, w)` in grid pixels.
        num_flow_updates: Updates that the flow of each pair took.
    """

    flow: Tensor
    low_res_flow: Tensor
    num_flow_updates: list[int]


class FlowEstimator:
    """Estimates flow between frames of one size.

    Args:
        model: In eval mode, on any device.
        height: Of the frames, pixels.
        width: Of the frames, pixels.
        max_side: As in `InputPadder`.
        mixed_precision: As in `flow_inference.devices.autocast`.
        min_side: As in `InputPadder`.

    Raises:
        ValueError: The model is in training mode, where BatchNorm and dropout would change its flow; or a setting does
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
        autocast(model.device, mixed_precision)  # raises now what is wrong with it
        self.model, self.mixed_precision = model, mixed_precision
        smallest = max(RaftImageProcessor.min_size, model.config.min_image_size)
        self.padder = InputPadder(height, width, max_side, min_side, smallest)

    @torch.no_grad()
    def encode(self, frame: np.ndarray) -> EncodedFrame:
        """Encode a frame `(H, W, 3)` uint8, RGB."""
        return self.encode_all([frame])[0]

    @torch.no_grad()
    def encode_all(self, frames: Sequence[np.ndarray]) -> list[EncodedFrame]:
        """Encode frames `(H, W, 3)` uint8, RGB, as one batch."""
        pixels = torch.cat([self.padder.pad(frame, self.model.device) for frame in frames])
        size = f"{pixels.shape[-2]} x {pixels.shape[-1]} px"
        attempted = f"the encoding of {'a frame' if len(frames) == 1 else f'{len(frames)} frames'} of {size}"
        with autocast(self.model.device, self.mixed_precision), attempt(attempted):
            (features,) = self._run("features", self._encode_features, pixels)
        return [EncodedFrame(*encoded) for encoded in zip(pixels.split(1), features.split(1), strict=True)]

    def estimate(
        self,
        pairs: Sequence[tuple[EncodedFrame, EncodedFrame]],
        num_flow_updates: int | None = None,
        initial_flow: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Estimate flow from the first to the second frame of each pair, all pairs as one batch.

        Args:
            pairs: B of them.
            num_flow_updates: At least 1; None: as the model's configuration says.
            initial_flow: `(B, 2, h, w)` in grid pixels; None: zero.

        Returns:
            `(B, 2, H, W)` float32 in pixels of the frames, and `(B, 2, h, w)` in grid pixels, on the model's device.
        """
        return self.estimate_until(pairs, num_flow_updates, initial_flow)[:2]

    @torch.no_grad()
    def estimate_until(
        self,
        pairs: Sequence[tuple[EncodedFrame, EncodedFrame]],
        num_flow_updates: int | None = None,
        initial_flow: Tensor | None = None,
        tolerance: float | None = None,
    ) -> Estimate:
        """Estimate flow as `estimate` does, with fewer updates of the pairs whose flow does not move any more.

        Args:
            pairs: As in `estimate`.
            num_flow_updates: The largest number of updates.
            initial_flow: As in `estimate`.
            tolerance: Pixels. A pair is updated no more after an update that has moved its flow by this or less, as a
                mean over its pixels (of the frame that the model gets). Every second update is looked at. None: every
                pair gets all updates.
        """
        if num_flow_updates is None:
            num_flow_updates = self.model.config.num_flow_updates
        height, width = pairs[0][0].pixels.shape[-2:]
        attempted = f"flow of {len(pairs)} pair(s) of {height} x {width} px frames with {num_flow_updates} updates"
        with autocast(self.model.device, self.mixed_precision), attempt(attempted):
            self._encode_contexts([first for first, _ in pairs])
            states = [self._state(first) for first, _ in pairs]
            encodings = (
                torch.cat([first.features for first, _ in pairs]),
                torch.cat([second.features for _, second in pairs]),
                torch.cat([hidden for hidden, _ in states]),
                torch.cat([context for _, context in states]),
            )
            counts = [num_flow_updates] * len(pairs)
            if tolerance is None and recorder_of(self.model, len(pairs), height, width) is not None:
                start = () if initial_flow is None else (initial_flow.to(self.model.device),)
                update = partial(self._update, num_flow_updates)
                flow, low_res_flow = self._run(f"{num_flow_updates} updates", update, *encodings, *start)
            else:
                updates = self.model.updates(*encodings, num_flow_updates, initial_flow)
                hidden, low_res_flow, counts = _run_updates(updates, len(pairs), num_flow_updates, tolerance)
                flow = self.model.upsampler(hidden, low_res_flow)
        return Estimate(self.padder.unpad(flow), low_res_flow, counts)

    def _run(self, name: str, part: Part, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run a part of the model, as a CUDA graph where there can be one."""
        recorder = recorder_of(self.model, len(tensors[0]), *self.padder.padded_size)
        return part(*tensors) if recorder is None else recorder.run(self.model, name, part, *tensors)

    def _encode_features(self, pixels: Tensor) -> tuple[Tensor]:
        return (self.model.encode_features(pixels),)

    def _update(
        self,
        num_flow_updates: int,
        features1: Tensor,
        features2: Tensor,
        hidden: Tensor,
        context: Tensor,
        start: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        states = self.model.updates(features1, features2, hidden, context, num_flow_updates, start, "dense")
        hidden, flow = deque(states, maxlen=1).pop()  # the last one
        return self.model.upsampler(hidden, flow), flow

    def _encode_contexts(self, frames: Sequence[EncodedFrame]) -> None:
        """Encode as one batch the context of the frames that have none yet."""
        missing = list({id(frame): frame for frame in frames if frame.state is None}.values())
        if len(missing) > 1:
            pixels = torch.cat([frame.pixels for frame in missing])
            hidden, context = self._run("context", self.model.encode_context, pixels)
            for frame, *state in zip(missing, hidden.split(1), context.split(1), strict=True):
                frame.state = (state[0], state[1])

    def _state(self, frame: EncodedFrame) -> tuple[Tensor, Tensor]:
        if frame.state is None:
            hidden, context = self._run("context", self.model.encode_context, frame.pixels)
            frame.state = (hidden, context)
        return frame.state


def _run_updates(
    updates: Iterator[tuple[Tensor, Tensor]], batch_size: int, limit: int, tolerance: float | None
) -> tuple[Tensor, Tensor, list[int]]:
    """Update until no pair moves any more; return for each pair hidden state and flow when it had come to rest.

    What a pair gets does not depend on the others of its batch, up to rounding.
    """
    settled: dict[int, tuple[Tensor, Tensor]] = {}
    counts = [limit] * batch_size
    before: Tensor | None = None
    for number, (hidden, low_res_flow) in enumerate(updates, start=1):
        if tolerance is None or number == limit:
            continue
        if before is not None and number % CHECK_EVERY == 0:
            motion = DOWNSAMPLE_FACTOR * torch.linalg.vector_norm(low_res_flow - before, dim=1).flatten(1).mean(1)
            for index, length in enumerate(motion.tolist()):
                if length <= tolerance and index not in settled:
                    settled[index], counts[index] = (hidden[index, None], low_res_flow[index, None]), number
            if len(settled) == batch_size:
                break
        before = low_res_flow
    if settled:
        pairs = [settled.get(index, (hidden[index, None], low_res_flow[index, None])) for index in range(batch_size)]
        hidden, low_res_flow = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return hidden, low_res_flow, counts


def weights_checksum(model: RaftForOpticalFlow) -> str:
    """Return the SHA-256 of a model's weights: of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
