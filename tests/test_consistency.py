"""Warping, and forward against backward flow, on motion that is known."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from moving_shapes import moving_shapes

from flow_inference.consistency import consistency_error, is_occluded
from modeling_raft.correlation_raft import warp


def as_tensor(field: np.ndarray) -> torch.Tensor:
    """`(H, W, C)` to `(1, C, H, W)` float32."""
    return torch.from_numpy(np.ascontiguousarray(field)).permute(2, 0, 1)[None].float()


@pytest.fixture(scope="module")
def there_and_back():
    """A video forwards, and the flow of the same frames backwards: layers move the other way."""
    velocities = [(2, -1), (-5, 3), (4, 4)]
    video = moving_shapes(2, 60, 80, velocities)
    back = -np.array(velocities, np.float32)[video.layers[1]]
    return video, as_tensor(video.flow[0]), as_tensor(back)


def test_frame2_warped_by_the_flow_is_frame1_where_it_shows_it(there_and_back):
    video, flow, _ = there_and_back
    warped, inside = warp(as_tensor(video.frames[1]), flow)
    seen = ~torch.from_numpy(video.occluded[0])
    assert inside[0][seen].all()
    torch.testing.assert_close(warped[0][:, seen], as_tensor(video.frames[0])[0][:, seen], atol=1e-2, rtol=0)


def test_warping_reads_the_edge_beyond_the_frame():
    """As grid_sample with padding_mode="border" does, which not every backend has."""
    generator = torch.Generator().manual_seed(0)
    maps, flow = torch.randn(2, 3, 9, 7, generator=generator), 6 * torch.randn(2, 2, 9, 7, generator=generator)
    y, x = torch.meshgrid(torch.arange(9.0), torch.arange(7.0), indexing="ij")
    target = torch.stack([x, y]) + flow
    grid = torch.stack([(2 * target[:, 0] + 1) / 7 - 1, (2 * target[:, 1] + 1) / 9 - 1], dim=-1)
    expected = F.grid_sample(maps, grid, padding_mode="border", align_corners=False)
    torch.testing.assert_close(warp(maps, flow)[0], expected, atol=1e-5, rtol=1e-5)


def test_what_leaves_the_frame_is_known_by_half_pixels():
    flow = torch.zeros(1, 2, 3, 5)
    flow[0, 0, 1] = torch.tensor([-0.6, -0.4, 3.4, 1.6, 0.4])  # from x = 0 .. 4 to -0.6, 0.6, 5.4, 4.6, 4.4
    flow[0, 1, 2, 0] = torch.nan
    warped, inside = warp(torch.arange(5.0).expand(1, 1, 3, 5), flow)
    assert inside[0, 1].tolist() == [False, True, False, False, True]
    assert inside[0, 0].all() and not inside[0, 2, 0]
    torch.testing.assert_close(warped[0, 0, 1], torch.tensor([0.0, 0.6, 4.0, 4.0, 4.0]))
    assert warped.isfinite().all()


def test_occluded_is_what_the_layers_hide(there_and_back):
    video, flow, back = there_and_back
    occluded = is_occluded(flow, back)[0].numpy()
    expected = video.occluded[0]
    assert 0.02 < expected.mean() < 0.5
    assert np.array_equal(occluded, expected)


def test_consistency_error_is_the_distance_between_start_and_return(there_and_back):
    video, flow, back = there_and_back
    error = consistency_error(flow, back)[0].numpy()
    hidden = video.occluded[0]
    assert (error[~hidden] < 1e-4).all()
    y, x = np.argwhere(hidden & np.isfinite(error))[0]
    u, v = video.flow[0, y, x].astype(int)
    returned = video.flow[0, y, x] + back[0].permute(1, 2, 0).numpy()[y + v, x + u]
    assert error[y, x] == pytest.approx(np.linalg.norm(returned), abs=1e-3) and error[y, x] > 1
    leaves = torch.full_like(flow, 1000.0)
    assert consistency_error(leaves, back).isinf().all() and is_occluded(leaves, back).all()


def test_tolerance_grows_with_the_motion():
    """Sundaram et al. 2010, equation 5: half a squared pixel, and a hundredth of the squared lengths."""
    height, width = 4, 40
    for motion, error, expected in ((0.0, 0.70, False), (0.0, 0.72, True), (10.0, 1.48, False), (10.0, 1.50, True)):
        flow, back = torch.zeros(2, 1, 2, height, width)
        flow[:, 0], back[:, 0] = motion, -motion + error
        assert bool(is_occluded(flow, back)[0, 1, 2]) is expected


def test_flows_of_two_sizes_are_refused():
    with pytest.raises(ValueError, match="must have one size"):
        is_occluded(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 5))
