"""The recurrent unit that updates the flow (paper section 3.3).

Shapes: `B` batch, `h w` 1/8 grid, `L` correlation levels, `K` correlations in a lookup's window.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_raft import RaftConfig
from .encoder_raft import is_fast_channels_last

FLOAT16_MAX = torch.finfo(torch.float16).max  # 65504


def cast_saturating(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` as `dtype`, where what float16 cannot hold becomes its largest number, of the same sign, and not infinite.

    Correlation grows with the square of the features: up to 33 with published weights, and to 500 with new ones, but
    out of float16's range if features grow tenfold in training. An infinity would be NaN after the next convolution,
    and so would the loss, which no smaller loss scale mends. A number at the limit is harmless: it only ever reaches
    the recurrent unit's gates, which saturate. The original has no such limit (and no values near it).
    """
    x = x.to(dtype)
    return F.hardtanh(x, -FLOAT16_MAX, FLOAT16_MAX) if dtype == torch.float16 else x


def relu_saturating(x: Tensor) -> Tensor:
    """ReLU in place of `x`, likewise: in float16, infinity becomes the largest number. Other types know no limit."""
    if x.dtype == torch.float16:
        # In place, the backward pass needs the result only, as that of ReLU does: no memory on top.
        return F.hardtanh(x, 0.0, FLOAT16_MAX, inplace=True)
    return F.relu(x, inplace=True)


class MotionEncoder(nn.Module):
    """Correlations and flow to motion features `(B, motion_dim, h, w)`, whose last two channels are the flow."""

    def __init__(self, config: RaftConfig):
        super().__init__()
        window = (2 * config.corr_radius + 1) ** 2
        corr_widths = [config.corr_levels * window, *config.motion_corr_widths]
        self.corr_convs = nn.ModuleList(
            nn.Conv2d(corr_widths[i], corr_widths[i + 1], 1 if i == 0 else 3, padding=0 if i == 0 else 1)
            for i in range(len(corr_widths) - 1)
        )
        flow_width1, flow_width2 = config.motion_flow_widths
        self.flow_convs = nn.ModuleList(
            [nn.Conv2d(2, flow_width1, 7, padding=3), nn.Conv2d(flow_width1, flow_width2, 3, padding=1)]
        )
        self.fusion = nn.Conv2d(corr_widths[-1] + flow_width2, config.motion_dim - 2, 3, padding=1)

    def forward(self, corr: Tensor, flow: Tensor) -> Tensor:
        corr_features, flow_features = corr, flow
        for conv in self.corr_convs:
            corr_features = relu_saturating(conv(corr_features))
        for conv in self.flow_convs:
            flow_features = relu_saturating(conv(flow_features))
        motion = relu_saturating(self.fusion(torch.cat([corr_features, flow_features], dim=1)))
        return torch.cat([motion, flow], dim=1)


class GateConv(nn.Conv2d):
    """A convolution of `ConvGRU`, which takes its weights apart: a call returns them, `(weight, bias)`.

    Only a call runs the hooks that bring offloaded weights (`from_pretrained(..., device_map=...)`); as attributes
    these are tensors without data, with which torch computes anything, and no error.
    """

    def forward(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self.weight, self.bias  # type: ignore[return-value]  # it has a bias


class ConvGRU(nn.Module):
    """A gated recurrent unit whose products are convolutions (paper section 3.3, equations 3 to 6).

    Its input is the context and the motion. The context is the same in every update, and a convolution is linear: the
    context's part of each gate is computed once per pair, which spares a third of the unit's work in every update.
    """

    def __init__(self, hidden_dim: int, context_dim: int, motion_dim: int, kernel_size: tuple[int, int]):
        super().__init__()
        self.channels = [hidden_dim, context_dim, motion_dim]
        padding = (kernel_size[0] // 2, kernel_size[1] // 2)
        self.update_gate = GateConv(sum(self.channels), hidden_dim, kernel_size, padding=padding)
        self.reset_gate = GateConv(sum(self.channels), hidden_dim, kernel_size, padding=padding)
        self.candidate = GateConv(sum(self.channels), hidden_dim, kernel_size, padding=padding)

    def prepare(self, context: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What all updates of a pair share.

        Args:
            context: `(B, context_dim, h, w)`.

        Returns:
            The context's part of both gates `(B, 2 * hidden_dim, h, w)` and of the candidate `(B, hidden_dim, h, w)`;
            weights for the motion of all three, for the hidden state of both gates and for that of the candidate.
        """
        convs = [self.update_gate, self.reset_gate, self.candidate]
        weight, bias = (torch.cat(tensors) for tensors in zip(*(conv() for conv in convs), strict=True))
        of_hidden, of_context, of_motion = weight.split(self.channels, dim=1)
        part = F.conv2d(context.to(weight.device), of_context, bias, padding=convs[0].padding)
        sizes = [2 * self.channels[0], self.channels[0]]
        # Autocast would cast weights in every update: it remembers that for parameters only.
        weights = [part_of.contiguous().to(part.dtype) for part_of in (of_motion, *of_hidden.split(sizes))]
        return *part.split(sizes, dim=1), *weights

    def forward(
        self,
        hidden: Tensor,
        motion: Tensor,
        gates_part: Tensor,
        candidate_part: Tensor,
        motion_weight: Tensor,
        gates_weight: Tensor,
        candidate_weight: Tensor,
    ) -> Tensor:
        """`hidden` and `motion` are `(B, ., h, w)`; the rest is as `prepare` returns it. Returns the new `hidden`."""
        conv = partial(F.conv2d, padding=self.candidate.padding)
        channels = self.channels[0]
        motion_gates, motion_candidate = conv(motion, motion_weight).split([2 * channels, channels], dim=1)
        gates = conv(hidden, gates_weight).add_(gates_part).add_(motion_gates).sigmoid_()
        update, reset = gates.chunk(2, dim=1)
        candidate = conv(reset * hidden, candidate_weight).add_(candidate_part).add_(motion_candidate).tanh_()
        return torch.lerp(hidden, candidate, update)


class UpdateBlock(GradientCheckpointingLayer):
    """One update (paper section 3.3): the new recurrent state, and the change of the flow that it wants."""

    def __init__(self, config: RaftConfig):
        super().__init__()
        self.motion_encoder = MotionEncoder(config)
        self.grus = nn.ModuleList(
            ConvGRU(config.hidden_dim, config.context_dim, config.motion_dim, (height, width))
            for height, width in config.gru_kernels
        )
        self.flow_head = nn.Sequential(
            nn.Conv2d(config.hidden_dim, config.flow_head_dim, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(config.flow_head_dim, 2, 3, padding=1),
        )

    def prepare(self, context: Tensor) -> list[Tensor]:
        """What all updates of a pair share of its context `(B, context_dim, h, w)`: five tensors for each GRU."""
        return [shared for gru in self.grus for shared in gru.prepare(context)]  # type: ignore[operator]

    def forward(self, hidden: Tensor, corr: Tensor, flow: Tensor, *shared: Tensor) -> tuple[Tensor, Tensor]:
        """One update.

        Args:
            hidden: `(B, hidden_dim, h, w)`.
            corr: `(B, L * K, h, w)`, looked up around `flow`.
            flow: `(B, 2, h, w)`, grid pixels.
            shared: As `prepare` returns it; separate tensors, as activation checkpointing wants them.

        Returns:
            The new `hidden`, and the change of the flow `(B, 2, h, w)`, grid pixels.
        """
        corr, flow = (cast_saturating(x, hidden.dtype) for x in (corr, flow))
        if is_fast_channels_last(hidden):  # else the motion, of which flow is a part, would go back to the other order
            flow = flow.contiguous(memory_format=torch.channels_last)
        motion = self.motion_encoder(corr, flow)
        for i, gru in enumerate(self.grus):
            hidden = gru(hidden, motion, *shared[5 * i : 5 * i + 5])
        return hidden, self.flow_head(hidden)
