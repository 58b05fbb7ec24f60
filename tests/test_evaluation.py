"""Protocols against the original's metrics, and evaluate_flow.py from the outside."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from forked_process import run_ranks
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from source_trees import MAKERS
from test_modeling_raft import tiny_config
from tiny_run import PROJECT, environment

import evaluate_flow
from flow_data.datasets import DATASETS, load_source
from flow_data.flow_io import read_flow, write_flow
from flow_inference.prediction import chunk_rows, find_sequences, split_work
from flow_inference.warm_start import forward_interpolate
from flow_training.evaluation import evaluate
from modeling_raft import RaftForOpticalFlow
from modeling_raft.convert_raft_checkpoint import load_raft

# End-point errors of the original code in fp32 on a CPU on these pairs (raft-small: 20 updates, raft-sintel: 12).
ANCHORS = {
    ("sintel_clean", "Sintel", "training"): {
        "alley_1/frame_0001": (0.237, 0.116),
        "cave_2/frame_0002": (1.175, 0.542),
    },
    ("sintel_final", "Sintel", "training"): {
        "alley_1/frame_0001": (0.236, 0.118),
        "cave_2/frame_0002": (1.332, 0.700),
    },
    ("flying_chairs", "FlyingChairs_release", "all"): {
        "00001": (1.131, 0.915),
        "30001": (2.712, 1.294),
    },
    ("middlebury", "Middlebury", "training"): {
        "Grove2": (0.349, 0.215),
        "RubberWhale": (0.320, 0.175),
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
    anchors = list(ANCHORS[source].items())
    if "small" not in weights:
        anchors = anchors[-1:]  # it takes twice as long, and the rest is the same
    expected = {id_: errors[column] for id_, errors in anchors}
    dataset = load_source(name, sample_data / folder, split)
    dataset = dataset.select([index for index, id_ in enumerate(dataset["id"]) if id_ in expected])
    report = evaluate(model, dataset, DATASETS[name].protocol, Accelerator(), num_flow_updates=updates)
    assert {pair["id"]: pair["epe"] for pair in report["per_pair"]} == pytest.approx(expected, abs=0.002)


@pytest.fixture
def model_dir(tmp_path) -> Path:
    torch.manual_seed(0)
    model = RaftForOpticalFlow(tiny_config())
    model.update_block.flow_head[2].weight.data *= 30  # flow of several pixels, everywhere another
    model.save_pretrained(tmp_path / "model")
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


def test_report_and_image(model_dir, middlebury, tmp_path, capsys):
    output, picture = tmp_path / "reports" / "report.json", tmp_path / "reports" / "flow.png"
    evaluate_flow.main(
        f"--model {model_dir} --dataset middlebury --data_dir {middlebury} --num_flow_updates 2 "
        f"--output {output} --picture {picture}".split()
    )
    assert "epe_per_image" in capsys.readouterr().out
    report = json.loads(output.read_text())
    assert (report["dataset"], report["split"], report["num_pairs"]) == ("middlebury", "training", 3)
    assert report["protocol"] == {"num_flow_updates": 2, "padding": "split", "dtype": "float32"}
    names = {"epe", "epe_per_image", "1px", "3px", "5px", "fl_all", "fl_all_per_image", "epe_s0_10"}
    assert set(report["metrics"]) == names
    assert [pair["id"] for pair in report["per_pair"]] == ["A", "B", "C"]
    mean = np.mean([pair["epe"] for pair in report["per_pair"]])
    assert report["metrics"]["epe_per_image"] == pytest.approx(mean) != report["metrics"]["epe"]
    width, height = Image.open(picture).size
    assert width >= 4 * 81 + 3 * 4 and height > 66 + 64 + 90 + 2 * 4  # and titles and legends


SCENES = {"alley_1": (1, 2, 3, 5, 6), "market_2": (9, 10)}  # frames; 4 is missing


@pytest.fixture
def sintel(tmp_path) -> Path:
    """Two scenes, one with a gap; all speeds; occlusions of the first scene only."""
    root, rng = tmp_path / "Sintel", np.random.default_rng(0)
    for scene, numbers in SCENES.items():
        for number in numbers:
            name = f"{scene}/frame_{number:04d}"
            for part in ("training/clean", "test/clean", "training/flow", "training/occlusions"):
                (root / part / scene).mkdir(parents=True, exist_ok=True)
            frame = Image.fromarray(rng.integers(0, 256, (66, 81, 3), dtype=np.uint8))
            for part in ("training", "test"):
                frame.save(root / part / f"clean/{name}.png")
            if number + 1 in numbers:
                write_flow(root / f"training/flow/{name}.flo", 25 * rng.normal(size=(66, 81, 2)))
                if scene == "alley_1":
                    mask = (rng.random((66, 81)) < 0.2).astype(np.uint8) * 255
                    Image.fromarray(mask).save(root / f"training/occlusions/{name}.png")
    return root


def run(*arguments: object) -> None:
    """evaluate_flow.py in this process, whatever precision was used in it before."""
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        evaluate_flow.main([word for argument in arguments for word in str(argument).split()])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def launch(*arguments: object) -> None:
    """evaluate_flow.py in two processes."""
    argv = [word for argument in arguments for word in str(argument).split()]
    result = run_ranks(PROJECT / "evaluate_flow.py", argv, environment(), 2)
    assert result.returncode == 0, result.stderr


def test_metrics_are_those_of_the_written_flow(model_dir, sintel, tmp_path):
    """Every metric again, in plain numpy, from files."""
    common = f"--model {model_dir} --dataset sintel_clean --data_dir {sintel} --num_flow_updates 2 --split training"
    run(common, f"--output {tmp_path / 'report.json'}")
    run(common, f"--submission {tmp_path}")
    names, errors, speeds, occluded = [], [], [], []
    for scene, numbers in SCENES.items():
        for number in (number for number in numbers if number + 1 in numbers):
            names.append(f"{scene}/frame_{number:04d}")
            flow_gt, _ = read_flow(sintel / f"training/flow/{names[-1]}.flo")
            flow_pred, _ = read_flow(tmp_path / f"clean/{scene}/frame{number:04d}.flo")
            errors.append(np.hypot(*np.moveaxis(flow_pred.astype(float) - flow_gt, -1, 0)))
            speeds.append(np.hypot(*np.moveaxis(flow_gt.astype(float), -1, 0)))
            if scene == "alley_1":
                occluded.append(np.array(Image.open(sintel / f"training/occlusions/{names[-1]}.png")) == 255)
    error, speed = np.array(errors), np.array(speeds)
    masked, hidden = error[: len(occluded)], np.array(occluded)
    outlier = (error > 3) & (error / speed > 0.05)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["metrics"] == pytest.approx({
        "epe": error.mean(),
        "epe_per_image": np.mean([each.mean() for each in error]),
        "1px": (error < 1).mean(),
        "3px": (error < 3).mean(),
        "5px": (error < 5).mean(),
        "fl_all": 100 * outlier.mean(),
        "fl_all_per_image": np.mean([100 * each.mean() for each in outlier]),
        "epe_s0_10": error[speed < 10].mean(),
        "epe_s10_40": error[(speed >= 10) & (speed <= 40)].mean(),
        "epe_s40_plus": error[speed > 40].mean(),
        "epe_matched": masked[~hidden].mean(),
        "epe_unmatched": masked[hidden].mean(),
    })  # fmt: skip
    assert [pair["id"] for pair in report["per_pair"]] == names
    assert [pair["epe"] for pair in report["per_pair"]] == pytest.approx([each.mean() for each in error])
    assert [pair["fl_all"] for pair in report["per_pair"]] == pytest.approx([100 * each.mean() for each in outlier])


def test_a_pair_without_known_flow_has_null_metrics(model_dir, middlebury, tmp_path, capsys):
    """JSON has no NaN; what a reader of another language could not read must not be written."""
    flow = middlebury / "other-gt-flow"
    arguments = f"--model {model_dir} --dataset middlebury --data_dir {middlebury} --num_flow_updates 1"
    write_flow(flow / "B/flow10.flo", np.zeros((64, 64, 2), np.float32), np.zeros((64, 64), bool))
    run(arguments, f"--output {tmp_path / 'one.json'}")
    printed = capsys.readouterr().out
    assert "no pixel of 1 pair(s) has valid ground truth, they do not count: B" in printed
    write_flow(flow / "A/flow10.flo", np.zeros((66, 81, 2), np.float32), np.zeros((66, 81), bool))
    write_flow(flow / "C/flow10.flo", np.zeros((90, 70, 2), np.float32), np.zeros((90, 70), bool))
    run(arguments, f"--output {tmp_path / 'all.json'}")
    printed = capsys.readouterr().out
    assert "no pixel of these pairs has valid ground truth: there is nothing to compare the flow with" in printed
    assert "nan" not in printed and re.search(r"epe_per_image +-\n", printed) and "(zero flow: epe -)" in printed
    one, all_ = ((tmp_path / name).read_text() for name in ("one.json", "all.json"))
    assert "NaN" not in one + all_
    assert [pair["epe"] is None for pair in json.loads(one)["per_pair"]] == [False, True, False]
    assert None not in json.loads(one)["metrics"].values()
    assert set(json.loads(all_)["metrics"].values()) == {None}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dataset", "options"),
    [
        ("middlebury", ""),  # three pairs: the shares are not equal
        ("sintel_clean", "--warm_start"),
        ("sintel_clean", "--batch_size 3 --mixed_precision bf16"),
    ],
)
def test_two_processes_report_what_one_does(dataset, options, model_dir, middlebury, sintel, tmp_path):
    folder = sintel if dataset == "sintel_clean" else middlebury
    arguments = f"--model {model_dir} --dataset {dataset} --data_dir {folder} --num_flow_updates 2 {options}"
    run(arguments, f"--output {tmp_path / 'one.json'}")
    launch(arguments, f"--output {tmp_path / 'two.json'}")
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-6)
    assert [pair["id"] for pair in two["per_pair"]] == [pair["id"] for pair in one["per_pair"]]
    assert [pair["epe"] for pair in two["per_pair"]] == pytest.approx(
        [pair["epe"] for pair in one["per_pair"]], rel=1e-6
    )
    assert two["protocol"] == one["protocol"]
    assert one["protocol"].get("warm_start", False) == ("--warm_start" in options)


class Seen(list):
    """What every call of the model got and gave."""

    def __init__(self, monkeypatch):
        super().__init__()
        forward = RaftForOpticalFlow.forward

        def spy(model, pixel_values, initial_flow=None, **kwargs):
            output = forward(model, pixel_values, initial_flow=initial_flow, **kwargs)
            self.append((pixel_values, initial_flow, output.low_res_flow))
            return output

        monkeypatch.setattr(RaftForOpticalFlow, "forward", spy)


@pytest.mark.parametrize("batch_size", [2, 3])
def test_batches_change_nothing(batch_size, model_dir, monkeypatch):
    """A batch ends where the size of the images changes."""
    rng = np.random.default_rng(0)
    rows = []
    for number, (height, width) in enumerate([(64, 72)] * 3 + [(80, 64)] * 2 + [(64, 72)]):
        images = [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for _ in range(2)]
        ground_truth = {
            "flow": rng.normal(size=(height, width, 2)).astype(np.float32),
            "valid": rng.random((height, width)) < 0.7,
        }
        rows.append({"id": str(number), "image1": images[0], "image2": images[1], "flow": ground_truth})
    model, seen = load_raft(model_dir), Seen(monkeypatch)
    one = evaluate(model, rows, DATASETS["middlebury"].protocol, Accelerator(), num_flow_updates=2)
    assert [len(pixels) for pixels, _, _ in seen] == [1] * 6
    seen.clear()
    batched = evaluate(
        model, rows, DATASETS["middlebury"].protocol, Accelerator(), num_flow_updates=2, batch_size=batch_size
    )
    sizes = {2: [2, 1, 1, 1, 1], 3: [3, 2, 1]}
    assert [len(pixels) for pixels, _, _ in seen] == sizes[batch_size]
    assert batched["metrics"] == pytest.approx(one["metrics"], rel=1e-5)
    assert [pair["id"] for pair in batched["per_pair"]] == list("012345")
    assert [pair["epe"] for pair in batched["per_pair"]] == pytest.approx([pair["epe"] for pair in one["per_pair"]])


def test_warm_start_carries_flow_within_a_scene(model_dir, sintel, monkeypatch, tmp_path):
    seen = Seen(monkeypatch)
    arguments = f"--model {model_dir} --dataset sintel_clean --data_dir {sintel} --num_flow_updates 2 --warm_start"
    run(arguments, f"--output {tmp_path / 'report.json'}")
    assert json.loads((tmp_path / "report.json").read_text())["protocol"] == {
        "num_flow_updates": 2, "padding": "split", "dtype": "float32", "warm_start": True
    }  # fmt: skip
    frames = [(scene, number) for scene, numbers in SCENES.items() for number in numbers if number + 1 in numbers]
    assert frames == [("alley_1", 1), ("alley_1", 2), ("alley_1", 5), ("market_2", 9)]
    padded = {}  # the first row of a frame as the model sees it -> its name
    for scene, number in frames:
        pixels = np.asarray(Image.open(sintel / f"training/clean/{scene}/frame_{number:04d}.png")) / 127.5 - 1
        padded[scene, number] = torch.from_numpy(pixels).permute(2, 0, 1).float()
    starts = {}
    for pixel_values, initial_flow, low_res_flow in seen:
        (name,) = (
            name
            for name, frame in padded.items()
            if torch.allclose(pixel_values[0, 0, :, 3:69, 3:84], frame, atol=1e-5)
        )
        starts[name] = initial_flow, low_res_flow
    assert {name for name, (initial_flow, _) in starts.items() if initial_flow is not None} == {("alley_1", 2)}
    torch.testing.assert_close(starts["alley_1", 2][0], forward_interpolate(starts["alley_1", 1][1]))


SEQUENCES = {
    "sintel_clean": [["alley_1/frame_0001", "alley_1/frame_0002"], ["market_2/frame_0009", "market_2/frame_0010"]],
    "flying_things_final": [
        [f"TEST/B/0001/{direction}/left/{number:04d}" for number in numbers]
        for direction, numbers in (("into_future", (6, 7)), ("into_past", (8, 7)))
    ],
    "hd1k": [["000000_0009", "000000_0010"], ["000003_0009", "000003_0010"]],
    "tartanair": [
        [f"{trajectory}/000000", f"{trajectory}/000001"]
        for trajectory in ("ocean/Easy/P000", "ocean/Hard/P011", "office/Easy/P001")
    ],
    "spring": [
        [f"{scene}/{view}/{number:04d}" for number in numbers]
        for scene in ("0001", "0012")
        for view, numbers in (("BW_left", (3, 2)), ("BW_right", (3, 2)), ("FW_left", (1, 2)), ("FW_right", (1, 2)))
    ],
    "kitti_2015": [["000000"], ["000007"], ["000010"]],
    "middlebury": [["RubberWhale"], ["Venus"]],
    "flying_chairs": [["00002"]],
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequences_are_found_in_the_direction_of_their_flow(name, tmp_path):
    MAKERS[name](tmp_path)
    dataset = load_source(name, tmp_path, DATASETS[name].protocol.split)
    assert sorted([dataset["id"][i] for i in chunk] for chunk in find_sequences(dataset)) == SEQUENCES[name]


class Paths:
    """As much of a data set as `find_sequences` needs."""

    column_names = features = {"image1": None, "image2": None}

    def __init__(self, pairs):
        self.pairs = pairs

    def __len__(self):
        return len(self.pairs)

    def select_columns(self, columns):
        return [{"image1": {"path": first}, "image2": {"path": second}} for first, second in self.pairs]


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from("abcdef")), max_size=12))
def test_sequences_hold_every_pair_once_and_lead_from_frame_to_frame(pairs):
    """Also where pairs repeat, branch or run in circles."""
    sequences = find_sequences(Paths(pairs))
    assert sorted(position for sequence in sequences for position in sequence) == list(range(len(pairs)))
    for sequence in sequences:
        for before, after in zip(sequence, sequence[1:], strict=False):
            assert pairs[after][0] == pairs[before][1] and pairs[after][1] != pairs[before][0]


@given(lengths=st.lists(st.integers(1, 60), max_size=20), shares=st.integers(1, 5), batch_size=st.integers(1, 7))
def test_every_pair_is_in_one_share(lengths, shares, batch_size):
    batches = chunk_rows(range(sum(lengths)), batch_size)
    assert sum(batches, []) == list(range(sum(lengths)))
    sequences = [list(range(sum(lengths[:i]), sum(lengths[: i + 1]))) for i in range(len(lengths))]
    for chunks in (batches, sequences):
        dealt = split_work(chunks, shares)
        assert sorted(chunk for share in dealt for chunk in share) == chunks
        loads = [sum(map(len, share)) for share in dealt]
        assert max(loads) - min(loads) <= max(map(len, chunks), default=0)


def test_protocol_of_kitti_pads_the_bottom(monkeypatch, model_dir):
    """An image whose height is no multiple of 8: the model must see it start in the first row."""
    seen = []
    model = load_raft(model_dir)
    monkeypatch.setattr(
        RaftForOpticalFlow, "forward", lambda self, pixel_values, **kwargs: seen.append(pixel_values) or 1 / 0
    )
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 77, 3), dtype=np.uint8))
    ground_truth = {"flow": np.zeros((70, 77, 2), np.float32), "valid": np.ones((70, 77), bool)}
    row = {"id": "x", "image1": image, "image2": image, "flow": ground_truth}
    for name in ("kitti_2015", "sintel_clean"):
        with pytest.raises(ZeroDivisionError):
            evaluate(model, [row], DATASETS[name].protocol, Accelerator())
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
        ("--dataset synthetic --split test", "split must be one of training, validation, all"),
        ("--dataset synthetic --num_flow_updates 0", "at least 1; got 0"),
        ("--dataset synthetic --batch_size 0", "--batch_size must be at least 1; got 0"),
        ("--dataset synthetic --warm_start", "no pair of synthetic validation begins with the frame"),
        ("--dataset synthetic --warm_start --batch_size 2", "leave out --batch_size 2"),
        ("--dataset synthetic --submission x", "there are sintel_clean, sintel_final, kitti_2012, kitti_2015, spring"),
        ("--dataset synthetic --submission x --output y", "leave out --output"),
        ("--dataset synthetic --model nowhere.pth", "nowhere.pth"),
        ("--dataset synthetic --synthetic_appearance 2", "appearance must be between 0 and 1; got 2.0"),
        (
            "--dataset middlebury --data_dir x --synthetic_nonrigid 0",
            "--synthetic_nonrigid is for --dataset synthetic",
        ),
    ],
)
def test_mistakes_are_named(arguments, message, model_dir, capsys):
    with pytest.raises(SystemExit) as error:
        evaluate_flow.main(["--model", str(model_dir), *arguments.split()])
    assert message in capsys.readouterr().err + str(error.value)


def test_a_split_without_ground_truth_is_refused(model_dir, tmp_path):
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
