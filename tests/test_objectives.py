"""What a run minimizes: an objective is one function and one line, and sees only what the samples have."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from test_modeling_raft import images, tiny_config
from tiny_run import flags

import train_flow
from flow_data.sampling import SampleError
from flow_training import objectives
from flow_training.data import DataError, collate, group_micro_batches
from flow_training.metrics import compute_metrics, error_sums
from flow_training.objectives import Objective, ObjectiveOutput, find_objective
from modeling_raft import RaftForOpticalFlow


def make_sample(number: int, **tensors: torch.Tensor) -> dict:
    return {"number": number, "id": f"a/{number}", "replaced": "", "pixel_values": images(2, 3, 64, 72), **tensors}


def test_a_batch_has_what_all_its_samples_have():
    labels = {"labels": torch.zeros(2, 64, 72), "valid": torch.ones(64, 72, dtype=torch.bool)}
    batch = collate([make_sample(3, **labels), make_sample(4, **labels)])
    assert batch["number"] == [3, 4] and batch["id"] == ["a/3", "a/4"] and batch["labels"].shape == (2, 2, 64, 72)
    batch = collate([make_sample(3, **labels), make_sample(4)])
    assert set(batch) == {"number", "id", "replaced", "pixel_values"} and batch["pixel_values"].shape[0] == 2


def test_an_error_of_a_sample_is_raised_between_steps_with_all_messages():
    error = collate([make_sample(0), SampleError("a: one is bad"), SampleError("a: other is bad")])
    steps = group_micro_batches([{"n": 0}, {"n": 1}, {"n": 2}, error], accumulation_steps=2)
    assert next(steps) == [{"n": 0}, {"n": 1}]
    with pytest.raises(DataError, match="a: one is bad; a: other is bad.*--skip_bad_samples"):
        next(steps)


def test_supervised_is_the_loss_of_the_model_and_the_errors_of_the_pixels_that_it_counts():
    torch.manual_seed(0)
    model, config = RaftForOpticalFlow(tiny_config()).train(), SimpleNamespace(num_flow_updates=2, max_flow=3.0)
    model.config.loss_max_flow = 3.0
    batch = {"pixel_values": images(2, 2, 3, 64, 72), "labels": 2 * torch.randn(2, 2, 64, 72)}
    batch["valid"] = torch.rand(2, 64, 72) < 0.7
    torch.manual_seed(1)
    loss, totals = objectives.supervised(model, batch, config)
    torch.manual_seed(1)
    output = RaftForOpticalFlow.forward(model, **batch, num_flow_updates=2)
    assert loss.requires_grad and not any(total.requires_grad for total in totals.values())
    torch.testing.assert_close(loss, output.loss)
    counted = batch["valid"] & (batch["labels"].norm(dim=1) < 3)
    expected = compute_metrics(error_sums(output.flow.detach(), batch["labels"], counted).sum(0))
    assert 0 < totals["count"] == counted.sum() < batch["valid"].sum()
    for name in ("epe", "1px", "3px", "5px"):
        assert totals[name] / totals["count"] == pytest.approx(expected[name], rel=1e-5)


def test_an_unknown_objective_is_refused():
    with pytest.raises(ValueError, match=r"objective must be one of .*supervised.*; got nonsense"):
        find_objective("nonsense")


@pytest.mark.slow
def test_a_run_with_another_objective_logs_its_metrics(tmp_path, monkeypatch):
    """One function and one line: a loss that needs no ground truth, with a metric of its own."""

    def smoothness(model, batch, config) -> ObjectiveOutput:
        assert set(batch) == {"pixel_values", "pixel_values_without_photo_aug", "labels", "valid"}
        flow = model(batch["pixel_values"], num_flow_updates=config.num_flow_updates).flow
        change = flow.diff(dim=-1).abs()
        return ObjectiveOutput(
            change.mean(), {"count": torch.tensor(float(change.numel())), "change": change.sum().detach()}
        )

    monkeypatch.setitem(
        objectives.OBJECTIVES,
        "smoothness",
        Objective(smoothness, needs_flow=False, needs_images_without_photo_aug=True),
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    train_flow.main(flags(tmp_path / "run", "--objective", "smoothness"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "train_log.jsonl").read_text().splitlines()]
    assert [list(line) for line in lines] == [
        ["step", "loss", "learning_rate", "grad_norm", "change", "pairs_per_second"]
    ] * 4
    assert all(line["change"] == pytest.approx(line["loss"], rel=1e-4) for line in lines)
    assert (tmp_path / "run" / "model.safetensors").exists()
