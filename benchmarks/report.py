"""Results of the benchmarks -> Markdown tables in docs/speed.md, between its two markers, and the plots in docs/.

    python -m benchmarks.report --results outputs/benchmarks

Wants all results, of one machine with one set of versions, so that no table mixes what cannot be compared.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_as_sentence
from benchmarks.scaling_plots import plot_pixels, plot_updates

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
NAMES = ("inference", "runtimes", "training", "memory", "on_demand", "scaling", "data")
DATASETS = {"chairs": "FlyingChairs", "sintel": "Sintel", "things": "FlyingThings3D", "kitti": "KITTI"}

Report = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("outputs/benchmarks"), help="folder of the JSON files")
    parser.add_argument("--page", type=Path, default=Path("docs/speed.md"), help="Markdown file with the markers")
    parser.add_argument("--plots", type=Path, default=Path("docs"), help="folder of the plots")
    arguments = parser.parse_args(argv)
    try:
        reports = load_reports(arguments.results)
        page = put_between(BEGIN, END, arguments.page.read_text(encoding="utf-8"), as_markdown(reports))
    except (ValueError, OSError) as error:
        sys.exit(f"benchmarks.report: error: {error}")
    arguments.page.write_text(page, encoding="utf-8")
    arguments.plots.mkdir(parents=True, exist_ok=True)
    for name, plot in (("pixels", plot_pixels), ("updates", plot_updates)):
        plot(reports["scaling"]).savefig(arguments.plots / f"scaling_{name}.png", dpi=100)
    print(f"tables are in {arguments.page}, plots in {arguments.plots}")


def load_reports(folder: Path) -> dict[str, Report]:
    """The results of every benchmark, by its name.

    Raises:
        ValueError: Some are missing, or were measured on another machine or with other versions than the rest.
    """
    missing = [name for name in NAMES if not (folder / f"{name}.json").is_file()]
    if missing:
        commands = "".join(f"\n  python -m benchmarks.bench_{name} --output {folder / name}.json" for name in missing)
        raise ValueError(f"no results of {', '.join(missing)} in {folder}; `make bench` measures all, or{commands}")
    reports = {name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in NAMES}
    for name, report in reports.items():
        expected = reports["inference"]["machine"]
        # Data are loaded on the CPU, whatever the others run on; and a run may last beyond midnight.
        skipped = {"date"} | ({"gpu", "gpu_memory_gb", "bf16_instructions"} if name == "data" else set())
        for key in expected.keys() - skipped:
            if report["machine"][key] != expected[key]:
                raise ValueError(
                    f"{folder / name}.json was measured with {key} {report['machine'][key]}, inference.json with "
                    f"{expected[key]}: measure both again"
                )
    return reports


def put_between(begin: str, end: str, text: str, block: str) -> str:
    """A text with the block instead of what was between its two markers.

    Raises:
        ValueError: There is not exactly one pair of markers.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the page must have the lines {begin} and {end}, each once and in this order")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{block.strip()}\n{end}{rest.split(end)[1]}"


def as_markdown(reports: dict[str, Report]) -> str:
    """All tables, each below a line that says what it shows."""
    sections = [
        f"Measured by `make bench` on {describe_as_sentence(reports['inference']['machine'])}. Medians of interleaved "
        "rounds with the lowest and the highest; the same random weights and images for all. GB are 10^9 bytes of "
        "peak memory above the imports, each value from a process of its own.",
        inference_table(reports["inference"]),
        runtimes_table(reports["runtimes"]),
        training_table(reports["training"], reports["memory"]),
        on_demand_table(reports["on_demand"]),
        "Largest difference of flow in float32 between any of these and torchvision: "
        f"{largest_difference(reports):.1g} px.",
        data_table(reports["data"]),
    ]
    return "\n\n".join(sections)


def inference_table(report: Report) -> str:
    rows = [
        [
            describe_candidate(row["candidate"]),
            shown(row["seconds"]),
            shown(row["times_as_fast"]),
            f"{row['difference_px']:.1g}",
        ]
        for row in report["results"]
    ]
    head = ["", "seconds a pair", "times as fast as torchvision", "flow differs by at most, px"]
    return f"**Inference**, {setting(report)}:\n\n" + table(head, rows)


def runtimes_table(report: Report) -> str:
    rows = [
        [row["candidate"], shown(row["seconds"]), shown(row["times_as_fast"]), f"{row['mean_px']:.1g}"]
        for row in report["results"]
    ]
    head = ["", "seconds a pair", "times as fast as PyTorch fp32", "mean error, px"]
    model = report["settings"]["model"] or "large, random weights"
    return f"**Other runtimes**, {model}, {setting(report)}:\n\n" + table(head, rows)


def training_table(times: Report, memory: Report) -> str:
    peaks = {row["candidate"]: row for row in memory["results"]}
    same = {"height", "width", "num_flow_updates", "batch_size", "device"}
    if any(times["settings"][key] != memory["settings"][key] for key in same):
        raise ValueError("training.json and memory.json have other settings: measure both again")
    rows = []
    for row in times["results"]:
        peak = peaks[row["candidate"]]
        rows.append(
            [
                describe_candidate(row["candidate"]), shown(row["seconds"]), shown(row["times_as_fast"]),
                shown(peak["peak_gb"]), f"{peak['share']['median']:.0%}",
            ]
        )  # fmt: skip
    head = ["", "seconds a step", "times as fast as torchvision", "memory, GB", "of torchvision's"]
    batch = times["settings"]["batch_size"]
    caption = f"**Training step** (forward, loss, backward), batch of {batch}, {setting(times)}:"
    return f"{caption}\n\n{table(head, rows)}"


def on_demand_table(report: Report) -> str:
    size = describe_size(report["settings"]["height"], report["settings"]["width"])
    rows = []
    for row in report["results"]:
        times = shown(row["times_as_fast"])
        rows.append(
            [describe_candidate(row["candidate"]), size, shown(row["seconds"]), times, f"{row['first_gb']:.1f}"]
        )
        rows[-1].append(f"{row['peak_gb']:.1f}")
    for row in report["left_out"]:
        rows.append(
            [describe_candidate(row["candidate"]), size, "", "", f"would take about {row['needed_gb']:.0f}", ""]
        )
    largest, settings = report["largest"], report["settings"]
    large_size = describe_size(*settings["largest"])
    rows.append([describe_candidate(largest["candidate"]), large_size, f"{largest['seconds']:.1f}", "", ""])
    rows[-1][4:] = [f"{largest['first_gb']:.1f}", ""]
    peer = next((row["candidate"] for row in report["results"]), "")
    ratio = "times as fast as torchvision" if peer.startswith("torchvision") else "times as fast as the first"
    head = ["", "size", "seconds a pair", ratio, "memory, one pair, GB", "and pairs after it, GB"]
    updates = settings["num_flow_updates"]
    needed = largest["torchvision_needs_gb"]
    return (
        f"**Correlation on demand** (`config.correlation`), {updates} updates; at {large_size}, torchvision would "
        f"need about {needed:.0f} GB:\n\n{table(head, rows)}"
    )


def data_table(report: Report) -> str:
    columns = [
        (f"{DATASETS[result['dataset']]} ({result['content']})", result["whole"]) for result in report["results"]
    ]
    rows = [
        ["this project", *(f"{rates['ours_per_s']:.0f}" for _, rates in columns)],
        ["plain", *(f"{rates['baseline_per_s']:.0f}" for _, rates in columns)],
        ["times", *(f"{rates['ratio']:.1f}" for _, rates in columns)],
    ]
    caption = (
        "**Data loading**: pairs per second that one CPU core decodes, augments and turns into tensors, beside the "
        "same recipe on whole frames with Pillow:"
    )
    return f"{caption}\n\n{table(['', *(name for name, _ in columns)], rows)}"


def largest_difference(reports: dict[str, Report]) -> float:
    """Return the largest difference of any flow in float32, in pixels."""
    series = [reports[name]["results"] for name in ("inference", "training", "memory", "on_demand")]
    series += [reports["scaling"][name] for name in ("pixels", "updates", "training")]
    rows = [row for rows in series for row in rows if "fp32" in row["candidate"]]
    return max(row["difference_px"] for row in rows if row.get("difference_px") is not None)


def setting(report: Report) -> str:
    settings = report["settings"]
    size = describe_size(settings["height"], settings["width"])
    return f"{size}, {settings['num_flow_updates']} updates, {settings['runs']} rounds"


def describe_size(height: int, width: int) -> str:
    return f"{height}x{width}"


def describe_candidate(candidate: str) -> str:
    """Describe a candidate by its name, for a table."""
    library, size, precision, *options = candidate.split(" ")
    descriptions = {"checkpointing": "activation checkpointing", "on_demand": "on demand", "graph": "CUDA graph"}
    names = ["torchvision" if library == "torchvision" else "this project", size, precision]
    return ", ".join([*names, *(descriptions.get(option, option) for option in options)])


def shown(values: dict[str, float]) -> str:
    """Median (lowest to highest)."""
    return f"{values['median']:.2f} ({values['lowest']:.2f} to {values['highest']:.2f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
