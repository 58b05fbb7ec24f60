"""Threads beside the model: one that reads ahead, and one that writes behind, each with a bounded queue."""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch

Item = TypeVar("Item")
_END = object()
POLL = 0.1  # seconds after which a waiting thread looks whether it is to stop


class ReadAhead(Generic[Item]):
    """Iterate over something in a thread of its own, at most `depth` items ahead.

    An error of the iteration is raised where its next item would have come.

    Args:
        items: What is iterated over, once.
        depth: Items in the queue.

    Attributes:
        waited: Seconds that the consumer has waited for items.
    """

    def __init__(self, items: Iterable[Item], depth: int):
        self.waited = 0.0
        self._queue: queue.Queue[Any] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(items,), daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Item]:
        while True:
            start = time.monotonic()
            item, error = self._queue.get()
            self.waited += time.monotonic() - start
            if error is not None:
                raise error
            if item is _END:
                return
            yield item

    def close(self) -> None:
        """Stop reading, and wait for the thread to end."""
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=POLL)  # makes room, for which the thread may be waiting
            except queue.Empty:
                pass
        self._thread.join()

    def _read(self, items: Iterable[Item]) -> None:
        iterator = iter(items)
        try:
            for item in iterator:
                if not self._put((item, None)):
                    break
            self._put((_END, None))
        except BaseException as error:  # raised again in the consumer's thread
            self._put((None, error))
        finally:
            if hasattr(iterator, "close"):
                iterator.close()  # a generator closes its file

    def _put(self, entry: tuple[Any, BaseException | None]) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(entry, timeout=POLL)
                return True
            except queue.Full:
                continue
        return False


class WriteBehind:
    """Call functions one after the other in a thread of its own, at most `depth` of them behind.

    PyTorch computes in that thread alone: further threads that it would start there take the cores from the model.

    Args:
        depth: Calls in the queue.

    Attributes:
        waited: Seconds that the caller has waited for room in the queue.
    """

    def __init__(self, depth: int):
        self.waited = 0.0
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(depth)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def submit(self, function: Callable[[], None]) -> None:
        """Have a function called after those before it. An error that one of these raised is raised here."""
        if self._error is not None:
            raise self._error
        start = time.monotonic()
        self._queue.put(function)
        self.waited += time.monotonic() - start

    def close(self) -> None:
        """Wait until all functions have been called; raise the first error of one."""
        self._queue.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _write(self) -> None:
        with _single_threaded():
            while (function := self._queue.get()) is not None:
                if self._error is None:
                    try:
                        function()
                    except BaseException as error:
                        self._error = error


@contextmanager
def _single_threaded() -> Iterator[None]:
    """Have PyTorch compute in the calling thread alone.

    The number of threads belongs to a thread. Threads that start later inherit it, which is why it is set back.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
