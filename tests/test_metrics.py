"""Metrics against plain numpy, and that parts add up to the whole."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flow_training.metrics import (
    ERROR_SUMS,
    REGIONS,
    compute_metrics,
    error_sums,
    region_metrics,
    region_sums,
    summarize,
)


def pairs(seed: int, batch: int = 3):
    generator = torch.Generator().manual_seed(seed)
    flow_gt = 30 * torch.randn(batch, 2, 6, 7, generator=generator, dtype=torch.float64)
    flow_pred = flow_gt + 4 * torch.randn(batch, 2, 6, 7, generator=generator, dtype=torch.float64)
    valid = torch.rand(batch, 6, 7, generator=generator) < 0.7
    return flow_pred, flow_gt, valid


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000))
def test_equals_the_definitions(seed):
    flow_pred, flow_gt, valid = pairs(seed)
    errors, lengths = [], []
    for b, y, x in np.argwhere(valid.numpy()):
        du, dv = (flow_pred - flow_gt)[b, :, y, x].tolist()
        errors.append(math.hypot(du, dv))
        lengths.append(math.hypot(*flow_gt[b, :, y, x].tolist()))
    outliers = [error > 3 and error / length > 0.05 for error, length in zip(errors, lengths, strict=True)]
    metrics = summarize(error_sums(flow_pred, flow_gt, valid))
    assert metrics["epe"] == pytest.approx(np.mean(errors))
    for share in (1, 3, 5):
        assert metrics[f"{share}px"] == pytest.approx(np.mean(np.array(errors) < share))
    assert metrics["fl_all"] == pytest.approx(100 * np.mean(outliers))


def test_per_image_metrics_are_means_of_images():
    sums = error_sums(*pairs(0))
    each = [compute_metrics(row) for row in sums]
    metrics = summarize(sums)
    assert metrics["epe_per_image"] == pytest.approx(np.mean([pair["epe"] for pair in each]))
    assert metrics["fl_all_per_image"] == pytest.approx(np.mean([pair["fl_all"] for pair in each]))
    assert metrics["epe_per_image"] != metrics["epe"]  # the masks differ in size


def test_parts_add_up_to_the_whole():
    flow_pred, flow_gt, valid = pairs(1, batch=4)
    whole = error_sums(flow_pred, flow_gt, valid).sum(0)
    parts = sum(error_sums(flow_pred[i : i + 1], flow_gt[i : i + 1], valid[i : i + 1])[0] for i in range(4))
    torch.testing.assert_close(parts, whole)


def test_what_is_not_valid_does_not_matter():
    flow_pred, flow_gt, valid = pairs(2)
    hidden = flow_gt.masked_fill(~valid[:, None], float("nan"))
    assert torch.equal(error_sums(flow_pred, hidden, valid), error_sums(flow_pred, flow_gt, valid))


def test_pairs_without_a_valid_pixel():
    flow_pred, flow_gt, valid = pairs(3)
    valid[1] = False
    metrics, without = summarize(error_sums(flow_pred, flow_gt, valid)), [0, 2]
    assert metrics == summarize(error_sums(flow_pred[without], flow_gt[without], valid[without]))
    assert math.isnan(summarize(torch.zeros(2, len(ERROR_SUMS)))["epe"])


def test_a_prediction_that_is_not_finite_is_an_outlier():
    flow_pred, flow_gt, valid = pairs(6)
    flow_pred[:] = torch.nan
    metrics = summarize(error_sums(flow_pred, flow_gt, valid))
    assert math.isnan(metrics["epe"]) and metrics["fl_all"] == 100 and metrics["5px"] == 0


def test_thresholds_are_strict():
    flow_gt = torch.zeros(1, 2, 1, 4)
    flow_pred = torch.tensor([1.0, 3.0, 5.0, 3.0])[None, None, None] * torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1)
    metrics = summarize(error_sums(flow_pred, flow_gt, torch.ones(1, 1, 4, dtype=torch.bool)))
    assert (metrics["1px"], metrics["3px"], metrics["5px"]) == (0, 0.25, 0.75)
    assert metrics["fl_all"] == 25  # true length 0: only the error of 5 px exceeds 3 px


# ---- regions ----


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([0.1, 0.5, 1, 2]))
def test_regions_equal_the_definitions(seed, scale):
    flow_pred, flow_gt, valid = (tensor * scale if tensor.is_floating_point() else tensor for tensor in pairs(seed))
    occluded = torch.rand(valid.shape, generator=torch.Generator().manual_seed(seed + 1)) < 0.2
    errors: dict[str, list[float]] = {}
    for b, y, x in np.argwhere(valid.numpy()):
        speed = math.hypot(*flow_gt[b, :, y, x].tolist())
        error = math.hypot(*(flow_pred - flow_gt)[b, :, y, x].tolist())
        by_speed = "epe_s0_10" if speed < 10 else "epe_s10_40" if speed <= 40 else "epe_s40_plus"
        for name in (by_speed, "epe_unmatched" if occluded[b, y, x] else "epe_matched"):
            errors.setdefault(name, []).append(error)
    metrics = region_metrics(region_sums(flow_pred, flow_gt, valid, occluded).sum(0))
    assert metrics == pytest.approx({name: np.mean(values) for name, values in errors.items()})


def test_bounds_of_speed_belong_to_the_middle():
    flow_gt = torch.tensor([9.999, 10.0, 40.0, 40.001])[None, None, None] * torch.tensor([0.6, 0.8]).reshape(
        1, 2, 1, 1
    )
    flow_gt = flow_gt.double()
    flow_gt[0, :, 0, 1:3] = torch.tensor([[6.0, 24.0], [8.0, 32.0]])  # exactly 10 and 40 long
    sums = region_sums(torch.zeros_like(flow_gt), flow_gt, torch.ones(1, 1, 4, dtype=torch.bool))
    assert dict(zip(REGIONS, sums[0, :, 0].tolist(), strict=True)) == {
        "s0_10": 1, "s10_40": 2, "s40_plus": 1, "matched": 0, "unmatched": 0
    }  # fmt: skip


def test_regions_without_pixels_have_no_metric():
    flow_pred, flow_gt, valid = pairs(4)
    flow_gt = flow_gt / flow_gt.norm(dim=1, keepdim=True)  # all of it slow
    assert set(region_metrics(region_sums(flow_pred, flow_gt, valid).sum(0))) == {"epe_s0_10"}
    hidden = torch.zeros_like(valid)
    assert set(region_metrics(region_sums(flow_pred, flow_gt, valid, hidden).sum(0))) == {"epe_s0_10", "epe_matched"}
    assert region_metrics(region_sums(flow_pred, flow_gt, hidden).sum(0)) == {}


def test_unknown_flow_is_in_no_region():
    flow_pred, flow_gt, valid = pairs(5)
    unknown = flow_gt.masked_fill(~valid[:, None], float("nan"))
    occluded = torch.rand(valid.shape) < 0.5
    assert torch.equal(
        region_sums(flow_pred, unknown, valid, occluded), region_sums(flow_pred, flow_gt, valid, occluded)
    )
