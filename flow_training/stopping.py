"""Stopping when a job scheduler, or a person, says so: after the current step, on all processes at once."""

import ctypes
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

import psutil
import torch
import torch.distributed

SIGNALS = (signal.SIGTERM, signal.SIGINT)
PR_SET_PDEATHSIG = 1  # prctl(2)


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
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class StopRequest:
    """Remembers a SIGTERM or SIGINT that comes while it is entered; the second one acts as if this were not here."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._group: Any = None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # others cannot set handlers
            self._previous = {number: signal.signal(number, self._remember) for number in SIGNALS}
        if torch.distributed.is_initialized() and torch.distributed.get_backend() != "gloo":
            self._group = torch.distributed.new_group(backend="gloo")  # asking each other must not wait for a GPU
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            signal.signal(number, self._previous[signal.Signals(number)])
            signal.raise_signal(number)
            return
        self.signal = signal.Signals(number)
        print(f"\n{self.signal.name}: saving a checkpoint after this step; once more to stop at once", file=sys.stderr)

    def agreed(self) -> signal.Signals | None:
        """The signal that any process has received; called by all of them, once a step."""
        number = 0 if self.signal is None else int(self.signal)
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            received = torch.tensor([number])
            torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX, group=self._group)
            number = int(received)
        return signal.Signals(number) if number else None
