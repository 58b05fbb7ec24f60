"""Frames per second of FlowVideo beside torchvision's `raft_large`, called on each pair; and what the speed costs.

    python -m benchmarks.bench_video --model raft-sintel.pth --frames FRAMES [--ground_truth FLOWS]

The frames of a folder, played to and fro, are a video of `--num_pairs` pairs. Each way to estimate its flow gets it
whole, its first pair from zero included; the ways take turns, so that a machine whose speed drifts treats them alike.
With `--ground_truth`, a folder of flow files in the order of the frames, errors are those of the frames played once.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.models.optical_flow import raft_large

from flow_data.flow_io import read_flow
from flow_inference import FlowVideo
from flow_inference.estimator import InputPadder
from flow_inference.frame_sources import list_frames, read_frames
from modeling_raft.convert_raft_checkpoint import load_raft

UPDATES = 12  # of torchvision's default, and of pairs that start from zero
WAYS: dict[str, dict[str, Any]] = {
    "pair by pair, float32": {"warm_start": False},
    "as it is (bf16 where quick)": {},
    "float32": {"mixed_precision": "no"},
    "published warm start, 5 updates, float32": {
        "mixed_precision": "no",
        "shrink_by": 0,
        "warm_num_flow_updates": 5,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--frames", type=Path, required=True)
    parser.add_argument("--ground_truth", type=Path)
    parser.add_argument("--num_pairs", type=int, default=8)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    model = load_raft(args.model).eval()
    frames = list(read_frames(list_frames(args.frames)))
    to_and_fro = [*frames, *frames[-2:0:-1]]
    video = [to_and_fro[i % len(to_and_fro)] for i in range(args.num_pairs + 1)]

    seconds: dict[str, list[float]] = {name: [] for name in ("torchvision", *WAYS)}
    for _ in range(args.runs):
        for name, taken in seconds.items():
            start = time.perf_counter()
            run_torchvision(video) if name == "torchvision" else run(model, video, WAYS[name])
            taken.append(time.perf_counter() - start)
    errors = {name: mean_error(model, frames, args.ground_truth, options) for name, options in WAYS.items()}

    print(
        "| | frames per second | times torchvision's (lowest to highest) | end-point error, px |\n|---|---:|---:|---:|"
    )
    results = {}
    for name, taken in seconds.items():
        ratios = sorted(peer / own for peer, own in zip(seconds["torchvision"], taken, strict=True))
        rate = args.num_pairs / statistics.median(taken)
        error = errors.get(name)
        results[name] = {"frames_per_second": rate, "ratios": ratios, "epe": error}
        shown = "" if error is None else f"{error:.4f}"
        spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        print(f"| {name} | {rate:.2f} | {statistics.median(ratios):.2f} ({spread}) | {shown} |")
    height, width = frames[0].shape[:2]
    print(
        f"\n{args.num_pairs} pairs of {height} x {width}, {args.runs} runs, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}"
    )
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=2) + "\n")


@torch.no_grad()
def run_torchvision(video: list[np.ndarray]) -> None:
    """Estimate each pair on its own, padded as ours are. The weights do not matter to the time."""
    model = raft_large().eval()
    padder = InputPadder(*video[0].shape[:2])
    for frame1, frame2 in zip(video[:-1], video[1:], strict=True):
        images = (padder.pad(frame, torch.device("cpu")) for frame in (frame1, frame2))
        padder.unpad(model(*images, num_flow_updates=UPDATES)[-1])


def run(model: Any, video: list[np.ndarray], options: dict[str, Any]) -> None:
    for _ in FlowVideo(model, video, num_flow_updates=UPDATES, **options):
        pass


def mean_error(
    model: Any, frames: list[np.ndarray], ground_truth: Path | None, options: dict[str, Any]
) -> float | None:
    """Mean of the pairs' end-point errors, pixels."""
    if ground_truth is None:
        return None
    errors = []
    paths = sorted(ground_truth.glob("*.flo"))
    for pair, path in zip(FlowVideo(model, frames, num_flow_updates=UPDATES, **options), paths, strict=True):
        flow, valid = read_flow(path)
        error = np.linalg.norm(pair.flow.permute(1, 2, 0).numpy() - flow, axis=-1)
        errors.append(error[valid].mean())
    return float(np.mean(errors))


if __name__ == "__main__":
    main()
