"""The folder of a run: who may write into it, and what is resumed from it."""

import contextlib
import errno
import logging
import os
import platform
import time
import uuid
from pathlib import Path
from typing import Any

import yaml
from filelock import SoftFileLock, Timeout, lock_descriptor
from transformers.utils import SAFE_WEIGHTS_NAME

from flow_training.checkpoints import find_checkpoint, list_checkpoints
from flow_training.run_log import FILE_NAME, read_log

logger = logging.getLogger(__name__)

LOCK, MARKER, TOKEN = ".lock", ".lock-marker", ".lock-token"
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}  # of some network file systems
PATIENCE = 10.0  # seconds
MARKER_TIMEOUT = 1.0  # seconds in which the marker of a process that has died is found to be one, and removed

_open_locks: set[int] = set()  # descriptors


def _close_inherited_locks() -> None:
    """Run in a forked process, a DataLoader worker say: else `flock` would hold a killed run's lock until it ends."""
    while _open_locks:
        os.close(_open_locks.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited_locks)


class RunLock:
    """Keeps a second run out of a folder for as long as this process lives, however it ends.

    It is the operating system's lock on a file (`filelock`: `flock`, or `LockFileEx` on Windows). On a file system
    without such locks it is a marker file that names the process; one of a process that was killed is removed by the
    next run on the same machine, and by hand if that was another machine.

    Args:
        output_dir: the run's folder; made if it is not there.

    Raises:
        ValueError: another run is in it, or it is a file.
        OSError: it cannot be written.
    """

    def __init__(self, output_dir: Path):
        if output_dir.exists() and not output_dir.is_dir():
            raise ValueError(f"output_dir: {output_dir} is a file")
        self._made_folder = not output_dir.exists()
        output_dir.mkdir(parents=True, exist_ok=True)
        self._path = output_dir / LOCK
        self.token = uuid.uuid4().hex
        self._marker: SoftFileLock | None = None
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        _open_locks.add(self._descriptor)
        try:
            if not self._acquire():
                os.lseek(self._descriptor, 1, os.SEEK_SET)  # the first byte is the locked one, unreadable on Windows
                holder = os.read(self._descriptor, 200).decode(errors="replace").strip()
                marker = None if self._marker is None else self._marker.lock_file
                killed = "" if marker is None else f"; if it was killed on another machine, remove {marker}"
                raise ValueError(
                    f"another run writes into {output_dir} ({holder}): wait for it, end it, or choose another "
                    f"output_dir{killed}"
                )
        except BaseException:
            self._close_descriptor()
            raise
        try:
            text = f"\nprocess {os.getpid()} on {platform.node()}".encode()
            os.write(self._descriptor, text)
            os.ftruncate(self._descriptor, len(text))
        except OSError as error:
            self.leave_no_trace()
            raise OSError(f"cannot write into {output_dir}: {error}") from error

    def _acquire(self) -> bool:
        """Whether the lock is this run's now."""
        try:
            return lock_descriptor(self._descriptor, blocking=False)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise OSError(f"cannot lock {self._path}: {error}") from error
        marker = self._path.parent / MARKER
        logger.warning("the file system of %s has no locks; %s keeps other runs out", self._path.parent, marker)
        self._marker = SoftFileLock(marker)
        try:
            self._marker.acquire(timeout=MARKER_TIMEOUT)
        except Timeout:
            return False
        return True

    def show_token(self) -> None:
        """Write `token` for the other processes of the run: into a file of its own.

        Whoever reads the lock's file and closes it again gives up all locks that his process has on it.
        """
        (self._path.parent / TOKEN).write_text(self.token)

    def close(self) -> None:
        """Let others in; a second call does nothing."""
        if self._descriptor in _open_locks:
            (self._path.parent / TOKEN).unlink(missing_ok=True)
            self._close_descriptor()
            if self._marker is not None:
                self._marker.release()

    def _close_descriptor(self) -> None:
        _open_locks.discard(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = -1

    def leave_no_trace(self) -> None:
        """Let others in, and remove the folder if it was made for nothing."""
        self.close()
        if self._made_folder:
            self._path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # something is in it after all
                self._path.parent.rmdir()


def sees_token(output_dir: Path, token: str) -> bool:
    """Whether the folder here is that of the process which called `RunLock.show_token`.

    A network's file system may take a while to show what another machine has written.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            if (output_dir / TOKEN).read_text() == token:
                return True
        except OSError:
            pass  # not there yet
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


def choose_checkpoint(output_dir: Path, resume_from: str | None) -> Path | None:
    """The checkpoint that a run goes on from, None for a new one.

    Args:
        output_dir: the run's folder.
        resume_from: a checkpoint's folder; `latest`, the newest of output_dir; `auto`, likewise, or from the start
            where there is none; or None.

    Raises:
        ValueError: output_dir holds a run that is not gone on with, or a model.
        FileNotFoundError: there is no such checkpoint.
    """
    checkpoint = None if resume_from is None else find_checkpoint(resume_from, output_dir)
    goes_on_here = resume_from == "auto" or (
        checkpoint is not None
        and (checkpoint.resolve().parent == output_dir.resolve() or _ended_before_saving(output_dir, checkpoint))
    )
    if not goes_on_here and ((output_dir / FILE_NAME).exists() or list_checkpoints(output_dir)):
        raise ValueError(
            f"{output_dir} holds an earlier run: go on with it (--resume_from_checkpoint latest), "
            "choose another output_dir, or remove it"
        )
    if checkpoint is None and (output_dir / SAFE_WEIGHTS_NAME).exists():
        raise ValueError(
            f"{output_dir} holds the weights of a model, and no checkpoint to go on from: choose another output_dir, "
            "or remove it"
        )
    return checkpoint


def _ended_before_saving(output_dir: Path, checkpoint: Path) -> bool:
    """Whether what output_dir holds may be a run from that checkpoint which saved nothing: a log of steps after it."""
    log = output_dir / FILE_NAME
    if list_checkpoints(output_dir) or not log.exists():
        return False
    step = int(checkpoint.resolve().name.rpartition("-")[2])
    return all(line["step"] > step for line in read_log(log))


def check_same_run(checkpoint: Path, saved: dict[str, Any], settings: dict[str, Any]) -> None:
    """Refuse to go on from a checkpoint with settings that make another run of it.

    Args:
        checkpoint: where `saved` comes from.
        saved, settings: `flow_training.config.TrainingConfig.trajectory`, then and now.

    Raises:
        ValueError: they differ; the message lists how.
    """
    names = [*saved, *(name for name in settings if name not in saved)]
    changes = [
        f"{name}: {_text(saved.get(name))} -> {_text(settings.get(name))}"
        for name in names
        if saved.get(name) != settings.get(name)
    ]
    if changes:
        raise ValueError(
            f"{checkpoint} was trained with other settings: {'; '.join(changes)}. Give the old ones, "
            "or go on with the new ones all the same: --allow_config_changes"
        )


def _text(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=float("inf")).removesuffix("...\n").strip()
