"""Threads beside the model: order, errors, and the threads that PyTorch may start in them."""

import threading

import pytest
import torch

from flow_inference.background import ReadAhead, WriteBehind


def test_functions_are_called_in_order_before_close_returns():
    called: list[int] = []
    writer = WriteBehind(2)
    for number in range(20):
        writer.submit(lambda number=number: called.append(number))
    writer.close()
    assert called == list(range(20))


def test_an_error_reaches_the_caller_and_nothing_is_called_after_it():
    called: list[int] = []
    writer = WriteBehind(2)
    writer.submit(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        for number in range(1000):
            writer.submit(lambda number=number: called.append(number))
        writer.close()
    with pytest.raises(ZeroDivisionError):
        writer.close()
    assert called == []


def test_the_writing_thread_has_one_thread_and_the_others_keep_theirs():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    seen: dict[str, int] = {}

    def note(name: str) -> None:
        seen[name] = torch.get_num_threads()

    try:
        writer = WriteBehind(2)
        writer.submit(lambda: note("writing"))
        writer.close()
        note("caller")
        later = threading.Thread(target=note, args=("later",))
        later.start()
        later.join()
    finally:
        torch.set_num_threads(before)
    assert seen == {"writing": 1, "caller": 2, "later": 2}


def test_items_arrive_in_order_and_errors_where_they_happen():
    def items():
        yield from range(5)
        raise OSError("the file ends here")

    seen = []
    with pytest.raises(OSError, match="the file ends here"):
        for item in ReadAhead(items(), 2):
            seen.append(item)
    assert seen == list(range(5))


def test_reading_stops_when_it_is_closed():
    closed = threading.Event()

    def items():
        try:
            while True:
                yield 0
        finally:
            closed.set()

    reader = ReadAhead(items(), 2)
    assert next(iter(reader)) == 0
    reader.close()
    assert closed.is_set()
