"""Flow of image pairs of any size: of one pair, and of the pairs of a data set, in batches or along its sequences."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flow_data.out_of_memory import attempt
from flow_inference.warm_start import forward_interpolate
from modeling_raft import RaftForOpticalFlow, RaftImageProcessor


class Prediction(NamedTuple):
    """The predicted flow of a row of a data set.

    Args:
        position: Index of the row.
        row: As the data set gives it.
        sample: The decoded row.
        flow: `(2, H, W)` float32 on the CPU, pixels.
    """

    position: int
    row: Any
    sample: Any
    flow: Tensor


def predict_pair(
    model: RaftForOpticalFlow,
    image1: np.ndarray,
    image2: np.ndarray,
    num_flow_updates: int | None = None,
    padding: str = "split",
) -> Tensor:
    """Estimate flow from one image to the next.

    Args:
        model: In eval mode, on any device.
        image1: `(H, W, 3)` uint8, RGB.
        image2: The same size.
        num_flow_updates: Updates of the flow; None: as the model's configuration says.
        padding: How images are padded to multiples of 8 by repeating edges: above and below (`"split"`) or only below
            (`"bottom"`); `"none"`: the images must fit.

    Returns:
        `(2, H, W)` float32 on the CPU, pixels.

    Raises:
        ValueError: The images differ in size, or do not fit without padding.
    """
    flows, _ = predict_batch(model, [(image1, image2)], num_flow_updates, padding)
    return flows[0]


@torch.no_grad()
def predict_batch(
    model: RaftForOpticalFlow,
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    num_flow_updates: int | None = None,
    padding: str = "split",
    initial_flow: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Estimate flow of several pairs of images at once.

    Args:
        model: In eval mode, on any device.
        pairs: B pairs of images `(H, W, 3)` uint8, RGB, all of one size.
        num_flow_updates: As in `predict_pair`.
        padding: As in `predict_pair`.
        initial_flow: `(B, 2, h, w)`, in pixels of the 1/8 grid of the padded images; None: zero.

    Returns:
        For each pair `(2, H, W)` float32 on the CPU, pixels; and for all `(B, 2, h, w)` in pixels of the 1/8 grid, on
        the model's device.

    Raises:
        ValueError: The images differ in size, or do not fit without padding.
    """
    processor = RaftImageProcessor(
        do_pad=padding != "none",
        height_padding="bottom" if padding == "bottom" else "split",
        min_size=model.config.min_image_size,
    )
    images: Any = [[image1, image2] for image1, image2 in pairs]
    inputs = processor(images, return_tensors="pt", input_data_format="channels_last").to(model.device)
    outputs = model(**inputs, num_flow_updates=num_flow_updates, initial_flow=initial_flow)
    target_sizes = None if padding == "none" else [image1.shape[:2] for image1, _ in pairs]
    flows = [result["flow"].float().cpu() for result in processor.post_process_optical_flow(outputs, target_sizes)]
    return flows, outputs.low_res_flow


def predict_rows(
    model: RaftForOpticalFlow,
    dataset: Any,
    chunks: Iterable[Sequence[int]],
    decode: Callable[[Any], Any],
    num_flow_updates: int,
    padding: str,
    warm_start: bool = False,
) -> Iterator[Prediction]:
    """Estimate flow of rows of a data set, one after the other.

    Args:
        model: In eval mode, on any device.
        dataset: Rows by index.
        chunks: Indices of rows in the groups of `chunk_rows`: batches, or sequences for a warm start.
        decode: Function from a row to a sample with `image1` and `image2`, `(H, W, 3)` uint8.
        num_flow_updates: As in `predict_pair`.
        padding: As in `predict_pair`.
        warm_start: Predict the pairs of a chunk one by one, each from the flow of the pair before, moved along itself
            (paper section 4.2). Else a chunk is predicted at once, or in parts where the size of its images changes.

    Yields:
        A prediction for each row, in the order of the chunks.

    Raises:
        ValueError, OSError: As `decode` and `predict_pair` raise them.
    """
    for chunk in chunks:
        samples = ((position, row := dataset[position], decode(row)) for position in chunk)
        batches = ([each] for each in samples) if warm_start else (list(part) for _, part in groupby(samples, _size))
        initial_flow = None
        for batch in batches:
            pairs = [(sample.image1, sample.image2) for _, _, sample in batch]
            height, width, _ = pairs[0][0].shape
            attempted = f"flow of {len(pairs)} pair(s) of {height} x {width} px images with {num_flow_updates} updates"
            with attempt(attempted):
                flows, low_res_flow = predict_batch(model, pairs, num_flow_updates, padding, initial_flow)
            if warm_start:
                initial_flow = forward_interpolate(low_res_flow)
            for decoded, flow in zip(batch, flows, strict=True):
                yield Prediction(*decoded, flow)


def _size(decoded: tuple[int, Any, Any]) -> tuple[int, ...]:
    _, _, sample = decoded
    return sample.image1.shape


def chunk_rows(dataset: Any, batch_size: int = 1, warm_start: bool = False) -> list[list[int]]:
    """Group the rows that one process predicts together, whatever the number of processes.

    Args:
        dataset: Rows of a source of `flow_data.datasets`.
        batch_size: The largest number of consecutive rows in a chunk.
        warm_start: Return the sequences of the data set instead.

    Returns:
        Indices of rows, each once.
    """
    if warm_start:
        return find_sequences(dataset)
    count = len(dataset)
    return [list(range(first, min(first + batch_size, count))) for first in range(0, count, batch_size)]


def split_work(chunks: Sequence[Sequence[int]], num_processes: int) -> list[list[Sequence[int]]]:
    """Split chunks among processes evenly: the longest first, each to the process with the fewest rows so far."""
    shares: list[list[Sequence[int]]] = [[] for _ in range(num_processes)]
    loads = [0] * num_processes
    for chunk in sorted(chunks, key=len, reverse=True):  # a stable sort: the same on every process
        least = loads.index(min(loads))
        shares[least].append(chunk)
        loads[least] += len(chunk)
    return shares


def find_sequences(dataset: Any) -> list[list[int]]:
    """Find the sequences of pairs, in which each pair begins with the file with which the pair before it ends.

    Files tell what ids do not: KITTI's 000011 is not the frame after 000010, and backward flow of FlyingThings3D and
    Spring runs from high numbers to low ones. A pair of backward flow does not follow its own pair of forward flow.

    Args:
        dataset: Rows of a source of `flow_data.datasets`. Pairs that are drawn, or read from bytes, have no file, and
            each stands alone.

    Returns:
        Indices of rows in the order of time, each once. A pair without neighbors is a sequence of one.
    """
    frames = _frame_files(dataset)
    beginning_with: dict[str | None, list[int]] = {}
    for position, (first, _) in enumerate(frames):
        if first is not None:
            beginning_with.setdefault(first, []).append(position)
    next_of: dict[int, int] = {}
    for position, (first, second) in enumerate(frames):
        onward = [other for other in beginning_with.get(second, ()) if frames[other][1] != first]
        if onward:
            next_of[position] = onward[0]
    followers = set(next_of.values())
    sequences: list[list[int]] = []
    seen: set[int] = set()
    for start in sorted(range(len(frames)), key=followers.__contains__):  # a loop may begin anywhere
        sequence: list[int] = []
        current: int | None = start
        while current is not None and current not in seen:
            seen.add(current)
            sequence.append(current)
            current = next_of.get(current)
        if sequence:
            sequences.append(sequence)
    return sequences


def _frame_files(dataset: Any) -> list[tuple[str | None, str | None]]:
    """Return the paths of both frames of every row; None where there is no file."""
    if not {"image1", "image2"} <= set(dataset.column_names):  # drawn on access
        return [(None, None)] * len(dataset)
    from flow_data.images import (
        disable_image_decoding,  # needs the package datasets, which frames in memory do without
    )

    stored = disable_image_decoding(dataset).select_columns(["image1", "image2"])
    return [(row["image1"]["path"], row["image2"]["path"]) for row in stored]
