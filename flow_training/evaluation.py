"""Evaluation on every benchmark in one loop; benchmarks differ in their protocol (princeton-vl/RAFT, evaluate.py)."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from flow_data.datasets import Protocol
from flow_data.features import to_occlusion, to_sample
from flow_data.sample import FlowSample
from flow_inference.prediction import Prediction, chunk_rows, predict_pair, predict_rows, split_work
from flow_inference.visualization import draw_comparison
from flow_training.metrics import compute_metrics, error_sums, region_metrics, region_sums, summarize
from modeling_raft import RaftForOpticalFlow


class EvaluationInterrupted(Exception):
    """An evaluation was stopped before its end, as requested."""


DTYPES = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}  # mixed_precision -> what it computes in


def check_precision(accelerator: Accelerator) -> None:
    """Refuse a precision that accelerate would silently not use."""
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("mixed_precision must be bf16 or no on a CPU; got fp16, as fp16 needs a GPU")
    if accelerator.mixed_precision not in DTYPES:
        raise ValueError(f"mixed_precision must be one of {', '.join(DTYPES)}; got {accelerator.mixed_precision}")


class PairSums(NamedTuple):
    """What one pair adds to the metrics; see `flow_training.metrics`."""

    position: int  # of the pair, in the data set
    id: str
    errors: list[float]
    zero_flow_errors: list[float]
    regions: list[list[float]]


def evaluate(
    model: RaftForOpticalFlow,
    dataset: Any,
    protocol: Protocol,
    accelerator: Accelerator,
    num_flow_updates: int | None = None,
    description: str = "evaluating",
    stop_requested: Callable[[], Any] = lambda: False,
    batch_size: int = 1,
    warm_start: bool = False,
) -> dict[str, Any]:
    """Evaluate a model on all pairs of a data set, each process a share of them.

    Args:
        model: Not wrapped; its mode (train or eval) is the caller's to set and restore.
        dataset: Rows of a source of `flow_data.datasets`, with ground truth.
        protocol: Of the data set.
        accelerator: Says which share is this process's, and the precision.
        num_flow_updates: Instead of the protocol's.
        description: For the progress bar.
        stop_requested: Called before each pair, by all processes equally often; a true result, which must be the same
            on all of them, stops the evaluation.
        batch_size: Pairs that are predicted at once, where their images have one size.
        warm_start: Let each pair of a sequence start from the flow of the one before, instead of from zero.

    Returns:
        On every process the same: `num_pairs`, `protocol`, `metrics`, `zero_flow_epe` and `per_pair`; see
        docs/evaluation.md. Metrics over no pixel are NaN.

    Raises:
        ValueError: A pair has no ground truth.
        EvaluationInterrupted: `stop_requested` returned true.
    """
    updates = num_flow_updates or protocol.num_flow_updates
    shares = split_work(chunk_rows(dataset, batch_size, warm_start), accelerator.num_processes)
    share = shares[accelerator.process_index]
    predictions = predict_rows(model, dataset, share, _decode, updates, protocol.padding, warm_start)
    rounds = range(max(sum(map(len, share)) for share in shares))
    pairs: list[PairSums] = []
    for _ in tqdm(rounds, desc=description, leave=False, disable=not accelerator.is_local_main_process):
        if stop_requested():
            raise EvaluationInterrupted
        with accelerator.autocast():
            prediction = next(predictions, None)  # none is left where the others have more
        if prediction is not None:
            pairs.append(_sum_up(prediction))
    pairs = sorted(gather_object(pairs))

    pair_sums = torch.tensor([pair.errors for pair in pairs], dtype=torch.float64)
    zero_sums = torch.tensor([pair.zero_flow_errors for pair in pairs], dtype=torch.float64)
    regions = torch.tensor([pair.regions for pair in pairs], dtype=torch.float64)
    return {
        "num_pairs": len(pairs),
        "protocol": {
            "num_flow_updates": updates,
            "padding": protocol.padding,
            "dtype": DTYPES[accelerator.mixed_precision],
            **({"warm_start": True} if warm_start else {}),
        },
        "metrics": summarize(pair_sums) | region_metrics(regions.sum(0)),
        "zero_flow_epe": compute_metrics(zero_sums.sum(0))["epe"],
        "per_pair": [
            {"id": pair.id, **{name: compute_metrics(sums)[name] for name in ("epe", "fl_all")}}
            for pair, sums in zip(pairs, pair_sums, strict=True)
        ],
    }


def _decode(row: Any) -> FlowSample:
    if row["flow"] is None:
        raise ValueError(f"{row['id']} has no ground truth: this split is for submissions, not for evaluation")
    return to_sample(row)


def _sum_up(prediction: Prediction) -> PairSums:
    """Compare one prediction with its ground truth."""
    sample, occlusion = prediction.sample, to_occlusion(prediction.row)
    if occlusion is not None and occlusion.shape != sample.valid.shape:
        sizes = " and ".join(f"{height} x {width}" for height, width in (occlusion.shape, sample.valid.shape))
        raise ValueError(f"{prediction.row['id']}: its mask of occluded pixels and its images differ in size: {sizes}")
    # float64 on the CPU: sums over a whole data set then do not depend on how it was cut
    flow_pred = prediction.flow[None].double()
    flow_gt = torch.from_numpy(sample.flow).permute(2, 0, 1)[None].double()
    valid = torch.from_numpy(sample.valid)[None]
    occluded = None if occlusion is None else torch.from_numpy(occlusion)[None]
    return PairSums(
        prediction.position,
        prediction.row["id"],
        error_sums(flow_pred, flow_gt, valid)[0].tolist(),
        error_sums(torch.zeros_like(flow_gt), flow_gt, valid)[0].tolist(),
        region_sums(flow_pred, flow_gt, valid, occluded)[0].tolist(),
    )


def evaluate_sets(
    model: RaftForOpticalFlow,
    sets: Sequence[tuple[str, Any, Protocol]],
    accelerator: Accelerator,
    stop_requested: Callable[[], Any] = lambda: False,
) -> dict[str, dict[str, Any]]:
    """Evaluate on several sets during training; the model keeps its mode (train or eval).

    Returns:
        Name -> report of each set.

    Raises:
        EvaluationInterrupted: `stop_requested` returned true; see `evaluate`.
    """
    was_training = model.training
    model.eval()
    try:
        return {
            name: evaluate(
                model,
                dataset,
                protocol,
                accelerator,
                description=f"validating on {name}",
                stop_requested=stop_requested,
            )
            for name, dataset, protocol in sets
        }
    finally:
        model.train(was_training)


def draw_sets(
    model: RaftForOpticalFlow, sets: Sequence[tuple[str, Any, Protocol]], accelerator: Accelerator
) -> dict[str, np.ndarray]:
    """Draw the first pair of each set: frame 1, ground truth, predicted flow, error.

    The model keeps its mode (train or eval).

    Returns:
        Name -> `(H, W, 3)` uint8.
    """
    was_training = model.training
    model.eval()
    images = {}
    for name, dataset, protocol in sets:
        sample = to_sample(dataset[0])
        with accelerator.autocast():
            flow_pred = predict_pair(model, sample.image1, sample.image2, protocol.num_flow_updates, protocol.padding)
        images[name] = draw_comparison(sample.image1, sample.flow, sample.valid, flow_pred)
    model.train(was_training)
    return images
