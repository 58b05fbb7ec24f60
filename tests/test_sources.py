"""Readers of the published data sets, on tiny trees in their layouts with their real encodings."""

import logging
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from flow_data.features import FLOW_FEATURES, to_sample
from flow_data.flow_io import write_flow
from flow_data.sources import SOURCES, SPARSE_SOURCES, load_source

SIZE = 3, 4  # h, w
LOGGER = "flow_data.sources"
SEQUENCE = "TRAIN/A/0000"


def write_frame(path: Path, mark: int) -> None:
    """A frame of one grey value, by which it is known again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", SIZE[::-1], (mark, mark, mark)).save(path)


def write_mark(path: Path, mark: int) -> None:
    """A flow of one value, likewise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_flow(path, np.full((*SIZE, 2), mark, np.float32))


def make_chairs(root: Path, numbers=(1, 2, 3, 10)) -> None:
    for number in numbers:
        write_frame(root / f"data/{number:05d}_img1.ppm", number)
        write_frame(root / f"data/{number:05d}_img2.ppm", number + 100)
        write_mark(root / f"data/{number:05d}_flow.flo", number)
    (root / "FlyingChairs_train_val.txt").write_text("1\n2\n1\n" + "2\n" * 6 + "1\n")


def make_things(root: Path) -> None:
    """Frames 6 to 8 of three sequences, marks 6 to 8, in the final pass 106 to 108; backward flow is negative."""
    for sequence in ("TRAIN/A/0000", "TRAIN/C/0010", "TEST/B/0001"):
        for number in (6, 7, 8):
            write_frame(root / f"frames_cleanpass/{sequence}/left/{number:04d}.png", number)
            write_frame(root / f"frames_finalpass/{sequence}/left/{number:04d}.png", number + 100)
            write_frame(root / f"frames_cleanpass/{sequence}/right/{number:04d}.png", 200)
            flow = root / "optical_flow" / sequence
            for side, mark in (("left", number), ("right", 200)):
                letter = side[0].upper()
                write_mark(flow / f"into_future/{side}/OpticalFlowIntoFuture_{number:04d}_{letter}.pfm", mark)
                write_mark(flow / f"into_past/{side}/OpticalFlowIntoPast_{number:04d}_{letter}.pfm", -mark)


def make_sintel(root: Path) -> None:
    for scene, start in (("alley_1", 1), ("market_2", 9)):
        for number in range(start, start + 3):
            name = f"{scene}/frame_{number:04d}"
            for part in ("training", "test"):
                write_frame(root / part / f"clean/{name}.png", number)
                write_frame(root / part / f"final/{name}.png", number + 100)
            if number < start + 2:
                write_mark(root / f"training/flow/{name}.flo", number)


def make_kitti(root: Path) -> None:
    for number in (0, 7, 10):
        for part in ("training", "testing"):
            for frame in (10, 11):
                write_frame(root / part / f"image_2/{number:06d}_{frame}.png", number + frame)
        write_mark(root / f"training/flow_occ/{number:06d}_10.png", number)
        write_mark(root / f"training/flow_noc/{number:06d}_10.png", 200)


def make_hd1k(root: Path) -> None:
    for sequence in (0, 3):
        for number in (9, 10, 11):
            name = f"{sequence:06d}_{number:04d}.png"
            write_frame(root / f"hd1k_input/image_2/{name}", number + sequence)
            write_mark(root / f"hd1k_flow_gt/flow_occ/{name}", number + sequence)


def make_middlebury(root: Path) -> None:
    for mark, scene in enumerate(("RubberWhale", "Venus"), start=1):
        for number in (9, 10, 11):  # some scenes have eight frames
            write_frame(root / f"other-data/{scene}/frame{number:02d}.png", number * mark)
        write_mark(root / f"other-gt-flow/{scene}/flow10.flo", mark)
    write_frame(root / "other-data/Beanbags/frame10.png", 0)  # no public ground truth


MAKERS = {
    "flying_chairs": make_chairs,
    "flying_things_clean": make_things,
    "flying_things_final": make_things,
    "sintel_clean": make_sintel,
    "sintel_final": make_sintel,
    "kitti_2015": make_kitti,
    "hd1k": make_hd1k,
    "middlebury": make_middlebury,
}


def marks(dataset) -> dict[str, tuple]:
    """id -> the marks of frame 1, frame 2 and the flow (None without ground truth)."""
    return {
        row["id"]: (
            row["image1"].getpixel((0, 0))[0],
            row["image2"].getpixel((0, 0))[0],
            None if row["flow"] is None else float(row["flow"]["flow"][0, 0, 0]),
        )
        for row in dataset
    }


THINGS = {
    "TRAIN/A/0000/into_future/0006": (6, 7, 6),
    "TRAIN/A/0000/into_future/0007": (7, 8, 7),
    "TRAIN/A/0000/into_past/0007": (7, 6, -7),
    "TRAIN/A/0000/into_past/0008": (8, 7, -8),
    "TRAIN/C/0010/into_future/0006": (6, 7, 6),
    "TRAIN/C/0010/into_future/0007": (7, 8, 7),
    "TRAIN/C/0010/into_past/0007": (7, 6, -7),
    "TRAIN/C/0010/into_past/0008": (8, 7, -8),
}
THINGS_TEST = {name.replace("TRAIN/A/0000", "TEST/B/0001"): THINGS[name] for name in list(THINGS)[:4]}
THINGS_FINAL = {name: (first + 100, second + 100, flow) for name, (first, second, flow) in THINGS.items()}
SINTEL = {
    "alley_1/frame_0001": (1, 2, 1),
    "alley_1/frame_0002": (2, 3, 2),
    "market_2/frame_0009": (9, 10, 9),
    "market_2/frame_0010": (10, 11, 10),
}
KITTI = {"000000": (10, 11, 0), "000007": (17, 18, 7), "000010": (20, 21, 10)}
HD1K = {
    "000000_0009": (9, 10, 9),
    "000000_0010": (10, 11, 10),
    "000003_0009": (12, 13, 12),
    "000003_0010": (13, 14, 13),
}
MIDDLEBURY = {"RubberWhale": (10, 11, 1), "Venus": (20, 22, 2)}


def without_flow(pairs: dict[str, tuple]) -> dict[str, tuple]:
    return {name: (first, second, None) for name, (first, second, _) in pairs.items()}


@pytest.mark.parametrize(
    ("name", "split", "expected"),
    [
        ("flying_chairs", "training", {"00001": (1, 101, 1), "00003": (3, 103, 3), "00010": (10, 110, 10)}),
        ("flying_chairs", "validation", {"00002": (2, 102, 2)}),
        ("flying_chairs", "all", {f"{n:05d}": (n, n + 100, n) for n in (1, 2, 3, 10)}),
        ("flying_things_clean", "training", THINGS),
        ("flying_things_final", "training", THINGS_FINAL),
        ("flying_things_clean", "test", THINGS_TEST),
        ("flying_things_clean", "all", THINGS_TEST | THINGS),
        ("sintel_clean", "training", SINTEL),
        ("sintel_clean", "all", SINTEL),
        ("sintel_final", "training", {name: (a + 100, b + 100, flow) for name, (a, b, flow) in SINTEL.items()}),
        ("sintel_clean", "test", without_flow(SINTEL)),
        ("kitti_2015", "training", KITTI),
        ("kitti_2015", "all", KITTI),
        ("kitti_2015", "testing", without_flow(KITTI)),
        ("hd1k", "training", HD1K),
        ("hd1k", "all", HD1K),
        ("middlebury", "training", MIDDLEBURY),
        ("middlebury", "all", MIDDLEBURY),
    ],
)
def test_pairs(tmp_path, caplog, name, split, expected):
    MAKERS[name](tmp_path)
    dataset = load_source(name, tmp_path, split)
    assert dataset.features == FLOW_FEATURES
    assert marks(dataset) == expected
    assert list(dataset["id"]) == list(expected)
    assert "left out" not in caplog.text  # what has no second frame by design is not missing


@pytest.mark.parametrize("name", MAKERS)
def test_every_source_is_complete(tmp_path, name):
    spec = SOURCES[name]
    MAKERS[name](tmp_path / spec.folder)
    default = load_source(name, str(tmp_path / spec.folder))
    assert spec.training_split in spec.splits and "all" in spec.splits and set(spec.complete) <= set(spec.splits)
    assert marks(default) == marks(load_source(name, tmp_path / spec.folder, spec.training_split))
    sample = to_sample(default[0])
    assert sample.image1.shape == (*SIZE, 3) and sample.valid.all()


def test_sparse_sources_are_those_with_png_flow():
    assert SPARSE_SOURCES & set(MAKERS) == {"kitti_2015", "hd1k"}
    assert "kitti_2012" in SPARSE_SOURCES


def test_order_is_natural(tmp_path):
    for number in (2, 10, 9):
        for frame in (number, number + 1):
            write_frame(tmp_path / f"training/clean/cave_{number}/frame_{frame:04d}.png", frame)
        write_mark(tmp_path / f"training/flow/cave_{number}/frame_{number:04d}.flo", number)
    expected = ["cave_2/frame_0002", "cave_9/frame_0009", "cave_10/frame_0010"]
    assert list(load_source("sintel_clean", tmp_path)["id"]) == expected


def test_other_files_are_ignored(tmp_path):
    make_sintel(tmp_path)
    (tmp_path / "training/flow/alley_1/._frame_0001.flo").write_bytes(b"")  # what macOS leaves on foreign disks
    (tmp_path / "training/flow/.DS_Store").write_bytes(b"")
    (tmp_path / "training/clean/alley_1/frame_0001.jpg").write_bytes(b"")
    assert marks(load_source("sintel_clean", tmp_path)) == SINTEL


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("there", [True, False])
def test_nothing_found_is_an_error(tmp_path, name, there):
    root = tmp_path / "elsewhere"
    if there:
        root.mkdir()
    with pytest.raises(FileNotFoundError, match=r"no pairs: expected .*\.(flo|pfm|png).*elsewhere") as error:
        load_source(name, root, "all")
    assert "does not exist" in str(error.value)


def test_flows_without_any_frame_are_an_error(tmp_path):
    write_mark(tmp_path / "training/flow/alley_1/frame_0001.flo", 1)
    with pytest.raises(FileNotFoundError, match="without their frames: alley_1/frame_0001"):
        load_source("sintel_clean", tmp_path)


@pytest.mark.parametrize(
    ("name", "frame", "missing"),
    [
        ("flying_chairs", "data/00003_img2.ppm", ["00003"]),
        (
            "flying_things_clean",
            f"frames_cleanpass/{SEQUENCE}/left/0006.png",
            [f"{SEQUENCE}/into_future/0006", f"{SEQUENCE}/into_past/0007"],
        ),
        (
            "flying_things_clean",
            f"frames_cleanpass/{SEQUENCE}/left/0008.png",
            [f"{SEQUENCE}/into_future/0007", f"{SEQUENCE}/into_past/0008"],
        ),
        ("sintel_clean", "training/clean/alley_1/frame_0003.png", ["alley_1/frame_0002"]),
        ("kitti_2015", "training/image_2/000007_11.png", ["000007"]),
        ("hd1k", "hd1k_input/image_2/000003_0010.png", ["000003_0009", "000003_0010"]),
        ("middlebury", "other-data/Venus/frame11.png", ["Venus"]),
    ],
)
def test_missing_frames_are_told_once(tmp_path, caplog, name, frame, missing):
    MAKERS[name](tmp_path)
    (tmp_path / frame).unlink()
    ids = set(load_source(name, tmp_path, "all")["id"])
    messages = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(messages) == 1 and f"left out {len(missing)} pairs" in messages[0]
    assert all(id in messages[0] and id not in ids for id in missing)


def test_a_gap_in_the_test_frames_is_told(tmp_path, caplog):
    make_sintel(tmp_path)
    (tmp_path / "test/clean/alley_1/frame_0002.png").unlink()
    assert list(load_source("sintel_clean", tmp_path, "test")["id"]) == ["market_2/frame_0009", "market_2/frame_0010"]
    assert "left out 1 pairs without their frames: alley_1/frame_0001" in caplog.text


@pytest.mark.parametrize("name", MAKERS)
def test_an_incomplete_download_is_told(tmp_path, caplog, name):
    MAKERS[name](tmp_path)
    found = len(load_source(name, tmp_path))
    complete = SOURCES[name].complete["training"]
    warnings = [record for record in caplog.records if record.name == LOGGER and record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert f" {found} pairs" in caplog.text and f" {complete} (" in caplog.text


def test_complete_counts_are_the_published_ones():
    counts = {name: SOURCES[name].complete["training"] for name in MAKERS}
    mix = 100 * (counts["sintel_clean"] + counts["sintel_final"]) + 200 * counts["kitti_2015"] + 5 * counts["hd1k"]
    assert mix + counts["flying_things_clean"] == 293737  # RAFT's "C+T+K+S+H"
    assert counts["flying_chairs"] + SOURCES["flying_chairs"].complete["validation"] == 22872


def test_chairs_split_file(tmp_path, caplog):
    make_chairs(tmp_path)
    split_file = tmp_path / "FlyingChairs_train_val.txt"
    split_file.write_bytes(b"1\r\n2\r\n1\r\n\r\n")  # Windows line ends, an empty line at the end; nothing on pair 10
    assert list(load_source("flying_chairs", tmp_path)["id"]) == ["00001", "00003"]
    assert "beyond the split file's 3 lines: 00010" in caplog.text
    for text, line in (("1\n3\n1\n", 2), ("1\n\n1\n", 2), ("1\n2\n1 2\n", 3), ("", 1)):
        split_file.write_text(text)
        with pytest.raises(ValueError, match=rf"FlyingChairs_train_val\.txt, line {line}"):
            load_source("flying_chairs", tmp_path)
    split_file.unlink()
    with pytest.raises(FileNotFoundError, match=r"FlyingChairs_train_val\.txt; split 'all' needs none") as error:
        load_source("flying_chairs", tmp_path, "validation")
    assert str(split_file) in str(error.value)
    assert len(load_source("flying_chairs", tmp_path, "all")) == 4


def test_records_outlive_a_change_of_folder(tmp_path, monkeypatch):
    make_middlebury(tmp_path / "Middlebury")
    monkeypatch.chdir(tmp_path)
    dataset = load_source("middlebury", "Middlebury")
    monkeypatch.chdir(tmp_path.parent)
    assert marks(dataset) == MIDDLEBURY


def test_unknown_names(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'sintel_clean'") as error:
        load_source("sintel_claen", tmp_path)
    assert all(name in str(error.value) for name in SOURCES)
    with pytest.raises(ValueError, match="kitti_2015: expected a split of training, testing, all, received 'test'"):
        load_source("kitti_2015", tmp_path, "test")
    with pytest.raises(ValueError, match="sintel_clean: expected a split"):
        SOURCES["sintel_clean"].load(tmp_path, "trainig")
    with pytest.raises(ValueError, match="unknown source 'sintel_albedo'"):
        SOURCES["sintel_clean"].load.func(tmp_path, "training", render_pass="albedo")


def test_real_samples_read(sample_data):
    ids = {
        "flying_chairs": ["00001", "00002", "00003", "30001", "30002", "30003"],
        "sintel_clean": ["alley_1/frame_0001", "alley_1/frame_0002", "alley_1/frame_0003", "cave_2/frame_0002"],
        "sintel_final": ["alley_1/frame_0001", "alley_1/frame_0002", "alley_1/frame_0003", "cave_2/frame_0002"],
        "kitti_2015": ["000010"],
        "middlebury": ["Grove2", "RubberWhale", "Urban2", "Venus"],
    }
    mean_speed = {}
    for name, expected in ids.items():
        dataset = load_source(name, sample_data / SOURCES[name].folder, "all")
        assert list(dataset["id"]) == expected
        for row in dataset:
            sample = to_sample(row)
            assert sample.image1.shape == sample.image2.shape == (*sample.flow.shape[:2], 3)
            mean_speed[f"{name} {row['id']}"] = np.linalg.norm(sample.flow[sample.valid], axis=-1).mean()
    # The error of zero flow, as the original code's readers give it.
    published = {
        "sintel_clean cave_2/frame_0002": 15.124,
        "flying_chairs 00001": 4.306,
        "middlebury RubberWhale": 1.256,
        "kitti_2015 000010": 9.028,
    }
    for pair, speed in published.items():
        assert mean_speed[pair] == pytest.approx(speed, abs=6e-4)
