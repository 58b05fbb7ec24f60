"""Forward projection of flow, against the distances of all pairs of points."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from flow_inference.warm_start import forward_interpolate, shrink_flow


def smooth_flow(seed: int, height: int, width: int, coarseness: int, strength: float) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    shape = max(1, height // coarseness), max(1, width // coarseness)
    coarse = strength * torch.randn(1, 2, *shape, generator=rng)
    return F.interpolate(coarse, size=(height, width), mode="bilinear") + strength * torch.randn(
        1, 2, 1, 1, generator=rng
    )


def landed_points(flow: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Where each pixel `(h * w, 2)` goes, and whether that is inside of the original's open interval."""
    _, _, height, width = flow.shape
    y, x = np.mgrid[:height, :width]
    landed = np.stack([x, y], -1).reshape(-1, 2) + flow[0].permute(1, 2, 0).reshape(-1, 2).double().numpy()
    return landed, ((landed > 0) & (landed < [width, height])).all(1)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    coarseness=st.sampled_from([1, 4, 20]),
    strength=st.sampled_from([0.0, 0.3, 2.0, 8.0, 40.0]),
)
def test_every_point_gets_the_value_of_the_nearest(seed, height, width, coarseness, strength):
    flow = smooth_flow(seed, height, width, coarseness, strength)
    numbers = torch.arange(1.0, height * width + 1).reshape(1, 1, height, width)
    received = forward_interpolate(flow, numbers).flatten().long().numpy() - 1
    landed, inside = landed_points(flow)
    if not inside.any():
        assert (received == -1).all()
        return
    y, x = np.mgrid[:height, :width]
    grid = np.stack([x, y], -1).reshape(-1, 2)
    distances = np.linalg.norm(grid[:, None] - landed[None, inside], axis=-1)
    assert inside[received].all()
    np.testing.assert_allclose(np.linalg.norm(grid - landed[received], axis=-1), distances.min(1), atol=1e-4)


def test_a_shift_shifts_and_leaves_its_edge():
    flow = torch.zeros(1, 2, 6, 9)
    flow[:, 0] = 3  # to the right
    values = torch.arange(9.0).expand(1, 1, 6, 9)
    moved = forward_interpolate(flow, values)[0, 0]
    # The first column lands in column 3; what lies left of it takes the nearest.
    assert moved[0].tolist() == [0, 0, 0, 0, 1, 2, 3, 4, 5]


def test_batches_are_projected_one_by_one():
    flows = torch.cat([smooth_flow(seed, 12, 17, 3, 2.0) for seed in (1, 2)])
    expected = torch.cat([forward_interpolate(flow[None]) for flow in flows])
    assert torch.equal(forward_interpolate(flows), expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_what_is_not_finite_lands_nowhere(value):
    flow = torch.zeros(1, 2, 5, 5)
    flow[0, :, 2, 2] = value
    assert torch.equal(forward_interpolate(flow), torch.zeros_like(flow))
    assert torch.equal(forward_interpolate(torch.full_like(flow, value)), torch.zeros_like(flow))


def test_shortened_vectors_keep_their_direction():
    flow = torch.tensor([[3.0, 0.3, 0.0], [4.0, -0.4, 0.0]]).reshape(1, 2, 1, 3)
    shortened = shrink_flow(flow, 1.0)[0, :, 0].T
    torch.testing.assert_close(shortened, torch.tensor([[2.4, 3.2], [0.0, 0.0], [0.0, 0.0]]))
    assert torch.equal(shrink_flow(flow, 0.0), flow)
