"""Flow pairs from the Hub: downloaded through `datasets`, or read row by row where they lie.

Expected are columns `image1`, `image2` and `flow`, each `{"bytes", "path"}` of a file, and perhaps `valid` and `id`,
as `python -m flow_data.publish` writes them. Both ways give rows by index, so a run draws the same pairs in the same
order, shuffled over the whole data set, whether it streams or not, on any number of processes and workers.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, concatenate_datasets, load_dataset, load_dataset_builder
from huggingface_hub import HfFileSystem

from flow_data.features import OpticalFlow, ValidMask

DEFAULT_SPLIT = "train"
REQUIRED_COLUMNS = ("image1", "image2", "flow")
STORED_FEATURES = Features(
    {"image1": Image(decode=False), "image2": Image(decode=False), "flow": OpticalFlow(), "valid": ValidMask()}
)
MAX_ROW_GROUP_BYTES = 2**26  # a shuffled row costs its whole row group
MAX_GAP_BYTES = 2**13  # between columns of a row: it is faster to read them than to make two requests
FOOTER_READERS = 16  # threads; the footers of some hundred shards are small, and far away


def load_hub_dataset(name: str, split: str | None = None, streaming: bool = False, token: str | None = None) -> Any:
    """Open a data set of flow pairs.

    Args:
        name: repository `user/name`, or a local folder of such files.
        split: of the data set; None is `train`, `all` is every one.
        streaming: read each pair from the Hub when it is needed, instead of downloading the data set first.
        token: for a private repository; None is the one that is logged in.

    Returns:
        Rows by index: `id`, `image1` and `image2` as stored, `flow` and `valid` decoded (`flow_data.features`).

    Raises:
        ValueError: no such split, columns that are not those of flow pairs, or files that cannot be streamed.
        OSError: it is not there, cannot be reached, or is damaged.
    """
    split = split or DEFAULT_SPLIT
    if streaming:
        with _reading(name):
            files = {str(key): [str(file) for file in value] for key, value in _find_files(name, token).items()}
        return ParquetRows([file for part in _choose(split, list(files), name) for file in files[part]], name, token)
    with _reading(name):
        datasets = load_dataset(name, token=token)  # from the cache where the Hub cannot be reached
    dataset = concatenate_datasets([datasets[part] for part in _choose(split, list(datasets), name)])
    _check_columns(dataset.column_names, name)
    for column in set(STORED_FEATURES) & set(dataset.column_names):
        with _reading(name):
            dataset = dataset.cast_column(column, STORED_FEATURES[column])
    if "id" not in dataset.column_names:
        dataset = dataset.add_column("id", [_id_of(index) for index in range(len(dataset))])
    return dataset.select_columns([column for column in ("id", *STORED_FEATURES) if column in dataset.column_names])


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Convert any error of the client, network, cache or file formats to an OSError that names the data set."""
    try:
        yield
    except Exception as error:
        raise OSError(f"dataset_name: cannot read {name}: {error}") from error


def _find_files(name: str, token: str | None) -> Mapping[str, Sequence[str]]:
    builder = load_dataset_builder(name, token=token)
    if not builder.config.data_files:
        raise ConnectionError(
            "it is on the Hub no more, or the Hub or its token cannot be reached or is refused. Only a copy in the "
            "cache is left: train on that without --streaming"
        )
    return builder.config.data_files


def _choose(split: str, splits: list[str], name: str) -> list[str]:
    wanted = splits if split == "all" else [split]
    if not wanted or not set(wanted) <= set(splits):
        raise ValueError(f"dataset_name: {name} has no split {split}; it has {', '.join(splits) or 'none'}")
    return wanted


def _check_columns(columns: list[str], name: str) -> None:
    missing = [column for column in REQUIRED_COLUMNS if column not in columns]
    if missing:
        raise ValueError(
            f"dataset_name: {name} is no data set of flow pairs: it lacks {', '.join(missing)}; "
            f"it has the columns {', '.join(columns)}"
        )


def _id_of(index: int) -> str:
    return f"{index:08d}"


class ParquetRows:
    """Rows of Parquet files, local or remote, by index; nothing is kept but the files' footers.

    A row is read with its row group, in one request: `flow_data.publish` writes one row to a group. Reading opens the
    file anew, so that a process forked off (a DataLoader's worker) shares no connection.

    Args:
        files: their paths or addresses, all of one schema.
        name: of the data set, for errors.
        token: for a private repository.

    Raises:
        ValueError: files that are not Parquet, other columns, or row groups too large to read one for each row.
        OSError: a file cannot be read, or a column is of a type that cannot be a file's.
    """

    def __init__(self, files: list[str], name: str, token: str | None = None):
        other = [file for file in files if PurePath(file).suffix != ".parquet"]
        if other:
            raise ValueError(
                f"dataset_name: {name} cannot be streamed, for it is not in Parquet ({other[0]}); train without "
                "--streaming, or publish it with python -m flow_data.publish"
            )
        self.name, self.token = name, token
        with _reading(name), ThreadPoolExecutor(FOOTER_READERS) as pool:
            metadata = list(pool.map(self._read_footer, files))
            schema = metadata[0].schema.to_arrow_schema()
        _check_columns(schema.names, name)
        self.columns = [column for column in ("id", *STORED_FEATURES) if column in schema.names]
        for column in set(self.columns) & set(STORED_FEATURES):
            with _reading(f"the column {column} of {name}"):
                STORED_FEATURES[column].cast_storage(pa.array([], schema.field(column).type))
        self.groups = [
            (file, footer, group)
            for file, footer in zip(files, metadata, strict=True)
            for group in range(footer.num_row_groups)
        ]
        sizes = [footer.row_group(group).num_rows for _, footer, group in self.groups]
        largest = max((footer.row_group(group).total_byte_size for _, footer, group in self.groups), default=0)
        if largest > MAX_ROW_GROUP_BYTES and max(sizes) > 1:
            raise ValueError(
                f"dataset_name: {name} cannot be streamed: each pair would cost a row group of up to "
                f"{largest >> 20} MB; train without --streaming, or publish it with python -m flow_data.publish"
            )
        self.ends = np.cumsum(sizes, dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read and decode one row.

        Args:
            index: 0 to the length of the rows, exclusive.

        Returns:
            `id`, stored images, decoded `flow` and `valid`.

        Raises:
            IndexError: there is no such row.
            OSError: it cannot be read, or its flow or mask is damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: row {index} of {len(self)}")
        which = int(np.searchsorted(self.ends, index, side="right"))
        file, footer, group = self.groups[which]
        first = int(self.ends[which - 1]) if which else 0
        row = {"id": _id_of(index)}
        with _reading(f"row {index} of {self.name}, in {file}"):
            table = self._read_group(file, footer, group).slice(index - first, 1)
            for column in self.columns:
                values = table[column].combine_chunks()
                feature = STORED_FEATURES.get(column)
                value = (values if feature is None else feature.cast_storage(values))[0].as_py()
                decodes = value is not None and getattr(feature, "decode", False)
                row[column] = feature.decode_example(value) if decodes else value
        return row

    def flow_names(self) -> list[str]:
        """Names of flow files, as far as the files' footers state them: the first and last of each row group."""
        names = []
        for _, footer, group in self.groups:
            columns = (footer.row_group(group).column(index) for index in range(footer.num_columns))
            statistics = next((column.statistics for column in columns if column.path_in_schema == "flow.path"), None)
            if statistics is not None and statistics.has_min_max:
                names += [statistics.min, statistics.max]
        return names

    def _read_group(self, file: str, footer: pq.FileMetaData, group: int) -> pa.Table:
        # Arrow would read in threads of its own, which may abort a process that ends soon after (Arrow 26).
        ranges = _byte_ranges(footer.row_group(group), self.columns)
        begin, end = ranges[0][0], ranges[-1][1]
        data = bytearray(end - begin)
        with self._open(file) as handle:
            for first, last in ranges:
                handle.seek(first)
                part = handle.read(last - first)
                if len(part) < last - first:
                    raise EOFError(f"the file ends before byte {last}")
                data[first - begin : last - begin] = part
        reader = pq.ParquetFile(_FilePart(data, begin), metadata=footer, pre_buffer=False)
        return reader.read_row_group(group, columns=self.columns, use_threads=False)

    def _read_footer(self, file: str) -> pq.FileMetaData:
        with self._open(file) as handle:
            return pq.read_metadata(handle)

    def _open(self, file: str) -> Any:
        if not file.startswith("hf://"):
            return open(file, "rb")
        # No read-ahead: a row is one request for exactly its bytes.
        return HfFileSystem(token=self.token).open(file, "rb", cache_type="none")


def _byte_ranges(group: pq.RowGroupMetaData, columns: list[str]) -> list[tuple[int, int]]:
    """Where columns of a row group lie in their file: `(first, end)`, in order, neighbors as one."""
    chunks = []
    for column in map(group.column, range(group.num_columns)):
        if column.path_in_schema.partition(".")[0] in columns:
            first = column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset
            chunks.append((first, first + column.total_compressed_size))
    ranges: list[tuple[int, int]] = []
    for first, end in sorted(chunks):
        if ranges and first - ranges[-1][1] <= MAX_GAP_BYTES:
            first = ranges.pop()[0]
        ranges.append((first, end))
    return ranges


class _FilePart(io.BytesIO):
    """A part of a file, whose places are those in the file."""

    def __init__(self, data: bytearray, begin: int):
        super().__init__(data)
        self._begin = begin

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return super().seek(offset - self._begin if whence == io.SEEK_SET else offset, whence) + self._begin

    def tell(self) -> int:
        return super().tell() + self._begin


def flow_is_sparse(rows: Dataset | ParquetRows) -> bool:
    """Whether the ground truth is scattered, to be never interpolated: any of it is in KITTI's PNG.

    The same is asked of the user's own pairs in files (`flow_data.datasets.is_sparse`).
    """
    if isinstance(rows, ParquetRows):
        names = rows.flow_names()
    else:
        stored = rows.select_columns("flow").data["flow"].combine_chunks()
        names = [name or "" for name in stored.field("path").to_pylist()]
    return any(PurePath(name).suffix.lower() == ".png" for name in names)
