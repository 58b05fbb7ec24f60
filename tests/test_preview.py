"""Statistics of a source against closed forms, and the contact sheet."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from flow_data.datasets import load_source
from flow_data.flow_io import write_flow
from flow_data.preview import CELL_HEIGHT, DRAWS, main, measure, spread

SIZES = [(48, 64), (48, 64), (40, 72)]


@pytest.fixture
def root(tmp_path) -> Path:
    """Three pairs; pixel n of pair p moves by ((p + 1) * n % 100, 0), and a quarter of the first is unknown."""
    for number, (height, width) in enumerate(SIZES):
        for frame in (1, 2):
            PIL.Image.new("RGB", (width, height), (60, 90, 40 * number)).save(tmp_path / f"{number}_img{frame}.png")
        flow = np.zeros((height, width, 2), np.float32)
        flow[..., 0] = ((number + 1) * np.arange(height * width) % 100).reshape(height, width)
        valid = np.ones((height, width), bool)
        valid[: height // 4] = number > 0
        write_flow(tmp_path / f"{number}_flow.flo", flow, valid)
    return tmp_path


def test_figures_are_those_of_all_known_pixels(root):
    rows = load_source("pairs", root)
    statistics = measure(rows, [0, 1, 2])
    flows = [row["flow"]["flow"][row["flow"]["valid"]] for row in rows]
    flow = np.concatenate(flows).astype(np.float64)
    speed = np.linalg.norm(flow, axis=-1)
    assert statistics.num_pairs == 3 and dict(statistics.sizes) == {(48, 64): 2, (40, 72): 1}
    assert statistics.share_valid == pytest.approx(len(speed) / sum(h * w for h, w in SIZES))
    assert statistics.mean_flow == pytest.approx(tuple(flow.mean(axis=0)))
    assert statistics.mean_speed == pytest.approx(speed.mean()) and statistics.max_speed == speed.max()
    assert statistics.median_speed == pytest.approx(np.median(speed), rel=0.04)
    assert statistics.high_speed == pytest.approx(np.quantile(speed, 0.95), rel=0.04)


def test_unknown_flow_gives_no_figures(tmp_path, capsys):
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "a_img1.png")
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "a_img2.png")
    write_flow(tmp_path / "a_flow.flo", np.zeros((8, 8, 2), np.float32), np.zeros((8, 8), bool))
    statistics = measure(load_source("pairs", tmp_path), [0])
    assert statistics.share_valid == 0 and statistics.max_speed == 0 and statistics.mean_speed == 0
    main(["pairs", "--data_dir", str(tmp_path), "--output", str(tmp_path / "a.png"), "--crop_size", "8", "8"])
    printed = capsys.readouterr().out
    assert "  speed         -\n  mean flow     -\n" in printed and "0.0 %: no pixel has valid ground truth" in printed


@pytest.mark.parametrize(("length", "wanted", "expected"), [(10, 4, [0, 3, 6, 9]), (3, 5, [0, 1, 2]), (9, 1, [0])])
def test_pairs_are_taken_evenly(length, wanted, expected):
    assert spread(length, wanted) == expected


def test_prints_statistics_and_draws_a_sheet(root, tmp_path, capsys):
    sheet = tmp_path / "sheets" / "a.png"
    main(["pairs", "--data_dir", str(root), "--output", str(sheet), "--crop_size", "32", "40", "--num_pairs", "2"])
    printed = capsys.readouterr().out
    assert "pairs, split training: 3 pairs; statistics of all of them" in printed
    assert "48 x 64 (2), 40 x 72 (1)" in printed and "max 99.00" in printed and "valid         91.5 %" in printed
    image = np.array(PIL.Image.open(sheet))
    cell_widths = [round(64 * CELL_HEIGHT / 48)] * 3 + [CELL_HEIGHT * 40 // 32] * 3 * DRAWS
    assert image.shape[0] == 2 * CELL_HEIGHT + 4
    assert image.shape[1] >= sum(cell_widths) + 4 * (len(cell_widths) - 1)
    first_frame = image[30:CELL_HEIGHT, : cell_widths[0]]
    assert (first_frame == (60, 90, 0)).all()  # before augmentation, as it is


def test_statistics_of_a_part_say_so(root, tmp_path, capsys):
    main(["pairs", "--data_dir", str(root), "--output", str(tmp_path / "a.png"), "--max_pairs", "2"])
    assert "3 pairs; statistics of 2 of them" in capsys.readouterr().out


def test_synthetic_pairs_are_drawn_with_the_options_of_training(tmp_path, capsys):
    flags = "--synthetic_image_size 64 80 --synthetic_displacement 3 3 --synthetic_shapes 0 2 --synthetic_nonrigid 0"
    sizes = "--crop_size 48 64 --max_pairs 5 --num_pairs 1"
    main(["synthetic", *flags.split(), *sizes.split(), "--output", str(tmp_path / "a.png")])
    printed = capsys.readouterr().out
    assert "64 x 80 (5)" in printed and "mean 3.0" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sintel_claen"], "did you mean 'sintel_clean'"),
        (["sintel_clean"], "--data_dir is missing"),
        (["pairs", "--data_dir", "x", "--split", "trainig"], "split must be one of"),
        (["pairs", "--data_dir", "x", "--num_pairs", "0"], "--num_pairs must be at least 1"),
        (["pairs", "--data_dir", "x"], "pairs: no pairs"),
        (["synthetic", "--zoom_range", "1", "0", "--max_pairs", "1", "--num_pairs", "1"], "zoom_range"),
        (["synthetic", "--synthetic_ego_motion", "2"], "ego_motion must be between 0 and 1; got 2.0"),
        (
            ["pairs", "--data_dir", "x", "--synthetic_shapes", "1", "2"],
            "--synthetic_shapes is for the source synthetic",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert message in f"{error.value}{capsys.readouterr().err}"
