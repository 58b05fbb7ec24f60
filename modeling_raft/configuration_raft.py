"""Configuration of a RAFT model: its architecture, and the settings of its loss."""

import copy
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

DOWNSAMPLE_FACTOR = 8  # image pixels, per side, for each pixel of the grid on which flow is estimated

# The entry of config.json that names the pipeline (pipeline_raft.py), as Pipeline.save_pretrained writes it.
CUSTOM_PIPELINES: dict[str, dict[str, Any]] = {
    "optical-flow": {"impl": "pipeline_raft.OpticalFlowPipeline", "pt": ["AutoModel"], "type": "image"}
}


@strict
class RaftConfig(PreTrainedConfig):
    """Configuration of `RaftForOpticalFlow`: the large model by default, the small one from `RaftConfig.small()`.

    Both are the published architectures (Teed & Deng 2020, section 3 and its supplement).

    Args:
        feature_dim: Channels of the features that are correlated.
        hidden_dim: Channels of the recurrent state.
        context_dim: Channels of the context that every update reads.
        encoder_block: `"residual"` (two 3x3 convolutions) or `"bottleneck"` (1x1, 3x3, 1x1).
        encoder_widths: Channels of the encoders' stem and of their three stages (strides 1, 2, 2).
        feature_norm: Normalization in the feature encoder: `"instance"`, `"batch"` or `"none"`.
        context_norm: Normalization in the context encoder: the same choices.
        corr_levels: Levels of the correlation pyramid; each halves the resolution of frame 2.
        corr_radius: Radius of the lookup's window, (2 * radius + 1)**2 correlations on every level.
        motion_corr_widths: Channels of the convolutions over the correlations: a 1x1, then 3x3 convolutions.
        motion_flow_widths: Channels of the convolutions over the flow: a 7x7, then a 3x3.
        motion_dim: Channels of the motion features, including the two of the flow itself.
        gru_kernels: (height, width) of the kernel of each convolutional GRU, in the order they run.
        flow_head_dim: Channels inside the head that predicts the flow's change.
        convex_upsampling: Whether to upsample by learned convex combinations (section 3.3) or bilinearly.
        num_flow_updates: Updates of the flow, unless `forward` gets another number.
        loss_gamma: The sequence loss weighs each prediction by this factor less than the next one.
        loss_max_flow: Pixels that move farther than this (px) are left out of the loss.
        dropout: Probability of dropping a whole channel of the encoders' output while training.
        freeze_batch_norm: Keep BatchNorm's running statistics fixed while training. Its affine weights still train.
        correlation: How correlations are computed. `"dense"`: all pairs, once per pair of frames; its memory grows
            with the square of the pixels. `"on_demand"`: in each lookup, only what it reads; the same values to
            rounding, in memory that grows with the pixels. `"auto"`: dense, unless that takes more than half of the
            free memory.
    """

    model_type = "raft"
    attribute_map = {"hidden_size": "hidden_dim"}
    pipeline_is_registered = False  # True in this package, which registers it and needs no copy beside the weights

    feature_dim: int = 256
    hidden_dim: int = 128
    context_dim: int = 128
    encoder_block: str = "residual"
    encoder_widths: list[int] | tuple[int, ...] = (64, 64, 96, 128)
    feature_norm: str = "instance"
    context_norm: str = "batch"
    corr_levels: int = 4
    corr_radius: int = 4
    motion_corr_widths: list[int] | tuple[int, ...] = (256, 192)
    motion_flow_widths: list[int] | tuple[int, ...] = (128, 64)
    motion_dim: int = 128
    gru_kernels: list[list[int]] | tuple[tuple[int, int], ...] = ((1, 5), (5, 1))
    flow_head_dim: int = 256
    convex_upsampling: bool = True
    num_flow_updates: int = 12
    loss_gamma: float | int = 0.8
    loss_max_flow: float | int = 400.0
    dropout: float | int = 0.0
    freeze_batch_norm: bool = False
    correlation: str = "auto"

    @classmethod
    def small(cls, **overrides) -> "RaftConfig":
        """The published small model (990,162 parameters), with `overrides` of any field."""
        small = {
            "feature_dim": 128,
            "hidden_dim": 96,
            "context_dim": 64,
            "encoder_block": "bottleneck",
            "encoder_widths": [32, 32, 64, 96],
            "context_norm": "none",
            "corr_radius": 3,
            "motion_corr_widths": [96],
            "motion_flow_widths": [64, 32],
            "motion_dim": 82,
            "gru_kernels": [[3, 3]],
            "flow_head_dim": 128,
            "convex_upsampling": False,
        }
        return cls(**{**small, **overrides})

    @property
    def min_image_size(self) -> int:
        """Smallest image height and width, in pixels, at which no pyramid level is empty: 64 with 4 levels."""
        return DOWNSAMPLE_FACTOR * 2 ** (self.corr_levels - 1)

    def __post_init__(self, **kwargs):
        # JSON has no tuples: with lists throughout, a configuration equals itself after saving and loading.
        self.encoder_widths = list(self.encoder_widths)
        self.motion_corr_widths = list(self.motion_corr_widths)
        self.motion_flow_widths = list(self.motion_flow_widths)
        self.gru_kernels = [list(kernel) for kernel in self.gru_kernels]
        # Where `pipeline()` finds an entry, it asks for trust_remote_code. It also modifies the entry, hence the copy.
        kwargs["custom_pipelines"] = {} if self.pipeline_is_registered else copy.deepcopy(CUSTOM_PIPELINES)
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as transformers does, always with the entry of the pipeline."""
        return super().to_dict() | {"custom_pipelines": copy.deepcopy(CUSTOM_PIPELINES)}

    def validate_choices(self):
        """Check the fields that name a variant."""
        choices = {
            "encoder_block": ("residual", "bottleneck"),
            "feature_norm": ("instance", "batch", "none"),
            "context_norm": ("instance", "batch", "none"),
            "correlation": ("auto", "dense", "on_demand"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")

    def validate_sizes(self):
        """Check the sizes of the network."""
        for name in ("feature_dim", "hidden_dim", "context_dim", "corr_levels", "flow_head_dim", "num_flow_updates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.corr_radius < 0:
            raise ValueError(f"corr_radius must not be negative; got {self.corr_radius}")
        if self.motion_dim < 3:
            raise ValueError(f"motion_dim must be at least 3, as two channels are the flow; got {self.motion_dim}")
        lengths = {"encoder_widths": 4, "motion_flow_widths": 2}
        for name, length in lengths.items():
            if len(getattr(self, name)) != length:
                raise ValueError(f"{name} must have {length} entries; got {getattr(self, name)}")
        for name in ("encoder_widths", "motion_corr_widths", "motion_flow_widths"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"{name} must hold positive numbers; got {getattr(self, name)}")
        if self.encoder_block == "bottleneck" and any(width % 4 for width in self.encoder_widths[1:]):
            raise ValueError(f"encoder_widths must be divisible by 4 in bottleneck blocks; got {self.encoder_widths}")
        if self.encoder_widths[0] != self.encoder_widths[1]:
            raise ValueError(f"encoder_widths must begin with two equal widths; got {self.encoder_widths}")
        if not self.gru_kernels or any(
            len(kernel) != 2 or not all(k % 2 for k in kernel) for kernel in self.gru_kernels
        ):
            raise ValueError(f"gru_kernels must hold pairs of odd numbers; got {self.gru_kernels}")

    def validate_numbers(self):
        """Check the settings of dropout and loss."""
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1); got {self.dropout}")
        if not self.loss_gamma > 0:
            raise ValueError(f"loss_gamma must be positive; got {self.loss_gamma}")
        if not self.loss_max_flow > 0:
            raise ValueError(f"loss_max_flow must be positive; got {self.loss_max_flow}")
