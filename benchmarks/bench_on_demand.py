"""Correlation on demand where the volume of all pairs is large: memory and time beside torchvision's.

    python -m benchmarks.bench_on_demand --output outputs/benchmarks/on_demand.json

Times are those of rounds in one process, memory is that of a process of its own. torchvision's and the dense way are
left out where they would not fit in what is free. Last comes a pair of `--largest` pixels, once. About eight minutes
on two CPU cores, with 20 GB free.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.agreement import check_flows, estimate_flows
from benchmarks.candidates import Candidate, make_pairs
from benchmarks.cost import Cost, Job, measure
from benchmarks.memory_needed import estimate_bytes, fits
from benchmarks.options import image_side, make_parser, open_device, save_results
from benchmarks.rounds import compare_times, time_in_rounds

ON_DEMAND = Candidate("ours", options=("on_demand",))
CANDIDATES = [Candidate("torchvision"), Candidate("ours", options=("dense",)), ON_DEMAND]


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, runs=3, height=1088, width=1920, num_flow_updates=4)
    parser.add_argument(
        "--largest", type=image_side, nargs=2, default=[2176, 3840], metavar=("HEIGHT", "WIDTH"),
        help="of the pair that is estimated on demand only (default: 2176 3840)",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    device, size = open_device(arguments.device), (arguments.height, arguments.width)
    large_height, large_width = arguments.largest
    large_size = (large_height, large_width)
    candidates = [c for c in CANDIDATES if c == ON_DEMAND or fits(c, *size, device)]
    left_out = [
        {"candidate": c.name, "needed_gb": estimate_bytes(c, *size) / 1e9} for c in CANDIDATES if c not in candidates
    ]
    for point in left_out:
        print(f"{point['candidate']}: left out, it would take about {point['needed_gb']:.0f} GB")

    # Memory first: this process has little of it yet.
    costs = {c.name: measure_cost(c, size, arguments, calls=2) for c in candidates}
    largest = measure_cost(ON_DEMAND, large_size, arguments, calls=1)

    pixel_values = make_pairs(1, *size)[0].to(device)
    differences = check_flows(candidates, estimate_flows(candidates, pixel_values, arguments.num_flow_updates))
    calls = {c.name: c.inference(pixel_values, arguments.num_flow_updates) for c in candidates}
    seconds = time_in_rounds(calls, arguments.runs, device)
    rows: list[dict[str, Any]] = compare_times(seconds, dict.fromkeys(calls, candidates[0].name), differences)
    for row in rows:
        cost = costs[row["candidate"]]
        row |= {"first_gb": cost.first_gb, "peak_gb": cost.peak_gb}
    save_results(
        arguments.output,
        arguments,
        results=rows,
        left_out=left_out,
        largest={
            "candidate": ON_DEMAND.name,
            "seconds": largest.seconds[0],
            "first_gb": largest.first_gb,
            "torchvision_needs_gb": estimate_bytes(CANDIDATES[0], *large_size, one_pair=True) / 1e9,
        },
    )


def measure_cost(candidate: Candidate, size: tuple[int, int], arguments: argparse.Namespace, calls: int) -> Cost:
    """The cost of an inference, printed."""
    updates = arguments.num_flow_updates
    height, width = size
    cost = measure(Job(candidate, "inference", 1, height, width, updates, calls, arguments.device))
    if cost is None:
        raise SystemExit(f"bench_on_demand: memory does not suffice for {candidate.name} at {height} x {width}")
    if not torch.from_numpy(cost.flow).isfinite().all():
        raise SystemExit(f"bench_on_demand: the flow of {candidate.name} at {height} x {width} is not finite")
    print(f"{candidate.name}, {height} x {width}: {cost.first_gb:.2f} GB, {cost.seconds[-1]:.1f} s")
    return cost


if __name__ == "__main__":
    main()
