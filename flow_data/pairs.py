"""The user's own pairs: a table of paths, or a folder.

A table is CSV with a header, or JSONL (an object a line), with columns

- `image1`, `image2`: images of any format that Pillow reads;
- `flow`: a flow file of any format of `flow_data.flow_io`; a table that names none has no ground truth;
- `valid`, optional: a mask, gray `.png` or `.npy`, in which what is not 0 is valid;
- `id`, optional: by default the stem of the flow's file name, else of the first frame's; where stems repeat, the path
  without suffix.

Paths are relative to the table's own folder, or absolute, and may differ in Unicode normalization from those on the
disk. Other columns are ignored.

A folder is one of

- a folder with `pairs.csv` or `pairs.jsonl`;
- sub-folders `image1/`, `image2/`, `flow/` and `valid/`, of which a pair's files have the same stem;
- a folder with a single table of another name;
- files `NAME_img1.*`, `NAME_img2.*`, `NAME_flow.*` and `NAME_valid.*`.

Flow in a `.png` is KITTI's format: ground truth at some pixels, which is augmented without interpolation
(`flow_data.datasets.is_sparse`).
"""

from __future__ import annotations

import csv
import functools
import io
import json
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image

from flow_data.file_names import find_name, find_path, index_names, normalize
from flow_data.flow_io import FLOW_SUFFIXES
from flow_data.pairing import Pair, absolute, first_few, listing, to_dataset, validate_choice

if TYPE_CHECKING:  # takes a second, and the command line needs the names of the data sets only
    from datasets import Dataset

logger = logging.getLogger("flow_data.datasets")

TABLE_SUFFIXES = (".csv", ".jsonl")
MASK_SUFFIXES = (".png", ".npy")
Cells = Mapping[str | None, Any]  # a line of a table, column -> its content; None -> what is wrong with the line

LAYOUT = (
    "pairs.csv or pairs.jsonl with columns image1, image2, flow; or sub-folders image1, image2, flow; or files "
    "NAME_img1.png, NAME_img2.png, NAME_flow.flo"
)


def pairs(root: str | os.PathLike[str], split: str) -> Dataset:
    """The user's own pairs; returns and raises what `flow_data.datasets.load_source` does.

    Args:
        root: a table or a folder, as this module's docstring describes.
        split: training or all, which are the same.

    Raises:
        ValueError: a table without a usable pair, or in which nothing can be read; two tables, or two files of a
            folder, of which either could be meant.
    """
    validate_choice("pairs", "split", split, {"training": None, "all": None})
    path = absolute(root)
    if os.path.isfile(path):
        return _of_table(path)
    names = {name for name in listing(path) if not name.startswith(".")}
    tables = sorted(name for name in names if name.lower().endswith(TABLE_SUFFIXES))
    preferred = [name for name in tables if name.lower() in ("pairs.csv", "pairs.jsonl")]
    sub_folders = {"image1", "image2"} <= names
    if preferred or (tables and not sub_folders):
        tables = preferred or tables
        if len(tables) > 1:
            raise ValueError(f"pairs: there must be one table in {path}; got {', '.join(tables)}: give its path")
        return _of_table(f"{path}/{tables[0]}")
    return _of_folder(path, sub_folders)


def _of_table(path: str) -> Dataset:
    records = read_table(path)
    return to_dataset("pairs", records, os.path.dirname(path), LAYOUT, ground_truth=any(pair.flow for pair in records))


def _of_folder(path: str, sub_folders: bool) -> Dataset:
    """The pairs of `image1/`, `image2/`, ... or of `NAME_img1.*`, `NAME_img2.*`, ... in a folder."""
    image_suffixes = _image_suffixes()
    kinds = {"image1": image_suffixes, "image2": image_suffixes, "flow": FLOW_SUFFIXES}
    kinds["valid"] = (*image_suffixes, ".npy")
    if sub_folders:
        found = {kind: _by_stem(f"{path}/{kind}", "", suffixes) for kind, suffixes in kinds.items()}
    else:
        endings = {"image1": "_img1", "image2": "_img2", "flow": "_flow", "valid": "_valid"}
        found = {kind: _by_stem(path, endings[kind], suffixes) for kind, suffixes in kinds.items()}
    _unify_stems(found)
    for mask in found["valid"].values():
        if not mask.lower().endswith(MASK_SUFFIXES):  # better than to train on what it masks
            raise ValueError(f"pairs: a mask must end in one of {', '.join(MASK_SUFFIXES)}; got {mask}")
    stem_set = {*found["image1"], *found["image2"], *found["flow"]}
    if orphans := sorted(set(found["valid"]) - stem_set):
        logger.warning("pairs: %d masks without a pair: %s", len(orphans), first_few(orphans))
    records = [Pair(stem, *(found[kind].get(stem) for kind in kinds)) for stem in stem_set]
    ground_truth = bool(found["flow"]) or (sub_folders and os.path.isdir(f"{path}/flow"))
    return to_dataset("pairs", records, path, LAYOUT, ground_truth=ground_truth)


def _unify_stems(found: Mapping[str, dict[str, str]]) -> None:
    """Give the stems of a pair one form where they differ in Unicode normalization only.

    Args:
        found: kind -> stem -> path, which is changed. Two such stems of one kind are two pairs, and left alone.
    """
    forms = defaultdict(set)
    for of_kind in found.values():
        for stem in of_kind:
            forms[normalize(stem)].add(stem)
    for composed, stems in forms.items():
        if len(stems) > 1 and all(len(stems & of_kind.keys()) <= 1 for of_kind in found.values()):
            for of_kind in found.values():
                for stem in stems & of_kind.keys():
                    of_kind[composed] = of_kind.pop(stem)


def _image_suffixes() -> tuple[str, ...]:
    """Suffixes of what Pillow can open."""
    suffixes = PIL.Image.registered_extensions()  # loads the plugins, which fill OPEN
    return tuple(suffix for suffix, format in suffixes.items() if format in PIL.Image.OPEN)


def _by_stem(folder: str, ending: str, suffixes: Collection[str]) -> dict[str, str]:
    """Stem without ending -> path, of a folder's files with that ending and one of the suffixes.

    Raises:
        ValueError: two of them have the same stem.
    """
    found: dict[str, str] = {}
    for name in sorted(listing(folder)):
        match = re.fullmatch(rf"(.+){ending}\.[^.]+", name)
        if name.startswith(".") or not match or os.path.splitext(name)[1].lower() not in suffixes:
            continue
        if match[1] in found:
            other = os.path.basename(found[match[1]])
            raise ValueError(f"pairs: {folder}: there must be one file of a stem; got {other} and {name}")
        found[match[1]] = f"{folder}/{name}"
    return found


# ---- tables ----


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
    problems: dict[int, str] = {}
    for line, cells in _lines(path):
        try:
            read[line] = _read_line(cells, folder, find_folder, list_once)
        except ValueError as error:
            problems[line] = str(error)
    if any(pair.flow for pair in read.values()):
        problems |= {line: "no flow" for line, pair in read.items() if not pair.flow}

    usable = {line: pair for line, pair in read.items() if line not in problems}
    stems = Counter(_stem(pair) for pair in usable.values() if not pair.id)
    taken = {pair.id for pair in usable.values()}
    records: dict[str, Pair] = {}
    seen: dict[Pair, int] = {}
    for line, pair in usable.items():
        if pair in seen:
            problems[line] = f"the same as line {seen[pair]}"
            continue
        seen[pair] = line
        id = pair.id or _stem(pair)
        if not pair.id and (stems[id] > 1 or id in taken):  # several pairs may share a flow: renderings of one scene
            paths = (os.path.relpath(str(path), folder) for path in (pair.flow or pair.image1, pair.image1))
            names = (*(os.path.splitext(path)[0] for path in paths), f"line {line}")
            id = next(name for name in names if name not in records and name not in taken)
        if id in records:
            problems[line] = f"id {id} again"
        else:
            records[id] = pair._replace(id=id)

    reported = first_few([f"line {line} ({problem})" for line, problem in sorted(problems.items())])
    if not records:
        raise ValueError(f"pairs: no usable pair in {path}: {reported or 'it has no lines'}")
    if problems:
        logger.warning("pairs: left out %d lines of %s: %s", len(problems), path, reported)
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
    """One line's pair, its id "" where the table gives none; a ValueError describes what is wrong with the line.

    Args:
        cells: of the line.
        folder: that relative paths begin at.
        find_folder: `find_path`, cached, as lines share folders.
        list_once: `_files_in`, cached, as lines share folders.
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
        ValueError: another suffix, not UTF-8, no such columns, or CSV that cannot be split into cells.
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
            raise ValueError(
                f"{path}: the first line must have the columns image1 and image2, and flow for ground truth; got "
                f"{received}"
            )
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
