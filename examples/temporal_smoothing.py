"""Remove the flicker of per-frame maps of a video, each made from one frame alone: masks, edges, depth, styles.

    python examples/temporal_smoothing.py --model DIR_OR_REPO --frames clip.mp4 --maps parsing.npy --output smooth.npy

Every map becomes a weighted mean of itself and the maps of neighboring frames, which are warped by optical flow. This
is how VToonify smooths parsing maps of faces (Yang et al. 2022, smooth_parsing_map.py), in its weights: a Gaussian of
the distance in time, and one of the difference between the frame and its warped neighbor, so that flow which is wrong,
or leads across a cut, counts for little. What differs from VToonify:

- A frame is encoded once, not once for each pair that it is in.
- Pixels that are occluded in the neighbor do not count (forward-backward check). Without it, an object that moves in
  front of something of its own color leaves a trace beside it.
- It runs as a stream. Flow of a pair is estimated in both directions at once and serves both frames, so that no more
  than `window + 1` frames are in memory, and `window` more that are read ahead.

Maps are `.npy`, one file `(N, h, w)` or `(N, h, w, C)` or a folder with a file for each frame, or images, gray or
RGB; in a folder that holds any `.npy`, images are ignored. They may be larger or smaller than the frames. Before the
first frame and after the last the video is mirrored.
"""

import argparse
import math
import sys
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from flow_data.out_of_memory import explain_out_of_memory
from flow_data.shipped_files import PRETRAINED, find_model
from flow_inference.consistency import is_occluded
from flow_inference.devices import autocast, choose_device
from flow_inference.estimator import EncodedFrame, FlowEstimator, InputPadder
from flow_inference.frame_sources import open_frames, read_frames
from flow_inference.map_files import list_maps, open_output, read_maps
from modeling_raft import RaftForOpticalFlow
from modeling_raft.convert_raft_checkpoint import load_raft
from modeling_raft.correlation_raft import warp
from modeling_raft.frames_raft import FrameConverter

PHOTOMETRIC_SIGMA = 0.2  # VToonify's, for frames in [-1, 1]
OUT_OF_MEMORY = "Estimate on smaller frames with --max_side, or keep fewer frames with --window."  # advice


def reflect(index: int, num_frames: int) -> int:
    """Return the frame in place of one before the first or after the last, as in the mode "reflect" of `numpy.pad`."""
    period = max(1, 2 * (num_frames - 1))
    return min(index % period, -index % period)


def time_weights(index: int, num_frames: int, window: int) -> dict[int, float]:
    """Weight in time of each frame in the mean for one of them.

    Near the ends some frames come twice, the frame itself, too, whose weight is 1 otherwise. They are never further
    away than `window`: reflection does not move two frames apart.

    Args:
        index: Of the frame that the mean is for.
        num_frames: Of the video; anything above `index + window` gives the same weights.
        window: Frames on either side.
    """
    weights: dict[int, float] = defaultdict(float)
    for offset in range(-window, window + 1):
        weights[reflect(index + offset, num_frames)] += math.exp(-(offset**2) / (2 * (window + 0.5) ** 2))
    return dict(weights)


def photometric_weight(pixels: Tensor, neighbor: Tensor, flow: Tensor) -> Tensor:
    """How much a neighbor's pixel is to be trusted, by how much it looks like the one it is to be averaged with.

    Args:
        pixels, neighbor: `(1, 3, H, W)` in [-1, 1].
        flow: `(1, 2, H, W)`, from the frame to its neighbor.

    Returns:
        `(1, H, W)` in 0..1.
    """
    warped, _ = warp(neighbor, flow)
    error = (warped - pixels).square().mean(1)
    return torch.exp(-error / (2 * PHOTOMETRIC_SIGMA**2))


def to_grid(values: Tensor, size: Sequence[int]) -> Tensor:
    """Bring `(..., H, W)` to the grid of the maps, `(..., h, w)`.

    Each pixel of a map asks the frame's pixel under its center. A mean over several would mix, at the edge of what
    moves, two flows into one that nothing follows.
    """
    rows, columns = (
        ((torch.arange(count, device=values.device) + 0.5) * (length / count)).long()
        for count, length in zip(size, values.shape[-2:], strict=True)
    )
    return values[..., rows[:, None], columns]


class Flicker:
    """Mean absolute difference of maps to the ones before, which flow warps onto them, where these show the same."""

    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0

    def add(self, current: Tensor, previous: Tensor, flow: Tensor, visible: Tensor) -> None:
        """Add a map `(1, C, h, w)` and the one before it; `flow` leads to that one, `visible` is `(1, h, w)` bool."""
        warped, _ = warp(previous, flow)
        difference = (current - warped).abs().mean(1)[visible]
        self._sum += float(difference.sum(dtype=torch.float64))
        self._count += len(difference)

    @property
    def mean(self) -> float:
        """The mean difference in the maps' own values; not a number if no two maps could be compared."""
        return self._sum / self._count if self._count else math.nan


@dataclass
class WindowFrame:
    """A frame that is not yet averaged with all its neighbors. Tensors are on the model's device.

    Args:
        pixels: `(1, 3, H, W)` in [-1, 1].
        map: `(1, C, h, w)` float32.
        weights: in time, of each frame in the mean.
        weighted_sum: `(1, C, h, w)`, of the maps so far.
        weight_sum: `(1, h, w)`.
        to_previous: flow `(1, 2, h, w)` to the frame before, pixels of the map, and where that one shows the same,
            `(1, h, w)` bool; None for the first.
    """

    index: int
    encoded: EncodedFrame
    pixels: Tensor
    map: Tensor
    weights: dict[int, float]
    weighted_sum: Tensor
    weight_sum: Tensor
    to_previous: tuple[Tensor, Tensor] | None = None


class TemporalSmoother:
    """Smooths the maps of one video.

    Args:
        model: In eval mode, on any device. Run under `torch.autocast` for fp16 or bf16.
        window: Frames on either side that a map is averaged with; at least 1.
        num_flow_updates: Of each flow; None: as the model's configuration says.
        max_side: Estimate flow on frames reduced to this longer side, pixels.

    Attributes:
        before, after: The flicker of the maps so far, as given and as smoothed (before any rounding).
    """

    def __init__(
        self,
        model: RaftForOpticalFlow,
        window: int = 5,
        num_flow_updates: int | None = None,
        max_side: int | None = None,
    ):
        InputPadder(1, 1, max_side)  # raises now what is wrong with it
        self.model = model
        self.window, self.num_flow_updates, self.max_side = window, num_flow_updates, max_side
        self.before, self.after = Flicker(), Flicker()
        self._finished: Tensor | None = None  # the latest

    def smooth(self, samples: Iterable[tuple[np.ndarray, np.ndarray]]) -> Iterator[np.ndarray]:
        """Smooth map by map.

        Args:
            samples: Frames `(H, W, 3)` uint8 of one size, each with its map, `(h, w)` or `(h, w, C)` float32 of one
                shape.

        Yields:
            The smoothed maps, `(h, w)` or `(h, w, C)` float32; each `window` frames after its own was handled.

        Raises:
            ValueError, OSError: What `samples` raises, after the maps of all before that, for which the video ends
                there.
        """
        waiting: deque[WindowFrame] = deque()
        estimator: FlowEstimator | None = None
        deferred = None
        try:
            for index, ((frame, values), num_frames) in enumerate(read_ahead(samples, self.window)):
                height, width, _ = frame.shape
                estimator = estimator or FlowEstimator(self.model, height, width, self.max_side)
                new = self._encode(estimator, index, frame, values, num_frames)
                self._exchange(estimator, new, waiting)
                waiting.append(new)
                if len(waiting) > self.window:
                    yield self._finish(waiting.popleft()).reshape(values.shape)
        except (ValueError, OSError) as error:
            deferred = error  # raised after the samples before it
        while waiting:
            yield self._finish(waiting.popleft()).reshape(values.shape)
        if deferred is not None:
            raise deferred

    def _encode(
        self, estimator: FlowEstimator, index: int, frame: np.ndarray, values: np.ndarray, num_frames: int
    ) -> WindowFrame:
        device = self.model.device
        pixels = torch.from_numpy(frame).to(device).permute(2, 0, 1)[None] / 127.5 - 1
        own = torch.from_numpy(values.reshape(*values.shape[:2], -1)).to(device).permute(2, 0, 1)[None]
        weights = time_weights(index, num_frames, self.window)
        weight_sum = torch.full_like(own[:, 0], weights[index])
        return WindowFrame(index, estimator.encode(frame), pixels, own, weights, weights[index] * own, weight_sum)

    def _exchange(self, estimator: FlowEstimator, new: WindowFrame, waiting: Iterable[WindowFrame]) -> None:
        """Add a new frame to the means of those that wait, and these to its own."""
        for old in waiting:
            pairs = [(new.encoded, old.encoded), (old.encoded, new.encoded)]
            flows, _ = estimator.estimate(pairs, self.num_flow_updates)
            backward, forward = flows.split(1)
            self._add(new, old, backward, forward)
            self._add(old, new, forward, backward)

    def _add(self, frame: WindowFrame, neighbor: WindowFrame, flow: Tensor, reverse: Tensor) -> None:
        """Add a neighbor's map to the mean for a frame, given the flows `(1, 2, H, W)` to the neighbor and back."""
        height, width = size = frame.map.shape[-2:]
        visible = to_grid(~is_occluded(flow, reverse), size)
        trust = to_grid(photometric_weight(frame.pixels, neighbor.pixels, flow), size)
        scale = flow.new_tensor([width / flow.shape[-1], height / flow.shape[-2]]).reshape(1, 2, 1, 1)
        map_flow = to_grid(flow, size) * scale
        warped, _ = warp(neighbor.map, map_flow)
        weight = frame.weights[neighbor.index] * trust * visible
        frame.weighted_sum += weight[:, None] * warped
        frame.weight_sum += weight
        if neighbor.index == frame.index - 1:
            frame.to_previous = (map_flow, visible)
            self.before.add(frame.map, neighbor.map, map_flow, visible)

    def _finish(self, frame: WindowFrame) -> np.ndarray:
        """The mean, `(h, w, C)`."""
        smoothed = frame.weighted_sum / frame.weight_sum[:, None]
        if frame.to_previous is not None and self._finished is not None:
            self.after.add(smoothed, self._finished, *frame.to_previous)
        self._finished = smoothed
        return smoothed[0].permute(1, 2, 0).cpu().numpy()


def read_ahead(samples: Iterable, count: int) -> Iterator[tuple]:
    """Yield every sample with the number of samples known so far: all of them, or at least `count` after this one."""
    waiting: deque = deque()
    num_samples, deferred = 0, None
    try:
        for num_samples, sample in enumerate(samples, start=1):
            waiting.append(sample)
            if len(waiting) > count:
                yield waiting.popleft(), num_samples
    except (ValueError, OSError) as error:
        deferred = error  # raised after the samples before it, with which the video ends
    while waiting:
        yield waiting.popleft(), num_samples
    if deferred is not None:
        raise deferred


def pair_up(frames: Iterable[np.ndarray], maps: Iterable[np.ndarray], num_maps: int) -> Iterator[tuple]:
    """Yield each frame with its map.

    Raises:
        ValueError: There are more of one than of the other; raised after the pairs.
    """
    remaining, num_frames = iter(maps), 0
    for num_frames, frame in enumerate(frames, start=1):
        if num_frames > num_maps:
            raise ValueError(f"each frame needs a map; there are at least {num_frames} frames and {num_maps} maps")
        values = next(remaining)
        check_orientation(frame.shape, values.shape)
        yield frame, values
    check_counts(num_frames, num_maps)


def check_orientation(frame_shape: tuple[int, ...], map_shape: tuple[int, ...]) -> None:
    """Refuse maps that lie on their side, as a program makes them that ignores the EXIF orientation of phone photos.

    Raises:
        ValueError: Frames are higher than wide and maps wider than high, or the other way round.
    """
    (height, width), (map_height, map_width) = frame_shape[:2], map_shape[:2]
    if (height - width) * (map_height - map_width) < 0 and abs(height * map_height / (width * map_width) - 1) < 0.05:
        raise ValueError(
            f"maps of {map_height} x {map_width} (height x width) lie on their side beside frames of {height} x "
            f"{width}, which were turned upright as their EXIF orientation says; turn the maps, too"
        )


def check_counts(num_frames: int, num_maps: int) -> None:
    if num_frames != num_maps:
        raise ValueError(f"each frame needs a map; there are {num_frames} frames and {num_maps} maps")


def check_paths(maps: Path, frames: Path, output: Path) -> None:
    """Refuse to write where the inputs are, or what the maps are not."""
    if not maps.exists():
        raise FileNotFoundError(f"{maps}: no such file or folder")
    if output.resolve() in (maps.resolve(), frames.resolve()):
        raise ValueError(f"{output}: is read; write to another place")
    if maps.is_dir() and (output.is_file() or output.suffix.lower() == ".npy"):
        raise ValueError(f"{output}: maps of a folder are written to a folder")
    if not maps.is_dir() and (output.is_dir() or output.suffix.lower() != ".npy"):
        raise ValueError(f"{output}: maps of a .npy file are written to a .npy file")


def run(args: argparse.Namespace) -> TemporalSmoother:
    """Smooth the maps of a video, and return the smoother, which has measured the flicker."""
    check_paths(args.maps, args.frames, args.output)
    maps, frames = list_maps(args.maps), open_frames(args.frames)
    if isinstance(frames, list):  # a video tells at its end
        check_counts(len(frames), len(maps))
    model = load_raft(find_model(args.model)).eval().to(choose_device(args.device))
    smoother = TemporalSmoother(model, args.window, args.num_flow_updates, args.max_side)
    samples = pair_up(read_frames(frames, FrameConverter(args.intensity_range)), read_maps(maps), len(maps))
    with autocast(model.device, args.mixed_precision), open_output(args.output, maps) as write:
        for smoothed in tqdm(smoother.smooth(samples), total=len(maps), desc="smoothing"):
            write(smoothed)
    return smoother


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, repository id, or file of weights of RAFT; default: the shipped "
        f"{PRETRAINED}")  # fmt: skip
    parser.add_argument("--frames", type=Path, required=True, help="video, or folder of images")
    parser.add_argument("--maps", type=Path, required=True, help="one for each frame: folder, or .npy file")
    parser.add_argument("--output", type=Path, required=True, help="what --maps is: folder, or .npy file")
    parser.add_argument("--window", type=int, default=5, help="frames on either side; time grows with it")
    parser.add_argument("--num_flow_updates", type=int, help="more are slower and mostly better; default: as the "
                        "model's configuration says, which is 12 mostly")  # fmt: skip
    parser.add_argument("--max_side", type=int, metavar="PX", help="estimate flow on frames reduced to this")
    parser.add_argument("--intensity_range", type=float, nargs=2, metavar=("LO", "HI"), help="intensities that become "
                        "black and white; default: those of the frames' depth, or of the first two")  # fmt: skip
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, xpu; default: the GPU if there is one")
    parser.add_argument("--mixed_precision", choices=["no", "bf16", "fp16"], default="no")
    args = parser.parse_args(argv)
    for name in ("window", "num_flow_updates"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1; got {value}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        smoother = run(args)
    except Exception as error:
        message = explain_out_of_memory(error, "the smoothing", OUT_OF_MEMORY)
        if message is None and not isinstance(error, (ValueError, OSError)):
            raise
        sys.exit(f"temporal_smoothing.py: error: {message or error}")
    except KeyboardInterrupt:
        sys.exit(f"temporal_smoothing.py: stopped; the maps that are finished are in {args.output}, or beside it")
    if math.isnan(smoother.before.mean):
        print(f"{args.output}: no two maps show the same, so there is no flicker to measure")
        return
    print(f"{args.output}: a map differs from the one before it, warped onto it, by {smoother.before.mean:.4g} before")
    print(f"smoothing and by {smoother.after.mean:.4g} after, in the mean, in the maps' own values (images: of 255)")


if __name__ == "__main__":
    main()
