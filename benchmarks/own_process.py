"""A process for each value of memory: what ran before would count, and PyTorch returns little of it."""

import multiprocessing
import platform
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil

STATUS = Path("/proc/self/status")


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns when a fresh interpreter calls it.

    Raises:
        BrokenProcessPool: The process ended without an answer; the system ends processes when memory runs out.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *arguments).result()


def resident_bytes() -> int:
    """What this process has in memory now."""
    return psutil.Process().memory_info().rss


def peak_bytes() -> int:
    """The most that this process has had in memory."""
    # Not getrusage where it can be avoided: on Linux, a new program begins with the peak of the one it grew out of.
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else 1024 * peak
