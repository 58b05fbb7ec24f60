"""Which device a model runs on, with the accelerators that a machine might have."""

import pytest
import torch

from flow_inference.devices import choose_device


@pytest.fixture
def machine(monkeypatch):
    """Call with the kind of accelerator that torch should find, and how many."""

    def make(kind: str | None, count: int = 1) -> None:
        found = None if kind is None else torch.device(kind)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: found)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0 if kind is None else count)

    return make


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu", None])
def test_the_accelerator_is_taken_where_there_is_one(machine, kind):
    machine(kind)
    assert choose_device().type == (kind or "cpu")
    assert choose_device("cpu") == torch.device("cpu")
    if kind is not None:
        assert choose_device(kind).type == kind and choose_device(f"{kind}:0") == torch.device(f"{kind}:0")


def test_devices_that_are_not_there_are_named(machine):
    machine("cuda", 2)
    assert choose_device("cuda:1") == torch.device("cuda:1")
    for name in ("cuda:2", "mps", "xpu:0", "cpu:1", "meta"):
        with pytest.raises(ValueError, match=f"device {name} is not available; available are cpu, cuda:0, cuda:1$"):
            choose_device(name)
    machine(None)
    with pytest.raises(ValueError, match="device cuda is not available; available are cpu$"):
        choose_device("cuda")
    with pytest.raises(ValueError, match="device must be cpu, cuda, .*; got 'gpu0'"):
        choose_device("gpu0")


def test_processes_of_a_launch_take_one_accelerator_after_the_other(machine):
    machine("cuda", 2)
    for name in (None, "cuda"):
        chosen = [choose_device(name, local_rank) for local_rank in range(4)]
        assert [device.index or 0 for device in chosen] == [0, 1, 0, 1]
    assert choose_device("cuda:0", 1) == torch.device("cuda:0")  # as it was asked for
    assert choose_device("cpu", 1) == torch.device("cpu")
    machine(None)
    assert choose_device(None, 3) == torch.device("cpu")
