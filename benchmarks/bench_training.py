"""Seconds of a training step (forward, loss and backward) beside torchvision's in float32 with the usual loss.

    python -m benchmarks.bench_training --output outputs/benchmarks/training.json

All have the same random weights, images and labels. About five minutes on two CPU cores.
"""

from collections.abc import Sequence

from benchmarks.agreement import check_flows, check_losses, estimate_flows
from benchmarks.candidates import Candidate, make_pairs
from benchmarks.options import make_parser, open_device, positive, save_results
from benchmarks.rounds import compare_times, time_in_rounds

PEER = Candidate("torchvision")
CANDIDATES = [
    PEER,
    Candidate("ours"),
    Candidate("ours", options=("checkpointing",)),
    Candidate("ours", precision="bf16"),
    Candidate("ours", precision="bf16", options=("checkpointing",)),
]


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, runs=3, height=384, width=512, num_flow_updates=12)
    parser.add_argument("--batch_size", type=positive, default=2, help="pairs in a step (default: 2)")
    arguments = parser.parse_args(argv)
    device, updates = open_device(arguments.device), arguments.num_flow_updates
    tensors = make_pairs(arguments.batch_size, arguments.height, arguments.width)
    pixel_values, labels = (tensor.to(device) for tensor in tensors)
    differences = check_flows(CANDIDATES, estimate_flows(CANDIDATES, pixel_values, updates))
    calls = {candidate.name: candidate.training_step(pixel_values, labels, updates) for candidate in CANDIDATES}
    check_losses({name: call().item() for name, call in calls.items()}, PEER.name)
    seconds = time_in_rounds(calls, arguments.runs, device)
    peers = dict.fromkeys(calls, PEER.name)
    save_results(arguments.output, arguments, results=compare_times(seconds, peers, differences))


if __name__ == "__main__":
    main()
