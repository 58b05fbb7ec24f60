"""examples/finetune_with_trainer.py against train_flow.py, on the same samples."""

import json
import subprocess
import sys

import pytest
import torch
from test_hub_dataset import make_pairs
from test_modeling_raft import tiny_config
from tiny_run import PROJECT, environment, train
from transformers import pipeline

from flow_data.datasets import load_source
from flow_training.run_log import read_log
from modeling_raft import RaftForOpticalFlow

STEPS = 3
SETTINGS = {
    "train_mix": "{synthetic: 1, pairs: 2}",
    "crop_size": "64 72",
    "num_flow_updates": "3",
    "max_train_steps": str(STEPS),
    "learning_rate": "1e-3",
    "weight_decay": "0.1",
    "total_batch_size": "4",
    "per_device_train_batch_size": "2",  # accumulation, too
    "logging_steps": "1",
    "dataloader_num_workers": "0",
    "seed": "7",
    "report_to": "none",
}


@pytest.mark.slow
def test_trains_as_train_flow_does(tmp_path):
    torch.manual_seed(0)
    start = tmp_path / "start"
    RaftForOpticalFlow(tiny_config()).save_pretrained(start)
    make_pairs(tmp_path / "pairs")
    settings = SETTINGS | {"model_name_or_path": str(start), "data_root": str(tmp_path)}
    others = ("model_size", "config_overrides", "synthetic_image_size", "synthetic_displacement", "synthetic_shapes",
              "synthetic_validation_pairs")  # fmt: skip
    synthetic = str(len(load_source("synthetic", None)))
    result = train(tmp_path / "script", **settings, **dict.fromkeys(others), synthetic_num_pairs=synthetic)
    assert result.returncode == 0, result.stderr

    arguments = ["--output_dir", str(tmp_path / "trainer")]
    for name, value in settings.items():
        arguments += [f"--{name}", *([value] if value.startswith("{") else value.split())]
    result = subprocess.run([sys.executable, PROJECT / "examples" / "finetune_with_trainer.py", *arguments],
                            capture_output=True, text=True, env=environment(), cwd=tmp_path, timeout=300)  # fmt: skip
    assert result.returncode == 0, result.stderr

    expected = read_log(tmp_path / "script" / "train_log.jsonl")
    state = json.loads((tmp_path / "trainer" / "trainer_state.json").read_text())
    log = [line for line in state["log_history"] if "loss" in line]
    assert [line["step"] for line in log] == [line["step"] for line in expected] == list(range(1, STEPS + 1))
    # The same computation in the first step; later ones start from weights that are the same up to rounding.
    assert log[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-6)
    for line, other in zip(log, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    trained = RaftForOpticalFlow.from_pretrained(tmp_path / "trainer").state_dict()
    reference = RaftForOpticalFlow.from_pretrained(tmp_path / "script").state_dict()
    before = RaftForOpticalFlow.from_pretrained(start).state_dict()
    change = max((reference[name] - before[name]).abs().max() for name in reference if "weight" in name)
    for name, value in trained.items():
        torch.testing.assert_close(value, reference[name], rtol=0, atol=0.01 * float(change))
    pipe = pipeline("optical-flow", model=tmp_path / "trainer", device="cpu")
    pair = tuple(str(tmp_path / "pairs" / f"00_img{frame}.png") for frame in (1, 2))
    assert pipe(pair)["flow"].shape == (2, 72, 88) and pipe.model.config.num_flow_updates == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"--train_mix": "{pears: 1}"}, "unknown source 'pears': did you mean 'pairs'"),
        ({"--data_root": "nowhere"}, "nowhere/pairs"),
        ({"--model_name_or_path": "nowhere.pth"}, "nowhere.pth"),
        ({"--total_batch_size": "3", "--per_device_train_batch_size": "2"}, "--total_batch_size 3 is no multiple"),
    ],
)
def test_mistakes_are_named(tmp_path, monkeypatch, changes, said):
    monkeypatch.syspath_prepend(str(PROJECT / "examples"))
    from finetune_with_trainer import main

    RaftForOpticalFlow(tiny_config()).save_pretrained(tmp_path / "start")
    flags = {"--model_name_or_path": str(tmp_path / "start"), "--output_dir": str(tmp_path / "out"),
             "--train_mix": "{pairs: 1}"}  # fmt: skip
    with pytest.raises(SystemExit, match=said):
        main([argument for flag in (flags | changes).items() for argument in flag])
