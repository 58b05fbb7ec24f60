"""Flow of consecutive frames, faster than pair by pair: each frame is encoded once, and each pair starts warm.

Shapes: `H W` frame, `h w` 1/8 grid.
"""

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
from flow_inference.frame_changes import DUPLICATE_TOLERANCE, SceneCutDetector, is_duplicate, photometric_error
from flow_inference.frame_sources import open_frames, read_frames
from flow_inference.warm_start import forward_interpolate, shrink_flow
from modeling_raft import RaftForOpticalFlow
from modeling_raft.frames_raft import FrameConverter

# Chosen together, for an error within 2 % of that of 12 updates from zero: docs/video.md has the measurements.
WARM_UPDATES = 8
SHRINK_BY = 0.5  # grid pixels, 4 of the image


@dataclass(frozen=True)
class VideoFlow:
    """Flow between two consecutive frames. Tensors are on the model's device, in pixels of the frames.

    Args:
        index: Index of frame 1, from 0.
        frame1: `(H, W, 3)` uint8, RGB.
        frame2: `(H, W, 3)` uint8, RGB.
        flow: `(2, H, W)` float32, (x right, y down), from frame 1 to frame 2.
        num_flow_updates: Updates that the flow took; 0 for a duplicate frame.
        warm: The flow was started from that of the pair before.
        duplicate: Frame 2 is a copy of frame 1; the flow is exactly 0.
        cut: The scene changes between the frames; the flow means nothing.
        flat: A frame is of one color, so that nothing can be matched; the flow means nothing, and all of frame 1
            counts as occluded.
        backward_flow: `(2, H, W)`, from frame 2 to frame 1. It and the next two are None unless `backward` asks for
            them.
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
    duplicate: bool = False
    cut: bool = False
    flat: bool = False
    backward_flow: Tensor | None = None
    occluded: Tensor | None = None
    consistency_error: Tensor | None = None


class FlowVideo:
    """The flow of a video, pair by pair: `for pair in FlowVideo(model, "in.mp4"): use(pair.flow)`.

    Two frames are in memory at a time. Each is encoded once, for the pair before it and the pair after it. A pair's
    flow is started from that of the pair before it, moved along itself (`flow_inference.warm_start`), and so needs
    fewer updates. Where the photometric error rises sharply, the pair is estimated once more from zero, and if that is
    no better, a new scene begins. A duplicate frame has zero flow, and the pair after it starts from the motion before
    it.

    Args:
        model: In eval mode, on any device.
        frames: A video file, a folder of images, or anything that yields frames of one size: paths, the bytes of image
            files, PIL images, arrays or tensors (`modeling_raft.frames_raft`). A generator can be used once.
        num_flow_updates: Updates of a pair that starts from zero; None: as the model's configuration says.
        warm_num_flow_updates: Updates of a pair that starts from the pair before it; None: 8, or `num_flow_updates` if
            less.
        warm_start: False estimates each pair on its own: the same flow as pair by pair.
        shrink_by: Grid pixels by which the vectors of the flow that a pair starts from are shortened; 0 is the
            published warm start.
        backward: Estimate the flow from frame 2 to frame 1, too, and from both what is occluded.
        max_side: Estimate on frames reduced to this longer side, pixels; the flow is that of the frames themselves.
        min_side: Estimate on frames enlarged to this shorter side, pixels, which helps with frames below 128 px.
        duplicate_tolerance: As in `is_duplicate`, pixels; 0: exact copies only; None: estimate the flow of duplicate
            frames as of others.
        mixed_precision: `"no"`, `"bf16"` or `"fp16"`. None: bf16 with a warm start where the hardware has instructions
            for it (it changes the flow by some 0.01 px), else as the model is. A list of two frames has no warm start,
            so it is not computed in bf16 unless asked for.
        intensity_range: (low, high) that become black and white; None: 0 to 255 of 8-bit frames, and the smallest and
            the largest value of the first two of 16-bit frames.
        tolerance: Pixels. A pair is updated no more once an update moves its flow by this or less, as a mean over the
            frame that the model gets; None: all updates.
        batch_size: Pairs that are estimated at once, which needs `warm_start=False`: else a pair waits for the one
            before it.

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
        shrink_by: float = SHRINK_BY,
        backward: bool = False,
        max_side: int | None = None,
        min_side: int | None = None,
        duplicate_tolerance: float | None = DUPLICATE_TOLERANCE,
        mixed_precision: str | None = None,
        intensity_range: tuple[float, float] | None = None,
        tolerance: float | None = None,
        batch_size: int = 1,
    ):
        if num_flow_updates is None:
            num_flow_updates = model.config.num_flow_updates
        if warm_num_flow_updates is None:
            warm_num_flow_updates = min(WARM_UPDATES, num_flow_updates)
        for name, value, lowest in (
            ("num_flow_updates", num_flow_updates, 1),
            ("warm_num_flow_updates", warm_num_flow_updates, 1),
            ("shrink_by", shrink_by, 0),
            ("duplicate_tolerance", duplicate_tolerance or 0, 0),
            ("tolerance", tolerance or 0, 0),
            ("batch_size", batch_size, 1),
        ):
            if not value >= lowest:
                raise ValueError(f"{name} must be at least {lowest}; got {value}")
        if batch_size > 1 and warm_start:
            raise ValueError(f"batch_size must be 1 with warm_start, where a pair waits for another; got {batch_size}")
        is_pair = isinstance(frames, Sized) and not isinstance(frames, str) and len(frames) == 2
        if mixed_precision is None and warm_start and not is_pair and model.dtype == torch.float32:
            free = not torch.is_autocast_enabled(model.device.type)  # else the caller has chosen
            mixed_precision = "bf16" if free and computes_bf16_quickly(model.device) else None
        self.model = model
        self.frames = open_frames(frames)
        self.num_flow_updates = num_flow_updates
        self.warm_num_flow_updates = warm_num_flow_updates
        self.warm_start = warm_start
        self.shrink_by = shrink_by
        self.backward = backward
        self.max_side, self.min_side = max_side, min_side
        self.duplicate_tolerance = duplicate_tolerance
        self.mixed_precision = mixed_precision
        self.intensity_range = intensity_range
        self.tolerance, self.batch_size = tolerance, batch_size
        self._converter = FrameConverter(intensity_range)
        self.new_estimator(128, 128)  # raises now what is wrong with the settings, not at the first frame

    @property
    def mapped_range(self) -> tuple[float, float] | None:
        """The intensity range that was mapped to 0..255; None before frames are read, and for 8-bit frames."""
        return self._converter.mapped_range

    def new_estimator(self, height: int, width: int) -> FlowEstimator:
        """Return an estimator with the settings of the video, for frames of a size."""
        return FlowEstimator(self.model, height, width, self.max_side, self.mixed_precision, self.min_side)

    def __iter__(self) -> Iterator[VideoFlow]:
        self._converter = FrameConverter(self.intensity_range)
        frames = read_frames(self.frames, self._converter)
        frame1 = next(frames, None)
        if frame1 is None:
            return
        scene = _Scene(self, self.new_estimator(frame1.shape[0], frame1.shape[1]))
        original = frame1  # what copies are compared with, so that slow drift and fades leave it in the end
        duplicates: dict[int, VideoFlow] = {}
        batch: list[tuple[int, np.ndarray, np.ndarray]] = []
        for index, frame2 in enumerate(frames):
            if self.duplicate_tolerance is not None and is_duplicate(original, frame2, self.duplicate_tolerance):
                duplicates[index] = self._duplicate(index, frame1, frame2)
            else:
                batch.append((index, frame1, frame2))
                original = frame2
            frame1 = frame2
            if len(batch) == self.batch_size or not batch:
                yield from _in_order(scene.next_pairs(batch), duplicates)
                duplicates, batch = {}, []
        yield from _in_order(scene.next_pairs(batch), duplicates)

    def _duplicate(self, index: int, frame1: np.ndarray, frame2: np.ndarray) -> VideoFlow:
        zero = torch.zeros(2, *frame1.shape[:2], device=self.model.device)
        pair = VideoFlow(index, frame1, frame2, zero, num_flow_updates=0, duplicate=True)
        return _with_backward(pair, torch.zeros_like(zero)) if self.backward else pair


class _Scene:
    """The state that passes from pair to pair of a scene."""

    def __init__(self, video: FlowVideo, estimator: FlowEstimator):
        self.video, self.estimator = video, estimator
        self.cut_detector = SceneCutDetector()
        self.last: EncodedFrame | None = None  # frame 2 of the last pair
        self.initial_flow: Tensor | None = None  # of the next pair, (1, 2, h, w)

    def next_pairs(self, batch: list[tuple[int, np.ndarray, np.ndarray]]) -> list[VideoFlow]:
        """Estimate the next pairs, each of which begins with frame 2 of the one before, or with a duplicate of it."""
        if len(batch) <= 1:
            return [self.next_pair(*pair) for pair in batch]
        frames = [frame2 for _, _, frame2 in batch]
        encoded = self.estimator.encode_all(frames if self.last is not None else [batch[0][1], *frames])
        if self.last is not None:
            encoded.insert(0, self.last)
        self.last = encoded[-1]
        video, pairs = self.video, list(zip(encoded[:-1], encoded[1:], strict=True))
        forward = self.estimator.estimate_until(pairs, video.num_flow_updates, None, video.tolerance)
        results = []
        for i, ((index, frame1, frame2), (first, second)) in enumerate(zip(batch, pairs, strict=True)):
            error = photometric_error(first.thumbnail(), second.thumbnail(), forward.low_res_flow[i, None])
            updates = forward.num_flow_updates[i]
            cut, flat = self._is_cut(error), _is_flat(frame1, frame2)
            results.append(VideoFlow(index, frame1, frame2, forward.flow[i].clone(), updates, cut=cut, flat=flat))
        if video.backward:
            swapped = [(second, first) for first, second in pairs]
            backward = self.estimator.estimate_until(swapped, video.num_flow_updates, None, video.tolerance)
            results = [_with_backward(*both) for both in zip(results, backward.flow.clone(), strict=True)]
        return results

    def next_pair(self, index: int, frame1: np.ndarray, frame2: np.ndarray) -> VideoFlow:
        """Estimate the next pair, whose frame 1 is frame 2 of the last pair, or a duplicate of it."""
        first = self.estimator.encode(frame1) if self.last is None else self.last
        second = self.estimator.encode(frame2)
        self.last = second
        video, start = self.video, self.initial_flow
        updates = video.num_flow_updates if start is None else video.warm_num_flow_updates
        flow, low_res_flow, used, error = self._estimate(first, second, updates, start)
        if start is not None and self.cut_detector.is_cut(error):  # the start, or too few updates, may be the cause
            start, updates = None, video.num_flow_updates
            flow, low_res_flow, used, error = self._estimate(first, second, updates, start)
        cut = self._is_cut(error)
        self.initial_flow = self._moved(low_res_flow, low_res_flow) if video.warm_start and not cut else None

        flat = _is_flat(frame1, frame2)
        pair = VideoFlow(index, frame1, frame2, flow[0], used, warm=start is not None, cut=cut, flat=flat)
        if not video.backward:
            return pair
        # Backward flow is about the negative of forward flow, at the place where that leads.
        start = self._moved(low_res_flow, -low_res_flow) if video.warm_start and not cut else None
        updates = video.num_flow_updates if start is None else video.warm_num_flow_updates
        backward = self.estimator.estimate_until([(second, first)], updates, start, video.tolerance)
        return _with_backward(pair, backward.flow[0])

    def _is_cut(self, error: float) -> bool:
        """Return whether the scene ends with a pair, and have the detector remember its error."""
        cut = self.cut_detector.is_cut(error)
        if cut:
            self.cut_detector.reset()
        else:
            self.cut_detector.update(error)
        return cut

    def _estimate(
        self, first: EncodedFrame, second: EncodedFrame, updates: int, start: Tensor | None
    ) -> tuple[Tensor, Tensor, int, float]:
        """Return flow at both resolutions, the updates that it took, and the photometric error."""
        estimate = self.estimator.estimate_until([(first, second)], updates, start, self.video.tolerance)
        error = photometric_error(first.thumbnail(), second.thumbnail(), estimate.low_res_flow)
        return estimate.flow, estimate.low_res_flow, estimate.num_flow_updates[0], error

    def _moved(self, low_res_flow: Tensor, values: Tensor) -> Tensor:
        """Return `values` `(1, 2, h, w)` moved along the flow, with shortened vectors.

        Models were trained to start from zero flow, from which they find best the motion within the reach of their
        first lookup.
        """
        return shrink_flow(forward_interpolate(low_res_flow, values), self.video.shrink_by)


def _in_order(pairs: list[VideoFlow], duplicates: dict[int, VideoFlow]) -> Iterator[VideoFlow]:
    """Yield estimated pairs and duplicates in the order of their indices."""
    found = duplicates | {pair.index: pair for pair in pairs}
    return (found[index] for index in sorted(found))


def _is_flat(frame1: np.ndarray, frame2: np.ndarray) -> bool:
    return any(bool((frame == frame[:1, :1]).all()) for frame in (frame1, frame2))


def _with_backward(pair: VideoFlow, backward_flow: Tensor) -> VideoFlow:
    """Return the pair with backward flow `(2, H, W)`, and what follows from flow in both directions."""
    both = pair.flow[None], backward_flow[None]
    occluded, error = is_occluded(*both)[0], consistency_error(*both)[0]
    if pair.flat:
        occluded, error = torch.ones_like(occluded), torch.full_like(error, torch.inf)
    return dataclasses.replace(pair, backward_flow=backward_flow, occluded=occluded, consistency_error=error)
