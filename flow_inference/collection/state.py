"""What processes on one or several machines share of a collection: files in `.flow_state` below the output folder.

- `settings.json`: what the outputs depend on; a run with other settings is refused.
- `records/KEY.json`: what has become of a source, written when its output is in its place.
- `claims/KEY.json`: which process computes it now. A file is made by only one of several processes that try.
- `workers/ID.json`: of each process, rewritten every few seconds: progress, and that it is alive.
- `partial/`: outputs that are not complete.

Nothing but the files passes between processes, so that any number of them may come, be killed, and go.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flow_data.atomic_write import atomic_write

FOLDER = ".flow_state"
MANIFEST = "manifest.jsonl"
BEAT = 2.0  # seconds between two signs of life
POLL = 0.1  # seconds
SILENCE = 60.0  # seconds without one after which a process of another machine is taken for dead


def key_of(name: str) -> str:
    """Return the file name of a unit of work: of any name, short, and different for different names."""
    readable = "".join(letter if letter.isalnum() else "-" for letter in name)[-40:]
    return f"{readable}-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


class CollectionState:
    """The shared state of a collection, as one process sees it.

    Args:
        output: The output folder, which is made.
        run: Name of the run, the same for all processes of one launch.
    """

    def __init__(self, output: Path, run: str):
        self.output, self.run = output, run
        self.folder = output / FOLDER
        self.worker = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        for name in ("records", "claims", "workers", "partial"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)

    # ---- Settings ----

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Keep the settings of the first run, and compare with them those of later ones.

        Raises:
            ValueError: They differ; the message names the first difference.
        """
        path = self.folder / "settings.json"
        wanted = json.loads(json.dumps(settings))
        partial = self.folder / f"settings-{uuid.uuid4().hex}"
        partial.write_text(json.dumps(wanted, indent=2) + "\n")
        try:
            with contextlib.suppress(FileExistsError):
                os.link(partial, path)  # fails where there is a file, in one step
        except OSError:  # a file system without links
            if not path.exists():
                os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        kept = _read_json(path)
        if kept is None:
            raise ValueError(f"{path}: damaged; remove {self.folder} to compute everything again")
        for name in dict.fromkeys([*kept, *wanted]):
            if kept.get(name) != wanted.get(name):
                raise ValueError(
                    f"{self.output} has flow with {name} {json.dumps(kept.get(name))}, and this run has "
                    f"{json.dumps(wanted.get(name))}: repeat that setting, or choose another --output"
                )

    # ---- Records ----

    def record(self, key: str) -> dict[str, Any] | None:
        """Return what has become of a unit of work; None where it is not finished and has not failed."""
        return _read_json(self.folder / "records" / f"{key}.json")

    def write_record(self, key: str, record: Mapping[str, Any]) -> None:
        """Write what has become of a unit of work."""
        with atomic_write(self.folder / "records" / f"{key}.json") as partial:
            partial.write_text(json.dumps(record) + "\n")

    def remove_record(self, key: str) -> None:
        """Remove a record whose output is not there any more, or is out of date."""
        (self.folder / "records" / f"{key}.json").unlink(missing_ok=True)

    def write_manifest(self, keys: list[str]) -> None:
        """Write a line for each source that is finished or has failed: those of these keys, then all others."""
        stored = {path.stem: path for path in self._complete_files("records")}
        ordered = [key for key in keys if key in stored] + [key for key in stored if key not in set(keys)]
        records = [record for key in ordered if (record := _read_json(stored[key])) and "piece" not in record]
        for record in records:
            record.pop("names", None)  # of frames: many
        with atomic_write(self.output / MANIFEST) as partial:
            partial.write_text("".join(json.dumps(record) + "\n" for record in records))

    # ---- Claims ----

    def claim(self, key: str) -> bool:
        """Claim a unit of work for this process; return whether no living process has it."""
        path = self.folder / "claims" / f"{key}.json"
        for _ in range(2):
            try:
                descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                if self._is_alive(path):
                    return False
                stale = path.with_name(f".{uuid.uuid4().hex}.stale")
                with contextlib.suppress(FileNotFoundError):  # another process was faster
                    os.rename(path, stale)
                    stale.unlink()
                continue
            with os.fdopen(descriptor, "w") as file:
                file.write(self.worker)
            return True
        return False

    def release(self, key: str) -> None:
        """Give a claim back, whether the work is done or not."""
        (self.folder / "claims" / f"{key}.json").unlink(missing_ok=True)

    def _is_alive(self, claim: Path) -> bool:
        try:
            worker = claim.read_text()
            if not worker:  # a process has just made the file, or died before it wrote its name
                return self._age(claim) < BEAT
            beat = self.folder / "workers" / f"{worker}.json"
            content = _read_json(beat) or {}
            if content.get("host") == socket.gethostname():
                return _has_process(content)
            return self._age(beat) < SILENCE
        except FileNotFoundError:
            return False

    def _age(self, path: Path) -> float:
        """Return the age of a file in seconds by the clock of its file system; endless where it is gone."""
        own = self.folder / "workers" / f"{self.worker}.json"
        now = own.stat().st_mtime if own.exists() else time.time()
        try:
            return now - path.stat().st_mtime
        except FileNotFoundError:
            return math.inf

    # ---- Workers ----

    @contextlib.contextmanager
    def alive(self, progress: Mapping[str, Any]) -> Iterator[None]:
        """Show in a file that this process is alive and how far it is, as long as the block runs.

        Args:
            progress: Plain values, which may change meanwhile.
        """
        path = self.folder / "workers" / f"{self.worker}.json"
        fixed = {"host": socket.gethostname(), "pid": os.getpid(), "born": process_birth(os.getpid()), "run": self.run}

        def beat() -> None:
            with contextlib.suppress(OSError), atomic_write(path) as partial:  # a full disk is found by the writer
                partial.write_text(json.dumps(fixed | dict(progress)))

        over = threading.Event()

        def repeat() -> None:
            while not over.wait(BEAT):
                beat()

        beat()
        thread = threading.Thread(target=repeat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            beat()

    def workers(self) -> list[dict[str, Any]]:
        """Return the last progress of each process of this run, of those that have ended, too."""
        found = (_read_json(path) for path in self._complete_files("workers"))
        return [content for content in found if content is not None and content.get("run") == self.run]

    def wait_for_ends(self, timeout: float) -> None:
        """Wait until the living processes of this run on this machine have written their last progress."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if not any(_has_process(worker) and not worker.get("ended") for worker in self.workers()):
                return
            time.sleep(POLL)

    def clean(self) -> None:
        """Remove the partial outputs of dead processes, and the signs of life of those of this machine."""
        # Before the workers: a process shows itself first, and makes a partial output then.
        partials = list((self.folder / "partial").iterdir())
        host, living = socket.gethostname(), set()
        for path in self._complete_files("workers"):
            content = _read_json(path)
            if content is None:
                continue  # another process has just removed it
            if content.get("host") == host and not _has_process(content):
                if content.get("run") != self.run:
                    path.unlink(missing_ok=True)
            elif content.get("host") == host or self._age(path) < SILENCE:
                living.add(path.stem)
        for path in partials:
            if path.name.partition("@")[0] not in living:
                _remove(path)
        for name in ("records", "workers"):
            for path in (self.folder / name).glob(".*"):
                if SILENCE < self._age(path) < math.inf:  # a process was killed while it wrote the file
                    path.unlink(missing_ok=True)

    def _complete_files(self, name: str) -> list[Path]:
        """Return the files of a folder without those that are being written, whose names begin with a dot."""
        return sorted(path for path in (self.folder / name).glob("*.json") if not path.name.startswith("."))

    def new_partial(self, name: str) -> Path:
        """Return a path for an output that is not complete, in the file system of the output folder."""
        return self.folder / "partial" / f"{self.worker}@{uuid.uuid4().hex[:8]}" / name


def remove_partial(path: Path) -> None:
    """Remove what `new_partial` has returned, a file or a folder, with the folder made for it."""
    _remove(path.parent)


def publish(partial: Path, target: Path) -> None:
    """Give a complete output its name: a file, or a folder of files. What is there is replaced.

    Raises:
        OSError: It cannot be moved.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if partial.is_dir() and target.is_dir():  # of an earlier attempt, or with the output of a source below it
        for file in sorted(partial.rglob("*")):
            if not file.is_dir():
                place = target / file.relative_to(partial)
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, place)
    else:
        os.replace(partial, target)
    _remove(partial.parent)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _has_process(worker: Mapping[str, Any]) -> bool:
    """Return whether the process of this machine that a worker's file names is still the same one."""
    pid = worker.get("pid")
    if not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    born = process_birth(pid)
    return born is None or worker.get("born") in (None, born)


def process_birth(pid: int) -> str | None:
    """Return when a process was started, in the units of Linux, or "dead"; None on other systems.

    A number of a process is used again by a later one.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return "dead" if fields[0] in ("Z", "X") else fields[19]
