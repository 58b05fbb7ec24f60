"""How time and memory grow with the pixels and with the updates, beside torchvision's where it fits.

    python -m benchmarks.bench_scaling --output outputs/benchmarks/scaling.json

Three series, all of the large model in float32:

- pixels: inference of a pair of every size, 4 updates; time and memory, each point in a process of its own;
- updates: inference of a pair with `--height` and `--width`, time, in rounds within one process;
- training: a step on such a pair, time and memory, each point in a process of its own.

`python -m benchmarks.report` draws them. About fifteen minutes on two CPU cores, with 20 GB free.
"""

import argparse
import math
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.agreement import check_flows, estimate_flows
from benchmarks.candidates import Candidate, make_pairs
from benchmarks.cost import Cost, Job, measure
from benchmarks.memory_needed import estimate_bytes, fits
from benchmarks.options import image_side, make_parser, open_device, positive, save_results
from benchmarks.rounds import spread, time_in_rounds

SIZES = ("256x256", "384x512", "440x1024", "720x1280", "1088x1920", "2176x3840")  # height x width
UPDATES = (1, 2, 4, 8, 16, 32)
TRAINING_UPDATES = (1, 4, 12, 24)
PEER, DENSE = Candidate("torchvision"), Candidate("ours", options=("dense",))
ON_DEMAND = Candidate("ours", options=("on_demand",))
BY_PIXELS = [PEER, DENSE, ON_DEMAND]
BY_UPDATES = [PEER, DENSE, ON_DEMAND]
TRAINING = [PEER, DENSE, Candidate("ours", options=("dense", "checkpointing"))]
ENOUGH_SECONDS = 20.0  # of calls that count: large images take less than small ones to be timed well


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, runs=2, height=384, width=512, num_flow_updates=4)
    parser.add_argument(
        "--sizes", type=image_size, nargs="+", default=[image_size(size) for size in SIZES], metavar="HEIGHTxWIDTH",
        help=f"of the series of pixels (default: {' '.join(SIZES)})",
    )  # fmt: skip
    for flag, default, series in (
        ("--updates", UPDATES, "updates"),
        ("--training_updates", TRAINING_UPDATES, "training steps"),
    ):
        parser.add_argument(
            flag, type=positive, nargs="+", default=list(default), metavar="UPDATES",
            help=f"of the series of {series} (default: {' '.join(map(str, default))})",
        )  # fmt: skip
    arguments = parser.parse_args(argv)
    pixels = measure_pixels(arguments)
    training = measure_training(arguments)
    updates = measure_updates(arguments)  # last, as this process has little memory until here
    save_results(arguments.output, arguments, pixels=pixels, updates=updates, training=training)


def image_size(text: str) -> tuple[int, int]:
    """`HEIGHTxWIDTH` as numbers."""
    height, times, width = text.partition("x")
    if not times:
        raise argparse.ArgumentTypeError(f"must be HEIGHTxWIDTH; got {text!r}")
    return image_side(height), image_side(width)


def measure_pixels(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A point for every size and candidate: its cost, or what it would need."""
    points = []
    device = torch.device(arguments.device)
    for height, width in arguments.sizes:
        flows = {}
        for candidate in BY_PIXELS:
            point = {"candidate": candidate.name, "height": height, "width": width}
            cost = None
            # On demand is what large images are for: it is tried, whatever is free.
            if candidate == ON_DEMAND or fits(candidate, height, width, device):
                job = Job(
                    candidate, "inference", 1, height, width, arguments.num_flow_updates,
                    arguments.runs + 1, arguments.device, ENOUGH_SECONDS,
                )  # fmt: skip
                cost = measure(job)
            if cost is None:
                point["needed_gb"] = estimate_bytes(candidate, height, width) / 1e9
            else:
                point |= costs_of(cost)
                flows[candidate.name] = torch.from_numpy(cost.flow)
            points.append(point)
            print(describe(point))
        add_differences(points[-len(BY_PIXELS) :], BY_PIXELS, flows)
    return points


def measure_training(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A point for every number of updates and candidate, of training steps on one pair."""
    points = []
    height, width = arguments.height, arguments.width
    for updates in arguments.training_updates:
        flows = {}
        for candidate in TRAINING:
            point = {"candidate": candidate.name, "num_flow_updates": updates}
            cost = measure(Job(candidate, "training", 1, height, width, updates, 2, arguments.device))
            if cost is not None:  # otherwise it did not fit
                point |= costs_of(cost)
                flows[candidate.name] = torch.from_numpy(cost.flow)
            points.append(point)
            print(describe(point))
        add_differences(points[-len(TRAINING) :], TRAINING, flows)
    return points


def measure_updates(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A point for every number of updates and candidate, of inference."""
    points = []
    device = open_device(arguments.device)
    pixel_values = make_pairs(1, arguments.height, arguments.width)[0].to(device)
    for updates in arguments.updates:
        differences = check_flows(BY_UPDATES, estimate_flows(BY_UPDATES, pixel_values, updates))
        calls = {candidate.name: candidate.inference(pixel_values, updates) for candidate in BY_UPDATES}
        for name, seconds in time_in_rounds(calls, arguments.runs, device).items():
            point = {"candidate": name, "num_flow_updates": updates, "seconds": spread(seconds)}
            points.append(point | {"difference_px": differences[name]})
            print(describe(point))
    return points


def costs_of(cost: Cost) -> dict[str, Any]:
    return {"seconds": spread(cost.seconds), "first_gb": cost.first_gb, "peak_gb": cost.peak_gb}


def add_differences(points: list[dict[str, Any]], candidates: list[Candidate], flows: dict[str, torch.Tensor]) -> None:
    """Note at each point how far its flow is from that of the first candidate that had memory enough."""
    differences = check_flows([candidate for candidate in candidates if candidate.name in flows], flows)
    for point in points:
        point["difference_px"] = differences.get(point["candidate"])


def describe(point: dict[str, Any]) -> str:
    place = f"{point['height']} x {point['width']}" if "height" in point else f"{point['num_flow_updates']} updates"
    if "seconds" not in point:
        needed = point.get("needed_gb", math.nan)
        return f"{point['candidate']}, {place}: left out" + ("" if math.isnan(needed) else f", {needed:.0f} GB")
    memory = f", {point['peak_gb']:.2f} GB" if "peak_gb" in point else ""
    return f"{point['candidate']}, {place}: {point['seconds']['median']:.2f} s{memory}"


if __name__ == "__main__":
    main()
