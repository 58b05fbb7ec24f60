"""JSON that every reader takes. RFC 8259 has neither NaN nor infinities; Python's `json` writes them all the same."""

import json
import math
from typing import Any


def to_json(value: Any, indent: int | None = None) -> str:
    """A value as JSON text, with null for every number that is not finite, such as a metric over no pixels.

    Args:
        value: Of dictionaries, lists, text, numbers, booleans and None.
        indent: As in `json.dumps`.
    """
    return json.dumps(_with_null(value), indent=indent, allow_nan=False)


def _with_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_null(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_null(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
