"""What is measured: this project's model and torchvision's, with the same weights, on the same images."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.models.optical_flow import raft_large, raft_small

from benchmarks.cuda_graph import capture
from flow_training.cuda_graphs import record_training
from modeling_raft.convert_raft_checkpoint import convert_state_dict

GAMMA, MAX_FLOW = 0.8, 400.0
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Candidate:
    """A way to compute the same flow.

    Attributes:
        library: `ours` or `torchvision`.
        size: `large` or `small`.
        precision: `fp32`; `tf32`, which GPUs may multiply float32 in; `fp16` or `bf16`, by autocast.
        options: of ours: `checkpointing` recomputes activations; `dense` and `on_demand` say how to correlate,
            instead of as fits the memory; `compiled` is by torch.compile; `graph` replays a CUDA graph.
    """

    library: str
    size: str = "large"
    precision: str = "fp32"
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return " ".join([self.library, self.size, self.precision, *self.options])

    def make_model(self) -> torch.nn.Module:
        """The model with random weights, the same for every candidate of a size."""
        torch.manual_seed(0)
        peer = (raft_large if self.size == "large" else raft_small)()
        if self.library == "torchvision":
            return peer
        model = convert_state_dict(peer.state_dict())
        for correlation in ("dense", "on_demand"):
            if correlation in self.options:
                model.config.correlation = correlation
        if "checkpointing" in self.options:
            model.activation_checkpointing_enable()
        return model

    def inference(self, pixel_values: Tensor, num_flow_updates: int) -> Callable[[], Tensor]:
        """A call estimates the flow `(B, 2, H, W)` of pairs `(B, 2, 3, H, W)`."""
        device = pixel_values.device
        model = self.compile(self.make_model().eval().to(device))

        @torch.no_grad()
        def run() -> Tensor:
            with in_precision(self.precision, device):
                if self.library == "torchvision":
                    return model(pixel_values[:, 0], pixel_values[:, 1], num_flow_updates=num_flow_updates)[-1]
                return model(pixel_values, num_flow_updates=num_flow_updates).flow

        return capture(run) if "graph" in self.options else run

    def compile(self, model: torch.nn.Module) -> Any:
        """The model, compiled where the options say so; on a CPU without the code generator, which takes minutes."""
        if "compiled" not in self.options:
            return model
        on_cpu = next(model.parameters()).device.type == "cpu"
        return torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager" if on_cpu else "inductor")

    def training_step(self, pixel_values: Tensor, labels: Tensor, num_flow_updates: int) -> Callable[[], Tensor]:
        """A call runs forward, loss and backward, and returns the loss."""
        device = pixel_values.device
        model = self.compile(self.make_model().train().to(device))
        if "graph" in self.options:
            batch, height, width = labels.shape[0], *labels.shape[2:]
            in_autocast = in_precision(self.precision, device)
            record_training(model, (batch, height, width), num_flow_updates, device, in_autocast)

        valid = torch.ones_like(labels[:, 0], dtype=torch.bool)

        def run() -> Tensor:
            with in_precision(self.precision, device):
                if self.library == "torchvision":
                    flows = model(pixel_values[:, 0], pixel_values[:, 1], num_flow_updates=num_flow_updates)
                    loss = usual_loss(flows, labels)
                else:
                    loss = model(pixel_values, labels=labels, valid=valid, num_flow_updates=num_flow_updates).loss
            loss.backward()
            model.zero_grad()
            return loss.detach()

        return run


@contextlib.contextmanager
def in_precision(precision: str, device: torch.device) -> Iterator[None]:
    """A context in which a candidate of that precision computes."""
    backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = precision == "tf32"
    try:
        with torch.autocast(device.type, HALVES.get(precision), enabled=precision in HALVES):
            yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


def usual_loss(flows: list[Tensor], labels: Tensor) -> Tensor:
    """The sequence loss as torchvision's reference script for training has it."""
    valid = (labels.square().sum(dim=1).sqrt() < MAX_FLOW)[:, None]
    stacked = torch.stack(flows)
    errors = (stacked - labels).abs() * valid
    weights = GAMMA ** torch.arange(len(flows) - 1, -1, -1, device=labels.device)
    return (errors.mean(dim=(1, 2, 3, 4)) * weights).sum()


def make_pairs(batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Smooth random images that move by a few pixels, `(B, 2, 3, H, W)` in [-1, 1], and flow `(B, 2, H, W)`."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(batch, 3, height // 8 + 2, width // 8 + 2, generator=generator)
    frame = torch.nn.functional.interpolate(coarse, size=(height + 8, width + 8), mode="bicubic").clamp(-1, 1)
    pairs = torch.stack([frame[..., :height, :width], frame[..., 3 : height + 3, 5 : width + 5]], dim=1)
    labels = torch.tensor([-5.0, -3.0])[:, None, None].expand(batch, 2, height, width)
    return pairs.contiguous(), labels.contiguous()
