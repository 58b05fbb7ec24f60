"""The columns of flow and of masks, and the step from a row to arrays."""

from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
from datasets import Dataset, Features, Value, concatenate_datasets, load_dataset
from datasets.table import embed_table_storage

from flow_data.features import FLOW_FEATURES, OpticalFlow, ValidMask, to_sample
from flow_data.flow_io import encode_flow, write_flow
from flow_data.formats.masks import encode_mask

FLOW = (np.arange(24, dtype=np.float32).reshape(3, 4, 2) - 9) / 64
VALID = np.arange(12).reshape(3, 4) % 5 != 0
KNOWN = np.where(VALID[..., None], FLOW, 0)


def write_pair(folder: Path, suffix: str = ".flo") -> dict[str, str]:
    """A row of paths: red frame 1, blue frame 2, and their flow."""
    folder.mkdir(exist_ok=True)
    for name, color in (("1", (255, 0, 0)), ("2", (0, 0, 255))):
        PIL.Image.new("RGB", (4, 3), color).save(folder / f"{name}.png")
    write_flow(folder / f"flow{suffix}", FLOW, VALID)
    names = {"image1": "1.png", "image2": "2.png", "flow": f"flow{suffix}"}
    return {"id": folder.name, **{column: str(folder / name) for column, name in names.items()}}


def of_rows(*rows: dict) -> Dataset:
    columns = {name: [row.get(name) for row in rows] for name in FLOW_FEATURES}
    return Dataset.from_dict(columns, features=FLOW_FEATURES)


def write_mask(path: Path, mask: np.ndarray = VALID, zero_is_valid: bool = False) -> str:
    """A mask of 0 and 7, or of 0 and reasons."""
    values = np.where(mask ^ zero_is_valid, 7, 0).astype(np.uint8)
    if path.suffix == ".npy":
        np.save(path, values)
    else:
        PIL.Image.fromarray(values).save(path)
    return str(path)


def assert_is_the_flow(value):
    np.testing.assert_array_equal(value["flow"], KNOWN)
    np.testing.assert_array_equal(value["valid"], VALID)
    assert value["flow"].dtype == np.float32 and value["valid"].dtype == bool


@pytest.mark.parametrize("suffix", [".flo", ".pfm", ".png", ".npy"])
def test_paths_decode(tmp_path, suffix):
    assert_is_the_flow(of_rows(write_pair(tmp_path / "a", suffix))[0]["flow"])


def test_flow_that_is_no_number_where_valid_is_true(recwarn):
    flow = FLOW.copy()
    flow[0, 0], flow[0, 1] = np.nan, np.inf
    column = OpticalFlow()
    unknown = column.decode_example(column.encode_example((flow, None)))["valid"]  # NaN says what is unknown
    assert unknown.sum() == 10 and not recwarn.list
    with pytest.warns(UserWarning, match=r"16\.7 % of the pixels could not be written as \.flo .*stored as unknown"):
        column.encode_example((flow, np.ones((3, 4), bool)))
    with pytest.raises(ValueError, match="nothing of this flow is finite"):
        column.encode_example((np.full_like(flow, np.nan), VALID))


def test_nothing_is_read_before_it_is_accessed(tmp_path):
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


@pytest.mark.parametrize("feature", [OpticalFlow(), ValidMask()], ids=["flow", "mask"])
@pytest.mark.parametrize("value", [{}, {"bytes": None, "path": None}, 3, b"PIEH", (1, 2, 3)])
def test_other_values_are_refused(feature, value):
    with pytest.raises(ValueError, match="must be a path"):
        feature.encode_example(value)


@pytest.mark.parametrize("zero_is_valid", [False, True])
@pytest.mark.parametrize("suffix", [".png", ".npy"])
def test_masks_decode(tmp_path, suffix, zero_is_valid):
    feature = ValidMask(zero_is_valid=zero_is_valid)
    path = write_mask(tmp_path / f"mask{suffix}", zero_is_valid=zero_is_valid)
    data = Path(path).read_bytes()
    values = [path, {"bytes": data, "path": f"a{suffix}"}, {"bytes": None, "path": path}, VALID, None]
    dataset = Dataset.from_dict({"valid": values}, features=Features({"valid": feature}))
    for row in list(dataset)[:-1]:
        np.testing.assert_array_equal(row["valid"], VALID)
        assert row["valid"].dtype == bool
    assert dataset[-1]["valid"] is None
    assert feature.decode_example(VALID) is VALID
    assert feature.encode_example(Path(path)) == {"bytes": None, "path": path}


def test_masks_are_not_read_before_they_are_accessed(tmp_path):
    dataset = Dataset.from_dict({"valid": [str(tmp_path / "gone.png")]}, features=Features({"valid": ValidMask()}))
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        dataset[0]
    assert dataset.cast_column("valid", ValidMask(decode=False))[0]["valid"]["path"].endswith("gone.png")
    assert ValidMask(decode=False).flatten() == {"bytes": Value("binary"), "path": Value("string")}
    assert ValidMask().flatten() == ValidMask()
    with pytest.raises(RuntimeError, match="decode"):
        ValidMask(decode=False).decode_example({"bytes": None, "path": "a.png"})
    assert ValidMask().decode_example({"bytes": None, "path": None}) is None


FINE_FLOW = np.random.default_rng(0).standard_normal((6, 8, 2)).astype(np.float32)
FINE_VALID = np.random.default_rng(1).random((6, 8)) > 0.3


def test_stride_is_a_plain_slice(tmp_path):
    write_flow(tmp_path / "fine.pfm", FINE_FLOW, FINE_VALID)
    for stride in (1, 2, 3):
        flow = OpticalFlow(stride=stride).decode_example({"bytes": None, "path": str(tmp_path / "fine.pfm")})
        expected = np.where(FINE_VALID[..., None], FINE_FLOW, 0)[::stride, ::stride]
        np.testing.assert_array_equal(flow["flow"], expected)
        np.testing.assert_array_equal(flow["valid"], FINE_VALID[::stride, ::stride])
        assert flow["flow"].flags.c_contiguous and flow["flow"].dtype == np.float32


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_arrays_keep_their_size_at_any_stride(stride):
    feature = OpticalFlow(stride=stride)
    for value in ((FLOW, VALID), {"flow": FLOW, "valid": VALID}):
        assert_is_the_flow(feature.decode_example(feature.encode_example(value)))
    assert feature.decode_example(feature.encode_example((FLOW, None)))["valid"].all()
    with pytest.raises(ValueError, match="flow must be of shape"):
        feature.encode_example(([1], None))


def test_decoding_can_be_switched_off(tmp_path):
    row = write_pair(tmp_path / "a")
    dataset = of_rows(row).cast_column("flow", OpticalFlow(decode=False))
    assert dataset[0]["flow"] == {"bytes": None, "path": row["flow"]}
    assert OpticalFlow(decode=False).flatten() == {"bytes": Value("binary"), "path": Value("string")}
    assert OpticalFlow().flatten() == OpticalFlow()
    with pytest.raises(RuntimeError, match="decode"):
        OpticalFlow(decode=False).decode_example({"bytes": None, "path": row["flow"]})
    assert_is_the_flow(dataset.cast_column("flow", OpticalFlow())[0]["flow"])


def load_parquet(tmp_path: Path, streaming: bool = False):
    files = {"train": str(tmp_path / "pairs.parquet")}
    return load_dataset("parquet", data_files=files, cache_dir=tmp_path / "cache", split="train", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_is_self_contained(tmp_path, streaming):
    row = write_pair(tmp_path / "a", ".png")
    row["valid"] = write_mask(tmp_path / "a/mask.npy")
    dataset = of_rows(row, row | {"id": "no ground truth", "flow": None, "valid": None})
    embedded = dataset.with_format("arrow").map(embed_table_storage, batched=True)  # as push_to_hub does
    embedded.to_parquet(tmp_path / "pairs.parquet")
    for path in (tmp_path / "a").iterdir():
        path.unlink()
    dataset = load_parquet(tmp_path, streaming)
    assert dataset.features == FLOW_FEATURES
    first, second = dataset
    assert_is_the_flow(first["flow"])
    np.testing.assert_array_equal(first["valid"], VALID)
    assert second["flow"] is second["valid"] is None
    assert first["image2"].getpixel((0, 0)) == (0, 0, 255)
    stored = next(iter(dataset.cast_column("flow", OpticalFlow(decode=False)).cast_column("valid", ValidMask(False))))
    assert (stored["flow"]["path"], stored["valid"]["path"]) == ("flow.png", "mask.npy")


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_keeps_stride_and_meaning(tmp_path, streaming):
    """Spring's ground truth is finer than its frames, TartanAir's masks have 0 for valid."""
    write_flow(tmp_path / "fine.pfm", FINE_FLOW)
    mask = write_mask(tmp_path / "mask.png", zero_is_valid=True)
    features = Features({"flow": OpticalFlow(stride=2), "valid": ValidMask(zero_is_valid=True)})
    dataset = Dataset.from_dict({"flow": [str(tmp_path / "fine.pfm")], "valid": [mask]}, features=features)
    embedded = dataset.with_format("arrow").map(embed_table_storage, batched=True)
    embedded.to_parquet(tmp_path / "pairs.parquet")
    dataset = load_parquet(tmp_path, streaming)
    assert dataset.features == features
    (row,) = dataset
    np.testing.assert_array_equal(row["flow"]["flow"], FINE_FLOW[::2, ::2])
    np.testing.assert_array_equal(row["valid"], VALID)


@pytest.mark.parametrize("streaming", [False, True])
def test_plain_columns_are_cast(tmp_path, streaming):
    """How a data set is published: readers without this package can open it."""
    plain = {"bytes": Value("binary"), "path": Value("string")}
    flow, valid = encode_flow(FLOW, VALID, ".pfm"), encode_mask(VALID)
    rows = {"flow": [{"bytes": flow, "path": "0006.pfm"}], "valid": [{"bytes": valid, "path": "0006.png"}]}
    published = Dataset.from_dict(rows, features=Features({"flow": dict(plain), "valid": dict(plain)}))
    published.to_parquet(tmp_path / "pairs.parquet")
    loaded = load_parquet(tmp_path, streaming).cast_column("flow", OpticalFlow()).cast_column("valid", ValidMask())
    row = next(iter(loaded))
    assert_is_the_flow(row["flow"])
    np.testing.assert_array_equal(row["valid"], VALID)


@pytest.mark.parametrize("feature", [OpticalFlow(), ValidMask()], ids=["flow", "mask"])
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
def test_storage_is_cast(feature, storage):
    cast = feature.cast_storage(storage)
    assert cast.type == feature.pa_type
    assert cast.to_pylist() == [{"bytes": None, "path": "a.flo"}, None]


@pytest.mark.parametrize("storage", [pa.array([1.5]), pa.array([{"u": 1.0}]), pa.array([[1.0]])])
def test_other_storage_is_refused(storage):
    with pytest.raises(ValueError, match="a column must"):
        OpticalFlow().cast_storage(storage)
    with pytest.raises(ValueError, match="a (column|mask) must"):
        ValidMask().cast_storage(storage)


def flip(row):
    flow, valid = row["flow"]["flow"][:, ::-1] * np.float32([-1, 1]), row["flow"]["valid"][:, ::-1]
    mask = None if row["valid"] is None else row["valid"][:, ::-1]
    return {"flow": {"flow": flow, "valid": valid}, "valid": mask}


@pytest.mark.parametrize(("stride", "zero_is_valid"), [(1, False), (2, True)])
def test_map_may_return_decoded_values(stride, zero_is_valid):
    features = Features({"flow": OpticalFlow(stride=stride), "valid": ValidMask(zero_is_valid=zero_is_valid)})
    rows = {"flow": [(FLOW, VALID)] * 2, "valid": [VALID, None]}
    flipped = Dataset.from_dict(rows, features=features).map(flip)
    np.testing.assert_array_equal(flipped[0]["valid"], VALID[:, ::-1])
    twice = flipped.map(flip)
    assert twice.features == features
    assert_is_the_flow(twice[0]["flow"])
    np.testing.assert_array_equal(twice[0]["valid"], VALID)
    assert twice[1]["valid"] is None


@pytest.mark.parametrize(
    "features",
    [FLOW_FEATURES, Features({"flow": OpticalFlow(stride=2), "valid": ValidMask(zero_is_valid=True)})],
    ids=["usual", "unusual"],
)
def test_features_survive_their_schema(features):
    assert Features.from_arrow_schema(features.arrow_schema) == features
    assert Features.from_dict(features.to_dict()) == features


def test_sets_concatenate(tmp_path):
    dataset = of_rows(write_pair(tmp_path / "a"))
    assert_is_the_flow(concatenate_datasets([dataset, of_rows(write_pair(tmp_path / "b", ".npy"))])[1]["flow"])


def test_sample(tmp_path):
    sample = to_sample(of_rows(write_pair(tmp_path / "a"))[0])
    np.testing.assert_array_equal(sample.image1, np.full((3, 4, 3), [255, 0, 0]))
    np.testing.assert_array_equal(sample.image2, np.full((3, 4, 3), [0, 0, 255]))
    assert_is_the_flow({"flow": sample.flow, "valid": sample.valid})
    assert sample.image1.dtype == np.uint8
    assert all(array.flags.writeable for array in sample[:4])  # torch.from_numpy warns of read-only memory


def row_of(image1, image2=None, flow=FLOW):
    image2 = image1 if image2 is None else image2
    return {"id": "alley_1/frame_0001", "image1": image1, "image2": image2, "flow": {"flow": flow, "valid": VALID}}


def test_gray_is_repeated_and_alpha_dropped():
    sample = to_sample(row_of(PIL.Image.new("L", (4, 3), 7), PIL.Image.new("RGBA", (4, 3), (1, 2, 3, 0))))
    np.testing.assert_array_equal(sample.image1, np.full((3, 4, 3), 7))
    np.testing.assert_array_equal(sample.image2, np.full((3, 4, 3), [1, 2, 3]))


@pytest.mark.parametrize("mode", ["I;16", "I", "F", "1", "CMYK"])
def test_images_of_other_depths_and_color_spaces_become_rgb(mode):
    sample = to_sample(row_of(PIL.Image.new(mode, (4, 3))))
    for image in (sample.image1, sample.image2):
        assert image.dtype == np.uint8 and image.shape == (3, 4, 3) and len(np.unique(image)) == 1


def test_frames_of_two_depths_are_refused():
    with pytest.raises(ValueError, match="alley_1/frame_0001: both frames must have one depth; image1 is uint16"):
        to_sample(row_of(PIL.Image.new("I;16", (4, 3)), PIL.Image.new("L", (4, 3))))


def test_sizes_must_agree():
    right, wrong = PIL.Image.new("RGB", (4, 3)), PIL.Image.new("RGB", (3, 4))
    with pytest.raises(ValueError, match="alley_1/frame_0001: image2 must .* 3 x 4 .*got 4 x 3"):
        to_sample(row_of(right, wrong))
    with pytest.raises(ValueError, match="alley_1/frame_0001: flow must .* 4 x 3 .*got 3 x 4"):
        to_sample(row_of(wrong))


def test_sample_is_valid_where_flow_and_mask_are():
    mask = np.arange(12).reshape(3, 4) % 3 != 0
    sample = to_sample(row_of(PIL.Image.new("RGB", (4, 3)), flow=KNOWN) | {"valid": mask})
    np.testing.assert_array_equal(sample.valid, VALID & mask)
    np.testing.assert_array_equal(sample.flow, np.where((VALID & mask)[..., None], FLOW, 0))
    without = to_sample(row_of(PIL.Image.new("RGB", (4, 3)), flow=KNOWN) | {"valid": None})
    np.testing.assert_array_equal(without.valid, VALID)
    with pytest.raises(ValueError, match="alley_1/frame_0001: valid must .* 3 x 4 .*got 4 x 3"):
        to_sample(row_of(PIL.Image.new("RGB", (4, 3))) | {"valid": mask.T})


def test_a_sample_needs_ground_truth():
    with pytest.raises(ValueError, match="alley_1/frame_0001: .*test split"):
        to_sample(row_of(PIL.Image.new("RGB", (4, 3))) | {"flow": None})


def test_ground_truth_is_optional_where_it_is_not_required():
    row = row_of(PIL.Image.new("RGB", (4, 3)))
    for without in (row | {"flow": None}, {key: row[key] for key in ("id", "image1", "image2")}):
        sample = to_sample(without, needs_flow=False)
        assert sample.flow is None and sample.valid is None and sample.size == (3, 4)
    np.testing.assert_array_equal(to_sample(row, needs_flow=False).flow, to_sample(row).flow)
