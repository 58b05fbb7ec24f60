"""The flags that the benchmarks share, and the JSON file that each of them writes."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe_machine
from modeling_raft.configuration_raft import DOWNSAMPLE_FACTOR

SMALLEST = 128  # of torchvision's models


def make_parser(
    description: str | None, *, runs: int, height: int, width: int, num_flow_updates: int
) -> argparse.ArgumentParser:
    """A parser with the shared flags; the numbers are defaults, and what `make bench` measures."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )

    def add_number(flag: str, kind: Callable[[str], int], default: int, meaning: str) -> None:
        parser.add_argument(flag, type=kind, default=default, help=f"{meaning} (default: {default})")

    add_number("--runs", positive, runs, "rounds that count, after one that does not")
    add_number("--height", image_side, height, "pixels, a multiple of 8 and at least 128")
    add_number("--width", image_side, width, "pixels")
    add_number("--num_flow_updates", positive, num_flow_updates, "updates of the flow")
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device_name, default=default_device, help=f"(default: {default_device})")
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    return parser


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1; got {text!r}")
    return int(text)


def image_side(text: str) -> int:
    """Height or width of an image that every candidate takes."""
    side = positive(text)
    if side % DOWNSAMPLE_FACTOR or side < SMALLEST:
        raise argparse.ArgumentTypeError(f"must be a multiple of {DOWNSAMPLE_FACTOR}, at least {SMALLEST}; got {side}")
    return side


def device_name(text: str) -> str:
    try:
        torch.zeros(1, device=text)
    except (RuntimeError, AssertionError) as error:  # of devices that torch does not know, or that are not here
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used: {str(error).splitlines()[0]}") from error
    return text


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
