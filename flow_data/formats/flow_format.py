"""What `flow_data.flow_io` needs to know of a flow format."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

MAX_KNOWN = 1e9  # pixels; larger values mean unknown flow in every floating format


class FlowFormat(NamedTuple):
    """A flow format.

    Args:
        suffix: lower case, with its dot.
        magic: the bytes that a file begins with.
        decode: (whole file, name for errors) -> values and mask. Values are floating, `(H, W, 2)` unless the file is
            no flow, in pixels. The mask is `(H, W)` bool, or None where NaN or huge values mean unknown flow. Raises
            ValueError for a file that is damaged, truncated, too long, or of another format.
        encode: (`(H, W, 2)` little-endian float32, `(H, W)` bool) -> the whole file, and `(H, W)` bool, True where the
            flow is known in it. Flow is finite where the mask is True, and `unknown` elsewhere.
        unknown: what stands for unknown flow in both components; None where `encode` takes care of it.
        range: which flow the format holds, for people.
    """

    suffix: str
    magic: bytes
    decode: Callable[[bytes, str], tuple[np.ndarray, np.ndarray | None]]
    encode: Callable[[np.ndarray, np.ndarray], tuple[bytes, np.ndarray]]
    unknown: float | None
    range: str


def floating_range(suffix: str) -> str:
    """The range of a format that holds float32."""
    return f"{suffix} (finite values up to {MAX_KNOWN:,.0f} px)"
