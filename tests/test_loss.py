"""The sequence loss against its formula, and what must not change it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_raft import sequence_loss


def batch(seed: int = 0, updates: int = 3):
    generator = torch.Generator().manual_seed(seed)
    predictions = [torch.randn(4, 2, 8, 16, generator=generator) for _ in range(updates)]
    labels = 5 * torch.randn(4, 2, 8, 16, generator=generator)
    valid = torch.rand(4, 8, 16, generator=generator) < 0.5
    return predictions, labels, valid


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), gamma=st.floats(0.1, 1), max_flow=st.floats(1, 20), updates=st.integers(1, 5))
def test_is_the_published_formula(seed, gamma, max_flow, updates):
    predictions, labels, valid = batch(seed, updates)
    expected = 0.0
    for i, flow_pred in enumerate(predictions):
        total = 0.0
        for b in range(len(labels)):
            u, v = labels[b].double().numpy()
            mask = valid[b].numpy() & (np.hypot(u, v) < max_flow)
            total += (np.abs(flow_pred[b].double().numpy() - labels[b].double().numpy()) * mask).sum()
        expected += gamma ** (updates - 1 - i) * total / labels.numel()
    assert sequence_loss(predictions, labels, valid, gamma, max_flow).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("hidden_value", [float("nan"), float("inf"), 1e10, -3.0])
def test_labels_under_the_mask_change_nothing(hidden_value):
    predictions, labels, valid = batch()
    predictions = [flow_pred.requires_grad_() for flow_pred in predictions]
    loss = sequence_loss(predictions, labels, valid)
    gradients = torch.autograd.grad(loss, predictions)
    hidden = torch.where(valid[:, None], labels, hidden_value)
    other = sequence_loss(predictions, hidden, valid)
    assert other == loss
    for ours, theirs in zip(torch.autograd.grad(other, predictions), gradients, strict=True):
        assert torch.equal(ours, theirs)


def test_numbers_as_mask_mean_at_least_a_half():
    predictions, labels, valid = batch()
    numbers = torch.where(valid, 0.5, 0.49)
    assert sequence_loss(predictions, labels, numbers) == sequence_loss(predictions, labels, valid)


def test_without_a_mask_all_is_valid():
    predictions, labels, valid = batch()
    assert sequence_loss(predictions, labels) == sequence_loss(predictions, labels, torch.ones_like(valid))


def test_equal_parts_of_a_batch_average_to_the_batch():
    predictions, labels, valid = batch()
    whole = sequence_loss(predictions, labels, valid)
    parts = [
        sequence_loss([flow_pred[part] for flow_pred in predictions], labels[part], valid[part])
        for part in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(sum(parts) / 2, whole)


def test_nothing_valid_is_zero_with_zero_gradient():
    predictions, labels, valid = batch()
    predictions[-1].requires_grad_()
    loss = sequence_loss(predictions, labels, torch.zeros_like(valid))
    loss.backward()
    assert loss == 0 and (predictions[-1].grad == 0).all()
