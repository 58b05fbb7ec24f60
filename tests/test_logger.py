"""Metrics of steps: kept until they are reduced, reduced whenever one likes, in the log and in checkpoints."""

import pytest
import torch

from flow_training.checkpoints import STEP_TOTALS, RunProgress
from flow_training.logger import MAX_SKIPPED_IN_A_ROW, NotFiniteError, PendingSteps
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
    assert caught.value.numbers == [len(skipped)]


def test_checkpoints_of_older_versions_have_the_totals_in_a_list():
    progress = RunProgress()
    state = progress.state_dict()
    del state["totals"]
    progress.load_state_dict(state | {"sums": [float(n) for n in range(len(STEP_TOTALS) + len(ERROR_SUMS))]})
    assert progress.totals == {"steps": 0, "loss": 1, "grad_norm": 2, "skipped_steps": 3, "count": 4, "epe": 5,
                               "1px": 6, "3px": 7, "5px": 8}  # fmt: skip
