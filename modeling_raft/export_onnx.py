"""Export RAFT to an ONNX file, with a fixed number of updates and for any batch and image size.

python -m modeling_raft.export_onnx raft-things raft.onnx --num_flow_updates 20
"""

import argparse
import copy
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from .configuration_raft import DOWNSAMPLE_FACTOR
from .convert_raft_checkpoint import load_raft
from .modeling_raft import RaftForOpticalFlow

MIN_OPSET = 18  # torch's exporter writes no older version, and converting its files to 17 gives invalid ones
MAX_DIFFERENCE = 0.01  # pixels, between onnxruntime and torch

INPUTS_AND_OUTPUTS = {
    "pixel_values": "(batch, 2, 3, height, width) float32: frames 1 and 2, RGB in [-1, 1]. Height and width are "
    "multiples of 8, and at least min_image_size.",
    "flow": "(batch, 2, height, width) float32: how far each pixel of frame 1 moves until frame 2, in pixels, "
    "x to the right, then y down.",
    "low_res_flow": "(batch, 2, height / 8, width / 8) float32: before upsampling, in pixels of its own grid.",
}


class FixedUpdates(nn.Module):
    """The model with one input and a tuple of tensors as output, as an ONNX file needs it."""

    def __init__(self, model: RaftForOpticalFlow, num_flow_updates: int):
        super().__init__()
        self.model = model
        self.num_flow_updates = num_flow_updates

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """`(B, 2, 3, H, W)` to flow `(B, 2, H, W)` and `low_res_flow` `(B, 2, h, w)`."""
        output = self.model(pixel_values, num_flow_updates=self.num_flow_updates)
        return output.flow, output.low_res_flow


def dynamic_shapes(model: RaftForOpticalFlow) -> dict[str, dict[int, Any]]:
    """Name the dynamic sizes of `pixel_values` (batch, height, width), as `torch.export.export` takes them."""
    smallest = model.config.min_image_size // DOWNSAMPLE_FACTOR
    height, width = Dim("grid_height", min=smallest), Dim("grid_width", min=smallest)
    return {"pixel_values": {0: Dim("batch", min=1), 3: DOWNSAMPLE_FACTOR * height, 4: DOWNSAMPLE_FACTOR * width}}


def moving_texture(batch: int, height: int, width: int) -> Tensor:
    """Make `pixel_values` `(batch, 2, 3, height, width)` of a smooth texture that moves by (3, 2) pixels."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(batch, 3, height // DOWNSAMPLE_FACTOR, width // DOWNSAMPLE_FACTOR, generator=generator)
    frame1 = 2 * F.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1) - 1
    return torch.stack([frame1, frame1.roll((2, 3), dims=(2, 3))], dim=1)


def export_onnx(
    model: RaftForOpticalFlow, path: str | os.PathLike, num_flow_updates: int | None = None, opset: int = MIN_OPSET
) -> float | None:
    """Write an ONNX file, and check it.

    The file has the input and outputs of `INPUTS_AND_OUTPUTS`, whose descriptions are in its metadata. It correlates
    all pairs of pixels, as `correlation="dense"` does, in float32.

    Args:
        model: It is not changed; a copy on the CPU, in float32 and in eval mode, is exported.
        path: The file to write. It is created, and replaces an older one, after it has passed the checks.
        num_flow_updates: Updates of the flow; the file contains the update block as many times. None: the number in
            the model's configuration.
        opset: Version of ONNX's operators, at least 18.

    Returns:
        The largest difference of the file's flow in onnxruntime to the model's, in pixels, on two sizes other than the
        traced one; None where onnxruntime is not installed.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        ValueError: An argument is out of range, or the flow differs by more than 0.01 px.
        OSError: The file cannot be written.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  # torch's exporter needs it
    except ImportError as error:
        raise ImportError(f"{error}: install what export needs: pip install onnx onnxscript onnxruntime") from error
    path = Path(path)
    num_flow_updates = model.config.num_flow_updates if num_flow_updates is None else num_flow_updates
    if num_flow_updates < 1:
        raise ValueError(f"num_flow_updates must be at least 1; got {num_flow_updates}")
    newest = onnx.defs.onnx_opset_version()
    if not MIN_OPSET <= opset <= newest:
        raise ValueError(f"opset must lie between {MIN_OPSET} and {newest} (as installed); got {opset}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file, such as {path / 'raft.onnx'}")
    path.parent.mkdir(parents=True, exist_ok=True)

    model = copy.deepcopy(model).cpu().float().eval()
    model.config.correlation = "dense"  # a file cannot choose by the free memory
    fixed = FixedUpdates(model, num_flow_updates).eval()
    smallest = model.config.min_image_size
    # On no pyramid level may a size be 1, or two sizes be equal: the exporter would take these for constants.
    example = moving_texture(2, 2 * smallest + DOWNSAMPLE_FACTOR, 2 * smallest + 2 * DOWNSAMPLE_FACTOR)
    # Written to the same file system, so that the finished file can be moved to its place in one step.
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder, torch.no_grad():
        written = Path(folder) / path.name
        program = torch.onnx.export(
            fixed,
            (example,),
            dynamo=True,
            dynamic_shapes=dynamic_shapes(model),
            input_names=["pixel_values"],
            output_names=["flow", "low_res_flow"],
            opset_version=opset,
            verbose=False,
        )
        assert program is not None  # for the type checker: with dynamo=True it is a program
        proto = program.model_proto
        for part in (*proto.graph.node, *proto.graph.value_info, *proto.graph.input, *proto.graph.output):
            part.ClearField("metadata_props")  # tracebacks, with the paths of this computer
        facts = {"num_flow_updates": str(num_flow_updates), "min_image_size": str(smallest)}
        onnx.helper.set_model_props(proto, facts | INPUTS_AND_OUTPUTS)
        onnx.save(proto, written)
        onnx.checker.check_model(written, full_check=True)
        difference = difference_in_onnxruntime(fixed, written)
        if difference is not None and not difference <= MAX_DIFFERENCE:  # NaN, too
            raise ValueError(f"in onnxruntime the flow differs by {difference:.4g} px, more than {MAX_DIFFERENCE} px")
        os.replace(written, path)
    return difference


def difference_in_onnxruntime(fixed: FixedUpdates, path: Path) -> float | None:
    """Compute the largest difference of a file's flow to the model's, in pixels; None without onnxruntime."""
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    smallest, step = fixed.model.config.min_image_size, DOWNSAMPLE_FACTOR
    differences = []
    for batch, height, width in ((1, smallest, smallest + step), (3, smallest + 5 * step, smallest)):
        pixel_values = moving_texture(batch, height, width)
        (flow,) = session.run(["flow"], {"pixel_values": pixel_values.numpy()})
        differences.append((torch.from_numpy(flow) - fixed(pixel_values)[0]).abs().max())
    return torch.stack(differences).max().item()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Export a RAFT model to ONNX, for any batch and image size.")
    parser.add_argument("model", help="a folder of save_pretrained, a repository on the Hub, or a file of weights")
    parser.add_argument("output", type=Path, help="the file to write, such as raft.onnx")
    parser.add_argument("--num_flow_updates", type=int, help="updates of the flow (default: the model's)")
    parser.add_argument("--opset", type=int, default=MIN_OPSET, help=f"version of ONNX's operators ({MIN_OPSET})")
    args = parser.parse_args(argv)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it logs every optimization that it leaves out
    try:
        model = load_raft(args.model)
        difference = export_onnx(model, args.output, args.num_flow_updates, args.opset)
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    if difference is None:
        checked = "onnxruntime is not installed, so its flow is not compared with torch's"
    else:
        checked = f"in onnxruntime its flow is torch's to {difference:.2g} px"
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB; {checked}")


if __name__ == "__main__":
    main()
