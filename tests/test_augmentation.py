"""Augmentation: geometry and ground truth stay exact, parameters follow the published recipe."""

import random
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from plain_augmentation import adjust, apply_plainly
from torchvision.transforms import functional as F

from flow_data.augmentation import (
    DENSE_JITTER,
    SPARSE_JITTER,
    Augmentation,
    apply_dense,
    apply_sparse,
    augment_dense,
    augment_sparse,
    draw_dense,
    draw_offset_dense,
    draw_offset_sparse,
    draw_patches,
    draw_size_dense,
    draw_size_sparse,
    draw_sparse,
    limit_flow,
)
from flow_data.color_jitter import PROBE_PIXELS, adjust_colors, draw_adjustments, mean_color, take_probe
from flow_data.flow_io import read_flow
from flow_data.sample import FlowSample
from flow_data.synthetic import SyntheticOptions, render_pair

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40))
DRAWS = 4000
APPLIERS = [apply_dense, apply_sparse]
NO_COLORS = [("hue", 0.0), ("contrast", 1.0), ("brightness", 1.0), ("saturation", 1.0)]


def random_sample(size, seed=0, density=1.0) -> FlowSample:
    """Noise everywhere, flow 0 where not valid."""
    rng = np.random.default_rng(seed)
    image1, image2 = rng.integers(0, 256, size=(2, *size, 3), dtype=np.uint8)
    valid = rng.random(size) < density
    flow = rng.normal(scale=20, size=(*size, 2)).astype(np.float32) * valid[..., None]
    return FlowSample(image1, image2, flow, valid)


def nothing_but(sample: FlowSample, **changes) -> Augmentation:
    """The augmentation that changes nothing about the sample, with some changes."""
    size = changes.get("size", sample.valid.shape)
    plain = Augmentation((NO_COLORS,), [], size, False, False, (0, 0), size)
    return plain._replace(**changes)


def assert_same(sample: FlowSample, other: FlowSample) -> None:
    for name, array, expected in zip(sample._fields[:4], sample[:4], other[:4], strict=True):
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array, expected, err_msg=name)


def warp_error(sample: FlowSample) -> np.ndarray:
    """|frame 2 warped by the flow - frame 1| in gray levels, at valid pixels that stay in the frame."""
    height, width = sample.valid.shape
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    target = np.stack([x, y], axis=-1).astype(np.float32) + sample.flow
    warped = cv2.remap(sample.image2, target, None, cv2.INTER_LINEAR)
    inside = ((target >= 0) & (target <= (width - 1, height - 1))).all(axis=-1) & sample.valid
    return np.abs(warped.astype(float) - sample.image1)[inside]


def assert_share(hits, probability: float) -> None:
    """The share of hits is `probability`, within 4.5 standard deviations."""
    hits = np.asarray(hits)
    assert abs(hits.mean() - probability) < 4.5 * np.sqrt(probability * (1 - probability) / len(hits))


@pytest.fixture(scope="module")
def moving_background() -> FlowSample:
    """A pair with affine flow and no occlusion, blurred so that resizing keeps it."""
    options = SyntheticOptions((150, 200), (6, 6), shapes=(0, 0), appearance=0, nonrigid=0, ego_motion=0)
    pair = render_pair(options, seed=3, index=7).sample
    return pair._replace(
        image1=cv2.GaussianBlur(pair.image1, (0, 0), 1.5), image2=cv2.GaussianBlur(pair.image2, (0, 0), 1.5)
    )


# ---- geometry ----


@given(size=SIZES, density=st.sampled_from([1.0, 0.3]))
def test_identity_parameters_change_nothing(size, density):
    sample = random_sample(size, density=density)
    for apply in APPLIERS:
        assert_same(apply(sample, nothing_but(sample)), sample)


@given(size=SIZES, flips=st.sampled_from([(True, False), (False, True), (True, True)]))
def test_two_flips_are_the_identity(size, flips):
    sample = random_sample(size, density=0.5)
    flip = nothing_but(sample, flip_x=flips[0], flip_y=flips[1])
    for apply in APPLIERS:
        once = apply(sample, flip)
        np.testing.assert_array_equal(once.image1, np.flip(sample.image1, axis=np.flatnonzero(flips[::-1])))
        assert_same(apply(once, flip), sample)


@settings(deadline=None, max_examples=200)
@given(
    old=SIZES,
    new=SIZES,
    density=st.sampled_from([1.0, 0.6]),
    flips=st.tuples(st.booleans(), st.booleans()),
    corner=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    share=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    patches=st.booleans(),
)
@example((30, 40), (31, 41), 0.9, (False, False), (0.0, 0.0), (0.4, 0.4), True)  # cv2.resize copies such a small part
def test_a_crop_is_that_of_the_whole_frames(old, new, density, flips, corner, share, patches):
    """But for colors, resizing only what the crop shows is the same as resizing everything and then cropping."""
    sample = random_sample(old, density=density)
    crop_size = tuple(1 + int(part * (side - 1)) for part, side in zip(share, new, strict=True))
    offset = tuple(
        int(part * (side - part_side)) for part, side, part_side in zip(corner, new, crop_size, strict=True)
    )
    augmentation = Augmentation((NO_COLORS,), [], new, *flips, offset, crop_size)
    if patches:
        sample = sample._replace(image2=np.full_like(sample.image2, 90))  # whose mean has no rounding
        sample.image2[old[0] // 2 :] = 30
        augmentation = augmentation._replace(patches=[np.s_[1:9, 2:50], np.s_[old[0] // 2 : 99, 0:3]])
    for apply in APPLIERS:
        ours, plain = apply(sample, augmentation), apply_plainly(sample, augmentation, apply is apply_sparse)
        np.testing.assert_allclose(ours.flow, plain.flow, rtol=1e-5, atol=1e-4)  # OpenCV's sums depend on the width
        assert_same(ours._replace(flow=plain.flow), plain)


@settings(deadline=None, max_examples=40)
@given(
    size=st.tuples(st.integers(90, 260), st.integers(90, 300)),
    flip_x=st.booleans(),
    flip_y=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_frame2_warped_by_the_flow_is_still_frame1(moving_background, size, flip_x, flip_y, seed):
    offset = draw_offset_dense(np.random.default_rng(seed), size, (64, 72))
    augmentation = Augmentation((NO_COLORS,), [], size, flip_x, flip_y, offset, (64, 72))
    for apply in APPLIERS:
        sample = apply(moving_background, augmentation)
        assert sample.image1.shape == sample.image2.shape == (64, 72, 3) and sample.valid.shape == (64, 72)
        assert warp_error(sample).mean() < 1.0


@pytest.mark.parametrize("seed", range(8))
def test_augmented_pairs_still_match(moving_background, seed):
    size = moving_background.valid.shape
    dense = draw_dense(np.random.default_rng(seed), size, (96, 128), (-0.4, 0.6))
    assert warp_error(apply_dense(moving_background, dense._replace(colors=(NO_COLORS,), patches=[]))).mean() < 1.0
    valid = np.random.default_rng(seed).random(size) < 0.1
    holes = moving_background._replace(flow=moving_background.flow * valid[..., None], valid=valid)
    sparse = draw_sparse(np.random.default_rng(seed), size, (96, 128), (-0.4, 0.6))
    sample = apply_sparse(holes, sparse._replace(colors=(NO_COLORS,), patches=[]))
    assert 0.01 < sample.valid.mean() < 0.3
    assert warp_error(sample).mean() < 1.0


@given(size=SIZES, new=SIZES)
def test_flow_is_scaled_by_the_exact_ratio_per_axis(size, new):
    sample = random_sample(size)._replace(flow=np.full((*size, 2), (3, -5), np.float32))
    expected = np.array([3 * new[1] / size[1], -5 * new[0] / size[0]])
    resized = apply_dense(sample, nothing_but(sample, size=new))
    assert resized.valid.all()
    np.testing.assert_allclose(resized.flow, np.broadcast_to(expected, resized.flow.shape), rtol=1e-5)


# ---- ground truth ----


@given(size=SIZES, new=SIZES, seed=st.integers(0, 99))
def test_dense_resize_keeps_only_what_valid_pixels_gave(size, new, seed):
    sample = random_sample(size, seed, density=0.7)
    flow = np.full_like(sample.flow, 2) * sample.valid[..., None]
    resized = apply_dense(sample._replace(flow=flow), nothing_but(sample, size=new))
    scale = np.array([new[1] / size[1], new[0] / size[0]])
    np.testing.assert_allclose(resized.flow[resized.valid], np.tile(2 * scale, (resized.valid.sum(), 1)), rtol=2e-4)
    assert (resized.flow[~resized.valid] == 0).all()


@given(size=SIZES, new=SIZES, seed=st.integers(0, 99))
def test_sparse_ground_truth_is_never_interpolated(size, new, seed):
    sample = random_sample(size, seed, density=0.3)
    resized = apply_sparse(sample, nothing_but(sample, size=new))
    scale = np.array([new[1] / size[1], new[0] / size[0]], np.float32)
    allowed = {tuple(vector) for vector in sample.flow[sample.valid] * scale}
    assert {tuple(vector) for vector in resized.flow[resized.valid]} <= allowed
    assert (resized.flow[~resized.valid] == 0).all()


def test_sparse_pixels_move_to_where_their_centers_are():
    """Worked out by hand. Nothing falls off the frame; of several in one place the last in reading order stays."""
    flow = np.stack(np.meshgrid(np.arange(6), np.arange(6)), axis=-1).astype(np.float32)  # each vector its own place
    full = random_sample((6, 6))._replace(flow=flow)
    doubled = apply_sparse(full, nothing_but(full, size=(12, 12)))  # 0 -> 0.5, in the middle of 0 and 1: up
    np.testing.assert_array_equal(doubled.flow[1::2, 1::2], 2 * flow)
    assert doubled.valid.sum() == 36
    tripled = apply_sparse(full, nothing_but(full, size=(18, 18)))  # 0 -> 1, 1 -> 4, ...
    np.testing.assert_array_equal(tripled.flow[1::3, 1::3], 3 * flow)
    assert tripled.valid.sum() == 36
    halved = apply_sparse(full, nothing_but(full, size=(3, 3)))
    assert halved.valid.all() and halved.flow[..., 0].tolist() == [[0.5, 1.5, 2.5]] * 3
    assert halved.flow[:, 0, 1].tolist() == [0.5, 1.5, 2.5]


@pytest.mark.parametrize("factor", [2, 3, 5])
def test_sparse_flow_stays_on_what_it_was_measured_on(factor):
    """A ramp is resized exactly, so the value under a moved pixel tells how far from its own place it has come."""
    height, width = 8, 40
    ramp = np.repeat(np.arange(width, dtype=np.uint8)[None, :, None] * 5, height, axis=0).repeat(3, axis=2)
    flow = np.zeros((height, width, 2), np.float32)
    flow[..., 0] = np.arange(width)
    sample = FlowSample(ramp, ramp, flow, np.ones((height, width), bool))
    resized = apply_sparse(sample, nothing_but(sample, size=(height * factor, width * factor)))
    inner = resized.valid.copy()
    inner[:, :factor] = inner[:, -factor:] = False  # beyond the border the ramp is flat
    came_from = resized.flow[inner][:, 0] / factor
    off = factor * np.abs(resized.image1[inner][:, 0] / 5 - came_from)  # pixels of the resized frame
    assert off.max() <= (0.5 if factor % 2 == 0 else 0) + factor * 0.5 / 5  # gray levels are rounded


def test_limit_flow_invalidates_what_is_too_large_or_unknown():
    flow = np.float32([[[999, 0], [1000, 0], [0, -1000], [np.nan, 0], [1, 2]]])
    limited, valid = limit_flow(flow, np.ones((1, 5), bool), 1000)
    assert valid.tolist() == [[True, False, False, False, True]]
    assert limited.tolist() == [[[999, 0], [0, 0], [0, 0], [0, 0], [1, 2]]]
    for value in (1000, -1000, np.nan):
        assert not limit_flow(np.float32([[[0, value]]]), np.ones((1, 1), bool), 1000)[1].any()


def test_only_dense_flow_is_limited():
    sample = random_sample((4, 4))._replace(flow=np.full((4, 4, 2), 600, np.float32))
    doubled = nothing_but(sample, size=(8, 8))
    assert not apply_dense(sample, doubled).valid.any()
    assert apply_sparse(sample, doubled).valid.sum() == 16


@settings(deadline=None, max_examples=30)
@given(size=SIZES, seed=st.integers(0, 2**32))
def test_nothing_is_valid_where_nothing_was(size, seed):
    sample = random_sample(size)
    blank = sample._replace(flow=np.zeros_like(sample.flow), valid=np.zeros_like(sample.valid))
    for augment in (augment_dense, augment_sparse):
        augmented = augment(blank, np.random.default_rng(seed), (24, 32), (-0.5, 0.5))
        assert not augmented.valid.any() and not augmented.flow.any()


# ---- crops ----


@pytest.mark.parametrize("draw", [draw_offset_dense, draw_offset_sparse])
def test_crop_offsets_stay_inside_and_reach_both_ends(draw):
    rng = np.random.default_rng(0)
    tops, lefts = np.array([draw(rng, (13, 17), (10, 11)) for _ in range(DRAWS)]).T
    assert set(tops) == set(range(4)) and set(lefts) == set(range(7))
    assert draw(rng, (10, 11), (10, 11)) == (0, 0)


def test_crop_margins_of_sparse_samples():
    rng = np.random.default_rng(0)
    tops, lefts = np.array([draw_offset_sparse(rng, (300, 400), (200, 300)) for _ in range(DRAWS)]).T
    assert_share(tops == 0, 1 / 120)  # y in [0, 120), clipped to 100
    assert_share(tops == 100, 20 / 120)
    assert_share(lefts == 0, 51 / 200)  # x in [-50, 150), clipped to 0..100
    assert_share(lefts == 100, 50 / 200)


@pytest.mark.parametrize("augment", [augment_dense, augment_sparse])
@pytest.mark.parametrize("size", [(24, 32), (23, 32), (24, 31), (25, 33), (3, 200), (1, 1), (60, 80)])
def test_every_frame_size_gives_the_crop_size(augment, size):
    sample = random_sample(size, density=0.5)
    for seed in range(40):
        augmented = augment(sample, np.random.default_rng(seed), (24, 32), (-0.5, 0.5))
        assert augmented.image1.shape == augmented.image2.shape == (24, 32, 3)
        assert augmented.flow.shape == (24, 32, 2) and augmented.valid.shape == (24, 32)
        assert [array.dtype for array in augmented[:4]] == [np.uint8, np.uint8, np.float32, bool]
        assert all(array.flags.c_contiguous and array.flags.writeable for array in augmented[:4])
        assert not any(np.shares_memory(array, old) for array, old in zip(augmented[:4], sample[:4], strict=True))


def test_bad_arguments_are_named():
    sample, rng = random_sample((24, 32)), np.random.default_rng(0)
    for augment in (augment_dense, augment_sparse):
        with pytest.raises(ValueError, match=r"crop_size.*\(0, 8\)"):
            augment(sample, rng, (0, 8), (0.0, 0.0))
        with pytest.raises(ValueError, match=r"zoom_range.*\(0.5, -0.5\)"):
            augment(sample, rng, (8, 8), (0.5, -0.5))
        with pytest.raises(ValueError, match="at least 1 px"):
            augment(random_sample((0, 32)), rng, (8, 8), (0.0, 0.0))
    for apply in APPLIERS:
        for offset in [(-1, 0), (0, -1), (1, 0), (0, 1)]:
            with pytest.raises(ValueError, match="outside"):
                apply(sample, nothing_but(sample, offset=offset))
    with pytest.raises(ValueError, match="'gamma'"):
        adjust_colors(sample.image1, [("gamma", 1.0)], take_probe(sample.image1))


# ---- the published recipe ----


def test_zoom_and_stretch_follow_the_recipe():
    rng, old = np.random.default_rng(0), 10**6  # so large that rounding to whole pixels does not show
    sizes = np.array([draw_size_dense(rng, (old, old), (1, 1), (-0.3, 0.5)) for _ in range(DRAWS)])
    resized = (sizes != old).any(axis=1)
    assert_share(resized, 0.8)
    log_y, log_x = np.log2(sizes[resized] / old).T
    stretched = log_x != log_y
    assert_share(stretched, 0.8)
    zoom, ratio = log_x[~stretched], (log_y - log_x)[stretched]
    assert zoom.min() > -0.3 - 1e-5 and zoom.max() < 0.5 + 1e-5
    for share in (0.25, 0.5, 0.75):  # uniform in log2
        assert_share(zoom < -0.3 + 0.8 * share, share)
    assert abs(ratio).max() < 0.4 and abs(ratio).max() > 0.35  # of two draws from +- 0.2
    assert_share(abs(ratio) < 0.2, 0.75)


def test_sparse_samples_are_not_stretched():
    rng, old = np.random.default_rng(0), 10**6
    sizes = np.array([draw_size_sparse(rng, (old, old), (1, 1), (-0.3, 0.5)) for _ in range(DRAWS)])
    assert (sizes[:, 0] == sizes[:, 1]).all()
    assert_share(sizes[:, 0] != old, 0.8)


@pytest.mark.parametrize(("draw", "slack"), [(draw_size_dense, 8), (draw_size_sparse, 1)])
def test_zoom_leaves_room_for_the_crop(draw, slack):
    rng = np.random.default_rng(0)
    large = np.array([draw(rng, (400, 800), (300, 300), (-3.0, -2.0)) for _ in range(200)])
    assert {tuple(size) for size in large} == {(400, 800), (300 + slack, 600 + 2 * slack)}
    small = np.array([draw(rng, (280, 600), (300, 300), (-3.0, -2.0)) for _ in range(200)])
    assert (small[:, 0] == 300 + slack).all()


@pytest.mark.slow
def test_flips_follow_the_recipe():
    def flips(draw, **kwargs):
        rng = np.random.default_rng(0)
        drawn = [draw(rng, (4, 4), (2, 2), (0.0, 0.0), **kwargs) for _ in range(DRAWS)]
        return np.array([[augmentation.flip_x, augmentation.flip_y] for augmentation in drawn]).T

    horizontal, vertical = flips(draw_dense)
    assert_share(horizontal, 0.5)
    assert_share(vertical, 0.1)
    assert_share(horizontal & vertical, 0.05)
    horizontal, vertical = flips(draw_sparse)
    assert_share(horizontal, 0.5)
    assert not vertical.any()
    assert not flips(draw_dense, flip=False).any() and not flips(draw_sparse, flip=False).any()


def test_whole_draws_follow_the_recipe():
    """The parts are tested one by one; here, that they are put together with the right numbers."""
    rng = np.random.default_rng(0)
    dense = [draw_dense(rng, (400, 500), (200, 300), (-0.3, 0.5)) for _ in range(DRAWS)]
    sparse = [draw_sparse(rng, (400, 500), (200, 300), (-0.3, 0.5)) for _ in range(DRAWS)]
    assert_share([len(drawn.colors) == 2 for drawn in dense], 0.2)
    assert all(len(drawn.colors) == 1 for drawn in sparse)
    for draws, jitter in ((dense, DENSE_JITTER), (sparse, SPARSE_JITTER)):
        factors = np.array([[dict(drawn.colors[-1])[name] for name in jitter._fields] for drawn in draws])
        largest = np.abs(factors - (1, 1, 1, 0)).max(axis=0) / np.array(jitter)
        assert (largest <= 1).all() and (largest > 0.99).all()
        assert_share([len(drawn.patches) > 0 for drawn in draws], 0.5)
        assert_share([drawn.size != (400, 500) for drawn in draws], 0.8)
        assert all(drawn.crop_size == (200, 300) for drawn in draws)
        for axis in (0, 1):  # the crop is drawn in the resized frame, and up to its end
            room = np.array([drawn.size[axis] - drawn.crop_size[axis] - drawn.offset[axis] for drawn in draws])
            assert room.min() == 0 and min(drawn.offset[axis] for drawn in draws) == 0
    scales = np.log2(np.array([drawn.size for drawn in dense + sparse]) / (400, 500))
    assert (abs(scales[DRAWS:, 0] - scales[DRAWS:, 1]) < 0.01).all()  # no stretch, but for rounding to pixels
    assert scales[:DRAWS].max() > 0.6 and 0.49 < scales[DRAWS:].max() < 0.51


def test_erased_patches_follow_the_recipe():
    rng = np.random.default_rng(0)
    drawn = [draw_patches(rng, (30, 40), (400, 720)) for _ in range(DRAWS)]
    assert_share([len(patches) > 0 for patches in drawn], 0.5)
    assert_share([len(patches) == 2 for patches in drawn if patches], 0.5)
    patches = [patch for patches in drawn for patch in patches]
    for axis in (0, 1):
        assert {patch[axis].stop - patch[axis].start for patch in patches} == set(range(50, 100))
        assert {patch[axis].start for patch in patches} == set(range((30, 40)[axis]))


def test_erased_patches_shrink_with_small_crops():
    draws = [draw_patches(np.random.default_rng(seed), (30, 40), (92, 124)) for seed in range(DRAWS)]
    sides = {patch[axis].stop - patch[axis].start for patches in draws for patch in patches for axis in (0, 1)}
    assert min(sides) == 13 and max(sides) == 25  # a quarter of 50 to 99


def test_erasing_touches_frame2_only_and_fills_its_mean():
    sample = random_sample((20, 20))
    for apply in APPLIERS:
        erased = apply(sample, nothing_but(sample, patches=[np.s_[2:5, 15:70]]))
        mean = np.rint(sample.image2.reshape(-1, 3).mean(axis=0))
        assert (erased.image2[2:5, 15:] == mean).all()
        erased.image2[2:5, 15:] = sample.image2[2:5, 15:]
        assert_same(erased, sample)


def test_erased_patches_get_the_mean_of_the_whole_frame_after_its_jitter():
    sample = random_sample((40, 60))
    sample.image2[:, 30:] = 200
    darker = [("brightness", 0.5)]
    drawn = nothing_but(sample, colors=(NO_COLORS, darker), patches=[np.s_[0:99, 0:99]], crop_size=(10, 10))
    expected = sample.image2.reshape(-1, 3).mean(axis=0) / 2
    np.testing.assert_allclose(apply_dense(sample, drawn).image2, np.broadcast_to(expected, (10, 10, 3)), atol=1.01)


def test_color_adjustments_follow_the_recipe():
    rng = np.random.default_rng(0)
    drawn = [draw_adjustments(rng, DENSE_JITTER) for _ in range(DRAWS)]
    orders = [tuple(name for name, _ in adjustments) for adjustments in drawn]
    assert len(set(orders)) == 24
    assert_share([order[0] == "hue" for order in orders], 0.25)
    for name, center, width in [
        ("brightness", 1, 0.4),
        ("contrast", 1, 0.4),
        ("saturation", 1, 0.4),
        ("hue", 0, 0.5 / 3.14),
    ]:
        factors = (np.array([dict(adjustments)[name] for adjustments in drawn]) - center) / width
        assert abs(factors).max() <= 1
        for share in (0.25, 0.5, 0.75):
            assert_share(factors < 2 * share - 1, share)


def test_frames_share_their_colors_or_not():
    sample = random_sample((6, 6))
    sample = sample._replace(image2=sample.image1)
    one, other = [("brightness", 0.7)], [("brightness", 1.2)]
    for apply in APPLIERS:
        alike = apply(sample, nothing_but(sample, colors=(one,)))
        np.testing.assert_array_equal(alike.image1, alike.image2)
        differ = apply(sample, nothing_but(sample, colors=(one, other)))
        np.testing.assert_array_equal(differ.image1, alike.image1)
        assert differ.image2.mean() > 1.3 * differ.image1.mean()


def test_contrast_is_relative_to_the_mean_of_what_is_adjusted():
    gray = np.full((4, 4, 3), 100, np.uint8)
    sample = FlowSample(gray, gray + 100, np.zeros((4, 4, 2), np.float32), np.ones((4, 4), bool))
    half = [("contrast", 0.5)]
    for crop_size in [(4, 4), (1, 2)]:
        shared = apply_dense(sample, nothing_but(sample, colors=(half,), crop_size=crop_size))
        assert (shared.image1 == 125).all() and (shared.image2 == 175).all()  # around 150
        separate = apply_dense(sample, nothing_but(sample, colors=(half, half), crop_size=crop_size))
        assert (separate.image1 == 100).all() and (separate.image2 == 200).all()


# ---- colors ----


@pytest.mark.parametrize(
    ("name", "factors", "mean", "largest"),
    [  # Pillow cuts where OpenCV rounds, and a turn of hue to whole steps as well
        ("brightness", [0.6, 0.93, 1.4], 0.6, 1),
        ("contrast", [0.6, 0.93, 1.4], 0.8, 2),
        ("saturation", [0.6, 0.93, 1.4], 0.8, 2),
        ("hue", [-0.159, -0.05, 0.08, 0.159], 2.5, 20),
    ],
)
def test_each_adjustment_is_that_of_torchvision(name, factors, mean, largest):
    image = random_sample((120, 160)).image1
    for factor in factors:
        adjusted, probe = adjust_colors(image, [(name, factor)], take_probe(image))
        difference = np.abs(adjusted.astype(int) - adjust(image, [(name, factor)]))
        assert difference.mean() <= mean and difference.max() <= largest
        np.testing.assert_array_equal(probe.reshape(image.shape), adjusted)  # of every pixel, in a frame this small
    unchanged, _ = adjust_colors(image, NO_COLORS, take_probe(image))
    np.testing.assert_array_equal(unchanged, image)


@pytest.mark.parametrize("turn", [-0.159, -0.05, 0.003, 0.08, 0.159])
def test_hue_is_turned_as_exactly_as_8_bits_allow(turn):
    """A hue in 256 steps, turned by whole steps, is off by two at most: 12 levels where saturation is full."""
    image = random_sample((120, 160)).image1
    exact = F.adjust_hue(torch.from_numpy(image).permute(2, 0, 1) / 255, turn).permute(1, 2, 0).numpy() * 255
    adjusted, _ = adjust_colors(image, [("hue", turn)], take_probe(image))
    difference = np.abs(adjusted - exact)
    assert difference.mean() < 1.2 and difference.max() < 12


def test_adjustments_do_not_change_what_they_are_given():
    image = random_sample((30, 40)).image1
    before, probe = image.copy(), take_probe(image)
    for name, factor in [("brightness", 0.7), ("contrast", 0.7), ("saturation", 0.7), ("hue", 0.1)]:
        adjust_colors(image, [(name, factor)], probe)
        np.testing.assert_array_equal(image, before)
        np.testing.assert_array_equal(probe.reshape(image.shape), before)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_the_probe_stands_for_the_frame(seed):
    """Its mean is the frame's within four standard errors, before and after any adjustments."""
    rng = np.random.default_rng(seed)
    noise = random_sample((400, 500), seed).image1
    image = render_pair(SyntheticOptions(image_size=(400, 500)), seed=seed, index=0).sample.image1
    for frame in (noise, image):
        probe = take_probe(frame)
        assert PROBE_PIXELS <= len(probe) < 2 * PROBE_PIXELS
        adjustments = draw_adjustments(rng, DENSE_JITTER)
        whole, after = adjust_colors(frame, adjustments, probe)
        for all_pixels, some in ((frame, probe), (whole, after)):
            tolerance = 4 * all_pixels.reshape(-1, 3).std(axis=0) / PROBE_PIXELS**0.5
            error = np.abs(mean_color(some) - all_pixels.reshape(-1, 3).mean(axis=0))
            assert (error < tolerance).all() and error.max() < 3


@pytest.mark.slow
@pytest.mark.parametrize("apply", APPLIERS)
@pytest.mark.parametrize("seed", range(6))
def test_augmented_samples_are_those_of_the_plain_way(apply, seed):
    """Parameters of the recipe, all at once: flow and valid to the bit, colors but for four roundings."""
    pair = render_pair(SyntheticOptions(image_size=(200, 260)), seed=seed, index=1).sample
    draw = draw_sparse if apply is apply_sparse else draw_dense
    for number in range(6):
        augmentation = draw(np.random.default_rng([seed, number]), (200, 260), (128, 160), (-0.2, 0.6))
        ours, plain = apply(pair, augmentation), apply_plainly(pair, augmentation, apply is apply_sparse)
        np.testing.assert_array_equal(ours.flow, plain.flow)
        np.testing.assert_array_equal(ours.valid, plain.valid)
        for image, expected in ((ours.image1, plain.image1), (ours.image2, plain.image2)):
            difference = np.abs(image.astype(int) - expected)
            assert difference.mean() < 4 and np.percentile(difference, 99) < 16 and difference.max() < 30


# ---- randomness ----


@pytest.mark.parametrize("apply", APPLIERS)
@pytest.mark.parametrize("colors", [([],), ([], []), (NO_COLORS, [("hue", 0.0)])])
def test_samples_are_never_changed_in_place(apply, colors):
    sample = random_sample((20, 30), density=0.5)
    before = FlowSample(*(array.copy() for array in sample[:4]))
    for flip_x in (False, True):
        apply(sample, nothing_but(sample, colors=colors, patches=[np.s_[2:9, 2:9]], flip_x=flip_x))
        assert_same(sample, before)


@pytest.mark.parametrize("augment", [augment_dense, augment_sparse])
def test_the_generator_alone_decides(augment):
    sample = random_sample((60, 80), density=0.5)
    before = FlowSample(*(array.copy() for array in sample[:4]))
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first, again, other = (augment(sample, np.random.default_rng(seed), (24, 32), (-0.5, 0.5)) for seed in (1, 1, 2))
    assert_same(first, again)
    assert not np.array_equal(first.image1, other.image1)
    assert_same(sample, before)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[2]
    np.testing.assert_array_equal(np.random.get_state()[1], states[1])


# ---- real data ----


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "KITTI").is_dir(), reason="the sample data are not beside the project")
def test_kitti_ground_truth_is_only_moved_and_scaled():
    flow, valid = read_flow(DATA / "KITTI/training/flow_occ/000010_10.png")
    frames = (cv2.imread(str(DATA / f"KITTI/training/image_2/000010_{frame}.png")) for frame in (10, 11))
    sample = FlowSample(*frames, flow, valid)
    for seed in range(4):
        drawn = draw_sparse(np.random.default_rng(seed), valid.shape, (288, 960), (-0.2, 0.4), flip=False)
        augmented = apply_sparse(sample, drawn)
        scale = np.array([drawn.size[1] / valid.shape[1], drawn.size[0] / valid.shape[0]], np.float32)
        allowed = {tuple(vector) for vector in flow[valid] * scale}
        assert augmented.valid.sum() > 1000
        assert {tuple(vector) for vector in augmented.flow[augmented.valid]} <= allowed


def make_pair(size, seed, density=1.0) -> FlowSample:
    rng = np.random.default_rng(seed)
    image1, image2 = rng.integers(0, 256, (2, *size, 3), np.uint8)
    valid = rng.random(size) < density
    flow = rng.normal(0, 20, (*size, 2)).astype(np.float32)
    return FlowSample(image1, image2, np.where(valid[..., None], flow, np.float32(0)), valid)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("augment", [augment_dense, augment_sparse])
def test_frames_without_photometric_augmentation_are_those_of_augmenting_with_none(augment, seed):
    """The plain form with the same zoom, flips and crop, and neither color jitter nor erased patches."""
    sample, sparse = make_pair((150, 200), seed, density=0.3), augment is augment_sparse
    draw, apply = (draw_sparse, apply_sparse) if sparse else (draw_dense, apply_dense)
    augmentation = draw(np.random.default_rng(seed), (150, 200), (96, 128), (-0.2, 0.5))
    augmentation = augmentation._replace(patches=[(slice(0, 150), slice(0, 200))])
    kept = apply(sample, augmentation, keep_without_photo_aug=True)
    geometric = augmentation._replace(colors=([],), patches=[])
    plain = apply_plainly(sample, geometric, sparse)
    for image, expected in zip(kept.images_without_photo_aug, plain[:2], strict=True):
        np.testing.assert_allclose(image.astype(int), expected, atol=1)
    alone = apply(sample, augmentation)
    assert alone.images_without_photo_aug is None  # off unless asked for
    for name in ("image1", "image2", "flow", "valid"):
        np.testing.assert_array_equal(getattr(kept, name), getattr(alone, name), err_msg=name)
    assert not np.array_equal(kept.image2, kept.images_without_photo_aug[1])
    drawn = augment(sample, np.random.default_rng(seed), (96, 128), (-0.2, 0.5), keep_without_photo_aug=True)
    without = augment(sample, np.random.default_rng(seed), (96, 128), (-0.2, 0.5))
    assert drawn.images_without_photo_aug is not None and without.images_without_photo_aug is None
    np.testing.assert_array_equal(drawn.image1, without.image1)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("augment", [augment_dense, augment_sparse])
def test_flow_and_valid_are_optional(augment, seed):
    sample = make_pair((150, 200), seed)
    arguments = ((96, 128), (-0.2, 0.5))
    whole = augment(sample, np.random.default_rng(seed), *arguments)
    all_known = augment(sample._replace(valid=None), np.random.default_rng(seed), *arguments)
    frames = augment(sample._replace(flow=None, valid=None), np.random.default_rng(seed), *arguments)
    for name in ("image1", "image2"):
        np.testing.assert_array_equal(getattr(frames, name), getattr(whole, name))
    assert frames.flow is None and frames.valid is None
    np.testing.assert_array_equal(all_known.flow, whole.flow)
    np.testing.assert_array_equal(all_known.valid, whole.valid)
