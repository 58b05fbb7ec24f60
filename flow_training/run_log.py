"""train_log.jsonl: a JSON object for each logged step, once also after a resume, with null for what does not exist."""

import json
import math
import os
from pathlib import Path
from typing import Any

FILE_NAME = "train_log.jsonl"


class RunLog:
    """Appends metrics of a run to its log.

    Args:
        output_dir: The run's folder.
        step: The step from which the run resumes. Lines of later steps are removed, and so are damaged lines, as the
            last one may be after a kill.
        validation_due: Whether the validation of that step is repeated; then its line is removed, too.

    Raises:
        OSError: It cannot be written; the log is unchanged.
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

    def write(self, metrics: dict[str, Any]) -> None:
        """Append a line; it is in the file when this returns.

        Raises:
            OSError: It cannot be written, for example to a full disk.
        """
        try:
            with self.path.open("a") as file:
                file.write(to_json(metrics) + "\n")
        except OSError as error:
            raise OSError(f"cannot write {self.path}: {error}") from error


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read all complete lines of a log: a kill may have cut the last, and a disk may have damaged others."""
    lines = []
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def to_json(value: Any, indent: int | None = None) -> str:
    """A value as strict JSON text, with null for every number that is not finite, such as a metric over no pixels.

    RFC 8259 has neither NaN nor infinities, which Python's `json` writes all the same.

    Args:
        value: Made of dictionaries, lists, text, numbers, booleans and None.
        indent: As in `json.dumps`.
    """
    return json.dumps(_with_null(value), indent=indent, allow_nan=False)


def _with_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_null(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_null(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
