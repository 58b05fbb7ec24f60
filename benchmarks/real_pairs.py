"""Flags, models and pairs of the benchmarks that measure models on real pairs with ground truth."""

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.bench_accuracy import open_datasets
from benchmarks.machine import describe_machine
from benchmarks.options import positive, write_json
from flow_data.datasets import DATASETS
from flow_data.features import to_sample
from flow_data.sample import FlowSample
from modeling_raft import RaftForOpticalFlow
from modeling_raft.convert_raft_checkpoint import load_raft


class RealPair(NamedTuple):
    """A pair with ground truth, and the padding of its data set's protocol."""

    sample: FlowSample
    padding: str


def make_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", type=Path, required=True, help="folder of the data sets' own folders")
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--num_flow_updates", type=positive, default=12, help="(default: 12)")
    parser.add_argument("--sources", nargs="*", help="data sets (default: all that are there)")
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    return parser


def open_all(args: argparse.Namespace, prog: str) -> tuple[dict[str, RaftForOpticalFlow], list[RealPair]]:
    """Load the models, by name, and read the pairs of the chosen data sets; mistakes end the program."""
    try:
        datasets = open_datasets(args.data_root)
        if unknown := sorted(set(args.sources or ()) - set(datasets)):
            raise ValueError(f"--sources must be among {', '.join(datasets)}; got {', '.join(unknown)}")
        models = {name: load_raft(name).eval() for name in args.models}
    except (ValueError, OSError) as error:
        sys.exit(f"{prog}: error: {error}")
    chosen = args.sources or list(datasets)
    pairs = [RealPair(to_sample(row), DATASETS[name].protocol.padding) for name in chosen for row in datasets[name]]
    return models, pairs


def save_results(args: argparse.Namespace, num_pairs: int, results: dict[str, Any]) -> None:
    """Write the results with their settings and the machine, where --output is given."""
    if args.output is not None:
        settings = {"models": args.models, "sources": args.sources, "num_flow_updates": args.num_flow_updates}
        machine = describe_machine("cpu")
        write_json(args.output, {"settings": settings | {"pairs": num_pairs}, "machine": machine, "results": results})
