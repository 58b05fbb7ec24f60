"""Peak memory of training steps beside torchvision's in float32 with the usual loss.

    python -m benchmarks.bench_memory --output outputs/benchmarks/memory.json

Each value is that of a process of its own, two steps, above what the process had when everything was imported (on a
GPU: of what PyTorch gave out). `--runs` rounds of processes. About ten minutes on two CPU cores.
"""

from collections.abc import Sequence

import torch

from benchmarks.agreement import check_flows, check_losses
from benchmarks.bench_training import CANDIDATES, PEER
from benchmarks.cost import Cost, Job, measure
from benchmarks.options import make_parser, positive, save_results
from benchmarks.rounds import spread

STEPS = 2  # from the second on, what a step leaves behind counts, too


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, runs=1, height=384, width=512, num_flow_updates=12)
    parser.add_argument("--batch_size", type=positive, default=2, help="pairs in a step (default: 2)")
    arguments = parser.parse_args(argv)
    costs: dict[str, list[Cost]] = {candidate.name: [] for candidate in CANDIDATES}
    for _ in range(arguments.runs):
        for candidate in CANDIDATES:
            job = Job(
                candidate,
                task="training",
                batch=arguments.batch_size,
                height=arguments.height,
                width=arguments.width,
                num_flow_updates=arguments.num_flow_updates,
                calls=STEPS,
                device=arguments.device,
            )
            cost = measure(job)
            if cost is None:
                raise SystemExit(f"bench_memory: memory does not suffice for {candidate.name}; try a smaller --height")
            costs[candidate.name].append(cost)
            print(f"{candidate.name}: {cost.peak_gb:.2f} GB")
    differences = check_flows(CANDIDATES, {name: torch.from_numpy(taken[0].flow) for name, taken in costs.items()})
    check_losses({name: taken[0].loss for name, taken in costs.items() if taken[0].loss is not None}, PEER.name)

    peaks = {name: [cost.peak_gb for cost in taken] for name, taken in costs.items()}
    rows = [
        {
            "candidate": name,
            "peak_gb": spread(own),
            "share": spread([ours / theirs for ours, theirs in zip(own, peaks[PEER.name], strict=True)]),
            "difference_px": differences[name],
        }
        for name, own in peaks.items()
    ]
    save_results(arguments.output, arguments, results=rows)


if __name__ == "__main__":
    main()
