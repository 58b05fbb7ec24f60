"""Protocols against the original's figures, and evaluate_flow.py from the outside."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from test_modeling_raft import tiny_config
from tiny_run import free_port

import evaluate_flow
from flow_data.flow_io import write_flow
from flow_data.sources import SOURCES, load_source
from flow_training.evaluation import PROTOCOLS, evaluate
from modeling_raft import RaftForOpticalFlow
from modeling_raft.convert_raft_checkpoint import load_raft

PROJECT = Path(__file__).resolve().parents[1]

# End-point errors of the original code in fp32 on a CPU on these pairs (raft-small: 20 updates, raft-sintel: 12).
ANCHORS = {
    ("sintel_clean", "Sintel", "training"): {
        "alley_1/frame_0001": (0.237, 0.116),
        "alley_1/frame_0002": (0.269, 0.124),
        "alley_1/frame_0003": (0.275, 0.124),
        "cave_2/frame_0002": (1.175, 0.542),
    },
    ("sintel_final", "Sintel", "training"): {
        "alley_1/frame_0001": (0.236, 0.118),
        "alley_1/frame_0002": (0.270, 0.123),
        "alley_1/frame_0003": (0.280, 0.132),
        "cave_2/frame_0002": (1.332, 0.700),
    },
    ("flying_chairs", "FlyingChairs_release", "all"): {
        "00001": (1.131, 0.915),
        "00002": (0.551, 0.389),
        "00003": (1.489, 0.838),
        "30001": (2.712, 1.294),
        "30002": (0.970, 0.741),
        "30003": (1.176, 0.397),
    },
    ("middlebury", "Middlebury", "training"): {
        "Grove2": (0.349, 0.215),
        "RubberWhale": (0.320, 0.175),
        "Urban2": (0.525, 0.302),
        "Venus": (0.373, 0.261),
    },
    ("kitti_2015", "KITTI", "training"): {"000010": (1.826, 0.337)},
}


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["raft-small.pth", "raft-sintel.pth"])
@pytest.mark.parametrize("source", list(ANCHORS), ids=lambda source: source[0])
def test_errors_are_the_original_codes(source, weights, sample_data, sample_weights):
    name, folder, split = source
    model = load_raft(sample_weights / weights)
    column, updates = (0, 20) if "small" in weights else (1, 12)
    dataset = load_source(name, sample_data / folder, split)
    report = evaluate(model, dataset, PROTOCOLS[name], Accelerator(), num_flow_updates=updates)
    expected = {id_: errors[column] for id_, errors in ANCHORS[source].items()}
    assert {pair["id"]: pair["epe"] for pair in report["per_pair"]} == pytest.approx(expected, abs=0.002)


def test_every_source_has_a_protocol_and_a_split():
    assert set(PROTOCOLS) == set(SOURCES)
    for name, protocol in PROTOCOLS.items():
        assert protocol.split in SOURCES[name].splits


@pytest.fixture
def model_dir(tmp_path) -> Path:
    torch.manual_seed(0)
    RaftForOpticalFlow(tiny_config()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def middlebury(tmp_path) -> Path:
    """Three pairs of different sizes, flow partly unknown."""
    rng = np.random.default_rng(0)
    for scene, (height, width) in {"A": (66, 81), "B": (64, 64), "C": (90, 70)}.items():
        frames, flows = (tmp_path / "Middlebury" / name / scene for name in ("other-data", "other-gt-flow"))
        frames.mkdir(parents=True)
        flows.mkdir(parents=True)
        for name in ("frame10.png", "frame11.png"):
            Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(frames / name)
        flow = rng.normal(size=(height, width, 2)).astype(np.float32)
        write_flow(flows / "flow10.flo", flow, rng.random((height, width)) < 0.8)
    return tmp_path / "Middlebury"


def test_report_and_picture(model_dir, middlebury, tmp_path, capsys):
    output, picture = tmp_path / "reports" / "report.json", tmp_path / "reports" / "flow.png"
    evaluate_flow.main(
        f"--model {model_dir} --dataset middlebury --data_dir {middlebury} --num_flow_updates 2 "
        f"--output {output} --picture {picture}".split()
    )
    assert "epe_per_image" in capsys.readouterr().out
    report = json.loads(output.read_text())
    assert (report["dataset"], report["split"], report["num_pairs"]) == ("middlebury", "training", 3)
    assert report["protocol"] == {"num_flow_updates": 2, "padding": "split", "dtype": "float32"}
    names = {"epe", "epe_per_image", "1px", "3px", "5px", "fl_all", "fl_all_per_image"}
    assert set(report["metrics"]) == names
    assert [pair["id"] for pair in report["per_pair"]] == ["A", "B", "C"]
    mean = np.mean([pair["epe"] for pair in report["per_pair"]])
    assert report["metrics"]["epe_per_image"] == pytest.approx(mean) != report["metrics"]["epe"]
    assert Image.open(picture).size == (4 * 81 + 3 * 4, 66 + 64 + 90 + 2 * 4)


@pytest.mark.slow
def test_two_processes_report_what_one_does(model_dir, middlebury, tmp_path):
    """Three pairs over two processes: the shares are not equal."""
    arguments = f"--model {model_dir} --dataset middlebury --data_dir {middlebury} --num_flow_updates 2".split()
    evaluate_flow.main([*arguments, "--output", str(tmp_path / "one.json")])
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command = [sys.executable, *launch, "--main_process_port", str(free_port()), PROJECT / "evaluate_flow.py"]
    result = subprocess.run(
        [*command, *arguments, "--output", tmp_path / "two.json"],
        capture_output=True,
        text=True,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-6)
    assert [pair["id"] for pair in two["per_pair"]] == ["A", "B", "C"]


def test_protocol_of_kitti_pads_the_bottom(monkeypatch, model_dir):
    """An image whose height is no multiple of 8: the model must see it start in the first row."""
    seen = []
    model = load_raft(model_dir)
    monkeypatch.setattr(
        RaftForOpticalFlow, "forward", lambda self, pixel_values, **kwargs: seen.append(pixel_values) or 1 / 0
    )
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 77, 3), dtype=np.uint8))
    truth = {"flow": np.zeros((70, 77, 2), np.float32), "valid": np.ones((70, 77), bool)}
    row = {"id": "x", "image1": image, "image2": image, "flow": truth}
    for name in ("kitti_2015", "sintel_clean"):
        with pytest.raises(ZeroDivisionError):
            evaluate(model, [row], PROTOCOLS[name], Accelerator())
    kitti, sintel = seen
    pixels = torch.from_numpy(np.asarray(image) / 127.5 - 1).permute(2, 0, 1).float()
    torch.testing.assert_close(kitti[0, 0, :, :70, 1:78], pixels)
    torch.testing.assert_close(sintel[0, 0, :, 1:71, 1:78], pixels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--dataset middleburry --data_dir x", "did you mean middlebury?"),
        ("--dataset middlebury", "--data_dir is missing"),
        ("--dataset middlebury --data_dir nowhere", "nowhere"),
        ("--dataset synthetic --split test", "expected a split of training, validation, all"),
        ("--dataset synthetic --num_flow_updates 0", "at least 1; got 0"),
        ("--dataset synthetic --model nowhere.pth", "nowhere.pth"),
    ],
)
def test_mistakes_are_named(arguments, message, model_dir, capsys):
    with pytest.raises(SystemExit) as error:
        evaluate_flow.main(["--model", str(model_dir), "--synthetic_num_pairs", "1", *arguments.split()])
    assert message in capsys.readouterr().err + str(error.value)


def test_a_split_without_truth_is_refused(model_dir, tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "Sintel" / "test" / "clean" / "scene"
    folder.mkdir(parents=True)
    for i in (1, 2):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"frame_000{i}.png")
    with pytest.raises(SystemExit) as error:
        evaluate_flow.main(
            f"--model {model_dir} --dataset sintel_clean --data_dir {tmp_path / 'Sintel'} --split test".split()
        )
    assert "scene/frame_0001 has no ground truth" in str(error.value)
