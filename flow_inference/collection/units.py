"""What a process does at a time: a source of a collection, a piece of a long one, or the joining of its pieces."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from flow_inference.collection.sources import FlowSource
from flow_inference.collection.state import key_of
from modeling_raft.frames_raft import FrameConverter

OVERLAP = 8  # pairs before a piece, from which warm start, scene cuts and duplicates are taken up


@dataclass(frozen=True)
class Unit:
    """What one process does at a time: a source, a piece of one, or joining the pieces.

    `start` and `stop` are the first pair and the one after the last; `stop` is None at the end of a source. `pieces`
    are those that are joined.
    """

    source: FlowSource
    key: str
    work: float
    start: int = 0
    stop: int | None = None
    piece: int | None = None
    pieces: tuple["Unit", ...] = ()


def plan_units(sources: Sequence[FlowSource], split_frames: int | None) -> Iterator[Unit]:
    """Yield the units of work: whole sources; or the pieces of long ones, and the joining of these."""
    for source in sources:
        key = key_of(source.name)
        num_pairs = (source.num_frames or 0) - 1
        if split_frames is None or num_pairs <= split_frames:
            yield Unit(source, key, source.work)
            continue
        count = -(-num_pairs // split_frames)
        pieces = []
        for piece in range(count):
            start, is_last = piece * split_frames, piece == count - 1
            piece_key = key_of(f"{source.name}#{start}-{'end' if is_last else start + split_frames}")
            stop = None if is_last else start + split_frames
            pieces.append(Unit(source, piece_key, source.work / count, start, stop, piece))
        yield from pieces
        yield Unit(source, key, 0.0, pieces=tuple(pieces))


def read_unit(unit: Unit, converter: FrameConverter) -> Iterator[np.ndarray]:
    """Yield the frames of a unit, with those before it that its state is taken up from."""
    first = max(0, unit.start - OVERLAP)
    count = None if unit.stop is None else unit.stop - first + 1
    return itertools.islice(unit.source.read(first, converter), count)
