"""`--cuda_graphs` without a GPU: recording is left out, all around it is as it is (tests/gpu has the real thing)."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny_run import flags, log_lines, train

import train_flow
from flow_training.processes import check_cuda_graphs


@pytest.fixture
def replays(monkeypatch):
    """Put the pass itself in the place of its graph, on a CPU; count its calls; overwrite results as replays do."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    calls = []

    def record(step, example):
        assert not torch.is_autocast_cache_enabled()
        for _ in range(2):
            step(*example)  # changes running statistics
        calls.clear()
        last = []

        def replay(*tensors):
            assert [tensor.shape for tensor in tensors] == [tensor.shape for tensor in example]
            calls.append(tensors)
            for tensor in last:
                tensor.detach().fill_(torch.nan)
            last[:] = step(*tensors)
            return [tensor.view_as(tensor) for tensor in last]

        return replay

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda _: torch.get_rng_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, _: torch.set_rng_state(state))
    monkeypatch.setattr(train_flow, "check_cuda_graphs", lambda accelerator, config: None)
    yield calls
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_recorded_run_is_the_run(precision, replays, tmp_path):
    settings = {"max_train_steps": "3", "ema_decay": "0.9", "mixed_precision": precision, "model_size": "large"}
    settings |= {"config_overrides": None, "validation_sets": "synthetic", "validation_steps": "2"}
    settings |= {"total_batch_size": "1", "logging_steps": "3"}
    train_flow.main(flags(tmp_path / "plain", **settings))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert not replays
    train_flow.main(flags(tmp_path / "recorded", "--cuda_graphs", **settings))
    assert len(replays) == 3  # validation and the moving average take the model as it is
    assert log_lines(tmp_path / "recorded") == log_lines(tmp_path / "plain")
    assert not torch.is_autocast_enabled()


@pytest.mark.parametrize(
    ("switches", "settings", "message"),
    [
        ((), {}, "cuda_graphs needs a CUDA GPU; got the device cpu"),
        (("--compile",), {}, "cuda_graphs must be off with compile; got both"),
        (("--gradient_checkpointing",), {}, "cuda_graphs must be off with gradient_checkpointing; got both"),
    ],
)
def test_what_cannot_be_recorded_is_refused(switches, settings, message, tmp_path):
    result = train(tmp_path / "run", "--cuda_graphs", *switches, **settings)
    assert result.returncode == 1 and message in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "objective", "message"),
    [
        ({"num_processes": 2}, "supervised", "several processes; got 2"),
        ({"gradient_accumulation_steps": 2}, "supervised", "total_batch_size, 4, with cuda_graphs; got 2"),
        ({"mixed_precision": "fp16"}, "supervised", "must be no or bf16 with cuda_graphs; got fp16"),
        ({}, "photometric", "objective must be supervised with cuda_graphs; got photometric"),
    ],
)
def test_what_a_gpu_cannot_record_is_refused(changes, objective, message, tmp_path):
    accelerator = SimpleNamespace(device=torch.device("cuda"), num_processes=1, mixed_precision="bf16")
    accelerator.gradient_accumulation_steps = 1
    vars(accelerator).update(changes)
    config = train_flow.parse_config(flags(tmp_path, "--cuda_graphs", per_device_train_batch_size="2"))
    with pytest.raises(ValueError, match=message):
        check_cuda_graphs(accelerator, replace(config, objective=objective))
