"""Curves of runs: what is drawn is what is in the logs."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from flow_training.plot_log import load_logs, main, plot_runs, run_names

PROJECT = Path(__file__).resolve().parents[1]


def make_log(factor: float, steps: int = 5, validation: str | None = "synthetic") -> list[dict]:
    lines = []
    for step in range(1, steps + 1):
        lines.append({"step": step, "loss": factor / step, "epe": 2 * factor / step, "learning_rate": 1e-4 * step})
        if validation is not None and step % 2 == 0:
            lines.append({"step": step, f"validation/{validation}/epe": factor, f"validation/{validation}/1px": 0.5})
    return lines


def write_log(folder: Path, lines: list[dict], torn: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    return folder


def drawn(figure) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Key of the log -> run -> the points of its line."""
    return {
        axes.get_gid(): {
            line.get_label(): list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in axes.get_lines()
        }
        for axes in figure.axes
    }


def test_lines_are_the_logs():
    logs = {"one": make_log(3.0), "other": make_log(7.0, steps=9, validation="kitti_2015")}
    panels = drawn(plot_runs(logs))
    validation = {"validation/synthetic/epe", "validation/kitti_2015/epe"}
    assert set(panels) == {"loss", "epe", "learning_rate"} | validation
    for key, lines in panels.items():
        for name, log in logs.items():
            assert lines[name] == [(line["step"], line[key]) for line in log if key in line], (key, name)
    assert len(panels["loss"]["other"]) == 9 and panels["validation/kitti_2015/epe"]["one"] == []


def test_what_does_not_exist_is_a_gap():
    """null, and NaN in logs of older versions."""
    log = [{"step": step, "epe": value} for step, value in enumerate([4.0, None, 2.0, math.nan, 1.0], 1)]
    (line,) = [line for axes in plot_runs({"run": log}).axes if axes.get_gid() == "epe" for line in axes.get_lines()]
    assert list(line.get_xdata()) == [1, 2, 3, 4, 5]
    assert [None if math.isnan(value) else value for value in line.get_ydata()] == [4, None, 2, None, 1]


def test_a_run_has_one_color_in_every_panel_and_the_legend():
    figure = plot_runs({"one": make_log(3.0, validation=None), "other": make_log(7.0), "third": make_log(1.0)})
    colors = {axes.get_gid(): [line.get_color() for line in axes.get_lines()] for axes in figure.axes}
    assert len(colors) == 4 and all(color == ["C0", "C1", "C2"] for color in colors.values())
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["one", "other", "third"]
    assert [line.get_color() for line in legend.get_lines()] == ["C0", "C1", "C2"]


def test_scales_are_logarithmic_where_all_is_positive():
    def scales(log: list[dict]) -> dict[str, str]:
        return {axes.get_gid(): axes.get_yscale() for axes in plot_runs({"run": log}).axes}

    everywhere = {"loss": "log", "epe": "log", "learning_rate": "linear", "validation/synthetic/epe": "log"}
    assert scales(make_log(3.0)) == everywhere
    assert scales(make_log(3.0) + [{"step": 6, "loss": 0.0}])["loss"] == "linear"
    assert scales(make_log(3.0) + [{"step": 6, "loss": float("nan")}])["loss"] == "log"
    assert scales([{"step": 6, "learning_rate": 1.0}])["loss"] == "linear"  # nothing to draw


def test_names_are_folders_and_distinct(tmp_path):
    def names(*folders: str) -> list[str]:
        return run_names([tmp_path / folder / "train_log.jsonl" for folder in folders])

    assert names("outputs/chairs") == ["chairs"]
    assert names("outputs/chairs", "outputs/things") == ["chairs", "things"]
    assert names("first/chairs", "second/chairs") == ["first/chairs", "second/chairs"]
    assert names("first/a/chairs", "second/a/chairs", "things") == [
        "first/a/chairs",
        "second/a/chairs",
        "things",
    ]
    assert run_names([tmp_path / "a.jsonl", tmp_path / "b.jsonl"]) == ["a", "b"]
    with pytest.raises(ValueError, match="chairs/train_log.jsonl is given twice"):
        names("chairs", "things/../chairs")


def test_an_incomplete_last_line_is_ignored(tmp_path):
    log = make_log(3.0)
    run = write_log(tmp_path / "run", log, torn='{"step": 6, "lo')
    assert load_logs([run]) == {"run": log} == load_logs([run / "train_log.jsonl"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such log: .*run/train_log.jsonl"),
        (b"", "run/train_log.jsonl holds no complete line"),
        (b'{"step": 1, "lo', "run/train_log.jsonl holds no complete line"),
        (b"[1, 2]\n", "run/train_log.jsonl holds no complete line"),
        (b'{"loss": 1}\n', "run/train_log.jsonl holds no complete line"),
        (b"\xff\xd8\xff\xe0", "run/train_log.jsonl holds no complete line"),
    ],
)
def test_a_log_that_cannot_be_drawn_is_named(content, message, tmp_path):
    sound = write_log(tmp_path / "sound", make_log(3.0))
    (tmp_path / "run").mkdir()
    if content is not None:
        (tmp_path / "run" / "train_log.jsonl").write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        main([str(sound), str(tmp_path / "run"), "--output", str(tmp_path / "plot.png")])
    assert not (tmp_path / "plot.png").exists()
    with pytest.raises(SystemExit, match="no such log: .*nowhere"):
        main([str(tmp_path / "nowhere")])


@pytest.mark.slow
def test_command_writes_an_image_without_a_display(tmp_path):
    runs = [write_log(tmp_path / name, make_log(factor)) for name, factor in (("one", 3.0), ("other", 5.0))]
    command = [sys.executable, "-m", "flow_training.plot_log", *map(str, runs), "--output", str(tmp_path / "p.png")]
    environment = {"PATH": "/usr/bin:/bin", "MPLBACKEND": "", "HOME": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, env=environment)
    assert result.returncode == 0, result.stderr
    with Image.open(tmp_path / "p.png") as image:
        assert image.format == "PNG" and min(image.size) > 300
        assert image.convert("L").getextrema() == (0, 255)
