"""Seconds of a pair in what else runs RAFT on a CPU, from the file of `modeling_raft.export_onnx`, beside PyTorch.

    python -m benchmarks.bench_runtimes --output outputs/benchmarks/runtimes.json
    python -m benchmarks.bench_runtimes --model raft-sintel.pth --pair frame1.png frame2.png

Without `--model`, the large model with random weights; without `--pair`, synthetic images. Errors are distances from
the flow of PyTorch in float32. Each runtime gets as many threads as PyTorch. About three minutes on two CPU cores.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.candidates import Candidate, in_precision, make_pairs
from benchmarks.options import make_parser, save_results
from benchmarks.rounds import spread, time_in_rounds, times_as_fast
from flow_data.optional_packages import needs_extra

CPU = torch.device("cpu")
EAGER = "PyTorch fp32"


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, runs=7, height=384, width=512, num_flow_updates=12)
    parser.add_argument("--model", help="weights: a folder, a repository or a file (default: random ones)")
    parser.add_argument("--pair", nargs=2, metavar=("FRAME1", "FRAME2"), help="images, whose size is taken instead")
    arguments = parser.parse_args(argv)
    if arguments.device != "cpu":
        parser.error(f"--device must be cpu here; got {arguments.device}")
    try:
        model, pixel_values = load_model(arguments), load_pair(arguments)
        with tempfile.TemporaryDirectory() as folder:
            calls = make_calls(model, pixel_values, arguments.num_flow_updates, Path(folder) / "raft.onnx")
            flows = {name: call() for name, call in calls.items()}
            seconds = time_in_rounds(calls, arguments.runs, CPU)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"bench_runtimes: error: {error}")
    rows = []
    for name, taken in seconds.items():
        distance = (flows[name] - flows[EAGER]).norm(dim=1)
        row: dict[str, Any] = {"candidate": name, "seconds": spread(taken)}
        row |= {"times_as_fast": times_as_fast(taken, seconds[EAGER])}
        rows.append(row | {"mean_px": distance.mean().item(), "largest_px": distance.max().item()})
        print(f"{name}: {row['seconds']['median']:.3f} s, flow differs by {distance.mean():.2g} px in the mean")
    save_results(arguments.output, arguments, results=rows)


def load_model(arguments: argparse.Namespace) -> Any:
    from modeling_raft.convert_raft_checkpoint import load_raft

    return (Candidate("ours").make_model() if arguments.model is None else load_raft(arguments.model)).eval()


def load_pair(arguments: argparse.Namespace) -> Tensor:
    """`pixel_values` `(1, 2, 3, H, W)`, padded as users' are."""
    if arguments.pair is None:
        return make_pairs(1, arguments.height, arguments.width)[0]
    from PIL import Image

    from modeling_raft import RaftImageProcessor

    images: list[Any] = [Image.open(path) for path in arguments.pair]
    pixel_values = RaftImageProcessor()(images, return_tensors="pt").pixel_values
    arguments.height, arguments.width = pixel_values.shape[-2:]
    return pixel_values


def make_calls(model: Any, pixel_values: Tensor, num_flow_updates: int, path: Path) -> dict[str, Callable[[], Tensor]]:
    """Calls that estimate the flow `(1, 2, H, W)` of a pair in every runtime, by its name.

    Args:
        model: In eval mode.
        pixel_values: `(1, 2, 3, H, W)`.
        num_flow_updates: Updates of the flow.
        path: Where the model is exported to.

    Raises:
        ImportError: A runtime is not installed.
    """
    with needs_extra("onnx"):
        import onnxruntime
    with needs_extra("openvino"):
        import openvino

    from modeling_raft.export_onnx import export_onnx

    export_onnx(model, path, num_flow_updates)
    image, threads = pixel_values.numpy(), torch.get_num_threads()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    @torch.no_grad()
    def in_torch(precision: str) -> Tensor:
        with in_precision(precision, CPU):
            return model(pixel_values, num_flow_updates=num_flow_updates).flow

    def compile_openvino(precision: str) -> Callable[[], Tensor]:
        core = openvino.Core()
        network = core.read_model(path)
        network.reshape({"pixel_values": list(image.shape)})  # as other runtimes, for the size that comes
        hints = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": str(threads)}
        compiled = core.compile_model(network, "CPU", hints)
        return lambda: torch.from_numpy(compiled({"pixel_values": image})["flow"].copy())

    return {
        EAGER: lambda: in_torch("fp32"),
        "onnxruntime fp32": lambda: torch.from_numpy(session.run(["flow"], {"pixel_values": image})[0]),
        "OpenVINO fp32": compile_openvino("f32"),
        "PyTorch bf16": lambda: in_torch("bf16"),
        "OpenVINO bf16": compile_openvino("bf16"),
    }


if __name__ == "__main__":
    main()
