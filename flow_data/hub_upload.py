"""Rows of a source as Parquet files with a data set card, uploaded to the Hub or written into a folder.

`flow_data.publish` is the command, and documents the columns; `flow_data.hub` reads them.
"""

import dataclasses
import io
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, Features, Image, Value
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, DatasetCard, DatasetCardData, HfApi
from tqdm.auto import tqdm

from flow_data.datasets import DATASETS, has_ground_truth, load_source
from flow_data.features import OpticalFlow, to_sample
from flow_data.flow_io import encode_flow
from flow_data.formats.masks import encode_mask
from flow_data.sample import FlowSample
from flow_data.visualize import draw_flow

STORED_FILE = {"bytes": Value("binary"), "path": Value("string")}
PUBLISHED_FEATURES = Features(
    {
        **{"id": Value("string"), "image1": Image(), "image2": Image(), "flow": STORED_FILE, "valid": STORED_FILE},
        "flow_color": Image(),
    }
)
COLOR_SIDE, COLOR_QUALITY = 320, 90  # longer side in pixels, and quality of the JPEG: some 10 kB
FILE_COLUMNS = ("image1", "image2", "flow", "valid")
HUB_SPLITS = {"training": "train", "validation": "validation", "test": "test", "testing": "test", "all": "train"}
SHARD = re.compile(r"data/(\w+)-\d{5}-of-\d{5}\.parquet")
MAX_BYTES_IN_COMMIT = 10**7  # a smaller file may travel in the commit itself, so it must be there until then
SIZE_CATEGORIES = ((1000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (10**6, "100K<n<1M"))

CARD = """# {title}

Optical flow: {counts}. Published from the files of {origin} by `python -m flow_data.publish {source}`.

**Terms of the data:** {terms}. Whoever uses this copy is bound by them as by the original.

| column | what it is |
|---|---|
| `id` | name of the pair in the original data set |
| `image1`, `image2` | the two frames |
| `flow` | `bytes` and `path` of a flow file ({formats}): from `image1` to `image2`, (x right, y down) in pixels |
| `valid` | `bytes` and `path` of a PNG, not 0 where the flow is known; null where the flow file has the mask |
| `flow_color` | the flow in colors, to look at: hue is the direction, saturation the length, unknown is white |

```python
from datasets import load_dataset

row = next(iter(load_dataset("{repo_id}", split="{split}", streaming=True)))
```

To train RAFT on it: `accelerate launch train_flow.py --config configs/NAME.yaml --dataset_name {repo_id}`, with
`--streaming` to download nothing beforehand.
"""


class Shard(NamedTuple):
    """Rows of a Parquet file.

    Args:
        path: in the repository.
        rows: indices of the rows.
    """

    path: str
    rows: range


def open_splits(source: str, data_dir: str | None, split: str | None) -> dict[str, Dataset]:
    """The Hub's split name -> rows with ground truth.

    Args:
        source: a key of `DATASETS`.
        data_dir: the data set's own folder.
        split: of the source; None is every one but `all` that is there and has ground truth.

    Raises:
        ValueError: the split has no ground truth.
        FileNotFoundError: nothing is there.
    """
    if split is not None:
        dataset = load_source(source, data_dir, split)
        if not has_ground_truth(dataset):
            raise ValueError(f"{source}: the split {split} has no ground truth to publish")
        return {HUB_SPLITS[split]: dataset}
    found: dict[str, Dataset] = {}
    problems = []
    for name in DATASETS[source].splits:
        if name == "all":
            continue
        try:
            dataset = load_source(source, data_dir, name)
        except FileNotFoundError as error:
            problems.append(error)
            continue
        if has_ground_truth(dataset):
            found[HUB_SPLITS[name]] = dataset
    if not found:
        raise problems[0] if problems else FileNotFoundError(f"{source}: nothing with ground truth in {data_dir}")
    return found


def publish(
    source: str,
    splits: Mapping[str, Dataset],
    repo_id: str,
    private: bool,
    token: str | None,
    max_shard_bytes: int,
) -> str:
    """Upload rows as Parquet files with a data set card, in one commit.

    Every row is decoded once, so that nothing damaged is published. An interrupted upload resumes when it is run
    again: the Hub already has the files that went through.

    Args:
        source: what the rows come from, for the card.
        splits: the Hub's split name -> rows.
        repo_id: `user/name`; made if it is not there.
        private: for a new repository.
        token: None is the one that is logged in.
        max_shard_bytes: of a file, roughly; it lies on the disk while it is uploaded.

    Returns:
        The commit's address.

    Raises:
        ValueError: a row is damaged.
        OSError: a file cannot be read, or the Hub refuses or cannot be reached.
    """
    api = HfApi(token=token)
    with _hub_errors(f"cannot create the data set {repo_id}"):  # first: a bad token shows before any work is done
        repo_id = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
        present = [path for path in api.list_repo_files(repo_id, repo_type="dataset") if SHARD.fullmatch(path)]
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    formats: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        for path, file, suffixes in write_shards(splits, Path(folder), max_shard_bytes):
            addition = CommitOperationAdd(path_in_repo=path, path_or_fileobj=file)
            with _hub_errors(f"cannot upload to {repo_id}, run it again to resume"):
                api.preupload_lfs_files(repo_id, [addition], repo_type="dataset")
            if file.stat().st_size > MAX_BYTES_IN_COMMIT:
                file.unlink()
            operations.append(addition)
            formats |= suffixes
        new = {operation.path_in_repo for operation in operations}
        old = [path for path in present if _split_of(path) in splits and path not in new]
        operations += [CommitOperationDelete(path_in_repo=path) for path in old]
        others = {_split_of(path) for path in present} - set(splits)  # published before
        card = make_card(source, repo_id, splits, formats, sorted(others))
        operations.append(CommitOperationAdd(path_in_repo="README.md", path_or_fileobj=str(card).encode()))
        with _hub_errors(f"cannot upload to {repo_id}, run it again to resume"):
            commit = api.create_commit(repo_id, operations, commit_message=f"Publish {source}", repo_type="dataset")
    return commit.commit_url


@contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    """Convert any error of the client, whether of token, name or network, to an OSError that starts with `what`."""
    try:
        yield
    except Exception as error:
        raise OSError(f"{what}: {error}") from error


def _split_of(path: str) -> str:
    return SHARD.fullmatch(path)[1]  # type: ignore[index]


def publish_to_folder(source: str, splits: Mapping[str, Dataset], folder: Path, max_shard_bytes: int) -> None:
    """Write into a folder what `publish` uploads, to be inspected or uploaded by other means."""
    formats: set[str] = set()
    for _, _, suffixes in write_shards(splits, folder, max_shard_bytes):
        formats |= suffixes
    make_card(source, str(folder), splits, formats, others=[]).save(folder / "README.md")


def write_shards(
    splits: Mapping[str, Dataset], folder: Path, max_shard_bytes: int
) -> Iterator[tuple[str, Path, set[str]]]:
    """Write all files, one after the other: (path in the repository, file in the folder, its flow files' suffixes)."""
    for split, dataset in splits.items():
        for shard in plan_shards(dataset, split, max_shard_bytes):
            file = folder / shard.path
            file.parent.mkdir(parents=True, exist_ok=True)
            yield shard.path, file, write_shard(dataset, shard, file)


def plan_shards(dataset: Dataset, split: str, max_shard_bytes: int) -> list[Shard]:
    """Cut rows into files of about so many bytes, in their order."""
    starts, size = [0], 0
    for index, row_bytes in enumerate(_row_bytes(dataset)):
        if size and size + row_bytes > max_shard_bytes:
            starts.append(index)
            size = 0
        size += row_bytes
    ends = [*starts[1:], len(dataset)]
    return [
        Shard(f"data/{split}-{index:05d}-of-{len(starts):05d}.parquet", range(start, end))
        for index, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]


def write_shard(dataset: Dataset, shard: Shard, file: Path) -> set[str]:
    """Write rows as a Parquet file, one to a row group; returns the suffixes of their flow files."""
    suffixes = set()
    with pq.ParquetWriter(file, PUBLISHED_FEATURES.arrow_schema, compression="zstd") as writer:
        for row in tqdm(published_rows(dataset, shard.rows), desc=shard.path, total=len(shard.rows), leave=False):
            writer.write_table(pa.Table.from_pylist([row], schema=PUBLISHED_FEATURES.arrow_schema))
            suffixes.add(PurePath(row["flow"]["path"]).suffix)
    return suffixes


def published_rows(dataset: Dataset, indices: range) -> Iterator[dict[str, Any]]:
    """Rows in the form that is published.

    Raises:
        ValueError: frames, flow or mask are damaged, or their sizes differ.
        OSError: a file cannot be read.
    """
    stored = _stored(dataset)
    for index in indices:
        decoded = dataset[index]
        row = decoded if stored is dataset else stored[index]
        sample = to_sample(decoded)
        name, mask = PurePath(row["id"]).name, decoded.get("valid")
        yield {
            "id": row["id"],
            "image1": _image_file(row["image1"], f"{name}_img1"),
            "image2": _image_file(row["image2"], f"{name}_img2"),
            "flow": _flow(row["flow"], dataset.features.get("flow"), sample, name),
            "valid": None if mask is None else {"bytes": encode_mask(mask), "path": f"{name}_valid.png"},
            "flow_color": _color_image(sample, f"{name}_flow"),
        }


def _stored(dataset: Dataset) -> Dataset:
    """The rows as they are stored, nothing decoded; rows that are drawn when accessed have nothing stored."""
    if "flow" not in dataset.column_names:
        return dataset
    for column in FILE_COLUMNS:
        feature = dataset.features[column]
        dataset = dataset.cast_column(column, dataclasses.replace(feature, decode=False))
    return dataset.select_columns(["id", *FILE_COLUMNS])


def _row_bytes(dataset: Dataset) -> Iterator[int]:
    """Size of each row's files, which is about what it takes in Parquet."""
    if "flow" not in dataset.column_names:  # drawn when accessed: all of one size
        row = next(published_rows(dataset, range(1)))
        yield from [sum(len(row[column]["bytes"]) for column in ("image1", "image2", "flow"))] * len(dataset)
        return
    for row in _stored(dataset):
        files = [row[column] for column in FILE_COLUMNS if row[column] is not None]
        yield sum(os.path.getsize(file["path"]) if file["bytes"] is None else len(file["bytes"]) for file in files)


def _file(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A file's bytes, and of its path only the name, as the folders of this disk are private."""
    data = Path(stored["path"]).read_bytes() if stored["bytes"] is None else stored["bytes"]
    return {"bytes": data, "path": None if stored["path"] is None else PurePath(stored["path"]).name}


def _image_file(value: PIL.Image.Image | Mapping[str, Any], name: str) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return _file(value)
    buffer = io.BytesIO()
    value.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": f"{name}.png"}


def _color_image(sample: FlowSample, name: str) -> dict[str, Any]:
    """A small JPEG of the flow of a sample in colors."""
    flow = torch.from_numpy(np.where(sample.valid[..., None], sample.flow, np.nan)).permute(2, 0, 1)
    image = PIL.Image.fromarray(draw_flow(flow))
    image.thumbnail((COLOR_SIDE, COLOR_SIDE), PIL.Image.Resampling.BOX)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=COLOR_QUALITY, subsampling=0)
    return {"bytes": buffer.getvalue(), "path": f"{name}.jpg"}


def _flow(value: Mapping[str, Any], feature: OpticalFlow | None, sample: FlowSample, name: str) -> dict[str, Any]:
    """The flow file as it is, or a new one where there is none of the pair's own flow (drawn, or of another size)."""
    if feature is not None and feature.stride == 1:
        return _file(value)
    suffix = ".flo" if feature is None else ".flo5"  # smaller, and what such files were
    return {"bytes": encode_flow(sample.flow, sample.valid, suffix), "path": f"{name}{suffix}"}


def make_card(
    source: str, repo_id: str, splits: Mapping[str, Dataset], formats: set[str], others: Sequence[str]
) -> DatasetCard:
    """The data set card: what it is, how much, on which terms, how to read it; `others` are splits already there."""
    provenance = DATASETS[source].license
    total = sum(len(dataset) for dataset in splits.values())
    sizes = [category for limit, category in SIZE_CATEGORIES if total < limit]
    data = DatasetCardData(
        license=provenance.identifier,
        pretty_name=provenance.title,
        tags=["optical-flow"],
        size_categories=[sizes[0] if sizes else "n>1M"],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"data/{split}-*"} for split in (*splits, *others)],
            }
        ],
    )
    body = CARD.format(
        source=source,
        title=provenance.title,
        origin=f"[{provenance.title}]({provenance.homepage})" if provenance.homepage else provenance.title,
        terms=provenance.terms,
        counts=", ".join(f"{len(dataset):,} pairs in split `{split}`" for split, dataset in splits.items())
        + "".join(f", and split `{split}`" for split in others),
        formats=", ".join(f"`{suffix}`" for suffix in sorted(formats)),
        repo_id=repo_id,
        split=next(iter(splits)),
    )
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{body}")
