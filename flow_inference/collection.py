"""Flow of a whole collection: many videos and folders of frames, by any number of processes, none lost.

Every process takes the largest source that nobody works on, writes its flow under another name, and renames it when it
is complete. Decoding, model and writing overlap: one thread reads ahead, one writes behind.
"""

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import math
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flow_data.file_names import COLLECTION_FORMATS, FORMAT_SUFFIXES
from flow_data.formats.jpeg_flow import BOUND
from flow_data.out_of_memory import explain_out_of_memory, is_out_of_memory
from flow_inference.background import ReadAhead, WriteBehind
from flow_inference.collection_sources import FlowSource, check_outputs, choose_shard, find_sources, measure
from flow_inference.collection_state import CollectionState, key_of, process_birth, publish, remove_partial
from flow_inference.outputs import FlowArchiveWriter, FlowFileWriter, describe_format_loss
from flow_inference.video import FlowVideo, VideoFlow
from modeling_raft import RaftForOpticalFlow
from modeling_raft.frames_raft import FrameConverter

READ_AHEAD, WRITE_BEHIND = 6, 6  # frames, pairs
OVERLAP = 8  # pairs before a piece, from which warm start, scene cuts and duplicates are taken up
AUTO_BATCH_SIZE = 16  # halved whenever memory runs out
PATIENCE = 10.0  # seconds in which other processes of a launch write how far they came, once there is no more to do
WAIT = 1.0  # seconds between two looks at what other processes compute
_calls = itertools.count()
FATAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # errors of the output's disk, which no other source would escape
OUT_OF_MEMORY = "Estimate on smaller frames with max_side."  # advice


@dataclass(frozen=True)
class CollectionOptions:
    """What the outputs of a collection depend on, besides frames and weights.

    Args:
        format: A key of `FORMAT_SUFFIXES` or `COLLECTION_FORMATS` (`flow_data.file_names`).
        backward: Also write backward flow.
        occlusion: Also write occlusion masks as images.
        confidence: Also write the forward-backward error and the occlusion mask as arrays.
        color_scale: Length of flow in pixels that is fully saturated in color images.
        bound: Pixels at which JPEG images clip flow.
        split_frames: Frames of the pieces that long sources are cut into, so that several processes share one; None:
            sources are whole.
        batch_size: As in `FlowVideo`, as are all that follow; `"auto"`: as many as memory holds, 16 at most.
    """

    format: str = "flo"
    backward: bool = False
    occlusion: bool = False
    confidence: bool = False
    color_scale: float | None = None
    bound: float = BOUND
    split_frames: int | None = None
    batch_size: int | str = 1
    num_flow_updates: int | None = None
    warm_num_flow_updates: int | None = None
    warm_start: bool = True
    max_side: int | None = None
    min_side: int | None = None
    mixed_precision: str | None = None
    intensity_range: tuple[float, float] | None = None
    tolerance: float | None = None

    def __post_init__(self) -> None:
        formats = (*FORMAT_SUFFIXES, *COLLECTION_FORMATS)
        if self.format not in formats:
            raise ValueError(f"format must be one of {', '.join(formats)}; got {self.format}")
        if self.occlusion and self.format == "h5":
            raise ValueError("occlusion writes images beside files of each pair; with format h5 use confidence")
        if self.split_frames is not None and self.split_frames < 2:
            raise ValueError(f"split_frames must be at least 2; got {self.split_frames}")
        if not (math.isfinite(self.bound) and self.bound > 0):
            raise ValueError(f"bound must be a positive number of pixels; got {self.bound}")
        if isinstance(self.batch_size, str) and self.batch_size != "auto":
            raise ValueError(f"batch_size must be a whole number or auto; got {self.batch_size}")

    def video_settings(self, batch_size: int) -> dict[str, Any]:
        """Return the arguments of `FlowVideo`."""
        names = (
            *("num_flow_updates", "warm_num_flow_updates", "warm_start", "max_side", "min_side"),
            *("mixed_precision", "intensity_range", "tolerance"),
        )
        backward = self.backward or self.occlusion or self.confidence
        return {name: getattr(self, name) for name in names} | {"backward": backward, "batch_size": batch_size}


@dataclass
class CollectionReport:
    """What a run has done.

    Args:
        sources: Number of sources of the collection, or of its shard.
        done: Those whose flow is complete.
        skipped: Those of them that were complete before the run.
        failed: Input, output name and reason of each source that cannot be read or written.
        pairs: Pairs of frames of the sources that this run has completed, in all of its processes.
        seconds: Duration of the run.
        stopped: The run was asked to stop, or has stopped at the first failure.
        lost: Share of the pixels, 0 to 1, whose flow the format cannot hold, a mean over the sources of this run.
        processes: Rank, pairs, seconds, pairs a second and share of the time with the model busy, of each process.
        settings: What the outputs depend on.
    """

    sources: int
    done: int
    skipped: int
    failed: list[dict[str, Any]]
    pairs: int
    seconds: float
    stopped: bool
    lost: float
    processes: list[dict[str, Any]]
    settings: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Return the report as plain values."""
        rate = self.pairs / self.seconds if self.seconds > 0 else 0.0
        return dataclasses.asdict(self) | {"unfinished": self.unfinished, "pairs_per_second": rate}

    @property
    def unfinished(self) -> int:
        """Number of sources that are neither complete nor failed."""
        return self.sources - self.done - len(self.failed)

    def __str__(self) -> str:
        before = f" ({self.skipped} before)" if self.skipped else ""
        parts = [f"{self.sources} sources: {self.done} done{before}"]
        if self.failed:
            parts.append(f"{len(self.failed)} failed")
        if self.unfinished:
            parts.append(f"{self.unfinished} not finished")
        rate = self.pairs / self.seconds if self.seconds > 0 else 0.0
        lines = [f"{', '.join(parts)}; {self.pairs} pairs in {self.seconds:.1f} s, {rate:.2f} a second"]
        for failure in self.failed:
            source, reason = failure["input"], failure["reason"]
            lines.append(f"failed: {reason}" if reason.startswith(source) else f"failed: {source}: {reason}")
        if self.lost:
            lines.append(describe_format_loss(self.lost, self.settings["format"], self.settings["bound"]))
        return "\n".join(lines)


def predict_collection(
    model: RaftForOpticalFlow,
    inputs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    options: CollectionOptions | None = None,
    *,
    lists: Sequence[str | os.PathLike[str]] = (),
    shard: tuple[int, int] | None = None,
    fail_fast: bool = False,
    stop: Callable[[], bool] | None = None,
    show_progress: bool = False,
    model_name: str = "",
) -> CollectionReport:
    """Estimate and write the flow of many videos and folders of frames; what is complete already is skipped.

    Below a launcher (`accelerate launch`, `torchrun`), the processes share the sources out among themselves, as do
    processes that are started on their own, on any machine that sees the output folder. Each calls this function with
    the same arguments; the report of the one with rank 0 waits for all.

    Args:
        model: In eval mode, on the device of this process.
        inputs: As in `find_sources`.
        output: Folder that outputs are written below, at the places that the inputs have below theirs.
        options: What is estimated and written; None: the defaults.
        lists: Files with further inputs, as in `find_sources`.
        shard: (index, count): compute only one of `count` parts of the collection, `index` from 1 on.
        fail_fast: Stop at the first source that cannot be read.
        stop: Asked after each pair; True ends the run; the same call resumes it.
        show_progress: Show a progress bar, in the process with rank 0.
        model_name: For the manifest.

    Returns:
        The report. Sources that cannot be read are in `failed`; they are tried again by the next run.

    Raises:
        ValueError: Two outputs would have one name, an output would replace an input, the output folder has flow with
            other settings, or a setting does not fit.
        OSError: A list cannot be read, or the output's disk is full.
        MissingPackageError: A format needs a package that is not installed.
    """
    options = options or CollectionOptions()
    output = Path(output)
    sources = find_sources([os.fspath(path) for path in inputs], [os.fspath(path) for path in lists], str(output))
    check_outputs(sources, output, [target_of(source, output, options.format) for source in sources])
    sources = [measure(source) for source in sources]
    if shard is not None:
        index, count = shard
        if not (count >= 1 and 0 <= index <= count):
            raise ValueError(f"shard must be I/N with I from 1 to N; got {index}/{count}")
        sources = choose_shard(sources, index, count)
    return _Run(model, sources, output, options, fail_fast, stop or (lambda: False), model_name).run(show_progress)


def target_of(source: FlowSource, output: Path, format: str) -> Path:
    """Return the output of a source: a folder of files, or a file."""
    if format not in COLLECTION_FORMATS or format == "jpg":
        return output / source.name
    name = source.path.resolve().name if source.name == "." else source.name
    return output / f"{name}{COLLECTION_FORMATS[format]}"


def weights_checksum(model: torch.nn.Module) -> str:
    """Return the SHA-256 of a model's weights: of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class _Unit:
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
    pieces: tuple["_Unit", ...] = ()


@dataclass
class _Job:
    """A unit that is being computed, with its output, which only the writing thread touches."""

    unit: _Unit
    partial: Path
    open_writer: Callable[[Path], Any]
    converter: FrameConverter
    started: float = field(default_factory=time.monotonic)
    writer: Any = None
    error: Exception | None = None
    cancelled: bool = False
    pairs: int = 0
    duplicates: int = 0
    cuts: list[int] = field(default_factory=list)
    updates: int = 0

    def write(self, pair: VideoFlow) -> None:
        if self.error is not None:
            return
        try:
            if self.writer is None:
                self.writer = self.open_writer(self.partial)
            self.writer.write(pair)
        except (ValueError, OSError) as error:
            if getattr(error, "errno", None) in FATAL:
                raise
            self.error = error


class _Run:
    """One process's part in a collection."""

    def __init__(
        self,
        model: RaftForOpticalFlow,
        sources: list[FlowSource],
        output: Path,
        options: CollectionOptions,
        fail_fast: bool,
        stop: Callable[[], bool],
        model_name: str,
    ):
        self.model, self.sources, self.output, self.options = model, sources, output, options
        self.fail_fast, self.stop_requested = fail_fast, stop
        self.rank = int(os.environ.get("RANK", "0"))
        # The processes of a launch have one parent on each machine, and make the same calls.
        parent = os.getppid() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else os.getpid()
        run = f"{socket.gethostname()}-{parent}-{process_birth(parent)}-{next(_calls)}"
        self.batch_size = options.batch_size if isinstance(options.batch_size, int) else AUTO_BATCH_SIZE
        # Checks the settings: wrong ones are an error before anything is written.
        video = FlowVideo(model, [], **options.video_settings(self.batch_size))
        self.settings = dataclasses.asdict(options) | {
            "num_flow_updates": video.num_flow_updates,
            "warm_num_flow_updates": video.warm_num_flow_updates if video.warm_start else None,
            "mixed_precision": video.mixed_precision or "no",
            "compiled": model.update_block._compiled_call_impl is not None,
            "model": model_name,
            "weights_sha256": weights_checksum(model),
        }
        self.state = CollectionState(output, run)
        self.state.check_settings({key: value for key, value in self.settings.items() if key != "model"})
        self.units = sorted(_plan(sources, options.split_frames), key=lambda unit: (-unit.work, unit.key))
        self.pending = {unit.key: unit for unit in self.units}
        self.held: set[str] = set()  # claims of this process
        self.skipping: set[str] = set()  # units whose remaining frames nobody wants
        self.failed_fast = False
        self.progress: dict[str, Any] = {"rank": self.rank, "pairs": 0, "seconds": 0.0, "busy": 0.0, "ended": False}

    def run(self, show_progress: bool) -> CollectionReport:
        started = time.monotonic()
        self.state.clean()
        skipped = {source.name for source in self.sources if self._is_finished(self._unit_of(source))}
        with self.state.alive(self.progress), _ProgressBar(self, skipped, show_progress and self.rank == 0):
            self._work()
            self.progress["ended"] = True
        if self.rank == 0:
            self.state.wait_for_ends(PATIENCE)
        return self._report(skipped, time.monotonic() - started)

    def _work(self) -> None:
        started = time.monotonic()
        stream = ReadAhead(self._read(), READ_AHEAD)
        writer = WriteBehind(WRITE_BEHIND)
        events = iter(stream)
        try:
            for unit, frame in events:
                assert frame is None  # the frames of a unit are consumed with it
                if unit.pieces:
                    self._join(unit)
                else:
                    self._compute(unit, self._frames_of(unit, events), writer, stream, started)
                if self._stopping():
                    break
        finally:
            stream.close()
            try:
                writer.close()
            finally:
                for key in list(self.held):
                    self._release(key)

    def _stopping(self) -> bool:
        return self.failed_fast or self.stop_requested()

    # ---- Which unit is next ----

    def _read(self) -> Iterator[tuple[_Unit, Any]]:
        """Claim one unit after the other, and yield for each a None, its frames, and a None or an error."""
        while (unit := self._next_unit()) is not None:
            yield unit, None
            if unit.pieces:
                continue
            try:
                converter = FrameConverter(self.options.intensity_range)
                yield unit, converter
                for frame in _unit_frames(unit, converter):
                    if unit.key in self.skipping:
                        break
                    yield unit, frame
                yield unit, None
            except Exception as error:
                yield unit, error

    def _next_unit(self) -> _Unit | None:
        """Claim the largest unit that is to be done; in the first process, wait while others compute the last ones."""
        while not self._stopping():
            for unit in list(self.pending.values()):
                if self._is_finished(unit):
                    del self.pending[unit.key]
                    continue
                if unit.pieces and not self._pieces_ended(unit):
                    continue
                if not self.state.claim(unit.key):
                    continue
                self.held.add(unit.key)
                if self._is_finished(unit):  # by another process, between the look and the claim
                    self._release(unit.key)
                    continue
                del self.pending[unit.key]
                return unit
            if not self.pending or self.rank != 0:
                return None
            time.sleep(WAIT)
        return None

    def _is_finished(self, unit: _Unit) -> bool:
        """Return whether a unit needs no more work in this run."""
        record = self.state.record(unit.key)
        if record is None:
            return unit.piece is not None and self._is_finished(self._unit_of(unit.source))
        if record["status"] != "done":
            ended = self.state.run in record["runs"]
            self.failed_fast |= ended and self.fail_fast
            return ended
        if unit.source.num_bytes not in (0, record["bytes"]):  # else the source has been removed after its end
            return False
        return self._place_of(unit).exists()

    def _pieces_ended(self, unit: _Unit) -> bool:
        return all(self._is_finished(piece) for piece in unit.pieces)

    def _unit_of(self, source: FlowSource) -> _Unit:
        return _Unit(source, key_of(source.name), source.work)

    def _place_of(self, unit: _Unit) -> Path:
        """Return where the complete output of a unit lies."""
        if unit.piece is not None:
            return self.state.folder / "pieces" / key_of(unit.source.name) / unit.key
        return target_of(unit.source, self.output, self.options.format)

    def _release(self, key: str) -> None:
        self.state.release(key)
        self.held.discard(key)

    # ---- What is done with it ----

    def _frames_of(self, unit: _Unit, events: Iterator[tuple[_Unit, Any]]) -> Iterator[Any]:
        """Yield the converter of a unit and its frames from the stream, up to the end of the unit."""
        for other, frame in events:
            assert other is unit
            if frame is None:
                return
            if isinstance(frame, Exception):
                raise frame
            yield frame

    def _compute(
        self, unit: _Unit, stream: Iterator[Any], writer: WriteBehind, reader: ReadAhead, started: float
    ) -> None:
        """Estimate and write the flow of a unit."""
        frames: Iterator[np.ndarray] | None = None
        while True:
            try:
                if frames is None:
                    job = self._open_job(unit, FrameConverter())
                    job.converter = next(stream)
                    frames = stream
                self._estimate(job, frames, writer, reader, started)
            except Exception as error:
                if is_out_of_memory(error) and self.batch_size > 1 and job.error is None:
                    self.batch_size //= 2
                    writer.submit(partial(self._discard, job))
                    self.skipping.add(unit.key)
                    _drain(stream)
                    job = self._open_job(unit, FrameConverter(self.options.intensity_range))
                    frames = _unit_frames(unit, job.converter)
                    continue
                message = explain_out_of_memory(error, "the prediction", OUT_OF_MEMORY)
                is_fatal = getattr(error, "errno", None) in FATAL or isinstance(error, ImportError)
                if is_fatal or (message is None and not isinstance(error, (ValueError, OSError))):
                    raise
                job.error = job.error or (error if message is None else ValueError(message))
            break
        self.skipping.add(unit.key)
        _drain(stream)
        self.skipping.discard(unit.key)
        writer.submit(partial(self._finish, job))

    def _estimate(
        self, job: _Job, frames: Iterator[np.ndarray], writer: WriteBehind, reader: ReadAhead, started: float
    ) -> None:
        unit = job.unit
        first = max(0, unit.start - OVERLAP)
        # Intensities have been mapped where the frames were read.
        settings = self.options.video_settings(self.batch_size) | {"intensity_range": None}
        for pair in FlowVideo(self.model, frames, **settings):
            index = first + pair.index
            if index >= unit.start:
                writer.submit(partial(job.write, dataclasses.replace(pair, index=index)))
                job.pairs += 1
                job.duplicates += pair.duplicate
                job.updates += pair.num_flow_updates
                if pair.cut:
                    job.cuts.append(index + 1)
                self.progress["pairs"] += 1
            elapsed = time.monotonic() - started
            self.progress["seconds"] = elapsed
            self.progress["busy"] = max(0.0, 1 - (reader.waited + writer.waited) / elapsed) if elapsed > 0 else 0.0
            if job.error is not None:
                return
            if self._stopping():
                job.cancelled = True
                return
        if job.pairs == 0 and unit.start == 0:
            raise ValueError("flow takes two frames, and there is one")

    def _open_job(self, unit: _Unit, converter: FrameConverter) -> _Job:
        path = self.state.new_partial(self._place_of(unit).name or "output")
        path.parent.mkdir(parents=True, exist_ok=True)
        return _Job(unit, path, partial(self._open_writer, unit.source), converter)

    def _open_writer(self, source: FlowSource, path: Path) -> Any:
        """Open the writer of a source whose output is to be written to a path."""
        options = self.options
        if options.format == "h5":
            described = json.dumps({key: value for key, value in self.settings.items() if key != "model"})
            attributes = {"model": self.settings["model"], "settings": described}
            return FlowArchiveWriter(path, attributes, options.backward, options.confidence)
        path.mkdir(parents=True, exist_ok=True)
        names, suffix = source.frame_names(), (FORMAT_SUFFIXES | COLLECTION_FORMATS)[options.format]

        def path_of(index: int) -> Path:
            if options.format == "jpg":
                return path / f"flow_x_{index + 1:05d}.jpg"
            return path / f"{f'frame_{index + 1:06d}' if names is None else names[index]}{suffix}"

        what = (options.backward, options.occlusion, options.color_scale, options.confidence, options.bound)
        files = FlowFileWriter(path_of, options.format, *what)
        if names is not None:
            written = [place for index in range(len(names) - 1) for place in files.paths(index)]
            if len(set(written)) < len(written):
                raise ValueError("several results would have one name, as images have almost one name; rename them")
        return files

    def _discard(self, job: _Job) -> None:
        if job.writer is not None:
            job.writer.__exit__(None, None, None)
        remove_partial(job.partial)

    def _finish(self, job: _Job) -> None:
        """Publish the output of a unit and its record, or remove it and record the failure, in the writing thread."""
        unit = job.unit
        try:
            if job.error is None and not job.cancelled:
                lost = job.writer.lost if job.writer is not None else []
                if job.writer is not None:
                    job.writer.__exit__(None, None, None)
                    job.writer = None
                    publish(job.partial, self._place_of(unit))
                else:  # a piece behind the end of a video whose container gives too many frames
                    self._place_of(unit).mkdir(parents=True, exist_ok=True)
                    remove_partial(job.partial)
                details = {"cuts": job.cuts, "duplicates": job.duplicates, "updates": job.updates}
                if job.converter.mapped_range is not None:
                    details["mapped_range"] = list(job.converter.mapped_range)
                details["lost"] = sum(lost) / len(lost) if lost else 0.0
                details["seconds"] = time.monotonic() - job.started
                self._record_done(unit, job.pairs, details)
            else:
                self._discard(job)
                if job.error is not None:
                    self._record_failure(unit, job.error)
        finally:
            self._release(unit.key)

    def _join(self, unit: _Unit) -> None:
        """Make the output of a source of those of its pieces."""
        try:
            records = [self.state.record(piece.key) or {} for piece in unit.pieces]
            failures = [record for record in records if record.get("status") != "done"]
            if failures:
                raise ValueError(failures[0].get("reason", "a piece of it is missing"))
            path = self.state.new_partial(self._place_of(unit).name or "output")
            path.parent.mkdir(parents=True, exist_ok=True)
            if self.options.format == "h5":
                with self._open_writer(unit.source, path) as writer:
                    for piece in unit.pieces:
                        if self._place_of(piece).is_file():
                            writer.append_file(self._place_of(piece))
            else:
                path.mkdir(parents=True, exist_ok=True)
                for piece in unit.pieces:
                    for file in self._place_of(piece).iterdir():
                        _link(file, path / file.name)
            publish(path, self._place_of(unit))
            details = {name: sum(record[name] for record in records) for name in ("duplicates", "updates", "seconds")}
            pairs = [record["pairs"] for record in records]
            details["lost"] = sum(record["lost"] * record["pairs"] for record in records) / max(1, sum(pairs))
            details["cuts"] = [cut for record in records for cut in record["cuts"]]
            self._record_done(unit, sum(pairs), details)
            shutil.rmtree(self._place_of(unit.pieces[0]).parent, ignore_errors=True)
            for piece in unit.pieces:
                self.state.forget(piece.key)
        except (ValueError, OSError) as error:
            if getattr(error, "errno", None) in FATAL:
                raise
            self._record_failure(unit, error)
        finally:
            self._release(unit.key)

    def _record_done(self, unit: _Unit, pairs: int, details: dict[str, Any]) -> None:
        record = self._record(unit, "done") | {"bytes": unit.source.num_bytes, "frames": pairs + 1, "pairs": pairs}
        record |= details | {"device": str(self.model.device), "settings": self.settings}
        self.state.write_record(unit.key, record)

    def _record_failure(self, unit: _Unit, error: Exception) -> None:
        before = self.state.record(unit.key) or {}
        runs = [*(before.get("runs", ()) if before.get("status") == "failed" else ()), self.state.run]
        reason = str(error) or type(error).__name__
        record = self._record(unit, "failed") | {"reason": reason, "runs": runs, "settings": self.settings}
        self.state.write_record(unit.key, record)
        if self.fail_fast:
            self.failed_fast = True

    def _record(self, unit: _Unit, status: str) -> dict[str, Any]:
        record = {"input": str(unit.source.path), "output": unit.source.name, "status": status}
        return record if unit.piece is None else record | {"piece": unit.piece}

    # ---- What is reported ----

    def _report(self, skipped: set[str], seconds: float) -> CollectionReport:
        done, pairs, failed, lost = 0, 0, [], []
        for source in self.sources:
            unit = self._unit_of(source)
            record = self.state.record(unit.key)
            if record is None or not self._is_finished(unit):
                continue
            if record["status"] == "done":
                done += 1
                if source.name not in skipped:
                    lost.append(record["lost"])
                    pairs += record["pairs"]
            else:
                failed.append({name: record[name] for name in ("input", "output", "reason")})
        workers = self.state.workers()
        if self.rank == 0:
            self.state.write_manifest([key_of(source.name) for source in self.sources])
        processes = [
            {
                "rank": worker["rank"],
                "pairs": worker["pairs"],
                "seconds": round(worker["seconds"], 3),
                "pairs_per_second": worker["pairs"] / worker["seconds"] if worker["seconds"] else 0.0,
                "model_busy": round(worker["busy"], 4),
            }
            for worker in sorted(workers, key=lambda worker: worker["rank"])
        ]
        return CollectionReport(
            sources=len(self.sources),
            done=done,
            skipped=len(skipped),
            failed=failed,
            pairs=pairs,
            seconds=seconds,
            stopped=self._stopping(),
            lost=sum(lost) / len(lost) if lost else 0.0,
            processes=processes,
            settings=self.settings,
        )


class _ProgressBar:
    """One bar over all sources and processes: pairs done of those known, and each process's pairs a second."""

    def __init__(self, run: _Run, skipped: set[str], shown: bool):
        self.run, self.shown = run, shown
        self.over = threading.Event()
        self.total = sum(max(0, (source.num_frames or 1) - 1) for source in run.sources if source.name not in skipped)

    def __enter__(self) -> "_ProgressBar":
        if self.shown:
            self.thread = threading.Thread(target=self._show, daemon=True)
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        if self.shown:
            self.thread.join()

    def _show(self) -> None:
        from tqdm.auto import tqdm

        with tqdm(total=self.total, unit="pair") as bar:
            over = False
            while not over:
                over = self.over.wait(1.0)
                workers = self.run.state.workers()
                bar.n = sum(worker["pairs"] for worker in workers)
                bar.total = max(self.total, bar.n)
                rates = [worker["pairs"] / worker["seconds"] for worker in workers if worker["seconds"]]
                bar.set_postfix_str(" + ".join(f"{rate:.1f}" for rate in rates) + " pairs/s" if rates else "")


def _plan(sources: Sequence[FlowSource], split_frames: int | None) -> Iterator[_Unit]:
    """Yield the units of work: whole sources; or the pieces of long ones, and the joining of these."""
    for source in sources:
        key = key_of(source.name)
        num_pairs = (source.num_frames or 0) - 1
        if split_frames is None or num_pairs <= split_frames:
            yield _Unit(source, key, source.work)
            continue
        count = -(-num_pairs // split_frames)
        pieces = []
        for piece in range(count):
            start, is_last = piece * split_frames, piece == count - 1
            piece_key = key_of(f"{source.name}#{start}-{'end' if is_last else start + split_frames}")
            stop = None if is_last else start + split_frames
            pieces.append(_Unit(source, piece_key, source.work / count, start, stop, piece))
        yield from pieces
        yield _Unit(source, key, 0.0, pieces=tuple(pieces))


def _unit_frames(unit: _Unit, converter: FrameConverter) -> Iterator[np.ndarray]:
    """Yield the frames of a unit, with those before it that its state is taken up from."""
    first = max(0, unit.start - OVERLAP)
    count = None if unit.stop is None else unit.stop - first + 1
    return itertools.islice(unit.source.read(first, converter), count)


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system cannot."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _drain(frames: Iterator[Any]) -> None:
    """Read the rest of a unit that has failed, so that the frames of the next one follow."""
    with contextlib.suppress(Exception):  # whatever else is wrong with it, its first error is the one to report
        for _ in frames:
            pass
