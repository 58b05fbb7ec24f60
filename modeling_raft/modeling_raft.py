"""RAFT: recurrent all-pairs field transforms for optical flow (Teed & Deng 2020).

Features of both frames are correlated once, all pairs of pixels; a recurrent unit then reads the correlations around
the current flow and changes the flow, again and again. All of this happens on a grid of 1/8 of the image.

Shapes: `B` batch, `H W` image, `h w` 1/8 grid, `L` correlation levels, `K` correlations in a lookup's window.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, initialization
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from .configuration_raft import RaftConfig
from .correlation_raft import CorrelationPyramid, pixel_grid
from .loss_raft import sequence_loss

if TYPE_CHECKING:  # imports nothing; but save_pretrained, which copies the files that this one imports, takes it along
    from .pipeline_raft import OpticalFlowPipeline  # noqa: F401

GRID = 8  # image pixels per pixel of the grid on which flow is estimated
FLOAT16_MAX = torch.finfo(torch.float16).max  # 65504


@dataclass
class RaftOutput(ModelOutput):
    """What `RaftForOpticalFlow` returns. Flow is (x right, y down) in pixels of its own grid, from frame 1 to frame 2.

    Args:
        loss: scalar, the sequence loss; given with labels.
        flow: `(B, 2, H, W)`, the last prediction.
        low_res_flow: `(B, 2, h, w)`, the same before upsampling, in grid pixels: the next pair's `initial_flow`.
        flow_predictions: one `(B, 2, H, W)` for each update, when asked for.
    """

    loss: Tensor | None = None
    flow: Tensor | None = None
    low_res_flow: Tensor | None = None
    flow_predictions: tuple[Tensor, ...] | None = None


class EncoderConv(nn.Conv2d):
    """A convolution of the encoders: a name of its own, since it starts from other weights than the others."""


def conv_norm(in_channels: int, out_channels: int, kernel_size: int, stride: int, norm: str) -> nn.Sequential:
    """A convolution that keeps the size (but for its stride), and its normalisation (neither has an activation)."""
    norms: dict[str, type[nn.Module]] = {"batch": nn.BatchNorm2d, "instance": nn.InstanceNorm2d, "none": nn.Identity}
    conv = EncoderConv(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2)
    return nn.Sequential(OrderedDict(conv=conv, norm=norms[norm](out_channels)))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, or as a bottleneck 1x1, 3x3 and 1x1 ones, beside a shortcut."""

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
            out = F.relu(layer(out))
        return F.relu(self.shortcut(x) + out)


class Encoder(nn.Module):
    """Image to features at 1/8 of its size (paper section 3.1): `(B, 3, H, W)` to `(B, out_channels, h, w)`."""

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
        x = F.relu(self.stem(images))
        for stage in self.stages:
            x = stage(x)
        return self.dropout(self.projection(x))


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
    return F.relu(x)


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

    def prepare(self, context: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What all updates of a pair share.

        Args:
            context: `(B, context_dim, h, w)`.

        Returns:
            The context's part of both gates `(B, 2 * hidden_dim, h, w)`, and the weights for hidden state and motion
            that go with it; the context's part of the candidate `(B, hidden_dim, h, w)`, and its weights.
        """
        return *self._split(context, self.update_gate, self.reset_gate), *self._split(context, self.candidate)

    def _split(self, context: Tensor, *convs: GateConv) -> tuple[Tensor, Tensor]:
        """Several convolutions of the same input as one: the context's part of it, and the weights of the rest."""
        weight, bias = (torch.cat(tensors) for tensors in zip(*(conv() for conv in convs), strict=True))
        of_hidden, of_context, of_motion = weight.split(self.channels, dim=1)
        part = F.conv2d(context.to(weight.device), of_context, bias, padding=convs[0].padding)
        # Autocast would cast it in every update: it remembers that for parameters only.
        return part, torch.cat([of_hidden, of_motion], dim=1).to(part.dtype)

    def forward(
        self,
        hidden: Tensor,
        motion: Tensor,
        gates_part: Tensor,
        gates_weight: Tensor,
        candidate_part: Tensor,
        candidate_weight: Tensor,
    ) -> Tensor:
        """`hidden` and `motion` are `(B, ., h, w)`; the rest is as `prepare` returns it. Returns the new `hidden`."""
        padding = self.candidate.padding
        gates = gates_part + F.conv2d(torch.cat([hidden, motion], dim=1), gates_weight, padding=padding)
        update, reset = torch.sigmoid(gates).chunk(2, dim=1)
        reset_and_motion = torch.cat([reset * hidden, motion], dim=1)
        candidate = torch.tanh(candidate_part + F.conv2d(reset_and_motion, candidate_weight, padding=padding))
        return (1 - update) * hidden + update * candidate


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
            nn.ReLU(),
            nn.Conv2d(config.flow_head_dim, 2, 3, padding=1),
        )

    def prepare(self, context: Tensor) -> list[Tensor]:
        """What all updates of a pair share of its context `(B, context_dim, h, w)`: four tensors for each GRU."""
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
        motion = self.motion_encoder(cast_saturating(corr, hidden.dtype), cast_saturating(flow, hidden.dtype))
        for i, gru in enumerate(self.grus):
            hidden = gru(hidden, motion, *shared[4 * i : 4 * i + 4])
        return hidden, self.flow_head(hidden)


class ConvexUpsampler(GradientCheckpointingLayer):
    """Every full-resolution flow is a convex combination of the 3x3 grid flows around it (paper section 3.3)."""

    def __init__(self, config: RaftConfig):
        super().__init__()
        self.mask_head = nn.Sequential(
            nn.Conv2d(config.hidden_dim, 256, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 9 * GRID * GRID, 1),
        )

    def forward(self, hidden: Tensor, flow: Tensor) -> Tensor:
        """`hidden` `(B, hidden_dim, h, w)` and `flow` `(B, 2, h, w)` to `(B, 2, H, W)`."""
        batch, _, height, width = flow.shape
        # A factor of 0.25 balances the gradients of the mask; the weights of published models count on it.
        mask = 0.25 * self.mask_head(hidden)
        mask = mask.reshape(batch, 1, 9, GRID, GRID, height, width).to(flow.dtype).softmax(dim=2)
        neighbours = F.unfold(GRID * flow, kernel_size=3, padding=1).reshape(batch, 2, 9, 1, 1, height, width)
        upsampled = (mask * neighbours).sum(dim=2)  # (B, 2, GRID, GRID, h, w)
        return upsampled.permute(0, 1, 4, 2, 5, 3).reshape(batch, 2, GRID * height, GRID * width)


class BilinearUpsampler(nn.Module):
    """Flow of the small model at full resolution, by interpolation."""

    def forward(self, hidden: Tensor, flow: Tensor) -> Tensor:
        """`flow` `(B, 2, h, w)` to `(B, 2, H, W)`; `hidden` is what the convex upsampler looks at."""
        return GRID * F.interpolate(flow, scale_factor=GRID, mode="bilinear", align_corners=True)


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
        self.train(self.training)  # a new model trains: freeze what the configuration wants frozen

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
        """As in transformers, but never from a pickle, such as pytorch_model.bin: reading one can run code.

        Raises:
            ValueError: `use_safetensors=False`.
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

    def train(self, mode: bool = True) -> "RaftForOpticalFlow":
        """As in torch, but BatchNorm stays frozen where `config.freeze_batch_norm` says so."""
        super().train(mode)
        if self.config.freeze_batch_norm:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        valid: Tensor | None = None,
        num_flow_updates: int | None = None,
        initial_flow: Tensor | None = None,
        output_flow_predictions: bool = False,
        return_dict: bool | None = None,
    ) -> RaftOutput | tuple:
        """Estimate flow from frame 1 to frame 2.

        Args:
            pixel_values: `(B, 2, 3, H, W)` in [-1, 1], RGB; H and W are multiples of 8, and at least
                `config.min_image_size`, 64 with 4 correlation levels.
            labels: `(B, 2, H, W)`, true flow in pixels; gives a loss.
            valid: `(B, H, W)` bool, where labels are known (None: everywhere).
            num_flow_updates: Updates of the flow; None: as the configuration says.
            initial_flow: `(B, 2, h, w)` in grid pixels, to start from instead of zero (warm start).
            output_flow_predictions: Return the prediction of every update.
            return_dict: False gives a tuple of what is not None, in the order of `RaftOutput`.

        Returns:
            `RaftOutput`; its flow and loss are float32 at least, under autocast and with weights in half precision
            (`from_pretrained(..., dtype=torch.float16)`) too: coordinates, correlation, upsampling and loss are
            computed in float32. Whatever the precision, `pixel_values` may be float32.

        Raises:
            ValueError: A tensor's size does not fit; the message has the expected and the received one.
        """
        num_flow_updates = self.config.num_flow_updates if num_flow_updates is None else num_flow_updates
        self._check_inputs(pixel_values, labels, valid, num_flow_updates, initial_flow)
        if return_dict is None:
            return_dict = self.config.return_dict

        # One pass for both frames is faster; instance norm keeps them apart.
        features = self.encode_features(pixel_values.transpose(0, 1).flatten(0, 1))
        features1, features2 = features.unflatten(0, (2, -1)).unbind()
        hidden, context = self.encode_context(pixel_values[:, 0])
        keep_all = labels is not None or output_flow_predictions
        flow, flow_predictions = self.estimate(
            features1, features2, hidden, context, num_flow_updates, initial_flow, keep_all
        )

        loss = None
        if labels is not None:
            config = self.config
            loss = sequence_loss(flow_predictions, labels, valid, config.loss_gamma, config.loss_max_flow)
        output = RaftOutput(
            loss=loss,
            flow=flow_predictions[-1],
            low_res_flow=flow,
            flow_predictions=tuple(flow_predictions) if output_flow_predictions else None,
        )
        return output if return_dict else output.to_tuple()

    def encode_features(self, images: Tensor) -> Tensor:
        """What is matched between frames: `(B, 3, H, W)` in [-1, 1] to `(B, feature_dim, h, w)`."""
        return self.feature_encoder(images.to(self.dtype))

    def encode_context(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What updates know of frame 1: `(B, 3, H, W)` to the first hidden state and the context, `(B, ., h, w)`."""
        dims = [self.config.hidden_dim, self.config.context_dim]
        hidden, context = self.context_encoder(images.to(self.dtype)).split(dims, dim=1)
        return torch.tanh(hidden), torch.relu(context)

    def estimate(
        self,
        features1: Tensor,
        features2: Tensor,
        hidden: Tensor,
        context: Tensor,
        num_flow_updates: int,
        initial_flow: Tensor | None = None,
        keep_all: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """Flow from the encodings of two frames, for those who keep encodings from one pair to the next.

        Args:
            features1: of frame 1, `encode_features`.
            features2: of frame 2.
            hidden, context: of frame 1, `encode_context`.
            num_flow_updates: at least 1.
            initial_flow: `(B, 2, h, w)` in grid pixels; None: zero.
            keep_all: upsample the flow of every update, not of the last one only.

        Returns:
            The last flow `(B, 2, h, w)` in grid pixels, and upsampled ones `(B, 2, H, W)` in pixels.
        """
        corr = CorrelationPyramid(features1, features2, self.config.corr_levels, self.config.corr_radius)
        batch, _, height, width = hidden.shape
        # Coordinates need float32: neighbouring pixels of a wide image are one number in half precision.
        dtype = torch.promote_types(self.dtype, torch.float32)
        # What no module holds is where the correlations are: device_map="auto" spreads modules over several devices.
        grid = pixel_grid(batch, height, width, dtype, features1.device)
        flow = torch.zeros_like(grid) if initial_flow is None else initial_flow.to(grid)
        shared = self.update_block.prepare(context)
        flow_predictions = []
        for i in range(num_flow_updates):
            flow = flow.detach()  # no gradient flows through the coordinates, as in the published training
            hidden, delta_flow = self.update_block(hidden, corr.lookup(grid + flow), flow, *shared)
            flow = flow + delta_flow.to(flow)
            if keep_all or i == num_flow_updates - 1:
                flow_predictions.append(self.upsampler(hidden, flow))
        return flow, flow_predictions

    def _check_inputs(
        self,
        pixel_values: Tensor,
        labels: Tensor | None,
        valid: Tensor | None,
        num_flow_updates: int,
        initial_flow: Tensor | None,
    ) -> None:
        if pixel_values.ndim != 5 or pixel_values.shape[1:3] != (2, 3):
            raise ValueError(f"pixel_values must be (batch, 2, 3, height, width); got {tuple(pixel_values.shape)}")
        if not pixel_values.is_floating_point():
            raise ValueError(f"pixel_values must be floating point in [-1, 1]; got {pixel_values.dtype}")
        batch, _, _, height, width = pixel_values.shape
        if height % GRID or width % GRID:
            raise ValueError(
                f"height and width of pixel_values must be multiples of {GRID}; got {height} x {width}. "
                "RaftImageProcessor pads images and takes the padding off the flow."
            )
        smallest, levels = self.config.min_image_size, self.config.corr_levels
        if min(height, width) < smallest:
            raise ValueError(
                f"height and width of pixel_values must be at least {smallest} with {levels} correlation levels, "
                f"so that none is empty; got {height} x {width}"
            )
        if num_flow_updates < 1:
            raise ValueError(f"num_flow_updates must be at least 1; got {num_flow_updates}")
        if valid is not None and labels is None:
            raise ValueError("valid says where labels are known, but labels are missing")
        expected = {
            "labels": (labels, (batch, 2, height, width)),
            "valid": (valid, (batch, height, width)),
            "initial_flow": (initial_flow, (batch, 2, height // GRID, width // GRID)),
        }
        for name, (tensor, shape) in expected.items():
            if tensor is not None and tensor.shape != shape:
                raise ValueError(f"{name} must be {shape}; got {tuple(tensor.shape)}")
