"""Synthetic pairs: the flow is exact, occlusion is what frame 2 hides, pairs are reproducible, every kind is drawn."""

import hashlib
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from flow_data.features import to_occlusion, to_sample
from flow_data.synthetic import SyntheticOptions, render_pair, synthetic
from flow_data.synthetic.appearance import Appearance, apply_appearance, draw_appearances, draw_shutter
from flow_data.synthetic.motion import (
    MAX_WAVE_STRAIN,
    STILL,
    TOLERANCE,
    Motion,
    draw_waves,
    exponential,
    match_displacement,
    project,
)
from flow_data.synthetic.rendering import box_flow, coverage, fill, find_flow, find_masks, find_occlusion, paint
from flow_data.synthetic.scenes import FASTEST, Layer, draw_ego_motion, draw_layered, flat_layer
from flow_data.synthetic.shapes import KINDS as SHAPE_KINDS
from flow_data.synthetic.shapes import draw_outline, subdivide
from flow_data.synthetic.textures import (
    KINDS,
    Pool,
    Texture,
    cut_pool,
    draw_leaf_radii,
    draw_noise,
    list_images,
    pool_image,
    pool_kind,
    read_image,
)

ROOT = Path(__file__).resolve().parents[1]
PLAIN = SyntheticOptions(image_size=(192, 256), displacement=(1.0, 15.0), appearance=0)  # nothing differs but motion
SMALL = SyntheticOptions(image_size=(96, 128), displacement=(1.0, 8.0))
POOL = Pool(seed=0, stream=1, size=64)  # the one of the validation split of seed 0, which most tests draw with


def render(options, index, seed=0):
    return render_pair(options, seed, index, "validation")


def cut(rng, size, kinds):
    return cut_pool(rng, POOL, size, kinds)


def plain_layer(color, *rings) -> Layer:
    return Layer(
        np.full((8, 8, 3), color, np.uint8), np.eye(3), [np.array(ring, float) for ring in rings], np.zeros(2)
    )


def square(left, top, side) -> list:
    return [(left, top), (left + side, top), (left + side, top + side), (left, top + side)]


def shift(x, y) -> Motion:
    return Motion(np.array([[1.0, 0, x], [0, 1, y], [0, 0, 1]]))


def mean_length(pair) -> float:
    return float(np.linalg.norm(pair.sample.flow.astype(np.float64), axis=-1).mean())


def fingerprint(pair) -> str:
    arrays = [*pair.sample[:4], pair.occlusion]
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()


def grid(flow) -> np.ndarray:
    """Where each pixel moves to, `(H, W, 2)` float32."""
    height, width = flow.shape[:2]
    return flow + np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).astype(np.float32)


def surely_visible(flow, occlusion) -> np.ndarray:
    """Pixels that frame 2 shows, with none around them that it does not, or that belongs to something else."""
    jump = sum(np.abs(np.diff(flow, axis=axis, append=np.take(flow, [-1], axis))).max(axis=-1) for axis in (0, 1))
    mixed = cv2.dilate((occlusion | (jump > 0.7)).view(np.uint8), np.ones((9, 9), np.uint8)).astype(bool)
    target, (height, width) = grid(flow), flow.shape[:2]
    return ~mixed & ((target >= 3) & (target <= (width - 4, height - 4))).all(axis=-1)


# ---- the ground truth ----


def smooth_cut(rng, size, kinds) -> Texture:
    """Texture without fine detail, so that sharpness, which a zoom changes, plays no part."""
    noise = cv2.GaussianBlur(rng.standard_normal((256, 256, 3), np.float32), (0, 0), 7.0)
    return Texture(np.clip(128 + 1500 * noise, 0, 255).astype(np.uint8), rng.uniform(0.4, 1.0), rng.uniform(0, 6))


@pytest.mark.parametrize(
    ("draw", "num_shapes", "nonrigid"),
    [(draw_layered, 6, 0.0), (draw_layered, 0, 1.0), (draw_layered, 6, 1.0), (draw_ego_motion, 0, 0.0)],
)
def test_frame2_warped_by_the_flow_is_frame1_to_a_fraction_of_a_pixel(draw, num_shapes, nonrigid):
    """What is left of the motion is estimated as Lucas and Kanade (1981) do, in blocks with texture."""
    size, left, differences = (192, 256), [], []
    for seed in range(12):
        scene = draw(np.random.default_rng(seed), size, num_shapes, smooth_cut, nonrigid)
        motions = scene.motions(min(0.7 * scene.max_scale, 9.0))
        masks1, masks2 = (find_masks(scene.layers, moved, size) for moved in (None, motions))
        flow = find_flow(masks1, motions)
        visible = surely_visible(flow, find_occlusion(flow, masks1.label, masks2.label))
        frame1, frame2 = (paint(scene.layers, masks, motions, masks is masks2) for masks in (masks1, masks2))
        warped = cv2.remap(frame2, grid(flow), None, cv2.INTER_LINEAR)
        gray1, gray2 = (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(float) for image in (frame1, warped))
        gradient = np.stack(np.gradient((gray1 + gray2) / 2)[::-1], axis=-1)
        for block in (np.s_[y : y + 48, x : x + 64] for y in range(0, 192, 48) for x in range(0, 256, 64)):
            slopes, rest = gradient[block][visible[block]], (gray1 - gray2)[block][visible[block]]
            detail = np.linalg.eigvalsh(slopes.T @ slopes)
            if len(rest) > 400 and 4 * len(rest) < detail[0] and detail[1] < 100 * len(rest):  # else far away
                left.append(np.linalg.norm(np.linalg.solve(slopes.T @ slopes, slopes.T @ rest)))
                differences.append(np.median(np.abs(rest)))
    assert len(left) > 25
    assert np.median(left) < 0.02 and np.quantile(left, 0.75) < 0.05 and np.median(differences) < 1


@pytest.mark.parametrize("draw", [draw_layered, draw_ego_motion])
def test_layers_show_their_texture_where_motion_brings_it(draw):
    """The fast ways to fill a layer against sampling the texture at every point's exact origin."""
    compared = 0
    for seed in range(6):
        scene = draw(np.random.default_rng(seed), (96, 128), 6, smooth_cut, 0.5)
        for layer, motion in zip(scene.layers, scene.motions(min(0.7 * scene.max_scale, 9.0)), strict=True):
            stack = [layer] if layer is scene.layers[0] else [scene.layers[0], layer]
            masks = find_masks(stack, [STILL, motion], (96, 128))
            places = grid(np.zeros((96, 128, 2)))
            exact = project(layer.to_texture, motion.backward(places))
            scale = np.linalg.norm(np.stack(np.gradient(exact, axis=(0, 1))), axis=-1).max(axis=0)
            sharp = (scale < 2) & (masks.label == len(stack) - 1)
            x, y = np.clip(exact, -2000, 2000).astype(np.float32).transpose(2, 0, 1)
            expected = cv2.remap(layer.window, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT).astype(float)
            found = fill(layer, motion, 0, 0, (96, 128))
            if sharp.any():
                compared += 1
                assert np.quantile(np.abs(found - expected)[sharp], 0.99) < 6
                assert np.abs(found - expected)[sharp].mean() < 1
    assert compared > 20


def test_nearer_shapes_hide_farther_ones_in_both_frames():
    far, near = plain_layer(100, square(10, 20, 20)), plain_layer(200, square(40, 20, 20))
    layers, motions = [plain_layer(0), far, near], [STILL, shift(20, 0), shift(-5, 0)]  # they meet in frame 2
    masks1, masks2 = find_masks(layers, None, (60, 80)), find_masks(layers, motions, (60, 80))
    frame1, frame2 = (paint(layers, masks, motions, second)[..., 0] for masks, second in ((masks1, 0), (masks2, 1)))
    assert frame1[30, 20] == 100 and frame1[30, 50] == 200 and frame1[5, 5] == 0
    assert frame2[30, 33] == 100 and (frame2[30, 37:54] == 200).all()  # both cover x = 37..49
    flow = find_flow(masks1, motions)
    assert flow[30, 20].tolist() == [20, 0] and flow[30, 50].tolist() == [-5, 0] and flow[5, 5].tolist() == [0, 0]

    occlusion, expected = find_occlusion(flow, masks1.label, masks2.label), np.zeros((60, 80), bool)
    expected[20:40, 15:30] = True  # the part of the far square that ends up at x = 35..49, behind the near one
    expected[20:40, 30:40] = True  # the background that the two squares move in front of, x = 30..39
    wrong = occlusion != expected
    assert wrong.mean() < 0.02  # edges lie in the middle of pixels
    assert not cv2.erode(wrong.astype(np.uint8), np.ones((2, 2), np.uint8)).any()


def test_what_leaves_the_frame_is_occluded():
    layers, motions = [plain_layer(0)], [shift(7, -3)]
    masks1, masks2 = find_masks(layers, None, (20, 30)), find_masks(layers, motions, (20, 30))
    expected = np.zeros((20, 30), bool)
    expected[:3], expected[:, -7:] = True, True
    flow = find_flow(masks1, motions)
    np.testing.assert_array_equal(find_occlusion(flow, masks1.label, masks2.label), expected)


@pytest.mark.slow
@pytest.mark.parametrize("draw", [draw_layered, draw_ego_motion])
def test_occlusion_is_where_something_nearer_lands(draw):
    """Frame 1 splatted into frame 2: where a pixel of a nearer layer lands on a pixel, it is occluded."""
    hidden = found = agreed = 0
    for seed in range(8):
        scene = draw(np.random.default_rng(seed), (120, 160), 10, cut, 0.3)
        motions = scene.motions(min(scene.max_scale, 8.0))
        masks1, masks2 = (find_masks(scene.layers, moved, (120, 160)) for moved in (None, motions))
        flow = find_flow(masks1, motions)
        occlusion = find_occlusion(flow, masks1.label, masks2.label)
        x, y = np.rint(grid(flow)).astype(int).reshape(-1, 2).T
        inside = (x >= 0) & (x < 160) & (y >= 0) & (y < 120)
        nearest = np.full((120, 160), -1)
        np.maximum.at(nearest, (y[inside], x[inside]), masks1.label.ravel()[inside].astype(int))
        behind = np.ones(len(x), bool)
        behind[inside] = nearest[y[inside], x[inside]] > masks1.label.ravel()[inside]
        behind = behind.reshape(120, 160)
        hidden += behind.sum()
        found += (behind & occlusion).sum()
        agreed += (behind == occlusion).mean() / 8
    assert hidden > 1000 and found / hidden > 0.93  # the rest are pixels at the very edge
    assert agreed > 0.9  # layers that come into view from outside hide things, too


def test_every_pixel_is_valid_and_has_the_flow_of_what_covers_most_of_it():
    layers, motions = [plain_layer(0), plain_layer(200, square(10.2, 10.2, 20))], [STILL, shift(3, 0)]
    masks = find_masks(layers, None, (50, 50))
    flow, frame = find_flow(masks, motions), paint(layers, masks, motions, second=False)
    np.testing.assert_array_equal(flow[..., 0] == 3, frame[..., 0] >= 100)
    sample = render(SMALL, 0).sample
    assert sample.valid.all() and np.isfinite(sample.flow).all()
    assert [array.dtype for array in sample[:4]] == [np.uint8, np.uint8, np.float32, bool]
    assert [array.shape for array in sample[:4]] == [(96, 128, 3), (96, 128, 3), (96, 128, 2), (96, 128)]


def test_flow_in_single_precision_is_that_of_exact_points():
    rng = np.random.default_rng(0)
    for draw in (draw_layered, draw_ego_motion):
        scene = draw(rng, (200, 300), 12, cut, 1.0)
        for motion in scene.motions(min(scene.max_scale, 12.0)):
            points = np.stack(np.meshgrid(np.arange(40, 260.0), np.arange(30, 170.0)), axis=-1)
            exact = motion.forward(points) - points
            near = np.linalg.norm(exact, axis=-1) < 300  # the far side of a plane that is not drawn there is anywhere
            assert np.abs(box_flow(motion, (30, 170, 40, 260)) - exact)[near].max() < 2e-3


# ---- motion ----


def test_deformations_can_be_inverted():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        waves = draw_waves(rng, wavelength=rng.uniform(24, 200), amplitude=rng.uniform(0, 50))
        assert waves.strain() <= MAX_WAVE_STRAIN + 1e-9
        points = rng.uniform(-50, 400, size=(500, 2))
        bent = points + waves.at(points)
        assert np.abs(waves.invert(bent) - points).max() < 2 * TOLERANCE
        step = 1e-4 * rng.normal(size=(500, 2))
        change = np.linalg.norm(waves.at(points + step) - waves.at(points), axis=1) / np.linalg.norm(step, axis=1)
        assert change.max() <= waves.strain() + 1e-6

        motion = Motion(np.array([[1.1, 0.1, 5], [-0.1, 0.9, 3], [1e-4, -1e-4, 1]]), waves)
        assert np.abs(motion.backward(motion.forward(points)) - points).max() < 3 * TOLERANCE


def test_exponential_of_a_turn_is_a_rotation():
    angles = np.linspace(-3, 3, 7)
    generators = np.zeros((7, 3, 3))
    generators[:, 0, 1], generators[:, 1, 0] = -angles, angles
    turned = exponential(generators)
    np.testing.assert_allclose(turned[:, 0, 0], np.cos(angles), atol=1e-9)
    np.testing.assert_allclose(turned[:, 1, 0], np.sin(angles), atol=1e-9)


def test_a_scale_is_found_for_any_displacement():
    for target in (0.1, 3.0, 80.0):
        scale = match_displacement(lambda s: np.hypot(2 * s, 0.3 * s**1.5), target, highest=1000.0)
        assert np.hypot(2 * scale, 0.3 * scale**1.5) == pytest.approx(target, rel=0.011)
    assert match_displacement(lambda s: min(s, 4.0), 9.0, highest=50.0) <= 50  # where limits are in the way


@pytest.mark.parametrize("ego_motion", [0, 1])
def test_mean_displacement_is_as_drawn(ego_motion):
    options = replace(SMALL, displacement=(5.0, 5.0), ego_motion=ego_motion)
    lengths = [mean_length(render(options, index)) for index in range(20)]
    assert np.median(lengths) == pytest.approx(5, rel=0.03) and max(lengths) < 5.5


@pytest.mark.slow
def test_mean_displacement_is_log_uniform():
    options = SyntheticOptions(image_size=(40, 40), displacement=(0.5, 4.0), shapes=(0, 1), appearance=0)
    logs = np.log2([mean_length(render(options, index)) / 0.5 for index in range(250)]) / 3
    assert logs.min() >= -0.1 and logs.max() <= 1.1
    for share in (0.25, 0.5, 0.75):
        assert abs((logs < share).mean() - share) < 4.5 * np.sqrt(share * (1 - share) / 250)


def test_displacements_have_a_heavy_tail_but_end():
    options = SyntheticOptions(image_size=(384, 512), displacement=(10.0, 10.0), appearance=0, ego_motion=0)
    longest = [np.linalg.norm(render(options, index).sample.flow, axis=-1).max() for index in range(12)]
    assert np.median(longest) > 40 and max(longest) > 80 and max(longest) < 2.5 * FASTEST * 640


def test_camera_and_planes_obey_epipolar_geometry():
    """Where nothing moves but the camera, all flow fits one fundamental matrix; that of flat layers does not."""
    fits = []
    for draw in (draw_ego_motion, draw_layered):
        residuals = []
        for seed in range(6):
            scene = draw(np.random.default_rng(seed), (120, 160), 0 if draw is draw_ego_motion else 12, cut, 0.0)
            motions = scene.motions(0.6 * min(scene.max_scale, 10.0))
            flow = find_flow(find_masks(scene.layers, None, (120, 160)), motions).astype(float)
            points = grid(np.zeros_like(flow)).reshape(-1, 2)[::7].astype(float)
            moved = grid(flow).reshape(-1, 2)[::7].astype(float)
            # the linear eight-point algorithm (Hartley 1997) with all points, in coordinates of about unit size
            (x, y), (u, v) = ((array - (80, 60)).T / 60 for array in (points, moved))
            equations = np.stack([u * x, u * y, u, v * x, v * y, v, x, y, np.ones_like(x)], axis=1)
            fundamental = np.linalg.svd(equations, full_matrices=False)[2][-1].reshape(3, 3)
            lines = np.stack([x, y, np.ones_like(x)], axis=1) @ fundamental.T
            distance = np.abs((lines * np.stack([u, v, np.ones_like(u)], axis=1)).sum(axis=1))
            residuals.append(60 * np.median(distance / np.hypot(lines[:, 0], lines[:, 1])))
        fits.append(np.median(residuals))
    assert fits[0] < 1e-3 < 0.03 < fits[1]


def test_walls_stay_on_the_ground():
    """The lower edge of a wall is on both planes, so that both must move it to the same place."""
    walls = 0
    for seed in range(12):
        scene = draw_ego_motion(np.random.default_rng(seed), (120, 160), 0, cut, 0.0)
        _, ground, *others = scene.motions(0.8 * scene.max_scale)
        for layer, motion in zip(scene.layers[2:], others, strict=True):
            walls += 1
            edge = layer.rings[0][0] + np.linspace(0, 1, 9)[:, None] * (layer.rings[0][1] - layer.rings[0][0])
            np.testing.assert_allclose(motion.forward(edge), ground.forward(edge), atol=1e-6)
    assert walls > 5


def test_only_rigid_backgrounds_move_by_a_homography():
    residuals = []
    for nonrigid in (0, 1):
        options = replace(PLAIN, shapes=(0, 0), nonrigid=nonrigid, ego_motion=0, displacement=(8.0, 8.0))
        flow = render(options, 3).sample.flow
        points, moved = grid(np.zeros_like(flow)).reshape(-1, 2), grid(flow).reshape(-1, 2)
        matrix, _ = cv2.findHomography(points[::11], moved[::11])
        residuals.append(np.abs(project(matrix, points.astype(float)) - moved).max())
    assert residuals[0] < 0.01 and residuals[1] > 0.3


# ---- shapes ----


@pytest.mark.parametrize("kind", SHAPE_KINDS)
def test_outlines_stay_within_their_radius_and_cover_something(kind):
    for seed in range(8):
        rings = draw_outline(np.random.default_rng(seed), 30.0, kind)
        assert max(np.linalg.norm(ring, axis=1).max() for ring in rings) == pytest.approx(30, rel=0.01)
        assert 8 < coverage([ring + 40 for ring in rings], (80, 80)).sum() < np.pi * 30**2 * 1.01


def test_every_kind_of_shape_is_drawn(monkeypatch):
    drawn = []
    for kind in SHAPE_KINDS:
        record = lambda rng, radius, kind=kind: drawn.append(kind) or [np.eye(3)[:, :2]]  # noqa: E731
        monkeypatch.setitem(sys.modules["flow_data.synthetic.shapes"].SHAPES, kind, record)
    rng = np.random.default_rng(0)
    for _ in range(400):
        draw_outline(rng, 20.0)
    assert set(drawn) == set(SHAPE_KINDS)


@pytest.mark.parametrize("kind_seed", range(4))
def test_coverage_is_the_area_of_the_polygon(kind_seed):
    (ring,) = draw_outline(np.random.default_rng(kind_seed), 40.0, "blob")
    cover = coverage([ring + 50], (100, 100))
    assert cover.min() == 0 and cover.max() == 1
    assert cover.sum() == pytest.approx(cv2.contourArea(ring.astype(np.float32)), rel=0.05)
    assert coverage([ring + 50, 0.5 * ring + 50], (100, 100)).sum() == pytest.approx(0.75 * cover.sum(), rel=0.02)


def test_subdivided_outlines_cover_the_same():
    rings = [ring + 40 for ring in draw_outline(np.random.default_rng(1), 35.0, "polygon")]
    finer = subdivide(rings)
    steps = np.linalg.norm(np.roll(finer[0], -1, axis=0) - finer[0], axis=1)
    assert steps.max() <= 3 + 1e-9 and len(finer[0]) > 5 * len(rings[0])
    difference = np.abs(coverage(finer, (80, 80)) - coverage(rings, (80, 80)))
    assert difference.max() <= 0.26 and difference.mean() < 3e-3  # a row of subpixels


# ---- textures ----


def test_sizes_of_leaves_follow_the_power_law():
    radii = draw_leaf_radii(np.random.default_rng(0), smallest=2.0, largest=200.0, coverage=40.0, area=512**2)
    assert radii.min() >= 2 and radii.max() <= 200 and len(radii) > 10000
    exponent = 1 + len(radii) / np.log(radii / 2).sum()  # maximum likelihood (Clauset et al. 2009)
    assert exponent == pytest.approx(3, abs=0.05)
    assert np.pi * (radii**2).sum() == pytest.approx(40 * 512**2, rel=0.15)


@pytest.mark.parametrize("slope", [0.8, 1.5])
def test_noise_falls_off_with_frequency(slope):
    image = draw_noise(np.random.default_rng(0), 256, slope).mean(axis=-1)
    power = np.abs(np.fft.fft2(image - image.mean())) ** 2
    frequency = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.fftfreq(256))
    bands = np.geomspace(2 / 256, 0.3, 12)
    means = [
        power[(frequency >= low) & (frequency < high)].mean() for low, high in zip(bands, bands[1:], strict=False)
    ]
    fitted = np.polyfit(np.log(np.sqrt(bands[:-1] * bands[1:])), np.log(means), 1)[0] / 2
    assert fitted == pytest.approx(-slope, abs=0.12)


def test_the_pool_has_every_kind_and_each_has_detail():
    assert {pool_kind(number) for number in range(POOL.size)} == {*KINDS, "collage"}
    for number in range(16):
        levels = pool_image(POOL, number)
        assert [level.shape for level in levels] == [(512, 512, 3), (256, 256, 3), (128, 128, 3)]
        assert levels[0].std() > 2 and levels[0].dtype == np.uint8
        assert abs(levels[0].mean() - levels[2].mean()) < 1
    assert not np.array_equal(pool_image(POOL, 0)[0], pool_image(Pool(0, 0, 64), 0)[0])  # of the training split
    assert not np.array_equal(pool_image(POOL, 0)[0], pool_image(Pool(1, 1, 64), 0)[0])  # of another seed


def test_windows_differ_in_brightness_contrast_and_scale():
    rng = np.random.default_rng(0)
    windows = [cut(rng, (60, 80), None) for _ in range(60)]
    brightness = [texture.window.mean() for texture in windows]
    assert np.quantile(brightness, 0.1) < 70 and np.quantile(brightness, 0.9) > 170
    scales = [texture.scale for texture in windows]
    assert min(scales) < 0.4 and max(scales) > 0.8 and max(scales) <= 1.1  # a larger one would alias
    assert all(min(texture.window.shape[:2]) >= 16 for texture in windows)


def test_receding_planes_do_not_flicker():
    """Checks that shrink below a pixel become gray instead of moire."""
    checks = (np.indices((256, 256)).sum(axis=0) // 4 % 2 * 255).astype(np.uint8)
    plane = np.array([[60.0, 0, -3000], [0, 0, 6000], [0, 1, -19.5]])  # depth falls as 1 / (y - 19.5)
    layer = Layer(cv2.merge([checks] * 3), plane, [], np.zeros(2))
    filled = fill(layer, STILL, 0, 20, (100, 100))[..., 0].astype(float)
    assert filled[:3].std() < 20 and filled[80:].std() > 70


def test_cartoons_have_outlines():
    for seed in range(60):
        scene = draw_layered(np.random.default_rng(seed), (96, 128), 4, cut, 0)
        if scene.layers[-1].stroke:
            break
    layers = [scene.layers[0], plain_layer(250, square(30, 30, 40))._replace(stroke=4.0, stroke_color=(7, 8, 9))]
    masks = find_masks(layers, None, (96, 128))
    frame = paint(layers, masks, [STILL, STILL], second=False)
    assert (frame[50, 29:32] == (7, 8, 9)).all() and (frame[50, 50] == 250).all()
    assert masks.label[50, 29] == 1  # the outer half of the line moves with its shape


def test_textures_come_from_the_folder(tmp_path):
    (tmp_path / "deep").mkdir()
    Image.new("RGB", (40, 30), (255, 0, 0)).save(tmp_path / "deep" / "red.PNG")
    for ego_motion in (0, 1):
        pair = render(replace(SMALL, textures=str(tmp_path), appearance=0, shapes=(0, 0), ego_motion=ego_motion), 0)
        for image in pair.sample[:2]:
            assert (image == (255, 0, 0)).all()
        assert mean_length(pair) > 0.9


def test_an_image_of_one_pixel_is_enlarged(tmp_path):
    Image.new("L", (1, 1), 77).save(tmp_path / "dot.bmp")
    pair = render(replace(SMALL, textures=str(tmp_path), appearance=0, shapes=(0, 0)), 0)
    assert (pair.sample.image1 == 77).all()


def test_images_are_found_in_natural_order(tmp_path):
    for name in ["frame10.jpg", "frame9.png", "a/frame2.tif", "b.webp", "note.txt", "._frame1.png", ".cache/a.png"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if not name.startswith(".") and not name.endswith("txt"):
            Image.new("RGB", (2, 2)).save(tmp_path / name)
        else:
            (tmp_path / name).write_text("no image")
    names = [str(Path(path).relative_to(tmp_path)) for path in list_images(str(tmp_path))]
    assert names == ["a/frame2.tif", "b.webp", "frame9.png", "frame10.jpg"]


def test_sixteen_bit_gray_is_not_clipped(tmp_path):
    cv2.imwrite(str(tmp_path / "deep.png"), np.full((4, 4), 30000, np.uint16))
    assert (read_image(str(tmp_path / "deep.png")) == 30000 >> 8).all()


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_32_bit_images_are_refused_by_name(tmp_path, dtype):
    Image.fromarray(np.ones((4, 4), dtype)).save(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match="deep.tif must have 8 or 16 bits; got 32"):
        read_image(str(tmp_path / "deep.tif"))


# ---- appearance ----


def test_appearance_leaves_flow_and_occlusion_as_they_are():
    for index in range(6):
        plain, changed = (render(replace(SMALL, appearance=strength), index) for strength in (0, 1))
        np.testing.assert_array_equal(plain.sample.flow, changed.sample.flow)
        np.testing.assert_array_equal(plain.occlusion, changed.occlusion)
        assert not np.array_equal(plain.sample.image2, changed.sample.image2)


def test_at_strength_0_nothing_is_changed():
    image = render(PLAIN, 0).sample.image1
    for seed in range(60):
        rng = np.random.default_rng(seed)
        assert draw_shutter(rng, 0) == 0
        for appearance in draw_appearances(rng, 0):
            np.testing.assert_array_equal(apply_appearance(image, appearance), image)


def test_most_pairs_keep_their_brightness_and_some_do_not():
    image = render(PLAIN, 0).sample.image1
    changes, effects = [], set()
    for seed in range(150):
        frames = draw_appearances(np.random.default_rng(seed), 1)
        looks = [cv2.blur(apply_appearance(image, frame), (9, 9)).astype(float) for frame in frames]
        changes.append(np.abs(looks[0] - looks[1]).mean())
        effects |= {name for name, value in frames[0]._asdict().items() if value is not None and np.any(value != 0)}
    assert np.median(changes) < 4 and np.quantile(changes, 0.95) > 10
    assert effects >= {"blur", "noise", "quality"} and len(effects) == 7


def test_noise_is_as_strong_as_drawn_and_changes_no_brightness():
    gray = np.full((100, 120, 3), 100, np.uint8)
    noisy = apply_appearance(gray, Appearance(noise=(6.0, 1234))).astype(float)
    assert noisy.mean() == pytest.approx(100, abs=0.2) and noisy.std() == pytest.approx(6, rel=0.02)
    other = apply_appearance(gray, Appearance(noise=(6.0, 99999))).astype(float)
    assert abs(np.corrcoef(noisy.ravel(), other.ravel())[0, 1]) < 0.02  # frames have noise of their own


def test_motion_blur_is_along_the_motion_and_as_long():
    layers, motions = [plain_layer(0), plain_layer(200, square(30, 30, 20))], [STILL, shift(16, 0)]
    for second, left in ((False, 30), (True, 46)):
        masks = find_masks(layers, motions if second else None, (80, 100))
        frame = paint(layers, masks, motions, second, shutter=0.5)[..., 0].astype(float)
        across, down = frame[40], frame[:, left + 10]
        assert down[28] == 0 and down[32] == 200 and down[52] == 0  # sharp above and below
        ramp = np.flatnonzero((across > 5) & (across < 195))
        assert 12 <= len(ramp) <= 18  # eight pixels at each side
        assert np.average(np.arange(100), weights=across) == pytest.approx(left + 10, abs=0.3)


# ---- reproducibility ----


@pytest.mark.slow
def test_other_seeds_indices_and_splits_give_other_pairs():
    keys = [
        (0, 0, "validation"),
        (0, 1, "validation"),
        (1, 0, "validation"),
        (0, 0, "training"),
        (2**40, 0, "training"),
    ]
    pairs = [render_pair(SMALL, *key) for key in keys]
    assert len({fingerprint(pair) for pair in pairs}) == len(pairs)
    pool_image.cache_clear()
    assert fingerprint(render_pair(SMALL, *keys[0])) == fingerprint(pairs[0])


@pytest.mark.slow
def test_a_pair_does_not_depend_on_those_drawn_before():
    program = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from test_synthetic import SMALL, fingerprint, render\n"
        "print(fingerprint(render(SMALL, 5)))"
    )
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, cwd=ROOT, check=True)
    assert result.stdout.decode().strip() == fingerprint(render(SMALL, 5))


@pytest.mark.slow
def test_a_pickled_dataset_gives_the_same_pairs_in_another_process():
    dataset = synthetic(SMALL, split="validation", seed=0, num_pairs=3)
    program = (
        "import hashlib, pickle, sys, numpy as np\n"
        "item = pickle.load(sys.stdin.buffer)[2]\n"
        "arrays = [item['image1'], item['image2'], item['flow']['flow'], item['flow']['valid']]\n"
        "arrays.append(np.asarray(item['occlusion']) != 0)\n"
        "print(hashlib.sha256(b''.join(np.asarray(array).tobytes() for array in arrays)).hexdigest())"
    )
    command = [sys.executable, "-W", "ignore", "-c", program]
    result = subprocess.run(command, input=pickle.dumps(dataset), capture_output=True, cwd=ROOT, check=True)
    assert result.stdout.decode().strip() == fingerprint(render(SMALL, 2))


def test_dataset_items_are_drawn_on_access():
    dataset = synthetic(SMALL, split="validation", num_pairs=1000)
    assert len(dataset) == 1000
    item, expected = dataset[12], render(SMALL, 12)
    assert set(item) == {"id", "image1", "image2", "flow", "occlusion"} and item["id"] == "validation/000012"
    assert isinstance(item["image1"], Image.Image) and item["image1"].size == (128, 96)
    for array, wanted in zip(to_sample(item), expected.sample, strict=True):
        np.testing.assert_array_equal(array, wanted)
    np.testing.assert_array_equal(to_occlusion(item), expected.occlusion)
    assert 0 < expected.occlusion.mean() < 0.5
    assert dataset.select([12])[0]["id"] == "validation/000012"
    assert list(dataset.select_columns("id")["id"])[999] == "validation/000999"


@pytest.mark.slow
def test_splits_share_no_pair():
    items = [synthetic(SMALL, split=split, seed=0, num_pairs=3)[:3] for split in ("training", "validation")]
    frames = [image.tobytes() for item in items for image in item["image1"]]
    assert len(set(frames)) == 6


# ---- extremes and errors ----


@pytest.mark.parametrize(
    "extreme",
    [
        {"image_size": (32, 32), "shapes": (60, 60), "nonrigid": 1.0},
        {"image_size": (32, 200), "displacement": (300.0, 300.0)},
        {"image_size": (200, 32), "displacement": (300.0, 300.0), "ego_motion": 1.0, "nonrigid": 1.0},
        {"image_size": (33, 47), "displacement": (1e-3, 1e-3), "ego_motion": 1.0},
        {"shapes": (0, 0), "ego_motion": 1.0},
        {"shapes": (0, 0), "ego_motion": 0.0, "appearance": 0.5},
    ],
)
def test_extremes_are_drawn(extreme):
    options = replace(SMALL, **extreme)
    for index in range(8):
        sample = render(options, index).sample
        assert sample.image1.shape == (*options.image_size, 3) and np.isfinite(sample.flow).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_size": (16, 512)},
        {"image_size": (64,)},
        {"image_size": (64.5, 64)},
        {"displacement": (0.0, 2.0)},
        {"displacement": (1.0, float("inf"))},
        {"displacement": 2.0},
        {"displacement": (3.0, 2.0)},
        {"shapes": (5, 4)},
        {"shapes": (-1, 4)},
        {"shapes": (1.5, 4)},
        {"appearance": 1.5},
        {"nonrigid": -0.1},
        {"ego_motion": float("nan")},
    ],
)
def test_bad_options_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SyntheticOptions(**wrong)


def test_bad_folders_images_and_splits_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, message in [("missing", "is not a folder"), ("empty", "no image in")]:
        with pytest.raises(ValueError, match=rf"{message}.*|{folder}.*\.png"):
            synthetic(SyntheticOptions(textures=str(tmp_path / folder)))
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match="cut.png"):
        render_pair(SyntheticOptions(textures=str(tmp_path)), 0, 0)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:4000])
    with pytest.raises(ValueError, match="cut.png"):
        render_pair(SyntheticOptions(textures=str(tmp_path)), 0, 0)
    with pytest.raises(ValueError, match="training.*'test'"):
        synthetic(SMALL, split="test")
    for wrong in ({"seed": -1}, {"num_pairs": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be at least 0; got -1"):
            synthetic(SMALL, **wrong)


def test_a_window_lies_in_the_middle_of_its_shape():
    window = np.zeros((40, 60, 3), np.uint8)
    layer = flat_layer(Texture(window, 0.5, 0.3), np.array([70.0, 20.0]), [])
    np.testing.assert_allclose(project(layer.to_texture, np.array([70.0, 20.0])), (30, 20))
