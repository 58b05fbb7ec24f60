"""The training step as a CUDA graph: its kernels are recorded once, and launched together in each step.

Small batches leave a GPU idle while the host launches thousands of kernels one by one (docs/gpu.md). The kernels are
those of a step without a graph, with `correlation="dense"`.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from modeling_raft import RaftForOpticalFlow
from modeling_raft.modeling_raft import RaftOutput


def record_training(
    model: RaftForOpticalFlow,
    batch_shape: tuple[int, int, int],
    num_flow_updates: int,
    device: torch.device,
    autocast: AbstractContextManager,
) -> None:
    """Record the supervised pass of a model in training mode, forward and backward, and use it from now on.

    All batches of a run have one shape; evaluation is as before. All pairs are correlated, as `correlation="dense"`
    does. Call it before the model is prepared by accelerate, and before other threads use the GPU, which recording
    forbids. Weights and running statistics stay as they are.

    Args:
        model: Is moved to the device and changed, so that a copy of it would share the graph: copy it before.
        batch_shape: Pairs, height and width of every batch.
        num_flow_updates: Of every pass.
        device: A CUDA GPU.
        autocast: The context in which the prepared model computes.
    """
    eager = model.to(device).forward  # type: ignore[arg-type]  # transformers hides the signature of torch
    batch, height, width = batch_shape
    pixel_values = torch.zeros(batch, 2, 3, height, width, device=device)
    labels, valid = pixel_values[:, 0, :2].clone(), pixel_values[:, 0, 0] == 0
    with torch.cuda.device(device), autocast:
        recorded = _record(_TrainingPass(model, eager, num_flow_updates), (pixel_values, labels, valid))

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not model.training:
            return eager(*args, **kwargs)
        loss, flow = recorded(*args, kwargs["labels"], kwargs["valid"])
        # Copies, as the next replay overwrites both, and the log reads losses later.
        return RaftOutput(loss=loss.clone(), flow=flow.clone())

    model.forward = forward  # type: ignore[method-assign]


class _TrainingPass(nn.Module):
    """A forward pass of tensors to tensors; a module, because gradients are recorded for a module's parameters."""

    def __init__(self, model: RaftForOpticalFlow, eager: Callable[..., RaftOutput], num_flow_updates: int):
        super().__init__()
        self.model, self.eager, self.num_flow_updates = model, eager, num_flow_updates

    def forward(self, pixel_values: Tensor, labels: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        with _fresh_casts():
            output = self.eager(pixel_values, labels=labels, valid=valid, num_flow_updates=self.num_flow_updates)
        return output.loss, output.flow.detach()  # type: ignore[return-value,union-attr]  # with labels, both are there


@contextmanager
def _fresh_casts() -> Iterator[None]:
    """Let autocast remember casts of weights within a pass, but not from one to the next: weights change."""
    before = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(True)
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(before)


def _record(step: _TrainingPass, example: tuple[Tensor, Tensor, Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    device, config, caches = example[0].device, step.model.config, torch.is_autocast_cache_enabled()
    # Passes are run before the recording, which change these.
    buffers, random_state = [buffer.clone() for buffer in step.buffers()], torch.cuda.get_rng_state(device)
    correlation, config.correlation = config.correlation, "dense"  # `auto` asks for free memory, `on_demand` waits
    torch.set_autocast_cache_enabled(False)  # asked for by torch; `_fresh_casts` takes care of it
    try:
        recorded = torch.cuda.make_graphed_callables(step, example)
    finally:
        torch.set_autocast_cache_enabled(caches)
        config.correlation = correlation
        for buffer, before in zip(step.buffers(), buffers, strict=True):
            buffer.copy_(before)
        torch.cuda.set_rng_state(random_state, device)
    return recorded  # type: ignore[return-value]
