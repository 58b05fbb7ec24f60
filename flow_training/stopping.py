"""Stopping when a job scheduler, or a person, says so: after the current step, on all processes at once."""

import ctypes
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

import psutil
import torch
import torch.distributed

SIGNALS = (signal.SIGTERM, signal.SIGINT)
PR_SET_PDEATHSIG = 1  # prctl(2)
PATIENCE = 2.0  # seconds after a signal, in which a second one is no second thought


def outlive_no_launcher() -> None:
    """Take the death of `accelerate launch` for a SIGTERM: started for one process, it does not pass signals on.

    Only on Linux, and only below that launcher: what started the run otherwise, a shell say, may end before it.
    """
    if sys.platform != "linux":
        return
    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return
    if any("accelerate" in word for word in words) and any("launch" in word for word in words):
        _ask_for_signal_at_parents_death(signal.SIGTERM)


def _ask_for_signal_at_parents_death(number: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


class StopRequest:
    """Remembers a SIGTERM or SIGINT that comes while it is entered.

    Only a second Ctrl-C, some seconds later, ends the process at once. Everything else that comes is the first signal
    once more: a terminal and a scheduler tell all processes, launchers tell theirs again, and their death is told too.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._received = 0.0  # when, on the monotonic clock
        self._previous: dict[signal.Signals, Any] = {}
        self._group: Any = None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # others cannot set handlers
            self._previous = {number: signal.signal(number, self._remember) for number in SIGNALS}
        if torch.distributed.is_initialized() and torch.distributed.get_backend() != "gloo":
            self._group = torch.distributed.new_group(backend="gloo")  # asking each other must not wait for a GPU
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.signal is None:  # else the process is about to end, and repeats must not disturb it
            for number, handler in self._previous.items():
                signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._received = signal.Signals(number), time.monotonic()
            _ask_for_signal_at_parents_death(0)
            print(
                f"\n{self.signal.name}: saving a checkpoint after this step; Ctrl-C once more, some seconds from now, "
                "stops at once",
                file=sys.stderr,
            )
        elif number == signal.SIGINT and time.monotonic() - self._received > PATIENCE:
            signal.signal(number, self._previous[signal.SIGINT])
            signal.raise_signal(number)

    def agreed(self) -> signal.Signals | None:
        """The signal that any process has received; called by all of them, once a step."""
        number = 0 if self.signal is None else int(self.signal)
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            received = torch.tensor([number])
            torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX, group=self._group)
            number = int(received)
        return signal.Signals(number) if number else None
