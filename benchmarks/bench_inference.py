"""Seconds to estimate the flow of a pair: the large and the small model beside torchvision's in float32.

    python -m benchmarks.bench_inference --output outputs/benchmarks/inference.json

All have the same random weights and get the same images. About two minutes on two CPU cores.
"""

from collections.abc import Sequence

from benchmarks.agreement import check_flows, estimate_flows
from benchmarks.candidates import Candidate, make_pairs
from benchmarks.options import make_parser, open_device, save_results
from benchmarks.rounds import compare_times, time_in_rounds

CANDIDATES = [
    Candidate(library, size, precision)
    for size in ("large", "small")
    for library, precision in (("torchvision", "fp32"), ("ours", "fp32"), ("ours", "bf16"))
]


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, runs=7, height=384, width=512, num_flow_updates=12)
    arguments = parser.parse_args(argv)
    device, updates = open_device(arguments.device), arguments.num_flow_updates
    pixel_values = make_pairs(1, arguments.height, arguments.width)[0].to(device)
    differences = check_flows(CANDIDATES, estimate_flows(CANDIDATES, pixel_values, updates))
    calls = {candidate.name: candidate.inference(pixel_values, updates) for candidate in CANDIDATES}
    seconds = time_in_rounds(calls, arguments.runs, device)
    peers = {candidate.name: Candidate("torchvision", candidate.size).name for candidate in CANDIDATES}
    save_results(arguments.output, arguments, results=compare_times(seconds, peers, differences))


if __name__ == "__main__":
    main()
