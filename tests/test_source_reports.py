"""What the readers of the published data sets report of trees that are damaged, incomplete, or absent."""

import logging
import os
import re
from functools import partial

import pytest
from source_trees import MAKERS, make_chairs, make_kitti, make_middlebury, make_sintel, make_spring, write_mark

from flow_data import readers
from flow_data.datasets import DATASETS, load_source


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("there", [True, False])
def test_nothing_found_is_an_error(tmp_path, name, there):
    root = tmp_path / "elsewhere"
    if there:
        root.mkdir()
    for split in DATASETS[name].splits:
        if name == "flying_chairs" and split != "all":
            continue  # it misses its split file first
        message = r"no pairs: there must be .*\.(flo5?|pfm|png|npy).*elsewhere"
        with pytest.raises(FileNotFoundError, match=message) as error:
            load_source(name, root, split)
        (looked_in,) = re.findall(r"looked in (.*), which", str(error.value))
        assert ("holds no such file" if os.path.isdir(looked_in) else "does not exist") in str(error.value)
        assert there or not os.path.isdir(looked_in)


@pytest.mark.parametrize("name", MAKERS)
def test_the_folder_above_is_an_error(tmp_path, name):
    MAKERS[name](tmp_path / DATASETS[name].folder)
    with pytest.raises(FileNotFoundError, match=rf"no pairs: there must be .*looked in {tmp_path}"):
        load_source(name, tmp_path, "all")


def test_flows_without_any_frame_are_an_error(tmp_path):
    write_mark(tmp_path / "training/flow/alley_1/frame_0001.flo", 1)
    with pytest.raises(
        FileNotFoundError, match="no complete pair; left out 1 flows without images: alley_1/frame_0001"
    ):
        load_source("sintel_clean", tmp_path)


NO_FRAME, NO_IMAGES, NO_FLOW = "pairs for a missing frame", "flows without images", "image pairs without flow"
FUTURE, PAST = "TRAIN/A/0000/into_future/left/", "TRAIN/A/0000/into_past/left/"
FLOWS = "optical_flow/TRAIN/A/0000"
FRAMES = "frames_cleanpass/TRAIN/A/0000/left"
SCENE = "alley_1/frame_"
OCEAN = "ocean/Easy/P000"
REPORTS = {
    "flying_chairs": [
        (["data/00003_img1.ppm"], {NO_FRAME: ["00003"]}),
        (["data/00003_img2.ppm"], {NO_FRAME: ["00003"]}),
        (["data/00003_img1.ppm", "data/00003_img2.ppm"], {NO_IMAGES: ["00003"]}),
        (["data/00003_flow.flo"], {NO_FLOW: ["00003"]}),
    ],
    "flying_things_clean": [
        ([f"{FRAMES}/0006.png"], {NO_FRAME: [f"{FUTURE}0006", f"{PAST}0007"]}),
        ([f"{FRAMES}/0008.png"], {NO_FRAME: [f"{FUTURE}0007", f"{PAST}0008"]}),
        (
            [f"{FRAMES}/0006.png", f"{FRAMES}/0007.png"],
            {NO_FRAME: [f"{FUTURE}0007", f"{PAST}0008"], NO_IMAGES: [f"{FUTURE}0006", f"{PAST}0007"]},
        ),
        ([f"{FLOWS}/into_future/left/OpticalFlowIntoFuture_0007_L.pfm"], {NO_FLOW: [f"{FUTURE}0007"]}),
        ([f"{FLOWS}/into_past/left/OpticalFlowIntoPast_0007_L.pfm"], {NO_FLOW: [f"{PAST}0007"]}),
        ([f"{FLOWS}/into_future/left/OpticalFlowIntoFuture_0008_L.pfm"], {}),  # cannot be used
        ([f"{FLOWS}/into_past/left/OpticalFlowIntoPast_0006_L.pfm"], {}),
    ],
    "sintel_clean": [
        (["training/clean/alley_1/frame_0001.png"], {NO_FRAME: [f"{SCENE}0001"]}),
        (["training/clean/alley_1/frame_0003.png"], {NO_FRAME: [f"{SCENE}0002"]}),
        (
            ["training/clean/alley_1/frame_0001.png", "training/clean/alley_1/frame_0002.png"],
            {NO_FRAME: [f"{SCENE}0002"], NO_IMAGES: [f"{SCENE}0001"]},
        ),
        (["training/flow/alley_1/frame_0001.flo"], {NO_FLOW: [f"{SCENE}0001"]}),
        (["training/flow/alley_1/frame_0002.flo"], {NO_FLOW: [f"{SCENE}0002"]}),
        (["training/occlusions/alley_1/frame_0001.png"], {}),
    ],
    "kitti_2012": [
        (["training/image_0/000007_10.png"], {NO_FRAME: ["000007"]}),
        (["training/image_0/000007_11.png"], {NO_FRAME: ["000007"]}),
        (["training/image_0/000007_10.png", "training/image_0/000007_11.png"], {NO_IMAGES: ["000007"]}),
        (["training/flow_occ/000007_10.png"], {NO_FLOW: ["000007"]}),
    ],
    "kitti_2015": [
        (["training/image_2/000007_10.png"], {NO_FRAME: ["000007"]}),
        (["training/image_2/000007_11.png"], {NO_FRAME: ["000007"]}),
        (["training/image_2/000007_10.png", "training/image_2/000007_11.png"], {NO_IMAGES: ["000007"]}),
        (["training/flow_occ/000007_10.png"], {NO_FLOW: ["000007"]}),
    ],
    "hd1k": [
        (["hd1k_input/image_2/000003_0009.png"], {NO_FRAME: ["000003_0009"]}),
        (["hd1k_input/image_2/000003_0010.png"], {NO_FRAME: ["000003_0009", "000003_0010"]}),
        (
            ["hd1k_input/image_2/000003_0009.png", "hd1k_input/image_2/000003_0010.png"],
            {NO_FRAME: ["000003_0010"], NO_IMAGES: ["000003_0009"]},
        ),
        (["hd1k_flow_gt/flow_occ/000003_0010.png"], {NO_FLOW: ["000003_0010"]}),
        (["hd1k_flow_gt/flow_occ/000003_0011.png"], {}),  # cannot be used
    ],
    "middlebury": [
        (["other-data/Venus/frame10.png"], {NO_FRAME: ["Venus"]}),
        (["other-data/Venus/frame11.png"], {NO_FRAME: ["Venus"]}),
        (["other-data/Venus/frame10.png", "other-data/Venus/frame11.png"], {NO_IMAGES: ["Venus"]}),
        (["other-gt-flow/Venus/flow10.flo"], {NO_FLOW: ["Venus"]}),
    ],
    "spring": [
        (["train/0001/frame_left/frame_left_0001.png"], {NO_FRAME: ["0001/BW_left/0002", "0001/FW_left/0001"]}),
        (["train/0001/frame_left/frame_left_0003.png"], {NO_FRAME: ["0001/BW_left/0003", "0001/FW_left/0002"]}),
        (
            ["train/0001/frame_right/frame_right_0001.png", "train/0001/frame_right/frame_right_0002.png"],
            {
                NO_FRAME: ["0001/BW_right/0003", "0001/FW_right/0002"],
                NO_IMAGES: ["0001/BW_right/0002", "0001/FW_right/0001"],
            },
        ),
        (["train/0001/flow_FW_left/flow_FW_left_0002.flo5"], {NO_FLOW: ["0001/FW_left/0002"]}),
        (["train/0001/flow_BW_left/flow_BW_left_0003.flo5"], {NO_FLOW: ["0001/BW_left/0003"]}),
        (
            ["train/0001/flow_BW_left/flow_BW_left_0002.flo5", "train/0001/flow_BW_left/flow_BW_left_0003.flo5"],
            {},  # a download of its own
        ),
    ],
    "tartanair": [
        ([f"{OCEAN}/image_left/000000_left.png"], {NO_FRAME: [f"{OCEAN}/000000"]}),
        ([f"{OCEAN}/image_left/000002_left.png"], {NO_FRAME: [f"{OCEAN}/000001"]}),
        (
            [f"{OCEAN}/image_left/000000_left.png", f"{OCEAN}/image_left/000001_left.png"],
            {NO_FRAME: [f"{OCEAN}/000001"], NO_IMAGES: [f"{OCEAN}/000000"]},
        ),
        ([f"{OCEAN}/flow/000000_000001_flow.npy"], {NO_FLOW: [f"{OCEAN}/000000"]}),
        ([f"{OCEAN}/flow/000000_000001_mask.npy"], {}),
    ],
}


def test_every_reader_is_tested_on_damaged_trees():
    tested = {function_of(name) for name in REPORTS}
    missing = [name for name in MAKERS if function_of(name) not in tested]
    assert not missing, f"add to REPORTS what is reported where files of {', '.join(missing)} are absent"


def function_of(name: str):
    """The reader of a data set; the render passes of one have a reader in common."""
    reader = DATASETS[name].reader
    return reader.func if isinstance(reader, partial) else reader


@pytest.mark.parametrize(
    ("name", "deleted", "expected"), [(name, *case) for name, cases in REPORTS.items() for case in cases]
)
def test_what_is_missing_is_reported_once(tmp_path, caplog, name, deleted, expected):
    MAKERS[name](tmp_path)
    before = list(load_source(name, tmp_path, "all")["id"])
    caplog.clear()
    for path in deleted:
        (tmp_path / path).unlink()
    after = list(load_source(name, tmp_path, "all")["id"])
    messages = {record.getMessage() for record in caplog.records if "left out" in record.getMessage()}
    assert messages == {f"{name}: left out {len(ids)} {what}: {', '.join(ids)}" for what, ids in expected.items()}
    gone = {id for ids in expected.values() for id in ids} | (set(before) - set(after) if not expected else set())
    assert after == [id for id in before if id not in gone]


def test_three_are_named_and_all_counted(tmp_path, caplog):
    make_chairs(tmp_path, range(1, 8))
    for number in (2, 3, 5, 7):
        (tmp_path / f"data/{number:05d}_flow.flo").unlink()
    assert len(load_source("flying_chairs", tmp_path, "all")) == 3
    assert "left out 4 image pairs without flow: 00002, 00003, 00005, ...\n" in caplog.text


@pytest.mark.parametrize("scene", sorted(readers.MIDDLEBURY_WITHOUT_GROUND_TRUTH))
def test_middlebury_withholds_some_ground_truth(tmp_path, caplog, scene):
    make_middlebury(tmp_path)
    (tmp_path / "other-data/RubberWhale").rename(tmp_path / f"other-data/{scene}2")
    (tmp_path / "other-data/Beanbags").rename(tmp_path / f"other-data/{scene}")
    load_source("middlebury", tmp_path)
    assert [record.getMessage() for record in caplog.records if "left out" in record.getMessage()] == [
        "middlebury: left out 1 flows without images: RubberWhale",
        f"middlebury: left out 1 image pairs without flow: {scene}2",
    ]


def test_a_gap_in_the_test_frames_is_reported(tmp_path, caplog):
    make_sintel(tmp_path)
    (tmp_path / "test/clean/alley_1/frame_0002.png").unlink()
    assert list(load_source("sintel_clean", tmp_path, "test")["id"]) == ["market_2/frame_0009", "market_2/frame_0010"]
    assert "left out 2 pairs for a missing frame: alley_1/frame_0001, alley_1/frame_0002" in caplog.text
    make_spring(tmp_path)
    (tmp_path / "test/0003/frame_left/frame_left_0002.png").unlink()
    assert len(load_source("spring", tmp_path, "test")) == 4
    assert "left out 4 pairs for a missing frame: 0003/BW_left/0002, 0003/BW_left/0003, 0003/FW_left" in caplog.text
    make_kitti(tmp_path)
    (tmp_path / "testing/image_2/000007_11.png").unlink()
    (tmp_path / "testing/image_2/000010_10.png").unlink()
    assert list(load_source("kitti_2015", tmp_path, "testing")["id"]) == ["000000"]
    assert "left out 2 pairs for a missing frame: 000007, 000010" in caplog.text


def test_folders_are_listed_and_files_not_asked_for(tmp_path, monkeypatch):
    asked: list[str] = []

    def recording(function):
        def record(path, *args, **options):
            asked.append(os.fspath(path) if isinstance(path, str | os.PathLike) else "")
            return function(path, *args, **options)

        return record

    for name, make in MAKERS.items():
        make(tmp_path / name)
    for function in ("stat", "lstat", "listdir", "scandir"):
        monkeypatch.setattr(os, function, recording(getattr(os, function)))
    for name in MAKERS:
        load_source(name, tmp_path / name, "all")
    assert len(asked) > len(MAKERS)
    assert not [path for path in asked if path.endswith((".png", ".flo", ".flo5", ".pfm", ".npy", ".ppm"))]
    assert all(asked.count(path) <= 2 * 2 for path in set(asked) if str(tmp_path) in path)


@pytest.mark.parametrize("name", MAKERS)
def test_an_incomplete_download_is_reported_once(tmp_path, caplog, name):
    MAKERS[name](tmp_path)
    for split, complete in DATASETS[name].splits.items():
        if complete is None:
            continue
        caplog.clear()
        found = len(load_source(name, tmp_path, split))
        load_source(name, str(tmp_path), split)
        assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
            (
                logging.WARNING,
                f"{name}: {found} pairs in split {split}, the complete data set has {complete} ({tmp_path})",
            )
        ]
