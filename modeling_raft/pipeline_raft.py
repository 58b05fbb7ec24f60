"""Optical flow in one call: `pipeline("optical-flow", model=...)`. And saving a model so that this call finds it.

`save_pretrained` of the model takes this file along, and `config.json` names it (`custom_pipelines`).
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

from .frames_raft import KINDS, read_frames

# Under such an `if`, transformers does not count an import among what everyone needs who loads the model alone.
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
        kwargs.pop("local_files_only", None)  # `pipeline()` reads it, and hands it on
        super().__init__(*args, **kwargs)
        self.model.eval()  # a model in training would take its batch statistics from these frames

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Estimate flow.

        Args:
            inputs: a tuple of two frames, or an array or tensor `(2, ...)`, is one pair. A list of pairs, or an array
                `(B, 2, ...)`, is several; so are a generator and a `torch.utils.data.Dataset` of pairs, lazily.
            num_flow_updates: updates of the flow; None: as the model's configuration says.
            return_image: also draw the flow.
            intensity_range: (low, high) that become black and white; None: 0 to 255 of 8-bit frames, and the smallest
                and the largest value of a pair of 16-bit frames.
            batch_size, num_workers: as in any pipeline. Pairs of a batch that have different sizes are computed apart.

        Returns:
            For a pair `{"flow": (2, H, W)}`, float32, on the CPU: pixels, x to the right, then y down. With
            `return_image` also `"image"`, a PIL image in which the hue is the direction and the saturation the length,
            as part of the longest. For a list a list of these, for a generator or data set an iterator.

        Raises:
            ValueError: no pair of frames of one size, a frame that cannot be converted, or an unknown argument; the
                message says which.
            OSError: a file cannot be read.
        """
        if args:
            raise ValueError(f"the pipeline takes one argument: {ONE_OR_SEVERAL}")
        if getattr(inputs, "ndim", 0) == 5:
            inputs = list(inputs)
        if isinstance(inputs, list):
            if not inputs:
                return []
            for number, pair in enumerate(inputs):  # before anything is computed
                _check_pair(pair, f"entry {number} of the list")
        elif isinstance(inputs, tuple):  # the base class would look into it
            _check_pair(inputs, "the tuple")
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(
        self,
        num_flow_updates: int | None = None,
        return_image: bool | None = None,
        intensity_range: tuple[float, float] | None = None,
        **unknown: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if unknown:
            raise ValueError(
                f"the optical-flow pipeline has no argument {', '.join(sorted(unknown))}; it has num_flow_updates, "
                "return_image, intensity_range, batch_size and num_workers"
            )
        preprocess = {} if intensity_range is None else {"intensity_range": intensity_range}
        forward = {} if num_flow_updates is None else {"num_flow_updates": num_flow_updates}
        postprocess = {} if return_image is None else {"return_image": return_image}
        return preprocess, forward, postprocess

    @property
    def min_size(self) -> int:
        """The smallest height and width in pixels that frames are padded to."""
        return max(self.image_processor.min_size, self.model.config.min_image_size)  # type: ignore[union-attr]

    def preprocess(self, pair: Any, intensity_range: tuple[float, float] | None = None) -> dict[str, list]:  # type: ignore[override]
        """One pair: `pixel_values`, a list of one `(2, 3, H, W)`, and `target_size`, of one (height, width).

        In lists, since the base class would join bare tensors of a batch, which may differ in size.
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

    def _forward(self, inputs: Mapping[str, list], **options: Any) -> dict[str, list]:  # type: ignore[override]
        """A pair, or a batch of them, in which every entry is a list of one again."""
        pairs = [entry[0] if isinstance(entry, list) else entry for entry in inputs["pixel_values"]]
        flows: list[Any] = [None] * len(pairs)
        for shape in dict.fromkeys(pair.shape for pair in pairs):
            numbers = [number for number, pair in enumerate(pairs) if pair.shape == shape]
            output = self.model(torch.stack([pairs[number] for number in numbers]), **options)
            for number, flow in zip(numbers, output.flow, strict=True):
                flows[number] = flow
        return {"flow": flows, "target_size": inputs["target_size"]}

    def postprocess(self, outputs: Mapping[str, Any], return_image: bool = False) -> dict[str, Any]:  # type: ignore[override]
        """The result of one pair: `flow` holds one `(2, H, W)`, `target_size` one (height, width)."""
        output = ModelOutput(flow=outputs["flow"][0][None])
        processor: Any = self.image_processor
        flow = processor.post_process_optical_flow(
            output, target_sizes=outputs["target_size"], min_size=self.min_size
        )[0]["flow"]
        # Of its own memory: a view would keep all of the padded batch, and save it with the flow.
        result: dict[str, Any] = {"flow": flow.float().clone()}
        if return_image:
            result["image"] = to_pil_image(draw_flow(result["flow"]), do_rescale=False)
        return result


def draw_flow(flow: Tensor) -> Tensor:
    """Flow `(2, H, W)` as colours `(3, H, W)` uint8, RGB: those of predict_flow.py, and of Middlebury.

    The longest vector is fully saturated. What is not finite is white, as where nothing moves.
    """
    length = torch.linalg.vector_norm(flow, dim=0)
    finite = length.isfinite()
    longest = torch.where(finite, length, 0).max().item() or 1.0
    vectors = torch.where(finite, flow / longest, 0)
    # flow_to_image scales by the longest vector that it is given, whatever rounding has made of it: so give it a 1.
    pixels = torch.cat([vectors.flatten(1), vectors.new_tensor([[1], [0]])], dim=1)
    return flow_to_image(pixels[:, None])[:, 0, :-1].reshape(3, *finite.shape)


def save_pretrained_with_pipeline(model: Any, image_processor: Any, folder: str | os.PathLike[str]) -> None:
    """Write everything that `pipeline("optical-flow", model=folder)` needs: both, and the code of both and of itself.

    It is no more than `save_pretrained` of model and image processor: the model's takes the pipeline along. The same
    holds for `push_to_hub`, and for a model that was loaded with `trust_remote_code`.

    Args:
        model: `RaftForOpticalFlow`.
        image_processor: `RaftImageProcessor`.
        folder: made if it is not there.

    Raises:
        OSError: It cannot be written.
    """
    model.save_pretrained(folder)
    image_processor.save_pretrained(folder)


def _check_pair(pair: Any, name: str) -> None:
    """Refuse what is not two frames."""
    is_frames = isinstance(pair, (tuple, list)) or getattr(pair, "ndim", 0) == 4
    if not is_frames:
        shape = f" {tuple(pair.shape)}" if hasattr(pair, "shape") else ""
        raise ValueError(f"{name} is not a pair but {type(pair).__name__}{shape}: {ONE_OR_SEVERAL}")
    if len(pair) != 2:
        raise ValueError(f"{name} holds {len(pair)} frames, not 2: {ONE_OR_SEVERAL}")
    for frame in pair:
        if not (isinstance(frame, (str, os.PathLike, bytes, bytearray, memoryview)) or is_valid_image(frame)):
            raise ValueError(f"{name} holds a {type(frame).__name__}, not a frame ({KINDS}): {ONE_OR_SEVERAL}")
