"""The loss that RAFT is trained with (paper section 3.4)."""

from collections.abc import Sequence

import torch
from torch import Tensor


def sequence_loss(
    flow_predictions: Sequence[Tensor],
    labels: Tensor,
    valid: Tensor | None = None,
    gamma: float = 0.8,
    max_flow: float = 400.0,
) -> Tensor:
    """Weighted L1 distance of every prediction to the ground truth, increasing over the updates (equation 7).

    The mean is taken over all elements, invalid ones included, as the published training does: sparse ground truth
    gives a smaller loss, and the mean over equal parts of a batch is the mean over the batch.

    Args:
        flow_predictions: N tensors `(B, 2, H, W)` in pixels, first update first.
        labels: `(B, 2, H, W)`, ground truth flow in pixels. Where it is not valid it may hold anything, also NaN.
        valid: `(B, H, W)` bool, or numbers of which those >= 0.5 are valid; None: everywhere.
        gamma: Prediction i of N weighs `gamma ** (N - 1 - i)`.
        max_flow: Pixels whose ground truth moves this far or farther, in pixels, are left out.

    Returns:
        A scalar: the weighted sum over the predictions.
    """
    prediction_loss = SequenceLoss(labels, valid, len(flow_predictions), gamma, max_flow)
    return torch.stack([prediction_loss(i, flow_pred) for i, flow_pred in enumerate(flow_predictions)]).sum()


class SequenceLoss:
    """The terms of `sequence_loss`, for predictions that come one by one: a call returns the term of one prediction.

    Args:
        labels, valid, gamma, max_flow: The arguments of `sequence_loss`.
        num_predictions: How many predictions there will be.
    """

    def __init__(self, labels: Tensor, valid: Tensor | None, num_predictions: int, gamma: float, max_flow: float):
        mask = labels[:, 0].hypot(labels[:, 1]) < max_flow  # False for NaN; vector_norm takes far longer
        if valid is not None:
            mask = mask & (valid if valid.dtype == torch.bool else valid >= 0.5)
        self.mask = mask[:, None]
        # Masked labels are replaced before they are used: 0 * NaN is NaN, in the loss and in its gradient.
        self.labels = labels.masked_fill(~self.mask, 0)
        self.num_predictions, self.gamma = num_predictions, gamma

    def __call__(self, i: int, flow_pred: Tensor) -> Tensor:
        """Return the weighted term of prediction `i`, `(B, 2, H, W)` in pixels: a scalar."""
        weight = self.gamma ** (self.num_predictions - 1 - i)
        return weight * ((flow_pred - self.labels).abs() * self.mask).mean()
