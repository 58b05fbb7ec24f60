"""Speed and memory on a GPU beside torchvision's models with the same weights, and beside what the card can do.

    python -m benchmarks.bench_gpu --output outputs/benchmarks/gpu.json --page docs/speed.md
    python -m benchmarks.bench_gpu --device cpu        # the same code on tiny sizes, in a minute or two: a dry run

It needs neither network nor data, and ends within `--seconds`: each part runs in a process of its own, which is ended
when its time is over, and what it has reported until then counts. Tables come last.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu_parts import PARTS, Bench, Row
from benchmarks.gpu_tables import as_markdown, put_on_page
from benchmarks.machine import describe_machine
from benchmarks.options import device_name, positive, write_json

SECONDS = 460  # below eight minutes, with the start
GRACE = 5.0  # seconds for a case that has begun, after the time of a part is over
RESERVED = 10.0  # seconds for the tables


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device_name, default=default_device, help=f"(default: {default_device})")
    parser.add_argument("--seconds", type=positive, default=SECONDS, help=f"until it ends (default: {SECONDS})")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(default: all)")
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    parser.add_argument("--page", type=Path, help="page to put the tables on, between its markers; not from a CPU")
    arguments = parser.parse_args(argv)
    start = time.monotonic()

    rows: list[Row] = []
    for name in arguments.parts:
        left = arguments.seconds - RESERVED - (time.monotonic() - start)
        limit = PARTS[name][1] * arguments.seconds / SECONDS
        rows += run_part(name, arguments.device, min(limit, left - GRACE), ceilings_of(rows))
    report = {"machine": describe_machine(arguments.device), "seconds": time.monotonic() - start, "rows": rows}
    if arguments.output is not None:
        write_json(arguments.output, report)
    text = as_markdown(report)
    if arguments.page is not None and arguments.device != "cpu":
        put_on_page(arguments.page, text)
    print(f"\n{text}\n\n{time.monotonic() - start:.0f} seconds in all")
    if not any("seconds" in row for row in rows) and set(arguments.parts) & {"inference", "training"}:
        sys.exit("bench_gpu: error: nothing could be measured")


def ceilings_of(rows: list[Row]) -> dict[str, float]:
    """Return what the part `ceilings` has measured; infinity where it has not, so that floors are zero."""
    measured = next((row for row in rows if row["part"] == "ceilings" and "bandwidth" in row), None)
    names = ("fp32", "tf32", "fp16", "bf16", "bandwidth")
    return {name: measured[name] if measured else float("inf") for name in names}


def run_part(name: str, device: str, seconds: float, ceilings: dict[str, float]) -> list[Row]:
    """Run a part in a process of its own, for so many seconds at most; its rows, and one that says how it ended."""
    if seconds <= 0:
        return [{"part": name, "failed": "left out: the time was over"}]
    begin = time.monotonic()
    print(f"{name}: at most {seconds:.0f} s", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.touch()
        arguments = (name, device, seconds, ceilings, path)
        process = multiprocessing.get_context("spawn").Process(target=run_in_process, args=arguments)
        process.start()
        process.join(seconds + GRACE)
        ended = process.exitcode
        if ended is None:
            with contextlib.suppress(ProcessLookupError):  # it has not come so far as to make a group of its own
                os.killpg(int(process.pid or 0), signal.SIGKILL)  # with what it has started
            process.kill()
            process.join()
        # A process that was killed may have left half a line.
        lines = path.read_text().split("\n")[:-1]
    rows = [json.loads(line) for line in lines]
    if ended != 0:
        reason = "its time was over" if ended is None else f"it ended with exit code {ended}"
        rows.append({"part": name, "failed": f"not complete: {reason}"})
    print(f"{name}: {len(rows)} rows in {time.monotonic() - begin:.0f} s", flush=True)
    return rows


def run_in_process(name: str, device: str, seconds: float, ceilings: dict[str, float], path: Path) -> None:
    """What the process of a part does."""
    deadline = time.monotonic() + seconds
    os.setsid()  # a group of its own, with its workers and compilers
    with path.open("a") as file:

        def report(row: Row) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()
            shown = {key: value for key, value in row.items() if key not in ("times_as_fast", "kernels")}
            print("  ", shown, flush=True)

        on_cpu = torch.device(device).type == "cpu"
        if on_cpu:
            os.environ["ACCELERATE_USE_CPU"] = "true"
        PARTS[name][0](Bench(torch.device(device), on_cpu, report, deadline, ceilings))


if __name__ == "__main__":
    main()
