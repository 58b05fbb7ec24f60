"""Operators that replace torch's where a kernel is slow, wrong or overflows. None of them changes the architecture.

Each function computes what its name says, to rounding, on every device. Timings and bugs are those of torch 2.14 on
x86 CPUs. "Half precision" is bfloat16 and float16. docs/speed.md lists what was measured.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

FLOAT16_MAX = torch.finfo(torch.float16).max  # 65504


def is_half_channels_last(x: Tensor) -> bool:
    """Whether `x` is a half-precision CPU tensor in channels-last order, in which CPU convolutions are fastest."""
    return (
        x.device.type == "cpu"
        and x.element_size() == 2
        and not torch.compiler.is_compiling()
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def to_fast_memory_format(x: Tensor) -> Tensor:
    """Put a half-precision CPU tensor in channels-last order; return any other tensor as it is.

    At half of the image's size, bfloat16 convolutions take 0.5 to 0.6 of the time in that order. float32 stays in the
    usual order, since torch's float32 normalization loses digits in channels-last order.
    """
    if x.device.type == "cpu" and x.element_size() == 2:
        return x.contiguous(memory_format=torch.channels_last)
    return x


def to_update_memory_format(x: Tensor) -> Tensor:
    """Put encoder outputs in the order in which the updates are fastest: channels last only without gradients."""
    if torch.is_grad_enabled() or not is_half_channels_last(x):
        return x.contiguous()
    return x


def match_memory_format(x: Tensor, other: Tensor) -> Tensor:
    """Put `x` in channels-last order where `other` is, so that concatenating both does not reorder `other`."""
    return x.contiguous(memory_format=torch.channels_last) if is_half_channels_last(other) else x


def strided_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """Convolve, avoiding oneDNN's backward pass of strided 1x1 convolutions in half precision, channels last.

    That backward pass can write beyond its tensors (torch 2.14). A strided 1x1 convolution without padding is an
    unstrided one of every stride-th pixel.
    """
    if weight.shape[2:] == (1, 1) and stride != (1, 1) and is_half_channels_last(x):
        return F.conv2d(x[..., :: stride[0], :: stride[1]], weight, bias)
    return F.conv2d(x, weight, bias, stride, padding)


def instance_norm(x: Tensor, eps: float) -> Tensor:
    """Normalize every channel of every image with the fastest CPU kernel that is exact enough.

    Without gradients, group normalization with one channel per group is faster. With gradients, in half precision and
    channels-last order, batch normalization of one image at a time is: the backward pass of bfloat16 group
    normalization ends the process (torch 2.14). Channels last, both kernels lose digits of float32 that half precision
    does not have, so float32 is normalized in the usual order.
    """
    if not x.requires_grad:
        return F.group_norm(x if x.element_size() == 2 else x.contiguous(), x.shape[1], eps=eps)
    if is_half_channels_last(x):
        return torch.cat([F.batch_norm(image, None, None, training=True, eps=eps) for image in x.split(1)])
    return F.instance_norm(x, eps=eps)


def cast_saturating(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast `x` to `dtype`; in float16, values out of range become the largest finite number of the same sign.

    Correlation grows with the square of the features: up to 33 with published weights and 500 with new ones, but out
    of float16's range if features grow tenfold in training. Infinity would become NaN after the next convolution, and
    so would the loss, which no smaller loss scale fixes. A saturated value is harmless, since it only reaches the
    gates of the recurrent unit, which saturate as well. The original code has no such limit and no values near it.
    """
    x = x.to(dtype)
    return F.hardtanh(x, -FLOAT16_MAX, FLOAT16_MAX) if dtype == torch.float16 else x


def relu_saturating(x: Tensor) -> Tensor:
    """Apply ReLU in place; in float16, infinity becomes the largest finite number (see `cast_saturating`)."""
    if x.dtype == torch.float16:
        # In place, the backward pass needs only the result, as that of ReLU does, so this takes no more memory.
        return F.hardtanh(x, 0.0, FLOAT16_MAX, inplace=True)
    return F.relu(x, inplace=True)
