"""Data without ground truth: a warning at the start, no endless training, and no number where there is none."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_modeling_raft import tiny_config
from tiny_run import log_lines, train

import evaluate_flow
from flow_data.datasets import load_source
from flow_data.sampling import MixSource, TrainingPairs
from flow_training.checkpoints import RunProgress
from flow_training.data import CHECKED_PAIRS, describe_missing_ground_truth
from flow_training.logger import MAX_STEPS_WITHOUT_PIXELS, MetricLogger, NothingLearnedError
from modeling_raft import RaftForOpticalFlow


def make_pairs(folder: Path, values: list[float], known: float = 1.0) -> Path:
    """Pairs whose flow is one value everywhere, as a file says it: NaN is unknown; a share of the pixels is known."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number, value in enumerate(values):
        for frame in (1, 2):
            Image.fromarray(rng.integers(0, 256, (72, 88, 3), np.uint8)).save(folder / f"p{number}_img{frame}.png")
        flow = np.full((72, 88, 2), value, np.float32)
        flow[rng.random((72, 88)) >= known] = np.nan
        (folder / f"p{number}_flow.flo").write_bytes(
            b"PIEH" + np.array([88, 72], "<i4").tobytes() + flow.astype("<f4").tobytes()
        )
    return folder


def strict_lines(output_dir: Path) -> list[dict]:
    """The log as a reader that takes nothing but RFC 8259."""
    text = (output_dir / "train_log.jsonl").read_text()
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("value", [math.nan, 900.0])
def test_a_run_without_ground_truth_stops_and_publishes_nothing(value, tmp_path):
    pairs = make_pairs(tmp_path / "pairs", [value] * 3)
    settings = {
        "train_mix": "{pairs: 1}",
        "pairs_path": str(pairs),
        "max_train_steps": "3",
        "validation_sets": "pairs",
    }
    settings |= {"validation_steps": "2", "checkpointing_steps": "1", "report_to": "tensorboard"}
    result = train(tmp_path / "run", **settings)
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert "warning: pairs: no pixel of its first 3 pair(s) (p0, p1, p2) has valid ground truth" in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("train_flow.py: error:")]
    assert "no pixel counted for the loss in 3 steps" in line and "max_flow (400 px)" in line
    assert "ground truth of pairs with python -m flow_data.preview" in line
    assert not (tmp_path / "run" / "model.safetensors").exists() and not (tmp_path / "run" / "README.md").exists()
    training = [line for line in strict_lines(tmp_path / "run") if "loss" in line]
    assert [line["step"] for line in training] == [1, 2]
    assert all(line[name] is None for line in training for name in ("epe", "1px", "3px", "5px"))
    (validation,) = [line for line in strict_lines(tmp_path / "run") if "validation/pairs/epe" in line]
    assert (validation["validation/pairs/epe"] is None) == math.isnan(value)
    events = EventAccumulator(str(tmp_path / "run" / "logs")).Reload()
    scalars = [scalar for tag in events.Tags()["scalars"] for scalar in events.Scalars(tag)]
    assert scalars and all(math.isfinite(scalar.value) for scalar in scalars)

    # What has been counted is part of a checkpoint: in pieces, the run comes no further.
    before = log_lines(tmp_path / "run")
    again = train(tmp_path / "run", "--resume_from_checkpoint", "auto", **settings)
    assert again.returncode == 1 and "in 3 steps in a row" in again.stderr, again.stderr
    assert log_lines(tmp_path / "run") == before


@pytest.mark.slow
def test_two_processes_stop_without_ground_truth(tmp_path):
    """What counts is the pixels of all; each says nothing twice."""
    pairs = make_pairs(tmp_path / "pairs", [math.nan] * 4)
    settings = {"train_mix": "{pairs: 1}", "pairs_path": str(pairs), "max_train_steps": "2"}
    result = train(tmp_path / "run", processes=2, **settings)
    assert result.returncode != 0 and not (tmp_path / "run" / "model.safetensors").exists()
    assert result.stderr.count("train_flow.py: error: there is nothing to learn from") == 1
    assert result.stderr.count("train_flow.py: warning: pairs") == 1


@pytest.mark.slow
def test_one_source_without_ground_truth_causes_a_warning_only(tmp_path):
    """Most crops of the sparse one have no valid pixel."""
    pairs = make_pairs(tmp_path / "pairs", [math.nan, 2.0, math.nan], known=1e-4)
    mix = {"train_mix": "{pairs: 1, synthetic: 1}", "synthetic_num_pairs": "1", "total_batch_size": "1"}
    settings = mix | {"pairs_path": str(pairs), "max_train_steps": "8", "validation_sets": "pairs"}
    result = train(tmp_path / "run", **settings)
    assert result.returncode == 0, result.stderr
    epes = [line["epe"] for line in strict_lines(tmp_path / "run") if "loss" in line]
    assert None in epes and len(set(epes)) > 2


def make_logger(progress: RunProgress, max_train_steps: int = 1000) -> MetricLogger:
    """The logger of a run of one process, as far as it counts pixels."""
    config = SimpleNamespace(max_train_steps=max_train_steps, max_flow=400.0, skip_bad_samples=False)
    accelerator = SimpleNamespace(reduce=lambda tensor, reduction: tensor, scaler=None)
    return MetricLogger(config, accelerator, progress, ["one", "other"])


def add_steps(logger: MetricLogger, pixels: list[int]) -> None:
    for count in pixels:
        bookkeeping = {"number": [0], "replaced": [""]}
        logger.add_micro_batch(bookkeeping, torch.zeros(()), {"count": torch.tensor(float(count))})
        logger.end_step(torch.zeros(()), skipped=False)
        logger.progress.step += 1


@pytest.mark.parametrize("reduce_every", [1, 30, 1000])
def test_only_many_steps_in_a_row_stop_a_run(reduce_every):
    """However often metrics are reduced; and over a checkpoint."""
    some, none = [7], [0] * (MAX_STEPS_WITHOUT_PIXELS - 1)
    logger = make_logger(RunProgress())
    for first in range(0, len(none + some + none), reduce_every):
        add_steps(logger, (none + some + none)[first : first + reduce_every])
        logger.reduce_metrics()
    resumed = RunProgress()
    resumed.load_state_dict(logger.progress.state_dict())
    logger = make_logger(resumed)
    add_steps(logger, [0])
    message = f"in {MAX_STEPS_WITHOUT_PIXELS} steps in a row.* of one, other with"
    with pytest.raises(NothingLearnedError, match=message):
        logger.reduce_metrics()


def test_a_short_run_stops_where_no_step_had_a_pixel():
    logger = make_logger(RunProgress(), max_train_steps=3)
    add_steps(logger, [0, 5, 0])
    logger.reduce_metrics()
    logger = make_logger(RunProgress(), max_train_steps=3)
    add_steps(logger, [0, 0, 0])
    with pytest.raises(NothingLearnedError, match="in 3 steps"):
        logger.reduce_metrics()


def test_the_first_pairs_of_each_source_are_checked(tmp_path):
    def warnings(values: list[float], max_flow: float = 400.0) -> list[str]:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        rows = load_source("pairs", make_pairs(folder, values))
        return describe_missing_ground_truth(TrainingPairs([MixSource("mine", rows, 1, None)], 0), max_flow)

    (line,) = warnings([math.nan] * (CHECKED_PAIRS + 2))
    assert line.startswith(f"mine: no pixel of its first {CHECKED_PAIRS} pair(s) (p0, p1, p2") and "p8" not in line
    assert warnings([math.nan] * (CHECKED_PAIRS - 1) + [1.0]) == []
    assert len(warnings([math.nan] * CHECKED_PAIRS + [1.0])) == 1
    assert warnings([280.0]) == [] and len(warnings([283.0])) == 1  # on both axes: 400 px is 282.8
    assert len(warnings([280.0], max_flow=396.0)) == 0 and len(warnings([280.0], max_flow=395.0)) == 1


def test_unreadable_pairs_are_not_reported_as_missing_ground_truth(tmp_path):
    pairs = make_pairs(tmp_path / "pairs", [math.nan, math.nan])
    rows = load_source("pairs", pairs)
    (pairs / "p0_img1.png").write_bytes(b"no picture")
    (line,) = describe_missing_ground_truth(TrainingPairs([MixSource("mine", rows, 1, None)], 0), 400.0)
    assert "its first 1 pair(s) (p1)" in line
    (pairs / "p1_flow.flo").write_bytes(b"no flow")
    assert describe_missing_ground_truth(TrainingPairs([MixSource("mine", rows, 1, None)], 0), 400.0) == []


def test_evaluation_reports_diverged_weights(tmp_path, capsys):
    model = RaftForOpticalFlow(tiny_config())
    model.update_block.flow_head[2].bias.data.fill_(3e38)  # finite, as NaN is refused, but their sum is not
    model.save_pretrained(tmp_path / "model")
    pairs = make_pairs(tmp_path / "pairs", [2.0])
    AcceleratorState._reset_state(reset_partial_state=True)
    evaluate_flow.main(
        f"--model {tmp_path / 'model'} --dataset pairs --data_dir {pairs} --num_flow_updates 2 "
        f"--output {tmp_path / 'report.json'}".split()
    )
    printed = capsys.readouterr().out
    assert "the model's flow is not finite" in printed and "ground truth" not in printed
    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert report["metrics"]["epe"] is None and report["metrics"]["fl_all"] == 100
    assert report["zero_flow_epe"] == pytest.approx(math.hypot(2, 2))
