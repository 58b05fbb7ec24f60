"""Labels for frames without ground truth: the flow of a model where it agrees with itself in both directions.

`flow_inference.pseudo_labels` is the command. Shapes: `H W` frame. Flow is (x right, y down), pixels.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from tqdm.auto import tqdm

from flow_data.atomic_write import atomic_write
from flow_data.flow_io import read_flow, write_flow
from flow_data.formats.masks import decode_mask, encode_mask
from flow_inference.consistency import is_occluded
from flow_inference.estimator import FlowEstimator, weights_checksum
from flow_inference.footage import Clip, PlannedPair, find_pairs, fingerprint, plan_pairs
from flow_inference.frame_changes import SceneCutDetector, photometric_error
from flow_inference.frame_sources import open_frames, read_frames
from modeling_raft import RaftForOpticalFlow
from modeling_raft.frames_raft import FrameConverter, describe

# Squared pixels. The usual 0.5 of `flow_inference.consistency` leaves out calm areas without texture, and a model that
# was adapted to a cartoon without them became worse there (end-point error 1.43 -> 1.50 px, against 0.82 with 4).
ABSOLUTE_TOLERANCE = 4.0
LOWEST_SHARE = 0.1  # of valid pixels; a pair with fewer has nothing in common, as at a scene cut
TABLE, RECORD = "pairs.csv", "labels.json"  # the table is written last: with it, the labels are complete
SETTINGS = {  # of labels in a folder, and how messages describe them
    "teacher": "model",
    "teacher_sha256": "state of the model's weights",
    "intensity_range": "--intensity_range",
    "num_flow_updates": "--num_flow_updates",
    "gap": "--gap",
    "clips": "set of frames",
    "planned": "choice of pairs (--every, --gap, --max_pairs)",
}
COLUMNS = ("id", "image1", "image2", "flow", "valid")


class NoLabelsError(ValueError):
    """No pair of frames has labels to learn from."""


@dataclass(frozen=True)
class LabelledPair:
    """A pair of frames and the labels of both directions, as files.

    Args:
        id: Of the pair.
        frames: Paths of both frames.
        flows: Paths of the flow from frame 1 to 2, and from 2 to 1.
        masks: Paths of the masks of valid flow.
    """

    id: str
    frames: tuple[Path, Path]
    flows: tuple[Path, Path]
    masks: tuple[Path, Path]

    def read_frames(self) -> tuple[np.ndarray, np.ndarray]:
        """Both frames, `(H, W, 3)` uint8, RGB."""
        first, second = (np.asarray(PIL.Image.open(path).convert("RGB")) for path in self.frames)
        return first, second

    def read_labels(self) -> tuple[Tensor, Tensor]:
        """Flow of both directions `(2, 2, H, W)`, pixels, and where it is valid `(2, H, W)` bool."""
        flow = np.stack([read_flow(path)[0] for path in self.flows])
        valid = np.stack([decode_mask(path.read_bytes(), str(path)) for path in self.masks])
        return torch.from_numpy(flow).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(valid)


@dataclass(frozen=True)
class PseudoLabels:
    """Labels on the disk.

    Args:
        folder: A source `pairs`.
        pairs: In the order of the footage.
        description: What was labelled and what was skipped, a line.
    """

    folder: Path
    pairs: list[LabelledPair]
    description: str


def estimate_labels(
    estimator: FlowEstimator, frame1: np.ndarray, frame2: np.ndarray, num_flow_updates: int
) -> tuple[Tensor, Tensor, float]:
    """Estimate the flow of both directions, each from zero, and where they agree.

    Args:
        estimator: For frames of this size, in float32.
        frame1: `(H, W, 3)` uint8, RGB.
        frame2: The same size.
        num_flow_updates: Updates of the flow.

    Returns:
        Flow `(2, 2, H, W)` from frame 1 to 2 and from 2 to 1, pixels; where it is valid `(2, H, W)` bool; and the
        photometric error of `flow_inference.frame_changes` from 1 to 2, gray levels. Valid is a pixel x that does not
        leave the frame, with |f + b(x + f)|^2 <= 0.01 (|f|^2 + |b|^2) + 4 px^2, for flow f and flow b of the other
        direction (Sundaram et al. 2010, with a higher constant).
    """
    first, second = estimator.encode(frame1), estimator.encode(frame2)
    forward, low_res_flow = estimator.estimate([(first, second)], num_flow_updates)
    backward, _ = estimator.estimate([(second, first)], num_flow_updates)
    flow, other = torch.cat([forward, backward]), torch.cat([backward, forward])
    valid = ~is_occluded(flow, other, ABSOLUTE_TOLERANCE)
    error = photometric_error(first.thumbnail(), second.thumbnail(), low_res_flow)
    return flow.cpu(), valid.cpu(), error


def make_labels(
    model: RaftForOpticalFlow,
    teacher: str,
    clips: Sequence[Clip],
    folder: Path,
    *,
    every: int | None = None,
    gaps: Sequence[int] = (1, 2),
    max_pairs: int | None = None,
    num_flow_updates: int = 32,
    intensity_range: tuple[float, float] | None = None,
) -> PseudoLabels:
    """Write labels for pairs of frames, or resume writing them; each file is complete or not there.

    At most two frames and the first frames of unfinished pairs are in memory. A pair takes its frames as PNG, 16 bytes
    of flow for each pixel, and two masks on the disk.

    Args:
        model: In float32 and eval mode, on any device.
        teacher: Where its weights are from, as a user names them; it is recorded.
        clips: From `open_clips`.
        folder: Is made; another call with the same arguments resumes.
        every: As in `plan_pairs`, as are `gaps` and `max_pairs`.
        num_flow_updates: Updates of the flow.
        intensity_range: (low, high) that become black and white, for frames of 16 bits; None: the range of the first
            two frames of a clip. The frames are written with 8 bits.

    Raises:
        NoLabelsError: No pair has labels.
        ValueError: A setting is out of range, `folder` has other labels, or frames cannot be read.
        OSError: Something cannot be read or written.
    """
    if num_flow_updates < 1:
        raise ValueError(f"num_flow_updates must be at least 1; got {num_flow_updates}")
    planned = plan_pairs(clips, gaps, every, max_pairs, model.device.type == "cpu")
    settings = {
        "teacher": teacher,
        "teacher_sha256": weights_checksum(model),
        "intensity_range": None if intensity_range is None else list(intensity_range),
        "num_flow_updates": num_flow_updates,
        "gap": sorted(set(gaps)),
        "clips": [
            {
                "name": clip.name,
                "frames": clip.num_frames,
                "size": list(clip.size),
                "from": _place(clip.frames),
                "sha256": fingerprint(clip),
            }
            for clip in clips
        ],
        "planned": [list(pair) for pair in planned],
    }
    records = read_records(folder, settings)
    for name in ("frames", "flow", "valid"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    if not (folder / TABLE).exists():
        _label_clips(model, clips, planned, folder, settings, records)
        kept = [record for record in records.values() if record["kept"]]
        if not kept:
            raise NoLabelsError(f"no labels: {describe_skipped(records, len(planned))}")
        rows = [row for record in kept for row in _rows(record)]
        with atomic_write(folder / TABLE) as partial:
            partial.write_text(format_table(rows))
    return read_labels(folder)


def read_records(folder: Path, settings: dict[str, Any]) -> dict[tuple[int, int, int], dict[str, Any]]:
    """Read what is recorded of the pairs so far: (clip, start, gap) -> record.

    Raises:
        ValueError: The folder has labels that were made with other settings.
    """
    path = folder / RECORD
    if not path.exists():
        return {}
    content = json.loads(path.read_text())
    changed = [SETTINGS[name] for name in settings if content["settings"].get(name) != settings[name]]
    if changed:
        raise ValueError(
            f"{folder} has labels with another {' and another '.join(dict.fromkeys(changed))}: choose another folder, "
            "or remove this one"
        )
    return {(record["clip"], record["start"], record["gap"]): record for record in content["pairs"]}


def _label_clips(
    model: RaftForOpticalFlow,
    clips: Sequence[Clip],
    planned: Sequence[PlannedPair],
    folder: Path,
    settings: dict[str, Any],
    records: dict[tuple[int, int, int], dict[str, Any]],
) -> None:
    """Label the planned pairs that have no record yet, and add their records."""
    with tqdm(total=len(planned), desc="labels", unit="pair") as bar:
        for index, clip in enumerate(clips):
            wanted: dict[int, list[int]] = {}
            for pair in planned:
                if pair.clip == index:
                    wanted.setdefault(pair.start, []).append(pair.gap)
            if not wanted:
                continue
            estimator = FlowEstimator(model, *clip.size, mixed_precision="no")
            detectors = {gap: SceneCutDetector() for gap in settings["gap"]}
            frames = read_frames(
                open_frames(clip.frames),
                FrameConverter(settings["intensity_range"] and tuple(settings["intensity_range"])),
            )
            for start, end, gap, frame1, frame2 in find_pairs(frames, wanted):
                record = records.get((index, start, gap))
                if record is None:
                    record = {"clip": index, "name": clip.name, "start": start, "end": end, "gap": gap}
                    record |= _label(estimator, detectors[gap], record, frame1, frame2, folder, settings)
                    records[index, start, gap] = record
                    with atomic_write(folder / RECORD) as partial:
                        partial.write_text(json.dumps({"settings": settings, "pairs": list(records.values())}))
                if record["error"] is not None:
                    detectors[gap].reset() if record["why"] == "cut" else detectors[gap].update(record["error"])
                bar.update()


def _label(
    estimator: FlowEstimator,
    detector: SceneCutDetector,
    record: dict[str, Any],
    frame1: np.ndarray,
    frame2: np.ndarray,
    folder: Path,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Label a pair and write its files; returns `kept`, `why` it is not, the share of `valid` pixels, and `error`."""
    if any((frame == frame[:1, :1]).all() for frame in (frame1, frame2)):
        return {"kept": False, "why": "flat", "valid": 0.0, "error": None}
    flow, valid, error = estimate_labels(estimator, frame1, frame2, settings["num_flow_updates"])
    shares = valid.float().mean((1, 2))
    cut = not np.isfinite(error) or detector.is_cut(error)
    kept = not cut and float(shares.min()) >= LOWEST_SHARE
    if kept:
        pair = labelled_pair(folder, record)
        for path, frame in zip(pair.frames, (frame1, frame2), strict=True):
            if not path.exists():
                with atomic_write(path) as partial:
                    PIL.Image.fromarray(frame).save(partial, compress_level=1)
        for direction in range(2):
            write_flow(pair.flows[direction], flow[direction].permute(1, 2, 0).contiguous().numpy())
            with atomic_write(pair.masks[direction]) as partial:
                partial.write_bytes(encode_mask(valid[direction].numpy()))
    why = "" if kept else "cut" if cut else "inconsistent"
    return {"kept": kept, "why": why, "valid": float(shares.mean()), "error": error if np.isfinite(error) else None}


def labelled_pair(folder: Path, record: dict[str, Any]) -> LabelledPair:
    """The files of a pair, from its record."""
    name, start, end = record["name"], record["start"], record["end"]
    ids = (f"{name}_{start:06d}_{end:06d}", f"{name}_{end:06d}_{start:06d}")
    return LabelledPair(
        id=ids[0],
        frames=(folder / f"frames/{name}_{start:06d}.png", folder / f"frames/{name}_{end:06d}.png"),
        flows=(folder / f"flow/{ids[0]}.flo", folder / f"flow/{ids[1]}.flo"),
        masks=(folder / f"valid/{ids[0]}.png", folder / f"valid/{ids[1]}.png"),
    )


def _rows(record: dict[str, Any]) -> list[tuple[str, ...]]:
    """The two lines of a pair in the table."""
    return table_rows(labelled_pair(Path(), record))


def table_rows(pair: LabelledPair) -> list[tuple[str, ...]]:
    """The lines of both directions of a pair in a table in the labels' folder."""
    frames = [f"frames/{path.name}" for path in pair.frames]
    flows = [f"flow/{path.name}" for path in pair.flows]
    masks = [f"valid/{path.name}" for path in pair.masks]
    return [
        (pair.flows[0].stem, frames[0], frames[1], flows[0], masks[0]),
        (pair.flows[1].stem, frames[1], frames[0], flows[1], masks[1]),
    ]


def format_table(rows: Iterable[Sequence[str]]) -> str:
    """The text of a table of pairs, with its header."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
    return text.getvalue()


def read_labels(folder: Path) -> PseudoLabels:
    """Read which labels a folder has, when they are complete.

    Raises:
        OSError: There are none.
    """
    content = json.loads((folder / RECORD).read_text())
    records = {(record["clip"], record["start"], record["gap"]): record for record in content["pairs"]}
    kept = [records[key] for key in sorted(records) if records[key]["kept"]]
    share = sum(record["valid"] for record in kept) / max(len(kept), 1)
    planned = len(content["settings"]["planned"])
    number = "1 pair" if len(kept) == 1 else f"{len(kept)} pairs"
    description = f"{number} of frames in both directions, {100 * share:.0f} % of the pixels valid"
    if len(kept) < planned:
        description += f"; {describe_skipped(records, planned)}"
    return PseudoLabels(folder, [labelled_pair(folder, record) for record in kept], description)


def read_teacher(table: Path) -> str | None:
    """The name of the model that estimated the flow of a table or folder of pairs; None where none is recorded."""
    folder = table if table.is_dir() else table.parent
    try:
        return str(json.loads((folder / RECORD).read_text())["settings"]["teacher"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def describe_skipped(records: dict[tuple[int, int, int], dict[str, Any]], planned: int) -> str:
    """Say how many of the planned pairs were skipped, and why."""
    counts = Counter(record["why"] for record in records.values() if not record["kept"])
    missing = planned - len(records)
    reasons = [
        (missing, "without a different second frame (duplicates, or the end of the clip)"),
        (counts["cut"], "across a scene cut"),
        (counts["inconsistent"], "in which forward and backward flow agree in less than a tenth"),
        (counts["flat"], "with a frame of one color"),
    ]
    return f"skipped of {planned} pairs: " + ", ".join(f"{count} {reason}" for count, reason in reasons if count)


def _place(frames: str | list[str]) -> str:
    return frames if isinstance(frames, str) else describe(frames[0], "")
