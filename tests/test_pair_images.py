"""Images that explain the flow of a pair, the wheel that explains colors, and the timeline of a video."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from moving_shapes import moving_shapes
from test_modeling_raft import tiny_config

from flow_data.visualize import draw_flow, draw_scale
from flow_inference import FlowVideo, consistency_error, is_occluded
from flow_inference.cancellation import CancelledError, cancellable
from flow_inference.pair_images import (
    OCCLUDED_COLOR,
    draw_arrows,
    draw_beside,
    draw_consistency_error,
    draw_difference,
    draw_occlusion,
    draw_views,
    mark_pixel,
    resize_image,
    warp_back,
)
from flow_inference.timeline import PairMotion, describe_timeline, draw_timeline, measure_motion
from flow_inference.video import VideoFlow
from modeling_raft import RaftForOpticalFlow

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def pair() -> VideoFlow:
    """A pair with ground truth in both directions."""
    shapes = moving_shapes(2, 96, 128, [(3, -2), (-5, 4)])
    flow, backward = (torch.from_numpy(flow).permute(2, 0, 1) for flow in (shapes.flow[0], -shapes.flow[0]))
    both = flow[None], backward[None]
    return VideoFlow(
        0,
        shapes.frames[0],
        shapes.frames[1],
        flow,
        12,
        backward_flow=backward,
        occluded=is_occluded(*both)[0],
        consistency_error=consistency_error(*both)[0],
    )


def test_frame_2_warped_back_is_frame_1_where_both_show_the_same(pair):
    shapes = moving_shapes(2, 96, 128, [(3, -2), (-5, 4)])
    warped, inside = warp_back(pair.frame2, pair.flow)
    visible = inside & ~shapes.occluded[0]
    assert visible.mean() > 0.8 and not inside.all()
    np.testing.assert_array_equal(warped[visible], pair.frame1[visible])
    difference = draw_difference(pair.frame1, pair.frame2, pair.flow)
    assert not difference[visible].any() and not difference[~inside].any()
    assert difference[inside & shapes.occluded[0]].mean() > 10


def test_occlusion_and_error_are_drawn_where_they_are(pair):
    painted = draw_occlusion(pair.frame1, pair.occluded)
    gray = (painted == painted[..., :1]).all(-1)
    np.testing.assert_array_equal(gray, ~pair.occluded.numpy())
    pink = np.array(OCCLUDED_COLOR)
    assert np.abs(painted[~gray].astype(int) - pink).max() <= 0.35 * 255 + 1
    error = torch.tensor([[0.0, 1.5, 3.0, 99.0, float("inf"), float("nan")]])
    np.testing.assert_array_equal(draw_consistency_error(error)[0, :, 0], [0, 127, 255, 255, 255, 255])
    with pytest.raises(ValueError, match="white_error must be a positive number of pixels; got 0"):
        draw_consistency_error(error, 0)


def test_arrows_lead_where_flow_does():
    """An arrow changes the image around its line only, whatever the image's size; small and unknown flow has none."""
    flow = torch.zeros(2, 60, 80)
    flow[0] = 20.0
    black = np.zeros((120, 160, 3), np.uint8)
    rows = draw_arrows(black, flow, count=4).any((1, 2)).nonzero()[0]
    assert np.abs(rows[:, None] - [20, 60, 100]).min(1).max() <= 12
    (columns,) = draw_arrows(black, flow, count=1).any((0, 2)).nonzero()
    assert abs(columns.min() - 80) <= 3 and abs(columns.max() - 120) <= 3
    dots = draw_arrows(black, 0.01 * flow, count=4).any(-1)
    assert 0 < dots.sum() < 12 * 60
    assert not draw_arrows(black, flow * float("nan")).any()
    with pytest.raises(ValueError, match="count must be at least 1; got 0"):
        draw_arrows(black, flow, 0)


def test_a_pixel_is_marked_where_it_is():
    image = np.zeros((200, 300, 3), np.uint8)
    for (x, y), (column, row) in {(30, 50): (60, 100), (500, -9): (299, 0)}.items():  # outside: at the edge
        rows, columns = mark_pixel(image, x, y, (100, 150)).any(-1).nonzero()
        assert abs((rows.max() + rows.min()) / 2 - row) <= 6 and abs((columns.max() + columns.min()) / 2 - column) <= 6
    assert not image.any()


def test_views_have_one_size(pair):
    views = draw_views(pair, 256)
    assert set(views) == {"frame1", "frame2", "flow", "arrows", "warped", "difference", "occlusion", "consistency"}
    assert {view.shape for view in views.values()} == {(192, 256, 3)}
    np.testing.assert_array_equal(draw_views(pair, 128, 9.0)["flow"], draw_flow(pair.flow, 9.0))
    forward_only = VideoFlow(0, pair.frame1, pair.frame2, pair.flow, 12)
    assert set(views) - set(draw_views(forward_only, 64)) == {"occlusion", "consistency"}
    assert resize_image(pair.frame1, 64).shape == (48, 64, 3)


def test_frame_and_colors_beside_each_other():
    frame, flow = np.full((300, 400, 3), 7, np.uint8), torch.full((2, 300, 400), 3.0)
    image = draw_beside(frame, flow, 8.0)
    np.testing.assert_array_equal(image[:, :400], frame)
    colors = draw_flow(flow, 8.0)
    same = (image[:, 400:] == colors).all(-1)
    assert same[:150].all() and same[:, 250:].all() and not same[250:, :64].all()  # a legend, lower left
    np.testing.assert_array_equal(draw_beside(frame[:40], flow[:, :40], 8.0)[:, 400:], colors[:40])  # no room


def test_the_wheel_has_the_colors_of_its_directions():
    wheel = draw_scale(10.0, 300)
    gray = (wheel.max(-1).astype(int) - wheel.min(-1)) < 30
    rows, columns = (~gray).nonzero()
    middle_y, middle_x = (rows.min() + rows.max()) // 2, (columns.min() + columns.max()) // 2
    for x, y in ((4, 1), (-4, 1), (1, 4), (1, -4)):  # beside the arrows and rings
        vector = torch.tensor([x, y], dtype=torch.float32) * 1.6  # 6.6 px of 10
        color = draw_flow(vector[:, None, None], 10.0)[0, 0].astype(int)
        pixel = wheel[round(middle_y + 15 * y * 1.6), round(middle_x + 15 * x * 1.6)]
        assert np.abs(color - pixel).max() <= 12, (x, y)
    for wrong in (0, float("nan")):
        with pytest.raises(ValueError, match="max_length must be a positive number"):
            draw_scale(wrong)
    with pytest.raises(ValueError, match="size must be at least 100; got 20"):
        draw_scale(1.0, 20)


def test_timeline():
    pairs = [PairMotion(0, 2.0), PairMotion(1, 0.0, duplicate=True), PairMotion(2, 90.0, cut=True), PairMotion(3, 4.0)]
    assert describe_timeline(pairs, 25) == (
        "5 frames, 0.2 s. Mean motion 3 px a frame, most from frame 4 to 5 (4 px). Duplicate frames: 1. Scene cuts "
        "after frame 3."
    )
    svg = draw_timeline(pairs, 25).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img" and root.get("aria-label") == describe_timeline(pairs, 25)
    first, second = (float(bar.get("height")) for bar in root.iter(f"{SVG}rect"))
    assert second == pytest.approx(2 * first, rel=1e-3)  # the cut, whose flow means nothing, does not set the scale
    titles = [title.text for title in root.iter(f"{SVG}title")]
    assert titles[1:3] == ["frame 3 repeats frame 2", "scene cut after frame 3"]
    assert describe_timeline([], 25) == "No pair of frames."
    long = draw_timeline([PairMotion(index, 1.0) for index in range(500)], 25)
    assert len(re.findall(r">\d+ s</text>", long)) == 10


def test_motion_is_measured_where_it_is_finite(pair):
    flow = pair.flow.clone()
    flow[:, 0] = float("inf")
    expected = torch.linalg.vector_norm(pair.flow[:, 1:], dim=0).mean().item()
    motion = measure_motion(VideoFlow(7, pair.frame1, pair.frame2, flow, 12, cut=True))
    assert motion == PairMotion(7, pytest.approx(expected), duplicate=False, cut=True)


def test_a_prediction_stops_within_a_pair():
    torch.manual_seed(0)
    model = RaftForOpticalFlow(tiny_config()).eval()
    frames = moving_shapes(2, 64, 64, [(1, 0)]).frames
    calls, limit = 0, 10**9

    def stop_requested() -> bool:
        nonlocal calls
        calls += 1
        return calls > limit

    with cancellable(model, stop_requested):
        list(FlowVideo(model, frames, num_flow_updates=20))
    assert calls >= 20
    calls, limit = 0, 5
    with pytest.raises(CancelledError), cancellable(model, stop_requested):
        list(FlowVideo(model, frames, num_flow_updates=20))
    assert calls == 6
    list(FlowVideo(model, frames, num_flow_updates=2))  # nothing of it stays
    assert calls == 6
