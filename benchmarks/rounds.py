"""Time in rounds (A B C A B C ...), so that a machine whose speed drifts treats all alike."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds until a call has returned and the device has done all it was given; on a GPU, by its own clock."""
    if device.type == "cuda":
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start_event.record()
        call()
        end_event.record()
        end_event.synchronize()
        return start_event.elapsed_time(end_event) / 1000
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def time_in_rounds(
    calls: Mapping[str, Callable[[], Any]], runs: int, device: torch.device, enough_seconds: float = math.inf
) -> dict[str, list[float]]:
    """Seconds of every call in every round, after one round that does not count.

    Args:
        calls: In the order in which they take turns.
        runs: Rounds that count.
        device: What the calls compute on.
        enough_seconds: No further round after the third once the rounds took so long together.
    """
    for call in calls.values():
        seconds_of(call, device)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for run in range(runs):
        if run >= 3 and time.perf_counter() - start > enough_seconds:
            break
        for name, call in calls.items():
            seconds[name].append(seconds_of(call, device))
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def times_as_fast(own: list[float], peer: list[float]) -> dict[str, float]:
    """`spread` of the ratios within the rounds: above 1 is faster than the peer."""
    return spread([theirs / ours for ours, theirs in zip(own, peer, strict=True)])


def compare_times(
    seconds: Mapping[str, list[float]], peers: Mapping[str, str], differences: Mapping[str, float]
) -> list[dict[str, Any]]:
    """A row of results for each candidate, printed, too.

    Args:
        seconds: As `time_in_rounds` gives them.
        peers: Whose time each is compared with.
        differences: How much the flow of each differs, in pixels.
    """
    rows: list[dict[str, Any]] = []
    for name, own in seconds.items():
        taken, times = spread(own), times_as_fast(own, seconds[peers[name]])
        rows.append({"candidate": name, "seconds": taken, "times_as_fast": times, "difference_px": differences[name]})
        print(
            f"{name}: {taken['median']:.3f} s, {times['median']:.2f} times as fast "
            f"({times['lowest']:.2f} to {times['highest']:.2f}), flow differs by {differences[name]:.2g} px at most"
        )
    return rows
