"""One process's part in a collection: it takes units of work, computes, writes and records them.

Decoding, model and writing overlap: one thread reads ahead, one writes behind.
"""

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flow_data.file_names import COLLECTION_FORMATS
from flow_data.flow_io import FORMAT_SUFFIXES
from flow_data.out_of_memory import explain_out_of_memory, is_out_of_memory
from flow_inference.background import ReadAhead, WriteBehind
from flow_inference.collection.options import CollectionOptions
from flow_inference.collection.report import CollectionReport, ProgressBar
from flow_inference.collection.sources import FlowSource, check_outputs, choose_shard, find_sources, measure
from flow_inference.collection.state import CollectionState, key_of, process_birth, publish, remove_partial
from flow_inference.collection.units import OVERLAP, Unit, plan_units, read_unit
from flow_inference.estimator import weights_checksum
from flow_inference.outputs import FlowArchiveWriter, FlowFileWriter
from flow_inference.video import FlowVideo, VideoFlow
from modeling_raft import RaftForOpticalFlow
from modeling_raft.frames_raft import FrameConverter

READ_AHEAD, WRITE_BEHIND = 6, 6  # frames, pairs
AUTO_BATCH_SIZE = 16  # halved whenever memory runs out
TIMEOUT = 10.0  # seconds in which other processes of a launch write how far they came, once there is no more to do
WAIT = 1.0  # seconds between two looks at what other processes compute
FATAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # errors of the output's disk, which no other source would escape
OUT_OF_MEMORY = "Estimate on smaller frames with max_side."  # advice
_calls = itertools.count()


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
    targets = [target_of(source, output, options.format) for source in sources]
    check_outputs(sources, output, targets, are_files=is_file_format(options.format))
    sources = [measure(source) for source in sources]
    if shard is not None:
        index, count = shard
        if not (count >= 1 and 0 <= index <= count):
            raise ValueError(f"shard must be I/N with I from 1 to N; got {index}/{count}")
        sources = choose_shard(sources, index, count)
    return _Run(model, sources, output, options, fail_fast, stop or (lambda: False), model_name).run(show_progress)


def target_of(source: FlowSource, output: Path, format: str) -> Path:
    """Return the output of a source: a folder of files, or a file."""
    if not is_file_format(format):
        return output / source.name
    name = source.path.resolve().name if source.name == "." else source.name
    return output / f"{name}{COLLECTION_FORMATS[format]}"


def is_file_format(format: str) -> bool:
    """Return whether the output of a source is one file, not a folder of files."""
    return format == "h5"


@dataclass
class _Job:
    """A unit that is being computed, with its output, which only the writing thread touches."""

    unit: Unit
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
        # The largest first; before them what cannot be read, so that it is seen early.
        self.units = sorted(
            plan_units(sources, options.split_frames),
            key=lambda unit: (unit.work > 0 or bool(unit.pieces), -unit.work, unit.key),
        )
        self.pending = {unit.key: unit for unit in self.units}
        self.held: set[str] = set()  # claims of this process
        self.seen_complete: set[str] = set()  # units whose files have been looked for
        self.skipping: set[str] = set()  # units whose remaining frames nobody wants
        self.failed_fast = False
        self.progress: dict[str, Any] = {"rank": self.rank, "pairs": 0, "seconds": 0.0, "busy": 0.0, "ended": False}

    def run(self, show_progress: bool) -> CollectionReport:
        started = time.monotonic()
        self.state.clean()
        skipped = {source.name for source in self.sources if self._is_finished(self._unit_of(source))}
        known = (max(0, (source.num_frames or 1) - 1) for source in self.sources if source.name not in skipped)
        bar = ProgressBar(self.state.workers, sum(known), show_progress and self.rank == 0)
        try:
            with bar, self.state.alive(self.progress):
                self._work()
                self.progress["ended"] = True
        except BaseException:
            with contextlib.suppress(OSError):  # the error above is the one to report
                self._write_manifest()
            raise
        if self.rank == 0:
            self.state.wait_for_ends(TIMEOUT)
        self._write_manifest()
        return self._report(time.monotonic() - started)

    def _write_manifest(self) -> None:
        if self.rank == 0:
            self.state.write_manifest([key_of(source.name) for source in self.sources])

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

    def _read(self) -> Iterator[tuple[Unit, Any]]:
        """Claim one unit after the other, and yield for each a None, its frames, and a None or an error."""
        while (unit := self._next_unit()) is not None:
            yield unit, None
            if unit.pieces:
                continue
            try:
                converter = FrameConverter(self.options.intensity_range)
                yield unit, converter
                for frame in read_unit(unit, converter):
                    if unit.key in self.skipping:
                        break
                    yield unit, frame
                yield unit, None
            except Exception as error:
                yield unit, error

    def _next_unit(self) -> Unit | None:
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

    def _is_finished(self, unit: Unit) -> bool:
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
        if unit.key not in self.seen_complete and self._is_there(unit, record):
            self.seen_complete.add(unit.key)
        return unit.key in self.seen_complete

    def _is_there(self, unit: Unit, record: dict[str, Any]) -> bool:
        """Return whether all files of a complete output still exist."""
        place = self._place_of(unit)
        if not place.is_dir():
            return place.is_file()
        there = set(os.listdir(place))
        return all(path.name in there for path in self._files_of(unit, record))

    def _files_of(self, unit: Unit, record: dict[str, Any]) -> list[Path]:
        """Return the files of a complete output that is a folder."""
        writer = self._file_writer(self._place_of(unit), record.get("names"))
        indices = range(unit.start, unit.start + record["pairs"])
        return [path for index in indices for path in writer.paths(index)]

    def _remove_outdated(self, unit: Unit) -> None:
        """Remove an output that is to be written again: its source may have fewer frames now."""
        record = self.state.record(unit.key)
        place = self._place_of(unit)
        if record is not None and record["status"] == "done" and place.is_dir():
            for path in self._files_of(unit, record):
                path.unlink(missing_ok=True)
            self.state.remove_record(unit.key)

    def _pieces_ended(self, unit: Unit) -> bool:
        return all(self._is_finished(piece) for piece in unit.pieces)

    def _unit_of(self, source: FlowSource) -> Unit:
        return Unit(source, key_of(source.name), source.work)

    def _place_of(self, unit: Unit) -> Path:
        """Return where the complete output of a unit lies."""
        if unit.piece is not None:
            return self.state.folder / "pieces" / key_of(unit.source.name) / unit.key
        return target_of(unit.source, self.output, self.options.format)

    def _release(self, key: str) -> None:
        self.state.release(key)
        self.held.discard(key)

    # ---- What is done with it ----

    def _frames_of(self, unit: Unit, events: Iterator[tuple[Unit, Any]]) -> Iterator[Any]:
        """Yield the converter of a unit and its frames from the stream, up to the end of the unit."""
        for other, frame in events:
            assert other is unit
            if frame is None:
                return
            if isinstance(frame, Exception):
                raise frame
            yield frame

    def _compute(
        self, unit: Unit, stream: Iterator[Any], writer: WriteBehind, reader: ReadAhead, started: float
    ) -> None:
        """Estimate and write the flow of a unit."""
        frames: Iterator[np.ndarray] | None = None
        while True:
            try:
                if frames is None:
                    job = self._open_job(unit, FrameConverter())
                    writer.submit(partial(self._remove_outdated, unit))
                    job.converter = next(stream)
                    frames = stream
                self._estimate(job, frames, writer, reader, started)
            except Exception as error:
                if is_out_of_memory(error) and self.batch_size > 1 and job.error is None:
                    self.batch_size //= 2
                    writer.submit(partial(self._discard, job))
                    self.skipping.add(unit.key)
                    drain(stream)
                    job = self._open_job(unit, FrameConverter(self.options.intensity_range))
                    frames = read_unit(unit, job.converter)
                    continue
                message = explain_out_of_memory(error, "the prediction", OUT_OF_MEMORY)
                is_fatal = getattr(error, "errno", None) in FATAL or isinstance(error, ImportError)
                if is_fatal or (message is None and not isinstance(error, (ValueError, OSError))):
                    raise
                job.error = job.error or (error if message is None else ValueError(message))
            break
        self.skipping.add(unit.key)
        drain(stream)
        self.skipping.discard(unit.key)
        self.failed_fast |= self.fail_fast and job.error is not None
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
            raise ValueError(f"{unit.source.path}: flow takes two frames, and there is one")

    def _open_job(self, unit: Unit, converter: FrameConverter) -> _Job:
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
        names = source.frame_names()
        files = self._file_writer(path, names)
        if names is not None:
            written = [place for index in range(len(names) - 1) for place in files.paths(index)]
            if len(set(written)) < len(written):
                raise ValueError("several results would have one name, as images have almost one name; rename them")
        return files

    def _file_writer(self, path: Path, names: list[str] | None) -> FlowFileWriter:
        """Return the writer of files in a folder, named by the frames or, where these have no names, numbered."""
        options = self.options
        suffix = (FORMAT_SUFFIXES | COLLECTION_FORMATS)[options.format]

        def path_of(index: int) -> Path:
            if options.format == "jpg":
                return path / f"flow_x_{index + 1:05d}.jpg"
            return path / f"{f'frame_{index + 1:06d}' if names is None else names[index]}{suffix}"

        what = (options.backward, options.occlusion, options.color_scale, options.confidence, options.bound)
        return FlowFileWriter(path_of, options.format, *what)

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
        except OSError as error:
            if error.errno in FATAL:
                raise
            self._discard(job)
            self._record_failure(unit, error)
        finally:
            self._release(unit.key)

    def _join(self, unit: Unit) -> None:
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
                        link_file(file, path / file.name)
            self._remove_outdated(unit)
            publish(path, self._place_of(unit))
            details = {name: sum(record[name] for record in records) for name in ("duplicates", "updates", "seconds")}
            pairs = [record["pairs"] for record in records]
            details["lost"] = sum(record["lost"] * record["pairs"] for record in records) / max(1, sum(pairs))
            details["cuts"] = [cut for record in records for cut in record["cuts"]]
            self._record_done(unit, sum(pairs), details)
            shutil.rmtree(self._place_of(unit.pieces[0]).parent, ignore_errors=True)
            for piece in unit.pieces:
                self.state.remove_record(piece.key)
        except (ValueError, OSError) as error:
            if getattr(error, "errno", None) in FATAL:
                raise
            self._record_failure(unit, error)
        finally:
            self._release(unit.key)

    def _record_done(self, unit: Unit, pairs: int, details: dict[str, Any]) -> None:
        record = self._record(unit, "done") | {"bytes": unit.source.num_bytes, "frames": pairs + 1, "pairs": pairs}
        names = unit.source.frame_names()
        record |= details if names is None else details | {"names": names}
        record |= {"device": str(self.model.device), "run": self.state.run, "settings": self.settings}
        self.state.write_record(unit.key, record)

    def _record_failure(self, unit: Unit, error: Exception) -> None:
        before = self.state.record(unit.key) or {}
        runs = [*(before.get("runs", ()) if before.get("status") == "failed" else ()), self.state.run]
        reason = str(error) or type(error).__name__
        record = self._record(unit, "failed") | {"reason": reason, "runs": runs, "settings": self.settings}
        self.state.write_record(unit.key, record)
        if self.fail_fast:
            self.failed_fast = True

    def _record(self, unit: Unit, status: str) -> dict[str, Any]:
        record = {"input": str(unit.source.path), "output": unit.source.name, "status": status}
        return record if unit.piece is None else record | {"piece": unit.piece}

    # ---- What is reported ----

    def _report(self, seconds: float) -> CollectionReport:
        done, skipped, pairs, failed, lost = 0, 0, 0, [], []
        for source in self.sources:
            unit = self._unit_of(source)
            record = self.state.record(unit.key)
            if record is None or not self._is_finished(unit):
                continue
            if record["status"] == "done":
                done += 1
                if record["run"] != self.state.run:  # before, or by a run beside this one
                    skipped += 1
                    continue
                lost.append(record["lost"])
                pairs += record["pairs"]
            else:
                failed.append({name: record[name] for name in ("input", "output", "reason")})
        workers = self.state.workers()
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
            skipped=skipped,
            failed=failed,
            pairs=pairs,
            seconds=seconds,
            stopped=self._stopping(),
            lost=sum(lost) / len(lost) if lost else 0.0,
            processes=processes,
            settings=self.settings,
        )


def link_file(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system cannot."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def drain(frames: Iterator[Any]) -> None:
    """Read the rest of a unit that has failed, so that the frames of the next one follow."""
    with contextlib.suppress(Exception):  # whatever else is wrong with it, its first error is the one to report
        for _ in frames:
            pass
