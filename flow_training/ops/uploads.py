"""Uploads of a run, while it trains and at its end: one at a time, each in a process of its own.

A process takes no time from the training, and can be killed whatever it is waiting for.
"""

import atexit
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from flow_training import hub
from flow_training.checkpoints import UNFINISHED

TIMEOUT = 120.0  # seconds that the end of a run waits for an upload in the background


class Uploads:
    """Pushes states of a run to a repository, with `flow_training.hub`.

    Args:
        output_dir: The run's folder. A state that is uploaded has a copy in it meanwhile, of a name that
            `flow_training.checkpoints.remove_unfinished` knows.
        repo_id: An existing repository, user/name.
        token: None is the one that is logged in.
        report: Prints a line; it is also called from another thread.
    """

    def __init__(self, output_dir: Path, repo_id: str, token: str | None, report: Callable[[str], Any]):
        self.output_dir, self.repo_id = output_dir, repo_id
        self._token, self._report = token, report
        self._step = 0  # of the last upload in the background
        self._process: subprocess.Popen | None = None
        self._watcher: threading.Thread | None = None
        self._canceled = False
        atexit.register(self.cancel)  # however the run ends, it does not wait for an upload in the background

    def start(self, step: int, description: str, write: Callable[[Path], None]) -> None:
        """Start to upload a step in the background, unless the upload of another one is still running.

        A failure, now or later, is reported in a line and raises nothing: the next upload replaces this one.

        Args:
            step: Of the run.
            description: Of this state, for the history of the repository.
            write: Creates a folder and writes into it what is published.
        """
        if self._watcher is not None and self._watcher.is_alive():
            self._report(
                f"step {step} is not uploaded: the upload of step {self._step} to {self.repo_id} is still running"
            )
            return
        folder = self.output_dir / f"{UNFINISHED}checkpoint-{step}-upload"
        try:
            write(folder)
            self._process = self._push(
                folder, "--commit_message", description, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            self._report(f"step {step} is not uploaded, training continues: {error}")
            return
        self._step, self._canceled = step, False
        self._watcher = threading.Thread(target=self._watch, args=[self._process, step, folder], daemon=True)
        self._watcher.start()

    def _watch(self, process: subprocess.Popen, step: int, folder: Path) -> None:
        errors = process.communicate()[1]
        shutil.rmtree(folder, ignore_errors=True)
        if process.returncode == 0:
            self._report(f"step {step} is uploaded to {self.repo_id}")
        elif not self._canceled:
            lines = [line for line in errors.splitlines() if line.startswith(f"{hub.PROG}: error: ")]
            reason = lines[-1].partition("error: ")[2] if lines else f"its process ended with {process.returncode}"
            self._report(f"step {step} is not uploaded to {self.repo_id}, training continues: {reason}")

    def cancel(self) -> None:
        """Cancel the upload in the background, if one is running."""
        if self._process is None or self._watcher is None or not self._watcher.is_alive():
            return
        self._canceled = True
        self._process.kill()
        self._watcher.join()
        self._report(f"the upload of step {self._step} to {self.repo_id} was canceled")

    def push_final(self) -> str | None:
        """Upload the finished run, after the upload in the background.

        SIGTERM and Ctrl-C end the upload, and not the process. Call it from the main thread.

        Returns:
            None, or the reason why it failed; details have been printed.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _interrupt)
        process = None
        try:
            if self._watcher is not None and self._watcher.is_alive():
                self._report(f"waiting for the upload of step {self._step}, at most {TIMEOUT:.0f} seconds")
                self._watcher.join(TIMEOUT)
                self.cancel()
            self._report(f"pushing to {self.repo_id}")
            sys.stdout.flush()
            process = self._push(self.output_dir)
            return None if process.wait() == 0 else "failed, see above"
        except OSError as error:
            return f"could not be started: {error}"
        except KeyboardInterrupt:
            return "was interrupted"
        finally:
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()

    def _push(self, folder: Path, *options: str, **streams: Any) -> subprocess.Popen:
        """Start the process that uploads. It has a session of its own, so that Ctrl-C reaches this process only."""
        packages = str(Path(hub.__file__).resolve().parents[1])  # also where the project is not installed
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([packages, *_set("PYTHONPATH")])}
        if self._token is not None:
            environment["HF_TOKEN"] = self._token  # on a command line, everyone on the machine could read it
        if streams:
            environment["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        argv = ["push", str(folder.resolve()), self.repo_id, "--end_with", str(os.getpid()), *options]
        return subprocess.Popen(
            [sys.executable, "-P", "-m", hub.PROG, *argv],
            env=environment,
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
            **streams,
        )


def _set(name: str) -> list[str]:
    return [os.environ[name]] if os.environ.get(name) else []


def _interrupt(number: int, frame: FrameType | None) -> None:
    for repeat in (signal.SIGTERM, signal.SIGINT):  # a terminal, a scheduler and a launcher all send one
        signal.signal(repeat, signal.SIG_IGN)
    raise KeyboardInterrupt
