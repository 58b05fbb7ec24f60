"""Match files to pairs by name; what does not match is counted and named.

Files are matched by name, never by list position, as a folder may hold more frames than flows. A folder is listed once
and no file is checked on its own: FlyingThings3D has 200,000 of them.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from flow_data.file_names import find_name, find_path, index_names, natural_order

if TYPE_CHECKING:  # takes a second, and the command line needs the names of the data sets only
    from datasets import Dataset, Features

logger = logging.getLogger(__name__)

Choice = TypeVar("Choice")


class Pair(NamedTuple):
    """File record: paths of two frames, of the flow between them and of its mask; None where there is no such file."""

    id: str
    image1: str | None
    image2: str | None
    flow: str | None
    valid: str | None = None


def validate_choice(source: str, what: str, choice: str, choices: Mapping[str, Choice]) -> Choice:
    """What a choice, of a split for instance, stands for.

    Args:
        source: name of the data set, which begins the message.
        what: name of what is chosen.
        choice: a key of `choices`.
        choices: key -> what it stands for.

    Raises:
        ValueError: `choice` is no key; the message has all keys.
    """
    if choice not in choices:
        raise ValueError(f"{source}: {what} must be one of {', '.join(choices)}; got {choice!r}")
    return choices[choice]


def absolute(root: str | os.PathLike[str]) -> str:
    """The absolute path of a file or folder, as the disk has it: rows stay valid if the working directory changes."""
    return find_path(os.path.abspath(os.path.expanduser(root)))


def listing(*folders: str) -> set[str]:
    """Names in any of some folders; none of a folder that does not exist.

    Of names in different folders that differ in Unicode normalization only, the first folder's is given.
    """
    names: set[str] = set()
    for folder in folders:
        try:
            found = os.listdir(find_path(folder))
        except (FileNotFoundError, NotADirectoryError):
            continue
        if not names:
            names = set(found)
            continue
        index, known = index_names(names), set(found)
        matches = {name: find_name(name, index) for name in known}
        names |= {name if match is None or match in known else match for name, match in matches.items()}
    return names


def files(folder: str, *patterns: str) -> dict[str, str]:
    """The files of a folder whose whole name is one of the patterns: its group -> path. Later patterns win."""
    folder = find_path(folder)
    names = listing(folder)
    matches = (map(re.compile(pattern, re.ASCII).fullmatch, names) for pattern in patterns)
    return {match[1]: f"{folder}/{match[0]}" for found in matches for match in found if match}


def shift(number: str, step: int) -> str:
    """The frame number `step` later, with as many digits."""
    return f"{int(number) + step:0{len(number)}d}"


def consecutive_pairs(
    prefix: str,
    frames: Mapping[str, str],
    flows: Mapping[str, str] | None,
    masks: Mapping[str, str] | None = None,
    step: int = 1,
    flow_at_end: bool = False,
) -> list[Pair]:
    """Every pair of a sequence of which some file is there; its id is `prefix` and the number of its first frame.

    Args:
        prefix: of the ids.
        frames: number -> path.
        flows: number of the first frame -> path; None in a split without ground truth.
        masks: number of the first frame -> path; None where there are no masks.
        step: from the first frame to the second; -1 for backward flow.
        flow_at_end: the sequence's end has a flow although no frame comes after it; that flow is not missing a frame.
    """
    numbers = sorted({*frames, *(flows or ())}, key=int, reverse=step < 0)
    ends = set(numbers[-1:]) if flows is None or flow_at_end else set()
    if flows is None:  # a missing frame makes the pairs before and after it incomplete
        numbers += [shift(number, -step) for number in numbers[1:]]
    return [
        Pair(
            f"{prefix}{number}",
            frames.get(number),
            frames.get(shift(number, step)),
            (flows or {}).get(number),
            (masks or {}).get(number),
        )
        for number in {*numbers} - ends
    ]


def to_dataset(
    source: str,
    pairs: list[Pair],
    folder: str,
    layout: str,
    *,
    ground_truth: bool = True,
    features: Features | None = None,
    masks: Mapping[str, Mapping[str, str]] | None = None,
) -> Dataset:
    """Keep the complete pairs and build the data set, or report why there is none.

    Three things are left out, each counted and named in one warning: pairs of which a frame is missing, flows without
    any frame, and (where there is ground truth) image pairs without flow.

    Args:
        source: name in messages.
        pairs: all of which some file is there, in any order.
        folder: where files were looked for.
        layout: what was expected in there.
        ground_truth: a pair needs a flow.
        features: of the rows; None: `FLOW_FEATURES`.
        masks: further columns, column -> id -> path; null where a pair has none.

    Returns:
        The rows, in natural order of their ids.

    Raises:
        FileNotFoundError: no pair is complete.
    """
    pairs = sorted(pairs, key=lambda pair: natural_order(pair.id))
    complete = []
    incomplete: dict[str, list[str]] = {
        "pairs for a missing frame": [],
        "flows without images": [],
        "image pairs without flow": [],
    }
    for pair in pairs:
        frames = (pair.image1 is not None) + (pair.image2 is not None)
        if ground_truth and pair.flow is None:
            if frames == 2:  # a single frame may be a sequence's end
                incomplete["image pairs without flow"].append(pair.id)
        elif frames == 2:
            complete.append(pair)
        else:
            incomplete["pairs for a missing frame" if frames else "flows without images"].append(pair.id)

    left_out = [f"left out {len(ids)} {what}: {first_few(ids)}" for what, ids in incomplete.items() if ids]
    if not complete:
        problem = "holds no such file" if os.path.isdir(folder) else "does not exist"
        if left_out:
            problem = f"{problem if problem == 'does not exist' else 'holds no complete pair'}; {'; '.join(left_out)}"
        raise FileNotFoundError(f"{source}: no pairs: there must be {layout}; looked in {folder}, which {problem}")
    for message in left_out:
        logger.warning("%s: %s", source, message)
    columns = dict(zip(Pair._fields, map(list, zip(*complete, strict=True)), strict=True))
    for column, paths in (masks or {}).items():
        columns[column] = [paths.get(pair.id) for pair in complete]
    from datasets import Dataset

    from flow_data.features import FLOW_FEATURES

    return Dataset.from_dict(columns, features=FLOW_FEATURES if features is None else features)


def first_few(names: list[str]) -> str:
    """The first three names."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
