"""ema_decay: the average follows its formula, is what is validated and published, and leaves the training as it is."""

import copy
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from test_modeling_raft import tiny_config
from tiny_run import log_lines, train
from torch import Tensor

from flow_data.datasets import DATASETS
from flow_data.synthetic import SyntheticOptions, synthetic
from flow_training.evaluation import evaluate
from flow_training.optimization import ExponentialMovingAverage
from modeling_raft import RaftForOpticalFlow

STEPS = 4
SETTINGS = {
    "checkpointing_steps": "1",
    "validation_sets": "synthetic",
    "validation_steps": "2",
    "total_batch_size": "2",
    "learning_rate": "3e-3",
}
DECAY = 0.2  # the warm-up, 1/10, 2/11, 3/12, is below it at first and then above


def weights_of(step: Path) -> dict[str, Tensor]:
    return load_file(step / "model.safetensors")


def ema_of(checkpoint: Path) -> dict[str, Tensor]:
    return torch.load(checkpoint / "custom_checkpoint_1.pkl")["ema"]["model"]


def average(weights: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """The last of the averages, in float64, each as a sum over all steps: the formula unrolled."""
    decays = [min(decay, (1 + n) / (10 + n)) for n in range(len(weights) - 1)]
    shares = [torch.tensor(decays[i:]).double().prod() * (1 - ([0] + decays)[i]) for i in range(len(weights))]
    assert sum(shares) == pytest.approx(1)
    return {
        name: sum(share * step[name].double() for share, step in zip(shares, weights, strict=True))
        for name in weights[0]
    }


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def validated(output_dir: Path) -> list[dict[str, float]]:
    return [line for line in log_lines(output_dir) if "validation/synthetic/epe" in line]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The same training with and without an average, from weights that are known; BatchNorm trains."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    RaftForOpticalFlow(tiny_config()).save_pretrained(folder / "start")
    start = {"model_name_or_path": str(folder / "start"), "model_size": None, "config_overrides": None}
    for name, decay in (("with", f"{DECAY}"), ("without", None)):
        result = train(folder / name, "--gradient_checkpointing", ema_decay=decay, **SETTINGS | start)
        assert result.returncode == 0, result.stderr
        assert ("decay 0.2" in result.stdout) == (name == "with")
    return folder


@pytest.mark.slow
def test_the_final_model_is_the_average_by_its_formula(runs):
    trained = [weights_of(runs / "start"), *(weights_of(runs / f"with/checkpoint-{i + 1}") for i in range(STEPS))]
    final = weights_of(runs / "with")
    parameters = [name for name, _ in RaftForOpticalFlow(tiny_config()).named_parameters()]
    for name, expected in average(trained, DECAY).items():
        if name in parameters:
            torch.testing.assert_close(final[name].double(), expected, rtol=1e-5, atol=1e-7)
        else:  # BatchNorm's statistics
            assert torch.equal(final[name], trained[-1][name]), name
    assert len(parameters) < len(final)
    moved = max((final[name] - trained[-1][name]).abs().max() for name in parameters)
    assert moved > 1e-4  # far more than the tolerance
    assert_equal(final, ema_of(runs / f"with/checkpoint-{STEPS}"))


@pytest.mark.slow
def test_the_training_is_the_same_without_it(runs):
    lines = {name: [line for line in log_lines(runs / name) if "loss" in line] for name in ("with", "without")}
    assert lines["with"] == lines["without"] and len(lines["with"]) == STEPS
    for step in range(1, STEPS + 1):
        assert_equal(*(weights_of(runs / f"{name}/checkpoint-{step}") for name in ("with", "without")))
    assert_equal(weights_of(runs / "without"), weights_of(runs / f"without/checkpoint-{STEPS}"))
    assert "exponential moving average (decay 0.2)" in (runs / "with" / "README.md").read_text()
    assert "exponential" not in (runs / "without" / "README.md").read_text()


def evaluate_here(folder: Path) -> dict[str, float]:
    """What evaluate_flow.py would report of a run's weights, on the run's validation set."""
    AcceleratorState._reset_state(reset_partial_state=True)
    options = SyntheticOptions(image_size=(72, 88), displacement=(1, 4), shapes=(1, 3))
    pairs = synthetic(options, split="validation", num_pairs=3)
    model = RaftForOpticalFlow.from_pretrained(folder).eval()
    report = evaluate(model, pairs, DATASETS["synthetic"].protocol, Accelerator(cpu=True))
    AcceleratorState._reset_state(reset_partial_state=True)
    return {f"validation/synthetic/{name}": value for name, value in report["metrics"].items()}


@pytest.mark.slow
def test_what_is_validated_is_what_is_published(runs):
    (_, last), (_, other) = validated(runs / "with"), validated(runs / "without")
    assert last == pytest.approx({"step": STEPS, **evaluate_here(runs / "with")}, rel=1e-6)
    assert last != pytest.approx(other, rel=1e-6)
    card = (runs / "with" / "README.md").read_text()
    assert f"{last['validation/synthetic/epe']:.3f}" in card


@pytest.mark.slow
def test_two_processes_keep_one_average(tmp_path):
    """Each validates a share of the pairs with its own copy; from a checkpoint, too."""
    settings = SETTINGS | {"ema_decay": f"{DECAY}", "per_device_train_batch_size": "1"}
    settings |= {"num_flow_updates": "1"}
    result = train(tmp_path / "run", "--freeze_batch_norm", processes=2, **settings)
    assert result.returncode == 0, result.stderr
    expected = {"step": STEPS, **evaluate_here(tmp_path / "run")}
    assert validated(tmp_path / "run")[-1] == pytest.approx(expected, rel=1e-5)
    switches = ["--freeze_batch_norm", "--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-2")]
    result = train(tmp_path / "again", *switches, processes=2, **settings)
    assert result.returncode == 0, result.stderr
    assert_equal(weights_of(tmp_path / "again"), weights_of(tmp_path / "run"))
    assert validated(tmp_path / "again") == validated(tmp_path / "run")
    assert_equal(ema_of(tmp_path / "again/checkpoint-4"), weights_of(tmp_path / "run"))


@pytest.mark.slow
def test_an_average_may_begin_and_end_at_a_checkpoint(runs, tmp_path):
    settings = SETTINGS | dict.fromkeys(["model_size", "config_overrides"])
    settings |= {"model_name_or_path": str(runs / "start")}
    resume = ["--gradient_checkpointing", "--resume_from_checkpoint"]
    refused = train(tmp_path / "run", *resume, str(runs / "without/checkpoint-2"), ema_decay="0.5", **settings)
    assert refused.returncode == 1 and "ema_decay: null -> 0.5" in refused.stderr

    allow = "--allow_config_changes"
    late = train(tmp_path / "late", *resume, str(runs / "without/checkpoint-2"), allow, ema_decay="0.5", **settings)
    assert late.returncode == 0 and "the EMA starts from its weights" in late.stderr, late.stderr
    expected = average([weights_of(runs / f"without/checkpoint-{step}") for step in (2, 3, 4)], 0.5)
    for name, parameter in weights_of(tmp_path / "late").items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-5, atol=1e-7)

    dropped = train(tmp_path / "dropped", *resume, str(runs / "with/checkpoint-2"), allow, **settings)
    assert dropped.returncode == 0 and "EMA weights of the checkpoint are dropped" in dropped.stderr, dropped.stderr
    assert_equal(weights_of(tmp_path / "dropped"), weights_of(runs / "without"))
    assert validated(tmp_path / "dropped") == validated(runs / "without")


@pytest.mark.parametrize("frozen", [True, False])
def test_an_update_leaves_the_model_alone(frozen):
    model = RaftForOpticalFlow(tiny_config(freeze_batch_norm=frozen)).train()
    model.activation_checkpointing_enable()
    ema = ExponentialMovingAverage(model, 0.999)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(1)
    before = copy.deepcopy(model.state_dict())
    ema.update(model)
    assert_equal(model.state_dict(), before)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())
    assert not any(module.training for module in ema.model.modules())
    for name, buffer in model.named_buffers():
        assert torch.equal(ema.model.get_buffer(name), buffer)
    for name, parameter in model.named_parameters():  # all have moved by 1; the first update keeps a tenth
        torch.testing.assert_close(ema.model.get_parameter(name), parameter - 0.1)
