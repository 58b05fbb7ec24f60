"""The encoders of features and of context (paper section 3.1), and what they are built from."""

from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_raft import RaftConfig


class EncoderConv(nn.Conv2d):
    """A convolution of the encoders: a name of its own, since it starts from other weights than the others."""

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel_size == (1, 1) and self.stride != (1, 1) and is_fast_channels_last(x):
            # oneDNN's backward pass of strided ones can write beyond its tensors there (torch 2.14).
            height_step, width_step = self.stride
            return F.conv2d(x[..., ::height_step, ::width_step], self.weight, self.bias)
        return super().forward(x)


class InstanceNorm(nn.InstanceNorm2d):
    """As torch's, by the fastest kernel for CPUs that is exact enough.

    Without gradients, that is group normalisation of single channels. With them, in half precision channels last, it
    is batch normalisation of one image after the other (the backward pass of bfloat16's group normalisation ends the
    process: torch 2.14). Channels last, both lose digits of float32, which half precision does not have.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not x.requires_grad:
            return F.group_norm(x if x.element_size() == 2 else x.contiguous(), self.num_features, eps=self.eps)
        if is_fast_channels_last(x):
            return torch.cat([F.batch_norm(image, None, None, training=True, eps=self.eps) for image in x.split(1)])
        return super().forward(x)


def is_fast_channels_last(x: Tensor) -> bool:
    """Whether it is of half precision, on a CPU, and in the order in which convolutions are fastest there."""
    return (
        x.device.type == "cpu"
        and x.element_size() == 2
        and not torch.compiler.is_compiling()
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def conv_norm(in_channels: int, out_channels: int, kernel_size: int, stride: int, norm: str) -> nn.Sequential:
    """A convolution that keeps the size (but for its stride), and its normalisation (neither has an activation)."""
    norms: dict[str, type[nn.Module]] = {"batch": nn.BatchNorm2d, "instance": InstanceNorm, "none": nn.Identity}
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
            out = F.relu(layer(out), inplace=True)
        return F.relu(self.shortcut(x) + out, inplace=True)


class Encoder(nn.Module):
    """Image to features at 1/8 of its size (paper section 3.1): `(B, 3, H, W)` to `(B, out_channels, h, w)`."""

    gradient_checkpointing = False  # transformers sets it, and the function that goes with it
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
        x = F.relu(self.stem(images), inplace=True)
        if x.device.type == "cpu" and x.element_size() == 2:
            # At half of the image's size, convolutions of bfloat16 take 0.5 to 0.6 of the time so.
            x = x.contiguous(memory_format=torch.channels_last)
        # A block that is computed again would count each batch twice in BatchNorm's statistics.
        counting = any(isinstance(module, nn.BatchNorm2d) and module.training for module in self.modules())
        for stage in self.stages:
            for block in stage:  # type: ignore[attr-defined]
                if self.gradient_checkpointing and self.training and not counting:
                    x = self._gradient_checkpointing_func(block.__call__, x)
                else:
                    x = block(x)
        features = self.projection(x)
        if torch.is_grad_enabled() or not is_fast_channels_last(features):
            features = features.contiguous()  # updates that keep gradients are no faster channels last
        return self.dropout(features)
