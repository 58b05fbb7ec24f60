"""Readers of the published optical-flow data sets, one function each: root, split -> file records.

They read the layouts of the data sets' own downloads; `root` is always the data set's own folder. Nothing is decoded
before a row is accessed. Every function returns and raises what `flow_data.datasets.load_source` does.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flow_data.pairing import (
    Pair,
    absolute,
    consecutive_pairs,
    files,
    first_few,
    listing,
    shift,
    to_dataset,
    validate_choice,
)

if TYPE_CHECKING:  # takes a second, and the command line needs the names of the data sets only
    from datasets import Dataset, Features

logger = logging.getLogger(__name__)

PASSES = {"clean": "cleanpass", "final": "finalpass"}
MIDDLEBURY_WITHOUT_GROUND_TRUTH = {"Beanbags", "DogDance", "MiniCooper", "Walking"}  # kept for interpolation


def flying_chairs(root: str | os.PathLike[str], split: str) -> Dataset:
    """FlyingChairs (Dosovitskiy et al. 2015): `data/%05d_{img1,img2}.ppm`, `data/%05d_flow.flo`; ids as `00001`.

    Args:
        root: folder `FlyingChairs_release`. Line n of its FlyingChairs_train_val.txt puts pair n into training (1) or
            validation (2).
        split: training, validation or all; `all` needs no split file.
    """
    wanted = validate_choice("flying_chairs", "split", split, {"training": "1", "validation": "2", "all": None})
    folder = f"{absolute(root)}/data"
    kinds = files(folder, r"(\d+_(?:img1\.ppm|img2\.ppm|flow\.flo))")
    numbers = {name.split("_")[0] for name in kinds}
    if wanted is not None and numbers:
        lines = _read_chairs_split(Path(root).expanduser() / "FlyingChairs_train_val.txt")
        assigned = {number: lines[int(number) - 1] for number in numbers if 0 < int(number) <= len(lines)}
        if beyond := sorted(numbers - assigned.keys()):
            count = f"{len(beyond)} pairs beyond the split file's {len(lines)} lines"
            logger.warning("flying_chairs: left out %s: %s", count, first_few(beyond))
        numbers = {number for number in numbers if assigned.get(number) == wanted}
    pairs = [
        Pair(number, *(kinds.get(f"{number}_{kind}") for kind in ("img1.ppm", "img2.ppm", "flow.flo")))
        for number in numbers
    ]
    return to_dataset("flying_chairs", pairs, folder, f"00001_{{img1,img2}}.ppm, 00001_flow.flo of split {split}")


def flying_things(
    root: str | os.PathLike[str], split: str, render_pass: str = "clean", *, cameras: Sequence[str] | None = None
) -> Dataset:
    """FlyingThings3D (Mayer et al. 2016), forward and backward flow; ids as `TRAIN/A/0000/into_future/left/0006`.

    `frames_{clean,final}pass/TRAIN/A/0000/left/0006.png` (or .webp, the smaller download) and
    `optical_flow/TRAIN/A/0000/into_{future,past}/left/OpticalFlowInto{Future,Past}_0006_L.pfm`. Flow into the past
    goes from frame t to t - 1. The forward flow of a sequence's last frame and the backward flow of its first have no
    second frame: they are published but cannot be used.

    Args:
        root: folder `FlyingThings3D`.
        split: training (TRAIN) and test (TEST), of the left camera as RAFT uses them, or all: both of both cameras.
        render_pass: clean or final.
        cameras: of left, right; by default those of the split.
    """
    folder = validate_choice("flying_things", "render_pass", render_pass, PASSES)
    source = f"flying_things_{render_pass}"
    both = {"left": "L", "right": "R"}
    parts, default_cameras = validate_choice(
        source,
        "split",
        split,
        {"training": (["TRAIN"], ["left"]), "test": (["TEST"], ["left"]), "all": (["TEST", "TRAIN"], list(both))},
    )
    cameras = default_cameras if cameras is None else cameras
    letters = {camera: validate_choice(source, "camera", camera, both) for camera in cameras}
    flow_root, frame_root = f"{absolute(root)}/optical_flow", f"{absolute(root)}/frames_{folder}"

    def below(path: str) -> set[str]:
        return listing(f"{flow_root}/{path}", f"{frame_root}/{path}")

    names = [f"{part}/{letter}" for part in parts for letter in below(part)]
    sequences = [f"{name}/{number}" for name in names for number in below(name)]
    pairs: list[Pair] = []
    for sequence in sequences:
        for camera, letter in letters.items():
            frames = files(f"{frame_root}/{sequence}/{camera}", r"(\d+)\.webp", r"(\d+)\.png")
            for direction, title, step in (("into_future", "IntoFuture", 1), ("into_past", "IntoPast", -1)):
                flows = files(
                    f"{flow_root}/{sequence}/{direction}/{camera}", rf"OpticalFlow{title}_(\d+)_{letter}\.pfm"
                )
                prefix = f"{sequence}/{direction}/{camera}/"
                pairs += consecutive_pairs(prefix, frames, flows, step=step, flow_at_end=True)
    example = f"{'|'.join(parts)}/A/0000/into_future/left/OpticalFlowIntoFuture_0006_L.pfm"
    return to_dataset(source, pairs, flow_root, f"{example}, frames in {frame_root}")


def sintel(root: str | os.PathLike[str], split: str, render_pass: str = "clean") -> Dataset:
    """MPI-Sintel (Butler et al. 2012): `training/{clean,final,flow}/SCENE/frame_0001.*`; ids as `alley_1/frame_0001`.

    Two more columns are gray images of frame 1's size: `occlusion`, 255 where a pixel is occluded in frame 2, and
    `invalid`, 255 where the flow is invalid, both else 0. They are not part of `valid`, as RAFT's own evaluation uses
    neither. Null where there is no such file (`training/{occlusions,invalid}/SCENE/frame_0001.png`).

    Args:
        root: folder `Sintel`.
        split: training, test (without ground truth: `flow` is None) or all, which is training.
        render_pass: clean or final.
    """
    validate_choice("sintel", "render_pass", render_pass, PASSES)
    source = f"sintel_{render_pass}"
    part = validate_choice(source, "split", split, {"training": "training", "test": "test", "all": "training"})
    ground_truth = part == "training"
    base = f"{absolute(root)}/{part}"
    frame_root, flow_root = f"{base}/{render_pass}", f"{base}/flow"
    pairs: list[Pair] = []
    masks: dict[str, dict[str, str]] = {"occlusion": {}, "invalid": {}}
    for scene in listing(frame_root, *([flow_root] if ground_truth else [])):
        frames = files(f"{frame_root}/{scene}", r"frame_(\d+)\.png")
        flows = files(f"{flow_root}/{scene}", r"frame_(\d+)\.flo") if ground_truth else None
        pairs += consecutive_pairs(f"{scene}/frame_", frames, flows)
        for column, folder in (("occlusion", "occlusions"), ("invalid", "invalid")) if ground_truth else ():
            found = files(f"{base}/{folder}/{scene}", r"frame_(\d+)\.png")
            masks[column].update({f"{scene}/frame_{number}": path for number, path in found.items()})
    start, suffix = (flow_root, "flo") if ground_truth else (frame_root, "png")
    layout = f"SCENE/frame_0001.{suffix}, and frame_0001.png and frame_0002.png in {frame_root}/SCENE"
    features = _sintel_features()
    return to_dataset(source, pairs, start, layout, ground_truth=ground_truth, features=features, masks=masks)


def kitti_2012(root: str | os.PathLike[str], split: str) -> Dataset:
    """KITTI-2012 (Geiger et al. 2012): `training/{image_0,flow_occ}/000010_10.png`, frame 2 `_11`; ids as `000010`.

    `image_0` is gray, as the benchmark is; where only `colored_0` is there, it is taken.

    Args:
        root: folder `KITTI2012`.
        split: training, testing (without ground truth: `flow` is None) or all, which is training.
    """
    return _kitti("kitti_2012", root, split, ("image_0", "colored_0"))


def kitti_2015(root: str | os.PathLike[str], split: str) -> Dataset:
    """KITTI-2015 (Menze and Geiger 2015): `training/{image_2,flow_occ}/000010_10.png`, frame 2 `_11`; ids as `000010`.

    Args:
        root: folder `KITTI`.
        split: training, testing (without ground truth: `flow` is None) or all, which is training.
    """
    return _kitti("kitti_2015", root, split, ("image_2",))


def _kitti(source: str, root: str | os.PathLike[str], split: str, cameras: Sequence[str]) -> Dataset:
    """Either KITTI; of `cameras`, the first that there is."""
    part = validate_choice(source, "split", split, {"training": "training", "testing": "testing", "all": "training"})
    base = f"{absolute(root)}/{part}"
    camera = next((camera for camera in cameras if listing(f"{base}/{camera}")), cameras[0])
    ground_truth = part == "training"
    first, second = (files(f"{base}/{camera}", rf"(\d+)_{frame}\.png") for frame in (10, 11))
    flows = files(f"{base}/flow_occ", r"(\d+)_10\.png") if ground_truth else {}
    pairs = [
        Pair(number, first.get(number), second.get(number), flows.get(number)) for number in {*first, *second, *flows}
    ]
    start = f"{base}/{'flow_occ' if ground_truth else camera}"
    layout = f"000000_10.png, and 000000_10.png and 000000_11.png in {base}/{camera}"
    return to_dataset(source, pairs, start, layout, ground_truth=ground_truth)


def hd1k(root: str | os.PathLike[str], split: str) -> Dataset:
    """HD1K (Kondermann et al. 2016); ids as `000000_0010`.

    `hd1k_flow_gt/flow_occ/000000_0010.png` and `hd1k_input/image_2/000000_0010.png`: the first number is the
    sequence's, the second the frame's; frames count up by one. The flow of a sequence's last frame has no second frame
    and cannot be used.

    Args:
        root: folder `HD1K`.
        split: training or all, which are the same.
    """
    validate_choice("hd1k", "split", split, {"training": None, "all": None})
    flow_root, frame_root = f"{absolute(root)}/hd1k_flow_gt/flow_occ", f"{absolute(root)}/hd1k_input/image_2"
    frames, flows = (_by_sequence(files(folder, r"(\d+_\d+)\.png")) for folder in (frame_root, flow_root))
    pairs: list[Pair] = []
    for sequence in {*frames, *flows}:
        of_sequence = frames.get(sequence, {}), flows.get(sequence, {})
        pairs += consecutive_pairs(f"{sequence}_", *of_sequence, flow_at_end=True)
    layout = f"000000_0010.png, and 000000_0010.png and 000000_0011.png in {frame_root}"
    return to_dataset("hd1k", pairs, flow_root, layout)


def _by_sequence(names: dict[str, str]) -> dict[str, dict[str, str]]:
    """SEQUENCE_FRAME -> path becomes SEQUENCE -> FRAME -> path."""
    sequences: dict[str, dict[str, str]] = {}
    for name, path in names.items():
        sequence, number = name.split("_")
        sequences.setdefault(sequence, {})[number] = path
    return sequences


def middlebury(root: str | os.PathLike[str], split: str) -> Dataset:
    """Middlebury (Baker et al. 2011): `other-gt-flow/SCENE/flow10.flo`, `other-data/SCENE/frame1{0,1}.png`; id SCENE.

    Args:
        root: folder `Middlebury`.
        split: training or all, which are the same: the scenes with public ground truth.
    """
    validate_choice("middlebury", "split", split, {"training": None, "all": None})
    flow_root, frame_root = f"{absolute(root)}/other-gt-flow", f"{absolute(root)}/other-data"
    pairs: list[Pair] = []
    for scene in listing(flow_root, frame_root):
        frames = files(f"{frame_root}/{scene}", r"frame(10|11)\.png")
        flow = files(f"{flow_root}/{scene}", r"flow(10)\.flo").get("10")
        if flow or scene not in MIDDLEBURY_WITHOUT_GROUND_TRUTH:
            pairs.append(Pair(scene, frames.get("10"), frames.get("11"), flow))
    layout = f"SCENE/flow10.flo, and frame10.png, frame11.png in {frame_root}/SCENE"
    return to_dataset("middlebury", [pair for pair in pairs if any(pair[1:])], flow_root, layout)


def spring(root: str | os.PathLike[str], split: str) -> Dataset:
    """Spring (Mehl et al. 2023), both cameras, forward and backward flow; ids as `0001/FW_left/0001`.

    `train/0001/frame_left/frame_left_0001.png`, `train/0001/flow_{FW,BW}_left/flow_{FW,BW}_left_0001.flo5` and so for
    right. BW is the flow from frame t to t - 1. Ground truth has twice the frames' height and width, with vectors in
    pixels of the frames: every second row and column is used, as by the authors' own data loader. Cameras and
    directions are separate downloads, each of which is optional.

    Args:
        root: folder `Spring`; its `train` and `test` may also lie in a folder `spring` there.
        split: training, test (without ground truth: `flow` is None) or all, which is training.
    """
    part = validate_choice("spring", "split", split, {"training": "train", "test": "test", "all": "train"})
    ground_truth = part == "train"
    outer = absolute(root)
    bases = f"{outer}/{part}", f"{outer}/spring/{part}"
    base = next((base for base in bases if os.path.isdir(base)), bases[0])
    pairs: list[Pair] = []
    for scene in listing(base):
        for camera in ("left", "right"):
            frames = files(f"{base}/{scene}/frame_{camera}", rf"frame_{camera}_(\d+)\.png")
            for direction, step in (("FW", 1), ("BW", -1)):
                name = f"flow_{direction}_{camera}"
                flows = files(f"{base}/{scene}/{name}", rf"{name}_(\d+)\.flo5") if ground_truth else None
                if flows != {}:
                    pairs += consecutive_pairs(f"{scene}/{direction}_{camera}/", frames, flows, step=step)
    flow_layout = ", 0001/flow_FW_left/flow_FW_left_0001.flo5" if ground_truth else ""
    layout = f"0001/frame_left/frame_left_{{0001,0002}}.png{flow_layout}"
    return to_dataset("spring", pairs, base, layout, ground_truth=ground_truth, features=_spring_features())


def tartanair(root: str | os.PathLike[str], split: str) -> Dataset:
    """TartanAir, version 1 (Wang et al. 2020), left camera; ids as `abandonedfactory/Easy/P001/000000`.

    `ENV/{Easy,Hard}/P001/image_left/000000_left.png`, `ENV/{Easy,Hard}/P001/flow/000000_000001_{flow,mask}.npy`; the
    archives unpack to ENV/ENV/Easy, which will do. A mask holds 0 where flow is valid, 1 where frame 2 hides the point
    behind what frame 1 does not show, 10 behind what it shows, and 100 where it lies outside frame 2 (the authors'
    tartanair_tools, flow_and_warping_error.py). Here only 0 is valid; SEA-RAFT leaves out only 100. `valid` is null
    where there is no mask.

    Args:
        root: folder `TartanAir`.
        split: training or all, which are the same.
    """
    validate_choice("tartanair", "split", split, {"training": None, "all": None})
    base = absolute(root)
    pairs: list[Pair] = []
    for environment in listing(base):
        inner = listing(f"{base}/{environment}")
        outer = f"{base}/{environment}/{environment}" if environment in inner else f"{base}/{environment}"
        for level in ("Easy", "Hard"):
            for trajectory in listing(f"{outer}/{level}"):
                folder = f"{outer}/{level}/{trajectory}"
                frames = files(f"{folder}/image_left", r"(\d+)_left\.png")
                flows, masks = (
                    _of_consecutive(files(f"{folder}/flow", rf"(\d+_\d+)_{kind}\.npy")) for kind in ("flow", "mask")
                )
                pairs += consecutive_pairs(f"{environment}/{level}/{trajectory}/", frames, flows, masks)
    layout = "ENV/{Easy,Hard}/P000/flow/000000_000001_flow.npy, ENV/{Easy,Hard}/P000/image_left/00000{0,1}_left.png"
    return to_dataset("tartanair", pairs, base, layout, features=_tartanair_features())


def _of_consecutive(names: dict[str, str]) -> dict[str, str]:
    """FIRST_SECOND -> path becomes FIRST -> path, of frames that follow each other."""
    split = ((name.split("_"), path) for name, path in names.items())
    return {first: path for (first, second), path in split if second == shift(first, 1)}


def _read_chairs_split(path: Path) -> list[str]:
    """The "1" or "2" of every line of FlyingChairs_train_val.txt."""
    if not path.is_file():
        raise FileNotFoundError(f"flying_chairs: no split file at {path}; split 'all' needs none")
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").rstrip().split("\n")]
    for number, line in enumerate(lines, start=1):
        if line not in ("1", "2"):
            raise ValueError(f"{path}, line {number}: it must be 1 (training) or 2 (validation); got {line!r:.80}")
    return lines


def _sintel_features() -> Features:
    from datasets import Features, Image

    from flow_data.features import FLOW_FEATURES

    return Features({**FLOW_FEATURES, "occlusion": Image(), "invalid": Image()})


def _spring_features() -> Features:
    from datasets import Features

    from flow_data.features import FLOW_FEATURES, OpticalFlow

    return Features({**FLOW_FEATURES, "flow": OpticalFlow(stride=2)})


def _tartanair_features() -> Features:
    from datasets import Features

    from flow_data.features import FLOW_FEATURES, ValidMask

    return Features({**FLOW_FEATURES, "valid": ValidMask(zero_is_valid=True)})
