"""Rows of bench_gpu.py -> Markdown tables, on the screen and between the markers of a page."""

from pathlib import Path
from typing import Any

from benchmarks.machine import describe_as_sentence
from benchmarks.report import describe_candidate, describe_size, put_between, table

BEGIN, END = "<!-- gpu: begin -->", "<!-- gpu: end -->"

Row = dict[str, Any]


def put_on_page(page: Path, block: str) -> None:
    """Write the tables between the two markers of a page.

    Raises:
        ValueError: There is not exactly one pair of markers.
    """
    page.write_text(put_between(BEGIN, END, page.read_text(encoding="utf-8"), block), encoding="utf-8")


def as_markdown(report: dict[str, Any]) -> str:
    """All tables, the most important last, since the end of a log is what is seen first."""
    rows = report["rows"]
    sections = [
        f"Measured by `make bench-gpu` on {describe_as_sentence(report['machine'])}. Medians of interleaved rounds; "
        "the same random weights and images for all. GB are 10^9 bytes that PyTorch has given out at its peak beyond "
        "weights and images. The floor is what operations and bytes take at the rates below.",
        failures(rows),
        profiles(rows),
        video(rows),
        loader(rows),
        *timed(rows, "on demand", "Correlation on demand", "pairs"),
        *timed(rows, "training", "Training step", "pairs"),
        *timed(rows, "compiled training", "Training step, compiled", "pairs"),
        *timed(rows, "compiled inference", "Inference, compiled", "pairs"),
        *timed(rows, "inference", "Inference", "pairs"),
        ceilings(rows),
    ]
    return "\n\n".join(section for section in sections if section)


def ceilings(rows: list[Row]) -> str:
    for row in of_part(rows, "ceilings", "bandwidth"):
        rates = ", ".join(f"{name} {row[name] / 1e12:.3g}" for name in ("fp32", "tf32", "fp16", "bf16"))
        return f"Matrix product, 10^12 operations a second: {rates}; copy, {row['bandwidth'] / 1e9:,.0f} GB a second."
    return ""


def timed(rows: list[Row], part: str, title: str, unit: str) -> list[str]:
    """A table for each case of a part."""
    cases: dict[str, list[Row]] = {}
    for row in of_part(rows, part, "candidate"):
        cases.setdefault(describe_case(row), []).append(row)
    return [f"**{title}**, {case}:\n\n{case_table(of_case, unit)}" for case, of_case in cases.items()]


def describe_case(row: Row) -> str:
    named = [str(row[name]) for name in ("recipe", "size") if name in row]
    size = describe_size(row["height"], row["width"])
    return ", ".join([*named, size, f"{row['num_flow_updates']} updates", f"batch of {row['batch']}"])


def case_table(rows: list[Row], unit: str) -> str:
    floors = {row["candidate"].removeprefix("floor "): row for row in rows if "floor_seconds" in row}
    peers = list(dict.fromkeys(peer for row in rows for peer in row.get("times_as_fast", {})))
    head = ["", "ms", f"{unit}/s", *(f"x {peer.removeprefix('torchvision ')}" for peer in peers)]
    head += ["floor ms", "GB", "mean px"]
    lines = []
    for row in rows:
        if "floor_seconds" in row:
            continue
        name = describe_candidate(row["candidate"])
        if "failed" in row:
            lines.append([name, row["failed"], *[""] * (len(head) - 2)])
            continue
        median = row["seconds"]["median"]
        floor = floors.get(row["candidate"].split(" ")[2])
        own = row["times_as_fast"]
        times = [f"{own[peer]['median']:.2f}" if peer in own else "" for peer in peers]
        lines.append(
            [
                name, f"{1000 * median:.1f}", f"{row['batch'] / median:.1f}", *times,
                f"{1000 * floor['floor_seconds']:.1f}" if floor else "",
                f"{row['peak_gb']:.2f}" if row.get("peak_gb") is not None else "",
                f"{row['mean_px']:.1g}" if "mean_px" in row else "",
            ]
        )  # fmt: skip
    return table(head, lines)


def video(rows: list[Row]) -> str:
    lines = [
        [
            row["size"], row["candidate"], f"{row['frames_per_second']['median']:.1f}",
            f"{row['times_as_fast']['torchvision tf32']['median']:.2f}",
        ]
        for row in of_part(rows, "video", "frames_per_second")
    ]  # fmt: skip
    head = ["model", "FlowVideo", "frames/s", "x torchvision tf32, pair by pair"]
    return f"**Video**:\n\n{table(head, lines)}" if lines else ""


def loader(rows: list[Row]) -> str:
    lines = []
    for row in of_part(rows, "loader", "pairs_per_second"):
        phases = ", ".join(f"{name} {1000 * seconds:.1f} ms" for name, seconds in row.get("phases", {}).items())
        lines.append(
            f"- {row['candidate']}, {row['workers']} workers, crops of {describe_size(*row['crop'])}, batch of "
            f"{row['batch']}: {row['pairs_per_second']:.0f} pairs a second{'; ' if phases else ''}{phases}"
        )
    return "**Data loading** (synthetic pairs, drawn and augmented):\n\n" + "\n".join(lines) if lines else ""


def profiles(rows: list[Row]) -> str:
    sections = []
    for row in of_part(rows, "profile", "kernels"):
        lines = [[f"`{name}`", f"{spent:.2f}", str(count)] for name, spent, count in row["kernels"]]
        caption = f"**Kernels of one {row['candidate']}**: {row['launches']} launches, {row['total_ms']:.1f} ms"
        sections.append(f"{caption}:\n\n{table(['', 'ms', 'launches'], lines)}")
    return "\n\n".join(sections)


def failures(rows: list[Row]) -> str:
    lines = [f"- {row['part']}: {row['failed']}" for row in rows if "failed" in row and "candidate" not in row]
    return "Not measured:\n\n" + "\n".join(lines) if lines else ""


def of_part(rows: list[Row], part: str, key: str) -> list[Row]:
    return [row for row in rows if row["part"] == part and key in row]
