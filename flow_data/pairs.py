"""The user's own pairs: a table of paths, or a folder.

Tables are those of `flow_data.pair_tables`. A folder is one of

- a folder with `pairs.csv` or `pairs.jsonl`;
- sub-folders `image1/`, `image2/`, `flow/` and `valid/`, of which a pair's files have the same stem;
- a folder with a single table of another name;
- files `NAME_img1.*`, `NAME_img2.*`, `NAME_flow.*` and `NAME_valid.*`.

Flow in a `.png` is KITTI's format: ground truth at some pixels, which is augmented without interpolation
(`flow_data.datasets.is_sparse`).
"""

import logging
import os
import re
from collections import defaultdict
from collections.abc import Collection, Mapping

import PIL.Image
from datasets import Dataset

from flow_data.file_names import normalize
from flow_data.flow_io import FLOW_SUFFIXES
from flow_data.pair_tables import MASK_SUFFIXES, TABLE_SUFFIXES, read_table
from flow_data.pairing import Pair, absolute, first_few, listing, to_dataset, validate_choice

logger = logging.getLogger("flow_data.datasets")

LAYOUT = (
    "pairs.csv or pairs.jsonl with columns image1, image2, flow; or sub-folders image1, image2, flow; or files "
    "NAME_img1.png, NAME_img2.png, NAME_flow.flo"
)


def pairs(root: str | os.PathLike[str], split: str) -> Dataset:
    """The user's own pairs; returns and raises what `flow_data.datasets.load_source` does.

    Args:
        root: a table or a folder, as this module's docstring tells.
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
    return to_dataset("pairs", records, os.path.dirname(path), LAYOUT, truth=any(pair.flow for pair in records))


def _of_folder(path: str, sub_folders: bool) -> Dataset:
    """The pairs of `image1/`, `image2/`, ... or of `NAME_img1.*`, `NAME_img2.*`, ... in a folder."""
    pictures = _picture_suffixes()
    kinds = {"image1": pictures, "image2": pictures, "flow": FLOW_SUFFIXES, "valid": (*pictures, ".npy")}
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
    truth = bool(found["flow"]) or (sub_folders and os.path.isdir(f"{path}/flow"))
    return to_dataset("pairs", records, path, LAYOUT, truth=truth)


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


def _picture_suffixes() -> tuple[str, ...]:
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
