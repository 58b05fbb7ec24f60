"""Synthetic pairs: the flow is the truth, pairs are reproducible, textures come from where the user says."""

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

from flow_data.synthetic import (
    MAX_STRAIN,
    Layer,
    SyntheticOptions,
    affine_field,
    coverage,
    draw_contour,
    draw_layers,
    draw_motions,
    render,
    render_pair,
    synthetic,
)
from flow_data.synthetic_textures import list_pictures, read_picture

ROOT = Path(__file__).resolve().parents[1]
SMALL = SyntheticOptions(image_size=(96, 128), displacement=(1.0, 8.0))


def plain_layer(color, contour=None) -> Layer:
    contour = np.empty((0, 2)) if contour is None else np.array(contour, float)
    return Layer(np.full((8, 8, 3), color, np.uint8), np.eye(3), np.zeros(2), contour)


def square(left, top, side) -> list:
    return [(left, top), (left + side, top), (left + side, top + side), (left, top + side)]


def shifts(*vectors) -> np.ndarray:
    motions = np.tile(np.eye(3), (len(vectors), 1, 1))
    motions[:, :2, 2] = vectors
    return motions


def mean_length(sample) -> float:
    return float(np.linalg.norm(sample.flow.astype(np.float64), axis=-1)[sample.valid].mean())


def fingerprint(sample) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in sample)).hexdigest()


# ---- the truth ----


@pytest.mark.parametrize("seed", range(6))
def test_frame2_warped_by_the_flow_is_frame1_where_nothing_hides(seed):
    rng, options = np.random.default_rng(seed), SyntheticOptions(image_size=(192, 256), displacement=(2.0, 15.0))
    layers = draw_layers(rng, options)
    frame1 = render(layers, shifts(*np.zeros((len(layers), 2))), options.image_size)
    motions, flow = draw_motions(rng, layers, frame1, target=10.0)
    frame2 = render(layers, motions, options.image_size)

    x, y = np.meshgrid(np.arange(256), np.arange(192))
    target = (np.stack([x, y], axis=-1) + flow).astype(np.float32)
    warped = cv2.remap(frame2.image, target, None, cv2.INTER_CUBIC)
    around = np.ones((5, 5), np.uint8)  # visible where frame 2 shows one layer all around, and the right one
    alone = (cv2.dilate(frame2.layer, around) == cv2.erode(frame2.layer, around)) & cv2.erode(
        frame2.pure.view(np.uint8), around
    ).astype(bool)
    column, row = np.rint(target).astype(int).reshape(-1, 2).T
    inside = ((target >= 2) & (target <= (253, 189))).all(axis=-1)
    row, column = row.reshape(x.shape).clip(0, 191), column.reshape(x.shape).clip(0, 255)
    visible = inside & frame1.pure & alone[row, column] & (frame2.layer[row, column] == frame1.layer)
    error = np.abs(warped.astype(float) - frame1.image)[visible]
    assert visible.mean() > 0.3
    assert error.mean() < 1.5 and np.percentile(error, 99.9) < 12


def test_nearer_shapes_hide_farther_ones_in_both_frames():
    far, near = plain_layer(100, square(10, 20, 20)), plain_layer(200, square(40, 20, 20))
    layers, motions = [plain_layer(0), far, near], shifts((0, 0), (20, 0), (-5, 0))  # they meet in frame 2
    frame1 = render(layers, shifts((0, 0), (0, 0), (0, 0)), (60, 80))
    frame2 = render(layers, motions, (60, 80))
    assert frame1.image[30, 20, 0] == 100 and frame1.image[30, 50, 0] == 200 and frame1.image[5, 5, 0] == 0
    assert frame2.image[30, 33, 0] == 100 and (frame2.image[30, 37:54, 0] == 200).all()  # both cover x = 37..49
    flow = affine_field(frame1.layer, motions - np.eye(3))
    assert flow[30, 20].tolist() == [20, 0] and flow[30, 50].tolist() == [-5, 0] and flow[5, 5].tolist() == [0, 0]


def test_only_edges_are_not_valid():
    angles = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    circle = 40 + 20 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    frame = render([plain_layer(0), plain_layer(200, circle)], shifts((0, 0), (0, 0)), (80, 80))
    mixed = (frame.image[..., 0] > 0) & (frame.image[..., 0] < 200)
    y, x = np.mgrid[:80, :80]
    from_edge = abs(np.hypot(x - 40, y - 40) - 20)
    np.testing.assert_array_equal(frame.pure, ~mixed)
    assert (from_edge[~frame.pure] < 1).all() and not frame.pure[from_edge < 0.2].any()
    assert render_pair(replace(SMALL, shapes=(0, 0)), 0, 0).valid.all()


def test_a_frame_of_nothing_but_edges_is_still_drawn():
    assert not render_pair(SyntheticOptions(image_size=(32, 32), shapes=(3000, 3000)), 0, 0).valid.all()


def test_flow_is_zero_where_not_valid():
    sample = render_pair(SMALL, 0, 1)
    assert 0.7 < sample.valid.mean() < 1 and not sample.flow[~sample.valid].any()
    assert [array.dtype for array in sample] == [np.uint8, np.uint8, np.float32, bool]
    assert [array.shape for array in sample] == [(96, 128, 3), (96, 128, 3), (96, 128, 2), (96, 128)]


@pytest.mark.parametrize("kind_seed", range(6))
def test_coverage_is_the_area_of_the_polygon(kind_seed):
    contour = 50 + draw_contour(np.random.default_rng(kind_seed), radius=40)
    assert np.linalg.norm(contour - 50, axis=1).max() <= 40 + 1e-9
    cover = coverage(contour, (100, 100))
    assert cover.min() == 0 and cover.max() == 1
    assert cover.sum() == pytest.approx(cv2.contourArea(contour.astype(np.float32)), rel=0.05)


# ---- motion ----


@pytest.mark.parametrize("index", range(5))
def test_mean_displacement_is_exactly_as_drawn(index):
    assert mean_length(render_pair(replace(SMALL, displacement=(7.0, 7.0)), 0, index)) == pytest.approx(7, rel=1e-5)


def test_mean_displacement_is_log_uniform():
    options = SyntheticOptions(image_size=(32, 32), displacement=(1.0, 16.0), shapes=(0, 1))
    logs = np.log2([mean_length(render_pair(options, 0, index)) for index in range(400)]) / 4
    assert logs.min() >= -1e-5 and logs.max() <= 1 + 1e-5
    for share in (0.25, 0.5, 0.75):
        assert abs((logs < share).mean() - share) < 4.5 * np.sqrt(share * (1 - share) / 400)


@pytest.mark.parametrize("target", [0.1, 8.0, 60.0])
def test_motions_can_be_inverted_however_far_they_go(target):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        layers = draw_layers(rng, SMALL)
        frame1 = render(layers, shifts(*np.zeros((len(layers), 2))), SMALL.image_size)
        motions, flow = draw_motions(rng, layers, frame1, target)
        strain = np.linalg.norm(motions[:, :2, :2] - np.eye(2), ord=2, axis=(1, 2))
        assert strain.max() <= MAX_STRAIN + 1e-9 and (np.linalg.det(motions) > 0).all()
        np.testing.assert_allclose(flow, affine_field(frame1.layer, motions - np.eye(3)), atol=1e-9)


def test_shapes_move_against_the_background():
    sample = render_pair(replace(SMALL, displacement=(6.0, 6.0)), 0, 3)
    deviation = np.linalg.norm(sample.flow - np.median(sample.flow[sample.valid], axis=0), axis=-1)[sample.valid]
    assert np.percentile(deviation, 90) > 2


# ---- appearance ----


def test_frames_are_textured_everywhere_and_equally_sharp():
    for index in range(4):
        sample = render_pair(SyntheticOptions(image_size=(192, 256)), 0, index)
        grey1, grey2 = (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32) for image in sample[:2])
        deviation = np.sqrt(np.maximum(cv2.blur(grey1**2, (9, 9)) - cv2.blur(grey1, (9, 9)) ** 2, 0))
        assert np.percentile(deviation, 2) > 2
        sharpness = [np.median(np.abs(cv2.Laplacian(grey, cv2.CV_32F))) for grey in (grey1, grey2)]
        assert sharpness[1] == pytest.approx(sharpness[0], rel=0.25)


def test_textures_come_from_the_folder(tmp_path):
    (tmp_path / "deep").mkdir()
    Image.new("RGB", (40, 30), (255, 0, 0)).save(tmp_path / "deep" / "red.PNG")
    sample = render_pair(replace(SMALL, textures=str(tmp_path)), 0, 0)
    for image in sample[:2]:
        assert (image == (255, 0, 0)).all()
    assert mean_length(sample) > 0.9


def test_a_picture_of_one_pixel_is_enlarged(tmp_path):
    Image.new("L", (1, 1), 77).save(tmp_path / "dot.bmp")
    assert (render_pair(replace(SMALL, textures=str(tmp_path)), 0, 0).image1 == 77).all()


def test_pictures_are_found_in_natural_order(tmp_path):
    for name in ["frame10.jpg", "frame9.png", "a/frame2.tif", "b.webp", "note.txt", "._frame1.png"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if not name.startswith(".") and not name.endswith("txt"):
            Image.new("RGB", (2, 2)).save(tmp_path / name)
        else:
            (tmp_path / name).write_text("no picture")
    names = [str(Path(path).relative_to(tmp_path)) for path in list_pictures(str(tmp_path))]
    assert names == ["a/frame2.tif", "b.webp", "frame9.png", "frame10.jpg"]


def test_sixteen_bit_grey_is_not_clipped(tmp_path):
    cv2.imwrite(str(tmp_path / "deep.png"), np.full((4, 4), 30000, np.uint16))
    assert (read_picture(str(tmp_path / "deep.png")) == 30000 >> 8).all()


# ---- reproducibility ----


def test_other_seeds_indices_and_splits_give_other_pairs():
    pairs = [render_pair(SMALL, *key) for key in [(0, 0), (0, 1), (1, 0), (1, 1), (0, 0, "validation"), (2**40, 0)]]
    assert len({fingerprint(pair) for pair in pairs}) == len(pairs)
    assert fingerprint(render_pair(SMALL, 0, 0)) == fingerprint(pairs[0])


def test_a_pickled_dataset_gives_the_same_pairs_in_another_process():
    dataset = synthetic(SMALL, split="validation", seed=5, num_pairs=3)
    program = (
        "import hashlib, pickle, sys, numpy as np\n"
        "item = pickle.load(sys.stdin.buffer)[2]\n"
        "arrays = [item['image1'], item['image2'], item['flow']['flow'], item['flow']['valid']]\n"
        "print(hashlib.sha256(b''.join(np.asarray(array).tobytes() for array in arrays)).hexdigest())"
    )
    command = [sys.executable, "-W", "ignore", "-c", program]
    result = subprocess.run(command, input=pickle.dumps(dataset), capture_output=True, cwd=ROOT, check=True)
    assert result.stdout.decode().strip() == fingerprint(render_pair(SMALL, 5, 2, "validation"))


def test_dataset_items_are_drawn_on_access():
    dataset = synthetic(SMALL, seed=1, num_pairs=1000)
    assert len(dataset) == 1000
    item, expected = dataset[12], render_pair(SMALL, 1, 12)
    assert set(item) == {"id", "image1", "image2", "flow"} and item["id"] == "training/000012"
    assert isinstance(item["image1"], Image.Image) and item["image1"].size == (128, 96)
    drawn = [item["image1"], item["image2"], item["flow"]["flow"], item["flow"]["valid"]]
    for array, truth in zip(drawn, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(array), truth)
    assert dataset.select([12])[0]["id"] == "training/000012"
    assert list(dataset.select_columns("id")["id"])[999] == "training/000999"


def test_splits_share_no_pair():
    items = [synthetic(SMALL, split=split, seed=0, num_pairs=3)[:3] for split in ("training", "validation")]
    pictures = [image.tobytes() for item in items for image in item["image1"]]
    assert len(set(pictures)) == 6


# ---- errors ----


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_size": (16, 512)},
        {"displacement": (0.0, 2.0)},
        {"displacement": (3.0, 2.0)},
        {"shapes": (5, 4)},
        {"shapes": (-1, 4)},
    ],
)
def test_bad_options_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SyntheticOptions(**wrong)


def test_bad_folders_pictures_and_splits_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, message in [("missing", "is not a folder"), ("empty", "no picture in")]:
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
