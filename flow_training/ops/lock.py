"""A lock that keeps a second run out of the folder of a run, also on file systems without locks."""

import contextlib
import errno
import logging
import os
import platform
import time
import uuid
from pathlib import Path

from filelock import SoftFileLock, Timeout, lock_descriptor

logger = logging.getLogger(__name__)

LOCK, MARKER, TOKEN = ".lock", ".lock-marker", ".lock-token"
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}  # of some network file systems
TIMEOUT = 10.0  # seconds until a network file system shows what another machine has written
MARKER_TIMEOUT = 1.0  # seconds, enough to find that a marker's process has died, and to remove it

_open_locks: set[int] = set()  # descriptors


def _close_inherited_locks() -> None:
    """Close the lock's file in a forked process, a DataLoader worker for example.

    Otherwise `flock` would keep the lock of a killed run until its last worker ends.
    """
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
        output_dir: The run's folder; created if it does not exist.

    Raises:
        ValueError: Another run writes into it, or it is a file.
        OSError: It cannot be written.
    """

    def __init__(self, output_dir: Path):
        if output_dir.exists() and not output_dir.is_dir():
            raise ValueError(f"output_dir must be a folder; got {output_dir}, which is a file")
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
            self.release_and_cleanup()
            raise OSError(f"cannot write into {output_dir}: {error}") from error

    def _acquire(self) -> bool:
        """Try to take the lock; returns whether this run has it now."""
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
        """Write `token` into a file for the other processes of the run, for `sees_token`.

        It is a file of its own, as a process that opens and closes the lock's file releases all its locks on it.
        """
        (self._path.parent / TOKEN).write_text(self.token)

    def close(self) -> None:
        """Release the lock; a second call does nothing."""
        if self._descriptor in _open_locks:
            (self._path.parent / TOKEN).unlink(missing_ok=True)
            self._close_descriptor()
            if self._marker is not None:
                self._marker.release()

    def _close_descriptor(self) -> None:
        _open_locks.discard(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = -1

    def release_and_cleanup(self) -> None:
        """Release the lock, and remove the folder again if this run has created it and left nothing in it."""
        self.close()
        if self._made_folder:
            self._path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it is not empty
                self._path.parent.rmdir()


def sees_token(output_dir: Path, token: str) -> bool:
    """Whether the folder is, on this machine too, that of the process which called `RunLock.show_token`.

    Waits up to `TIMEOUT` seconds.

    Args:
        output_dir: The run's folder as this process sees it.
        token: `RunLock.token` of the main process.
    """
    deadline = time.monotonic() + TIMEOUT
    while True:
        try:
            if (output_dir / TOKEN).read_text() == token:
                return True
        except OSError:
            pass  # not there yet
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
