"""Errors of flow as sums and counts, which add up over batches and processes, and the metrics computed from them.

A metric over no pixels is NaN; as text it is "-".
"""

import math

import torch
from torch import Tensor

ERROR_SUMS = ("count", "epe", "1px", "3px", "5px", "fl_all")
REGIONS = ("s0_10", "s10_40", "s40_plus", "matched", "unmatched")
SLOW, FAST = 10, 40  # pixels of motion: the bounds of MPI-Sintel's s0-10, s10-40 and s40+


def flow_length(flow: Tensor) -> Tensor:
    """Length of the vectors of a flow `(B, 2, H, W)`, in its unit: `(B, H, W)`."""
    return flow[:, 0].hypot(flow[:, 1])  # vector_norm takes a hundred times as long, over an axis of two


def error_sums(flow_pred: Tensor, flow_gt: Tensor, valid: Tensor) -> Tensor:
    """What each pair adds to the metrics.

    Args:
        flow_pred: `(B, 2, H, W)`, pixels.
        flow_gt: `(B, 2, H, W)`, pixels; anything where it is not valid.
        valid: `(B, H, W)` bool.

    Returns:
        `(B, 6)`, the columns of `ERROR_SUMS`: valid pixels, the sum of their end-point errors, how many of these are
        below 1, 3 and 5 px, and how many are outliers of KITTI: error over 3 px and over 5 % of the flow's length.
    """
    error = flow_length(flow_pred - flow_gt)
    length = flow_length(flow_gt)
    columns = [
        torch.ones_like(error),
        error,
        error < 1,
        error < 3,
        error < 5,
        # error > 0.05 * length, not a quotient: the length may be 0; put so that an error of NaN is an outlier
        ~((error <= 3) | (error <= 0.05 * length)),
    ]
    zero = torch.zeros((), dtype=error.dtype, device=error.device)
    return torch.stack([torch.where(valid, column, zero).flatten(1).sum(1) for column in columns], dim=1)


def compute_metrics(sums: Tensor) -> dict[str, float]:
    """Metrics over all valid pixels: epe in pixels, shares between 0 and 1, fl_all in percent.

    Args:
        sums: `(6,)`, the sum of rows of `error_sums`. Without a valid pixel all metrics are NaN.
    """
    count, *totals = sums.tolist()
    metrics = {
        name: total / count if count else float("nan") for name, total in zip(ERROR_SUMS[1:], totals, strict=True)
    }
    metrics["fl_all"] *= 100
    return metrics


def format_metric(value: float, digits: int = 3) -> str:
    """A metric as text: "-" where it does not exist, as over no pixels."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


def summarize(pair_sums: Tensor) -> dict[str, float]:
    """Metrics averaged in both ways: pooled over all valid pixels, and (`_per_image`) the mean over pairs.

    Args:
        pair_sums: `(N, 6)`, one row of `error_sums` for each pair. Pairs without a valid pixel are left out.
    """
    metrics = compute_metrics(pair_sums.sum(0))
    per_image = [compute_metrics(row) for row in pair_sums if row[0] > 0]
    for name in ("epe", "fl_all"):
        values = [pair[name] for pair in per_image]
        metrics[f"{name}_per_image"] = sum(values) / len(values) if values else float("nan")
    return metrics


def region_sums(flow_pred: Tensor, flow_gt: Tensor, valid: Tensor, occluded: Tensor | None = None) -> Tensor:
    """What each pair adds to the end-point errors of regions of the images, as MPI-Sintel's table divides them.

    Args:
        flow_pred: `(B, 2, H, W)`, pixels.
        flow_gt: `(B, 2, H, W)`, pixels; anything where it is not valid.
        valid: `(B, H, W)` bool.
        occluded: `(B, H, W)` bool, True where frame 2 does not show the pixel; None: not known, then no pixel counts
            as matched or unmatched.

    Returns:
        `(B, 5, 2)`: for each of `REGIONS` its valid pixels and the sum of their end-point errors.
    """
    error = flow_length(flow_pred - flow_gt)
    speed = flow_length(flow_gt)
    slow, fast = speed < SLOW, speed > FAST
    unknown = torch.zeros_like(valid)
    regions = [
        slow,
        ~slow & ~fast,
        fast,
        unknown if occluded is None else ~occluded,
        unknown if occluded is None else occluded,
    ]
    zero = torch.zeros((), dtype=error.dtype, device=error.device)
    sums = [
        torch.stack([(valid & region).to(error.dtype), torch.where(valid & region, error, zero)], dim=1)
        for region in regions
    ]
    return torch.stack([region.flatten(2).sum(2) for region in sums], dim=1)


def region_metrics(sums: Tensor) -> dict[str, float]:
    """End-point errors of the regions that have any valid pixel, `epe_` before the region's name.

    Args:
        sums: `(5, 2)`, added up `region_sums`.
    """
    regions = zip(REGIONS, sums.tolist(), strict=True)
    return {f"epe_{name}": total / count for name, (count, total) in regions if count}
