"""AdamW and the one-cycle schedule, as princeton-vl/RAFT trains with them (train.py, `fetch_optimizer`)."""

from collections.abc import Iterable

from torch.nn import Parameter
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR


def make_optimizer(
    parameters: Iterable[Parameter], learning_rate: float, weight_decay: float, fused: bool = False
) -> AdamW:
    """AdamW with the original's epsilon.

    Args:
        parameters, learning_rate, weight_decay: As in torch.
        fused: All parameters in one kernel; on GPUs that is faster. Not with an fp16 loss scaler: it leaves skipping
            to such an optimizer, and what counts skipped steps (`accelerator.optimizer_step_was_skipped`) sees none.
    """
    return AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, eps=1e-8, fused=fused)


def make_schedule(optimizer: Optimizer, learning_rate: float, max_train_steps: int) -> OneCycleLR:
    """Linear warm-up from max / 25 over 5 % of the steps, then linear decay to max / 250,000.

    It is made for 100 steps more than there are, as in the original. Step it once for each optimizer step. Do not hand
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


def change_course(
    optimizer: Optimizer, schedule: OneCycleLR, learning_rate: float, weight_decay: float, max_train_steps: int
) -> None:
    """Let other settings take effect from here on, where a checkpoint has brought back the ones it was saved with.

    Args:
        optimizer, schedule: As loaded; the schedule stays at its step.
        learning_rate, weight_decay, max_train_steps: As for `make_optimizer` and `make_schedule`.
    """
    step = schedule.last_epoch
    for group in optimizer.param_groups:
        group["weight_decay"] = weight_decay
    fresh = make_schedule(optimizer, learning_rate, max_train_steps)
    fresh.last_epoch = step - 1
    fresh.step()  # the rate follows from the step alone
    schedule.load_state_dict(fresh.state_dict())
