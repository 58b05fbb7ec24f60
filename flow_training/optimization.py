"""AdamW and the one-cycle schedule, as princeton-vl/RAFT trains with them (train.py, `fetch_optimizer`)."""

from collections.abc import Iterable

from torch.nn import Parameter
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR


def make_optimizer(parameters: Iterable[Parameter], learning_rate: float, weight_decay: float) -> AdamW:
    """AdamW with the original's epsilon."""
    return AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, eps=1e-8)


def make_schedule(optimizer: AdamW, learning_rate: float, max_train_steps: int) -> OneCycleLR:
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
