"""The schedule against its closed form, and the optimizer's settings."""

import pytest
import torch

from flow_training.optimization import make_optimizer, make_schedule


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


def test_a_fused_optimizer_takes_the_same_steps():
    torch.manual_seed(0)
    start, gradients = torch.randn(50, dtype=torch.float64), torch.randn(5, 50, dtype=torch.float64)
    results = []
    for fused in (False, True):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = make_optimizer([parameter], learning_rate=1e-2, weight_decay=1e-2, fused=fused)
        assert optimizer.param_groups[0]["fused"] is fused
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
        results.append(parameter.detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=0)
