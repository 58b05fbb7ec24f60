"""What is measured: this project's model and torchvision's, with the same weights, on the same images."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.models.optical_flow import raft_large, raft_small

from modeling_raft.convert_raft_checkpoint import convert_state_dict

GAMMA, MAX_FLOW = 0.8, 400.0


@dataclass(frozen=True)
class Candidate:
    """A way to compute the same flow.

    Attributes:
        library: `ours` or `torchvision`.
        size: `large` or `small`.
        precision: `fp32` or `bf16`, by autocast.
        options: of ours: `checkpointing` recomputes activations; `dense` and `on_demand` say how to correlate,
            instead of as fits the memory.
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

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        return torch.autocast(device.type, torch.bfloat16) if self.precision == "bf16" else contextlib.nullcontext()

    def inference(self, pixel_values: Tensor, num_flow_updates: int) -> Callable[[], Tensor]:
        """A call estimates the flow `(B, 2, H, W)` of pairs `(B, 2, 3, H, W)`."""
        model = self.make_model().eval().to(pixel_values.device)

        @torch.no_grad()
        def run() -> Tensor:
            with self.autocast(pixel_values.device):
                if self.library == "torchvision":
                    return model(pixel_values[:, 0], pixel_values[:, 1], num_flow_updates=num_flow_updates)[-1]
                return model(pixel_values, num_flow_updates=num_flow_updates).flow

        return run

    def training_step(self, pixel_values: Tensor, labels: Tensor, num_flow_updates: int) -> Callable[[], Tensor]:
        """A call runs forward, loss and backward, and returns the loss."""
        model = self.make_model().train().to(pixel_values.device)

        def run() -> Tensor:
            with self.autocast(pixel_values.device):
                if self.library == "torchvision":
                    flows = model(pixel_values[:, 0], pixel_values[:, 1], num_flow_updates=num_flow_updates)
                    loss = usual_loss(flows, labels)
                else:
                    loss = model(pixel_values, labels=labels, num_flow_updates=num_flow_updates).loss
            loss.backward()
            model.zero_grad()
            return loss.detach()

        return run


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
