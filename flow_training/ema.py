"""Exponential moving average (EMA) of a model's weights."""

from copy import deepcopy
from typing import Any

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from modeling_raft import RaftForOpticalFlow


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
        """Start over, with the weights of a model as the average."""
        self.model.load_state_dict(model.state_dict())
        self.num_updates = 0

    def state_dict(self) -> dict[str, Any]:
        """The average and its number of updates; the decay is a setting of the run."""
        return {"model": self.model.state_dict(), "num_updates": self.num_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.num_updates = state["num_updates"]
