"""The user's own pairs: tables of paths and folders, whole and damaged."""

import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flow_data.datasets import is_sparse, load_source
from flow_data.features import FLOW_FEATURES, to_sample
from flow_data.flow_io import write_flow

SIZE = 3, 4  # h, w


def write_pair(folder: Path, mark: int, names=("{}_img1.png", "{}_img2.png", "{}_flow.flo", "{}_valid.png")) -> None:
    """Frames of one gray value, mark and mark + 100, a flow of the mark, and a mask without the mark's pixel."""
    image1, image2, flow, valid = (folder / name.format(mark) for name in names)
    for path, value in ((image1, mark), (image2, mark + 100)):
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", SIZE[::-1], (value,) * 3).save(path)
    flow.parent.mkdir(exist_ok=True)
    write_flow(flow, np.full((*SIZE, 2), mark, np.float32))
    valid.parent.mkdir(exist_ok=True)
    mask = np.full(SIZE, 1, np.uint8)  # not 0 is valid, not 255 alone
    mask.flat[mark] = 0
    if valid.suffix == ".npy":
        np.save(valid, mask != 0)
    else:
        PIL.Image.fromarray(mask).save(valid)


def marks(dataset) -> dict[str, tuple]:
    """id -> the marks of frame 1, frame 2, the flow and the mask; None where there is none."""
    assert dataset.features == FLOW_FEATURES
    return {
        row["id"]: (
            row["image1"].getpixel((0, 0))[0],
            row["image2"].getpixel((0, 0))[0],
            None if row["flow"] is None else float(row["flow"]["flow"][0, 0, 0]),
            None if row["valid"] is None else np.flatnonzero(~row["valid"]).tolist(),
        )
        for row in dataset
    }


def whole(mark: int, masked: bool = True) -> tuple:
    return mark, mark + 100, mark, [mark] if masked else None


def write_csv(path: Path, *lines: str, header: str = "image1,image2,flow,valid") -> Path:
    path.write_text("\n".join((header, *lines)) + "\n")
    return path


FILES = "{0}_img1.png,{0}_img2.png,{0}_flow.flo,{0}_valid.png"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Files of pairs 3, 5 and 10; a table beside them is a test's own business."""
    for mark in (3, 5, 10):
        write_pair(tmp_path / "files", mark)
    return tmp_path


@pytest.mark.parametrize("split", ["training", "all"])
def test_csv(folder, caplog, split):
    table = write_csv(
        folder / "mine.csv", *(f"files/{FILES.format(mark).replace(',', ',files/')}" for mark in (10, 3))
    )
    expected = {"3_flow": whole(3), "10_flow": whole(10)}  # natural order, not the table's
    assert marks(load_source("pairs", table, split)) == expected
    assert marks(load_source("pairs", str(folder), split)) == expected  # the folder's only table
    sample = to_sample(load_source("pairs", table)[0])
    assert np.flatnonzero(~sample.valid).tolist() == [3] and sample.flow[0, 3].tolist() == [0, 0]
    assert caplog.text == ""


def test_jsonl(folder):
    lines = [
        {"image1": f"files/{mark}_img1.png", "image2": f"files/{mark}_img2.png", "flow": f"files/{mark}_flow.flo"}
        for mark in (3, 5)
    ]
    lines[0] |= {"valid": "files/3_valid.png", "id": "first", "comment": ["ignored"]}
    lines[1] |= {"valid": None, "id": 7}
    (folder / "pairs.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    expected = {"7": whole(5, masked=False), "first": whole(3)}
    assert marks(load_source("pairs", folder)) == expected


def test_paths_are_the_tables_or_absolute(folder, monkeypatch):
    (folder / "tables").mkdir()
    absolute = folder / "files/5_img1.png"
    table = write_csv(
        folder / "tables/a.csv", f"{absolute}, ../files/5_img2.png ,../files/5_flow.flo", header="image1,image2,flow"
    )
    monkeypatch.chdir(folder)
    dataset = load_source("pairs", "tables/a.csv")
    monkeypatch.chdir("/")
    assert marks(dataset) == {"5_flow": whole(5, masked=False)}
    assert table.is_file()


def test_tables_of_spreadsheets(folder):
    """A byte order mark, Windows line ends, quotes, and spaces in the header."""
    (folder / "files/a, b.png").write_bytes((folder / "files/3_img1.png").read_bytes())
    text = 'image1, image2 ,flow\r\n"files/a, b.png",files/3_img2.png,files/3_flow.flo\r\n\r\n'
    (folder / "pairs.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert marks(load_source("pairs", folder)) == {"3_flow": whole(3, masked=False)}


@pytest.mark.parametrize("header", ["image1,image2", "image1,image2,flow"])
def test_a_table_without_flow_has_no_ground_truth(folder, caplog, header):
    write_csv(folder / "pairs.csv", "files/3_img1.png,files/3_img2.png", header=header)
    dataset = load_source("pairs", folder)
    assert marks(dataset) == {"3_img1": (3, 103, None, None)}
    assert not is_sparse("pairs", dataset) and caplog.text == ""


def test_ids_of_repeated_stems(tmp_path):
    for number, scene in enumerate("abc"):
        write_pair(tmp_path / scene, number, ("f1.png", "f2.png", f"flow{'_x' * (scene == 'c')}.flo", "v.png"))
    lines = [f"{scene}/f1.png,{scene}/f2.png,{scene}/flow{'_x' * (scene == 'c')}.flo,{scene}/v.png" for scene in "abc"]
    write_csv(tmp_path / "pairs.csv", *lines)
    assert marks(load_source("pairs", tmp_path)) == {"a/flow": whole(0), "b/flow": whole(1), "flow_x": whole(2)}


BAD = {
    ",files/3_img2.png,files/3_flow.flo,": "no image1",
    "files/3_img1.png, ,files/3_flow.flo,": "no image2",
    "files/3_img1.png": "no image2",
    "files/3_img1.png,files/3_img2.png,,": "no flow",
    "files/3_img1.png,files/3_img2.png,files/3_flow.flo,,,": "more cells than columns",
    "files/gone.png,files/3_img2.png,files/3_flow.flo,": "no such file: files/gone.png",
    "files/3_img1.png,files/3_img2.png,gone/3_flow.flo,": "no such file: gone/3_flow.flo",
    "files/3_img1.png,files/3_img2.png,files/3_flow.flo,gone.png": "no such file: gone.png",
    "files/3_img1.png,files/3_img2.png,pairs.csv,": "flow does not end in .flo, .pfm, ",
    "files/3_img1.png,files/3_img2.png,files/3_flow.flo,pairs.csv": "valid does not end in .png, .npy: pairs.csv",
}


@pytest.mark.parametrize(("line", "problem"), BAD.items())
def test_bad_lines_of_csv(folder, caplog, line, problem):
    write_csv(folder / "pairs.csv", "files/" + FILES.format(10).replace(",", ",files/"), line)
    assert list(load_source("pairs", folder)["id"]) == ["10_flow"]
    (message,) = [record.getMessage() for record in caplog.records]
    assert f"pairs: left out 1 lines of {folder}/pairs.csv: line 3 ({problem}" in message
    write_csv(folder / "pairs.csv", line)
    if problem != "no flow":
        with pytest.raises(ValueError, match=r"pairs: no usable pair in .*pairs\.csv: line 2 \(") as error:
            load_source("pairs", folder)
        assert problem in str(error.value)


GOOD = '{"image1": "files/3_img1.png", "image2": "files/3_img2.png", "flow": "files/3_flow.flo", "id": "a"}'


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not a JSON object"),
        ("[" * 100_000, "not a JSON object"),
        ("[1]", "not a JSON object"),
        (GOOD.replace("image2", "image3"), "no image2"),
        (GOOD.replace('"files/3_img1.png"', "3"), "image1 is not text"),
        (GOOD.replace('"files/3_flow.flo"', '["files/3_flow.flo"]'), "flow is not text"),
        (GOOD.replace('"a"', "true"), "id is not text"),
        (GOOD, "the same as line 1"),
        (GOOD.replace("3_flow", "5_flow"), "id a again"),
    ],
)
def test_bad_lines_of_jsonl(folder, caplog, line, problem):
    (folder / "pairs.jsonl").write_text(f"{GOOD}\n\n{line}\n")
    assert marks(load_source("pairs", folder)) == {"a": whole(3, masked=False)}
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == f"pairs: left out 1 lines of {folder}/pairs.jsonl: line 3 ({problem})"


def test_bad_lines_are_counted_and_three_named(folder, caplog):
    good = "files/" + FILES.format(10).replace(",", ",files/")
    write_csv(folder / "pairs.csv", good, good, "a,b,c,d", good, "e,f,g,h")
    assert len(load_source("pairs", folder)) == 1
    assert (
        "left out 4 lines of" in caplog.text
        and "line 3 (the same as line 2), line 4 (no such file: a), line 5 (the same as line 2), ...\n" in caplog.text
    )


def test_ids_that_are_given_come_first(folder, caplog):
    names = ",".join(f"files/{name}" for name in ("3_img1.png", "3_img2.png", "3_flow.flo"))
    lines = [f"{names},", f"{names},3_flow", "files/5_img1.png,files/5_img2.png,,a", f"{names},a"]
    write_csv(folder / "pairs.csv", *lines, header="image1,image2,flow,id")
    assert list(load_source("pairs", folder)["id"]) == ["3_flow", "a", "files/3_flow"]
    assert "left out 1 lines" in caplog.text and "line 4 (no flow)" in caplog.text


def test_a_table_that_is_none(folder):
    def refused(match, name="pairs.csv"):
        with pytest.raises(ValueError, match=match):
            load_source("pairs", folder / name)

    write_csv(folder / "pairs.csv", "files/3_img1.png,files/3_img2.png", header="image1,img2")
    refused(r"pairs\.csv: the first line must have the columns image1 and image2,.*; got image1, img2")
    (folder / "pairs.csv").write_bytes(b"")
    refused(r"got nothing")
    write_csv(folder / "pairs.csv")
    refused(r"no usable pair in .*: it has no lines")
    write_csv(folder / "pairs.csv", '"files/3_img1.png')
    refused(r"pairs\.csv, after line 1: unexpected end of data")
    (folder / "pairs.csv").write_bytes(b"image1,image2\n\xff\xfe,a\n")
    refused("a table must be in UTF-8")
    (folder / "pairs.txt").write_text("")
    refused(r"must be a folder or a table ending in one of \.csv, \.jsonl; got .*pairs\.txt", "pairs.txt")


CELLS = st.sampled_from(
    ["image1", "image2", "flow", "id", "a.png", "/", "..", "~", '"', ",", "\n", "\0", "{", "}", ":"]
)


@pytest.mark.slow
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.one_of(st.lists(CELLS, max_size=30).map("".join), st.text(max_size=200)), st.sampled_from(["csv", "jsonl"]))
def test_any_other_text_is_refused_as_a_table(tmp_path, text, suffix):
    (tmp_path / f"a.{suffix}").write_bytes(("image1,image2\n" * (suffix == "csv") + text).encode(errors="replace"))
    with pytest.raises(ValueError, match="a.(csv|jsonl)"):
        load_source("pairs", tmp_path / f"a.{suffix}")


def test_folders_are_no_files(folder):
    write_csv(folder / "pairs.csv", "files,..,,")
    with pytest.raises(ValueError, match=r"line 2 \(no such file: files\)"):
        load_source("pairs", folder)


def test_names_that_are_too_long(folder):
    write_csv(folder / "pairs.csv", f"{'a' * 5000}/1.png,files/3_img2.png,,")
    with pytest.raises(ValueError, match=r"line 2 \(File name too long: aaa"):
        load_source("pairs", folder)


def test_which_table(folder):
    for mark, name in ((3, "b.csv"), (5, "a.jsonl")):
        write_csv(folder / name, "files/" + FILES.format(mark).replace(",", ",files/"))
    with pytest.raises(ValueError, match=r"there must be one table in .*; got a\.jsonl, b\.csv: give its path"):
        load_source("pairs", folder)
    write_csv(folder / "pairs.csv", "files/" + FILES.format(10).replace(",", ",files/"))
    assert list(load_source("pairs", folder)["id"]) == ["10_flow"]
    (folder / "pairs.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"got pairs\.csv, pairs\.jsonl"):
        load_source("pairs", folder)


SUB_FOLDERS = ("image1/{}.png", "image2/{}.png", "flow/{}.flo", "valid/{}.png")


@pytest.mark.parametrize(
    "names",
    [
        ("{}_img1.png", "{}_img2.png", "{}_flow.flo", "{}_valid.png"),
        ("{}_img1.JPG", "{}_img2.tiff", "{}_flow.PFM", "{}_valid.npy"),
        SUB_FOLDERS,
        ("image1/{}.bmp", "image2/{}.ppm", "flow/{}.npy", "valid/{}.PNG"),
        ("image1/{}.webp", "image2/{}.jpeg", "flow/{}.png", "valid/{}.npy"),
    ],
)
def test_folders(tmp_path, caplog, names):
    for mark in (3, 5, 10):
        write_pair(tmp_path, mark, names)
    for stray in ("3.txt", ".DS_Store", "._3_img1.png", "notes_img1.txt"):
        (tmp_path / stray).write_bytes(b"")
        (tmp_path / names[0]).parent.joinpath(stray).write_bytes(b"")
    dataset = load_source("pairs", tmp_path)
    assert list(dataset["id"]) == ["3", "5", "10"]
    for id, (first, second, flow, masked) in marks(dataset).items():
        assert (first, second) == pytest.approx((int(id), int(id) + 100), abs=2)  # JPEG
        assert (flow, masked) == (int(id), [int(id)])
    assert is_sparse("pairs", dataset) == names[2].endswith(".png")
    assert caplog.text == ""


def test_the_users_own_layout_wins_over_a_stray_table(tmp_path):
    write_pair(tmp_path, 3, SUB_FOLDERS)
    (tmp_path / "statistics.csv").write_text("mean,deviation\n1,2\n")
    assert marks(load_source("pairs", tmp_path)) == {"3": whole(3)}


def test_masks_and_flow_may_be_absent(tmp_path, caplog):
    for mark in (3, 5):
        write_pair(tmp_path, mark, SUB_FOLDERS)
    (tmp_path / "valid/3.png").unlink()
    assert marks(load_source("pairs", tmp_path)) == {"3": whole(3, masked=False), "5": whole(5)}
    shutil.rmtree(tmp_path / "flow")
    shutil.rmtree(tmp_path / "valid")
    assert marks(load_source("pairs", tmp_path)) == {"3": (3, 103, None, None), "5": (5, 105, None, None)}
    assert caplog.text == ""
    (tmp_path / "flow").mkdir()
    with pytest.raises(FileNotFoundError, match="left out 2 image pairs without flow: 3, 5"):
        load_source("pairs", tmp_path)


@pytest.mark.parametrize("names", [SUB_FOLDERS, ("{}_img1.png", "{}_img2.png", "{}_flow.flo", "{}_valid.png")])
def test_what_is_missing_in_a_folder(tmp_path, caplog, names):
    for mark in range(6):
        write_pair(tmp_path, mark, names)
    for column, mark in ((0, 1), (1, 2), (0, 3), (1, 3), (2, 4)):
        (tmp_path / names[column].format(mark)).unlink()
    assert marks(load_source("pairs", tmp_path)) == {"0": whole(0), "5": whole(5)}
    assert [record.getMessage() for record in caplog.records] == [
        "pairs: left out 2 pairs for a missing frame: 1, 2",
        "pairs: left out 1 flows without images: 3",
        "pairs: left out 1 image pairs without flow: 4",
    ]


@pytest.mark.parametrize(
    ("names", "other"),
    [(SUB_FOLDERS, "image2/3.jpg"), (SUB_FOLDERS, "flow/3.png"), (SUB_FOLDERS, "valid/3.NPY")]
    + [(("{}_img1.png", "{}_img2.png", "{}_flow.flo", "{}_valid.png"), "3_img1.ppm")],
)
def test_two_files_of_a_stem(tmp_path, names, other):
    write_pair(tmp_path, 3, names)
    (tmp_path / other).write_bytes(b"")
    mine = next(name.format(3) for name in names if name.format(3).rsplit(".")[0] == other.rsplit(".")[0])
    with pytest.raises(ValueError, match="there must be one file of a stem") as error:
        load_source("pairs", tmp_path)
    assert Path(mine).name in str(error.value) and Path(other).name in str(error.value)


def test_a_mask_that_cannot_be_read_is_not_ignored(tmp_path):
    write_pair(tmp_path, 3, SUB_FOLDERS)
    (tmp_path / "valid/3.png").rename(tmp_path / "valid/3.jpg")
    with pytest.raises(ValueError, match=r"a mask must end in one of \.png, \.npy; got .*valid/3\.jpg"):
        load_source("pairs", tmp_path)


@pytest.mark.parametrize("there", [True, False])
def test_nothing_found(tmp_path, there):
    if there:
        (tmp_path / "elsewhere/nested").mkdir(parents=True)
    with pytest.raises(
        FileNotFoundError, match=r"pairs: no pairs: there must be pairs\.csv .*NAME_flow\.flo.*elsewhere"
    ) as error:
        load_source("pairs", tmp_path / "elsewhere")
    assert ("holds no such file" if there else "does not exist") in str(error.value)


def test_any_png_makes_pairs_sparse(tmp_path):
    write_pair(tmp_path, 3, SUB_FOLDERS)
    assert not is_sparse("pairs", load_source("pairs", tmp_path))
    write_pair(tmp_path, 5, ("image1/{}.png", "image2/{}.png", "flow/{}.png", "valid/{}.png"))
    (tmp_path / "flow/5.png").rename(tmp_path / "flow/5.PNG")
    dataset = load_source("pairs", tmp_path)
    (tmp_path / "flow/5.PNG").write_bytes(b"never decoded")
    assert is_sparse("pairs", dataset)
    assert not is_sparse("sintel_clean", dataset) and is_sparse("hd1k", dataset)


def test_pairs_may_share_a_flow(folder, caplog):
    """Two renderings of one scene, over one ground truth; the names of the pairs tell them apart."""
    lines = [f"files/{mark}_img1.png,files/{mark}_img2.png,files/3_flow.flo," for mark in (3, 5)]
    lines.append("files/3_img1.png,files/5_img2.png,files/3_flow.flo,")
    write_csv(folder / "pairs.csv", *lines)
    assert list(load_source("pairs", folder)["id"]) == ["files/3_flow", "files/3_img1", "files/5_img1"]
    assert "left out" not in caplog.text


def test_masks_without_a_pair_are_reported(folder, caplog):
    (folder / "files" / "mask_valid.png").write_bytes((folder / "files" / "3_valid.png").read_bytes())
    load_source("pairs", folder / "files")
    assert "1 masks without a pair: mask" in caplog.text
