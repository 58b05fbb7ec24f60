"""The weights that ship with the project: what is in the folder, and that every command finds it by itself."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import yaml
from conftest import PROJECT
from safetensors.torch import load_file

import evaluate_flow
import predict_flow
from flow_data.flow_io import read_flow
from flow_data.shipped_files import PRETRAINED, find_model, pretrained_path
from flow_training.model_card import read_lineage
from modeling_raft import RaftForOpticalFlow, RaftImageProcessor

FRAMES = [PROJECT / f"examples/frames/frame_000{number}.png" for number in (1, 2)]


def test_the_folder_is_small_and_complete():
    folder = pretrained_path()
    assert folder == PROJECT / PRETRAINED
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "preprocessor_config.json", "training_stages.json"
    ]  # fmt: skip
    assert (folder / "model.safetensors").stat().st_size <= 4_500_000
    assert not any("averaged" in name or "ema" in name for name in load_file(folder / "model.safetensors"))
    assert "auto_map" not in json.loads((folder / "config.json").read_text())


def test_the_card_states_license_data_and_results():
    _, metadata, text = (pretrained_path() / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(metadata)["license"] == "bsd-3-clause"
    assert "synthetic pairs" in text
    for method in ("zero flow", "Farneback", "DIS, medium", "published raft-small@20", "**raft-small-synthetic**"):
        assert f"| {method} |" in text


def test_model_and_image_processor_load_from_it():
    model = RaftForOpticalFlow.from_pretrained(pretrained_path()).eval()
    assert model.config.encoder_block == "bottleneck" and model.config.num_flow_updates == 12
    assert RaftImageProcessor.from_pretrained(pretrained_path()) is not None


def test_a_model_that_starts_from_it_states_its_data():
    assert read_lineage(PRETRAINED) == [
        f"`{PRETRAINED}`", "random weights, trained on synthetic pairs of this project only"
    ]  # fmt: skip


@pytest.mark.parametrize("given", ["folder", "user/raft", "weights.pth"])
def test_a_name_that_is_given_is_kept(given):
    assert find_model(given) == given


def test_the_shipped_name_works_from_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_model(None) == find_model(PRETRAINED) == str(pretrained_path())
    (tmp_path / PRETRAINED).mkdir(parents=True)
    assert find_model(PRETRAINED) == PRETRAINED  # the user's own folder of that name wins


@pytest.mark.slow
def test_prediction_takes_it_without_network(tmp_path):
    """In a new process, in another folder, without the Hub: a car drives to the right on a road that moves left."""
    command = [sys.executable, PROJECT / "predict_flow.py", *FRAMES, "--output", "flow.flo"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(PROJECT)}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    flow, valid = read_flow(tmp_path / "flow.flo")
    assert valid.all() and flow.shape == (256, 384, 2)
    predict_flow.main([*map(str, FRAMES), "--model", PRETRAINED, "--output", str(tmp_path / "again.flo")])
    np.testing.assert_allclose(read_flow(tmp_path / "again.flo")[0], flow, atol=1e-3)
    car, road = flow[190:212, 70:120, 0], flow[222:236, 20:360, 0]
    assert np.median(car) > 2  # 5.5 px, to be exact, as examples/frames/draw_frames.py draws it
    assert np.median(road) < -2  # -4 px


def test_evaluation_takes_it(tmp_path):
    arguments = ["--dataset", "synthetic", "--data_dir", str(FRAMES[0].parent), "--synthetic_image_size", "128", "160"]
    arguments += ["--synthetic_displacement", "2", "4", "--synthetic_num_pairs", "2", "--num_flow_updates", "4"]
    reports = []
    for model in ([], ["--model", str(pretrained_path())]):
        evaluate_flow.main([*model, *arguments, "--output", str(tmp_path / "report.json")])
        reports.append(json.loads((tmp_path / "report.json").read_text()))
    assert reports[0] == reports[1]
    assert reports[0]["metrics"]["epe"] < reports[0]["zero_flow_epe"]
