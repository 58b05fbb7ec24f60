"""One loop for every benchmark; how they differ is their protocol (princeton-vl/RAFT, evaluate.py)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from flow_data.features import to_sample
from flow_inference.pictures import draw_comparison
from flow_inference.prediction import predict_pair
from flow_training.metrics import error_sums, ratios, summarize
from modeling_raft import RaftForOpticalFlow


@dataclass(frozen=True)
class Protocol:
    """How a benchmark is evaluated.

    Args:
        num_flow_updates: Updates of the flow.
        padding: As in `flow_inference.prediction`: `"split"`, `"bottom"` or `"none"`.
        split: What is evaluated unless one asks for another split.
    """

    num_flow_updates: int
    padding: str
    split: str


class EvaluationStopped(Exception):
    """Someone asked for an evaluation to be stopped before its end."""


DTYPES = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}  # mixed_precision -> what it computes in

SINTEL = Protocol(num_flow_updates=32, padding="split", split="training")
KITTI = Protocol(num_flow_updates=24, padding="bottom", split="training")
PROTOCOLS = {
    "flying_chairs": Protocol(num_flow_updates=24, padding="none", split="validation"),
    "flying_things_clean": Protocol(num_flow_updates=32, padding="split", split="test"),
    "flying_things_final": Protocol(num_flow_updates=32, padding="split", split="test"),
    "sintel_clean": SINTEL,
    "sintel_final": SINTEL,
    "middlebury": SINTEL,
    "pairs": SINTEL,
    "spring": SINTEL,
    "tartanair": SINTEL,
    "kitti_2012": KITTI,
    "kitti_2015": KITTI,
    "hd1k": KITTI,
    "synthetic": Protocol(num_flow_updates=32, padding="split", split="validation"),
}


def check_precision(accelerator: Accelerator) -> None:
    """Refuse a precision that accelerate would silently not use."""
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("mixed_precision fp16 needs a GPU, and this runs on a CPU; use bf16, or no")
    if accelerator.mixed_precision not in DTYPES:
        raise ValueError(f"mixed_precision must be one of {', '.join(DTYPES)}; got {accelerator.mixed_precision}")


def evaluate(
    model: RaftForOpticalFlow,
    dataset: Any,
    protocol: Protocol,
    accelerator: Accelerator,
    num_flow_updates: int | None = None,
    description: str = "evaluating",
    stop_agreed: Callable[[], Any] = lambda: False,
) -> dict[str, Any]:
    """Evaluate a model on all pairs of a data set, each process a share of them.

    Args:
        model: Not wrapped; its mode (train or eval) is the caller's to set and restore.
        dataset: Rows of a source of `flow_data.sources`, with ground truth.
        protocol: Of the data set.
        accelerator: Says which share is this process's, and the precision.
        num_flow_updates: Instead of the protocol's.
        description: For the progress bar.
        stop_agreed: Asked before each pair, by all processes equally often; a true answer, the same for all of them,
            stops the evaluation.

    Returns:
        On every process the same: `num_pairs`, `protocol`, `metrics`, `zero_flow_epe` and `per_pair`; see the README.

    Raises:
        ValueError: A pair has no ground truth.
        EvaluationStopped: `stop_agreed` said so.
    """
    rounds = range(0, len(dataset), accelerator.num_processes)
    rows = []
    for first in tqdm(rounds, desc=description, leave=False, disable=not accelerator.is_local_main_process):
        if stop_agreed():
            raise EvaluationStopped
        index = first + accelerator.process_index
        if index >= len(dataset):
            continue  # the others have one more
        row = dataset[index]
        if row["flow"] is None:
            raise ValueError(f"{row['id']} has no ground truth: this split is for submissions, not for evaluation")
        sample = to_sample(row)
        with accelerator.autocast():
            flow_pred = predict_pair(
                model,
                sample.image1,
                sample.image2,
                num_flow_updates or protocol.num_flow_updates,
                protocol.padding,
            )
        # float64 on the CPU: sums over a whole data set then do not depend on how it was cut
        flow_gt = torch.from_numpy(sample.flow).permute(2, 0, 1)[None].double()
        valid = torch.from_numpy(sample.valid)[None]
        sums = error_sums(flow_pred[None].double(), flow_gt, valid)
        zero_sums = error_sums(torch.zeros_like(flow_gt), flow_gt, valid)
        rows.append((index, row["id"], sums[0].tolist(), zero_sums[0].tolist()))
    rows = sorted(gather_object(rows))

    pair_sums = torch.tensor([sums for _, _, sums, _ in rows], dtype=torch.float64)
    zero_sums = torch.tensor([sums for _, _, _, sums in rows], dtype=torch.float64)
    return {
        "num_pairs": len(rows),
        "protocol": {
            "num_flow_updates": num_flow_updates or protocol.num_flow_updates,
            "padding": protocol.padding,
            "dtype": DTYPES[accelerator.mixed_precision],
        },
        "metrics": summarize(pair_sums),
        "zero_flow_epe": ratios(zero_sums.sum(0))["epe"],
        "per_pair": [
            {"id": id_, **{name: ratios(torch.tensor(sums))[name] for name in ("epe", "fl_all")}}
            for _, id_, sums, _ in rows
        ],
    }


def evaluate_sets(
    model: RaftForOpticalFlow,
    sets: Sequence[tuple[str, Any, Protocol]],
    accelerator: Accelerator,
    stop_agreed: Callable[[], Any] = lambda: False,
) -> dict[str, dict[str, Any]]:
    """Validate during training: name -> report of each set. Leaves the model in the mode it found it in.

    Raises:
        EvaluationStopped: `stop_agreed` said so; see `evaluate`.
    """
    was_training = model.training
    model.eval()
    try:
        return {
            name: evaluate(
                model, dataset, protocol, accelerator, description=f"validating on {name}", stop_agreed=stop_agreed
            )
            for name, dataset, protocol in sets
        }
    finally:
        model.train(was_training)


def draw_sets(
    model: RaftForOpticalFlow, sets: Sequence[tuple[str, Any, Protocol]], accelerator: Accelerator
) -> dict[str, np.ndarray]:
    """Draw the first pair of each set: frame 1, true flow, predicted flow, error.

    Returns:
        name -> `(H, W, 3)` uint8. Leaves the model in the mode it found it in.
    """
    was_training = model.training
    model.eval()
    pictures = {}
    for name, dataset, protocol in sets:
        sample = to_sample(dataset[0])
        with accelerator.autocast():
            flow_pred = predict_pair(model, sample.image1, sample.image2, protocol.num_flow_updates, protocol.padding)
        pictures[name] = draw_comparison(sample.image1, sample.flow, sample.valid, flow_pred)
    model.train(was_training)
    return pictures
