"""Tables of the user's own pairs: CSV with a header, or JSONL (an object a line), with columns

- `image1`, `image2`: pictures of any format that Pillow reads;
- `flow`: a flow file of any format of `flow_data.flow_io`; a table that names none has no ground truth;
- `valid`, optional: a mask, grey `.png` or `.npy`, of which what is not 0 is valid;
- `id`, optional: by default the stem of the flow's file name, else of the first frame's; where stems repeat, the path
  without suffix.

Paths are relative to the table's own folder, or absolute, and may differ in Unicode normalization from those on the
disk. Other columns are no matter.
"""

import csv
import functools
import io
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flow_data.file_names import find_name, find_path, index_names
from flow_data.flow_io import FLOW_SUFFIXES
from flow_data.pairing import Pair, first_few

logger = logging.getLogger(__name__)

TABLE_SUFFIXES = (".csv", ".jsonl")
MASK_SUFFIXES = (".png", ".npy")

Cells = Mapping[str | None, Any]  # a line of a table, column -> what it says; None -> what is wrong with it


def read_table(path: str) -> list[Pair]:
    """The pairs of a table; lines that cannot be used are counted and named in one warning.

    Args:
        path: absolute.

    Returns:
        Pairs whose files are there, either all with flow or all without.

    Raises:
        ValueError: no line can be used, or the file is no such table.
    """
    folder = os.path.dirname(path)
    find_folder, list_once = functools.cache(find_path), functools.cache(_files_in)
    read: dict[int, Pair] = {}
    faults: dict[int, str] = {}
    for line, cells in _lines(path):
        try:
            read[line] = _read_line(cells, folder, find_folder, list_once)
        except ValueError as error:
            faults[line] = str(error)
    if any(pair.flow for pair in read.values()):
        faults |= {line: "no flow" for line, pair in read.items() if not pair.flow}

    usable = {line: pair for line, pair in read.items() if line not in faults}
    stems = Counter(_stem(pair) for pair in usable.values() if not pair.id)
    taken = {pair.id for pair in usable.values()}
    records: dict[str, Pair] = {}
    seen: dict[Pair, int] = {}
    for line, pair in usable.items():
        if pair in seen:
            faults[line] = f"the same as line {seen[pair]}"
            continue
        seen[pair] = line
        id = pair.id or _stem(pair)
        if not pair.id and (stems[id] > 1 or id in taken):  # several pairs may share a flow: renderings of one scene
            paths = (os.path.relpath(str(path), folder) for path in (pair.flow or pair.image1, pair.image1))
            names = (*(os.path.splitext(path)[0] for path in paths), f"line {line}")
            id = next(name for name in names if name not in records and name not in taken)
        if id in records:
            faults[line] = f"id {id} again"
        else:
            records[id] = pair._replace(id=id)

    told = first_few([f"line {line} ({fault})" for line, fault in sorted(faults.items())])
    if not records:
        raise ValueError(f"pairs: no usable pair in {path}: {told or 'it has no lines'}")
    if faults:
        logger.warning("pairs: left out %d lines of %s: %s", len(faults), path, told)
    return list(records.values())


def _files_in(folder: str) -> dict[str, str]:
    """An index (`flow_data.file_names`) of the files in a folder; empty if there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            return index_names(entry.name for entry in entries if not entry.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return {}


def _stem(pair: Pair) -> str:
    return os.path.splitext(os.path.basename(pair.flow or str(pair.image1)))[0]


def _read_line(
    cells: Cells, folder: str, find_folder: Callable[[str], str], list_once: Callable[[str], Mapping[str, str]]
) -> Pair:
    """One line's pair, its id "" where the table gives none; ValueError says what is wrong with the line.

    Args:
        cells: of the line.
        folder: that relative paths begin at.
        find_folder: `find_path`, which is asked for the same folders again and again.
        list_once: `_files_in`, likewise.
    """
    if None in cells:
        raise ValueError(cells[None] if isinstance(cells[None], str) else "more cells than columns")
    paths: dict[str, str | None] = {}
    for column in ("image1", "image2", "flow", "valid"):
        name = cells.get(column)
        if not isinstance(name, str | None):
            raise ValueError(f"{column} is not text")
        name = (name or "").strip()
        if not name and column.startswith("image"):
            raise ValueError(f"no {column}")
        path = os.path.abspath(os.path.join(folder, os.path.expanduser(name)))
        if name:
            parent = find_folder(os.path.dirname(path))
            try:
                found = find_name(os.path.basename(path), list_once(parent))
            except OSError as error:  # a folder that may not be read, a name that is too long
                raise ValueError(f"{error.strerror}: {name}") from error
            if found is None:
                raise ValueError(f"no such file: {name}")
            path = os.path.join(parent, found)
        for kind, suffixes in (("flow", FLOW_SUFFIXES), ("valid", MASK_SUFFIXES)):
            if name and column == kind and not name.lower().endswith(suffixes):
                raise ValueError(f"{kind} does not end in {', '.join(suffixes)}: {name}")
        paths[column] = path if name else None
    id = cells.get("id")
    if not isinstance(id, str | int | None) or isinstance(id, bool):
        raise ValueError("id is not text")
    return Pair("" if id is None else str(id).strip(), **paths)


def _lines(path: str) -> Iterator[tuple[int, Cells]]:
    """(line number, cells) of every line that is not empty.

    Raises:
        ValueError: another suffix, not UTF-8, no such columns, or CSV that cannot be told apart into cells.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in TABLE_SUFFIXES:
        raise ValueError(
            f"pairs: pairs must be a folder or a table ending in one of {', '.join(TABLE_SUFFIXES)}; got {path}"
        )
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: a table must be in UTF-8: {error}") from error
    return _csv_lines(text, path) if suffix == ".csv" else _json_lines(text)


def _csv_lines(text: str, path: str) -> Iterator[tuple[int, Cells]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
    try:
        columns = [(name or "").strip() for name in reader.fieldnames or []]
        if not {"image1", "image2"} <= set(columns):
            received = ", ".join(columns) or "nothing"
            raise ValueError(f"{path}: the first line must have the columns image1, image2, flow; got {received}")
        reader.fieldnames = columns
        for cells in reader:
            yield reader.line_num, cells
    except csv.Error as error:
        raise ValueError(f"{path}, after line {reader.line_num}: {error}") from error


def _json_lines(text: str) -> Iterator[tuple[int, Cells]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            cells = json.loads(line)
        except (ValueError, RecursionError):
            cells = None
        yield number, cells if isinstance(cells, dict) else {None: "not a JSON object"}
