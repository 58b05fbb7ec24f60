"""The pipeline `pipeline("optical-flow", model=...)`, and saving a model so that it can be loaded by this pipeline.

`save_pretrained` of the model copies this file, and `config.json` names it (`custom_pipelines`).
"""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Pipeline
from transformers.image_transforms import to_pil_image
from transformers.image_utils import is_valid_image
from transformers.utils import ModelOutput, is_torchvision_available

from .consistency_raft import consistency_error, is_occluded
from .frames_raft import KINDS, read_frames

# Outside of such an `if`, transformers would require this import of everyone who loads the model alone.
if is_torchvision_available():
    from torchvision.utils import flow_to_image

ONE_OR_SEVERAL = "one pair of frames is a tuple, pipe((frame1, frame2)); several pairs are a list of tuples"


class OpticalFlowPipeline(Pipeline):
    """Flow from the first to the second frame of pairs, each at its own size.

    A frame is a path, a URL, the bytes of an image file, a PIL image, or an array or tensor `(H, W, 3)`, `(3, H, W)`
    or `(H, W)`. Images with an EXIF orientation are turned upright. 16-bit frames of a pair are scaled by one range.

        pipe = pipeline("optical-flow", model="user/name", trust_remote_code=True)
        flow = pipe((frame1, frame2))["flow"]
        results = pipe([(frame1, frame2), (frame2, frame3)], batch_size=2, num_flow_updates=20, return_image=True)
    """

    _load_image_processor: Any = True
    _load_processor: Any = False
    _load_video_processor: Any = False
    _load_feature_extractor: Any = False
    _load_tokenizer: Any = False

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.pop("local_files_only", None)  # `pipeline()` uses it, and passes it on
        super().__init__(*args, **kwargs)
        self.model.eval()  # in training mode, BatchNorm would use the statistics of these frames

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Estimate flow.

        Args:
            inputs: a tuple of two frames, or an array or tensor `(2, ...)`, is one pair. A list of pairs, or an array
                `(B, 2, ...)`, is several; so are a generator and a `torch.utils.data.Dataset` of pairs, lazily.
            num_flow_updates: updates of the flow; None: the number in the model's configuration.
            return_image: whether to draw the flow as well.
            return_confidence: whether to estimate the flow from the second frame to the first as well, and from both
                how sure the flow is. It takes about twice the time.
            intensity_range: (low, high) that become black and white; None: 0 to 255 of 8-bit frames, and the smallest
                and the largest value of a pair of 16-bit frames.
            batch_size, num_workers: as in any pipeline. Pairs of different sizes in a batch are computed separately.

        Returns:
            For a pair `{"flow": (2, H, W)}`, float32, on the CPU: pixels, x to the right, then y down. With
            `return_image` also `"image"`, a PIL image in which the hue is the direction and the saturation the length,
            as part of the longest. With `return_confidence` also `"consistency_error"`, `(H, W)` float32, the distance
            in pixels between where a pixel starts and where flow and backward flow bring it (infinite where it leaves
            the frame), and `"occluded"`, `(H, W)` bool, the pixels that the second frame does not show. For a list of
            pairs a list of these, for a generator or data set an iterator.

        Raises:
            ValueError: the input is no pair of frames of one size, a frame cannot be converted, or an argument is
                unknown; the message says which.
            OSError: a file cannot be read.
        """
        if args:
            raise ValueError(f"the pipeline takes one argument: {ONE_OR_SEVERAL}")
        if getattr(inputs, "ndim", 0) == 5:
            inputs = list(inputs)
        if isinstance(inputs, list):
            if not inputs:
                return []
            for index, pair in enumerate(inputs):  # before anything is computed
                _check_pair(pair, f"entry {index} of the list")
        elif isinstance(inputs, tuple):  # the base class would take its entries for inputs
            _check_pair(inputs, "the tuple")
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(
        self,
        num_flow_updates: int | None = None,
        return_image: bool | None = None,
        intensity_range: tuple[float, float] | None = None,
        return_confidence: bool | None = None,
        **unknown: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if unknown:
            raise ValueError(
                f"the optical-flow pipeline has no argument {', '.join(sorted(unknown))}; it has num_flow_updates, "
                "return_image, intensity_range, return_confidence, batch_size and num_workers"
            )
        preprocess = {} if intensity_range is None else {"intensity_range": intensity_range}
        forward: dict[str, Any] = {} if num_flow_updates is None else {"num_flow_updates": num_flow_updates}
        if return_confidence is not None:
            forward["backward"] = return_confidence
        postprocess = {} if return_image is None else {"return_image": return_image}
        return preprocess, forward, postprocess

    @property
    def min_size(self) -> int:
        """The smallest height and width in pixels that frames are padded to."""
        return max(self.image_processor.min_size, self.model.config.min_image_size)  # type: ignore[union-attr]

    def preprocess(self, pair: Any, intensity_range: tuple[float, float] | None = None) -> dict[str, list]:  # type: ignore[override]
        """Convert a pair to `pixel_values`, a list of one `(2, 3, H, W)`, and `target_size`, one (height, width).

        They are in lists because the base class concatenates tensors of a batch, which may differ in size.
        """
        _check_pair(pair, "an input")
        processor: Any = self.image_processor
        intensity_range = processor.intensity_range if intensity_range is None else intensity_range
        frames = read_frames(list(pair), intensity_range=intensity_range, do_rescale=processor.do_rescale)
        sizes = [frame.shape[:2] for frame in frames]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"the frames of a pair must have one size (height, width); got {sizes[0]} and {sizes[1]}. "
                "Resize or crop one of them."
            )
        converted = {"input_data_format": "channels_last", "intensity_range": (0.0, 255.0), "do_rescale": True}
        inputs = processor([frames], min_size=self.min_size, return_tensors="pt", **converted)
        return {"pixel_values": [inputs["pixel_values"][0]], "target_size": [sizes[0]]}

    def _forward(self, inputs: Mapping[str, list], backward: bool = False, **options: Any) -> dict[str, list]:  # type: ignore[override]
        """Estimate the flow of a pair, or of a batch that the base class makes of several pairs; and if `backward`,
        the flow from the second frame to the first."""
        pairs = [entry[0] if isinstance(entry, list) else entry for entry in inputs["pixel_values"]]
        results = {"flow": self._estimate(pairs, options), "target_size": inputs["target_size"]}
        if backward:
            results["backward_flow"] = self._estimate([pair.flip(0) for pair in pairs], options)
        return results

    def _estimate(self, pairs: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
        """Estimate the flow of each pair `(2, 3, H, W)`, those of one size as a batch."""
        flows: list[Any] = [None] * len(pairs)
        for shape in dict.fromkeys(pair.shape for pair in pairs):
            indices = [index for index, pair in enumerate(pairs) if pair.shape == shape]
            output = self.model(torch.stack([pairs[index] for index in indices]), **options)
            for index, flow in zip(indices, output.flow, strict=True):
                flows[index] = flow
        return flows

    def postprocess(self, outputs: Mapping[str, Any], return_image: bool = False) -> dict[str, Any]:  # type: ignore[override]
        """Make the result of one pair: `flow` holds one `(2, H, W)`, `target_size` one (height, width)."""
        size = outputs["target_size"]
        result: dict[str, Any] = {"flow": self._crop(outputs["flow"], size)}
        if "backward_flow" in outputs:
            both = result["flow"][None], self._crop(outputs["backward_flow"], size)[None]
            result |= {"consistency_error": consistency_error(*both)[0], "occluded": is_occluded(*both)[0]}
        if return_image:
            result["image"] = to_pil_image(draw_flow(result["flow"]), do_rescale=False)
        return result

    def _crop(self, flow: list[Tensor], target_size: list[Any]) -> Tensor:
        """Take the padding off the flow of one pair, a list of one `(2, H', W')`."""
        processor: Any = self.image_processor
        output = ModelOutput(flow=flow[0][None])
        cropped = processor.post_process_optical_flow(output, target_sizes=target_size, min_size=self.min_size)
        # Copied, since a view would keep the memory of the whole padded batch, also when the flow is saved.
        return cropped[0]["flow"].float().clone()


def draw_flow(flow: Tensor) -> Tensor:
    """Draw flow `(2, H, W)` in the colors of Middlebury, as predict_flow.py does: `(3, H, W)` uint8, RGB.

    The longest vector is fully saturated. Vectors that are not finite are white, like pixels that do not move.
    """
    length = torch.linalg.vector_norm(flow, dim=0)
    finite = length.isfinite()
    longest = torch.where(finite, length, 0).max().item() or 1.0
    vectors = torch.where(finite, flow / longest, 0)
    # flow_to_image divides by the longest vector that it gets, which rounding may have made shorter than 1: add a 1.
    pixels = torch.cat([vectors.flatten(1), vectors.new_tensor([[1], [0]])], dim=1)
    return flow_to_image(pixels[:, None])[:, 0, :-1].reshape(3, *finite.shape)


def save_pretrained_with_pipeline(model: Any, image_processor: Any, folder: str | os.PathLike[str]) -> None:
    """Save everything that `pipeline("optical-flow", model=folder)` needs: model, image processor, and their code.

    This is `save_pretrained` of the model, which copies the code of the pipeline, and of the image processor.
    `push_to_hub` of both does the same, also for a model that was loaded with `trust_remote_code`.

    Args:
        model: `RaftForOpticalFlow`.
        image_processor: `RaftImageProcessor`.
        folder: created if it does not exist.

    Raises:
        OSError: The folder cannot be written.
    """
    model.save_pretrained(folder)
    image_processor.save_pretrained(folder)


def _check_pair(pair: Any, name: str) -> None:
    """Raise ValueError where `pair` is not two frames; `name` is for the message."""
    is_frames = isinstance(pair, (tuple, list)) or getattr(pair, "ndim", 0) == 4
    if not is_frames:
        shape = f" {tuple(pair.shape)}" if hasattr(pair, "shape") else ""
        raise ValueError(f"{name} is not a pair but {type(pair).__name__}{shape}: {ONE_OR_SEVERAL}")
    if len(pair) != 2:
        raise ValueError(f"{name} holds {len(pair)} frames, not 2: {ONE_OR_SEVERAL}")
    for frame in pair:
        if not (isinstance(frame, (str, os.PathLike, bytes, bytearray, memoryview)) or is_valid_image(frame)):
            raise ValueError(f"{name} holds a {type(frame).__name__}, not a frame ({KINDS}): {ONE_OR_SEVERAL}")
