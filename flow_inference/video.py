"""Flow of consecutive frames, faster than pair by pair: what one pair has found out serves the next."""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flow_inference.consistency import consistency_error, is_occluded
from flow_inference.devices import computes_bf16_quickly
from flow_inference.estimator import EncodedFrame, FlowEstimator
from flow_inference.frame_sources import open_frames, read_frames
from flow_inference.held_frames import TOLERANCE, is_held
from flow_inference.scene_cuts import SceneWatch, photometric_error
from flow_inference.warm_start import project_forward, shorten
from modeling_raft import RaftForOpticalFlow
from modeling_raft.frames_raft import FrameConverter

# Chosen together, for an error that stays within 2 % of that of 12 updates from zero: docs/video.md has the figures.
WARM_UPDATES = 8
SHORTENED_BY = 0.5  # grid pixels, 4 of the image


@dataclass(frozen=True)
class VideoFlow:
    """Flow between two consecutive frames. Tensors are on the model's device, in pixels of the frames.

    Args:
        index: Of frame 1, from 0.
        frame1, frame2: `(H, W, 3)` uint8.
        flow: `(2, H, W)` float32, (x right, y down), from frame 1 to frame 2.
        num_flow_updates: That the flow took; 0 for a held frame.
        warm: The flow was started from that of the pair before.
        held: Frame 2 is a copy of frame 1; the flow is exactly 0.
        cut: The scene changes between the frames; the flow means nothing.
        flat: A frame is of one color, so that nothing can be matched; the flow means nothing, and all of frame 1
            counts as occluded.
        backward_flow: `(2, H, W)`, from frame 2 to frame 1; None unless asked for, and so the next two.
        occluded: `(H, W)` bool, pixels of frame 1 that frame 2 does not show (`flow_inference.consistency`).
        consistency_error: `(H, W)`, pixels between where a pixel starts and where flow and backward flow bring it;
            infinite where it leaves the frame.
    """

    index: int
    frame1: np.ndarray
    frame2: np.ndarray
    flow: Tensor
    num_flow_updates: int
    warm: bool = False
    held: bool = False
    cut: bool = False
    flat: bool = False
    backward_flow: Tensor | None = None
    occluded: Tensor | None = None
    consistency_error: Tensor | None = None


class FlowVideo:
    """The flow of a video, pair by pair: `for pair in FlowVideo(model, "in.mp4"): use(pair.flow)`.

    Two frames are held at a time. Each is encoded once, for the pair before it and the pair after it. A pair's flow is
    started from that of the pair before it, carried along itself (`flow_inference.warm_start`), and so needs fewer
    updates. Where the photometric error jumps, the pair is estimated once more from zero, and if that is no better, a
    new scene begins. A frame that repeats the one before it has zero flow, and what was known of the motion is kept
    for the frame after it.

    Args:
        model: In eval mode, on any device.
        frames: A video file, a folder of images, or anything that yields frames of one size: paths, the bytes of image
            files, PIL images, arrays or tensors (`modeling_raft.frames_raft`). A generator can be used once.
        num_flow_updates: Of a pair that starts from zero; None: as the model's configuration says.
        warm_num_flow_updates: Of one that starts from the pair before it; None: 8, or `num_flow_updates` if less.
        warm_start: False estimates each pair on its own: the same flow as pair by pair.
        shortened_by: The carried flow is shortened by so many grid pixels before a pair starts from it; 0 is the
            published warm start.
        backward: Estimate the flow from frame 2 to frame 1, too, and from both what is occluded.
        max_side: Estimate on frames reduced to this longer side, pixels; the flow is that of the frames themselves.
        min_side: Estimate on frames enlarged to this shorter side, pixels, which helps with frames below 128 px.
        held_tolerance: As in `is_held`, pixels; 0: exact copies only; None: look for no held frames.
        mixed_precision: `"no"`, `"bf16"` or `"fp16"`. None: bf16 with a warm start where the hardware has instructions
            for it (it moves the flow by some 0.01 px), else as the model is. A list of two frames is no video to be
            started warm, so it is not computed in bf16 unless asked for.
        intensity_range: (low, high) that become black and white; None: 0 to 255 of 8-bit frames, and the smallest and
            the largest value of the first two of 16-bit frames.

    Raises:
        ValueError: A setting is out of range, or the model is in training mode.
        ValueError, OSError: While iterating: frames cannot be read or differ in size. The pairs before were good.
    """

    def __init__(
        self,
        model: RaftForOpticalFlow,
        frames: str | os.PathLike[str] | Iterable[Any],
        *,
        num_flow_updates: int | None = None,
        warm_num_flow_updates: int | None = None,
        warm_start: bool = True,
        shortened_by: float = SHORTENED_BY,
        backward: bool = False,
        max_side: int | None = None,
        min_side: int | None = None,
        held_tolerance: float | None = TOLERANCE,
        mixed_precision: str | None = None,
        intensity_range: tuple[float, float] | None = None,
    ):
        if num_flow_updates is None:
            num_flow_updates = model.config.num_flow_updates
        if warm_num_flow_updates is None:
            warm_num_flow_updates = min(WARM_UPDATES, num_flow_updates)
        for name, value, lowest in (
            ("num_flow_updates", num_flow_updates, 1),
            ("warm_num_flow_updates", warm_num_flow_updates, 1),
            ("shortened_by", shortened_by, 0),
            ("held_tolerance", held_tolerance or 0, 0),
        ):
            if not value >= lowest:
                raise ValueError(f"{name} must be at least {lowest}; got {value}")
        is_pair = isinstance(frames, Sized) and not isinstance(frames, str) and len(frames) == 2
        if mixed_precision is None and warm_start and not is_pair and model.dtype == torch.float32:
            free = not torch.is_autocast_enabled(model.device.type)  # else the caller has chosen
            mixed_precision = "bf16" if free and computes_bf16_quickly(model.device) else None
        self.model = model
        self.frames = open_frames(frames)
        self.num_flow_updates = num_flow_updates
        self.warm_num_flow_updates = warm_num_flow_updates
        self.warm_start = warm_start
        self.shortened_by = shortened_by
        self.backward = backward
        self.max_side, self.min_side = max_side, min_side
        self.held_tolerance = held_tolerance
        self.mixed_precision = mixed_precision
        self.intensity_range = intensity_range
        self._converter = FrameConverter(intensity_range)
        self.new_estimator(128, 128)  # raises now what is wrong with the settings

    @property
    def mapped_range(self) -> tuple[float, float] | None:
        """The intensity range that became 0..255; None before frames are read, and where that is their own."""
        return self._converter.mapped_range

    def new_estimator(self, height: int, width: int) -> FlowEstimator:
        """An estimator with the video's settings for frames of a size."""
        return FlowEstimator(self.model, height, width, self.max_side, self.mixed_precision, self.min_side)

    def __iter__(self) -> Iterator[VideoFlow]:
        self._converter = FrameConverter(self.intensity_range)
        frames = read_frames(self.frames, self._converter)
        frame1 = next(frames, None)
        if frame1 is None:
            return
        scene = _Scene(self, self.new_estimator(frame1.shape[0], frame1.shape[1]))
        shown = frame1  # since when the picture is held: what drifts or fades slowly moves away from it in the end
        for index, frame2 in enumerate(frames):
            if self.held_tolerance is not None and is_held(shown, frame2, self.held_tolerance):
                yield self._held(index, frame1, frame2)
            else:
                yield scene.next_pair(index, frame1, frame2)
                shown = frame2
            frame1 = frame2

    def _held(self, index: int, frame1: np.ndarray, frame2: np.ndarray) -> VideoFlow:
        zero = torch.zeros(2, *frame1.shape[:2], device=self.model.device)
        held = VideoFlow(index, frame1, frame2, zero, num_flow_updates=0, held=True)
        return _with_backward(held, torch.zeros_like(zero)) if self.backward else held


class _Scene:
    """What is remembered of a scene from pair to pair."""

    def __init__(self, video: FlowVideo, estimator: FlowEstimator):
        self.video, self.estimator = video, estimator
        self.watch = SceneWatch()
        self.last: EncodedFrame | None = None  # frame 2 of the last pair
        self.expected: Tensor | None = None  # flow (1, 2, h, w) of the next pair

    def next_pair(self, index: int, frame1: np.ndarray, frame2: np.ndarray) -> VideoFlow:
        """Estimate the pair that follows; frame 1 is what frame 2 was, or a copy of it."""
        # If frame 1 is not what was encoded, it was held to be a copy of that.
        first = self.estimator.encode(frame1) if self.last is None else self.last
        second = self.estimator.encode(frame2)
        self.last = second
        video, start = self.video, self.expected
        updates = video.num_flow_updates if start is None else video.warm_num_flow_updates
        flow, low_res_flow, error = self._estimate(first, second, updates, start)
        if start is not None and self.watch.jumps(error):  # the start, or too few updates, may be the cause
            start, updates = None, video.num_flow_updates
            flow, low_res_flow, error = self._estimate(first, second, updates, start)
        cut = self.watch.jumps(error)
        if cut:
            self.watch.forget()
        else:
            self.watch.remember(error)
        self.expected = self._carried(low_res_flow, low_res_flow) if video.warm_start and not cut else None

        flat = any((frame == frame[:1, :1]).all() for frame in (frame1, frame2))
        pair = VideoFlow(index, frame1, frame2, flow[0], updates, warm=start is not None, cut=cut, flat=flat)
        if not video.backward:
            return pair
        # The way back is known from the way there.
        start = self._carried(low_res_flow, -low_res_flow) if video.warm_start and not cut else None
        updates = video.num_flow_updates if start is None else video.warm_num_flow_updates
        return _with_backward(pair, self.estimator.estimate([(second, first)], updates, start)[0][0])

    def _estimate(
        self, first: EncodedFrame, second: EncodedFrame, updates: int, start: Tensor | None
    ) -> tuple[Tensor, Tensor, float]:
        """Flow at both resolutions, and the photometric error."""
        flow, low_res_flow = self.estimator.estimate([(first, second)], updates, start)
        return flow, low_res_flow, photometric_error(first.thumbnail(), second.thumbnail(), low_res_flow)

    def _carried(self, low_res_flow: Tensor, values: Tensor) -> Tensor:
        """What flow carries along, shortened.

        Models have learnt to start from zero flow; motion within reach of their first look they find best from there.
        """
        return shorten(project_forward(low_res_flow, values), self.video.shortened_by)


def _with_backward(pair: VideoFlow, backward_flow: Tensor) -> VideoFlow:
    """The pair with flow `(2, H, W)` from frame 2 to frame 1, and what follows from both."""
    both = pair.flow[None], backward_flow[None]
    occluded, error = is_occluded(*both)[0], consistency_error(*both)[0]
    if pair.flat:
        occluded, error = torch.ones_like(occluded), torch.full_like(error, torch.inf)
    return dataclasses.replace(pair, backward_flow=backward_flow, occluded=occluded, consistency_error=error)
