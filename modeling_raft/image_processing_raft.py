"""Convert pairs of images to the model's input, and its output to flow at the size of the images."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_backends import TorchvisionBackend
from transformers.processing_utils import ImagesKwargs, Unpack

from .configuration_raft import DOWNSAMPLE_FACTOR
from .frames_raft import KINDS, read_frames


class RaftImageProcessorKwargs(ImagesKwargs, total=False):
    """
    height_padding (`str`, *optional*, defaults to `self.height_padding`):
        `"split"`: half of the padding above the image and half below, as published for Sintel; `"bottom"`: all of it
        below, as for KITTI. The width's padding is always split.
    min_size (`int`, *optional*, defaults to `self.min_size`):
        Images are padded to at least this height and width, in pixels.
    intensity_range (`tuple[float, float]`, *optional*):
        Intensities that become black and white, for frames of any depth. By default 0 to 255 for 8-bit frames, and
        the smallest and the largest value of a pair for 16-bit frames.
    """

    height_padding: str
    min_size: int
    intensity_range: Any


class RaftImageProcessor(TorchvisionBackend):
    """Pairs of images to `pixel_values`: RGB, [-1, 1], edges repeated until both sides are multiples of 8.

    The padding is that of princeton-vl/RAFT (`InputPadder` of core/utils/utils.py).
    """

    valid_kwargs = RaftImageProcessorKwargs
    model_input_names = ["pixel_values"]
    do_convert_rgb = True
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    do_pad = True
    height_padding = "split"
    min_size = 64  # the smallest that a model with 4 correlation levels takes
    intensity_range = None

    def __init__(self, **kwargs: Unpack[RaftImageProcessorKwargs]):
        super().__init__(**kwargs)  # type: ignore[misc]  # the base class is annotated with its own options only
        _check_height_padding(self.height_padding)

    def preprocess(self, images: Any, **kwargs: Unpack[RaftImageProcessorKwargs]) -> BatchFeature:
        """Prepare one or several pairs.

        Args:
            images: `[frame1, frame2]`, or a list of such pairs. A frame is a path, a URL, the bytes of an image file,
                a PIL image, or an array or tensor `(H, W, 3)`, `(3, H, W)` or `(H, W)`. Arrays `(2, ...)` and
                `(B, 2, ...)` of frames work too. Gray frames become RGB, transparency is dropped, images with an EXIF
                orientation are turned upright; `frames_raft.py` describes how depths other than 8 bits are scaled.
            kwargs: Options that differ from the processor's own, and `return_tensors="pt"`. `do_rescale=False` means
                that frames are floats in 0..1.

        Returns:
            `pixel_values` `(B, 2, 3, H, W)` float32 in [-1, 1].

        Raises:
            ValueError: No pairs, images of different sizes, or a frame that cannot be converted.
            OSError: A file cannot be read.
        """
        return super().preprocess(images, **kwargs)

    def _prepare_image_like_inputs(  # type: ignore[override]  # only the options that this processor uses
        self,
        images: Any,
        do_rescale: bool | None = None,
        intensity_range: tuple[float, float] | None = None,
        input_data_format: Any = None,
        device: Any = None,
        **kwargs: Any,
    ) -> list[Tensor]:
        """Convert all frames to `(3, H, W)` uint8, in one list: frames 1 and 2 of the first pair, then of the next."""
        if input_data_format is not None:
            input_data_format = str(getattr(input_data_format, "value", input_data_format))
        options = {"intensity_range": intensity_range, "input_data_format": input_data_format}
        frames: list[Tensor] = []
        for pair in _as_pairs(images):
            device = pair[0].device if device is None and isinstance(pair[0], Tensor) else device
            arrays = read_frames(pair, do_rescale=do_rescale is not False, **options)
            frames += [torch.from_numpy(array).permute(2, 0, 1).contiguous().to(device) for array in arrays]
        return frames

    def _preprocess(  # type: ignore[override]  # only the options that this processor has
        self,
        images: list[Tensor],
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | list[float],
        image_std: float | list[float],
        do_pad: bool,
        height_padding: str,
        min_size: int,
        return_tensors: Any,
        **kwargs,
    ) -> BatchFeature:
        _check_height_padding(height_padding)
        sizes = {tuple(image.shape[-2:]) for image in images}
        if len(sizes) > 1:
            raise ValueError(f"all images of a batch must have one size (height, width); got {sorted(sizes)}")
        if not do_rescale:  # frames were in 0..1, but have been converted to 8 bits like all others
            do_rescale, rescale_factor = True, 1 / 255
        processed = [
            self.rescale_and_normalize(image[None], do_rescale, rescale_factor, do_normalize, image_mean, image_std)
            for image in images
        ]
        if do_pad:
            height, width = sizes.pop()
            padding = image_padding(height, width, height_padding, min_size)
            processed = [F.pad(image, padding, mode="replicate") for image in processed]
        pairs = [torch.cat(processed[i : i + 2]) for i in range(0, len(processed), 2)]  # each (2, 3, H, W)
        return BatchFeature(data={"pixel_values": pairs}, tensor_type=return_tensors)

    def post_process_optical_flow(
        self, outputs: Any, target_sizes: Any = None, height_padding: str | None = None, min_size: int | None = None
    ) -> list[dict[str, Tensor]]:
        """Remove the padding from the flow.

        Args:
            outputs: `RaftOutput`, its flow `(B, 2, H, W)`.
            target_sizes: (height, width) of each pair's images before they were padded; None: keep the padding.
            height_padding, min_size: The values that `preprocess` had; None: the processor's own.

        Returns:
            For each pair `{"flow": (2, height, width)}`, in pixels.

        Raises:
            ValueError: There is not one size for each pair, or a size is not padded to that of the flow.
        """
        height_padding = self.height_padding if height_padding is None else height_padding
        min_size = self.min_size if min_size is None else min_size
        _check_height_padding(height_padding)
        flow = outputs.flow
        if target_sizes is None:
            return [{"flow": pair_flow} for pair_flow in flow]
        if len(target_sizes) != len(flow):
            raise ValueError(
                f"target_sizes must hold one (height, width) a pair, {len(flow)}; got {len(target_sizes)}"
            )
        results = []
        for pair_flow, size in zip(flow, target_sizes, strict=True):
            height, width = (int(side) for side in size)
            left, right, top, bottom = image_padding(height, width, height_padding, min_size)
            padded = (top + height + bottom, left + width + right)
            if padded != tuple(pair_flow.shape[-2:]):
                raise ValueError(
                    f"images of {height} x {width} are padded to {padded[0]} x {padded[1]}, "
                    f"but the flow is {pair_flow.shape[-2]} x {pair_flow.shape[-1]}"
                )
            results.append({"flow": pair_flow[:, top : top + height, left : left + width]})
        return results


def image_padding(height: int, width: int, height_padding: str, min_size: int) -> tuple[int, int, int, int]:
    """Compute the padding (left, right, top, bottom) to multiples of 8 pixels, and to at least `min_size`."""
    extra_height = -(-max(height, min_size) // DOWNSAMPLE_FACTOR) * DOWNSAMPLE_FACTOR - height
    extra_width = -(-max(width, min_size) // DOWNSAMPLE_FACTOR) * DOWNSAMPLE_FACTOR - width
    top = extra_height // 2 if height_padding == "split" else 0
    return extra_width // 2, extra_width - extra_width // 2, top, extra_height - top


def _as_pairs(images: Any) -> list[list[Any]]:
    """Convert one pair or several pairs to a list of lists of two frames."""
    images = _as_lists(images)
    if isinstance(images, list) and images and not any(isinstance(entry, list) for entry in images):
        images = [images]
    if not isinstance(images, list) or not images:
        raise ValueError(f"images must be a pair [frame1, frame2] or a list of such pairs; got {_describe(images)}")
    for pair in images:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(
                f"images must be a pair [frame1, frame2] or a list of such pairs; got a list of {_describe(pair)}"
            )
        for frame in pair:
            if isinstance(frame, list):
                raise ValueError(f"each frame of a pair must be {KINDS}; got {_describe(frame)}")
    return images


def _as_lists(entry: Any) -> Any:
    """Convert tuples and arrays of several frames to lists; return a frame as it is."""
    if isinstance(entry, (list, tuple)) or getattr(entry, "ndim", 0) > 3:
        return [_as_lists(inner) for inner in entry]
    return entry


def _describe(entry: Any) -> str:
    return f"{len(entry)} frames" if isinstance(entry, list) else type(entry).__name__


def _check_height_padding(height_padding: str) -> None:
    if height_padding not in ("split", "bottom"):
        raise ValueError(f"height_padding must be 'split' or 'bottom'; got {height_padding!r}")
