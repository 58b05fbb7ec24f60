"""SIGTERM and Ctrl-C: a run ends after the current step, on all processes at once, instead of in the middle of it."""

import ctypes
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed

from flow_inference.parent_process import is_accelerate_launch

SIGNALS = (signal.SIGTERM, signal.SIGINT)
PR_SET_PDEATHSIG = 1  # prctl(2)
TIMEOUT = 2.0  # seconds after a signal in which others count as repetitions of it


def terminate_with_launcher() -> None:
    """Receive a SIGTERM when `accelerate launch` dies, which for one process does not forward signals.

    This works on Linux, and is done only below that launcher: a shell, for example, may end before the run does.
    """
    if is_accelerate_launch():
        _request_signal_at_parent_death(signal.SIGTERM)


def _request_signal_at_parent_death(number: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


class TrainingInterrupted(Exception):
    """A signal has ended the run before its last step; a checkpoint is saved."""

    def __init__(self, received: signal.Signals):
        super().__init__(received.name)
        self.signal = received


class StopRequest:
    """A context manager that records a SIGTERM or SIGINT instead of ending the process.

    Only a second Ctrl-C, `TIMEOUT` seconds later, ends the process at once. All other signals count as repetitions of
    the first: terminals and schedulers signal all processes, launchers forward the signal, and a launcher's death is
    a signal too.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._received = 0.0  # when, on the monotonic clock
        self._previous: dict[signal.Signals, Any] = {}
        self._group: Any = None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # others cannot set handlers
            self._previous = {number: signal.signal(number, self._record) for number in SIGNALS}
        if torch.distributed.is_initialized() and torch.distributed.get_backend() != "gloo":
            self._group = torch.distributed.new_group(
                backend="gloo"
            )  # communication about signals must not wait for a GPU
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.signal is None:  # else the process is about to end, and repeats must not disturb it
            for number, handler in self._previous.items():
                signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._received = signal.Signals(number), time.monotonic()
            _request_signal_at_parent_death(0)
            print(
                f"\n{self.signal.name}: saving a checkpoint after this step; Ctrl-C once more, some seconds from now, "
                "stops at once",
                file=sys.stderr,
            )
        elif number == signal.SIGINT and time.monotonic() - self._received > TIMEOUT:
            signal.signal(number, self._previous[signal.SIGINT])
            signal.raise_signal(number)

    def stop_requested(self) -> signal.Signals | None:
        """The signal that any process has received, the same on all; all processes must call it equally often."""
        number = 0 if self.signal is None else int(self.signal)
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            received = torch.tensor([number])
            torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX, group=self._group)
            number = int(received)
        return signal.Signals(number) if number else None
