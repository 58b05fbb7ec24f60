"""`--compile`: one graph for the whole run, the losses of the run without it, and validation left as it is."""

import functools

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny_run import flags, log_lines
from torch._dynamo.utils import counters

import train_flow


@pytest.fixture(autouse=True)
def fresh():
    """Nothing compiled before, and graphs without generated code, which takes a minute on a CPU."""
    torch._dynamo.reset()
    counters.clear()
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_run_is_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    switches = ["--gradient_checkpointing", "--freeze_batch_norm"]
    settings = {"mixed_precision": "bf16", "max_train_steps": "2", "per_device_train_batch_size": "2"}
    settings |= {"validation_sets": "synthetic", "validation_steps": "1", "ema_decay": "0.9"}
    train_flow.main(flags(tmp_path / "eager", *switches, **settings))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert not counters["stats"]
    train_flow.main(flags(tmp_path / "compiled", *switches, "--compile", **settings))
    # Four forward passes in two steps, and validations on frames of another size, in eval mode.
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    for ours, expected in zip(*(log_lines(tmp_path / name) for name in ("compiled", "eager")), strict=True):
        assert ours.keys() == expected.keys() and ours["step"] == expected["step"]
        for name in ours.keys() & {"loss", "grad_norm", "epe", "validation/synthetic/epe"}:
            assert ours[name] == pytest.approx(expected[name], rel=0.02), name
