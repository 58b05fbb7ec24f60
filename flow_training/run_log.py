"""train_log.jsonl: one JSON object a line, each step once, also after a resume."""

import json
from pathlib import Path
from typing import Any

FILE_NAME = "train_log.jsonl"


class RunLog:
    """Append figures of a run to its log.

    Args:
        output_dir: The run's folder.
        step: Steps done before this run goes on; lines of later ones are cut, and so is a line that was torn when
            the run was killed.
    """

    def __init__(self, output_dir: Path, step: int):
        self.path = output_dir / FILE_NAME
        kept = [line for line in read_log(self.path) if line["step"] <= step] if self.path.exists() else []
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def write(self, figures: dict[str, Any]) -> None:
        """Add a line; it is in the file when this returns."""
        with self.path.open("a") as file:
            file.write(json.dumps(figures) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a log."""
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break  # torn by a kill
    return lines
