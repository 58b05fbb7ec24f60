"""train_log.jsonl: one JSON object a line, each step once, also after a resume; null for what does not exist."""

import json
import os
from pathlib import Path
from typing import Any

from flow_training.strict_json import to_json

FILE_NAME = "train_log.jsonl"


class RunLog:
    """Append figures of a run to its log.

    Args:
        output_dir: The run's folder.
        step: Steps done before this run goes on; lines of later ones are cut, and so are lines that are damaged, as
            the last one is where the run was killed.
        validation_due: The validation of that step is done again; its line is cut, too.

    Raises:
        OSError: It cannot be written; the log is as it was.
    """

    def __init__(self, output_dir: Path, step: int, validation_due: bool = False):
        self.path = output_dir / FILE_NAME
        kept = [line for line in read_log(self.path) if line["step"] <= step] if self.path.exists() else []
        if validation_due:
            kept = [line for line in kept if line["step"] < step or not any("validation/" in key for key in line)]
        unfinished = self.path.with_name(f"unfinished-{FILE_NAME}")
        try:
            with unfinished.open("w") as file:
                file.writelines(to_json(line) + "\n" for line in kept)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, self.path)
        except OSError as error:
            raise OSError(f"cannot write {self.path}: {error}") from error
        finally:
            unfinished.unlink(missing_ok=True)

    def write(self, figures: dict[str, Any]) -> None:
        """Add a line; it is in the file when this returns.

        Raises:
            OSError: It cannot be written, for example to a full disk.
        """
        try:
            with self.path.open("a") as file:
                file.write(to_json(figures) + "\n")
        except OSError as error:
            raise OSError(f"cannot write {self.path}: {error}") from error


def read_log(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a log; a kill may have torn the last, and a disk any other."""
    lines = []
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines
