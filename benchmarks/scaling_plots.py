"""The series of `bench_scaling` as two plots: cost against pixels, and against updates."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

PANEL_SIZE = (5.0, 3.8)  # inches, width and height
LOOKS = {  # color, marker and label of each candidate, the same in every panel
    "torchvision large fp32": ("C7", "s", "torchvision"),
    "ours large fp32 dense": ("C0", "o", "this project, dense"),
    "ours large fp32 on_demand": ("C2", "^", "this project, on demand"),
    "ours large fp32 dense checkpointing": ("C1", "v", "this project, dense, activation checkpointing"),
}


def plot_pixels(report: dict[str, Any]) -> Figure:
    """Seconds and memory of an inference against millions of pixels, both axes logarithmic."""
    points = [point | {"x": point["height"] * point["width"] / 1e6} for point in report["pixels"]]
    figure = _new_figure(2)
    updates = report["settings"]["num_flow_updates"]
    panels = (("seconds", f"seconds a pair, {updates} updates"), ("first_gb", "peak memory of a pair, GB"))
    for index, (key, title) in enumerate(panels, 1):
        axes = figure.add_subplot(1, 2, index, title=title, xlabel="millions of pixels", gid=f"pixels/{key}")
        axes.set_xscale("log")
        axes.set_yscale("log")
        _draw(axes, points, key)
    return _with_legend(figure)


def plot_updates(report: dict[str, Any]) -> Figure:
    """Seconds of an inference, and seconds and memory of a training step, against the number of updates."""
    settings = report["settings"]
    size = f"{settings['height']} x {settings['width']}"
    figure = _new_figure(3)
    panels = (
        ("updates", "seconds", f"seconds a pair, {size}"),
        ("training", "seconds", "seconds of a training step, one pair"),
        ("training", "peak_gb", "peak memory of training, one pair, GB"),
    )
    for index, (series, key, title) in enumerate(panels, 1):
        axes = figure.add_subplot(1, 3, index, title=title, xlabel="updates", gid=f"{series}/{key}")
        _draw(axes, [point | {"x": point["num_flow_updates"]} for point in report[series]], key)
        axes.set_ylim(bottom=0)
    return _with_legend(figure)


def _new_figure(panels: int) -> Figure:
    figure = Figure(figsize=(PANEL_SIZE[0] * panels, PANEL_SIZE[1]), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw(axes: Axes, points: list[dict[str, Any]], key: str) -> None:
    """A line for each candidate through the points at which it was measured; bars are lowest to highest."""
    for name, (color, marker, label) in LOOKS.items():
        measured = sorted((p for p in points if p["candidate"] == name and key in p), key=lambda point: point["x"])
        if not measured:
            continue
        x = [point["x"] for point in measured]
        values = [point[key] for point in measured]
        if isinstance(values[0], dict):
            axes.vlines(x, [v["lowest"] for v in values], [v["highest"] for v in values], color=color, linewidth=1)
            values = [v["median"] for v in values]
        axes.plot(x, values, color=color, marker=marker, markersize=4, linewidth=1, label=label)
    axes.grid(alpha=0.3, which="both")


def _with_legend(figure: Figure) -> Figure:
    lines = {str(line.get_label()): line for axes in figure.axes for line in axes.get_lines()}
    figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=len(lines))
    return figure
