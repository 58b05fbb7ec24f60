"""Flow from one image to the next.

    python predict_flow.py --model DIR_OR_REPO frame1.png frame2.png --output flow.flo

Flow says for every pixel of frame 1 how far it moves until frame 2: x to the right, then y down, in pixels.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from flow_data.flow_io import FLOW_SUFFIXES, write_flow
from flow_data.images import read_rgb
from flow_data.pictures import draw_flow
from flow_inference.prediction import predict_pair
from modeling_raft.convert_raft_checkpoint import load_raft


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        frames = [read_frame(path) for path in args.frames]
        if frames[0].shape != frames[1].shape:
            sizes = " and ".join(f"{frame.shape[1]} x {frame.shape[0]}" for frame in frames)
            raise ValueError(f"both frames must have one size; {args.frames[0]} and {args.frames[1]} have {sizes}")
        model = load_raft(args.model).eval().to("cuda" if torch.cuda.is_available() else "cpu")
        flow = predict_pair(model, *frames, args.num_flow_updates)
        write(args.output, flow, args.format)
    except (ValueError, OSError) as error:
        sys.exit(f"predict_flow.py: error: {error}")
    length = torch.linalg.vector_norm(flow, dim=0)
    print(f"{args.output}: mean length {length.mean():.2f} px, longest {length.max():.2f} px")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("frames", type=Path, nargs=2, metavar="FRAME", help="two images of one size")
    parser.add_argument("--model", required=True, help="folder, repository id, or .pth of princeton or torchvision")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help=f"file to write: {', '.join(FLOW_SUFFIXES)}; .png is a colour picture",
    )
    parser.add_argument(
        "--format", choices=["colour", "kitti"], default="colour", help="what a .png holds: a picture, or 16-bit flow"
    )
    parser.add_argument("--num_flow_updates", type=int, default=20, help="more are slower and mostly better")
    args = parser.parse_args(argv)
    if args.output.suffix not in FLOW_SUFFIXES:
        parser.error(f"--output must end in one of {', '.join(FLOW_SUFFIXES)}; got {args.output}")
    if args.format == "kitti" and args.output.suffix != ".png":
        parser.error(f"--format kitti writes a .png; got {args.output}")
    if args.num_flow_updates < 1:
        parser.error(f"--num_flow_updates must be at least 1; got {args.num_flow_updates}")
    return args


def read_frame(path: Path) -> np.ndarray:
    """`(H, W, 3)` uint8, RGB."""
    return read_rgb({"bytes": None, "path": str(path)}, "image")


def write(path: Path, flow: torch.Tensor, png_format: str) -> None:
    """Write flow `(2, H, W)` as the suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png" and png_format == "colour":
        Image.fromarray(draw_flow(flow)).save(path)
    else:
        write_flow(path, flow.permute(1, 2, 0).contiguous().numpy())


if __name__ == "__main__":
    main()
