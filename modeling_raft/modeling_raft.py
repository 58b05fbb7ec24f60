"""RAFT: recurrent all-pairs field transforms for optical flow (Teed & Deng 2020, arXiv 2003.12039).

In the order of the paper: both frames are encoded (section 3.1), all pairs of their features are correlated (section
3.2, `correlation_raft.py`), and a recurrent unit updates the flow repeatedly from the correlations around it (section
3.3). Each flow is upsampled from 1/8 of the resolution (also 3.3) and supervised (section 3.4, `loss_raft.py`).

Shapes: `B` batch, `H W` image, `h w` 1/8 grid, `L` correlation levels, `K` correlations in a lookup's window.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, initialization
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from .configuration_raft import DOWNSAMPLE_FACTOR, RaftConfig
from .correlation_raft import make_correlation, pixel_grid
from .kernels_raft import (
    cast_saturating,
    instance_norm,
    match_memory_format,
    relu_saturating,
    strided_conv2d,
    to_fast_memory_format,
    to_update_memory_format,
)
from .loss_raft import SequenceLoss

if TYPE_CHECKING:  # never imported here, but save_pretrained copies every file that is imported like this one
    from .pipeline_raft import OpticalFlowPipeline  # noqa: F401

# Maps a prediction's index, first update first, and the prediction `(B, 2, H, W)` in pixels to its scalar loss term.
PredictionLoss = Callable[[int, Tensor], Tensor]


@dataclass
class RaftOutput(ModelOutput):
    """Output of `RaftForOpticalFlow`. Flow is (x right, y down) in pixels of its own grid, from frame 1 to frame 2.

    Args:
        loss: Scalar, the sum of the losses of all predictions; None without `labels` and `prediction_loss`.
        flow: `(B, 2, H, W)`, the last prediction, in pixels.
        low_res_flow: `(B, 2, h, w)`, the last prediction before upsampling, in grid pixels. It can be the
            `initial_flow` of the next pair of a video.
        flow_predictions: `(B, 2, H, W)` for each update, in pixels; None unless requested.
    """

    loss: Tensor | None = None
    flow: Tensor | None = None
    low_res_flow: Tensor | None = None
    flow_predictions: tuple[Tensor, ...] | None = None


# ---- Section 3.1: feature and context extraction ----


class EncoderConv(nn.Conv2d):
    """Convolution of the encoders, a class of its own because it is initialized differently from the others."""

    def forward(self, x: Tensor) -> Tensor:
        return strided_conv2d(x, self.weight, self.bias, self.stride, self.padding)  # type: ignore[arg-type]


class InstanceNorm(nn.InstanceNorm2d):
    """Instance normalization without affine weights, by the fastest kernel that is exact enough."""

    def forward(self, x: Tensor) -> Tensor:
        return instance_norm(x, self.eps)


NORMS: dict[str, type[nn.Module]] = {"batch": nn.BatchNorm2d, "instance": InstanceNorm, "none": nn.Identity}


def conv_norm(in_channels: int, out_channels: int, kernel_size: int, stride: int, norm: str) -> nn.Sequential:
    """Make a padded convolution followed by a normalization of the kind `norm`, without an activation."""
    conv = EncoderConv(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2)
    return nn.Sequential(OrderedDict(conv=conv, norm=NORMS[norm](out_channels)))


class ResidualBlock(nn.Module):
    """Residual block of two 3x3 convolutions, or as a bottleneck of a 1x1, a 3x3 and a 1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: str, bottleneck: bool):
        super().__init__()
        if bottleneck:
            inner = out_channels // 4
            self.layers = nn.ModuleList(
                [
                    conv_norm(in_channels, inner, 1, 1, norm),
                    conv_norm(inner, inner, 3, stride, norm),
                    conv_norm(inner, out_channels, 1, 1, norm),
                ]
            )
        else:
            self.layers = nn.ModuleList(
                [
                    conv_norm(in_channels, out_channels, 3, stride, norm),
                    conv_norm(out_channels, out_channels, 3, 1, norm),
                ]
            )
        self.shortcut = nn.Identity() if stride == 1 else conv_norm(in_channels, out_channels, 1, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for layer in self.layers:
            out = F.relu(layer(out), inplace=True)
        return F.relu(self.shortcut(x) + out, inplace=True)


class Encoder(nn.Module):
    """Encode an image at 1/8 of its resolution (paper section 3.1): `(B, 3, H, W)` to `(B, out_channels, h, w)`."""

    gradient_checkpointing = False  # transformers sets this attribute and the next one
    _gradient_checkpointing_func: Callable[..., Tensor]

    def __init__(self, config: RaftConfig, out_channels: int, norm: str):
        super().__init__()
        bottleneck = config.encoder_block == "bottleneck"
        stem, *widths = config.encoder_widths
        self.stem = conv_norm(3, stem, 7, 2, norm)
        self.stages = nn.ModuleList()
        for in_width, width, stride in zip([stem, *widths], widths, (1, 2, 2), strict=False):
            first = ResidualBlock(in_width, width, stride, norm, bottleneck)
            self.stages.append(nn.Sequential(first, ResidualBlock(width, width, 1, norm, bottleneck)))
        self.projection = EncoderConv(widths[-1], out_channels, 1)
        self.dropout = nn.Dropout2d(config.dropout)

    def forward(self, images: Tensor) -> Tensor:
        x = to_fast_memory_format(F.relu(self.stem(images), inplace=True))
        # Recomputing a block would count each batch twice in the running statistics of BatchNorm.
        has_running_statistics = any(isinstance(m, nn.BatchNorm2d) and m.training for m in self.modules())
        for stage in self.stages:
            for block in stage:  # type: ignore[attr-defined]
                if self.gradient_checkpointing and self.training and not has_running_statistics:
                    x = self._gradient_checkpointing_func(block.__call__, x)
                else:
                    x = block(x)
        return self.dropout(to_update_memory_format(self.projection(x)))


# ---- Section 3.3: iterative updates ----


class MotionEncoder(nn.Module):
    """Encode correlations and flow as motion features `(B, motion_dim, h, w)`; the last two channels are the flow."""

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
    """Weights of one gate of `ConvGRU`, which computes several gates in one convolution: a call returns them.

    `ConvGRU` must not read them as attributes: only a call runs the hooks that load offloaded weights
    (`from_pretrained(..., device_map=...)`), and torch silently computes with tensors that hold no data.
    """

    def forward(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self.weight, self.bias  # type: ignore[return-value]  # it has a bias


class GRUContext(NamedTuple):
    """The part of a `ConvGRU` that is the same in every update of a pair.

    Attributes:
        gates: `(B, 2 * hidden_dim, h, w)`, what the context and the bias contribute to the update and reset gates.
        candidate: `(B, hidden_dim, h, w)`, what they contribute to the candidate state.
        motion_weight: Weights that convolve the motion, for both gates and the candidate.
        gates_weight: Weights that convolve the hidden state, for both gates.
        candidate_weight: Weights that convolve the reset hidden state, for the candidate.
    """

    gates: Tensor
    candidate: Tensor
    motion_weight: Tensor
    gates_weight: Tensor
    candidate_weight: Tensor


class ConvGRU(nn.Module):
    """Gated recurrent unit whose products are convolutions (paper section 3.3, equations 3 to 6).

    Its input x is the concatenation of the context and the motion. The context is the same in every update, and a
    convolution is linear, so what the context contributes to each gate is computed once per pair. This saves a third
    of the unit's work in every update.
    """

    def __init__(self, hidden_dim: int, context_dim: int, motion_dim: int, kernel_size: tuple[int, int]):
        super().__init__()
        self.channels = [hidden_dim, context_dim, motion_dim]
        padding = (kernel_size[0] // 2, kernel_size[1] // 2)
        self.update_gate = GateConv(sum(self.channels), hidden_dim, kernel_size, padding=padding)
        self.reset_gate = GateConv(sum(self.channels), hidden_dim, kernel_size, padding=padding)
        self.candidate = GateConv(sum(self.channels), hidden_dim, kernel_size, padding=padding)

    def precompute_context(self, context: Tensor) -> GRUContext:
        """Compute what all updates of a pair share from its context `(B, context_dim, h, w)`."""
        convs = [self.update_gate, self.reset_gate, self.candidate]
        weight, bias = (torch.cat(tensors) for tensors in zip(*(conv() for conv in convs), strict=True))
        hidden_weight, context_weight, motion_weight = weight.split(self.channels, dim=1)
        context_terms = F.conv2d(context.to(weight.device), context_weight, bias, padding=convs[0].padding)
        sizes = [2 * self.channels[0], self.channels[0]]
        # Cast here, since autocast would cast the weights again in every update: it caches casts of parameters only.
        weights = [part.contiguous().to(context_terms.dtype) for part in (motion_weight, *hidden_weight.split(sizes))]
        return GRUContext(*context_terms.split(sizes, dim=1), *weights)

    def forward(self, hidden: Tensor, motion: Tensor, context: GRUContext) -> Tensor:
        """Update the hidden state `(B, hidden_dim, h, w)` from the motion features `(B, motion_dim, h, w)`."""
        conv = partial(F.conv2d, padding=self.candidate.padding)
        hidden_dim = self.channels[0]
        motion_gates, motion_candidate = conv(motion, context.motion_weight).split([2 * hidden_dim, hidden_dim], dim=1)
        # Equations 3 and 4: z = sigmoid(conv([h, x], W_z)) and r = sigmoid(conv([h, x], W_r)).
        gates = conv(hidden, context.gates_weight).add_(context.gates).add_(motion_gates).sigmoid_()
        update, reset = gates.chunk(2, dim=1)
        # Equation 5: candidate = tanh(conv([r * h, x], W_h)).
        candidate = conv(reset * hidden, context.candidate_weight)
        candidate = candidate.add_(context.candidate).add_(motion_candidate).tanh_()
        # Equation 6: h = (1 - z) * h + z * candidate.
        return torch.lerp(hidden, candidate, update)


class UpdateBlock(GradientCheckpointingLayer):
    """Update the recurrent state and predict the change of the flow (paper section 3.3)."""

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

    def precompute_context(self, context: Tensor) -> list[Tensor]:
        """Compute the `GRUContext` of every GRU from the context `(B, context_dim, h, w)`, as one flat list.

        The list is flat because reentrant activation checkpointing differentiates only tensors that are arguments.
        """
        return [tensor for gru in self.grus for tensor in gru.precompute_context(context)]  # type: ignore[operator]

    def forward(self, hidden: Tensor, corr: Tensor, flow: Tensor, *contexts: Tensor) -> tuple[Tensor, Tensor]:
        """Compute one update.

        Args:
            hidden: `(B, hidden_dim, h, w)`.
            corr: `(B, L * K, h, w)`, looked up around `flow`.
            flow: `(B, 2, h, w)`, grid pixels.
            contexts: The list that `precompute_context` returns.

        Returns:
            The new `hidden`, and the change of the flow `(B, 2, h, w)` in grid pixels.
        """
        corr, flow = (cast_saturating(x, hidden.dtype) for x in (corr, flow))
        motion = self.motion_encoder(corr, match_memory_format(flow, hidden))
        for gru, context in zip(self.grus, group_contexts(contexts), strict=True):
            hidden = gru(hidden, motion, context)
        return hidden, self.flow_head(hidden)


def group_contexts(tensors: Sequence[Tensor]) -> list[GRUContext]:
    """Group the flat list that `UpdateBlock.precompute_context` returns: one `GRUContext` for each GRU."""
    size = len(GRUContext._fields)
    return [GRUContext(*tensors[i : i + size]) for i in range(0, len(tensors), size)]


# ---- Section 3.3: upsampling ----


class ConvexUpsampler(nn.Module):
    """Upsample flow: each vector is a convex combination of the 3x3 grid vectors around it (paper section 3.3)."""

    def __init__(self, config: RaftConfig):
        super().__init__()
        self.mask_head = nn.Sequential(
            nn.Conv2d(config.hidden_dim, 256, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(256, 9 * DOWNSAMPLE_FACTOR**2, 1),
        )

    def forward(self, hidden: Tensor, flow: Tensor) -> Tensor:
        """Upsample `flow` `(B, 2, h, w)`, in grid pixels, to `(B, 2, H, W)` in pixels; see `predict_mask`."""
        return self.upsample(self.predict_mask(hidden), flow)

    def predict_mask(self, hidden: Tensor) -> Tensor:
        """Predict the logits of the combinations from the hidden state `(B, hidden_dim, h, w)`.

        Most of the upsampling's time is spent here, and most of its memory in `upsample`. They are two functions so
        that training can recompute `upsample` alone in the backward pass.

        Returns:
            `(B, 9 * 64, h, w)`: for each of the 9 neighbors, the 8x8 pixels of a grid pixel.
        """
        return self.mask_head(hidden)

    def upsample(self, mask: Tensor, flow: Tensor) -> Tensor:
        """Combine `flow` `(B, 2, h, w)`, in grid pixels, with the logits of `predict_mask` to `(B, 2, H, W)`."""
        batch, _, height, width = flow.shape
        factor = DOWNSAMPLE_FACTOR
        # The factor 0.25 balances the gradients of the mask, as in the original; published weights depend on it.
        mask = (0.25 * mask).reshape(batch, 9, factor * factor, height * width).to(flow.dtype).softmax(dim=1)
        neighbors = F.unfold(factor * flow, kernel_size=3, padding=1).reshape(batch, 2, 9, 1, height * width)
        # x and y one after the other: a product with both at once takes twice the time in the backward pass.
        upsampled = torch.stack([(mask * component).sum(dim=1) for component in neighbors.unbind(1)], dim=1)
        upsampled = upsampled.reshape(batch, 2, factor, factor, height, width)
        return upsampled.permute(0, 1, 4, 2, 5, 3).reshape(batch, 2, factor * height, factor * width)


class BilinearUpsampler(nn.Module):
    """Upsample flow by bilinear interpolation, as the small model does. It has the interface of `ConvexUpsampler`."""

    def forward(self, hidden: Tensor, flow: Tensor) -> Tensor:
        """Upsample `flow` `(B, 2, h, w)`, in grid pixels, to `(B, 2, H, W)` in pixels."""
        return self.upsample(self.predict_mask(hidden), flow)

    def predict_mask(self, hidden: Tensor) -> Tensor:
        """Return a placeholder, since interpolation needs no mask."""
        return hidden.new_zeros(())

    def upsample(self, mask: Tensor, flow: Tensor) -> Tensor:
        """Upsample `flow` as `forward` does; `mask` is not used."""
        factor = DOWNSAMPLE_FACTOR
        return factor * F.interpolate(flow, scale_factor=factor, mode="bilinear", align_corners=True)


# ---- The whole model ----


class RaftForOpticalFlow(PreTrainedModel):
    """RAFT (Teed & Deng 2020). `RaftConfig()` gives the large model, `RaftConfig.small()` the small one."""

    config: RaftConfig
    config_class = RaftConfig
    base_model_prefix = "raft"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _no_split_modules = ["Encoder", "UpdateBlock", "ConvexUpsampler"]

    def __init__(self, config: RaftConfig):
        super().__init__(config)
        self.feature_encoder = Encoder(config, config.feature_dim, config.feature_norm)
        self.context_encoder = Encoder(config, config.hidden_dim + config.context_dim, config.context_norm)
        self.update_block = UpdateBlock(config)
        self.upsampler = ConvexUpsampler(config) if config.convex_upsampling else BilinearUpsampler()
        self.post_init()
        self.train(self.training)  # a new model is in training mode: freeze what the configuration wants frozen

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        valid: Tensor | None = None,
        num_flow_updates: int | None = None,
        initial_flow: Tensor | None = None,
        output_flow_predictions: bool = False,
        return_dict: bool | None = None,
        prediction_loss: PredictionLoss | None = None,
    ) -> RaftOutput | tuple:
        """Estimate flow from frame 1 to frame 2.

        Args:
            pixel_values: `(B, 2, 3, H, W)` in [-1, 1], RGB; H and W are multiples of 8, and at least
                `config.min_image_size`, 64 with 4 correlation levels.
            labels: `(B, 2, H, W)`, ground truth flow in pixels. With it, the loss is the sequence loss (paper section
                3.4), as `config.loss_gamma` and `config.loss_max_flow` define it.
            valid: `(B, H, W)` bool, where labels are known (None: everywhere).
            num_flow_updates: Updates of the flow; None: `config.num_flow_updates`.
            initial_flow: `(B, 2, h, w)` in grid pixels, to start from instead of zero (warm start).
            output_flow_predictions: Whether to return the prediction of every update.
            return_dict: False returns a tuple of what is not None, in the order of `RaftOutput`.
            prediction_loss: A loss other than the sequence loss, such as one that needs no ground truth. It is called
                with the index (0 for the first update) and the flow `(B, 2, H, W)` in pixels of each prediction and
                returns a scalar; the loss is the sum. It must be deterministic: to save memory, it is called again in
                the backward pass for predictions that are not returned. It takes the place of `labels`.

        Returns:
            `RaftOutput`. Its flow and loss are at least float32, also under autocast and with half-precision weights
            (`from_pretrained(..., dtype=torch.float16)`): coordinates, correlation, upsampling and loss are
            computed in float32. In any precision, `pixel_values` may be float32.

        Raises:
            ValueError: An argument does not fit; the message has the expected and the received value.
        """
        num_flow_updates = self.config.num_flow_updates if num_flow_updates is None else num_flow_updates
        self._check_inputs(pixel_values, labels, valid, num_flow_updates, initial_flow, prediction_loss)
        if return_dict is None:
            return_dict = self.config.return_dict
        if labels is not None:
            gamma, max_flow = self.config.loss_gamma, self.config.loss_max_flow
            prediction_loss = SequenceLoss(labels, valid, num_flow_updates, gamma, max_flow)

        # One pass for both frames is faster; instance norm normalizes each image by itself.
        features = self.encode_features(pixel_values.transpose(0, 1).flatten(0, 1))
        features1, features2 = features.unflatten(0, (2, -1)).unbind()
        hidden, context = self.encode_context(pixel_values[:, 0])
        predictions, losses = [], []
        states = self.updates(features1, features2, hidden, context, num_flow_updates, initial_flow)
        for i, (hidden, flow) in enumerate(states):
            if output_flow_predictions or i == num_flow_updates - 1:
                predictions.append(self.upsampler(hidden, flow))
                if prediction_loss is not None:
                    losses.append(prediction_loss(i, predictions[-1]))
            elif prediction_loss is not None:
                losses.append(self._upsample_and_loss(prediction_loss, i, hidden, flow))

        output = RaftOutput(
            loss=torch.stack(losses).sum() if losses else None,
            flow=predictions[-1],
            low_res_flow=flow,
            flow_predictions=tuple(predictions) if output_flow_predictions else None,
        )
        return output if return_dict else output.to_tuple()

    def encode_features(self, images: Tensor) -> Tensor:
        """Compute the features that are correlated: `(B, 3, H, W)` in [-1, 1] to `(B, feature_dim, h, w)`."""
        return self.feature_encoder(images.to(self.dtype))

    def encode_context(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the first hidden state and the context of frame 1: `(B, 3, H, W)` to two of `(B, ., h, w)`."""
        dims = [self.config.hidden_dim, self.config.context_dim]
        hidden, context = self.context_encoder(images.to(self.dtype)).split(dims, dim=1)
        return torch.tanh(hidden), torch.relu(context)

    def updates(
        self,
        features1: Tensor,
        features2: Tensor,
        hidden: Tensor,
        context: Tensor,
        num_flow_updates: int,
        initial_flow: Tensor | None = None,
        correlation: str | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Update the flow of two frames from their encodings, which video callers keep from one pair to the next.

        Args:
            features1: `encode_features` of frame 1.
            features2: `encode_features` of frame 2.
            hidden, context: `encode_context` of frame 1.
            num_flow_updates: At least 1.
            initial_flow: `(B, 2, h, w)` in grid pixels; None: zero.
            correlation: In the place of `config.correlation`; None: as that says.

        Yields:
            After each update, the hidden state `(B, hidden_dim, h, w)` and the flow `(B, 2, h, w)` in grid pixels,
            which `upsampler(hidden, flow)` upsamples to `(B, 2, H, W)` in pixels.
        """
        config = self.config
        kind = config.correlation if correlation is None else correlation
        corr = make_correlation(kind, features1, features2, config.corr_levels, config.corr_radius)
        batch, _, height, width = hidden.shape
        # Coordinates need float32: neighboring pixels of a wide image have the same coordinate in half precision.
        dtype = torch.promote_types(self.dtype, torch.float32)
        # On the device of the correlation, since device_map="auto" may place modules on several devices.
        grid = pixel_grid(batch, height, width, dtype, features1.device)
        flow = torch.zeros_like(grid) if initial_flow is None else initial_flow.to(grid)
        contexts = self.update_block.precompute_context(context)
        for _ in range(num_flow_updates):
            flow = flow.detach()  # no gradient flows through the coordinates, as in the published training
            hidden, delta_flow = self.update_block(hidden, corr.lookup(grid + flow), flow, *contexts)
            flow = flow + delta_flow.to(flow)
            yield hidden, flow

    def _upsample_and_loss(self, prediction_loss: PredictionLoss, i: int, hidden: Tensor, flow: Tensor) -> Tensor:
        """Compute the loss of a prediction that is not returned, keeping little of it for the backward pass.

        The backward pass recomputes the combination of flows and the loss, which take much memory and little time.
        With activation checkpointing, it recomputes the mask as well.
        """

        def loss_of_mask(mask: Tensor, flow: Tensor) -> Tensor:
            return prediction_loss(i, self.upsampler.upsample(mask, flow))

        def loss_of_hidden(hidden: Tensor, flow: Tensor) -> Tensor:
            return prediction_loss(i, self.upsampler(hidden, flow))

        recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        if self.update_block.gradient_checkpointing and self.training:
            return recomputed(loss_of_hidden, hidden, flow)
        return recomputed(loss_of_mask, self.upsampler.predict_mask(hidden), flow)

    def train(self, mode: bool = True) -> "RaftForOpticalFlow":
        """Set training or eval mode, keeping BatchNorm frozen where `config.freeze_batch_norm` is set."""
        super().train(mode)
        if self.config.freeze_batch_norm:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()  # torch's default
            if isinstance(module, EncoderConv):
                initialization.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a model as transformers does, but never from a pickle such as pytorch_model.bin, which can run code.

        Raises:
            ValueError: `use_safetensors` is False.
            OSError: There are no weights in safetensors.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError("use_safetensors must not be False: weights are read from safetensors only")
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs | {"use_safetensors": True})
        except OSError as error:
            if "does not appear to have a file named" in str(error) or "no file named" in str(error):
                raise OSError(
                    f"{pretrained_model_name_or_path} has no weights in safetensors (model.safetensors). Pickled ones "
                    "(pytorch_model.bin) are not read, since that can run code: ask for them to be saved again with "
                    "save_pretrained, or convert a file that you trust."
                ) from error
            raise

    def _check_inputs(
        self,
        pixel_values: Tensor,
        labels: Tensor | None,
        valid: Tensor | None,
        num_flow_updates: int,
        initial_flow: Tensor | None,
        prediction_loss: PredictionLoss | None,
    ) -> None:
        """Raise ValueError where arguments of `forward` do not fit."""
        if pixel_values.ndim != 5 or pixel_values.shape[1:3] != (2, 3):
            raise ValueError(f"pixel_values must be (batch, 2, 3, height, width); got {tuple(pixel_values.shape)}")
        if not pixel_values.is_floating_point():
            raise ValueError(f"pixel_values must be floating point in [-1, 1]; got {pixel_values.dtype}")
        batch, _, _, height, width = pixel_values.shape
        if height % DOWNSAMPLE_FACTOR or width % DOWNSAMPLE_FACTOR:
            raise ValueError(
                f"height and width of pixel_values must be multiples of {DOWNSAMPLE_FACTOR}; got {height} x {width}. "
                "RaftImageProcessor pads images and takes the padding off the flow."
            )
        smallest, levels = self.config.min_image_size, self.config.corr_levels
        if min(height, width) < smallest:
            raise ValueError(
                f"height and width of pixel_values must be at least {smallest} with {levels} correlation levels, "
                f"so that none is empty; got {height} x {width}"
            )
        if not isinstance(num_flow_updates, int) or num_flow_updates < 1:
            raise ValueError(f"num_flow_updates must be at least 1; got {num_flow_updates!r}")
        if labels is not None and prediction_loss is not None:
            raise ValueError("prediction_loss must be None where labels are given; got both")
        if valid is not None and labels is None:
            raise ValueError("valid must be None where labels are missing; got a mask")
        expected = {
            "labels": (labels, (batch, 2, height, width)),
            "valid": (valid, (batch, height, width)),
            "initial_flow": (initial_flow, (batch, 2, height // DOWNSAMPLE_FACTOR, width // DOWNSAMPLE_FACTOR)),
        }
        for name, (tensor, shape) in expected.items():
            if tensor is not None and tensor.shape != shape:
                raise ValueError(f"{name} must be {shape}; got {tuple(tensor.shape)}")
