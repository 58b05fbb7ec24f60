"""Flow as colors, and a prediction beside the ground truth."""

import numpy as np
import pytest
import torch
from torchvision.utils import flow_to_image

from flow_data.flow_io import read_flow
from flow_data.images import read_rgb
from flow_data.visualize import (
    GAP,
    draw_flow,
    draw_legend,
    draw_text,
    draw_wheel,
    longest_vector,
    pixel_text,
    stack_rows,
)
from flow_inference.visualization import (
    TITLES,
    UNKNOWN_ERROR,
    common_length,
    compare,
    draw_comparison,
    draw_error_legend,
)


def some_flow(*shape):
    return 9 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(2, 15, 20), (3, 2, 15, 20)])
def test_colors_are_torchvisions(shape):
    """Up to rounding: lengths are divided by the longest here, and by it and a little more there."""
    flow = some_flow(*shape)
    oracle = flow_to_image(flow).movedim(-3, -1).numpy()
    assert draw_flow(flow).shape == oracle.shape
    assert np.abs(draw_flow(flow).astype(int) - oracle).max() <= 1


def test_directions_have_their_colors():
    """Right is red, left is its complement; standing still is white."""
    right, left, still = (draw_flow(torch.tensor([[[u, 9.0]], [[0.0, 0.0]]]))[0, 0] for u in (9.0, -9.0, 0.0))
    assert right[0] > 200 and right[1:].max() < 100
    assert left[0] < 100 and left[1:].min() > 100
    assert still.min() > 250


def test_max_length_is_the_same_scale_for_all_images():
    flow = some_flow(2, 15, 20)
    flow[:, 0, 0] = torch.tensor([50.0, 0.0])
    whole = draw_flow(flow, max_length=50)
    assert np.array_equal(draw_flow(flow), whole)
    assert np.array_equal(draw_flow(flow[:, 5:], max_length=50), whole[5:])
    assert not np.array_equal(draw_flow(flow[:, 5:]), whole[5:])


def test_longer_vectors_are_clipped_to_full_saturation():
    angles = torch.linspace(0, 6, 40)
    circle = torch.stack([angles.cos(), angles.sin()])[:, None]
    assert np.array_equal(draw_flow(5 * circle, max_length=5), draw_flow(70 * circle, max_length=5))
    assert not np.array_equal(draw_flow(4 * circle, max_length=5), draw_flow(5 * circle, max_length=5))


def test_what_is_not_finite_is_white_and_no_measure():
    flow = some_flow(2, 15, 20)
    broken = flow.clone()
    broken[0, 3, 4], broken[1, 5, 6], broken[:, 7, 8] = torch.nan, torch.inf, -torch.inf
    drawn, expected = draw_flow(broken), draw_flow(flow, max_length=longest_vector(broken))
    where = (np.array([3, 5, 7]), np.array([4, 6, 8]))
    assert (drawn[where] == 255).all() and (expected[where] < 255).any(axis=1).all()
    expected[where] = 255
    assert np.array_equal(drawn, expected)
    assert (draw_flow(torch.full((2, 3, 3), torch.nan)) == 255).all()


@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_tiny_and_huge_flow_has_colors(size):
    flow = some_flow(2, 15, 20)
    assert np.abs(draw_flow(size * flow).astype(int) - draw_flow(flow)).max() <= 1


def test_no_motion_is_white():
    assert (draw_flow(torch.zeros(2, 3, 3)) == 255).all()
    assert (draw_flow(torch.zeros(2, 3, 3), max_length=4) == 255).all()


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf")])
def test_bad_lengths_are_named(value):
    for draw in (draw_legend, lambda length: draw_flow(torch.zeros(2, 3, 3), length)):
        with pytest.raises(ValueError, match=f"max_length must be a positive number of pixels; got {value}"):
            draw(value)


def test_the_wheel_has_the_colors_of_flow():
    """At a place of the wheel is the color of the vector from its center to there; outside it is white.

    Not exactly to the right: torchvision's circle of colors has its seam there.
    """
    wheel = draw_wheel(101)
    assert wheel.shape == (101, 101, 3)
    for x, y in ((40, 4), (0, 40), (-30, 20), (10, -35)):
        color = draw_flow(torch.tensor([x, y]).reshape(2, 1, 1), max_length=50.5)[0, 0]
        assert np.abs(wheel[50 + y, 50 + x].astype(int) - color).max() <= 4
    assert (wheel[[0, 0, 100, 100], [0, 100, 0, 100]] == 255).all()


@pytest.mark.parametrize("scale", [0.7, 1, 2.5])
def test_nothing_is_cut_off_in_a_legend(scale):
    """What is drawn ends before the edge, whatever the text; only the wheel touches it."""
    size = round(64 * scale)
    for length in (0.00123, 9.999, 12.345, 123456.0):
        legend = draw_legend(length, scale)
        assert (legend[:, -1] == 255).all() and (legend[-1] == 255).all() and (legend[0, size:] == 255).all()
        assert (draw_error_legend(length, scale)[:, -1] == 255).all()
    for text in ("Agjpqy", "0", "www"):
        drawn = draw_text(text, scale)
        assert drawn.min() < 100 and len(drawn) == len(draw_text("a", scale))
        for edge in (drawn[0], drawn[-1], drawn[:, 0], drawn[:, -1]):
            assert (edge == 255).all()


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0012345, "0.00123"), (1.5, "1.5"), (3.0, "3"), (12.345, "12.3"), (99.96, "100"), (1234.5, "1234")],
)
def test_lengths_are_written_with_the_digits_that_matter(value, text):
    assert pixel_text(value) == text


def a_pair(height, width):
    """Frame, ground truth, mask and prediction; the first row is unknown."""
    frame = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    flow_gt = some_flow(2, height, width).permute(1, 2, 0).numpy()
    valid = np.ones((height, width), bool)
    valid[0] = False
    return frame, flow_gt, valid, some_flow(2, height, width) + 0.5


def test_comparison_has_one_scale_and_tells_the_unknown_apart():
    image = np.zeros((8, 8, 3), np.uint8)
    flow_gt = np.full((8, 8, 2), 4.0, np.float32)
    valid = np.ones((8, 8), bool)
    valid[0] = False
    same = draw_comparison(image, flow_gt, valid, torch.full((2, 8, 8), 4.0))
    true_part, predicted, error = same[:, 12:20], same[:, 24:32], same[:, 36:44]
    assert (true_part[0] == 255).all() and np.array_equal(true_part[1:], predicted[1:]) and (error[1:] == 0).all()
    assert (error[0] == UNKNOWN_ERROR).all() and len(set(UNKNOWN_ERROR)) == 3  # errors are gray
    half = draw_comparison(image, flow_gt, valid, torch.full((2, 8, 8), 2.0))
    assert not np.array_equal(half[1:, 12:20], half[1:, 24:32])  # half as long is half as saturated
    assert (half[1:, 36:44] == int(255 * 2 * 2**0.5 / 3)).all()
    finer = draw_comparison(image, flow_gt, valid, torch.full((2, 8, 8), 2.0), white_error=8)
    assert (finer[1:, 36:44] == int(255 * 2 * 2**0.5 / 8)).all()
    assert stack_rows([same, same[:, :10]]).shape == (20, 44, 3)


def test_unknown_ground_truth_and_broken_predictions_are_no_measure():
    _, flow_gt, valid, flow_pred = a_pair(8, 9)
    expected = common_length(flow_gt, valid, flow_pred)
    longest = max(np.linalg.norm(flow_gt[1:], axis=2).max(), flow_pred.norm(dim=0).max().item())
    assert expected == pytest.approx(longest)
    flow_gt[0], flow_pred[:, 3, 3] = 1e9, torch.nan
    assert common_length(flow_gt, valid, flow_pred) == pytest.approx(expected)


def test_a_prediction_that_is_not_finite_is_the_largest_error():
    frame, flow_gt, valid, flow_pred = a_pair(8, 8)
    flow_pred[0, 3, 4], flow_pred[1, 5, 6] = torch.nan, torch.inf
    drawn = draw_comparison(frame, flow_gt, valid, flow_pred)
    assert (drawn[[3, 5], [36 + 4, 36 + 6]] == 255).all() and (drawn[[3, 5], [24 + 4, 24 + 6]] == 255).all()


@pytest.mark.parametrize(("height", "width"), [(64, 64), (8, 20), (100, 300), (90, 900)])
def test_compare_is_the_comparison_with_titles_and_legends(height, width):
    """The four parts are in it, in their order, and only white, text and legends are around them."""
    pair = a_pair(height, width)
    drawn = compare(*pair, white_error=2)
    row = draw_comparison(*pair, white_error=2)
    scale = max(width / 400, 1)
    top = len(draw_text("a", scale)) + GAP
    lefts = [0]
    for number, title in enumerate(TITLES):
        part = row[:, number * (width + GAP) : number * (width + GAP) + width]
        assert np.array_equal(drawn[top : top + height, lefts[-1] : lefts[-1] + width], part)
        text = draw_text(title, scale)
        assert np.array_equal(drawn[: len(text), lefts[-1] : lefts[-1] + text.shape[1]], text)
        lefts.append(lefts[-1] + max(width, text.shape[1]) + GAP)
    wheel, grays = draw_legend(common_length(*pair[1:]), scale), draw_error_legend(2, scale)
    below = drawn[top + height + GAP :]
    assert np.array_equal(below[: len(wheel), lefts[1] : lefts[1] + wheel.shape[1]], wheel)
    left = max(lefts[3], lefts[1] + wheel.shape[1] + GAP)
    assert np.array_equal(below[: len(grays), left : left + grays.shape[1]], grays)


def test_sizes_that_differ_and_bad_scales_are_named():
    frame, flow_gt, valid, flow_pred = a_pair(8, 9)
    for draw in (compare, draw_comparison):
        with pytest.raises(ValueError, match=r"flow_pred must have the size of the others, \(8, 9\); got \(8, 5\)"):
            draw(frame, flow_gt, valid, flow_pred[..., :5])
        with pytest.raises(ValueError, match=r"valid must have the size of the others, \(8, 9\); got \(7, 9\)"):
            draw(frame, flow_gt, valid[1:], flow_pred)
        with pytest.raises(ValueError, match=r"flow_gt must have the size of the others, \(7, 9\); got \(8, 9\)"):
            draw(frame[1:], flow_gt, valid, flow_pred)
        with pytest.raises(ValueError, match="white_error must be a positive number of pixels; got 0"):
            draw(frame, flow_gt, valid, flow_pred, white_error=0)
        with pytest.raises(ValueError, match="max_length must be a positive number of pixels; got -1"):
            draw(frame, flow_gt, valid, flow_pred, max_length=-1)


def test_a_real_pair_is_compared(sample_data):
    """KITTI knows part of the pixels: those are blue, and with the ground truth as prediction all others black."""
    folder = sample_data / "KITTI" / "training"
    flow_gt, valid = read_flow(folder / "flow_occ" / "000010_10.png")
    frame = read_rgb({"bytes": None, "path": str(folder / "image_2" / "000010_10.png")}, "frame")
    drawn = compare(frame, flow_gt, valid, torch.from_numpy(flow_gt).permute(2, 0, 1))
    scale = frame.shape[1] / 400
    top = len(draw_text("a", scale)) + GAP
    error = drawn[top : top + len(frame), 3 * (frame.shape[1] + GAP) :]
    assert (error[valid] == 0).all() and (error[~valid] == UNKNOWN_ERROR).all() and 0.1 < valid.mean() < 0.9
