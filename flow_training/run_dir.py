"""The folder of a run: who may write into it, and what is resumed from it."""

import contextlib
import os
import platform
import time
import uuid
from pathlib import Path
from typing import Any

import yaml
from transformers.utils import SAFE_WEIGHTS_NAME

from flow_training.checkpoints import find_checkpoint, list_checkpoints
from flow_training.run_log import FILE_NAME, read_log

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

LOCK, TOKEN = ".lock", ".lock-token"
PATIENCE = 10.0  # seconds


class RunLock:
    """Keeps a second run out of a folder for as long as this process lives, however it ends.

    A lock of POSIX's `lockf`, as a forked DataLoader worker does not inherit it: `flock` would outlive a killed run in
    its orphans.

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
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        if fcntl is None:
            return
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(self._descriptor, 200).decode()
            os.close(self._descriptor)
            raise ValueError(
                f"another run writes into {output_dir} ({holder}): wait for it, end it, or choose another output_dir"
            ) from None
        try:
            os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, f"process {os.getpid()} on {platform.node()}".encode())
        except OSError as error:
            self.leave_no_trace()
            raise OSError(f"cannot write into {output_dir}: {error}") from error

    def show_token(self) -> None:
        """Write `token` for the other processes of the run: into a file of its own.

        Whoever reads the lock's file and closes it again gives up all locks that his process has on it.
        """
        (self._path.parent / TOKEN).write_text(self.token)

    def close(self) -> None:
        """Let others in."""
        (self._path.parent / TOKEN).unlink(missing_ok=True)
        os.close(self._descriptor)

    def leave_no_trace(self) -> None:
        """Let others in, and remove the folder if it was made for nothing."""
        self.close()
        if self._made_folder:
            self._path.unlink()
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
