"""`--compile`: the results without it, from one graph for a whole run, and a few for each size of predicted frames."""

import functools

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from test_modeling_raft import tiny_config
from tiny_run import flags, log_lines
from torch._dynamo.utils import counters

import predict_flow
import train_flow
from flow_data.flow_io import read_flow
from modeling_raft import RaftForOpticalFlow


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


@pytest.mark.slow
def test_compiled_predictions_are_the_predictions(tmp_path, monkeypatch):
    torch.manual_seed(0)
    RaftForOpticalFlow(tiny_config()).save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    for folder, size in (("small", (128, 136)), ("large", (136, 160)), ("large_again", (136, 160))):
        (tmp_path / "frames" / folder).mkdir(parents=True)
        for number in range(4):
            pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "frames" / folder / f"{number}.png")
    argv = [str(tmp_path / "frames"), "--model", str(tmp_path / "model"), "--num_flow_updates", "3"]
    argv += ["--mixed_precision", "no", "--device", "cpu"]
    predict_flow.main([*argv, "--output", str(tmp_path / "eager")])
    assert not counters["stats"]
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    predict_flow.main([*argv, "--output", str(tmp_path / "compiled"), "--compile"])
    # Two encoders, an update block and the upsampling, for each of two sizes.
    assert counters["stats"]["unique_graphs"] == 4 * 2 and not counters["graph_break"]
    names = sorted(path.relative_to(tmp_path / "eager") for path in (tmp_path / "eager").rglob("*.flo"))
    assert len(names) == 9
    for name in names:
        expected, _ = read_flow(tmp_path / "eager" / name)
        flow, _ = read_flow(tmp_path / "compiled" / name)
        np.testing.assert_allclose(flow, expected, atol=1e-3, err_msg=str(name))
