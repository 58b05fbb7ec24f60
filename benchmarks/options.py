"""The flags that the benchmarks share, and the JSON file that each of them writes."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe_machine


def make_parser(
    description: str | None, *, runs: int, height: int, width: int, num_flow_updates: int
) -> argparse.ArgumentParser:
    """A parser with the shared flags; the numbers are defaults, and what `make bench` measures."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )

    def add_number(flag: str, default: int, meaning: str) -> None:
        parser.add_argument(flag, type=positive, default=default, help=f"{meaning} (default: {default})")

    add_number("--runs", runs, "rounds that count, after one that does not")
    add_number("--height", height, "pixels, a multiple of 8")
    add_number("--width", width, "pixels, a multiple of 8")
    add_number("--num_flow_updates", num_flow_updates, "updates of the flow")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    return parser


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {number}")
    return number


def open_device(name: str) -> torch.device:
    """The device, with float32 computed as float32: TF32 differs by far more than rounding."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return torch.device(name)


def save_results(output: Path | None, arguments: argparse.Namespace, **results: Any) -> None:
    """Write results with the settings they were measured with and the machine."""
    if output is None:
        return
    settings = {name: value for name, value in vars(arguments).items() if not isinstance(value, Path)}
    if settings["device"] == "cpu":
        settings["threads"] = torch.get_num_threads()
    write_json(output, {"settings": settings, "machine": describe_machine(arguments.device)} | results)


def write_json(output: Path, report: dict[str, Any]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
