"""What a run over a collection tells: a progress bar meanwhile, and a report at the end."""

import dataclasses
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

from flow_inference.outputs import describe_format_loss


@dataclass
class CollectionReport:
    """What a run has done.

    Args:
        sources: Number of sources of the collection, or of its shard.
        done: Those whose flow is complete.
        skipped: Those of them that another run has done, mostly one before.
        failed: Input, output name and reason of each source that cannot be read or written.
        pairs: Pairs of frames of the sources that this run has completed, in all of its processes.
        seconds: Duration of the run.
        stopped: The run was asked to stop, or has stopped at the first failure.
        lost: Share of the pixels, 0 to 1, whose flow the format cannot hold, a mean over the sources of this run.
        processes: Rank, pairs, seconds, pairs a second and share of the time with the model busy, of each process.
        settings: What the outputs depend on.
    """

    sources: int
    done: int
    skipped: int
    failed: list[dict[str, Any]]
    pairs: int
    seconds: float
    stopped: bool
    lost: float
    processes: list[dict[str, Any]]
    settings: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Return the report as plain values."""
        rate = self.pairs / self.seconds if self.seconds > 0 else 0.0
        return dataclasses.asdict(self) | {"unfinished": self.unfinished, "pairs_per_second": rate}

    @property
    def unfinished(self) -> int:
        """Number of sources that are neither complete nor failed."""
        return self.sources - self.done - len(self.failed)

    def __str__(self) -> str:
        before = f" ({self.skipped} before)" if self.skipped else ""
        parts = [f"{self.sources} sources: {self.done} done{before}"]
        if self.failed:
            parts.append(f"{len(self.failed)} failed")
        if self.unfinished:
            parts.append(f"{self.unfinished} not finished")
        rate = self.pairs / self.seconds if self.seconds > 0 else 0.0
        lines = [f"{', '.join(parts)}; {self.pairs} pairs in {self.seconds:.1f} s, {rate:.2f} a second"]
        for failure in self.failed:
            source, reason = failure["input"], failure["reason"]
            lines.append(f"failed: {reason}" if reason.startswith(source) else f"failed: {source}: {reason}")
        if self.lost:
            lines.append(describe_format_loss(self.lost, self.settings["format"], self.settings["bound"]))
        return "\n".join(lines)


class ProgressBar:
    """One bar over all sources and processes: pairs done of those known, and each process's pairs a second."""

    def __init__(self, workers: Callable[[], list[dict[str, Any]]], num_pairs: int, shown: bool):
        self.workers, self.num_pairs, self.shown = workers, num_pairs, shown
        self.over = threading.Event()

    def __enter__(self) -> "ProgressBar":
        if self.shown:
            self.thread = threading.Thread(target=self._show, daemon=True)
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        if self.shown:
            self.thread.join()

    def _show(self) -> None:
        with tqdm(total=self.num_pairs, unit="pair") as bar:
            over = False
            while not over:
                over = self.over.wait(1.0)
                workers = self.workers()
                bar.n = sum(worker["pairs"] for worker in workers)
                bar.total = max(self.num_pairs, bar.n)
                rates = [worker["pairs"] / worker["seconds"] for worker in workers if worker["seconds"]]
                bar.set_postfix_str(" + ".join(f"{rate:.1f}" for rate in rates) + " pairs/s" if rates else "")
