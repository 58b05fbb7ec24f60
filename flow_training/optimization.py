"""What changes weights and learning rate in a step: AdamW, the one-cycle schedule, a moving average of the weights.

Optimizer and schedule are those of princeton-vl/RAFT (train.py, `fetch_optimizer`).
"""

from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import get_ema_multi_avg_fn

from modeling_raft import RaftForOpticalFlow


def make_optimizer(parameters: Iterable[Parameter], learning_rate: float, weight_decay: float) -> AdamW:
    """AdamW with the original's epsilon, which updates all parameters in one kernel."""
    return AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, eps=1e-8, fused=True)


def count_steps(optimizer: Optimizer) -> int:
    """How many steps an optimizer has taken; reading it waits for the device.

    An fp16 loss scaler leaves it to the kernel of a fused optimizer to skip a step whose gradients overflow, and
    `accelerator.optimizer_step_was_skipped` is never true then. The kernel does not count such a step.
    """
    return next((int(state["step"]) for state in optimizer.state.values()), 0)


def make_schedule(optimizer: Optimizer, learning_rate: float, max_train_steps: int) -> OneCycleLR:
    """Linear warm-up from max / 25 over 5 % of the steps, then linear decay to max / 250,000.

    Its length is 100 steps more than the run's, as in the original. Step it once for each optimizer step. Do not give
    it to `accelerator.prepare`: a prepared schedule advances once for each *process*.
    """
    return OneCycleLR(
        optimizer,
        max_lr=learning_rate,
        total_steps=max_train_steps + 100,
        pct_start=0.05,
        cycle_momentum=False,
        anneal_strategy="linear",
    )


def override_hyperparameters(
    optimizer: Optimizer, schedule: OneCycleLR, learning_rate: float, weight_decay: float, max_train_steps: int
) -> None:
    """Apply hyperparameters that have changed since a checkpoint was saved, which has restored the old ones.

    Args:
        optimizer, schedule: As they were loaded; the schedule stays at its step.
        learning_rate, weight_decay, max_train_steps: As for `make_optimizer` and `make_schedule`.
    """
    step = schedule.last_epoch
    for group in optimizer.param_groups:
        group["weight_decay"] = weight_decay
    fresh = make_schedule(optimizer, learning_rate, max_train_steps)
    fresh.last_epoch = step - 1
    fresh.step()  # the rate follows from the step alone
    schedule.load_state_dict(fresh.state_dict())


class ExponentialMovingAverage:
    """Average of a model's parameters over its optimizer steps, in which recent steps weigh most.

    Update n, counted from 0, is `average = d * average + (1 - d) * parameters` with
    `d = min(decay, (1 + n) / (10 + n))`. The second term is the warm-up of TensorFlow's
    `tf.train.ExponentialMovingAverage` (its `num_updates`): early averages are over few steps, so that the random
    initial weights do not linger. Buffers (BatchNorm's running statistics, averages already) are copied.

    `torch.optim.swa_utils.AveragedModel` is not used because it synchronizes with the device in every update.

    Args:
        model: In float32, neither wrapped nor prepared by accelerate. It is copied and left unchanged.
        decay: Between 0 and 1; the average is over about the last 1 / (1 - decay) steps.
        device: Where the average is kept.
    """

    def __init__(self, model: RaftForOpticalFlow, decay: float, device: torch.device | None = None):
        self.model = deepcopy(model).requires_grad_(False).eval()
        self.model.to(device)  # type: ignore[arg-type]  # transformers hides the signature of torch
        self.decay = decay
        self.num_updates = 0

    def update(self, model: RaftForOpticalFlow) -> None:
        """Update the average after an optimizer step.

        Args:
            model: The model that was copied, not wrapped.
        """
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        average = get_ema_multi_avg_fn(decay)
        average(list(self.model.parameters()), [parameter.detach() for parameter in model.parameters()], None)
        for average_buffer, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            average_buffer.copy_(buffer)
        self.num_updates += 1

    def restart(self, model: RaftForOpticalFlow) -> None:
        """Reset the average to the weights of a model."""
        self.model.load_state_dict(model.state_dict())
        self.num_updates = 0

    def state_dict(self) -> dict[str, Any]:
        """The average and its number of updates; the decay is a setting of the run."""
        return {"model": self.model.state_dict(), "num_updates": self.num_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.num_updates = state["num_updates"]
