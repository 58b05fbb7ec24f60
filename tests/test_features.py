"""The OpticalFlow column and the step from a row to arrays."""

from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
from datasets import Dataset, Features, Value, concatenate_datasets, load_dataset
from datasets.table import embed_table_storage

from flow_data.features import FLOW_FEATURES, OpticalFlow, to_sample
from flow_data.flow_io import encode_flow, write_flow

FLOW = (np.arange(24, dtype=np.float32).reshape(3, 4, 2) - 9) / 64
VALID = np.arange(12).reshape(3, 4) % 5 != 0
KNOWN = np.where(VALID[..., None], FLOW, 0)


def write_pair(folder: Path, suffix: str = ".flo") -> dict[str, str]:
    """A row of paths: red frame 1, blue frame 2, and their flow."""
    folder.mkdir(exist_ok=True)
    for name, colour in (("1", (255, 0, 0)), ("2", (0, 0, 255))):
        PIL.Image.new("RGB", (4, 3), colour).save(folder / f"{name}.png")
    write_flow(folder / f"flow{suffix}", FLOW, VALID)
    names = {"image1": "1.png", "image2": "2.png", "flow": f"flow{suffix}"}
    return {"id": folder.name, **{column: str(folder / name) for column, name in names.items()}}


def of_rows(*rows: dict) -> Dataset:
    return Dataset.from_dict({name: [row[name] for row in rows] for name in FLOW_FEATURES}, features=FLOW_FEATURES)


def assert_is_the_flow(value):
    np.testing.assert_array_equal(value["flow"], KNOWN)
    np.testing.assert_array_equal(value["valid"], VALID)
    assert value["flow"].dtype == np.float32 and value["valid"].dtype == bool


@pytest.mark.parametrize("suffix", [".flo", ".pfm", ".png", ".npy"])
def test_paths_decode(tmp_path, suffix):
    assert_is_the_flow(of_rows(write_pair(tmp_path / "a", suffix))[0]["flow"])


def test_nothing_is_read_before_it_is_looked_at(tmp_path):
    row = write_pair(tmp_path / "a")
    dataset = of_rows(row, row | {"id": "gone", "flow": str(tmp_path / "gone.flo")})
    assert list(dataset["id"]) == ["a", "gone"]
    assert_is_the_flow(dataset[0]["flow"])
    with pytest.raises(FileNotFoundError, match=r"gone\.flo"):
        dataset[1]


@pytest.mark.parametrize(
    "value",
    [
        (FLOW, VALID),
        {"flow": FLOW, "valid": VALID},
        {"bytes": encode_flow(FLOW, VALID, ".png"), "path": "a.png"},
        {"bytes": encode_flow(FLOW, VALID, ".flo"), "path": None},
        {"bytes": encode_flow(FLOW, VALID, ".flo")},
    ],
    ids=["tuple", "arrays", "png bytes", "flo bytes", "bytes alone"],
)
def test_values_decode(value):
    feature = OpticalFlow()
    assert_is_the_flow(feature.decode_example(feature.encode_example(value)))
    dataset = Dataset.from_dict({"flow": [value, None]}, features=Features({"flow": feature}))
    assert_is_the_flow(dataset[0]["flow"])
    assert dataset[1]["flow"] is None


def test_path_objects_become_absolute(tmp_path, monkeypatch):
    write_pair(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    stored = OpticalFlow().encode_example(Path("a/flow.flo"))
    assert stored == {"bytes": None, "path": str(tmp_path / "a/flow.flo")}
    assert_is_the_flow(OpticalFlow().decode_example(stored))


@pytest.mark.parametrize("value", [{}, {"bytes": None, "path": None}, 3, b"PIEH", (1, 2, 3)])
def test_other_values_are_refused(value):
    with pytest.raises(ValueError, match="expected a path"):
        OpticalFlow().encode_example(value)


def test_decoding_can_be_switched_off(tmp_path):
    row = write_pair(tmp_path / "a")
    dataset = of_rows(row).cast_column("flow", OpticalFlow(decode=False))
    assert dataset[0]["flow"] == {"bytes": None, "path": row["flow"]}
    assert OpticalFlow(decode=False).flatten() == {"bytes": Value("binary"), "path": Value("string")}
    assert OpticalFlow().flatten() == OpticalFlow()
    with pytest.raises(RuntimeError, match="decode"):
        OpticalFlow(decode=False).decode_example({"bytes": None, "path": row["flow"]})
    assert_is_the_flow(dataset.cast_column("flow", OpticalFlow())[0]["flow"])


def test_parquet_is_self_contained(tmp_path):
    row = write_pair(tmp_path / "a", ".png")
    dataset = of_rows(row, row | {"id": "no ground truth", "flow": None})
    embedded = dataset.with_format("arrow").map(embed_table_storage, batched=True)  # as push_to_hub does
    embedded.to_parquet(tmp_path / "pairs.parquet")
    for path in (tmp_path / "a").iterdir():
        path.unlink()
    files = {"train": str(tmp_path / "pairs.parquet")}
    dataset = load_dataset("parquet", data_files=files, cache_dir=tmp_path / "cache", split="train")
    assert dataset.features == FLOW_FEATURES
    assert_is_the_flow(dataset[0]["flow"])
    assert dataset[1]["flow"] is None
    assert dataset[0]["image2"].getpixel((0, 0)) == (0, 0, 255)
    assert dataset.cast_column("flow", OpticalFlow(decode=False))[0]["flow"]["path"] == "flow.png"


@pytest.mark.parametrize("streaming", [False, True])
def test_plain_columns_are_cast(tmp_path, streaming):
    """How a data set is published: readers without this package can open it."""
    plain = Features({"bytes": Value("binary"), "path": Value("string")})
    stored = {"bytes": encode_flow(FLOW, VALID, ".pfm"), "path": "0006.pfm"}
    published = Dataset.from_dict({"flow": [stored]}, features=Features({"flow": dict(plain)}))
    published.to_parquet(tmp_path / "plain.parquet")
    loaded = load_dataset(
        "parquet",
        data_files=str(tmp_path / "plain.parquet"),
        cache_dir=tmp_path / "cache",
        split="train",
        streaming=streaming,
    )
    assert_is_the_flow(next(iter(loaded.cast_column("flow", OpticalFlow())))["flow"])


@pytest.mark.parametrize(
    "storage",
    [
        pa.array(["a.flo", None]),
        pa.array(["a.flo", None], pa.large_string()),
        pa.array([{"path": "a.flo"}, None]),
        pa.array([{"path": "a.flo", "bytes": None}, None], pa.struct({"path": pa.string(), "bytes": pa.binary()})),
    ],
    ids=["string", "large_string", "without bytes", "other order"],
)
def test_storage_is_cast(storage):
    cast = OpticalFlow().cast_storage(storage)
    assert cast.type == OpticalFlow.pa_type
    assert cast.to_pylist() == [{"bytes": None, "path": "a.flo"}, None]


@pytest.mark.parametrize("storage", [pa.array([1.5]), pa.array([{"u": 1.0}]), pa.array([[1.0]])])
def test_other_storage_is_refused(storage):
    with pytest.raises(ValueError, match="expected a column"):
        OpticalFlow().cast_storage(storage)


def test_map_may_return_decoded_values(tmp_path):
    def flip(row):
        flow, valid = row["flow"]["flow"][:, ::-1] * np.float32([-1, 1]), row["flow"]["valid"][:, ::-1]
        return {"flow": {"flow": flow, "valid": valid}}

    dataset = of_rows(write_pair(tmp_path / "a"))
    assert_is_the_flow(dataset.map(flip).map(flip)[0]["flow"])


def test_features_survive_their_schema():
    assert Features.from_arrow_schema(FLOW_FEATURES.arrow_schema) == FLOW_FEATURES
    assert Features.from_dict(FLOW_FEATURES.to_dict()) == FLOW_FEATURES


def test_sets_concatenate(tmp_path):
    dataset = of_rows(write_pair(tmp_path / "a"))
    assert_is_the_flow(concatenate_datasets([dataset, of_rows(write_pair(tmp_path / "b", ".npy"))])[1]["flow"])


def test_sample(tmp_path):
    sample = to_sample(of_rows(write_pair(tmp_path / "a"))[0])
    np.testing.assert_array_equal(sample.image1, np.full((3, 4, 3), [255, 0, 0]))
    np.testing.assert_array_equal(sample.image2, np.full((3, 4, 3), [0, 0, 255]))
    assert_is_the_flow({"flow": sample.flow, "valid": sample.valid})
    assert sample.image1.dtype == np.uint8
    assert all(array.flags.writeable for array in sample)  # torch.from_numpy warns of read-only memory


def row_of(image1, image2=None, flow=FLOW):
    image2 = image1 if image2 is None else image2
    return {"id": "alley_1/frame_0001", "image1": image1, "image2": image2, "flow": {"flow": flow, "valid": VALID}}


def test_grey_is_repeated_and_alpha_dropped():
    sample = to_sample(row_of(PIL.Image.new("L", (4, 3), 7), PIL.Image.new("RGBA", (4, 3), (1, 2, 3, 0))))
    np.testing.assert_array_equal(sample.image1, np.full((3, 4, 3), 7))
    np.testing.assert_array_equal(sample.image2, np.full((3, 4, 3), [1, 2, 3]))


@pytest.mark.parametrize("mode", ["I;16", "I", "F", "1", "CMYK"])
def test_odd_images_are_refused(mode):
    with pytest.raises(ValueError, match=rf"alley_1/frame_0001: image1: .*received Pillow mode {mode}"):
        to_sample(row_of(PIL.Image.new(mode, (4, 3))))


def test_sizes_must_agree():
    right, wrong = PIL.Image.new("RGB", (4, 3)), PIL.Image.new("RGB", (3, 4))
    with pytest.raises(ValueError, match="alley_1/frame_0001: expected image2 .* 3 x 4 .*received 4 x 3"):
        to_sample(row_of(right, wrong))
    with pytest.raises(ValueError, match="alley_1/frame_0001: expected flow .* 4 x 3 .*received 3 x 4"):
        to_sample(row_of(wrong))


def test_a_sample_needs_ground_truth():
    with pytest.raises(ValueError, match="alley_1/frame_0001: .*test split"):
        to_sample(row_of(PIL.Image.new("RGB", (4, 3))) | {"flow": None})
