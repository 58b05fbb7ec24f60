"""Flow of images, whatever their size: of one pair, and of a data set's pairs in batches or along its sequences."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flow_data.images import disable_image_decoding
from flow_data.out_of_memory import attempt
from flow_inference.warm_start import project_forward
from modeling_raft import RaftForOpticalFlow, RaftImageProcessor


class Prediction(NamedTuple):
    """What was predicted of a row of a data set.

    Args:
        position: the row's index.
        row: as the data set gives it.
        sample: as it was decoded.
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
        padding: To multiples of 8 by repeating edges: height `"split"` between both sides, or all at the `"bottom"`;
            `"none"`: the images must fit.

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
    """Estimate flow of several pairs at once; arguments, first result and errors as those of `predict_pair`.

    Args:
        pairs: `B` of them, all images of one size.
        initial_flow: `(B, 2, h, w)`, in pixels of the padded images' 1/8 grid, to start from; None: zero.

    Returns:
        A flow for each pair, and `(B, 2, h, w)`, the same in pixels of the 1/8 grid, on the model's device.
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
        chunks: Indices of rows, as `chunk_rows` puts them together: batches, or with a warm start sequences.
        decode: Row -> sample with `image1` and `image2`, `(H, W, 3)` uint8.
        num_flow_updates, padding: As of `predict_pair`.
        warm_start: Let each pair of a chunk start from where the flow of the one before has moved to (paper section
            4.2), one by one. Else a chunk is predicted at once, or in parts where the size of its images changes.

    Yields:
        A prediction for each row, in the order of the chunks.

    Raises:
        ValueError, OSError: What `decode` raises, and `predict_pair`.
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
                initial_flow = project_forward(low_res_flow)
            for decoded, flow in zip(batch, flows, strict=True):
                yield Prediction(*decoded, flow)


def _size(decoded: tuple[int, Any, Any]) -> tuple[int, ...]:
    _, _, sample = decoded
    return sample.image1.shape


def chunk_rows(dataset: Any, batch_size: int = 1, warm_start: bool = False) -> list[list[int]]:
    """Put together the rows that one process predicts together; how many processes there are does not matter.

    Args:
        dataset: Rows of a source of `flow_data.datasets`.
        batch_size: Consecutive rows of a chunk, at most.
        warm_start: Make chunks of the data set's sequences instead.

    Returns:
        Indices of rows, each once.
    """
    if warm_start:
        return find_sequences(dataset)
    count = len(dataset)
    return [list(range(first, min(first + batch_size, count))) for first in range(0, count, batch_size)]


def share_out(chunks: Sequence[Sequence[int]], num_shares: int) -> list[list[Sequence[int]]]:
    """Deal chunks to processes so that none has much more to do than another: the longest first, to who has least."""
    shares: list[list[Sequence[int]]] = [[] for _ in range(num_shares)]
    loads = [0] * num_shares
    for chunk in sorted(chunks, key=len, reverse=True):  # stable: the same on every process
        least = loads.index(min(loads))
        shares[least].append(chunk)
        loads[least] += len(chunk)
    return shares


def find_sequences(dataset: Any) -> list[list[int]]:
    """Find which pairs follow each other: one begins with the very file with which the one before ends.

    Files say it where ids do not: KITTI's 000011 is not the frame after 000010, and backward flow of FlyingThings3D
    and Spring runs from high numbers to low ones. A pair does not follow the one that leads the other way.

    Args:
        dataset: Rows of a source of `flow_data.datasets`. What is drawn or read from bytes has no file and follows
            nothing.

    Returns:
        Indices of rows in the order of time, each once; a pair that neither follows nor is followed stands alone.
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
    for start in sorted(range(len(frames)), key=followers.__contains__):  # a loop has no beginning: any will do
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
    """Paths of both frames of every row; None where there is no file."""
    if not {"image1", "image2"} <= set(dataset.column_names):  # drawn when looked at
        return [(None, None)] * len(dataset)
    stored = disable_image_decoding(dataset).select_columns(["image1", "image2"])
    return [(row["image1"]["path"], row["image2"]["path"]) for row in stored]
