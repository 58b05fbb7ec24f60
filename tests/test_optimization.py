"""The schedule against its closed form, and the optimizer's settings."""

import pytest
import torch

from flow_training.optimization import count_steps, make_optimizer, make_schedule


@pytest.mark.parametrize("max_train_steps", [20, 900, 5000])
def test_schedule_is_the_published_one(max_train_steps):
    """Linear from max / 25 to max at 5 % of (steps + 100), then linear to max / 25 / 1e4 at the end of those."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = make_optimizer([parameter], learning_rate=4e-4, weight_decay=1e-4)
    schedule = make_schedule(optimizer, 4e-4, max_train_steps)
    total = max_train_steps + 100
    top = 0.05 * total - 1
    for step in range(max_train_steps):
        if step <= top:
            expected = 4e-4 / 25 + (4e-4 - 4e-4 / 25) * step / top
        else:
            expected = 4e-4 + (4e-4 / 25e4 - 4e-4) * (step - top) / (total - 1 - top)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-9), step
        optimizer.step()
        schedule.step()
    assert (optimizer.defaults["eps"], optimizer.defaults["weight_decay"]) == (1e-8, 1e-4)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)  # not cycled


def test_the_fused_optimizer_is_adamw_and_counts_no_step_that_overflows():
    """As a loss scaler marks it: the kernel then leaves weights, moments and count as they are."""
    torch.manual_seed(0)
    start, gradients = torch.randn(50, dtype=torch.float64), torch.randn(5, 50, dtype=torch.float64)
    parameters = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    fused = make_optimizer(parameters[:1], learning_rate=1e-2, weight_decay=1e-2)
    plain = torch.optim.AdamW(parameters[1:], lr=1e-2, weight_decay=1e-2, eps=1e-8, fused=False)
    assert fused.param_groups[0]["fused"] and count_steps(fused) == 0
    taken = 0
    for gradient, overflows in zip(gradients, (1.0, 0.0, 1.0, 0.0, 0.0), strict=True):
        parameters[0].grad = gradient.clone()
        fused.found_inf, fused.grad_scale = torch.tensor(overflows), None
        fused.step()
        if not overflows:
            parameters[1].grad = gradient.clone()
            plain.step()
            taken += 1
        assert count_steps(fused) == taken
        torch.testing.assert_close(*parameters, rtol=1e-12, atol=0)
