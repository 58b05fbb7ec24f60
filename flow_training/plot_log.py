"""Curves of one run or several, side by side.

python -m flow_training.plot_log RUN [RUN ...] [--output plot.png]
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from flow_data.optional_packages import MissingPackageError, needs_extra
from flow_training.run_log import FILE_NAME, read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = {"loss": "loss", "epe": "end-point error, px", "learning_rate": "learning rate"}
LINEAR = {"learning_rate"}  # its schedule is piecewise linear
PANELS_IN_A_ROW = 3
PANEL_SIZE = (5.0, 3.6)  # inches, width and height
MANY_POINTS = 60  # more would blur into a band if each were marked


def load_logs(paths: Sequence[Path]) -> dict[str, list[dict[str, Any]]]:
    """Load the logs of runs: name -> lines.

    Args:
        paths: Folders of runs, or log files.

    Raises:
        ValueError: A log does not exist, or is empty; the message names the file.
    """
    files = [path / FILE_NAME if path.is_dir() else path for path in paths]
    logs = {}
    for name, file in zip(run_names(files), files, strict=True):
        if not file.is_file():
            raise ValueError(f"no such log: {file}; a run is its output_dir or its {FILE_NAME}")
        lines = read_log(file)
        if not lines:
            raise ValueError(f"{file} holds no complete line with a step: nothing to draw yet, or no training log")
        logs[name] = lines
    return logs


def run_names(files: Sequence[Path]) -> list[str]:
    """Name each log file by its folder, with as many of the folders above as it takes to make the names unique.

    Raises:
        ValueError: A file is given twice.
    """
    resolved = [file.resolve() for file in files]
    for path in resolved:
        if resolved.count(path) > 1:
            raise ValueError(f"{path} is given twice")
    # Logs that were copied into one folder are named by their files.
    parts = [path.parts[1:-1] if path.name == FILE_NAME else (*path.parts[1:-1], path.stem) for path in resolved]
    names = []
    for part in parts:
        depth = 1
        while sum(other[-depth:] == part[-depth:] for other in parts) > 1 and depth < len(part):
            depth += 1
        names.append("/".join(part[-depth:]))
    return names


def plot_runs(logs: dict[str, list[dict[str, Any]]]) -> "Figure":
    """Plot loss, end-point error, learning rate and the end-point error on each validation set, in a panel each.

    Args:
        logs: Name of each run -> lines of its log, as `load_logs` reads them.

    Returns:
        The figure; each panel has the key of the log that it shows as its `gid`, and a line for each run that has it.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    with needs_extra("plot"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    panels = dict(PANELS)
    for lines in logs.values():
        for key in (key for line in lines for key in line):
            if key.startswith("validation/") and key.endswith("/epe"):
                panels[key] = f"validation on {key.split('/')[1]}: end-point error, px"

    columns = min(len(panels), PANELS_IN_A_ROW)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(PANEL_SIZE[0] * columns, PANEL_SIZE[1] * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for index, (key, title) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(rows, columns, index, title=title, xlabel="step", gid=key)
        _draw(axes, key, logs)
    figure.legend(figure.axes[0].get_lines(), list(logs), loc="outside lower center", ncols=min(len(logs), 4))
    return figure


def _draw(axes: "Axes", key: str, logs: dict[str, list[dict[str, Any]]]) -> None:
    drawn: list[float] = []
    for index, (name, lines) in enumerate(logs.items()):
        points = [
            (line["step"], math.nan if line[key] is None else line[key])  # null, and NaN in older logs: a gap
            for line in lines
            if isinstance(line.get(key, ""), (int, float, NoneType))
        ]
        # The color of a run is the same in all panels.
        marker = "." if len(points) < MANY_POINTS else ""
        axes.plot(*_transposed(points), label=name, color=f"C{index}", marker=marker, linewidth=1)
        drawn += [value for _, value in points if math.isfinite(value)]
    if key not in LINEAR and drawn and min(drawn) > 0:
        axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")


def _transposed(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flow_training.plot_log",
        description="Draw loss, end-point error and learning rate of runs side by side.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=f"a run's output_dir, or its {FILE_NAME}")
    parser.add_argument("--output", type=Path, default=Path("plot.png"), help="image to write (default: plot.png)")
    arguments = parser.parse_args(argv)
    try:
        plot_runs(load_logs(arguments.runs)).savefig(arguments.output, dpi=100)
    except (ValueError, OSError, MissingPackageError) as error:
        sys.exit(f"flow_training.plot_log: error: {error}")
    print(f"curves of {len(arguments.runs)} run(s) are in {arguments.output}")


if __name__ == "__main__":
    main()
