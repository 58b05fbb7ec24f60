"""Commands that start training processes through a launcher, and receive the signals that are sent to this process."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
RESUME_VARIABLE = "FLOW_TRAINING_RESUME"  # environment variable: the command that resumes the program around a run


class SignalForwarder:
    """A context manager that runs commands, and forwards a signal to stop to the training processes of a command.

    The command has a session of its own. Otherwise Ctrl-C would also end the launcher, and the workers that a training
    process needs to finish its step.

    Args:
        program: The script that the launcher runs, by which training processes are recognized.
        prog: Name of this program, for messages.
        again: The command that resumes this program; the training processes print it in place of their own.
    """

    def __init__(self, program: Path, prog: str, again: str) -> None:
        self.program, self.prog, self.again = program, prog, again
        self.signal: signal.Signals | None = None  # the last one that was received
        self._launcher: subprocess.Popen | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "SignalForwarder":
        ignored = [number for number in STOP_SIGNALS if signal.getsignal(number) is signal.SIG_IGN]  # nohup
        self._previous = {
            number: signal.signal(number, self._receive) for number in STOP_SIGNALS if number not in ignored
        }
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def run(self, command: list[str]) -> int:
        """Run a command, and wait until all its processes have ended.

        Returns:
            Its exit code, 128 + N after signal N.
        """
        # Every process of the command has the reading end as its standard input, so the writing end shows when none
        # is left.
        reader, writer = os.pipe()
        try:
            environment = os.environ | {RESUME_VARIABLE: self.again}
            self._launcher = subprocess.Popen(command, stdin=reader, start_new_session=True, env=environment)
            os.close(reader)
            if self.signal is not None:  # it was received while the launcher was being started
                self._forward()
            code = self._launcher.wait()
            readers = select.poll()
            readers.register(writer, 0)  # errors, that is the end of all readers, are always reported
            readers.poll()
        finally:
            self._launcher = None
            os.close(writer)
        return code if code >= 0 else 128 - code

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        print(f"\n{self.prog}: {self.signal.name}: the training is stopped after its step", file=sys.stderr)
        self._forward()

    def _forward(self) -> None:
        """Send SIGTERM to the training processes, and not to their launcher: it would die, or kill them too soon."""
        if self._launcher is None:
            return
        import psutil  # of an extra; commands say that it is missing once their arguments are known to be good

        try:
            children = psutil.Process(self._launcher.pid).children()
            trainers = [child for child in children if str(self.program) in child.cmdline()]
            for process in trainers or [self._launcher]:
                process.terminate()
        except (psutil.NoSuchProcess, ProcessLookupError):
            pass  # it has just ended
