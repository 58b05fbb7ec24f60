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
from transformers.image_utils import get_image_size, is_valid_image, load_image
from transformers.utils import ModelOutput, is_torchvision_available, is_vision_available

# Under such an `if`, transformers does not count an import among what everyone needs who loads the model alone.
if is_vision_available():
    import PIL.Image
if is_torchvision_available():
    from torchvision.utils import flow_to_image

ONE_OR_SEVERAL = "one pair of frames is a tuple, pipe((frame1, frame2)); several pairs are a list of tuples"
DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # Pillow's, of more than 8 bits: it would only clip them


class OpticalFlowPipeline(Pipeline):
    """Flow from the first to the second frame of pairs, each at its own size.

    A frame is a PIL image, a path, a URL, or an array or tensor `(H, W, 3)`, `(3, H, W)` or `(H, W)` of 0..255. Grey
    ones and those with transparency become RGB, 16 bits are refused.

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
            batch_size, num_workers: as in any pipeline. Pairs of a batch that have different sizes are computed apart.

        Returns:
            For a pair `{"flow": (2, H, W)}`, float32, on the CPU: pixels, x to the right, then y down. With
            `return_image` also `"image"`, a PIL image in which the hue is the direction and the saturation the length,
            as part of the longest. For a list a list of these, for a generator or data set an iterator.

        Raises:
            ValueError: no pair of frames of one size, frames that are not 8 bits deep, or an unknown argument; the
                message says which.
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
        self, num_flow_updates: int | None = None, return_image: bool | None = None, **unknown: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if unknown:
            raise ValueError(
                f"the optical-flow pipeline has no argument {', '.join(sorted(unknown))}; it has num_flow_updates, "
                "return_image, batch_size and num_workers"
            )
        forward = {} if num_flow_updates is None else {"num_flow_updates": num_flow_updates}
        postprocess = {} if return_image is None else {"return_image": return_image}
        return {}, forward, postprocess

    def preprocess(self, pair: Any) -> dict[str, list]:  # type: ignore[override]
        """One pair: `pixel_values`, a list of one `(2, 3, H, W)`, and `target_size`, of one (height, width).

        In lists, since the base class would join bare tensors of a batch, which may differ in size.
        """
        _check_pair(pair, "an input")
        frames = [load_frame(frame) for frame in pair]
        sizes = [_frame_size(frame) for frame in frames]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"the frames of a pair must have one size (height, width); got {sizes[0]} and {sizes[1]}. "
                "Resize or crop one of them."
            )
        pixel_values = self.image_processor(frames, return_tensors="pt")["pixel_values"]  # type: ignore[misc]
        return {"pixel_values": [pixel_values[0]], "target_size": [sizes[0]]}

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
        flow = processor.post_process_optical_flow(output, target_sizes=outputs["target_size"])[0]["flow"]
        # Of its own memory: a view would keep all of the padded batch, and save it with the flow.
        result: dict[str, Any] = {"flow": flow.float().clone()}
        if return_image:
            result["image"] = to_pil_image(draw_flow(result["flow"]), do_rescale=False)
        return result


def load_frame(frame: Any) -> Any:
    """A frame in memory: a PIL image, array or tensor as it is, else what its path or URL names, as a PIL image.

    Raises:
        ValueError: It is not 8 bits deep, or there is no such file.
        OSError: The file is damaged.
    """
    if isinstance(frame, (str, os.PathLike)):
        return _read_frame(os.fspath(frame))
    if isinstance(frame, PIL.Image.Image):
        _check_mode(frame.mode, "the frame")
        return frame
    if 0 in frame.shape:
        raise ValueError(f"a frame is empty: {tuple(frame.shape)}")
    dtype = str(frame.dtype).removeprefix("torch.")
    if dtype != "uint8":
        values = frame.double() if isinstance(frame, Tensor) else frame
        lowest, highest = float(values.min()), float(values.max())
        if not (lowest >= 0 and highest <= 255):  # which what is not a number fails, too
            raise ValueError(f"frames must be 0..255; got {dtype} from {lowest:g} to {highest:g}")
        if dtype == "bool" or ("float" in dtype and 0 < highest <= 1):
            raise ValueError(f"frames must be 0..255; this one of {dtype} seems to be 0..1: multiply it by 255")
    # Torch takes no flipped view, such as OpenCV's frame[..., ::-1], but its copy.
    return frame if isinstance(frame, Tensor) else frame.copy()


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
        if not (isinstance(frame, (str, os.PathLike)) or is_valid_image(frame)):
            raise ValueError(
                f"{name} holds a {type(frame).__name__}, not a frame (PIL image, path, URL, array or tensor): "
                f"{ONE_OR_SEVERAL}"
            )


def _read_frame(name: str) -> Any:
    """A PIL image of what a path or URL names."""
    if not os.path.isfile(name):
        return load_image(name)
    try:
        with PIL.Image.open(name) as image:
            mode = image.mode
        frame = load_image(name)
    except Exception as error:  # Pillow has many, and few name the file
        raise OSError(f"{name} cannot be read as an image: {error}") from error
    _check_mode(mode, name)  # `load_image` clips to 8 bits in silence
    return frame


def _check_mode(mode: str, name: str) -> None:
    if mode in DEEP_MODES:
        raise ValueError(f"{name} is not 8 bits deep (mode {mode}): scale it to 0..255 first")


def _frame_size(frame: Any) -> tuple[int, int]:
    """(height, width)."""
    if isinstance(frame, PIL.Image.Image):
        return frame.height, frame.width
    return tuple(frame.shape) if frame.ndim == 2 else get_image_size(frame)
