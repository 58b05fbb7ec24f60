import pytest
import torch

from flow_training.metrics import ERROR_SUMS
from flow_training.step_sums import MAX_SKIPPED_IN_A_ROW, NotFiniteError, StepSums


def alone(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def add_step(sums: StepSums, loss: float, grad_norm: float, skipped: bool = False, number: int = 0) -> None:
    sums.add_pass([number], torch.tensor(loss), torch.ones(len(ERROR_SUMS)))
    sums.end_step(torch.tensor(grad_norm), skipped)


def test_gradients_may_overflow_where_a_scaler_skips_them():
    for loss_scaled in (False, True):
        sums = StepSums(loss_scaled)
        add_step(sums, 2.0, 1.0)
        add_step(sums, 4.0, float("inf"), skipped=loss_scaled)
        if loss_scaled:
            rows = sums.flush(2, alone, alone)
            assert rows[:, :4].tolist() == [[1, 2, 1, 0], [1, 4, 0, 1]]
        else:
            with pytest.raises(NotFiniteError, match="gradient of step 2"):
                sums.flush(2, alone, alone)


@pytest.mark.parametrize("flush_every", [1, 7, 1000])
def test_gradients_that_no_scale_helps_end_the_run(flush_every):
    """A step that is not skipped begins the count anew; looking does not."""
    sums = StepSums(loss_scaled=True)
    skipped = [True] * (MAX_SKIPPED_IN_A_ROW - 1) + [False] + [True] * MAX_SKIPPED_IN_A_ROW
    with pytest.raises(NotFiniteError, match=f"gradient of step {len(skipped)} ") as caught:
        for step, skip in enumerate(skipped, 1):
            add_step(sums, 1.0, float("nan") if skip else 1.0, skip, number=step)
            if step % flush_every == 0 or step == len(skipped):
                sums.flush(step, alone, alone)
    assert caught.value.numbers == [len(skipped)]
