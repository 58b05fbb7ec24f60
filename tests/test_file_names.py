"""Names that differ in Unicode normalization only are found, exact ones first."""

import unicodedata
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from source_trees import make_middlebury, make_sintel
from test_pairs import SUB_FOLDERS, marks, whole, write_csv, write_pair

from flow_data.datasets import load_source
from flow_data.features import ValidMask
from flow_data.file_names import find_name, find_path, index_names
from flow_data.flow_io import read_flow, write_flow
from flow_data.images import read_rgb

FORMS = ("NFC", "NFD")
NAME = "Übung é 한글"  # as one character each, or as several
COMPOSED, DECOMPOSED = (unicodedata.normalize(form, NAME) for form in FORMS)
MIXED = DECOMPOSED[:2] + COMPOSED[1:]  # neither


def to_form(form: str, name: str) -> str:
    return unicodedata.normalize(form, name)


@pytest.fixture(autouse=True)
def a_file_system_that_keeps_names(tmp_path):
    (tmp_path / COMPOSED).mkdir()
    if (tmp_path / DECOMPOSED).exists():
        pytest.skip("this file system takes both forms of a name for one")
    (tmp_path / COMPOSED).rmdir()


@given(
    st.sets(st.text("aüé\u0301\u0308u", min_size=1, max_size=3)), st.text("aüé\u0301\u0308u", min_size=1, max_size=3)
)
def test_exact_names_first_then_the_same_to_a_reader(names, name):
    found = find_name(name, index_names(names))
    if name in names:
        assert found == name
    else:
        same = {other for other in names if to_form("NFD", other) == to_form("NFD", name)}
        assert found in same if same else found is None


@pytest.mark.parametrize("asked", [COMPOSED, DECOMPOSED, MIXED])
@pytest.mark.parametrize("stored", [COMPOSED, DECOMPOSED])
def test_files_and_folders_are_found(tmp_path, monkeypatch, asked, stored):
    folder = tmp_path / stored / stored
    folder.mkdir(parents=True)
    (folder / f"{stored}.png").write_bytes(b"")
    right = str(folder / f"{stored}.png")
    assert find_path(tmp_path / asked / asked / f"{asked}.png") == right
    assert find_path(f"{tmp_path}/{stored}/{asked}/{asked}.png") == right
    assert find_path(f"{tmp_path}/{asked}/{asked}/other.png") == f"{tmp_path}/{asked}/{asked}/other.png"
    monkeypatch.chdir(tmp_path)
    assert find_path(f"{asked}/{asked}") == f"{stored}/{stored}"
    for nowhere in ("", "/", "ü", "/ü/é", f"{asked}/\0", "é" * 5000):
        assert find_path(nowhere) == nowhere


def test_readers_find_files(tmp_path):
    """What a data set's rows name."""
    write_flow(tmp_path / f"{DECOMPOSED}.flo", np.ones((3, 4, 2), np.float32))
    for suffix in ("png", "ppm"):
        PIL.Image.new("RGB", (4, 3), "red").save(tmp_path / f"{DECOMPOSED}.{suffix}")
        pixels = read_rgb({"bytes": None, "path": f"{tmp_path}/{COMPOSED}.{suffix}"}, "x")
        assert pixels[0, 0].tolist() == [255, 0, 0]
    assert read_flow(tmp_path / f"{COMPOSED}.flo")[1].all()
    PIL.Image.new("L", (4, 3), 1).save(tmp_path / f"mask {DECOMPOSED}.png")
    assert ValidMask().decode_example({"bytes": None, "path": f"{tmp_path}/mask {COMPOSED}.png"}).all()
    with pytest.raises(FileNotFoundError, match=f"other {COMPOSED}"):
        read_flow(tmp_path / f"other {COMPOSED}.flo")


@pytest.mark.parametrize("asked", FORMS)
@pytest.mark.parametrize("stored", FORMS)
@pytest.mark.parametrize("absolute", [True, False])
def test_tables(tmp_path, caplog, stored, asked, absolute):
    names = tuple(to_form(stored, f"Übung/é {name}") for name in ("{}_1.png", "{}_2.png", "{}_flow.flo", "{}_ok.png"))
    for mark in (3, 5):
        write_pair(tmp_path, mark, names)
    folder = f"{tmp_path}/" if absolute else ""
    lines = [folder + f",{folder}".join(to_form(asked, name.format(mark)) for name in names) for mark in (3, 5)]
    table = write_csv(tmp_path / to_form(stored, "Tabelle ü.csv"), *lines)
    assert table.is_file() and caplog.text == ""
    dataset = load_source("pairs", tmp_path / to_form(asked, "Tabelle ü.csv"))
    assert {to_form("NFC", key): value for key, value in marks(dataset).items()} == {
        to_form("NFC", f"é {mark}_flow"): whole(mark) for mark in (3, 5)
    }


def test_a_table_prefers_exact_names(tmp_path):
    for mark, form in ((3, "NFC"), (5, "NFD")):
        write_pair(tmp_path, mark, tuple(to_form(form, name) for name in ("é1.png", "é2.png", "é.flo", "é ok.png")))
    lines = [",".join(to_form(form, name) for name in ("é1.png", "é2.png", "é.flo", "é ok.png")) for form in FORMS]
    write_csv(tmp_path / "pairs.csv", *lines)
    assert sorted(marks(load_source("pairs", tmp_path)).values()) == [whole(3), whole(5)]


@pytest.mark.parametrize("names", [SUB_FOLDERS, ("{}_img1.png", "{}_img2.png", "{}_flow.flo", "{}_valid.png")])
def test_files_of_a_pair_in_different_forms(tmp_path, caplog, names):
    """As where frames come from one system and flow from another."""
    for number, form in enumerate(("NFC", "NFD", "NFD", "NFC")):
        write_pair(tmp_path / "made", 3, names)
        target = tmp_path / "pairs" / to_form(form, names[number].format("ü"))
        target.parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "made" / names[number].format(3)).rename(target)
    assert marks(load_source("pairs", tmp_path / "pairs")) == {to_form("NFC", "ü"): whole(3)}
    assert caplog.text == ""


def test_pairs_whose_names_differ_in_form_only_stay_apart(tmp_path, caplog):
    for mark, form in ((3, "NFC"), (5, "NFD")):
        write_pair(tmp_path / form, mark, SUB_FOLDERS)
        for name in SUB_FOLDERS:
            target = tmp_path / "pairs" / to_form(form, name.format("ü"))
            target.parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / form / name.format(mark)).rename(target)
    expected = {to_form("NFC", "ü"): whole(3), to_form("NFD", "ü"): whole(5)}
    assert marks(load_source("pairs", tmp_path / "pairs")) == expected
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("source", "make", "flow", "scene"),
    [
        ("sintel_clean", make_sintel, "training/flow", "alley_1"),
        ("middlebury", make_middlebury, "other-gt-flow", "Venus"),
    ],
)
def test_scenes_of_published_layouts(tmp_path, caplog, source, make, flow, scene):
    """A scene's folder of frames and its folder of flow, in a data set's own folder, in different forms."""
    root = tmp_path / DECOMPOSED
    make(root)
    count = len(load_source(source, root))
    for folder in root.rglob(scene):
        form = "NFC" if folder.parent == root / flow else "NFD"
        folder.rename(folder.with_name(to_form(form, "Höhle")))
    caplog.clear()
    dataset = load_source(source, tmp_path / COMPOSED)
    assert len(dataset) == count and all(row["flow"] is not None for row in dataset)
    assert "left out" not in caplog.text


def test_a_root_that_is_not_there_is_named_as_given(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{COMPOSED}/pairs"):
        load_source("pairs", Path(tmp_path, COMPOSED, "pairs"))
