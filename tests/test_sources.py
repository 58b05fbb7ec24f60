"""Readers of the published data sets, on tiny trees in their layouts with their real encodings."""

from dataclasses import MISSING, fields, replace

import cv2
import numpy as np
import pytest
from datasets import Image
from source_trees import (
    MAKERS,
    SIZE,
    make_chairs,
    make_kitti,
    make_middlebury,
    make_sintel,
    make_spring,
    make_tartanair,
    make_things,
    marks,
    write_frame,
    write_mark,
)

from flow_data import readers
from flow_data.datasets import DATASETS, DatasetRecord, index_records, is_sparse, load_source
from flow_data.features import FLOW_FEATURES, OpticalFlow, ValidMask, to_sample

SEQUENCE = "TRAIN/A/0000"


def things_of(part: str, camera: str, raised: int) -> dict[str, tuple]:
    """The pairs of a sequence whose marks are raised by so much."""
    return {
        f"{part}/into_future/{camera}/0006": (6 + raised, 7 + raised, 6 + raised % 100),
        f"{part}/into_future/{camera}/0007": (7 + raised, 8 + raised, 7 + raised % 100),
        f"{part}/into_past/{camera}/0007": (7 + raised, 6 + raised, -7 - raised % 100),
        f"{part}/into_past/{camera}/0008": (8 + raised, 7 + raised, -8 - raised % 100),
    }


def by_id(pairs: dict[str, tuple]) -> dict[str, tuple]:
    return dict(sorted(pairs.items()))


THINGS = things_of("TRAIN/A/0000", "left", 0) | things_of("TRAIN/C/0010", "left", 0)
THINGS_FINAL = things_of("TRAIN/A/0000", "left", 100) | things_of("TRAIN/C/0010", "left", 100)
THINGS_TEST = things_of("TEST/B/0001", "left", 0)
THINGS_RIGHT = things_of("TRAIN/A/0000", "right", 20) | things_of("TRAIN/C/0010", "right", 20)
THINGS_ALL = by_id(THINGS | THINGS_TEST | THINGS_RIGHT | things_of("TEST/B/0001", "right", 20))
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


def spring_of(scene: str, camera: str, raised: int) -> dict[str, tuple]:
    """The pairs of a camera whose marks are raised by so much."""
    return {
        f"{scene}/FW_{camera}/0001": (1 + raised, 2 + raised, 1 + raised),
        f"{scene}/FW_{camera}/0002": (2 + raised, 3 + raised, 2 + raised),
        f"{scene}/BW_{camera}/0002": (2 + raised, 1 + raised, -2 - raised),
        f"{scene}/BW_{camera}/0003": (3 + raised, 2 + raised, -3 - raised),
    }


SPRING = by_id(
    spring_of("0001", "left", 0)
    | spring_of("0001", "right", 20)
    | spring_of("0012", "left", 11)
    | spring_of("0012", "right", 31)
)
SPRING_TEST = by_id(spring_of("0003", "left", 2) | spring_of("0003", "right", 22))
TARTANAIR = {
    "ocean/Easy/P000/000000": (0, 1, 0),
    "ocean/Easy/P000/000001": (1, 2, 1),
    "ocean/Hard/P011/000000": (10, 11, 10),
    "ocean/Hard/P011/000001": (11, 12, 11),
    "office/Easy/P001/000000": (20, 21, 20),
    "office/Easy/P001/000001": (21, 22, 21),
}


SINTEL_MASKS = {"occlusion": Image(), "invalid": Image()}
FURTHER_FEATURES = {
    "sintel_clean": SINTEL_MASKS,
    "sintel_final": SINTEL_MASKS,
    "spring": {"flow": OpticalFlow(stride=2)},
    "tartanair": {"valid": ValidMask(zero_is_valid=True)},
}


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
        ("flying_things_clean", "all", THINGS_ALL),
        ("sintel_clean", "training", SINTEL),
        ("sintel_clean", "all", SINTEL),
        ("sintel_final", "training", {name: (a + 100, b + 100, flow) for name, (a, b, flow) in SINTEL.items()}),
        ("sintel_clean", "test", without_flow(SINTEL)),
        ("kitti_2012", "training", KITTI),
        ("kitti_2012", "all", KITTI),
        ("kitti_2012", "testing", without_flow(KITTI)),
        ("kitti_2015", "training", KITTI),
        ("kitti_2015", "all", KITTI),
        ("kitti_2015", "testing", without_flow(KITTI)),
        ("hd1k", "training", HD1K),
        ("hd1k", "all", HD1K),
        ("middlebury", "training", MIDDLEBURY),
        ("middlebury", "all", MIDDLEBURY),
        ("spring", "training", SPRING),
        ("spring", "all", SPRING),
        ("spring", "test", without_flow(SPRING_TEST)),
        ("tartanair", "training", TARTANAIR),
        ("tartanair", "all", TARTANAIR),
    ],
)
def test_pairs(tmp_path, caplog, name, split, expected):
    MAKERS[name](tmp_path)
    dataset = load_source(name, tmp_path, split)
    assert dataset.features == FLOW_FEATURES | FURTHER_FEATURES.get(name, {})
    assert marks(dataset) == expected
    assert list(dataset["id"]) == list(expected)
    assert "left out" not in caplog.text  # what has no second frame by design is not missing


@pytest.mark.parametrize("name", MAKERS)
def test_every_source_is_complete(tmp_path, name):
    spec = DATASETS[name]
    MAKERS[name](tmp_path / spec.folder)
    default = load_source(name, str(tmp_path / spec.folder))
    assert spec.training_split in spec.splits and "all" in spec.splits
    assert marks(default) == marks(load_source(name, tmp_path / spec.folder, spec.training_split))
    sample = to_sample(default[1])
    assert sample.image1.shape == (*SIZE, 3) and sample.valid.all()


@pytest.mark.parametrize("name", MAKERS)
def test_sparse_sources_are_those_with_png_flow(tmp_path, name):
    MAKERS[name](tmp_path)
    dataset = load_source(name, tmp_path)
    stored = dataset.cast_column("flow", OpticalFlow(decode=False))["flow"]
    png = all(flow["path"].endswith(".png") for flow in stored)
    assert is_sparse(name, dataset) == DATASETS[name].sparse == png


def test_cameras_of_things_can_be_chosen(tmp_path):
    make_things(tmp_path)
    assert marks(readers.flying_things(tmp_path, "training", cameras=["right"])) == THINGS_RIGHT
    assert marks(readers.flying_things(tmp_path, "training", cameras=["left", "right"])) == by_id(
        THINGS | THINGS_RIGHT
    )
    with pytest.raises(ValueError, match="camera must be one of left, right; got 'middle'"):
        readers.flying_things(tmp_path, "training", cameras=["middle"])


def test_frames_of_things_may_be_webp(tmp_path, caplog):
    make_things(tmp_path, "webp")
    assert marks(load_source("flying_things_clean", tmp_path)) == THINGS
    for path in tmp_path.glob(f"frames_cleanpass/{SEQUENCE}/left/*.webp"):
        write_frame(path.with_suffix(".png"), int(path.stem) + 50)
    expected = {
        name: (a + 50 * (SEQUENCE in name), b + 50 * (SEQUENCE in name), c) for name, (a, b, c) in THINGS.items()
    }
    assert marks(load_source("flying_things_clean", tmp_path)) == expected  # lossless is preferred
    assert "left out" not in caplog.text


def test_kitti_2012_in_color_only(tmp_path):
    make_kitti(tmp_path, "colored_0")
    assert marks(load_source("kitti_2012", tmp_path)) == KITTI
    assert marks(load_source("kitti_2012", tmp_path, "testing")) == without_flow(KITTI)


def test_spring_in_its_own_folder(tmp_path):
    make_spring(tmp_path / "spring")
    assert marks(load_source("spring", tmp_path)) == SPRING
    assert marks(load_source("spring", tmp_path, "test")) == without_flow(SPRING_TEST)


def test_sintel_masks(tmp_path):
    make_sintel(tmp_path)
    for name in ("sintel_clean", "sintel_final"):
        found = {
            row["id"]: tuple(
                None if row[column] is None else np.flatnonzero(np.array(row[column]) == 255).tolist()
                for column in ("occlusion", "invalid")
            )
            for row in load_source(name, tmp_path)
        }
        assert found == {
            "alley_1/frame_0001": ([1], [4]),
            "alley_1/frame_0002": ([2], [5]),
            "market_2/frame_0009": ([9], None),
            "market_2/frame_0010": ([10], None),
        }
    assert all(
        row["occlusion"] is row["invalid"] is row["valid"] is None for row in load_source(name, tmp_path, "test")
    )
    assert all(row["valid"] is None and to_sample(row).valid.all() for row in load_source(name, tmp_path))


def test_tartanair_masks(tmp_path):
    make_tartanair(tmp_path)
    for row in load_source("tartanair", tmp_path):
        sample = to_sample(row)
        if row["id"].endswith("000000"):  # the others have no mask
            np.testing.assert_array_equal(row["valid"][0], [True, False, False, False])
            assert row["valid"][1:].all()
            np.testing.assert_array_equal(sample.valid, row["valid"])
            assert (sample.flow[0, 1:] == 0).all()
        else:
            assert row["valid"] is None and sample.valid.all()


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


def test_complete_counts_are_the_published_ones():
    counts = {name: DATASETS[name].splits["training"] for name in MAKERS}
    mix = 100 * (counts["sintel_clean"] + counts["sintel_final"]) + 200 * counts["kitti_2015"] + 5 * counts["hd1k"]
    assert mix + counts["flying_things_clean"] == 293737  # RAFT's "C+T+K+S+H"
    assert counts["flying_chairs"] + DATASETS["flying_chairs"].splits["validation"] == 22872
    assert counts["sintel_final"] == 1064 - 23 and DATASETS["sintel_clean"].splits["test"] == 564 - 12
    assert counts["spring"] == (5000 - 37) * 4 and DATASETS["spring"].splits["test"] == (1000 - 10) * 4


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
    assert all(name in str(error.value) for name in DATASETS)
    with pytest.raises(ValueError, match="kitti_2015: split must be one of training, testing, all; got 'test'"):
        load_source("kitti_2015", tmp_path, "test")
    with pytest.raises(ValueError, match="sintel_clean: split must be one of"):
        DATASETS["sintel_clean"].reader(tmp_path, "trainig")
    with pytest.raises(ValueError, match="render_pass must be one of clean, final; got 'albedo'"):
        readers.sintel(tmp_path, "training", render_pass="albedo")


def test_records_are_checked_when_they_are_made():
    record = DATASETS["sintel_clean"]
    for changes, message in [
        ({"training_split": "train"}, "training_split must be one of training, test, all; got 'train'"),
        ({"protocol": replace(record.protocol, split="validation")}, "protocol.split must be one of"),
        (
            {"protocol": replace(record.protocol, padding="top")},
            "padding must be one of split, bottom, none; got 'top'",
        ),
        ({"protocol": replace(record.protocol, num_flow_updates=0)}, "num_flow_updates must be at least 1; got 0"),
        ({"submission": replace(record.submission, split="testing")}, "submission.split must be one of"),
        ({"license": replace(record.license, identifier="")}, "license.identifier must not be empty"),
    ]:
        with pytest.raises(ValueError, match=f"sintel_clean: .*{message}"):
            replace(record, **changes)
    with pytest.raises(ValueError, match="sintel_clean: there must be one record of a name"):
        index_records([record, record])
    with pytest.raises(ValueError, match="other_pass must name a data set with a server; got 'sintel_final'"):
        index_records([record])
    with pytest.raises(ValueError, match="other_pass must name a data set with a server; got 'sintel_final'"):
        index_records([record, replace(DATASETS["sintel_final"], submission=None)])
    complete = {field.name for field in fields(DatasetRecord) if field.default is MISSING}
    assert complete == {"name", "folder", "reader", "splits", "license", "protocol"}  # none can be forgotten
    assert all(name == record.name for name, record in DATASETS.items())


@pytest.mark.parametrize("name", DATASETS)
def test_splits_are_those_that_are_listed(tmp_path, name):
    listed = ", ".join(DATASETS[name].splits)
    with pytest.raises(ValueError, match=f"{name}: split must be one of {listed}; got 'trainig'"):
        DATASETS[name].reader(tmp_path, "trainig")


def test_real_samples_read(sample_data, caplog):
    ids = {
        "flying_chairs": ["00001", "00002", "00003", "30001", "30002", "30003"],
        "sintel_clean": ["alley_1/frame_0001", "alley_1/frame_0002", "alley_1/frame_0003", "cave_2/frame_0002"],
        "sintel_final": ["alley_1/frame_0001", "alley_1/frame_0002", "alley_1/frame_0003", "cave_2/frame_0002"],
        "kitti_2015": ["000010"],
        "middlebury": ["Grove2", "RubberWhale", "Urban2", "Venus"],
    }
    mean_speed = {}
    for name, expected in ids.items():
        dataset = load_source(name, sample_data / DATASETS[name].folder, "all")
        assert list(dataset["id"]) == expected
        for row in dataset:
            sample = to_sample(row)
            assert sample.image1.shape == sample.image2.shape == (*sample.flow.shape[:2], 3)
            mean_speed[f"{name} {row['id']}"] = np.linalg.norm(sample.flow[sample.valid], axis=-1).mean()
    assert "left out" not in caplog.text
    # The error of zero flow, as the original code's readers give it.
    expected_speed = {
        "sintel_clean cave_2/frame_0002": 15.124,
        "flying_chairs 00001": 4.306,
        "middlebury RubberWhale": 1.256,
        "kitti_2015 000010": 9.028,
    }
    for pair, speed in expected_speed.items():
        assert mean_speed[pair] == pytest.approx(speed, abs=6e-4)


@pytest.mark.parametrize("name", ["alley_1/frame_0002", "cave_2/frame_0002"])
def test_real_occlusions_are_what_the_second_frame_hides(sample_data, name):
    (row,) = load_source("sintel_clean", sample_data / "Sintel").filter([name].__contains__, input_columns="id")
    sample, occluded = to_sample(row), np.array(row["occlusion"]) == 255
    assert set(np.unique(row["occlusion"])) == set(np.unique(row["invalid"])) == {0, 255}
    places = np.indices(occluded.shape, np.float32)[::-1].transpose(1, 2, 0) + sample.flow
    found = cv2.remap(sample.image2, places, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    difference = np.abs(found.astype(int) - sample.image1).mean(axis=-1)
    assert difference[occluded].mean() > 4 * difference[~occluded].mean()
