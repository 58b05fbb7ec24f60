"""Metrics of steps: kept until they are reduced, reduced whenever one likes, in the log and in checkpoints."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from flow_training.checkpoints import STEP_TOTALS, RunProgress
from flow_training.config import TrainingConfig
from flow_training.logger import MAX_SKIPPED_IN_A_ROW, MetricLogger, NotFiniteError, PendingSteps, start_trackers
from flow_training.metrics import ERROR_SUMS


def alone(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def add_step(pending: PendingSteps, loss: float, grad_norm: float, skipped: bool = False, number: int = 0) -> None:
    pending.add_micro_batch([number], torch.tensor(loss), {"count": torch.tensor(1.0), "epe": torch.tensor(2.0)})
    pending.end_step(torch.tensor(grad_norm), skipped)


def test_gradients_may_overflow_where_a_scaler_skips_them():
    for loss_scaled in (False, True):
        pending = PendingSteps(loss_scaled)
        add_step(pending, 2.0, 1.0)
        add_step(pending, 4.0, float("inf"), skipped=loss_scaled)
        if loss_scaled:
            rows = pending.reduce(2, alone, alone)
            assert [[row[name] for name in STEP_TOTALS] for row in rows] == [[1, 2, 1, 0], [1, 4, 0, 1]]
            assert all((row["count"], row["epe"]) == (1, 2) for row in rows)
        else:
            with pytest.raises(NotFiniteError, match="gradient of step 2"):
                pending.reduce(2, alone, alone)


@pytest.mark.parametrize("reduce_every", [1, 7, 1000])
def test_gradients_that_no_scale_helps_end_the_run(reduce_every):
    """A step that is not skipped resets the count; a reduction does not."""
    pending = PendingSteps(loss_scaled=True)
    skipped = [True] * (MAX_SKIPPED_IN_A_ROW - 1) + [False] + [True] * MAX_SKIPPED_IN_A_ROW
    with pytest.raises(NotFiniteError, match=f"gradient of step {len(skipped)} ") as caught:
        for step, skip in enumerate(skipped, 1):
            add_step(pending, 1.0, float("nan") if skip else 1.0, skip, number=step)
            if step % reduce_every == 0 or step == len(skipped):
                pending.reduce(step, alone, alone)
    assert caught.value.indices == [len(skipped)]


def test_checkpoints_of_older_versions_have_the_totals_in_a_list():
    progress = RunProgress()
    state = progress.state_dict()
    del state["totals"]
    progress.load_state_dict(state | {"sums": [float(n) for n in range(len(STEP_TOTALS) + len(ERROR_SUMS))]})
    assert progress.totals == {"steps": 0, "loss": 1, "grad_norm": 2, "skipped_steps": 3, "count": 4, "epe": 5,
                               "1px": 6, "3px": 7, "5px": 8}  # fmt: skip


def test_images_go_to_every_tracker_that_takes_them(monkeypatch):
    """Each in the form that accelerate's tracker of that name hands on: an array (N, H, W, C), a list, or an image."""
    calls = {}

    class Tracker:
        def __init__(self, name: str):
            self.name = name

        def log_images(self, values, step, **options):
            calls[self.name] = values, step, options

    class Numbers:
        name = "mlflow"

    class Trackio(Numbers):
        name = "trackio"

        def log(self, values, step):
            calls[self.name] = values, step, {}

    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(Image=lambda image: ("image", image)))
    trackers = [*map(Tracker, ("tensorboard", "wandb", "clearml")), Numbers(), Trackio()]
    accelerator = SimpleNamespace(is_main_process=True, trackers=trackers, scaler=None)
    progress = RunProgress()
    progress.step = 7
    logger = MetricLogger(SimpleNamespace(), accelerator, progress, [])
    image = np.zeros((4, 6, 3), np.uint8)
    assert logger.takes_images
    logger.log_images({"validation/a": image})
    assert list(calls) == ["tensorboard", "wandb", "clearml", "trackio"]
    assert {step for _, step, _ in calls.values()} == {7}
    batch, _, options = calls["tensorboard"]
    assert batch["validation/a"].shape == (1, 4, 6, 3) and options == {"dataformats": "NHWC"}
    assert calls["wandb"][0]["validation/a"] == [image]
    assert calls["clearml"][0]["validation/a"] is image
    assert calls["trackio"][0]["validation/a"] == ("image", image)
    accelerator.trackers = [Numbers()]
    assert not logger.takes_images


def test_trackers_have_a_project_and_tensorboard_a_folder(tmp_path):
    """accelerate gives one name to all: here each gets its own."""

    class Recorder(GeneralTracker):
        name, requires_logging_directory = "recorder", False
        tracker = None

        def __init__(self):
            super().__init__(_blank=True)

        def store_init_configuration(self, values):
            self.values = values

    recorder, projects = Recorder(), []
    accelerator = Accelerator(log_with=["tensorboard", recorder], project_dir=tmp_path)
    init = accelerator.init_trackers

    def init_and_record(project: str) -> None:
        projects.append((project, [str(tracker) for tracker in accelerator.log_with]))
        init(project)

    accelerator.init_trackers = init_and_record
    config = TrainingConfig(output_dir=str(tmp_path), train_mix={"synthetic": 1}, tracker_project_name="films")
    start_trackers(accelerator, config)
    assert [project for project, names in projects if "tensorboard" in names] == ["logs"]
    assert [project for project, names in projects if "tensorboard" not in names] == ["films"]
    assert [tracker.name for tracker in accelerator.trackers] == ["tensorboard", "recorder"]
    assert recorder.values["tracker_project_name"] == "films"
    accelerator.end_training()
