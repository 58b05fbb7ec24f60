"""Frames a second of a folder of synthetic videos: one command for all, beside one command each and a plain loop.

    python -m benchmarks.bench_collection [--model raft-small.pth] [--videos 12] [--pairs 8] [--output collection.json]

Candidates, each in processes of its own, start-up included, with the same frames and `.flo` files. All but the last
estimate the same flow: in float32, with the same updates and without a warm start.

- one process: `predict_flow.py FOLDER`
- two processes: the same below `accelerate launch --num_processes 2`
- one by one: `predict_flow.py --video FILE` for one video after the other
- torchvision: a loop over the frames of each video, with its model of the same size, pair by pair
- default settings: one process with a warm start, after which a pair takes 8 updates, and bf16 where it is quick

The candidates take turns. The share of time with the model busy is that of the report of `predict_flow.py`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from benchmarks.machine import describe_machine
from benchmarks.options import positive, write_json
from flow_data.shipped_files import PRETRAINED

PROJECT = Path(__file__).resolve().parents[1]
PLAIN_LOOP = """
import sys
from pathlib import Path
import av, numpy as np, torch
from torchvision.models.optical_flow import raft_large, raft_small
folder, output, updates, small = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "small"
model = (raft_small if small else raft_large)().eval()
for path in sorted(folder.glob("*.mp4")):
    (output / path.stem).mkdir(parents=True)
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    tensors = [torch.from_numpy(frame).permute(2, 0, 1)[None].float() / 127.5 - 1 for frame in frames]
    for index, pair in enumerate(zip(tensors[:-1], tensors[1:])):
        with torch.no_grad():
            flow = model(*pair, num_flow_updates=updates)[-1][0].permute(1, 2, 0).numpy()
        with open(output / path.stem / f"frame_{index + 1:06d}.flo", "wb") as file:
            np.array([202021.25], np.float32).tofile(file)
            np.array(flow.shape[1::-1], np.int32).tofile(file)
            flow.tofile(file)
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=PRETRAINED, help=f"(default: {PRETRAINED})")
    parser.add_argument("--videos", type=positive, default=12, help="(default: 12)")
    parser.add_argument("--pairs", type=positive, default=8, help="of each video (default: 8)")
    parser.add_argument("--height", type=positive, default=256, help="pixels, a multiple of 8 (default: 256)")
    parser.add_argument("--width", type=positive, default=384, help="pixels, a multiple of 8 (default: 384)")
    parser.add_argument("--num_flow_updates", type=positive, default=12, help="(default: 12)")
    parser.add_argument("--runs", type=positive, default=1, help="(default: 1)")
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    args = parser.parse_args(argv)
    seconds: dict[str, list[float]] = {}
    busy: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw_videos(folder / "videos", args.videos, args.pairs + 1, args.height, args.width)
        for number in range(args.runs):
            for candidate, run in candidates(folder / "videos", args).items():
                start = time.perf_counter()
                shares = run(folder / f"{candidate} {number}")
                seconds.setdefault(candidate, []).append(time.perf_counter() - start)
                busy.setdefault(candidate, []).extend(shares)
                written = len(list((folder / f"{candidate} {number}").rglob("*.flo")))
                if written != args.videos * args.pairs:
                    sys.exit(f"{candidate} has written {written} of {args.videos * args.pairs} files of flow")
    print(as_table(seconds, busy, args.videos * args.pairs))
    if args.output is not None:
        settings = {key: value for key, value in vars(args).items() if key != "output"}
        report = {"settings": settings, "machine": describe_machine("cpu"), "seconds": seconds, "model_busy": busy}
        write_json(args.output, report)


def draw_videos(folder: Path, count: int, num_frames: int, height: int, width: int) -> None:
    """Write videos of blobs that glide."""
    from flow_inference.video_files import VideoWriter

    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        noise = rng.normal(size=(height + 64, width + 64, 3)).astype(np.float32)
        texture = cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 4), None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)  # type: ignore[call-overload]
        with VideoWriter(folder / f"video_{number:03d}.mp4", 25) as video:
            for index in range(num_frames):
                left, top = 32 + 3 * index % 32, 32 + index % 32
                video.write(np.ascontiguousarray(texture[top : top + height, left : left + width]))


def candidates(videos: Path, args: argparse.Namespace) -> dict[str, Callable[[Path], list[float]]]:
    """Return functions from an output folder to the shares of time with the model busy, as far as they are known."""
    predict = [str(PROJECT / "predict_flow.py"), "--model", args.model]
    same_flow = ["--mixed_precision", "no", "--no_warm_start", "--num_flow_updates", str(args.num_flow_updates)]
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]

    def collection(output: Path, launcher: list[str], flags: list[str]) -> list[float]:
        report = output.with_suffix(".json")
        run([*launcher, *predict, *flags, str(videos), "--output", f"{output}/", "--report", str(report)])
        return [process["model_busy"] for process in json.loads(report.read_text())["processes"]]

    def one_by_one(output: Path) -> list[float]:
        for path in sorted(videos.glob("*.mp4")):
            run([*predict, *same_flow, "--video", str(path), "--output", f"{output / path.stem}/"])
        return []

    def torchvision_loop(output: Path) -> list[float]:
        size = "small" if "small" in Path(args.model).name else "large"
        run(["-c", PLAIN_LOOP, str(videos), str(output), str(args.num_flow_updates), size])
        return []

    return {
        "one process": lambda output: collection(output, [], same_flow),
        "two processes": lambda output: collection(output, launch, same_flow),
        "one by one": one_by_one,
        "torchvision": torchvision_loop,
        "default settings": lambda output: collection(output, [], []),
    }


def run(argv: list[str]) -> None:
    """Run a Python program on the CPU, and end with what it has printed where it fails."""
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(PROJECT)}
    result = subprocess.run([sys.executable, *argv], env=environment, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(argv)[:200]}: {result.stderr[-2000:]}")


def as_table(seconds: dict[str, list[float]], busy: dict[str, list[float]], num_pairs: int) -> str:
    """Return Markdown: a row for each candidate, with how many times the rate of the two peers it has."""
    rates = {name: num_pairs / statistics.median(taken) for name, taken in seconds.items()}
    lines = ["| | pairs a second | times one by one | times torchvision | model busy |", "|---|---:|---:|---:|---:|"]
    for name, rate in rates.items():
        shares: Any = f"{100 * statistics.mean(busy[name]):.0f} %" if busy[name] else ""
        peers = f"{rate / rates['one by one']:.2f} | {rate / rates['torchvision']:.2f}"
        lines.append(f"| {name} | {rate:.2f} | {peers} | {shares} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
