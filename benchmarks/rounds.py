"""Time in rounds (A B C A B C ...), so that a machine whose speed drifts treats all alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds until a call has returned and the device has done all it was given."""
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def time_in_rounds(calls: Mapping[str, Callable[[], Any]], runs: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every call in every round, after one round that does not count."""
    for call in calls.values():
        seconds_of(call, device)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(runs):
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


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
