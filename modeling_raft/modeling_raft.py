"""RAFT: recurrent all-pairs field transforms for optical flow (Teed & Deng 2020).

Features of both frames are correlated once, all pairs of pixels; a recurrent unit then reads the correlations around
the current flow and changes the flow, again and again. All of this happens on a grid of 1/8 of the image.

Shapes: `B` batch, `H W` image, `h w` 1/8 grid, `L` correlation levels, `K` correlations in a lookup's window.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, initialization
from transformers.utils import ModelOutput

from .configuration_raft import RaftConfig
from .correlation_raft import make_correlation, pixel_grid
from .encoder_raft import Encoder, EncoderConv
from .loss_raft import SequenceLossTerms
from .update_block_raft import UpdateBlock

if TYPE_CHECKING:  # imports nothing; but save_pretrained, which copies the files that this one imports, takes it along
    from .pipeline_raft import OpticalFlowPipeline  # noqa: F401

GRID = 8  # image pixels per pixel of the grid on which flow is estimated


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


class ConvexUpsampler(nn.Module):
    """Every full-resolution flow is a convex combination of the 3x3 grid flows around it (paper section 3.3)."""

    def __init__(self, config: RaftConfig):
        super().__init__()
        self.mask_head = nn.Sequential(
            nn.Conv2d(config.hidden_dim, 256, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(256, 9 * GRID * GRID, 1),
        )

    def forward(self, hidden: Tensor, flow: Tensor) -> Tensor:
        """`hidden` `(B, hidden_dim, h, w)` and `flow` `(B, 2, h, w)` to `(B, 2, H, W)`."""
        return self.combine(self.look(hidden), flow)

    def look(self, hidden: Tensor) -> Tensor:
        """Logarithms of the weights, `(B, 9 * GRID * GRID, h, w)`: the expensive half of the work."""
        return self.mask_head(hidden)

    def combine(self, mask: Tensor, flow: Tensor) -> Tensor:
        """The other half."""
        batch, _, height, width = flow.shape
        # A factor of 0.25 balances the gradients of the mask; the weights of published models count on it.
        mask = (0.25 * mask).reshape(batch, 9, GRID * GRID, height * width).to(flow.dtype).softmax(dim=1)
        neighbours = F.unfold(GRID * flow, kernel_size=3, padding=1).reshape(batch, 2, 9, 1, height * width)
        # x and y apart: a product with both at once would take twice the time in the backward pass.
        upsampled = torch.stack([(mask * component).sum(dim=1) for component in neighbours.unbind(1)], dim=1)
        upsampled = upsampled.reshape(batch, 2, GRID, GRID, height, width)
        return upsampled.permute(0, 1, 4, 2, 5, 3).reshape(batch, 2, GRID * height, GRID * width)


class BilinearUpsampler(nn.Module):
    """Flow of the small model at full resolution, by interpolation; its `hidden` is what the convex one looks at."""

    def forward(self, hidden: Tensor, flow: Tensor) -> Tensor:
        """`flow` `(B, 2, h, w)` to `(B, 2, H, W)`."""
        return self.combine(self.look(hidden), flow)

    def look(self, hidden: Tensor) -> Tensor:
        """Nothing to be seen."""
        return hidden.new_zeros(())

    def combine(self, mask: Tensor, flow: Tensor) -> Tensor:
        """As `forward`."""
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
        config, predictions, losses = self.config, [], []
        if labels is not None:
            terms = SequenceLossTerms(labels, valid, num_flow_updates, config.loss_gamma, config.loss_max_flow)
        states = self.updates(features1, features2, hidden, context, num_flow_updates, initial_flow)
        for i, (hidden, flow) in enumerate(states):
            if output_flow_predictions or i == num_flow_updates - 1:
                predictions.append(self.upsampler(hidden, flow))
                if labels is not None:
                    losses.append(terms(i, predictions[-1]))
            elif labels is not None:
                losses.append(self._upsample_and_score(terms, i, hidden, flow))

        output = RaftOutput(
            loss=torch.stack(losses).sum() if losses else None,
            flow=predictions[-1],
            low_res_flow=flow,
            flow_predictions=tuple(predictions) if output_flow_predictions else None,
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

    def updates(
        self,
        features1: Tensor,
        features2: Tensor,
        hidden: Tensor,
        context: Tensor,
        num_flow_updates: int,
        initial_flow: Tensor | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Update the flow of two frames from their encodings, which some keep from one pair to the next.

        Args:
            features1: of frame 1, `encode_features`.
            features2: of frame 2.
            hidden, context: of frame 1, `encode_context`.
            num_flow_updates: at least 1.
            initial_flow: `(B, 2, h, w)` in grid pixels; None: zero.

        Yields:
            After each update, the hidden state `(B, hidden_dim, h, w)` and the flow `(B, 2, h, w)` in grid pixels,
            of which `upsampler(hidden, flow)` makes `(B, 2, H, W)` in pixels.
        """
        config = self.config
        corr = make_correlation(config.correlation, features1, features2, config.corr_levels, config.corr_radius)
        batch, _, height, width = hidden.shape
        # Coordinates need float32: neighbouring pixels of a wide image are one number in half precision.
        dtype = torch.promote_types(self.dtype, torch.float32)
        # What no module holds is where the correlations are: device_map="auto" spreads modules over several devices.
        grid = pixel_grid(batch, height, width, dtype, features1.device)
        flow = torch.zeros_like(grid) if initial_flow is None else initial_flow.to(grid)
        shared = self.update_block.prepare(context)
        for _ in range(num_flow_updates):
            flow = flow.detach()  # no gradient flows through the coordinates, as in the published training
            hidden, delta_flow = self.update_block(hidden, corr.lookup(grid + flow), flow, *shared)
            flow = flow + delta_flow.to(flow)
            yield hidden, flow

    def _upsample_and_score(self, terms: SequenceLossTerms, i: int, hidden: Tensor, flow: Tensor) -> Tensor:
        """The loss of a prediction that nobody asked for, of which little is kept for the backward pass.

        What needs much memory and little time is computed again there: the combination of flows and the loss. With
        activation checkpointing, all is.
        """

        def score(mask: Tensor, flow: Tensor) -> Tensor:
            return terms(i, self.upsampler.combine(mask, flow))

        def look_and_score(hidden: Tensor, flow: Tensor) -> Tensor:
            return terms(i, self.upsampler(hidden, flow))

        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        if self.update_block.gradient_checkpointing and self.training:
            return again(look_and_score, hidden, flow)
        return again(score, self.upsampler.look(hidden), flow)

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
        if not isinstance(num_flow_updates, int) or num_flow_updates < 1:
            raise ValueError(f"num_flow_updates must be at least 1; got {num_flow_updates!r}")  # and a whole number
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
