"""The published optical-flow data sets as `datasets.Dataset`, one function each: root, split -> file records.

Nothing is converted or cached: a record holds paths, and its images and flow are decoded when it is looked at. Pairs
are made by name, never by list position: every flow file looks for its two frames, as a folder may hold more frames
than flows. Layouts and counts are those of the data sets' own downloads; `root` is always the data set's own folder.

Every function returns and raises what `load_source` does.
"""

import difflib
import logging
import os
import re
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset

from flow_data.features import FLOW_FEATURES
from flow_data.synthetic import SyntheticOptions, synthetic

logger = logging.getLogger(__name__)

SPARSE_SOURCES = frozenset({"kitti_2012", "kitti_2015", "hd1k"})  # ground truth at some pixels: never interpolate it


class SourceSpec(NamedTuple):
    """What is known of a data source.

    Args:
        folder: its folder under `data_root`; None if it reads no files.
        load: root, split -> Dataset with `FLOW_FEATURES`.
        splits: the split names it has.
        complete: split -> number of pairs in the complete download, where published.
        training_split: the split that is trained on unless one is asked for.
    """

    folder: str | None
    load: Callable[..., Dataset]
    splits: tuple[str, ...]
    complete: Mapping[str, int]
    training_split: str = "training"


class Pair(NamedTuple):
    """File record: paths of two frames and of the flow between them (None in a split without ground truth)."""

    id: str
    image1: str
    image2: str
    flow: str | None


def load_source(name: str, root: str | os.PathLike[str] | None, split: str | None = None) -> Dataset:
    """Load a data set by name.

    Args:
        name: a key of `SOURCES`.
        root: the data set's own folder, for example `data_root / SOURCES[name].folder`; None for a source without one.
        split: one of `SOURCES[name].splits`; None is its training split. `all` is every pair with ground truth.

    Returns:
        Records `id, image1, image2, flow`, in natural order of their ids, decoded lazily.

    Raises:
        ValueError: unknown name or split, or a malformed split file.
        FileNotFoundError: there is no such folder, no pair in it, or no split file.
    """
    check_source(name)
    spec = SOURCES[name]
    split = spec.training_split if split is None else split
    check_split(name, split)
    dataset = spec.load(root, split)
    complete = spec.complete.get(split, len(dataset))
    if len(dataset) != complete:
        logger.warning(
            "%s: %d pairs in split %s, the complete data set has %d (%s)", name, len(dataset), split, complete, root
        )
    return dataset


def flying_chairs(root: str | os.PathLike[str], split: str) -> Dataset:
    """FlyingChairs (Dosovitskiy et al. 2015): `data/%05d_{img1,img2}.ppm`, `data/%05d_flow.flo`; ids as `00001`.

    Args:
        root: folder `FlyingChairs_release`. Line n of its FlyingChairs_train_val.txt puts pair n into training (1) or
            validation (2).
        split: training, validation or all; `all` needs no split file.
    """
    check_split("flying_chairs", split)
    folder = f"{_absolute(root)}/data"
    numbers = [number for (number,) in _matches(folder, r"(\d+)_flow\.flo")]
    if split != "all":
        lines = _read_chairs_split(Path(root).expanduser() / "FlyingChairs_train_val.txt")
        assigned = {number: lines[int(number) - 1] for number in numbers if 0 < int(number) <= len(lines)}
        if len(assigned) < len(numbers):
            left_out = _first_few([number for number in numbers if number not in assigned])
            logger.warning("flying_chairs: pairs beyond the split file's %d lines: %s", len(lines), left_out)
        wanted = {"training": "1", "validation": "2"}[split]
        numbers = [number for number in numbers if assigned.get(number) == wanted]
    pairs = [
        Pair(number, *(f"{folder}/{number}_{kind}" for kind in ("img1.ppm", "img2.ppm", "flow.flo")))
        for number in numbers
    ]
    return _to_dataset("flying_chairs", pairs, folder, f"00001_{{img1,img2}}.ppm, 00001_flow.flo of split {split}")


def flying_things(root: str | os.PathLike[str], split: str, render_pass: str = "clean") -> Dataset:
    """FlyingThings3D (Mayer et al. 2016), left camera, forward and backward; ids as `TRAIN/A/0000/into_future/0006`.

    `frames_{clean,final}pass/TRAIN/A/0000/left/0006.png` and
    `optical_flow/TRAIN/A/0000/into_{future,past}/left/OpticalFlowInto{Future,Past}_0006_L.pfm`. Flow into the past
    goes from frame t to t - 1. The forward flow of a sequence's last frame and the backward flow of its first have no
    second frame: they are published but cannot be used.

    Args:
        root: folder `FlyingThings3D`.
        split: training (TRAIN), test (TEST) or all.
        render_pass: clean or final.
    """
    source = f"flying_things_{render_pass}"
    check_split(source, split)
    flow_root, frame_root = f"{_absolute(root)}/optical_flow", f"{_absolute(root)}/frames_{render_pass}pass"
    parts = {"training": ["TRAIN"], "test": ["TEST"], "all": ["TEST", "TRAIN"]}[split]
    letters = [f"{part}/{letter}" for part in parts for letter in _listing(f"{flow_root}/{part}")]
    sequences = [f"{letter}/{name}" for letter in letters for name in _listing(f"{flow_root}/{letter}")]
    pairs: list[Pair] = []
    unpaired: set[str] = set()
    for sequence in sequences:
        frames = f"{frame_root}/{sequence}/left"
        for direction, title, step in (("into_future", "IntoFuture", 1), ("into_past", "IntoPast", -1)):
            flows = f"{flow_root}/{sequence}/{direction}/left"
            numbers = [number for (number,) in _matches(flows, rf"OpticalFlow{title}_(\d+)_L\.pfm")]
            ends = numbers[-1:] if step > 0 else numbers[:1]
            unpaired.update(f"{sequence}/{direction}/{number}" for number in ends)
            pairs += [
                Pair(
                    f"{sequence}/{direction}/{number}",
                    f"{frames}/{number}.png",
                    f"{frames}/{_step(number, step)}.png",
                    f"{flows}/OpticalFlow{title}_{number}_L.pfm",
                )
                for number in numbers
            ]
    layout = f"{'|'.join(parts)}/A/0000/into_future/left/OpticalFlowIntoFuture_0006_L.pfm, frames in {frame_root}"
    return _to_dataset(source, pairs, flow_root, layout, unpaired)


def sintel(root: str | os.PathLike[str], split: str, render_pass: str = "clean") -> Dataset:
    """MPI-Sintel (Butler et al. 2012): `training/{clean,final,flow}/SCENE/frame_0001.*`; ids as `alley_1/frame_0001`.

    The `invalid` masks are not used, as in RAFT's own evaluation.

    Args:
        root: folder `Sintel`.
        split: training, test (without ground truth: `flow` is None) or all, which is training.
        render_pass: clean or final.
    """
    source = f"sintel_{render_pass}"
    check_split(source, split)
    base = f"{_absolute(root)}/{'test' if split == 'test' else 'training'}"
    frames, flows = f"{base}/{render_pass}", f"{base}/flow"
    start, suffix = (frames, "png") if split == "test" else (flows, "flo")  # what a pair begins with
    pairs: list[Pair] = []
    unpaired: set[str] = set()
    for scene in _listing(start):
        numbers = [number for (number,) in _matches(f"{start}/{scene}", rf"frame_(\d+)\.{suffix}")]
        if split == "test":
            unpaired.update(f"{scene}/frame_{number}" for number in numbers[-1:])  # no frame follows it
        pairs += [
            Pair(
                f"{scene}/frame_{number}",
                f"{frames}/{scene}/frame_{number}.png",
                f"{frames}/{scene}/frame_{_step(number, 1)}.png",
                None if split == "test" else f"{flows}/{scene}/frame_{number}.flo",
            )
            for number in numbers
        ]
    layout = f"SCENE/frame_0001.{suffix}, and frame_0001.png and frame_0002.png in {frames}/SCENE"
    return _to_dataset(source, pairs, start, layout, unpaired)


def kitti_2015(root: str | os.PathLike[str], split: str) -> Dataset:
    """KITTI-2015 (Menze and Geiger 2015): `training/{image_2,flow_occ}/000010_10.png`, frame 2 `_11`; ids as `000010`.

    Args:
        root: folder `KITTI`.
        split: training, testing (without ground truth: `flow` is None) or all, which is training.
    """
    check_split("kitti_2015", split)
    base = f"{_absolute(root)}/{'testing' if split == 'testing' else 'training'}"
    frames, flows = f"{base}/image_2", f"{base}/flow_occ"
    start = frames if split == "testing" else flows  # what a pair begins with
    pairs = [
        Pair(
            number,
            f"{frames}/{number}_10.png",
            f"{frames}/{number}_11.png",
            None if split == "testing" else f"{flows}/{number}_10.png",
        )
        for (number,) in _matches(start, r"(\d+)_10\.png")
    ]
    return _to_dataset("kitti_2015", pairs, start, f"000000_10.png, and 000000_10.png and 000000_11.png in {frames}")


def hd1k(root: str | os.PathLike[str], split: str) -> Dataset:
    """HD1K (Kondermann et al. 2016); ids as `000000_0010`.

    `hd1k_flow_gt/flow_occ/000000_0010.png` and `hd1k_input/image_2/000000_0010.png`: the first number is the
    sequence's, the second the frame's. The flow of a sequence's last frame has no second frame and cannot be used.

    Args:
        root: folder `HD1K`.
        split: training or all, which are the same.
    """
    check_split("hd1k", split)
    flows, frames = f"{_absolute(root)}/hd1k_flow_gt/flow_occ", f"{_absolute(root)}/hd1k_input/image_2"
    names = _matches(flows, r"(\d+)_(\d+)\.png")
    pairs = [
        Pair(
            f"{sequence}_{number}",
            f"{frames}/{sequence}_{number}.png",
            f"{frames}/{sequence}_{_step(number, 1)}.png",
            f"{flows}/{sequence}_{number}.png",
        )
        for sequence, number in names
    ]
    last_of_sequence = {sequence: f"{sequence}_{number}" for sequence, number in names}
    layout = f"000000_0010.png, and 000000_0010.png and 000000_0011.png in {frames}"
    return _to_dataset("hd1k", pairs, flows, layout, last_of_sequence.values())


def middlebury(root: str | os.PathLike[str], split: str) -> Dataset:
    """Middlebury (Baker et al. 2011): `other-gt-flow/SCENE/flow10.flo`, `other-data/SCENE/frame1{0,1}.png`; id SCENE.

    Args:
        root: folder `Middlebury`.
        split: training or all, which are the same.
    """
    check_split("middlebury", split)
    flows, frames = f"{_absolute(root)}/other-gt-flow", f"{_absolute(root)}/other-data"
    pairs = [
        Pair(scene, f"{frames}/{scene}/frame10.png", f"{frames}/{scene}/frame11.png", f"{flows}/{scene}/flow10.flo")
        for scene in _listing(flows)
        if "flow10.flo" in _listing(f"{flows}/{scene}")
    ]
    return _to_dataset("middlebury", pairs, flows, f"SCENE/flow10.flo, and frame10.png, frame11.png in {frames}/SCENE")


def default_synthetic(root: str | os.PathLike[str] | None, split: str) -> Dataset:
    """Synthetic pairs as `flow_data.synthetic` draws them unless told otherwise; `root` is a folder of textures."""
    check_split("synthetic", split)
    return synthetic(SyntheticOptions(textures=None if root is None else os.fspath(root)), split=split)


# Complete counts: RAFT's data loaders on complete downloads; where none is given, none is compared.
SOURCES: dict[str, SourceSpec] = {
    "flying_chairs": SourceSpec(
        "FlyingChairs_release",
        flying_chairs,
        splits=("training", "validation", "all"),
        complete={"training": 22232, "validation": 640, "all": 22872},
    ),
    "kitti_2015": SourceSpec("KITTI", kitti_2015, ("training", "testing", "all"), {"training": 200, "all": 200}),
    "hd1k": SourceSpec("HD1K", hd1k, ("training", "all"), {"training": 1047, "all": 1047}),
    "middlebury": SourceSpec("Middlebury", middlebury, ("training", "all"), {"training": 8, "all": 8}),
    "synthetic": SourceSpec(None, default_synthetic, ("training", "validation", "all"), complete={}),
}
for _pass in ("clean", "final"):
    SOURCES[f"flying_things_{_pass}"] = SourceSpec(
        "FlyingThings3D", partial(flying_things, render_pass=_pass), ("training", "test", "all"), {"training": 40302}
    )
    SOURCES[f"sintel_{_pass}"] = SourceSpec(
        "Sintel", partial(sintel, render_pass=_pass), ("training", "test", "all"), {"training": 1041, "all": 1041}
    )


def check_source(name: str) -> None:
    """Raise ValueError, with the nearest right name, where there is no such source."""
    if name not in SOURCES:
        nearest = difflib.get_close_matches(name, SOURCES, n=1, cutoff=0)[0]
        raise ValueError(f"unknown source {name!r}: did you mean {nearest!r}? There are {', '.join(sorted(SOURCES))}")


def check_split(name: str, split: str) -> None:
    """Raise ValueError, with the right names, where a source has no such split."""
    check_source(name)
    if split not in SOURCES[name].splits:
        raise ValueError(f"{name}: expected a split of {', '.join(SOURCES[name].splits)}, received {split!r}")


def _read_chairs_split(path: Path) -> list[str]:
    """The "1" or "2" of every line of FlyingChairs_train_val.txt."""
    if not path.is_file():
        raise FileNotFoundError(f"flying_chairs: no split file at {path}; split 'all' needs none")
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").rstrip().split("\n")]
    for number, line in enumerate(lines, start=1):
        if line not in ("1", "2"):
            raise ValueError(f"{path}, line {number}: expected 1 (training) or 2 (validation), received {line!r:.80}")
    return lines


def _absolute(root: str | os.PathLike[str]) -> str:
    """Records outlive a change of the working directory."""
    return os.path.abspath(os.path.expanduser(root))


def _listing(folder: str) -> set[str]:
    """Names in a folder; none if there is no such folder. Asking for each file would be slow on FlyingThings3D."""
    try:
        return set(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return set()


def _matches(folder: str, pattern: str) -> list[tuple[str, ...]]:
    """The groups, all of digits, of every name in a folder that is entirely `pattern`, ordered as numbers."""
    found = [match.groups() for match in map(re.compile(pattern, re.ASCII).fullmatch, _listing(folder)) if match]
    return sorted(found, key=lambda groups: [int(group) for group in groups])


def _step(number: str, step: int) -> str:
    """The frame number `step` later, with as many digits."""
    return f"{int(number) + step:0{len(number)}d}"


def _natural(id: str) -> list[str | int]:
    """Sort key under which frame_2 comes before frame_10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", id)]


def _first_few(names: list[str]) -> str:
    return f"{', '.join(names[:3])}, ... ({len(names)})" if len(names) > 3 else ", ".join(names)


def _to_dataset(
    source: str, pairs: list[Pair], folder: str, layout: str, unpaired: Collection[str] = frozenset()
) -> Dataset:
    """Keep the pairs that have both frames and build the data set, or say why there is none.

    Args:
        source: name in messages.
        pairs: made from files that exist in `folder`; their frames may not.
        folder: where those files were looked for.
        layout: what was expected in there.
        unpaired: ids at the end of a sequence; whether they have a second frame is no matter.
    """
    listings: dict[str, set[str]] = {}

    def exists(path: str) -> bool:
        parent, name = os.path.split(path)
        if parent not in listings:
            listings[parent] = _listing(parent)
        return name in listings[parent]

    pairs = sorted(pairs, key=lambda pair: _natural(pair.id))
    complete = [pair for pair in pairs if exists(pair.image1) and exists(pair.image2)]
    if not complete:
        fault = "holds no such file" if os.path.isdir(folder) else "does not exist"
        if pairs:
            fault = f"holds {len(pairs)} of them, but without their frames: {_first_few([pair.id for pair in pairs])}"
        raise FileNotFoundError(f"{source}: no pairs: expected {layout}; looked in {folder}, which {fault}")
    found = {pair.id for pair in complete}
    missing = [pair.id for pair in pairs if pair.id not in found and pair.id not in unpaired]
    if missing:
        logger.warning("%s: left out %d pairs without their frames: %s", source, len(missing), _first_few(missing))
    columns = zip(Pair._fields, zip(*complete, strict=True), strict=True)
    return Dataset.from_dict({name: list(column) for name, column in columns}, features=FLOW_FEATURES)
