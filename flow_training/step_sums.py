"""Losses and errors of optimizer steps, kept on the device until someone looks, because looking waits for it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flow_training.metrics import ERROR_SUMS

# Halved this often, the scale of 2**16 would let gradients of 2**40 pass: then they are not large but NaN.
MAX_SKIPPED_IN_A_ROW = 40
STEP_SUMS = ("steps", "loss", "grad_norm", "skipped_steps", *ERROR_SUMS)  # what adds up between two lines of the log


class NotFiniteError(ArithmeticError):
    """The loss or the gradient of a step is not finite.

    Args:
        step: of the run, from 1.
        what: "loss" or "gradient".
        numbers: sample numbers of this process that may have caused it.
    """

    def __init__(self, step: int, what: str, numbers: list[int]):
        super().__init__(f"the {what} of step {step} is not finite")
        self.step, self.what, self.numbers = step, what, numbers


@dataclass
class _Step:
    """Passes of one optimizer step on this process."""

    numbers: list[list[int]] = field(default_factory=list)  # of the samples of each pass
    losses: list[Tensor] = field(default_factory=list)
    errors: list[Tensor] = field(default_factory=list)
    grad_norm: Tensor | None = None
    skipped: bool = False


class StepSums:
    """Collect the figures of passes and steps; nothing here waits for the device but `flush`.

    Args:
        loss_scaled: gradients may overflow, for a scaler skips such steps (fp16).
    """

    def __init__(self, loss_scaled: bool):
        self.loss_scaled = loss_scaled
        self._skipped_in_a_row = 0
        self._steps: list[_Step] = []
        self._open = _Step()

    def add_pass(self, numbers: list[int], loss: Tensor, errors: Tensor) -> None:
        """Add a forward pass of the current step.

        Args:
            numbers: of the samples.
            loss: scalar, detached.
            errors: `(6,)`, added up `flow_training.metrics.error_sums`.
        """
        self._open.numbers.append(numbers)
        self._open.losses.append(loss)
        self._open.errors.append(errors)

    def end_step(self, grad_norm: Tensor, skipped: bool) -> None:
        """Close the current step; its gradient's norm before clipping, and whether the scaler skipped it."""
        self._open.grad_norm, self._open.skipped = grad_norm, skipped
        self._steps.append(self._open)
        self._open = _Step()

    def flush(self, last_step: int, mean: Callable[[Tensor], Tensor], total: Callable[[Tensor], Tensor]) -> Tensor:
        """Hand over the steps since the last flush, over all processes.

        Args:
            last_step: number of the last closed step.
            mean, total: reduce a tensor over the processes; called by all of them, in this order.

        Returns:
            `(S, len(STEP_SUMS))` float64 on the CPU, a row for each step.

        Raises:
            NotFiniteError: a loss is not finite, or a gradient where nothing skips it, or so many gradients in a row
                that no scale of the loss can help; on all processes alike.
        """
        steps, self._steps = self._steps, []
        if not steps:
            return torch.zeros(0, len(STEP_SUMS), dtype=torch.float64)
        losses = mean(torch.stack([torch.stack(step.losses).mean() for step in steps])).tolist()
        errors = total(torch.stack([torch.stack(step.errors).sum(0) for step in steps])).double().cpu()
        norms = torch.stack([step.grad_norm for step in steps if step.grad_norm is not None]).tolist()
        rows = []
        for index, (step, loss, norm) in enumerate(zip(steps, losses, norms, strict=True)):
            self._skipped_in_a_row = self._skipped_in_a_row + 1 if step.skipped else 0
            overflow_is_normal = self.loss_scaled and self._skipped_in_a_row < MAX_SKIPPED_IN_A_ROW
            if not math.isfinite(loss) or not (overflow_is_normal or math.isfinite(norm)):
                what = "gradient" if math.isfinite(loss) else "loss"
                raise NotFiniteError(last_step - len(steps) + 1 + index, what, _suspects(step, what))
            rows.append([1.0, loss, 0.0 if step.skipped else norm, float(step.skipped), *errors[index].tolist()])
        return torch.tensor(rows, dtype=torch.float64)


def _suspects(step: _Step, what: str) -> list[int]:
    """Samples of the passes whose loss is not finite; for a gradient, any of the step's may be it."""
    passes = zip(step.numbers, step.losses, strict=True)
    return [number for numbers, loss in passes if what == "gradient" or not loss.isfinite() for number in numbers]
