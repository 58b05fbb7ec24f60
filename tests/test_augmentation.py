"""Augmentation: geometry stays true, ground truth stays honest, parameters follow the published recipe."""

import random
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flow_data import augmentation
from flow_data.augmentation import (
    DENSE_JITTER,
    JitterRange,
    adjust_colors,
    augment_dense,
    augment_sparse,
    crop,
    draw_adjustments,
    draw_offset_dense,
    draw_offset_sparse,
    draw_patches,
    draw_size_dense,
    draw_size_sparse,
    erase_patches,
    flip_horizontal,
    flip_vertical,
    jitter_colors,
    limit_flow,
    resize_dense,
    resize_sparse,
)
from flow_data.features import FlowSample
from flow_data.flow_io import read_flow
from flow_data.synthetic import SyntheticOptions, render_pair

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40))
DRAWS = 4000


def random_sample(size, seed=0, density=1.0) -> FlowSample:
    """Noise everywhere, flow 0 where not valid."""
    rng = np.random.default_rng(seed)
    image1, image2 = rng.integers(0, 256, size=(2, *size, 3), dtype=np.uint8)
    valid = rng.random(size) < density
    flow = rng.normal(scale=20, size=(*size, 2)).astype(np.float32) * valid[..., None]
    return FlowSample(image1, image2, flow, valid)


def assert_same(sample: FlowSample, other: FlowSample) -> None:
    for name, array, expected in zip(sample._fields, sample, other, strict=True):
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array, expected, err_msg=name)


def warp_error(sample: FlowSample) -> np.ndarray:
    """|frame 2 warped by the flow - frame 1| in grey levels, at valid pixels that stay in the frame."""
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
    pair = render_pair(SyntheticOptions(image_size=(150, 200), displacement=(6, 6), shapes=(0, 0)), seed=3, index=5)
    return pair._replace(
        image1=cv2.GaussianBlur(pair.image1, (0, 0), 1.5), image2=cv2.GaussianBlur(pair.image2, (0, 0), 1.5)
    )


# ---- geometry ----


@given(size=SIZES, density=st.sampled_from([1.0, 0.3]))
def test_identity_parameters_change_nothing(size, density):
    sample = random_sample(size, density=density)
    assert_same(resize_dense(sample, size), sample)
    assert_same(resize_sparse(sample, size), sample)
    assert_same(crop(sample, (0, 0), size), sample)
    assert_same(limit_flow(sample, 1000), sample)
    neutral = [("hue", 0.0), ("contrast", 1.0), ("brightness", 1.0), ("saturation", 1.0)]
    np.testing.assert_array_equal(adjust_colors(sample.image1, neutral), sample.image1)


@given(size=SIZES)
def test_two_flips_are_the_identity(size):
    sample = random_sample(size, density=0.5)
    assert_same(flip_horizontal(flip_horizontal(sample)), sample)
    assert_same(flip_vertical(flip_vertical(sample)), sample)


@settings(deadline=None, max_examples=40)
@given(
    size=st.tuples(st.integers(90, 260), st.integers(90, 300)),
    horizontal=st.booleans(),
    vertical=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_frame2_warped_by_the_flow_is_still_frame1(moving_background, size, horizontal, vertical, seed):
    sample = resize_dense(moving_background, size)
    assert sample.image1.shape == sample.image2.shape == (*size, 3) and sample.valid.shape == size
    sample = flip_horizontal(sample) if horizontal else sample
    sample = flip_vertical(sample) if vertical else sample
    sample = crop(sample, draw_offset_dense(np.random.default_rng(seed), size, (64, 72)), (64, 72))
    assert warp_error(sample).mean() < 1.0


@pytest.mark.parametrize("seed", range(8))
def test_augmented_pairs_still_match(moving_background, seed, monkeypatch):
    monkeypatch.setattr(augmentation, "jitter_colors", lambda sample, *_, **__: sample)
    monkeypatch.setattr(augmentation, "erase_patches", lambda sample, _: sample)
    dense = augment_dense(moving_background, np.random.default_rng(seed), (96, 128), (-0.4, 0.6))
    assert warp_error(dense).mean() < 1.0
    valid = np.random.default_rng(seed).random(moving_background.valid.shape) < 0.1
    holes = moving_background._replace(flow=moving_background.flow * valid[..., None], valid=valid)
    sparse = augment_sparse(holes, np.random.default_rng(seed), (96, 128), (-0.4, 0.6))
    assert 0.01 < sparse.valid.mean() < 0.3
    assert warp_error(sparse).mean() < 1.0


@given(size=SIZES, new=SIZES)
def test_resize_scales_flow_by_the_exact_ratio_per_axis(size, new):
    sample = random_sample(size)._replace(flow=np.full((*size, 2), (3, -5), np.float32))
    expected = np.array([3 * new[1] / size[1], -5 * new[0] / size[0]])
    resized = resize_dense(sample, new)
    assert resized.valid.all()
    np.testing.assert_allclose(resized.flow, np.broadcast_to(expected, resized.flow.shape), rtol=1e-5)


# ---- ground truth ----


@given(size=SIZES, new=SIZES, seed=st.integers(0, 99))
def test_dense_resize_keeps_only_what_valid_pixels_gave(size, new, seed):
    sample = random_sample(size, seed, density=0.7)
    garbage = np.full_like(sample.flow, 2)
    garbage[~sample.valid] = 1e6
    resized = resize_dense(sample._replace(flow=garbage), new)
    scale = np.array([new[1] / size[1], new[0] / size[0]])
    np.testing.assert_allclose(resized.flow[resized.valid], np.tile(2 * scale, (resized.valid.sum(), 1)), rtol=1e-5)
    assert size == new or (resized.flow[~resized.valid] == 0).all()


@given(size=SIZES, new=SIZES, seed=st.integers(0, 99))
def test_sparse_resize_never_interpolates(size, new, seed):
    sample = random_sample(size, seed, density=0.3)
    resized = resize_sparse(sample, new)
    scale = np.array([new[1] / size[1], new[0] / size[0]], np.float32)
    allowed = {tuple(vector) for vector in sample.flow[sample.valid] * scale}
    assert {tuple(vector) for vector in resized.flow[resized.valid]} <= allowed
    assert (resized.flow[~resized.valid] == 0).all()


def test_sparse_resize_moves_pixels_to_the_rounded_place_half_up():
    """Row and column 0 stay, 0.5 becomes 1 and 2.5 becomes 3; the original drops the former, rounds half to even."""
    size = (6, 6)
    flow = np.stack(np.meshgrid(np.arange(6), np.arange(6)), axis=-1).astype(np.float32)  # each vector its own place
    full = random_sample(size)._replace(flow=flow)
    doubled = resize_sparse(full, (12, 12))
    np.testing.assert_array_equal(doubled.flow[::2, ::2], 2 * flow)
    assert doubled.valid.sum() == 36
    one_and_a_half = resize_sparse(full, (9, 9))
    assert np.nonzero(one_and_a_half.valid[0])[0].tolist() == [0, 2, 3, 5, 6, 8]
    assert resize_sparse(full, (5, 5)).flow[0, :, 0].tolist() == [np.float32(x * 5 / 6) for x in (0, 1, 2, 4, 5)]
    halved = resize_sparse(full, (3, 3))
    assert halved.flow[1, 1].tolist() == [1, 1]  # of 1 -> 0.5 and 2 -> 1 the later; the place of 5 -> 2.5 is outside
    assert halved.flow[..., 0].tolist() == [[0, 1, 2]] * 3


def test_limit_flow_hides_what_is_too_large_or_unknown():
    sample = random_sample((1, 5))._replace(flow=np.float32([[[999, 0], [1000, 0], [0, -1000], [np.nan, 0], [1, 2]]]))
    limited = limit_flow(sample, 1000)
    assert limited.valid.tolist() == [[True, False, False, False, True]]
    assert limited.flow.tolist() == [[[999, 0], [0, 0], [0, 0], [0, 0], [1, 2]]]


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
        assert [array.dtype for array in augmented] == [np.uint8, np.uint8, np.float32, bool]
        assert all(array.flags.c_contiguous for array in augmented)


def test_bad_arguments_are_named():
    sample, rng = random_sample((24, 32)), np.random.default_rng(0)
    for augment in (augment_dense, augment_sparse):
        with pytest.raises(ValueError, match=r"crop_size.*\(0, 8\)"):
            augment(sample, rng, (0, 8), (0.0, 0.0))
        with pytest.raises(ValueError, match=r"zoom_range.*\(0.5, -0.5\)"):
            augment(sample, rng, (8, 8), (0.5, -0.5))
        with pytest.raises(ValueError, match="at least 1 px"):
            augment(random_sample((0, 32)), rng, (8, 8), (0.0, 0.0))
    for offset in [(-1, 0), (0, -1), (1, 0), (0, 1)]:
        with pytest.raises(ValueError, match="outside"):
            crop(sample, offset, (24, 32))


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


def test_flips_follow_the_recipe(monkeypatch):
    sample, calls = random_sample((4, 4)), []
    for name in ("flip_horizontal", "flip_vertical"):
        monkeypatch.setattr(augmentation, name, lambda sample, name=name: calls.append(name) or sample)

    def share(augment, **kwargs):
        calls.clear()
        for seed in range(1000):
            augment(sample, np.random.default_rng(seed), (2, 2), (0.0, 0.0), **kwargs)
        return [np.arange(1000) < calls.count(name) for name in ("flip_horizontal", "flip_vertical")]

    horizontal, vertical = share(augment_dense)
    assert_share(horizontal, 0.5)
    assert_share(vertical, 0.1)
    horizontal, vertical = share(augment_sparse)
    assert_share(horizontal, 0.5)
    assert not vertical.any()
    assert not np.any(share(augment_dense, flip=False)) and not np.any(share(augment_sparse, flip=False))


def test_erased_patches_follow_the_recipe():
    rng = np.random.default_rng(0)
    drawn = [draw_patches(rng, (30, 40)) for _ in range(DRAWS)]
    assert_share([len(patches) > 0 for patches in drawn], 0.5)
    assert_share([len(patches) == 2 for patches in drawn if patches], 0.5)
    patches = [patch for patches in drawn for patch in patches]
    for axis in (0, 1):
        assert {patch[axis].stop - patch[axis].start for patch in patches} == set(range(50, 100))
        assert {patch[axis].start for patch in patches} == set(range((30, 40)[axis]))


def test_erasing_touches_frame2_only_and_fills_its_mean(monkeypatch):
    sample = random_sample((20, 20))
    monkeypatch.setattr(augmentation, "draw_patches", lambda rng, size: [np.s_[2:5, 15:70]])
    erased = erase_patches(sample, np.random.default_rng(0))
    mean = sample.image2.reshape(-1, 3).mean(axis=0).astype(np.uint8)
    assert (erased.image2[2:5, 15:] == mean).all()
    erased.image2[2:5, 15:] = sample.image2[2:5, 15:]
    assert_same(erased, sample)


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


def test_frames_share_their_colors_except_in_a_fifth_of_the_cases():
    sample = random_sample((6, 6))
    sample, rng = sample._replace(image2=sample.image1), np.random.default_rng(0)
    alike = [np.array_equal(*jitter_colors(sample, rng, DENSE_JITTER, 0.2)[:2]) for _ in range(1000)]
    assert_share(np.logical_not(alike), 0.2)
    assert all(np.array_equal(*jitter_colors(sample, rng, DENSE_JITTER, 0.0)[:2]) for _ in range(100))


def test_shared_contrast_is_relative_to_the_mean_of_both_frames():
    grey = np.full((4, 4, 3), 100, np.uint8)
    sample = FlowSample(grey, grey + 100, np.zeros((4, 4, 2), np.float32), np.ones((4, 4), bool))
    jittered = jitter_colors(sample, np.random.default_rng(0), JitterRange(0.0, 0.5, 0.0, 0.0), 0.0)
    low, high = int(jittered.image1[0, 0, 0]), int(jittered.image2[0, 0, 0])
    assert abs(low + high - 300) <= 1 and (low, high) != (100, 200)


# ---- randomness ----


@pytest.mark.parametrize("augment", [augment_dense, augment_sparse])
def test_the_generator_alone_decides(augment):
    sample = random_sample((60, 80), density=0.5)
    before = FlowSample(*(array.copy() for array in sample))
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first, again, other = (augment(sample, np.random.default_rng(seed), (24, 32), (-0.5, 0.5)) for seed in (1, 1, 2))
    assert_same(first, again)
    assert not np.array_equal(first.image1, other.image1)
    assert_same(sample, before)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[2]
    np.testing.assert_array_equal(np.random.get_state()[1], states[1])


# ---- real data ----


@pytest.mark.skipif(not (DATA / "KITTI").is_dir(), reason="the sample data are not beside the project")
def test_kitti_ground_truth_is_only_moved_and_scaled(monkeypatch):
    flow, valid = read_flow(DATA / "KITTI/training/flow_occ/000010_10.png")
    frames = (cv2.imread(str(DATA / f"KITTI/training/image_2/000010_{frame}.png")) for frame in (10, 11))
    sample = FlowSample(*frames, flow, valid)
    for seed in range(4):
        size = draw_size_sparse(np.random.default_rng(seed), valid.shape, (288, 960), (-0.2, 0.4))
        monkeypatch.setattr(augmentation, "draw_size_sparse", lambda *_, size=size: size)
        augmented = augment_sparse(sample, np.random.default_rng(seed), (288, 960), (-0.2, 0.4), flip=False)
        scale = np.array([size[1] / valid.shape[1], size[0] / valid.shape[0]], np.float32)
        allowed = {tuple(vector) for vector in flow[valid] * scale}
        assert augmented.valid.sum() > 1000
        assert {tuple(vector) for vector in augmented.flow[augmented.valid]} <= allowed
